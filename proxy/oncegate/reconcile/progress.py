"""How far the reconciling of one key is: a mark beside its record, and every change of it. Pure.

A mark is changed by compare-and-set alone. One that is lost, or that belongs to another claim, an earlier lease or
another plan, begins anew: then "not found" counts later, and never sooner.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b

from oncegate.decision import Verdict
from oncegate.probing.absence import Absence
from oncegate.probing.plan import Plan
from oncegate.store.record_name import store_key
from oncegate.store.record_view import RecordView

# Of what is said about the last answer.
_WHY_CHARACTERS = 200
# Longer than any plan goes on: for a record whose end the store does not tell.
_LASTS_MS = 100 * 86_400_000
_STORE_MS = 1000


@dataclass(frozen=True, slots=True)
class Progress:
    """The reconciling of one claim. Times by the store's clock, in ms.

    `token`: of the claim. `lease_ms`: the end of its lease if that lapsed, else 0: an owner that wakes up may send
    more, and begins another progress with its next lease. `since_ms`: when somebody first saw it unknown. `due_ms`: of
    the next question. `leased_ms`: until when nobody else asks, 0 while nobody does. `asked`: questions so far.
    `agreed`: how many of the last answers said absent, and count. `verdict`, `why`: of the last answer, empty before
    it. `left`: why it is left to a person, empty while it is not. `plan`: a digest of the plan by which it is asked.
    """

    token: bytes
    lease_ms: int
    since_ms: int
    due_ms: int
    leased_ms: int = 0
    asked: int = 0
    agreed: int = 0
    verdict: str = ""
    why: str = ""
    left: str = ""
    plan: str = ""

    def pack(self) -> bytes:
        numbers = [self.lease_ms, self.since_ms, self.due_ms, self.leased_ms, self.asked, self.agreed]
        return json.dumps([self.token.hex(), *numbers, self.verdict, self.why, self.left, self.plan]).encode()

    def is_due(self, now_ms: int) -> bool:
        """Return whether somebody may ask now."""
        return not self.left and self.due_ms <= now_ms and self.leased_ms <= now_ms

    def wait_ms(self, now_ms: int) -> int:
        """Return how long until somebody may ask."""
        return max(0, self.due_ms - now_ms, self.leased_ms - now_ms)


def mark_name(key: bytes) -> bytes:
    """Return the name of the mark of a key."""
    return store_key(key) + b":reconcile"


def lasts_ms(record: RecordView) -> int:
    """Return how long a mark is kept: as long as its record."""
    return record.left_ms if record.left_ms > 0 else _LASTS_MS


def unpack(packed: bytes, record: RecordView, plan: Plan | None = None) -> Progress | None:
    """Return the progress of a record in its mark; None for that of any other, and for what is none.

    `plan`: by which it has to be asked; None: by any.
    """
    progress = _read(packed)
    if progress is None or (progress.token, progress.lease_ms) != (record.token, record.lease_end_ms):
        return None
    return progress if plan is None or progress.plan == digest_of(plan) else None


def next_s(packed: bytes, token: bytes, plan: Plan, now_ms: int) -> float | None:
    """Return how long until the next question about a claim, by the mark of its key; None: nobody asks any more."""
    progress = _read(packed)
    if progress is None or progress.token != token or progress.plan != digest_of(plan):
        return plan.first_after_s
    return None if progress.left else progress.wait_ms(now_ms) / 1000


def _read(packed: bytes) -> Progress | None:
    try:
        token, *numbers, verdict, why, left, plan = json.loads(packed)
        lease, since, due, leased, asked, agreed = map(int, numbers)
        return Progress(bytes.fromhex(token), lease, since, due, leased, asked, agreed, verdict, why, left, plan)
    except (ValueError, TypeError):
        return None


# The same few plans again and again.
@lru_cache(256)
def digest_of(plan: Plan) -> str:
    """Return what tells a plan from another: what it asks, and what answers mean."""
    # The representation leaves the credentials out.
    return blake2b(repr(plan).encode(), digest_size=6).hexdigest()


# Transitions ...


def begin(record: RecordView, plan: Plan) -> Progress:
    """Return the progress of a key that was just found unknown. Its first question waits for the API to settle."""
    now_ms = record.now_ms
    due_ms = now_ms + _ms(plan.first_after_s)
    return Progress(record.token, record.lease_end_ms, now_ms, due_ms, plan=digest_of(plan))


def leased(progress: Progress, plan: Plan, now_ms: int) -> Progress:
    """Return the progress while one process asks: twice the time of its question, and what the store may take.

    If it dies, or cannot note the answer, none of those before counts either: nobody knows what the API said.
    """
    return replace(progress, leased_ms=now_ms + 2 * _ms(plan.timeout_s) + _STORE_MS, agreed=0)


def answered(progress: Progress, verdict: Verdict, why: str, counts: bool, now_ms: int) -> Progress:
    """Return the progress after an answer, or none (inconclusive). `counts`: an absence counts.

    Anything but an absence that counts ends the row of those that agree. Its next question is due at once; `later`
    says when.
    """
    agreed = progress.agreed + 1 if verdict is Verdict.ABSENT and counts else 0
    return replace(
        progress,
        due_ms=now_ms,
        leased_ms=0,
        asked=progress.asked + 1,
        agreed=agreed,
        verdict=verdict.value,
        why=why[:_WHY_CHARACTERS],
    )


def later(progress: Progress, plan: Plan, jitter: float) -> Progress:
    """Return the progress with the pause before its next question: doubling, up to the plan's most.

    `jitter`: from 0 to 1; it takes away up to half, so that the keys of one outage do not stay together.
    """
    pause_s = min(plan.most_s, plan.first_after_s * 2 ** min(progress.asked, 30))
    return replace(progress, due_ms=progress.due_ms + _ms(pause_s * (1 - jitter / 2)))


def left(progress: Progress, why: str) -> Progress:
    """Return the progress of a key that is a person's from now on."""
    return replace(progress, leased_ms=0, left=why)


# What time says ...


def is_over(progress: Progress, plan: Plan, now_ms: int) -> bool:
    """Return whether the time is over in which the API is asked about a key: at least once, within twice that time."""
    times = 1 if progress.asked else 2
    return now_ms - progress.since_ms >= times * _ms(plan.reconcile_for_s)


def absence(plan: Plan) -> Absence:
    """Return when an absence frees a key under a plan."""
    return Absence(_ms(plan.absent_after_s), _ms(plan.absent_before_s), plan.absent_agree)


def last_byte_ms(progress: Progress) -> int:
    """Return the latest time at which a byte of the request may have been sent.

    Nobody noted it. The owner of a lapsed record sent nothing after its lease; any other had marked the key unknown
    before somebody saw that.
    """
    return progress.lease_ms or progress.since_ms


def first_claim_ms(record: RecordView) -> int:
    """Return when the key was first claimed: a later claim may have taken it over."""
    return record.kept.first_ms or record.created_ms


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
