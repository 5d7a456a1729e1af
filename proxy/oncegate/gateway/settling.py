"""What becomes of a claim at the end of its exchange: stored, released, or unknown."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, TypeVar

from oncegate.decision import RETRY, Disposition, Ending, Settlement, ending, usual_s
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.answers import Refuse, cancelled, not_sent, response_not_stored, upstream_lost
from oncegate.gateway.recording import Recording
from oncegate.gateway.response_reading import ResponseReading
from oncegate.gateway.routes import ExchangeDeps
from oncegate.messages.fields import only_value
from oncegate.messages.response_head import ResponseHead, response_digest
from oncegate.observe.labels import SETTLEMENTS, SettlementLabel
from oncegate.observe.outcome import Outcome, outcome_of
from oncegate.observe.tracing import Trace
from oncegate.rules.statuses import Statuses
from oncegate.store.leases import LeasedClaim
from oncegate.store.record import StoredResponse, cancelled_claim
from oncegate.store.results import ClaimEvent, SettleResult, SettleStatus
from oncegate.store.stages import DROPPED
from oncegate.store.store import Settling
from oncegate.store.stream_head import StreamHead
from oncegate.streams import released
from oncegate.streams.feeds import HeadOf, Running
from oncegate.streams.released import Released
from oncegate.upstream.errors import UpstreamLost
from oncegate.values import Value

T = TypeVar("T")
# Endings in which the request was sent and no whole response came.
LOST = (Ending.NO_RESPONSE, Ending.TRUNCATED)
# Endings that a cancel makes its own. Also where nothing was sent: a key that was free would be executed by a retry.
STOPPED = (*LOST, Ending.NOT_SENT)
# A record has room for no more (4 bytes).
MAX_TOOK_MS = 2**32 - 1


class Progress(Value):
    """How far an exchange got. It starts from the worst, and improves. `request_id`: of a JSON-RPC request.

    `sent`: a byte of the request may have left. `head` is the upstream's, `whole` the body of a small response,
    `recording` that of a streamed one, `trailers` what follows either. `reading`: of a response whose status alone does
    not tell. `cancelled`: why the exchange was ended, empty where it was not; `waiting`: what that ends at once.
    `settlement` is the last one tried, `settlements` are what is counted of it.
    """

    deps: ExchangeDeps
    held: LeasedClaim
    request_id: bytes = b""
    trace: Trace | None = None
    sent: bool = False
    head: ResponseHead | None = None
    whole: bytes = b""
    trailers: bytes = b""
    recording: Recording | None = None
    reading: ResponseReading | None = None
    cancelled: str = ""
    waiting: asyncio.Timeout | None = None
    lost: UpstreamLost | None = None
    upstream_s: float = 0.0
    settlement: Settlement | None = None
    settlements: tuple[SettlementLabel, ...] = ()

    def cancel(self, reason: str) -> bool:
        """Take note that the exchange is cancelled, and end what it waits for. Return False where it was already."""
        if self.cancelled:
            return False
        self.cancelled = reason
        if self.waiting is not None:
            self.waiting.reschedule(0)
        return True

    async def unless_cancelled(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return what `work` returns, or None where the exchange is cancelled, now or before."""
        if self.cancelled:
            work.close()
            return None
        try:
            async with asyncio.timeout(None) as self.waiting:
                return await work
        except TimeoutError:
            return None
        finally:
            self.waiting = None

    async def has_room(self, response: ResponseWriter) -> bool:
        """Wait for a slow client as `response.has_room` does, and no longer once the exchange is cancelled."""
        return await self.unless_cancelled(response.has_room()) is not False

    def note_reading(self, reading: ResponseReading | None) -> None:
        """Read this response from now on, and the one before no more."""
        if self.reading is not None:
            self.reading.close()
        self.reading = reading

    def read(self, statuses: Statuses, head: ResponseHead) -> Disposition:
        """Read a response whose status alone does not tell; return what it means, as far as its head says it."""
        self.note_reading(reading := ResponseReading(statuses, head, self.request_id, self.deps.memory))
        return reading.disposition

    @property
    def passing(self) -> ResponseReading | None:
        """The reading of a response whose messages are read while they pass."""
        return self.reading if self.reading is not None and self.reading.passing is not None else None

    @property
    def close_delimited(self) -> bool:
        """Whether a response that ended by closing alone was stored as complete."""
        return self.head is not None and self.head.close_delimited and self.settlement is Settlement.STORE

    @property
    def status(self) -> int:
        """The status of the response, also of one that is not whole or cannot be used; 0 for none."""
        return self.head.status if self.head else self.lost.status if self.lost else 0

    @property
    def reason(self) -> str:
        """How far it got and what ended it, for operators; nothing of the request or its response."""
        nothing = "no answer came" if self.sent else "nothing was sent"
        reached = f"status {self.status} came" if self.status else nothing
        if self.settlement is Settlement.CANCELLED:
            return f"cancelled: {self.cancelled}; {reached}"
        return f"{reached}: {self.lost}" if self.lost else reached if self.head else "the proxy failed"


