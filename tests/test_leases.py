"""The leases of a worker's claims against a real store."""

import asyncio

import pytest

from oncegate.store.leases import Leases, suspended_clock_s
from oncegate.store.record import Claim
from oncegate.store.results import ClaimEvent, SettleStatus
from tests.probes import Probe
from tests.stores import claimed, connected


@pytest.mark.parametrize(("freeing", "reports"), [(False, [ClaimEvent.LOST]), (True, [])])
async def test_a_claim_that_is_being_released_is_not_reported_as_lost(
    probe: Probe, freeing: bool, reports: list[ClaimEvent]
) -> None:
    """A renewal that finds no record is a loss, unless the release of the claim is under way."""
    reported: list[ClaimEvent] = []
    async with connected(probe.url) as store:

        def report(event: ClaimEvent, _: Claim) -> None:
            reported.append(event)

        leases = Leases(store, 60, report, asyncio.get_running_loop().time)
        held = leases.hold(await claimed(store), suspended_clock_s(), 60)
        held.freeing = freeing
        assert (await store.release(held.claim, 5)).status is SettleStatus.RELEASED
        renewing = asyncio.ensure_future(leases.run())
        await asyncio.sleep(0.2)
        renewing.cancel()
    assert reported == reports
