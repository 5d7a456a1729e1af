"""Unknown keys that are about to expire are named, and what is left of a dead owner's response goes before its key."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from oncegate.decision import State
from oncegate.keys.digests import Scope
from oncegate.store import unknown_keys
from oncegate.store.open_keys.listing import open_keys
from oncegate.store.record import Claim, ClaimRequest, StoredResponse
from oncegate.store.record_name import record_id
from oncegate.store.store import Store
from oncegate.store.unknown_keys import WARN_MS, UnknownKeys
from tests.probes import SCAN_KEY
from tests.stores import TEST_LAYOUT, connected
from tests.topologies import Server, free_ports, wait_for

RETENTION_MS, UNKNOWN_RETENTION_MS = 86_400_000, 90 * 86_400_000
SCOPE = Scope(b"default", b"n" * 16)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(free_ports(1)[0], "--save", "")
    wait_for(lambda: server.ask("PING"))
    yield server
    server.close()


@pytest.fixture
async def store(probe):
    async with connected(probe.url) as store:
        yield store


class Looks:
    """One replica's looks, with all that it warned of."""

    def __init__(self, store: Store) -> None:
        self.warnings: list[tuple[str, dict[str, object]]] = []
        self.keys = UnknownKeys(
            store, RETENTION_MS, UNKNOWN_RETENTION_MS, lambda event, **fields: self.warnings.append((event, fields))
        )

    async def counts(self) -> tuple[int, int]:
        await self.keys.look()
        await self.keys.recount()
        return self.keys.count, self.keys.expiring


async def claimed(store: Store, number: int, mode: bytes = b"hold") -> Claim:
    times = 60_000, RETENTION_MS, UNKNOWN_RETENTION_MS
    found = await store.claim(ClaimRequest(b"%024d" % number, SCOPE, b"f" * 16, mode, *times))
    assert isinstance(found, Claim)
    return found


async def test_only_unknown_keys_that_are_held_count(store, probe):
    """Running keys, complete ones and those of the mode `retry` are none; one whose owner died is."""
    held, retried, died, _running = [await claimed(store, 1), await claimed(store, 2, b"retry"),
                                     await claimed(store, 3), await claimed(store, 4)]  # fmt: skip
    for claim in (held, retried):
        await store.mark_unknown(claim, "cut off", 2)
    probe.change(died.key, lease=1)
    probe.index(died.key, 1)
    assert await Looks(store).counts() == (2, 0)


async def test_a_key_that_expires_within_a_week_is_named(store, probe):
    soon, later = await claimed(store, 1), await claimed(store, 2)
    for claim in (soon, later):
        await store.mark_unknown(claim, "cut off", 2)
    probe.expire(soon.key, WARN_MS - 5_400_000)
    probe.expire(later.key, WARN_MS + 3_600_000)
    looks = Looks(store)
    assert await looks.counts() == (2, 1)
    assert looks.warnings == [("unknown outcome expires soon", {"key_id": record_id(soon.key), "hours": 166})]


async def test_a_key_with_a_short_life_is_not_named(store):
    """The key of a form stands for a window of seconds and is kept for minutes: nobody could decide it in time."""
    form = await store.claim(ClaimRequest(b"%024d" % 1, SCOPE, b"f" * 16, b"hold", 60_000, 300_000, 300_000, 10_000))
    await store.mark_unknown(form, "cut off", 2)
    looks = Looks(store)
    assert await looks.counts() == (1, 0)
    assert looks.warnings == []


async def test_replicas_share_one_look_an_hour(store, probe):
    """One of them looks at the store, and all know what it found."""
    held = await claimed(store, 1)
    await store.mark_unknown(held, "cut off", 2)
    probe.expire(held.key, WARN_MS - 5_400_000)
    first, second = Looks(store), Looks(store)
    assert (await first.counts(), await second.counts()) == ((1, 1), (1, 1))
    assert 0 < probe.scan_left_ms() <= unknown_keys.PERIOD_S * 1000
    await store.mark_unknown(await claimed(store, 2), "cut off", 2)
    assert (await first.counts(), await second.counts()) == ((1, 1), (1, 1))
    assert [len(one.warnings) for one in (first, second)] == [1, 0]


