"""Exchanges are cancelled from any process, and a mark in the store says who still waits for a response."""

import asyncio

import pytest

from oncegate.decision import CANCELLED
from oncegate.gateway import cancelling
from oncegate.gateway.cancelling import Cancellations
from oncegate.keys.digests import Scope
from oncegate.messages.response_head import response_digest
from oncegate.observe.outcome import Outcome
from oncegate.store import readers
from oncegate.store.leases import Leases, suspended_clock_s
from oncegate.store.readers import Readers, mark_name
from oncegate.store.record import Claim, ClaimRequest, Record, StoredResponse
from oncegate.store.results import SettleStatus
from oncegate.store.store import Store
from tests.stores import store_at

KEY, SCOPE, FINGERPRINT = b"k" * 24, Scope(b"default", b"n" * 16), b"f" * 16
LEASE_MS = 60_000
# Renewals come at a third of it.
RENEWED_MS = 300


@pytest.fixture
async def stores(probe):
    """Two processes on one store."""
    both = [store_at(probe.url, timeout_ms=2000, patience_s=2.0, background=asyncio.ensure_future) for _ in range(2)]
    for store in both:
        store.start()
        assert await store.wait_up(5)
    yield both
    for store in both:
        await store.close()


class Running:
    """An exchange that runs until it is cancelled."""

    def __init__(self) -> None:
        self.reason = asyncio.get_running_loop().create_future()

    async def run(self) -> Outcome:
        await self.reason
        return Outcome.CANCELLED

    def cancel(self, reason: str) -> None:
        self.reason.set_result(reason)


async def claimed(store: Store, mode: bytes = b"retry") -> Claim:
    claim = await store.claim(ClaimRequest(KEY, SCOPE, FINGERPRINT, mode, LEASE_MS, 60_000, 60_000))
    assert isinstance(claim, Claim)
    return claim


async def test_an_exchange_is_cancelled_from_any_process(stores):
    """The record says so at once, and the owner hears of it when it renews its lease. No retry takes the key over."""
    owner, other = stores
    loop = asyncio.get_running_loop()
    cancellations = Cancellations(owner, asyncio.ensure_future)
    leases = Leases(owner, RENEWED_MS, lambda event, claim: None, loop.time)
    leases.note_unknown = cancellations.note_unknown
    claim = await claimed(owner)
    leases.hold(claim, suspended_clock_s(), 60)
    renewing, exchange = asyncio.ensure_future(leases.run()), Running()
    running = asyncio.ensure_future(cancellations.run(exchange, KEY, None))
    await asyncio.sleep(0)
    assert await Cancellations(other, asyncio.ensure_future).cancel(KEY, "the user stopped it")
    taken = await other.claim(ClaimRequest(KEY, SCOPE, FINGERPRINT, b"retry", LEASE_MS, 60_000, 60_000))
    assert isinstance(taken, Record)
    assert (taken.state.value, taken.mode) == ("unknown", CANCELLED)
    assert await asyncio.wait_for(running, 5) is Outcome.CANCELLED
    assert exchange.reason.result() == "the user stopped it"
    renewing.cancel()


async def test_a_key_that_does_not_run_is_not_cancelled(stores):
    """A key without a record, and one whose request has ended, stay as they are."""
    owner, other = stores
    cancellations = Cancellations(other, asyncio.ensure_future)
    assert not await cancellations.cancel(KEY, "late")
    claim = await claimed(owner, b"hold")
    assert (await owner.mark_unknown(claim, "no answer came", 1.0)).status is SettleStatus.MARKED_UNKNOWN
    assert not await cancellations.cancel(KEY, "late")
    record = await owner.records.read(KEY)
    assert record is not None
    assert (record.mode, record.reason) == (b"hold", "no answer came")


async def test_a_cancelled_exchange_may_still_be_stored(stores):
    """A response that was complete before its owner heard of the cancellation is the truth."""
    owner, other = stores
    claim = await claimed(owner)
    assert await Cancellations(other, asyncio.ensure_future).cancel(KEY, "late")
    digest = response_digest(200, b"OK", b"")
    digest.update(b"ok")
    response = StoredResponse(200, b"OK", b"", digest.digest(), 1, 2, True, False, True, 0, 1, 0)
    assert (await owner.store(claim, response, b"ok", 1.0)).status is SettleStatus.STORED
    record = await other.peek(KEY, SCOPE, LEASE_MS)
    assert isinstance(record, Record)
    assert (record.state.value, record.body) == ("complete", b"ok")


async def test_who_waits_is_known_in_every_process(stores, probe):
    """A mark stands as long as somebody waits in some process, and for the grace after that."""
    here, there = (Readers(store.marks) for store in stores)
    has_left = False
    assert not await here.may_wait(KEY)
    with there.waiting(KEY, 3.0, lambda: has_left):
        while not await here.may_wait(KEY):
            await asyncio.sleep(0.01)
    assert 3000 < probe.marks()[mark_name(KEY)] <= 4000
    assert await here.may_wait(KEY)
    probe.remove_mark(mark_name(KEY))
    assert not await here.may_wait(KEY)
    # A client that closed its side is no reader.
    has_left = True
    with there.waiting(KEY, 3.0, lambda: has_left):
        await asyncio.sleep(0.1)
        assert not await here.may_wait(KEY)


async def test_a_store_that_does_not_say_who_waits(stores):
    """Somebody may wait: the owner asks again."""
    await stores[0].close()
    assert await Readers(stores[0].marks).may_wait(KEY)


async def test_a_call_is_taken_back_from_any_process(stores, monkeypatch):
    """Its name leads to the execution that it names, and to no later one under the same key."""
    monkeypatch.setattr(readers, "SHORT_CALL_S", 0.0)
    monkeypatch.setattr(cancelling, "END_S", 0.05)
    owner, other = (Cancellations(store, asyncio.ensure_future) for store in stores)
    claim = await claimed(stores[0])
    with owner.named(b"c" * 24, claim):
        await asyncio.sleep(0.1)
        await other.cancel_call(b"d" * 24)
        record = await stores[0].records.read(KEY)
        assert record is not None
        assert record.mode == b"retry"
        await other.cancel_call(b"c" * 24)
    record = await stores[0].records.read(KEY)
    assert record is not None
    assert (record.mode, record.reason) == (CANCELLED, "cancelled: its client took it back")
    await stores[0].release(claim, 1.0)
    later = await claimed(stores[0])
    assert later.token != claim.token
    await other.cancel_call(b"c" * 24)
    record = await stores[0].records.read(KEY)
    assert record is not None
    assert record.mode == b"retry"
