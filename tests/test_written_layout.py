"""In which layout records are written: proxies of several versions on one store agree on one that all of them read."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from redis import Redis, ResponseError

from oncegate.store import membership
from oncegate.store.membership import Membership
from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis.membership import WrittenLayout
from oncegate.store.redis.store import RedisStore
from tests.conftest import REDIS, REDIS_KINDS, Valkey
from tests.stores import connected

LIVE_S = 0.5


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncegate.store.redis.node.HEALTH_S", LIVE_S / 10)
    monkeypatch.setattr(membership, "LIVE_S", LIVE_S)


@pytest.fixture(params=REDIS_KINDS)
def own_server(request: pytest.FixtureRequest) -> Iterator[Valkey]:
    """A Valkey, and the Redis of this system, that nobody else uses."""
    server = Valkey(binary=REDIS if request.param == "redis" else None)
    yield server
    server.close()


@asynccontextmanager
async def proxy(
    valkey: Valkey, layout: str = "auto", *, rules: str = "R1", accept: bool = False
) -> AsyncIterator[RedisStore]:
    """The store of a proxy of this version, which looks after it."""
    member = Membership(
        bytes(PREFIX_BYTES), "one", "namespace=a", accept, 60_000, 0, 60.0, True, lambda *_: None, lambda: rules, layout
    )
    async with connected(valkey.url, member=member) as store:
        assert isinstance(store, RedisStore)
        watch = asyncio.ensure_future(store.watch())
        yield store
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


# What versions before this one do once a second, and on every new connection before its first claim.
NOTE = """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""


class Older:
    """A proxy of an older version: it notes its rules again and again, and is not ready where it cannot."""

    def __init__(self, valkey: Valkey, rules: str = "R1") -> None:
        self._valkey, self._rules = valkey, rules

    def notes(self) -> bool:
        """Return whether it is ready."""
        with self._valkey.client() as client:
            try:
                client.eval(NOTE, 1, "once:rules", self._rules, "1", str(int(LIVE_S * 1000)))
            except ResponseError:
                return False
        return True

    async def lives(self, seconds: float) -> None:
        for _ in range(round(seconds / LIVE_S * 10)):
            assert self.notes()
            await asyncio.sleep(LIVE_S / 10)


def now_ms(client: Redis) -> int:
    seconds, micros = client.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def becomes(store: RedisStore, packed: bool) -> None:
    async with asyncio.timeout(20 * LIVE_S):
        while store.layout.packed is not packed:
            await asyncio.sleep(LIVE_S / 50)


async def stays_hash(store: RedisStore, lives: float = 3) -> None:
    for _ in range(round(lives * 50)):
        assert not store.layout.packed
        await asyncio.sleep(LIVE_S / 50)


async def test_a_store_that_no_older_version_has_used_is_packed(own_server):
    """After a moment in which an older one would have been seen; from then on none gets in."""
    async with proxy(own_server) as store:
        assert not store.layout.packed
        await becomes(store, packed=True)
        assert not Older(own_server).notes()
        async with proxy(own_server) as another:
            await becomes(another, packed=True)
    assert not Older(own_server).notes()


@pytest.mark.parametrize("seen", [True, False], ids=["beside an older one", "after an older one"])
async def test_a_store_of_an_older_version_keeps_hashes(own_valkey, seen):
    """So that the older version can come back at any time, until an operator says `packed` on one of the proxies."""
    older = Older(own_valkey)
    with own_valkey.client() as client:
        client.hset("once:epoch", mapping={"id": "e", "run": "", "until": "0"})
    if seen:
        older.notes()
    async with proxy(own_valkey) as store:
        await stays_hash(store)
        assert older.notes()
        async with proxy(own_valkey, "packed") as chosen:
            await becomes(chosen, packed=True)
            await becomes(store, packed=True)
            assert not older.notes()


async def test_a_day_after_an_older_version(own_valkey, monkeypatch):
    """It is not expected back: records are packed without being told. A proxy that restarts begins no day anew."""
    monkeypatch.setattr("oncegate.store.redis.membership.OLDER_GONE_S", 4 * LIVE_S)
    older = Older(own_valkey)
    with own_valkey.client() as client:
        client.hset("once:epoch", mapping={"id": "e", "run": "", "until": "0"})
    async with proxy(own_valkey) as store:
        await older.lives(LIVE_S)
        await stays_hash(store, lives=3)
    async with proxy(own_valkey) as store:
        await becomes(store, packed=True)
        with own_valkey.client() as client:
            gone_ms = int(client.hget("once:members", "seen")) - int(client.hget("once:members", "older"))
        assert 4 * LIVE_S <= gone_ms / 1000 < 8 * LIVE_S
        assert not older.notes()


