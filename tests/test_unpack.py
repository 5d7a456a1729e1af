"""The way back to versions that read no packed records: `oncegate keys unpack`."""

import asyncio

import pytest
from redis import Redis

from oncegate.store.record import Claim
from oncegate.store.record_view import StoreError
from oncegate.store.redis.store import RedisStore
from oncegate.store.results import DropStatus
from oncegate.store.store import Store
from tests.conftest import Valkey
from tests.older.fixture import name_of
from tests.older.records import KINDS, Kind, claiming, facts, key_of, opened
from tests.postgres_database import Database
from tests.stores import claimed, connected, key
from tests.test_written_layout import LIVE_S, Older, becomes, often, proxy

__all__ = ["often"]

# Those that come about by verbs alone.
MADE = [kind for kind in KINDS if not kind.name.startswith(("lapsed", "expired", "tombstone", "in flight, the clock"))]
# More than one page of a scan.
MANY = 700


def packing(store: Store) -> RedisStore:
    assert isinstance(store, RedisStore)
    store.layout.force(packed=True)
    return store


async def unpacked(store: Store, client: Redis, kind: Kind) -> None:
    """Unpack a record with half of its life behind it, and assert that it stays what it was."""
    client.pexpire(name_of(kind), client.pttl(name_of(kind)) // 2)
    before, was_packed = await facts(store, client, kind), client.type(name_of(kind)) == b"string"
    assert await store.records.unpack() == was_packed
    assert client.type(name_of(kind)) == b"hash"
    assert await facts(store, client, kind) == before


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
async def test_an_unpacked_record_is_what_it_was(empty_server: Valkey, kind: Kind) -> None:
    """It says the same to requests and operators, and lasts as long."""
    with empty_server.client() as client:
        async with opened(empty_server.url) as store:
            owner = await claiming(packing(store), kind)
            assert isinstance(owner, Claim)
            assert client.type(name_of(kind)) == b"string"
            await kind.make(store, client, owner)
            await unpacked(store, client, kind)


async def test_a_tombstone_is_unpacked(empty_server: Valkey) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == "complete, with a tombstone")
    with empty_server.client() as client:
        async with opened(empty_server.url) as store:
            owner = await claiming(packing(store), kind)
            assert isinstance(owner, Claim)
            await kind.make(store, client, owner)
            view = await store.records.read(key_of(kind.name, kind.tenant))
            assert view is not None
            assert await store.drop(view, purge=True) is DropStatus.DROPPED
            await unpacked(store, client, kind)


async def test_all_records_are_unpacked_and_older_versions_let_in(own_valkey: Valkey) -> None:
    """They had been kept out since records were packed first. A proxy that would pack them again holds the way back."""
    older = Older(own_valkey)
    async with proxy(own_valkey) as store:
        await becomes(store, packed=True)
        await asyncio.gather(*[claimed(store, key=key(number)) for number in range(MANY)])
        assert not older.notes()
        async with connected(own_valkey.url) as command:
            with pytest.raises(StoreError, match="ONCEGATE_RECORD_LAYOUT=hash"):
                await command.records.unpack()
    async with connected(own_valkey.url) as command, proxy(own_valkey, "hash") as store:
        assert await command.records.unpack() == MANY
        assert older.notes()
        await claimed(store, key=key(MANY))
    with own_valkey.client() as client:
        assert {client.type(name) for name in client.scan_iter("once:{*")} == {b"hash"}
    async with proxy(own_valkey) as store:
        await asyncio.sleep(2 * LIVE_S)
        assert not store.layout.packed


async def test_a_damaged_record_stays(empty_server: Valkey) -> None:
    """It is as damaged for an older version. The command ends all the same."""
    with empty_server.client() as client:
        client.set(name_of(KINDS[0]), b"\x04damaged")
        async with opened(empty_server.url) as store:
            assert await store.records.unpack() == 0
        assert client.get(name_of(KINDS[0])) == b"\x04damaged"


async def test_rows_have_nothing_to_unpack(database: Database) -> None:
    async with connected(database.url) as store:
        with pytest.raises(StoreError, match="nothing to unpack"):
            await store.records.unpack()
