"""Keys whose record is not complete: in order, page by page, and counted by what they need."""

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest

from oncegate.store.open_keys.listing import open_counts, open_keys
from oncegate.store.open_keys.places import FIRST, read_place, write_place
from oncegate.store.record_name import record_id
from oncegate.store.record_view import UNDECIDED, OpenKind, RecordView
from oncegate.store.store import Store
from tests.probes import Probe
from tests.stores import KEY, PATIENCE_S, claimed, connected, key, store_small


@pytest.fixture(params=["index", "scan"])
async def store(stored: Probe, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """A store, with an index of its open keys, and without one: then they are found by a scan."""
    async with connected(stored.url) as store:
        if request.param == "index":
            await indexed(store)
        yield store


async def indexed(store: Store) -> None:
    """Note that the index of an empty store has all open keys."""
    for server in store.records.servers:
        await server.index.begin()
        await server.index.note_complete()


async def listed(store: Store, limit: int = 100, kinds: Collection[OpenKind] = UNDECIDED) -> list[RecordView]:
    """Return all open keys of these kinds, page by page."""
    found: list[RecordView] = []
    page = await open_keys(store.records, limit, kinds=kinds)
    while page.after:
        found += page.records
        page = await open_keys(store.records, limit, page.after, kinds)
    return found + page.records


async def counted(store: Store) -> dict[str, int]:
    return {kind.value: count.keys for kind, count in (await open_counts(store.records)).items() if count.keys}


def lapse(probe: Probe, key: bytes, ago_ms: int = 1) -> None:
    """Let the lease of a key have ended so long ago, as if its owner had died: the index says so, too."""
    ends_ms = probe.now_ms() - ago_ms
    probe.change(key, lease=ends_ms)
    probe.index(key, ends_ms)


async def test_an_open_key_is_one_of_four_kinds(store: Store, stored: Probe) -> None:
    """A key that is complete or free is none of them."""
    modes = (b"hold", b"hold", b"hold", b"retry", b"hold", b"hold")
    claims = [await claimed(store, mode, key(number)) for number, mode in enumerate(modes)]
    running, lapsed, held, retried, complete, freed = claims
    lapse(stored, lapsed.key, 5000)
    for claim in (held, retried):
        await store.mark_unknown(claim, "cut off", PATIENCE_S)
    await store_small(store, complete)
    await store.release(freed, PATIENCE_S)
    kinds = {record.key: record.open_kind for record in await listed(store, kinds=OpenKind)}
    assert kinds == {
        running.key: OpenKind.IN_FLIGHT,
        lapsed.key: OpenKind.LAPSED,
        held.key: OpenKind.UNKNOWN,
        retried.key: OpenKind.WAIVED,
    }
    assert await counted(store) == {"unknown": 1, "lapsed": 1, "in_flight": 1, "waived": 1}
    assert {record.key for record in await listed(store)} == {lapsed.key, held.key}
    counts = await open_counts(store.records)
    assert 5000 <= counts[OpenKind.LAPSED].oldest_ms < 20_000
    assert 0 <= counts[OpenKind.UNKNOWN].oldest_ms < 20_000


async def test_pages_are_in_order(store: Store) -> None:
    """Each key comes once, the oldest first, however small the pages are."""
    claims = await asyncio.gather(*[claimed(store, key=key(number)) for number in range(30)])
    await asyncio.gather(*[store.mark_unknown(claim, "cut off", PATIENCE_S) for claim in claims])
    for limit in (1, 7, 30, 100):
        found = await listed(store, limit)
        assert [record.since_ms for record in found] == sorted(claim.created_ms for claim in claims)
        assert {record.key for record in found} == {claim.key for claim in claims}


@pytest.mark.parametrize("text", ["x", "5", "5-short", "-" + "A" * 32, "9" * 16 + "-" + "A" * 32])
def test_a_place_that_no_page_named(text: str) -> None:
    """What a browser sends back may be anything."""
    with pytest.raises(ValueError, match="no place"):
        read_place(text)


def test_a_place_is_written_and_read() -> None:
    assert read_place(write_place((1_700_000_000_000, record_id(KEY)))) == (1_700_000_000_000, record_id(KEY))
    assert read_place("") == FIRST
