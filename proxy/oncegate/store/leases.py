"""The leases of a worker's claims: one background task renews all of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Protocol

from oncegate.decision import must_reclaim
from oncegate.keys.digests import Scope
from oncegate.store.record import Claim
from oncegate.store.results import ClaimEvent, RenewStatus, Unconfirmed
from oncegate.store.stages import CLAIMED, Stage
from oncegate.store.store import Store
from oncegate.values import Value

# Returns seconds on a clock that goes on while the machine sleeps, as leases do.
suspended_clock_s = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


def do_nothing() -> None:
    """Stand in for a callback that nobody has set."""


def cancel_nothing(_: str) -> bool:
    """Stand in for `cancel` where there is no exchange: before it is made, and once its claim is settled."""
    return False


class LeasedClaim(Value, eq=False):
    """A claim that this worker holds, and the state of its lease."""

    claim: Claim
    # When the last call that confirmed the claim was sent (suspended_clock_s).
    confirmed_s: float
    # The exchange's watchdog deadline (the loop's time). Past it the exchange counts as hung, and the lease ends.
    until_s: float
    # How far the exchange got, for operators.
    stage: Stage = CLAIMED
    lost: bool = False
    fenced: bool = False
    # While a release is under way, a record that is gone or has another owner is no loss.
    freeing: bool = False
    settled: bool = False
    reported: bool = False
    # Called when a renewal finds another owner.
    on_fenced: Callable[[], None] = do_nothing
    # Somebody elsewhere reads its response while it comes; called when that is noted.
    read_elsewhere: bool = False
    on_read: Callable[[], None] = do_nothing
    # Ends its exchange for a reason, and returns whether this did it.
    cancel: Callable[[str], bool] = cancel_nothing
    # Somebody has the address of its response, and may come back whenever they like.
    fetched: bool = False

    def age_s(self) -> float:
        """Return the seconds since the claim was last confirmed."""
        return suspended_clock_s() - self.confirmed_s

    def is_certain(self) -> bool:
        """Return whether the claim need not be made again before the first byte is sent."""
        age_s = suspended_clock_s() - self.confirmed_s
        return not (self.fenced or self.lost or must_reclaim(age_s, self.claim.lease_ms))


class OnClaimEvent(Protocol):
    """Called when a claim was lost or fenced."""

    def __call__(self, event: ClaimEvent, claim: Claim) -> None: ...


class Leases:
    """The claims that this worker holds and has not settled. `clock` returns the loop's time."""

    def __init__(self, store: Store, lease_ms: int, report: OnClaimEvent, clock: Callable[[], float]) -> None:
        self._store, self._report, self._clock = store, report, clock
        # Three renewals in the length of a lease, so that two may fail.
        self._period_s = lease_ms / 3000
        self._held: dict[bytes, LeasedClaim] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def held(self, key: bytes, token: bytes) -> LeasedClaim | None:
        """Return the claim with this token, None where this worker does not hold it."""
        held = self._held.get(key)
        return held if held is not None and held.claim.token == token else None

    @property
    def oldest_s(self) -> float:
        """For how long the oldest of them has been held, by the store's clock; 0 where there is none."""
        # A dictionary has its oldest entry first.
        for held in self._held.values():
            return max(0, self._store.now_ms(held.claim.key) - held.claim.created_ms) / 1000
        return 0.0

    def hold(self, claim: Claim, asked_s: float, longest_s: float) -> LeasedClaim:
        """Renew a claim's lease from now on.

        `asked_s`: when the claim was sent (suspended_clock_s). `longest_s`: the first watchdog deadline from now.
        """
        held = LeasedClaim(claim, asked_s, self._clock() + longest_s)
        self._held[claim.key] = held
        return held

    def drop(self, held: LeasedClaim) -> None:
        """Stop renewing a claim. It is settled, or nothing more can be done for it."""
        held.settled, held.cancel = True, cancel_nothing
        if self._held.get(held.claim.key) is held:
            del self._held[held.claim.key]

    def report(self, event: ClaimEvent, held: LeasedClaim) -> None:
        """Report that a claim was lost or fenced, once for each claim."""
        if not held.reported:
            held.reported = True
            self._report(event, held.claim)

    async def reclaim(self, held: LeasedClaim, scope: Scope) -> bool:
        """Claim a held key again with its token. Return whether this worker still holds it.

        A key that is free is claimed anew. Another owner's record marks the claim as fenced.
        """
        asked_s = suspended_clock_s()
        claimed = await self._store.reclaim(held.claim, scope)
        if not isinstance(claimed, Claim):
            held.fenced = held.fenced or not isinstance(claimed, Unconfirmed)
            return False
        # With another fence the record had vanished, so another request may have executed the key meanwhile.
        if claimed.fence != held.claim.fence:
            self.report(ClaimEvent.LOST, held)
        held.claim, held.confirmed_s, held.fenced, held.lost = claimed, asked_s, False, False
        return True

    async def while_ours(
        self, held: LeasedClaim, scope: Scope, blocks: Iterable[bytes], silent_ms: int
    ) -> AsyncIterator[bytes]:
        """Yield blocks while this worker holds the key. A process that was suspended may have lost it.

        A store that does not reply stops nothing until it has been silent for `silent_ms`: for so long nobody else can
        have the key. Raises ConnectionError once the key is lost, or may be.
        """
        asked_s, lease_ms = 0.0, held.claim.lease_ms
        for block in blocks:
            age_s = min(held.age_s(), suspended_clock_s() - asked_s)
            if held.fenced or held.lost or must_reclaim(age_s, lease_ms):
                asked_s = suspended_clock_s()
                await self.reclaim(held, scope)
            if held.fenced or held.lost or held.age_s() * 1000 >= silent_ms:
                raise ConnectionError("the key is not ours any more")
            yield block

    async def run(self) -> None:
        """Renew every lease three times in its length, until cancelled. The renewals leave in one write."""
        while True:
            await asyncio.sleep(self._period_s)
            now = self._clock()
            live = [held for held in self._held.values() if held.until_s > now and not held.fenced]
            await asyncio.gather(*[self._renew(held) for held in live])

    async def _renew(self, held: LeasedClaim) -> None:
        asked_s = suspended_clock_s()
        status = await self._store.renew(held.claim, held.stage)
        # A settle that overtook the renewal explains whatever the renewal found.
        if held.settled or held.freeing:
            return
        if status is RenewStatus.RENEWED:
            held.confirmed_s = asked_s
        elif status is RenewStatus.ABSENT:
            held.lost = True
            self.report(ClaimEvent.LOST, held)
        elif status is RenewStatus.FENCED:
            held.fenced = True
            self.report(ClaimEvent.FENCED, held)
            held.on_fenced()
