"""The claims of this worker: one task keeps all their leases alive, one list says what is in flight."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from oncegate.decision import must_reclaim
from oncegate.keys.digests import Scope
from oncegate.store.record import Claim
from oncegate.store.results import RenewStatus, Unconfirmed
from oncegate.store.store import Store

# Returns seconds on a clock that goes on while the machine sleeps, as leases do.
suspended_clock_s = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


@dataclass(slots=True, eq=False)
class LeasedClaim:
    """A claim and how it is doing.

    `confirmed_s`: when the store was last asked and said yes (suspended_clock_s). `until_s`: how long the
    code that holds it may take before it counts as hung and the lease is let go (the loop's time).
    """

    claim: Claim
    confirmed_s: float
    until_s: float
    stage: bytes = b"claimed"  # how far the exchange got: claimed, sent or answered
    lost: bool = False
    fenced: bool = False
    freeing: bool = False  # its release is under way: that the record is gone, or another's, is no loss any more
    settled: bool = False
    reported: bool = field(default=False)

    def age_s(self) -> float:
        return suspended_clock_s() - self.confirmed_s


class Report(Protocol):
    """Hears of a claim that is no longer what it was: `what` is lost or fenced."""

    def __call__(self, what: str, claim: Claim) -> None: ...


class Leases:
    """What this worker has claimed and not settled."""

    def __init__(self, store: Store, lease_ms: int, report: Report, clock: Callable[[], float]) -> None:
        self._store, self._period_s, self._report, self._clock = store, lease_ms / 3000, report, clock
        self._held: dict[bytes, LeasedClaim] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def hold(self, claim: Claim, asked_s: float, longest_s: float) -> LeasedClaim:
        """Keep a claim's lease alive from now on. `asked_s`: when the store was asked for it; `longest_s`: how long
        whoever holds it may take until it says so again."""
        held = LeasedClaim(claim, asked_s, self._clock() + longest_s)
        self._held[claim.key] = held
        return held

    def drop(self, held: LeasedClaim) -> None:
        """Let a claim go; it is settled, or nothing more can be done for it."""
        held.settled = True
        if self._held.get(held.claim.key) is held:
            del self._held[held.claim.key]

    def report(self, what: str, held: LeasedClaim) -> None:
        """Say once that a claim is lost or fenced."""
        if not held.reported:
            held.reported = True
            self._report(what, held.claim)

    async def reclaim(self, held: LeasedClaim, scope: Scope) -> bool:
        """Ask the store whether a key is still ours, and claim it again where it is free; return whether it is ours."""
        asked_s = suspended_clock_s()
        claimed = await self._store.reclaim(held.claim, scope)
        if not isinstance(claimed, Claim):
            held.fenced = held.fenced or not isinstance(claimed, Unconfirmed)
            return False
        # With another fence the record had vanished, and nobody can say what happened meanwhile.
        if claimed.fence != held.claim.fence:
            self.report("lost", held)
        held.claim, held.confirmed_s = claimed, asked_s
        return True

    async def while_ours(self, held: LeasedClaim, scope: Scope, blocks: Iterable[bytes]) -> AsyncIterator[bytes]:
        """Yield blocks for as long as a key is ours. A process that was suspended may have lost it meanwhile.

        A store that does not answer stops nothing before the retention is over, for which the record exists. Raises
        ConnectionError once the key is lost.
        """
        asked_s, claim = 0.0, held.claim
        for block in blocks:
            age_s = min(held.age_s(), suspended_clock_s() - asked_s)
            if must_reclaim(age_s, claim.lease_ms):
                asked_s = suspended_clock_s()
                is_ours = await self.reclaim(held, scope)
                if not is_ours and (held.fenced or held.age_s() * 1000 >= claim.retention_ms):
                    raise ConnectionError("the key is not ours any more")
            yield block

    async def run(self) -> None:
        """Renew every lease three times in its length, until cancelled. All leave in one write."""
        while True:
            await asyncio.sleep(self._period_s)
            now = self._clock()
            alive = [held for held in self._held.values() if held.until_s > now and not held.fenced]
            await asyncio.gather(*[self._renew(held) for held in alive])

    async def _renew(self, held: LeasedClaim) -> None:
        asked_s = suspended_clock_s()
        status = await self._store.renew(held.claim, held.stage)
        if held.settled or held.freeing:
            return  # its settle went ahead; what the renewal found is that
        if status is RenewStatus.RENEWED:
            held.confirmed_s = asked_s
        elif status is RenewStatus.ABSENT:
            held.lost = True
            self.report("lost", held)
        elif status is RenewStatus.FENCED:
            held.fenced = True
            self.report("fenced", held)
