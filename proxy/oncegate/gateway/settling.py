"""What becomes of a claim at the end of its exchange: stored, released, or unknown."""

from dataclasses import dataclass

from oncegate.decision import Ending, Settlement
from oncegate.gateway.recording import Recording
from oncegate.gateway.routes import ExchangeDeps
from oncegate.gateway.waiters import Woken
from oncegate.messages.response_head import ResponseHead
from oncegate.observe.labels import SETTLEMENTS, SettlementLabel
from oncegate.store.events import ClaimEvent
from oncegate.store.leases import LeasedClaim
from oncegate.store.record import StoredResponse
from oncegate.store.results import SettleResult, SettleStatus
from oncegate.store.store import Settling
from oncegate.upstream.errors import UpstreamLost

# A record has room for no more (4 bytes).
MAX_TOOK_MS = 2**32 - 1


@dataclass(slots=True)
class Progress:
    """How far an exchange got. It starts from the worst, and improves.

    `sent`: a byte of the request may have left. `head` is the upstream's, `whole` the body of a small response,
    `recording` that of a streamed one. `settlement` is the last one tried, `settlements` are what is counted of it.
    """

    deps: ExchangeDeps
    held: LeasedClaim
    sent: bool = False
    head: ResponseHead | None = None
    whole: bytes = b""
    recording: Recording | None = None
    lost: UpstreamLost | None = None
    upstream_s: float = 0.0
    settlement: Settlement | None = None
    settlements: tuple[SettlementLabel, ...] = ()

    @property
    def close_delimited(self) -> bool:
        """Whether a response that ended by closing alone was stored as complete."""
        return self.settlement is Settlement.STORE and self.head is not None and self.head.close_delimited

    @property
    def reason(self) -> str:
        """How far it got and what ended it, for operators; nothing of the request or its response."""
        reached = f"status {self.head.status} came" if self.head else "no answer came"
        return f"{reached}: {self.lost}" if self.lost else reached if self.head else "the proxy failed"


def settle(progress: Progress, settlement: Settlement, last: bytes, timeout_s: float) -> Settling:
    """Return the settle of a claim. `last` are the bytes of a streamed response that the record does not have yet."""
    store, held, head = progress.deps.store, progress.held, progress.head
    progress.settlement = settlement
    if settlement is Settlement.RELEASE:
        held.freeing = True
        return store.release(held.claim, timeout_s)
    if settlement is Settlement.UNKNOWN or head is None:
        return store.mark_unknown(held.claim, progress.reason, timeout_s)
    recording, whole = progress.recording, progress.whole
    if recording is not None:
        digest, chunks, size = recording.digest(), recording.chunks, recording.size
    else:
        running_digest = head.digest()
        running_digest.update(whole)
        digest, chunks, size = running_digest.digest(), 1 if whole else 0, len(whole)
    has_body = settlement is Settlement.STORE and (recording is not None or not store.full())
    progress.settlement = Settlement.STORE if has_body else Settlement.STORE_WITHOUT_BODY
    response = StoredResponse(
        head.status,
        head.reason,
        head.replayed_block,
        digest,
        chunks,
        size,
        body_stored=has_body,
        close_delimited=head.close_delimited,
        stated_length=head.length is not None or head.bodiless,
        completed_ms=store.now_ms(held.claim.key),
        took_ms=min(int(progress.upstream_s * 1000), MAX_TOOK_MS),
        age_s=head.age_s,
    )
    return store.store(held.claim, response, last if has_body else b"", timeout_s)


def conclude_claim(progress: Progress, reached: Ending, result: SettleResult) -> None:
    """Note how a claim ended, report one that was lost, and wake the duplicates that wait for its key."""
    deps, held, status, settlement = progress.deps, progress.held, result.status, progress.settlement
    if settlement is None or status is SettleStatus.FENCED or status is SettleStatus.UNCONFIRMED:
        progress.settlements = (SETTLEMENTS[status.value],)
    else:
        progress.settlements = (SETTLEMENTS[settlement.label],)
    if result.record_was_gone:
        progress.settlements += (SettlementLabel.LOST,)
        deps.leases.report(ClaimEvent.LOST, held)
    if status is SettleStatus.FENCED:
        deps.leases.report(ClaimEvent.FENCED, held)
    if reached is Ending.NOT_SENT and status is SettleStatus.RELEASED:
        deps.waiters.nothing_was_sent(held.claim.key)
    else:
        deps.waiters.wake(held.claim.key, Woken.BUSY if reached is Ending.DECLINED else Woken.LOOK)


def clean_up(progress: Progress, reached: Ending | None, result: SettleResult | None) -> None:
    """Hold nothing, whatever happened, and settle in the background what is not settled yet.

    A way out that nobody thought of ends as unknown, unless provably nothing was sent.
    """
    deps, held = progress.deps, progress.held
    if progress.recording is not None:
        progress.recording.close()
    if result is None or result.status is SettleStatus.UNCONFIRMED:
        if reached is None:
            reached = Ending.NO_RESPONSE if progress.sent else Ending.NOT_SENT
        settlement = reached.settlement
        if result is None or not settlement.completes:
            # A response whose settle was interrupted is not delivered either: unknown says no more than is known.
            settlement = Settlement.UNKNOWN if settlement.completes else settlement
            deps.background(settle(progress, settlement, b"", deps.settle_timeout_s))
    if not held.settled:
        deps.leases.drop(held)