async def test_an_older_version_that_came_while_no_other_was_there(own_valkey):
    """It came and went, as in a rollback: the day begins anew. Its identity was written when nobody else was there."""
    async with proxy(own_valkey) as store:
        await asyncio.sleep(LIVE_S / 5)
    await asyncio.sleep(1.5 * LIVE_S)
    with own_valkey.client() as client:
        (identity,) = client.hkeys("once:identities")
        client.hset("once:identities", identity, f"{now_ms(client)} namespace=a")
        await asyncio.sleep(1.5 * LIVE_S)
        async with proxy(own_valkey) as store:
            await stays_hash(store)
            assert client.hexists("once:members", "older")


async def test_the_oldest_version_is_known_by_its_identity(own_valkey):
    """It notes no rules. It is seen while it writes its identity, and refused once that is not known any more."""

    def writes(client: Redis) -> None:
        client.hset("once:identities", "0.1", f"{now_ms(client)} namespace=a")

    with own_valkey.client() as client:
        writes(client)
        async with proxy(own_valkey, "packed", accept=True) as store:
            for _ in range(20):
                assert not store.layout.packed
                writes(client)
                await asyncio.sleep(LIVE_S / 10)
            await becomes(store, packed=True)
            assert not client.hexists("once:identities", "0.1")


async def test_an_older_version_beside_a_new_store(own_valkey):
    """A store is not new any more once an older version was on it."""
    async with proxy(own_valkey) as store:
        await Older(own_valkey).lives(2 * LIVE_S)
        await stays_hash(store)
        assert Older(own_valkey).notes()


async def test_nobody_packs_while_an_older_version_lives(own_server):
    """Whatever was chosen: it is packed one life after the older version's last note, and not before."""
    older = Older(own_server)
    older.notes()
    async with proxy(own_server, "packed") as store:
        living = asyncio.ensure_future(older.lives(3 * LIVE_S))
        while not living.done():
            assert not store.layout.packed
            await asyncio.sleep(LIVE_S / 50)
        await living
        await becomes(store, packed=True)


async def test_one_proxy_holds_all_to_hashes(own_valkey):
    """That is the way back to an older version: every proxy writes hashes at once, and none when it is gone."""
    async with proxy(own_valkey) as store:
        await becomes(store, packed=True)
        async with proxy(own_valkey, "hash"):
            await becomes(store, packed=False)
            await stays_hash(store)
            assert not Older(own_valkey).notes()
        await becomes(store, packed=True)


async def test_a_proxy_that_looked_long_ago_writes_hashes(own_valkey):
    """It was suspended: it must not pack what others agreed not to pack meanwhile."""
    async with proxy(own_valkey) as store:
        await becomes(store, packed=True)
        own_valkey.pause()
        await becomes(store, packed=False)
        own_valkey.resume()
        await becomes(store, packed=True)


@pytest.mark.parametrize("older_rules", ["R1", "R2"])
async def test_rules_are_compared_with_those_of_older_versions(own_valkey, monkeypatch, older_rules):
    monkeypatch.setattr(membership, "DIFFER_S", LIVE_S / 2)
    async with proxy(own_valkey) as store:
        await Older(own_valkey, older_rules).lives(2 * LIVE_S)
        assert store.rules_differ == (older_rules != "R1")


async def test_a_flushed_store_is_not_new(own_valkey):
    """A proxy that knew it may have had older ones beside it."""
    with own_valkey.client() as client:
        client.hset("once:epoch", mapping={"id": "e", "run": "", "until": "0"})
        async with proxy(own_valkey) as store:
            await asyncio.sleep(LIVE_S)
            client.flushall()
            await stays_hash(store)


async def test_servers_of_one_store_agree():
    """One of them that says `hash` decides for all, until it is asked no more."""
    layout, now = WrittenLayout(), asyncio.get_running_loop().time()
    layout.note(b"{1}", now, True)
    assert layout.packed
    layout.note(b"{2}", now, False)
    assert not layout.packed
    assert layout.is_packed_somewhere
    layout.note(b"{1}", now + 2 * LIVE_S, True)
    assert layout.packed
    layout.force(packed=False)
    assert not layout.packed