def new_recording(
    progress: Progress, head: ResponseHead, max_bytes: int, on_broken: Callable[[], None]
) -> Recording | None:
    """Return the recording of a response that is to be stored, None where it is too large or the store too full.

    From now on duplicates may join it, unless it may still turn out to be none that is stored.
    """
    deps, held, recording = progress.deps, progress.held, None
    is_certain = progress.reading is None or not progress.reading.body_tells
    # Made where somebody reads, or where it goes to the store: most responses end before either.
    shown = partial(stream_head, head) if is_certain else None
    if (head.length or 0) <= max_bytes and not deps.store.full():
        recording = _recording(progress, head, max_bytes, on_broken, shown)
    else:
        held.stage = DROPPED
    if shown is not None:
        deps.feeds.begin(held.claim.key, Running(held.claim.token, shown, recording))
    return recording


def stream_head(head: ResponseHead) -> StreamHead:
    """Return what a follower needs to begin its response."""
    states_length = head.length is not None
    return StreamHead(
        head.status, head.reason, head.replayed_block, head.length, states_length, head.close_delimited, head.age_s
    )


def _recording(
    progress: Progress, head: ResponseHead, max_bytes: int, on_broken: Callable[[], None], shown: HeadOf | None
) -> Recording:
    deps = progress.deps
    return Recording(
        deps.store,
        progress.held,
        # Of its own: the head would keep a copy for the next response, which has seldom the same.
        response_digest(head.status, head.reason, head.replayed_block),
        max_bytes=max_bytes,
        settle_timeout_s=deps.settle_timeout_s,
        memory=deps.memory,
        ticker=deps.ticker,
        on_broken=on_broken,
        shown=shown,
    )


async def finish_recording(progress: Progress, recording: Recording, disposition: Disposition) -> tuple[Ending, bytes]:
    """Return how a streamed response ended, with its last bytes.

    What the store did not take in time is broken off: only this client would ever learn that it was complete.
    """
    last = await recording.finish()
    if recording.is_broken:
        progress.lost = UpstreamLost("the store did not take the answer in time")
        return Ending.TRUNCATED, b""
    return ending(disposition, recording.is_storing), last


def settle(progress: Progress, settlement: Settlement, last: bytes, timeout_s: float) -> Settling:
    """Return the settle of a claim. `last` are the bytes of a streamed response that the record does not have yet."""
    store, held, head = progress.deps.store, progress.held, progress.head
    progress.settlement = settlement
    if settlement.frees:
        held.freeing = True
        return (
            _noted_release(progress, timeout_s)
            if progress.deps.notes_releases
            else store.release(held.claim, timeout_s)
        )
    if head is None or not settlement.completes:
        claim = cancelled_claim(held.claim) if settlement is Settlement.CANCELLED else held.claim
        return store.mark_unknown(claim, progress.reason, timeout_s, progress.status)
    recording, whole = progress.recording, progress.whole
    if recording is not None:
        digest, chunks, size = recording.digest(progress.trailers), recording.chunks, recording.size
    else:
        running_digest = head.digest()
        running_digest.update(whole + progress.trailers if progress.trailers else whole)
        digest, chunks, size = running_digest.digest(), 1 if whole else 0, len(whole)
    has_body = settlement.stores_body and (recording is not None or not store.full())
    if settlement.stores_body and not has_body:
        progress.settlement = Settlement.STORE_WITHOUT_BODY
    states_length = head.length is not None or head.bodiless
    completed_ms, took_ms = store.now_ms(held.claim.key), int(progress.upstream_s * 1000)
    if took_ms > MAX_TOOK_MS:
        took_ms = MAX_TOOK_MS
    response = StoredResponse(
        # Positions, not names: arguments by name cost 7,000 instructions more (Python 3.11, measured).
        head.status, head.reason, head.replayed_block, digest, chunks, size, has_body, head.close_delimited,
        states_length, completed_ms, took_ms, head.age_s, progress.request_id, progress.trailers if has_body else b"",
    )  # fmt: skip
    return store.store(held.claim, response, last if has_body else b"", timeout_s)


