"""The leases of a worker's claims against a real store."""

import asyncio

import pytest

from oncegate.store.leases import Leases, suspended_clock_s
from oncegate.store.record import Claim
from oncegate.store.results import ClaimEvent, SettleStatus
from tests.probes import Probe
from tests.stores import LEASE_MS, RETENTION_MS, SCOPE, claimed, connected


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


@pytest.mark.parametrize(("silent_ms", "sent"), [(RETENTION_MS, [b"a", b"b"]), (LEASE_MS, [])])
async def test_a_store_that_is_silent_for_too_long_stops_a_body(valkey, silent_ms, sent):
    """Past its lease a key may be freed elsewhere, where the API is asked about it: no byte may follow then."""
    came = []
    async with valkey.relaying() as relay, connected(relay.url, timeout_ms=300) as store:
        leases = Leases(store, LEASE_MS, lambda *_: None, asyncio.get_running_loop().time)
        held = leases.hold(await claimed(store), suspended_clock_s() - LEASE_MS / 1000, 60)
        relay.silence()
        relay.unreachable = True
        try:
            async for block in leases.while_ours(held, SCOPE, [b"a", b"b"], silent_ms):
                came.append(block)
        except ConnectionError:
            came.append(b"stopped")
    assert came == (sent or [b"stopped"])