@pytest.mark.parametrize(("dead_for_ms", "is_kept"), [(RETENTION_MS // 2, True), (RETENTION_MS * 2, False)])
async def test_a_partial_response_does_not_stay_as_long_as_its_key(store, probe, dead_for_ms, is_kept):
    """An owner that was killed in the middle of a response leaves its key, and for one retention what it stored."""
    owner = await claimed(store, 1)
    await store.append(owner, 0, b"x" * 100_000, 2)
    ended_ms = probe.now_ms() - dead_for_ms
    probe.change(owner.key, lease=ended_ms)
    probe.index(owner.key, ended_ms)
    probe.expire(owner.key, UNKNOWN_RETENTION_MS - dead_for_ms)
    before = probe.left_ms(owner.key)
    looks = Looks(store)
    assert await looks.counts() == (1, 0)
    assert ("b0" in probe.fields(owner.key)) == is_kept
    assert before - 5000 < probe.left_ms(owner.key) <= before
    found = await store.claim(
        ClaimRequest(owner.key, SCOPE, b"f" * 16, b"hold", 60_000, RETENTION_MS, UNKNOWN_RETENTION_MS)
    )
    assert (found.state, found.token) == (State.IN_FLIGHT if is_kept else State.UNKNOWN, owner.token)


async def test_an_expired_response_is_dropped(store, probe):
    """The tombstone stays for its time; a response whose retention is not over stays as well."""
    made = StoredResponse(201, b"", b"", bytes(16), 1, 4, True, False, True, 0, 0, 0)
    for number in (1, 2):
        claim = replace(await claimed(store, number), tombstone_ms=60_000)
        await store.store(claim, made, b"body", 2)
    expired, kept = b"%024d" % 1, b"%024d" % 2
    probe.change(expired, until=1)
    assert await Looks(store).counts() == (0, 0)
    assert [b"body" in probe.fields(key).values() for key in (expired, kept)] == [False, True]
    assert RETENTION_MS < probe.left_ms(expired) <= RETENTION_MS + 60_000
    for key, state in ((expired, State.EXPIRED), (kept, State.COMPLETE)):
        found = await store.peek(key, SCOPE, 60_000)
        assert found.state is state


async def test_a_user_who_may_not_look_is_reported_once(server):
    url = f"redis://127.0.0.1:{server.port}"
    async with connected(url) as store:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "-scan")
            looks = Looks(store)
            assert await looks.counts() == (0, 0)
            client.delete(SCAN_KEY)
            assert await looks.counts() == (0, 0)
            # Of several workers one alone says it.
            other = Looks(store)
            other.keys.says_failures = False
            client.delete(SCAN_KEY)
            assert await other.counts() == (0, 0)
    ((event, fields),) = looks.warnings
    assert event == "cannot scan for unknown keys"
    assert "scan" in str(fields["reason"])
    assert other.warnings == []


@pytest.mark.parametrize("layout", ["hash", "packed"])
async def test_a_user_who_may_not_write_the_index(server, monkeypatch, layout):
    """A user made for an older version claims all the same. Open keys are found by a scan, until it has the right."""
    monkeypatch.setenv(TEST_LAYOUT, layout)
    async with connected(f"redis://127.0.0.1:{server.port}") as store:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "-@sortedset")
            looks = Looks(store)
            held = await claimed(store, 1)
            await store.mark_unknown(held, "cut off", 2)
            await looks.keys.look()
            await looks.keys.recount()
            assert [event for event, _ in looks.warnings] == ["open keys are not counted"]
            assert [record.key for record in (await open_keys(store.records, 10)).records] == [held.key]
            client.execute_command("ACL", "SETUSER", "default", "+@sortedset")
            client.delete("once:indexing", "once:counts")
            await looks.keys.look()
            await looks.keys.recount()
            assert (looks.keys.count, len(looks.warnings)) == (1, 1)