async def _noted_release(progress: Progress, timeout_s: float) -> SettleResult:
    """Release a claim, and note before that why: whoever was told to come for its response must not find nothing."""
    head, claim, store = progress.head, progress.held.claim, progress.deps.store
    after = only_value(head.fields, b"retry-after") if head is not None else b""
    await released.note(store.marks, claim, Released.by(progress.status, after))
    return await store.release(claim, timeout_s)


def note_settlement(progress: Progress, result: SettleResult) -> None:
    """Note how a claim ended, for the request's report and for the usual time, and report a lost or fenced claim."""
    if progress.trace is not None:
        progress.trace.spent("settle")
    leases, held, usual = progress.deps.leases, progress.held, progress.deps.usual
    if progress.recording is not None:
        progress.recording.settled(result.status, progress.settlement, progress.trailers)
    if not result.status.is_done or progress.settlement is None:
        progress.settlements = (SETTLEMENTS[result.status.label],)
        if result.status is SettleStatus.FENCED:
            leases.report(ClaimEvent.FENCED, held)
        return
    progress.settlements = (SETTLEMENTS[progress.settlement.label],)
    if progress.settlement.completes:
        usual.seconds = usual_s(usual.seconds, progress.upstream_s)
    if result.record_was_gone:
        progress.settlements += (SettlementLabel.LOST,)
        leases.report(ClaimEvent.LOST, held)


def end_attempt(progress: Progress, trace: Trace) -> None:
    """Note on the request's trace how an attempt ended."""
    head, lost = progress.head, progress.lost
    error = ""
    if lost is not None and lost is not trace.lost:
        name = Outcome.UPSTREAM_TIMEOUT if lost.timeout else Outcome.TRUNCATED if head else Outcome.UPSTREAM_LOST
        error = Outcome.CANCELLED.label if progress.cancelled else name.label
    trace.lost = lost
    trace.end_attempt(progress.status if head or error else 0, error)


class WithoutResponse(NamedTuple):
    """What becomes of a client that gets no whole response. `refuse` None: its record has the answer."""

    outcome: Outcome
    refuse: Refuse | None


def without_response(
    progress: Progress, reached: Ending, status: SettleStatus, unsent: Refuse | None
) -> WithoutResponse | None:
    """Return how an exchange ended for its client, or None where the upstream's response is passed on.

    `status`: how the claim was settled. `unsent`: the answer to a request of which nothing was sent.
    """
    if status is SettleStatus.FENCED:
        return WithoutResponse(Outcome.FENCED, None)
    match reached:
        case Ending.NOT_SENT:
            refuse = unsent or not_sent("nothing was sent")
        case Ending.CANCELLED:
            refuse = cancelled(progress.status)
        case Ending.NO_RESPONSE | Ending.TRUNCATED:
            claim, timeout = progress.held.claim, progress.lost is not None and progress.lost.timeout
            # A retry does not execute again there: it is sent on with its key, or gets what the API says of it.
            mode = RETRY if claim.resend_ms or progress.deps.verdicts is not None else claim.mode
            refuse = upstream_lost(timeout=timeout, mode=mode, status=progress.status)
        case Ending.COMPLETE | Ending.TOO_LARGE if status is SettleStatus.UNCONFIRMED:
            refuse = response_not_stored()
        case _:
            return None
    return WithoutResponse(refuse.outcome or outcome_of(refuse.problem), refuse)


def clean_up(progress: Progress, reached: Ending | None, result: SettleResult | None) -> None:
    """Hold nothing, whatever happened, and settle in the background what is not settled yet.

    A way out that nobody thought of ends as unknown, unless provably nothing was sent.
    """
    deps, held = progress.deps, progress.held
    if deps.feeds.running:
        deps.feeds.over(held.claim.key, held.claim.token)
    if progress.recording is not None:
        progress.recording.close()
    if progress.reading is not None:
        progress.reading.close()
    if result is None or (not result.status.is_done and result.status is SettleStatus.UNCONFIRMED):
        if reached is None:
            unsure = Ending.NO_RESPONSE if progress.sent else Ending.NOT_SENT
            reached = Ending.CANCELLED if progress.cancelled else unsure
        settlement = reached.settlement
        if result is None or not settlement.completes:
            # A response whose settle was interrupted is not delivered either: unknown says no more than is known.
            settlement = Settlement.UNKNOWN if settlement.completes else settlement
            deps.background(settle(progress, settlement, b"", deps.settle_timeout_s))
    if not held.settled:
        deps.leases.drop(held)
