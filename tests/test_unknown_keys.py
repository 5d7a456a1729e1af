"""Unknown keys that are about to expire are named, and what is left of a dead owner's response goes before its key."""

import asyncio
from collections.abc import Iterator

import pytest
from redis import Redis

from oncegate.decision import State
from oncegate.keys.digests import Scope
from oncegate.store import unknown_keys
from oncegate.store.record import Claim, ClaimRequest
from oncegate.store.record_name import record_id, store_key
from oncegate.store.redis.records import SCAN_KEY
from oncegate.store.store import Store
from oncegate.store.unknown_keys import WARN_MS, UnknownKeys
from tests.stores import store_at
from tests.topologies import Server, free_ports, wait_for

RETENTION_MS, UNKNOWN_RETENTION_MS = 86_400_000, 90 * 86_400_000
SCOPE = Scope(b"default", b"n" * 16)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(free_ports(1)[0], "--save", "")
    wait_for(lambda: server.ask("PING"))
    yield server
    server.close()


@pytest.fixture
def client(server) -> Iterator[Redis]:
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
async def store(server):
    store = store_at(f"redis://127.0.0.1:{server.port}", timeout_ms=2000, patience_s=2.0)
    store.start()
    assert await store.wait_up(5)
    yield store
    await store.close()


class Looks:
    """One replica's looks, with all that it warned of."""

    def __init__(self, store: Store) -> None:
        self.warnings: list[tuple[str, dict[str, object]]] = []
        self.keys = UnknownKeys(
            store, RETENTION_MS, UNKNOWN_RETENTION_MS, lambda event, **fields: self.warnings.append((event, fields))
        )

    async def counts(self) -> tuple[int, int]:
        await self.keys.scan()
        return self.keys.count, self.keys.expiring


async def claimed(store: Store, number: int, mode: bytes = b"hold") -> Claim:
    times = 60_000, RETENTION_MS, UNKNOWN_RETENTION_MS
    found = await store.claim(ClaimRequest(b"%024d" % number, SCOPE, b"f" * 16, mode, *times))
    assert isinstance(found, Claim)
    return found


async def test_only_unknown_keys_that_are_held_count(store, client):
    """Running keys, complete ones and those of the mode `retry` are none; one whose owner died is."""
    held, retried, died, _running = [await claimed(store, 1), await claimed(store, 2, b"retry"),
                                     await claimed(store, 3), await claimed(store, 4)]  # fmt: skip
    for claim in (held, retried):
        await store.mark_unknown(claim, "cut off", 2)
    client.hset(store_key(died.key), "lease", 1)
    assert await Looks(store).counts() == (2, 0)


async def test_a_key_that_expires_within_a_week_is_named(store, client):
    soon, later = await claimed(store, 1), await claimed(store, 2)
    for claim in (soon, later):
        await store.mark_unknown(claim, "cut off", 2)
    client.pexpire(store_key(soon.key), WARN_MS - 5_400_000)
    client.pexpire(store_key(later.key), WARN_MS + 3_600_000)
    looks = Looks(store)
    assert await looks.counts() == (2, 1)
    assert looks.warnings == [("unknown outcome expires soon", {"key_id": record_id(soon.key), "hours": 166})]


async def test_a_key_with_a_short_life_is_not_named(store, client):
    """The key of a form stands for a window of seconds and is kept for minutes: nobody could decide it in time."""
    form = await store.claim(ClaimRequest(b"%024d" % 1, SCOPE, b"f" * 16, b"hold", 60_000, 300_000, 300_000, 10_000))
    await store.mark_unknown(form, "cut off", 2)
    looks = Looks(store)
    assert await looks.counts() == (1, 0)
    assert looks.warnings == []


async def test_replicas_share_one_look_an_hour(store, client):
    await store.mark_unknown(await claimed(store, 1), "cut off", 2)
    first, second = Looks(store), Looks(store)
    assert (await first.counts(), await second.counts()) == ((1, 0), (0, 0))
    assert 0 < client.pttl(SCAN_KEY) <= unknown_keys.PERIOD_S * 1000
    # Whoever looked an hour ago no longer speaks of it.
    client.pexpire(SCAN_KEY, 1)
    await asyncio.sleep(0.01)
    assert (await second.counts(), await first.counts()) == ((1, 0), (0, 0))


@pytest.mark.parametrize(("dead_for_ms", "is_kept"), [(RETENTION_MS // 2, True), (RETENTION_MS * 2, False)])
async def test_a_partial_response_does_not_stay_as_long_as_its_key(store, client, dead_for_ms, is_kept):
    """An owner that was killed in the middle of a response leaves its key, and for one retention what it stored."""
    owner = await claimed(store, 1)
    name = store_key(owner.key)
    await store.append(owner, 0, b"x" * 100_000, 2)
    seconds, _ = client.time()
    client.hset(name, "lease", seconds * 1000 - dead_for_ms)
    client.pexpire(name, UNKNOWN_RETENTION_MS - dead_for_ms)
    before = client.pttl(name)
    looks = Looks(store)
    assert await looks.counts() == (1, 0)
    assert client.hexists(name, "b0") == is_kept
    assert before - 5000 < client.pttl(name) <= before
    found = await store.claim(
        ClaimRequest(owner.key, SCOPE, b"f" * 16, b"hold", 60_000, RETENTION_MS, UNKNOWN_RETENTION_MS)
    )
    assert (found.state, found.token) == (State.IN_FLIGHT if is_kept else State.UNKNOWN, owner.token)


async def test_a_user_who_may_not_look_is_reported_once(store, client, server):
    client.execute_command("ACL", "SETUSER", "default", "-scan")
    try:
        looks = Looks(store)
        assert await looks.counts() == (0, 0)
        client.delete(SCAN_KEY)
        assert await looks.counts() == (0, 0)
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+scan")
    ((event, fields),) = looks.warnings
    assert event == "cannot scan for unknown keys"
    assert "scan" in str(fields["reason"])
