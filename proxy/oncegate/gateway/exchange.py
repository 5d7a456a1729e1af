"""One execution: forward the request once, pass the response on while it is stored, settle on every way out.

It starts from the worst ending and improves it as it gets further. The end of a response (its last byte, its last
chunk, the closing) is held back until the store has confirmed the settle.
"""

import asyncio
import time
from typing import Final

from oncegate.adaptation.event_ids import Numbering, number_events
from oncegate.adaptation.heartbeats import DIGESTS, takes_comments
from oncegate.decision import RETRY, Disposition, Ending, Settlement, ending
from oncegate.downstream.request import Request
from oncegate.gateway.answers import Refuse, not_confirmed, not_sent
from oncegate.gateway.keyed_request import KeyedRequest
from oncegate.gateway.relay import pass_interims
from oncegate.gateway.response_reading import Resends, check_idle_timeout, unsent, window_s
from oncegate.gateway.settling import (
    LOST,
    STOPPED,
    Progress,
    clean_up,
    end_attempt,
    finish_recording,
    new_recording,
    note_settlement,
    settle,
    without_response,
)
from oncegate.messages.request_head import with_execution
from oncegate.messages.response_head import ResponseHead
from oncegate.messages.trailers import without
from oncegate.observe.outcome import BY_LABEL, Outcome
from oncegate.store import stages
from oncegate.store.leases import LeasedClaim
from oncegate.store.results import SettleResult, SettleStatus
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.window import completes_within

# A response of at most so many bytes whose end comes soon after its head is stored first, and sent in one write.
SMALL_BYTES = 65536
# By how a response settles its key (a disposition's label): the outcome, and the field that says so.
OUTCOMES = {one.label: (BY_LABEL[one.label], f"Oncegate-Status: {one.label}\r\n".encode()) for one in Disposition}
# Bound once for the request path, as in `decision`.
_STORE: Final = Disposition.STORE
_STORED: Final = OUTCOMES[_STORE.label]


