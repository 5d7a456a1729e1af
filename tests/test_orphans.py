"""The keys of dead owners: found in a store among all others, and marked unknown."""

import asyncio

import pytest

from oncegate.keys.digests import Scope
from oncegate.store.record import Claim, ClaimRequest
from oncegate.store.record_view import RecordView, StoreError
from oncegate.store.redis.orphans import mark_orphans
from oncegate.store.store import Store
from tests.stores import store_at

SCOPE = Scope(b"default", b"t" * 16)


@pytest.fixture
async def stores(valkey):
    """Two stores, each with the claims of one proxy."""
    opened = [store_at(valkey.url) for _ in range(2)]
    for store in opened:
        store.start()
        assert await store.wait_up(10)
    yield opened
    for store in opened:
        await store.close()


def key(number: int) -> bytes:
    return number.to_bytes(24, "big")


async def claimed(store: Store, number: int) -> Claim:
    claim = await store.claim(
        ClaimRequest(
            key=key(number),
            scope=SCOPE,
            fingerprint=b"f" * 16,
            mode=b"hold",
            lease_ms=60_000,
            retention_ms=600_000,
            unknown_retention_ms=900_000,
        )
    )
    assert isinstance(claim, Claim)
    return claim


async def seen(store: Store, number: int) -> RecordView | None:
    return await store.records.read(key(number))


async def test_the_keys_in_flight_of_dead_owners_are_marked(valkey, stores):
    """Only what is in flight and has a token of a dead owner changes: to unknown, with the time that it has left."""
    dead, alive = stores
    await asyncio.gather(*[claimed(dead, number) for number in range(50)])
    await asyncio.gather(*[claimed(alive, number) for number in range(50, 100)])
    unknown = await claimed(dead, 100)
    await dead.mark_unknown(unknown, "its upstream hung", 5)
    with valkey.client() as client:
        client.set("once:epoch", "no hash")
        client.hset("once:identities", "a", "b")
    others = [bytes([number]) * 10 for number in range(100)]
    assert await mark_orphans(valkey.url, [*others, dead.token_prefix]) == 50
    records = [await seen(alive, number) for number in range(101)]
    assert [record.state.value for record in records] == ["unknown"] * 50 + ["in_flight"] * 50 + ["unknown"]
    assert {record.reason for record in records[:50]} == {"its proxy was killed"}
    assert records[100].reason == "its upstream hung"
    assert all(record.token.startswith(dead.token_prefix) for record in records[:50])
    with valkey.client() as client:
        assert all(890_000 < client.pttl(name) <= 900_000 for name in client.scan_iter("once:{*"))
    assert await mark_orphans(valkey.url, [dead.token_prefix]) == 0


async def test_a_store_that_is_away_is_an_error(tmp_path, monkeypatch):
    """Where no store answers, nothing is marked, and the caller hears of it."""
    monkeypatch.setattr("oncegate.store.redis.orphans.TIMEOUT_S", 0.1)
    with pytest.raises(StoreError):
        await mark_orphans(f"unix://{tmp_path}/none.sock", [b"p" * 10])
