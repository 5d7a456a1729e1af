"""The index of open keys in a cluster, where no script writes it with the record."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from itertools import count

import pytest
from redis.crc import key_slot

from oncegate.store.open_keys.listing import open_counts, open_keys
from oncegate.store.record import Claim
from oncegate.store.record_name import store_key
from oncegate.store.record_view import OpenKind
from oncegate.store.redis.layouts.open_index import SHARD_NAMES, entry_of, read_member, shard_of
from oncegate.store.redis.store import RedisStore
from oncegate.store.store import Store
from tests.parts import until
from tests.stores import PATIENCE_S, claim, claimed, connected, key, store_small
from tests.topologies import Clustered


@pytest.fixture(scope="module")
def standing() -> Iterator[Clustered]:
    cluster = Clustered(replicas=0)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(standing: Clustered) -> Clustered:
    for server in standing.servers:
        server.ask("FLUSHALL")
    return standing


@pytest.fixture
async def store(cluster: Clustered) -> AsyncIterator[Store]:
    async with connected(cluster.url) as store:
        for server in store.records.servers:
            await server.index.begin()
            await server.index.note_complete()
        yield store


def entries(cluster: Clustered) -> dict[bytes, list[tuple[bytes, int]]]:
    """Return for each key the tokens and scores of its entries, wherever they are."""
    found: dict[bytes, list[tuple[bytes, int]]] = {}
    for server in cluster.servers:
        for name in server.ask("KEYS", "once:open{*"):
            for member, score in server.client().zrange(name, 0, -1, withscores=True):
                of, token = read_member(member)
                assert of is not None
                assert shard_of(key_slot(store_key(of))) == name
                found.setdefault(of, []).append((token, int(score)))
    return found


async def test_entries_follow_their_claims(cluster: Clustered, store: Store) -> None:
    """On every master: an entry comes before its record, and goes after it. A duplicate leaves none."""
    claims = [await claimed(store, key=key(number)) for number in range(30)]
    assert entries(cluster) == {
        one.key: [(one.token, pytest.approx(one.created_ms + one.lease_ms, abs=5000))] for one in claims
    }
    for one in claims[:10]:
        await store_small(store, one)
    for one in claims[10:20]:
        await store.release(one, PATIENCE_S)
    for one in claims[20:25]:
        await store.mark_unknown(one, "cut off", PATIENCE_S)
    for duplicated in claims[:5]:
        await claim(store, duplicated.key)
    await until(
        lambda: {of: len(those) for of, those in entries(cluster).items()} == {one.key: 1 for one in claims[20:]}
    )
    counts = await open_counts(store.records)
    assert (counts[OpenKind.UNKNOWN].keys, counts[OpenKind.IN_FLIGHT].keys) == (5, 5)
    page = await open_keys(store.records, 3, kinds=OpenKind)
    assert page.after
    assert [one.key for one in page.records] == [
        one.key for one in sorted(claims[20:25], key=lambda one: (one.created_ms, store_key(one.key)))
    ][:3]


async def test_the_entry_comes_first(cluster: Clustered, store: Store) -> None:
    """A proxy that dies between the two leaves an entry without a record, and never a record without an entry."""
    assert isinstance(store, RedisStore)
    sent: list[bytes] = []
    for node in store.nodes:
        node.link._issue = _noting(node.link._issue, sent)  # type: ignore[method-assign]
    await claimed(store)
    (entry,) = [place for place, one in enumerate(sent) if b"ZADD" in one]
    (record,) = [place for place, one in enumerate(sent) if b"EVAL" in one]
    assert entry < record


def _noting(issue, sent):
    def noted(command, *args):
        sent.append(command)
        return issue(command, *args)

    return noted


async def test_entries_while_slots_move(cluster: Clustered, store: Store) -> None:
    """Slots of sets and of records move between masters: every open record has its entry, and a key only one set."""
    dice, moved = random.Random(3), 0
    masters = cluster.servers[:3]
    # Two whole shards, and the slots of their sets.
    slots = [*range(20), *range(256 * 30, 256 * 30 + 20), *(key_slot(SHARD_NAMES[shard]) for shard in (0, 30))]
    keys = (of for of in map(key, count()) if key_slot(store_key(of)) in slots)
    owned: list[Claim] = []

    def reshard() -> None:
        nonlocal moved
        while moved < 60:
            cluster.move(dice.choice(slots), dice.choice(masters))
            moved += 1

    async def worker() -> None:
        while moved < 60:
            owner = await claimed(store, key=next(keys))
            if dice.random() < 0.5:
                await store_small(store, owner)
            else:
                owned.append(owner)

    await asyncio.gather(asyncio.to_thread(reshard), *[worker() for _ in range(8)])
    found = entries(cluster)
    lacking = [one for one in owned if one.token not in [token for token, _ in found.get(one.key, [])]]
    assert not lacking
    assert len(owned) > 20


async def test_what_a_lost_settle_leaves_is_swept(cluster: Clustered, store: Store) -> None:
    """Entries whose claims ended are no open keys. In time whoever counts removes them."""
    ended, open_ = await claimed(store, key=key(1)), await claimed(store, key=key(2))
    await store_small(store, ended)
    name, member = entry_of(store_key(ended.key), ended.token, is_sharded=True)
    cluster.master_of(name).ask("ZADD", name, ended.created_ms - 100_000, member)
    page = await open_keys(store.records, 10, kinds=OpenKind)
    assert [one.key for one in page.records] == [open_.key]
    for server in store.records.servers:
        await server.index.sweep()
    assert set(entries(cluster)) == {open_.key}