class Exchange:
    """One claim's exchange with the upstream. `run` is called once; `progress` says how far it got.

    `refuse`: the client has nothing yet, and gets this. Outcome FENCED with no response begun means that the record
    has the answer.
    """

    def __init__(self, keyed: KeyedRequest, held: LeasedClaim, head: bytes, client: Request) -> None:
        """`client` is the request as the client sent it, `head` its open head for the upstream."""
        self._deps, self._policy = keyed.route.deps, keyed.route.policy
        self._scope, self._body = keyed.claim_request.scope, keyed.body
        self._held, self._request, self._client, self._response = held, head, client, client.response
        self._key_id, caller = keyed.key_id, keyed.caller
        self._key_fields = keyed.own_fields(client, held.claim.token, held.claim.created_ms)
        self.progress = Progress(self._deps, held, b"" if caller is None else caller.id, keyed.trace)
        self.refuse: Refuse | None = None
        self._not_sent: Refuse | None = None
        # Of a request whose upstream executes a key only once.
        self._resends: Resends | None = None
        # The one that the request is on now; and what gives events ids, under a rule that says so.
        self._connection: Connection | None = None
        self._numbering: Numbering | None = None
        self._disposition = _STORE
        self._outcome, self._status_field = _STORED
        held.cancel = self.cancel
        if self._policy.upstream_idempotent:
            kept_ms = self._policy.upstream_key_retention_ms
            self._resends = Resends(held.claim, kept_ms, self._deps.store.now_ms)
            self.progress.sent = self._resends.left is not None

    def cancel(self, reason: str) -> bool:
        """End the exchange: close the upstream connection, and leave the key unknown in the mode `cancelled`.

        Nothing is sent from now on; a response that is complete is still stored. `reason` is for operators. Return
        False where the exchange was cancelled before.
        """
        is_first = self.progress.cancel(reason)
        if self._connection is not None:
            self._connection.fail(UpstreamLost(f"cancelled: {reason}"))
        return is_first

    async def run(self) -> Outcome:
        """Forward, settle, conclude; return the outcome."""
        deps, progress = self._deps, self.progress
        reached: Ending | None = None
        result: SettleResult | None = None
        try:
            reached = await self._forward()
            if self._resends is not None:
                reached = await self._resend(self._resends, reached)
            settlement, last = reached.settlement, progress.whole
            if progress.recording is not None and not settlement.stores_body:
                # Nothing is appended behind the settle.
                progress.recording.close()
            elif progress.recording is not None:
                self._extend_watchdog()
                reached, last = await finish_recording(progress, progress.recording, self._disposition)
                self._extend_watchdog()
                settlement = reached.settlement
            if progress.cancelled and reached in STOPPED:
                reached, settlement = Ending.CANCELLED, Settlement.CANCELLED
            # A response is worth waiting for. That there is none can be settled after the client was answered.
            timeout_s = deps.settle_timeout_s if settlement.completes else deps.store_timeout_s
            result = await settle(progress, settlement, last, timeout_s)
            # `is_done` is nearly always true, and costs a twelfth of an enum member's look-up.
            if not result.status.is_done and result.status is SettleStatus.INCOMPLETE:
                result = await settle(progress, Settlement.STORE_WITHOUT_BODY, b"", timeout_s)
            deps.leases.drop(self._held)
            # Nearly always false; the endings are looked up for the few claims that free their key.
            frees = reached.settlement.frees
            deps.waiters.claim_ended(
                self._held.claim.key,
                not_sent=frees and reached is Ending.NOT_SENT and result.status.is_done,
                declined=frees and reached is Ending.DECLINED,
            )
            note_settlement(progress, result)
            if self._resends is not None and self._resends.is_retry and result.status.is_done and settlement.completes:
                deps.resent(self._resends.age_s)
            return self._conclude(reached, result)
        finally:
            clean_up(progress, reached, result)

    # Forwarding ...

    async def _forward(self) -> Ending:
        deps, progress = self._deps, self.progress
        ready = deps.pool.ready(deps.reuse_idle_s) if self._held.is_certain() else None
        self._connection = connection = ready or await self._connect()
        if connection is None:
            return unsent(self._resends)
        began, silence_s = time.perf_counter(), deps.silence_s
        try:
            self._send(connection)
            if connection.response.head is None:
                await connection.next_arrival(silence_s)
            head = connection.response.head or await connection.wait_for_head(silence_s, self._note_interim)
            if connection.response.interims:
                self._note_interim()
            if head.status == 408:
                check_idle_timeout(connection, head, self._policy.statuses)
            if self._policy.sse_ids:
                head, self._numbering = number_events(head, self._held.claim.token)
            head = self._client.kept_head(head) if self._policy.adaptation.replays_cookies else head
            if self._may_be_small(head) and (
                connection.is_complete_in(SMALL_BYTES)
                or await completes_within(connection, window_s(progress.reading, silence_s), SMALL_BYTES)
            ):
                progress.whole = whole = connection.take_body()
                progress.trailers = self._response.trailers = connection.response.trailers
                if progress.reading is not None and progress.reading.body_tells:
                    self._dispose(progress.reading.end(whole))
                return ending(self._disposition, len(whole) <= self._policy.max_stored_bytes)
            return await self._stream(connection, head)
        except NotSent as reason:
            self._not_sent = not_sent(str(reason))
            return unsent(self._resends)
        except UpstreamLost as lost:
            # Its traceback would refer back to all of this.
            progress.lost = lost.with_traceback(None)
            return Ending.NO_RESPONSE if progress.head is None else Ending.TRUNCATED
        finally:
            progress.upstream_s = time.perf_counter() - began
            if progress.trace is not None:
                end_attempt(progress, progress.trace)
            self._connection = None
            deps.pool.release(connection)

    async def _resend(self, resends: Resends, reached: Ending) -> Ending:
        """Send a lost request once more, with the same key, a few times, and only while the client has got nothing."""
        while reached in LOST and not self._response.started and not self._deps.pool.shut:
            self._extend_watchdog()
            pause_s = resends.pause_s()
            if pause_s is None or not await self.progress.unless_cancelled(asyncio.sleep(pause_s, True)):
                break
            self.progress.head, self.progress.whole = None, b""
            self.progress.note_reading(None)
            reached = await self._forward()
        return reached

    async def _connect(self) -> Connection | None:
        """Return a connection to send on while the claim is certain, None where nothing may be sent."""
        deps, progress = self._deps, self.progress
        while True:
            self._extend_watchdog()
            try:
                connection = await progress.unless_cancelled(deps.pool.acquire(deps.reuse_idle_s))
            except NotSent as reason:
                self._not_sent = not_sent(str(reason))
                return None
            # Also of a lease that was renewed meanwhile: connecting takes its time, and the upstream forgets.
            is_over = progress.cancelled or (self._resends is not None and not self._resends.may_send())
            if connection is None or (self._held.is_certain() and not is_over):
                return connection
            deps.pool.release(connection)
            if is_over or not await deps.leases.reclaim(self._held, self._scope):
                self._not_sent = not_confirmed()
                return None

    def _send(self, connection: Connection) -> None:
        self.progress.sent, self._held.stage = True, stages.SENT
        claim, body, head, trace = self._held.claim, self._body, self._request, self.progress.trace
        head = head if trace is None else trace.begin_attempt(head)
        request = with_execution(head, self._key_id, claim.fence, fenced=claim.mode == RETRY)
        if body.spooled:
            # Until its retention is over there is a record; but what the API is asked about may be freed by a verdict.
            silent_ms = claim.lease_ms if self._policy.reconcile is not None else claim.retention_ms
            blocks = self._deps.leases.while_ours(self._held, self._scope, body.blocks(), silent_ms)
            connection.send_stream(request, blocks, chunked=False)
        else:
            connection.send(request, body.data, may_bind=self._client.known is None)

    def _may_be_small(self, head: ResponseHead) -> bool:
        """Note a response's head; return whether its body may be small."""
        if self._resends is not None:
            self._resends.check_busy(head)
        known = self._policy.statuses.by_status.get(head.status)
        disposition = known or self.progress.read(self._policy.statuses, head)
        self.progress.head, self._held.stage = head, stages.RESPONSE_BEGUN
        if disposition is not self._disposition or self._resends is not None:
            self._dispose(disposition)
        return head.bodiless or ((head.length or 0) <= SMALL_BYTES and not head.is_event_stream)

    def _dispose(self, disposition: Disposition) -> None:
        if self._resends is not None:
            disposition = self._resends.read(disposition, self.progress.status)
        self._disposition = disposition
        self._outcome, self._status_field = OUTCOMES[disposition.label]

    async def _stream(self, connection: Connection, head: ResponseHead) -> Ending:
        recording = None
        if self._disposition is _STORE:
            max_bytes = self._policy.max_stored_bytes
            recording = self.progress.recording = new_recording(self.progress, head, max_bytes, self._wake_stream)
        response, silence_s, passing = self._response, self._deps.silence_s, self.progress.passing
        if passing is not None:
            # The head leaves before it is known.
            self._status_field = b""
        response.begin(head.status, head.reason, self._block(head), head.length, head.framing)
        if self._policy.heartbeats is not None and takes_comments(head):
            response.comment_every(self._policy.heartbeats.period_s)
        held, clock, longest_s, numbering = self._held, self._deps.clock, self._deps.longest_s, self._numbering

        def pass_on(data: bytes) -> bool:
            """Pass on the next bytes; return whether more may come at once. Names at hand cost less than attributes."""
            response.write(data)
            # The watchdog.
            held.until_s = clock() + longest_s
            if passing is not None:
                passing.add(data)
            has_room = recording is None or recording.add(data)
            return has_room and not response.has_backlog

        take = pass_on if numbering is None else numbering.through(pass_on)
        while await connection.pass_body(take, silence_s):
            if recording is not None:
                await recording.wait_room()
            while response.has_backlog and not await self.progress.has_room(response):
                self._extend_watchdog()
            if recording is not None and recording.is_broken:
                return Ending.TRUNCATED
            self._extend_watchdog()
        if numbering is not None and (rest := numbering.rest()):
            pass_on(rest)
        trailers = connection.response.trailers if numbering is None else without(connection.response.trailers, DIGESTS)
        self.progress.trailers = response.trailers = trailers
        if passing is not None:
            self._dispose(passing.end())
        return ending(self._disposition, recording is not None and recording.is_storing)

    def _wake_stream(self) -> None:
        """Wake `_stream`, which breaks the response off: its recording is broken."""
        if self._connection is not None:
            self._connection.wake()

    def _extend_watchdog(self) -> None:
        """Push back the watchdog: past this deadline `Leases` treats the exchange as hung and stops renewing."""
        self._held.until_s = self._deps.clock() + self._deps.longest_s

    def _note_interim(self) -> None:
        """Take note of interim responses: the upstream is alive, and the client may get them."""
        self._extend_watchdog()
        if self._policy.pass_interim and self._connection is not None:
            pass_interims(self._connection, self._response)

    # What the client gets ...

    def _conclude(self, reached: Ending, result: SettleResult) -> Outcome:
        is_whole = result.status.is_done and reached.settlement.completes
        ended = None if is_whole else without_response(self.progress, reached, result.status, self._not_sent)
        if ended is None:
            self._deliver()
            return self._outcome
        # A response that has begun is aborted: what there is of it must not look complete.
        if self._response.started:
            self._response.abort()
            return Outcome.TRUNCATED if ended.refuse is not None and reached in LOST else ended.outcome
        self.refuse = ended.refuse
        return ended.outcome

    def _deliver(self) -> None:
        """Send the end of a streamed response, or all of a small one."""
        head, response = self.progress.head, self._response
        if response.started or head is None:
            response.end()
            return
        response.send(head.status, head.reason, self._block(head), self.progress.whole, head.framing)

    def _block(self, head: ResponseHead) -> bytes:
        """Return the header fields that the client gets."""
        return self._client.adapted_block(head, head.forwarded_block + self._status_field + self._key_fields)
