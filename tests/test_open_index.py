"""The index of open keys follows each verb, in either store: what is open has an entry, and nothing else has."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from oncegate.decision import CANCELLED
from oncegate.store.open_keys.scores import BAND_MS, range_of, score_of, since_of
from oncegate.store.record import Claim, cancelled_claim, pack
from oncegate.store.record_view import Deciding, OpenKind
from oncegate.store.results import ResolveStatus
from oncegate.store.store import Store
from tests.probes import Probe
from tests.stores import (
    BODY,
    KEY,
    LEASE_MS,
    PATIENCE_S,
    SCOPE,
    TOMBSTONE_MS,
    answer,
    claim,
    claimed,
    connected,
    key,
    store_small,
)
from tests.test_open_keys import counted, indexed, lapse, listed


@pytest.fixture
async def store(stored: Probe) -> AsyncIterator[Store]:
    async with connected(stored.url) as store:
        await indexed(store)
        yield store


def score(probe: Probe, of: bytes = KEY) -> int | None:
    """Return the score of a key, None for no entry."""
    scores = probe.entries().get(of, [])
    assert len(scores) <= 1
    return scores[0] if scores else None


async def test_a_claim_is_in_the_index_at_once(store: Store, stored: Probe) -> None:
    """Its owner has written nothing else. A renewal moves it, and a duplicate leaves it alone."""
    owner = await claimed(store)
    assert score(stored) == owner.created_ms + LEASE_MS
    await claim(store)
    assert score(stored) == owner.created_ms + LEASE_MS
    stored.index(KEY, 1)
    await store.renew(owner)
    assert owner.created_ms + LEASE_MS <= (score(stored) or 0) <= stored.now_ms() + LEASE_MS
    stored.index(KEY, 1)
    assert isinstance(await store.reclaim(owner, SCOPE), Claim)
    assert owner.created_ms + LEASE_MS <= (score(stored) or 0) <= stored.now_ms() + LEASE_MS


async def test_a_lease_that_begins_anew(store: Store, stored: Probe) -> None:
    """Where the clock stepped back, a duplicate lets the lease of the owner begin anew: the index says so, too."""
    await claimed(store)
    far_ms = stored.now_ms() + 10 * LEASE_MS
    stored.change(KEY, lease=far_ms)
    stored.index(KEY, far_ms)
    await claim(store)
    assert (score(stored) or 0) <= stored.now_ms() + LEASE_MS


@pytest.mark.parametrize("end", ["store", "store anew", "store in chunks", "store bare", "release", "resolve", "free"])
@pytest.mark.parametrize("state", ["in flight", "unknown"])
async def test_what_ended_is_not_in_the_index(store: Store, stored: Probe, end: str, state: str) -> None:
    owner, operator = await claimed(store), store.token()
    if end == "store in chunks":
        await store.append(owner, 0, BODY, PATIENCE_S)
    if state == "unknown":
        await store.mark_unknown(owner, "cut off", PATIENCE_S)
    assert score(stored) is not None
    match end:
        case "store":
            await store_small(store, owner)
        case "store anew":
            stored.remove(KEY)
            await store_small(store, owner)
        case "store in chunks" if state == "unknown":
            await store_small(store, owner)
        case "store in chunks":
            await store.store(owner, answer(BODY, BODY), BODY, PATIENCE_S)
        case "store bare":
            await store.store(owner, answer(BODY, kept=False), b"", PATIENCE_S)
        case "release":
            await store.release(owner, PATIENCE_S)
        case "resolve":
            theirs = replace(owner, token=operator, fence=b"%016d" % (int(owner.fence) + 1))
            meta = pack(theirs, answer(BODY))
            assert await store.resolve_by_operator(theirs, Deciding(owner.token), meta, BODY) is ResolveStatus.RESOLVED
        case _:
            fence = b"%d" % (int(owner.fence) + 1)
            assert (
                await store.release_by_operator(KEY, Deciding(owner.token), operator, fence) is ResolveStatus.RELEASED
            )
    assert score(stored) is None
    assert await counted(store) == {}


@pytest.mark.parametrize("mode", [b"hold", b"retry", CANCELLED])
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("is_gone", [False, True])
async def test_what_is_unknown_stays_in_the_index(
    store: Store, stored: Probe, mode: bytes, appends: bool, is_gone: bool
) -> None:
    """Also where the record had vanished, and in either layout."""
    owner = await claimed(store, b"hold" if mode == CANCELLED else mode)
    if appends:
        await store.append(owner, 0, BODY, PATIENCE_S)
    if is_gone:
        stored.remove(KEY)
    await store.mark_unknown(cancelled_claim(owner) if mode == CANCELLED else owner, "cut off", PATIENCE_S)
    kind = OpenKind.UNKNOWN if mode == b"hold" else OpenKind.WAIVED
    assert score(stored) == score_of(kind, owner.created_ms)
    assert await counted(store) == {kind.value: 1}
    assert [one.key for one in await listed(store, kinds=[kind])] == [KEY]


async def test_a_key_that_is_taken_over_is_in_flight_again(store: Store, stored: Probe) -> None:
    """So is one whose owner died, and one that a window has opened."""
    await store.mark_unknown(await claimed(store, b"retry"), "cut off", PATIENCE_S)
    again = await claimed(store, b"retry")
    assert score(stored) == again.created_ms + LEASE_MS
    lapse(stored, KEY)
    third = await claimed(store, b"retry")
    assert third.token != again.token
    assert score(stored) == third.created_ms + LEASE_MS
    await store_small(store, third)
    await asyncio.sleep(0.01)
    fourth = await claim(store, window_ms=1)
    assert isinstance(fourth, Claim)
    assert score(stored) == fourth.created_ms + LEASE_MS


async def test_an_entry_that_outlived_its_record(store: Store, stored: Probe) -> None:
    """It is no open key. A sweep removes it, gives entries that say something else their scores, and no other."""
    gone, complete, moved, there = [await claimed(store, key=key(number)) for number in range(4)]
    for one in (gone, complete, moved):
        lapse(stored, one.key, 1000)
    stored.remove(gone.key)
    await store_small(store, replace(complete, tombstone_ms=TOMBSTONE_MS))
    await store.mark_unknown(moved, "cut off", PATIENCE_S)
    stored.index(complete.key, stored.now_ms() - 1000)
    stored.index(moved.key, 5)
    assert [one.key for one in await listed(store, kinds=OpenKind)] == [moved.key, there.key]
    for server in store.records.servers:
        assert await server.index.sweep() is None
    assert stored.entries() == {
        moved.key: [score_of(OpenKind.UNKNOWN, moved.created_ms)],
        there.key: [there.created_ms + LEASE_MS],
    }
    assert await counted(store) == {"unknown": 1, "in_flight": 1}


def test_scores() -> None:
    """Each kind is a range of its own, whatever the time, and in each the oldest comes first."""
    now_ms = 1_800_000_000_000
    ranges = [range_of(kind, now_ms) for kind in OpenKind]
    for kind, (least, most) in zip(OpenKind, ranges, strict=True):
        since = now_ms + 60_000 if kind is OpenKind.IN_FLIGHT else now_ms - 60_000
        assert least <= score_of(kind, since) <= most
        assert since_of(score_of(kind, since)) == since
        assert score_of(kind, since) < score_of(kind, since + 1)
        assert sum(low <= score_of(kind, since) <= high for low, high in ranges) == 1
    assert 2 * BAND_MS < 2**53
