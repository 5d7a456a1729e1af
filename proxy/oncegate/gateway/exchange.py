"""One execution: forward the request once, pass the answer on while it is stored, settle on every way out.

It starts from the worst ending and improves it as it gets further. The end of an answer (its last
byte, its last chunk, the closing) is held back until the store has confirmed the settle.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from oncegate.buffers.memory import MemoryBudget
from oncegate.decision import Disposition, Ending, Settlement, ending, must_reclaim
from oncegate.downstream.body import Body
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.recording import BROKEN, Recording
from oncegate.gateway.waiters import Waiters, Woken
from oncegate.keys.digests import Scope
from oncegate.messages.problems import Problem, problem
from oncegate.messages.request_head import with_fence
from oncegate.messages.response_head import ResponseHead
from oncegate.observe.labels import SETTLEMENTS, SettlementLabel
from oncegate.observe.outcome import BY_LABEL, Outcome
from oncegate.rules.policy import Policy
from oncegate.store.leases import LeasedClaim, Leases, suspended_clock_s
from oncegate.store.record import Claim, StoredResponse
from oncegate.store.results import SettleResult, SettleStatus, Unconfirmed
from oncegate.store.store import Settling, Store
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.pool import Pool

SMALL_BYTES = 65536  # an answer up to this whose end comes within
SMALL_S = 0.05  # of its head is stored first and sent in one write
MOST_MS = 2**32 - 1  # that a record has room for
# How often what was lost is sent again where the upstream is idempotent, and the longest pauses before.
AGAIN, AGAIN_FIRST_S, AGAIN_MOST_S = 3, 0.2, 2.0
LOST = (Ending.NO_RESPONSE, Ending.TRUNCATED)
# Bound once, as in `decision`: every exchange asks.
_NOT_SENT, _DECLINED = Ending.NOT_SENT, Ending.DECLINED
_STORE, _RELEASE, _UNKNOWN = Settlement.STORE, Settlement.RELEASE, Settlement.UNKNOWN
_STORABLE, _BUSY, _LOOK = Disposition.STORE, Woken.BUSY, Woken.LOOK
# What a passed-on answer says became of its key.
STATUS = {one.label: f"Oncegate-Status: {one.label}\r\n".encode() for one in Disposition}


@dataclass(frozen=True, slots=True)
class ExchangeDeps:
    """What every exchange of a worker works with; times in seconds."""

    store: Store
    leases: Leases
    waiters: Waiters
    pool: Pool
    buffered: MemoryBudget
    background: Callable[[Coroutine[Any, Any, Any]], None]
    settled: Callable[[SettlementLabel], None]
    close_delimited: Callable[[], None]
    silence_s: float
    reuse_idle_s: float
    store_timeout_s: float
    patience_s: float
    pace: MinimumRate  # what a client has to keep up
    longest_s: float  # no await of an exchange takes longer


class Exchange:
    """One claim's exchange with the upstream. `run` is called once."""

    upstream_s = 0.0
    sent = False
    _again_left: int | None = None  # tries after this one, while what was lost is sent again
    _lost: UpstreamLost | None = None
    _refusal: Problem | None = None
    _answer: ResponseHead | None = None
    _disposition = _STORABLE
    _outcome = Outcome.EXECUTED
    _whole = b""  # the body of a small answer
    _recording: Recording | None = None

    def __init__(
        self,
        deps: ExchangeDeps,
        held: LeasedClaim,
        scope: Scope,
        policy: Policy,
        head: bytes,
        body: Body,
        client: ResponseWriter,
    ) -> None:
        self._deps, self._held, self._scope, self._policy = deps, held, scope, policy
        self._request, self._body, self._client = head, body, client

    async def run(self) -> Outcome:
        """Forward, settle, conclude. Return the outcome; FENCED with a client that got nothing yet
        means that the record has the answer."""
        settled: SettleResult | None = None
        reached = None
        try:
            reached = await self._forward()
            if self._policy.upstream_idempotent:
                reached = await self._send_again(reached)
            self._touch()
            how, last = reached.settlement, self._whole
            if self._recording is not None and how is _STORE:
                reached, last = await self._recorded(self._recording)
                how = reached.settlement
            # An answer is worth waiting for; that there is none can be settled behind the client's back.
            patience_s = self._deps.patience_s if how.completes else self._deps.store_timeout_s
            settled = await self._settling(how, last, patience_s)
            if settled.status is SettleStatus.INCOMPLETE:
                how = Settlement.STORE_WITHOUT_BODY
                settled = await self._settling(how, b"", patience_s)
            self._tell(how, reached, settled)
            return self._conclude(reached, settled)
        finally:
            self._leave(reached, settled)

    @property
    def status(self) -> int:
        """The upstream's status, 0 where none came."""
        return self._answer.status if self._answer else 0

    @property
    def detail(self) -> str:
        """What was lost, for the log."""
        return str(self._lost or "")

    # Forwarding ...

    async def _forward(self) -> Ending:
        connection = self._ready() or await self._connect()
        if connection is None:
            return Ending.NOT_SENT
        began, silence_s = time.perf_counter(), self._deps.silence_s
        try:
            self._send(connection)
            if connection.response.head is None:
                await connection.next_arrival(silence_s)
            head = connection.response.head or await connection.wait_for_head(silence_s, self._touch)
            if self._is_small(head) and (
                connection.is_complete_in(SMALL_BYTES) or await connection.completes_within(SMALL_S, SMALL_BYTES)
            ):
                return self._take(connection)
            return await self._stream(connection, head)
        except UpstreamLost as lost:
            self._lost = lost.with_traceback(None)  # which would refer back to all of this
            return Ending.NO_RESPONSE if self._answer is None else Ending.TRUNCATED
        finally:
            self.upstream_s = time.perf_counter() - began
            self._deps.pool.release(connection)

    async def _send_again(self, reached: Ending) -> Ending:
        """Send what was lost once more, with the same key, to an upstream that executes a key only once.

        A few times, after a growing pause with full jitter, and only while the client got nothing yet.
        """
        most_s = AGAIN_FIRST_S
        for left in reversed(range(AGAIN)):
            if reached not in LOST or self._client.started or self._deps.pool.shut:
                break
            self._touch()
            await asyncio.sleep(random.uniform(0, most_s))
            most_s = min(most_s * 2, AGAIN_MOST_S)
            self._again_left, self._answer, self._whole = left, None, b""
            again = await self._forward()
            # That nothing could be sent this time says nothing of the time before.
            reached = Ending.NO_RESPONSE if again is Ending.NOT_SENT else again
        return reached

    def _ready(self) -> Connection | None:
        if must_reclaim(self._held.age_s(), self._policy.lease_ms):
            return None
        return self._deps.pool.ready(self._deps.reuse_idle_s)

    async def _connect(self) -> Connection | None:
        """Return a connection to send on while the claim is surely ours, None where nothing may be sent."""
        while True:
            self._touch()
            try:
                connection = await self._deps.pool.acquire(self._deps.reuse_idle_s)
            except NotSent as why:
                self._refusal = problem("upstream-unreachable", str(why))
                return None
            if not must_reclaim(self._held.age_s(), self._policy.lease_ms):
                return connection
            self._deps.pool.release(connection)
            if not await self._reclaim():
                return None

    async def _reclaim(self) -> bool:
        asked_s = suspended_clock_s()
        found = await self._deps.store.reclaim(self._held.claim, self._scope)
        if isinstance(found, Claim):
            if found.fence != self._held.claim.fence:  # it had vanished, and nobody can say what happened meanwhile
                self._deps.leases.report("lost", self._held)
            self._held.claim, self._held.confirmed_s = found, asked_s
            return True
        self._refusal = problem("store-unavailable", "the claim could not be confirmed before sending")
        if not isinstance(found, Unconfirmed):
            self._held.fenced = True
        return False

    def _send(self, connection: Connection) -> None:
        self.sent, self._held.stage = True, b"sent"
        claim, request = self._held.claim, self._request
        if claim.mode == b"retry":
            request = with_fence(request, claim.fence)
        if self._body.spooled:
            connection.send_stream(request, self._pieces(), chunked=False)
        else:
            connection.send(request, self._body.data)

    async def _pieces(self) -> AsyncIterator[bytes]:
        """Yield the body for as long as the key is ours: a process that was suspended may have lost it meanwhile.

        A store that does not answer stops nothing before the retention, for which the record stands.
        """
        asked_s = 0.0
        async for piece in self._body.stream():
            age_s = min(self._held.age_s(), suspended_clock_s() - asked_s)
            if must_reclaim(age_s, self._policy.lease_ms):
                asked_s = suspended_clock_s()
                if not await self._reclaim() and (
                    self._held.fenced or self._held.age_s() * 1000 >= self._policy.retention_ms
                ):
                    raise ConnectionError("the key is not ours any more")
            yield piece

    def _is_small(self, head: ResponseHead) -> bool:
        """Note an answer's head; return whether its body may be small."""
        disposition = self._policy.statuses.disposition(head.status, b"retry-after" in head.fields)
        if self._again_left is not None and head.status == 409:  # the first one is still running there
            if self._again_left:
                raise UpstreamLost("the upstream is still busy with the first request")
            disposition = Disposition.AMBIGUOUS
        self._answer, self._disposition, self._held.stage = head, disposition, b"answered"
        self._outcome = BY_LABEL[disposition.label]
        return head.bodiless or ((head.length or 0) <= SMALL_BYTES and not head.is_event_stream)

    def _take(self, connection: Connection) -> Ending:
        self._whole = whole = connection.take_body()
        return ending(self._disposition, len(whole) <= self._policy.max_stored_bytes and not self._deps.store.full())

    async def _stream(self, connection: Connection, head: ResponseHead) -> Ending:
        recording = self._recording = self._record(head)
        client, silence_s = self._client, self._deps.silence_s
        block = head.forwarded_block + STATUS[self._outcome.label]
        client.begin(head.status, head.reason, block, length=head.length, stated=True, eof=head.close_delimited)
        while data := await connection.next_chunk(silence_s):
            client.write(data)
            if recording is not None:
                recording.add(data)
                await recording.room()
                if recording.state in BROKEN:
                    return Ending.TRUNCATED
            if client.backlog:
                connection.pause_reading()  # a slow client holds one piece, not two
                while not await client.taken():
                    self._touch()
            self._touch()
        return ending(self._disposition, recording is not None and recording.kept)

    def _record(self, head: ResponseHead) -> Recording | None:
        """Return the recording of an answer that is to be stored and may fit."""
        too_large = (head.length or 0) > self._policy.max_stored_bytes or self._deps.store.full()
        if self._disposition is not _STORABLE or too_large:
            return None
        return Recording(
            self._deps.store,
            self._held,
            head.digest(),
            limit=self._policy.max_stored_bytes,
            patience_s=self._deps.patience_s,
            buffered=self._deps.buffered,
        )

    def _touch(self) -> None:
        """Say that the code is alive."""
        self._held.until_s = self._deps.pool.loop.time() + self._deps.longest_s

    # Settling ...

    async def _recorded(self, recording: Recording) -> tuple[Ending, bytes]:
        """Return how an answer that was streamed ended, with its last bytes. What the store did not take in time is
        broken off: that it came whole would be told to this client alone."""
        last = await recording.finish()
        self._touch()
        if recording.state in BROKEN:
            self._lost = UpstreamLost("the store did not take the answer in time")
            return Ending.TRUNCATED, b""
        return ending(self._disposition, recording.kept), last

    def _settling(self, how: Settlement, last: bytes, patience_s: float) -> Settling:
        store, claim, answer = self._deps.store, self._held.claim, self._answer
        if how is _RELEASE:
            self._held.freeing = True
            return store.release(claim, patience_s)
        if how is _UNKNOWN or answer is None:
            return store.mark_unknown(claim, self._why(), patience_s)
        kept = how is _STORE
        return store.store(claim, self._stored(answer, kept), last if kept else b"", patience_s)

    def _why(self) -> str:
        """Return how far it got and what ended it, for operators; nothing of the request or its answer."""
        far = f"status {self._answer.status} came" if self._answer else "no answer came"
        return f"{far}: {self._lost}" if self._lost else far if self._answer else "the proxy failed"

    def _stored(self, head: ResponseHead, kept: bool) -> StoredResponse:
        recording, whole = self._recording, self._whole
        if recording is None:
            digest = head.digest()
            digest.update(whole)
            digested, chunks, size = digest.digest(), 1 if whole else 0, len(whole)
        else:
            digested, chunks, size = recording.digest(), recording.chunks, recording.size
        status, reason, block, close_delimited = head.status, head.reason, head.replayed_block, head.close_delimited
        stated, now_ms = head.length is not None or head.bodiless, self._deps.store.now_ms(self._held.claim.key)
        took_ms = min(int(self.upstream_s * 1000), MOST_MS)
        return StoredResponse(
            status=status,
            reason=reason,
            block=block,
            digest=digested,
            chunks=chunks,
            size=size,
            kept=kept,
            close_delimited=close_delimited,
            stated_length=stated,
            completed_ms=now_ms,
            took_ms=took_ms,
            age_s=head.age_s,
        )

    def _tell(self, how: Settlement, reached: Ending, settled: SettleResult) -> None:
        """Report what is noteworthy, and wake those who wait for this key."""
        status = settled.status
        nothing_done = status in (SettleStatus.FENCED, SettleStatus.UNCONFIRMED)
        self._deps.settled(SETTLEMENTS[status.value if nothing_done else how.label])
        if settled.record_was_gone:
            self._deps.settled(SettlementLabel.LOST)
            self._deps.leases.report("lost", self._held)
        if status is SettleStatus.FENCED:
            self._deps.leases.report("fenced", self._held)
        if self._answer is not None and self._answer.close_delimited and how is _STORE:
            self._deps.close_delimited()
        self._deps.leases.drop(self._held)
        key, waiters = self._held.claim.key, self._deps.waiters
        if reached is _NOT_SENT and status is SettleStatus.RELEASED:
            waiters.nothing_was_sent(key)
        else:
            waiters.wake(key, _BUSY if reached is _DECLINED else _LOOK)

    def _leave(self, reached: Ending | None, settled: SettleResult | None) -> None:
        """Whatever happened: nothing stays held, and what is not settled yet is settled behind our back.

        A way out that nobody thought of ends as unknown, unless provably nothing was sent.
        """
        if self._recording is not None:
            self._recording.close()
        if reached is None:
            reached = Ending.NO_RESPONSE if self.sent else Ending.NOT_SENT
        how = reached.settlement
        if settled is None or (settled.status is SettleStatus.UNCONFIRMED and not how.completes):
            # An answer whose settle was interrupted is not delivered either: unknown says no more than is known.
            how = Settlement.UNKNOWN if how.completes else how
            self._deps.background(self._settling(how, b"", self._deps.patience_s))
        if not self._held.settled:
            self._deps.leases.drop(self._held)

    # What the client gets ...

    def _conclude(self, reached: Ending, settled: SettleResult) -> Outcome:
        if settled.status is SettleStatus.STORED:
            self._deliver()
            return self._outcome
        if settled.status is SettleStatus.FENCED:
            return self._give_up(Outcome.FENCED, None)
        match reached:
            case Ending.NOT_SENT:
                refused = self._refusal or problem("upstream-unreachable", "nothing was sent")
                return self._give_up(BY_LABEL[refused.code], refused)
            case Ending.NO_RESPONSE | Ending.TRUNCATED:
                return self._give_up(*self._failure())
            case Ending.COMPLETE | Ending.TOO_LARGE if settled.status is SettleStatus.UNCONFIRMED:
                detail = "the answer is not stored yet; a retry with the same key shows what became of it"
                return self._give_up(Outcome.ANSWER_NOT_STORED, problem("answer-not-stored", detail))
        self._deliver()
        return self._outcome

    def _failure(self) -> tuple[Outcome, Problem]:
        mode = self._held.claim.mode
        if self._client.started:
            return Outcome.TRUNCATED, problem("upstream-lost", "the answer broke off")
        if self._lost is not None and self._lost.timeout:
            detail = "no answer came in time; the request may have been executed"
            return Outcome.UPSTREAM_TIMEOUT, problem("upstream-timeout", detail).for_mode(mode)
        detail = "no whole answer came; the request may have been executed"
        return Outcome.UPSTREAM_LOST, problem("upstream-lost", detail).for_mode(mode)

    def _give_up(self, outcome: Outcome, instead: Problem | None) -> Outcome:
        """Answer with a problem, or break off an answer that has begun. None: somebody else answers."""
        if self._client.started:
            self._client.abort()
        elif instead is not None:
            refused = outcome in (Outcome.UPSTREAM_UNREACHABLE, Outcome.STORE_UNAVAILABLE)
            status = b"refused" if refused else b"unknown"
            self._client.answer(instead, b"Oncegate-Status: %s\r\n" % status)
        return outcome

    def _deliver(self) -> None:
        """Send the end of a streamed answer, or all of a small one."""
        head, client = self._answer, self._client
        if client.started or head is None:
            client.end()
            return
        block = head.forwarded_block + STATUS[self._outcome.label]
        client.send(
            head.status,
            head.reason,
            block,
            self._whole,
            stated_length=head.length is not None,
            bodiless=head.bodiless,
            close_delimited=head.close_delimited,
        )
