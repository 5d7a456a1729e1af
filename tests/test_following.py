"""Following a response that is still running: what a reader finds in every state, and what it may not disturb."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from oncegate.decision import ANY_AGE, State
from oncegate.operating.record_facts import facts_of
from oncegate.store.kept import Kept, pack_kept, was_replaced
from oncegate.store.record import Claim, Record, ViewState, intact, pack
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding, claim_of
from oncegate.store.results import (
    AppendStatus,
    Followed,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
)
from oncegate.store.stages import DROPPED, RESPONSE_BEGUN
from oncegate.store.store import Store
from oncegate.store.stream_head import StreamHead, pack_head, unpack_head
from tests.conftest import REDIS_KINDS
from tests.probes import Probe, RedisProbe
from tests.stores import (
    BODY,
    FOREIGN,
    KEY,
    LEASE_MS,
    PATIENCE_S,
    RETENTION_MS,
    SCOPE,
    TOMBSTONE_MS,
    UNKNOWN_RETENTION_MS,
    answer,
    at,
    claim,
    claimed,
    connected,
    started_anew,
    store_small,
)

HEAD = pack_head(StreamHead(201, b"Made", b"X: 1\r\n", None, False, True, 0))
APPENDED, READ = AppendStatus.APPENDED, AppendStatus.APPENDED_READ
READING_MS = 5000
on_redis = pytest.mark.parametrize("probe", [*REDIS_KINDS, *(f"{kind}, packed" for kind in REDIS_KINDS)], indirect=True)


@pytest.fixture
async def store(probe: Probe) -> AsyncIterator[Store]:
    async with connected(probe.url) as store:
        yield store


async def running(store: Store, *chunks: bytes, head: bytes = HEAD, mode: bytes = b"hold") -> Claim:
    """Claim the key, and append these chunks of its response."""
    owner = await claimed(store, mode)
    for index, chunk in enumerate(chunks):
        assert await store.append(owner, index, chunk, PATIENCE_S, b"" if index else head) is APPENDED
    return owner


async def follow(store: Store, owner: Claim, first: int = 0, reading_ms: int = 0) -> Followed:
    found = await store.follow(KEY, owner.token, first, reading_ms)
    assert isinstance(found, Followed), found
    return found


# In every state ...


async def test_before_the_first_chunk(store):
    """There is a lease, and nothing else yet."""
    owner = await claimed(store)
    found = await follow(store, owner)
    assert started_anew(found.left_ms, LEASE_MS)
    assert found == Followed(State.IN_FLIGHT, b"", [], 0, None, False, found.left_ms)


async def test_while_it_runs(store, probe):
    """Head and chunks from the first that was asked for on; nothing in the record is changed."""
    owner = await running(store, b"one, ", b"two, ", b"three")
    before, left_ms = probe.fields(KEY), probe.left_ms(KEY)
    found = await follow(store, owner)
    assert started_anew(found.left_ms, LEASE_MS)
    assert found == Followed(State.IN_FLIGHT, HEAD, [b"one, ", b"two, ", b"three"], 3, None, False, found.left_ms)
    found = await follow(store, owner, 2)
    assert (found.head, found.chunks, found.count) == (b"", [b"three"], 3)
    for beyond in (3, 99):
        found = await follow(store, owner, beyond)
        assert (found.state, found.chunks, found.count) == (State.IN_FLIGHT, [], 3)
    assert probe.fields(KEY) == before
    assert probe.left_ms(KEY) <= left_ms


async def test_what_operators_see_of_it(store):
    """A key in flight, with the bytes that are stored, whoever reads them."""
    owner = await running(store, b"one, ", b"two, ")
    await follow(store, owner, 0, READING_MS)
    view = await store.records.read(KEY)
    assert view is not None
    assert (view.state, view.token, view.bytes_stored) == (ViewState.IN_FLIGHT, owner.token, 10)
    assert [one.bytes_stored async for one in store.records.scan()] == [10]


async def test_a_reader_far_behind_gets_a_part_at_a_time(store):
    """About 256 KiB, at least one chunk, and the number of all."""
    chunks = [b"a" * 300_000, b"b" * 200_000, b"c" * 60_000, b"d" * 60_000]
    owner = await running(store, *chunks)
    parts = [await follow(store, owner, first) for first in (0, 1, 2, 3)]
    assert [part.chunks for part in parts] == [chunks[:1], chunks[1:3], chunks[2:], chunks[3:]]
    assert {part.count for part in parts} == {4}


async def test_an_original_without_a_head(store):
    """Of an older proxy, or one whose head is not to be told yet."""
    owner = await running(store, b"one", head=b"")
    found = await follow(store, owner)
    assert (found.head, found.chunks, found.count) == (b"", [b"one"], 1)


@pytest.mark.parametrize("tombstone_ms", [0, TOMBSTONE_MS])
async def test_once_it_is_complete(store, tombstone_ms):
    """The response, whose chunks are read on from where a reader was."""
    owner = replace(await running(store, b"one, ", b"two, "), tombstone_ms=tombstone_ms)
    whole = answer(b"one, ", b"two, ", b"three")
    assert await store.store(owner, whole, b"three", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    assert await follow(store, owner) == Followed(
        State.COMPLETE, b"", [b"one, ", b"two, ", b"three"], 3, whole, False, 0
    )
    assert await follow(store, owner, 2) == Followed(State.COMPLETE, b"", [b"three"], 3, whole, False, 0)
    assert await follow(store, owner, 3) == Followed(State.COMPLETE, b"", [], 3, whole, False, 0)
    assert await store.read(KEY, owner.token, 0) == [b"one, ", b"two, ", b"three"]


@pytest.mark.parametrize("tombstone_ms", [0, TOMBSTONE_MS])
async def test_a_small_complete_one(store, tombstone_ms):
    """Its body is the only chunk."""
    owner = replace(await claimed(store), tombstone_ms=tombstone_ms)
    await store_small(store, owner)
    assert await follow(store, owner) == Followed(State.COMPLETE, b"", [BODY], 1, answer(BODY), False, 0)
    assert await follow(store, owner, 1) == Followed(State.COMPLETE, b"", [], 1, answer(BODY), False, 0)
    assert await store.follow(KEY, FOREIGN, 0) is ReadFailure.GONE


async def test_one_whose_body_is_not_stored(store):
    """Too large, or the store is full: a reader is told so."""
    owner = await running(store, b"one, ")
    whole = answer(b"one, ", b"two", kept=False)
    assert await store.store(owner, whole, b"", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    found = await follow(store, owner)
    assert (found.state, found.chunks, found.count) == (State.COMPLETE, [], 0)
    assert found.response is not None
    assert not found.response.body_stored


async def test_an_empty_response(store):
    """Complete, with nothing to read."""
    owner = await claimed(store)
    await store.store(owner, answer(), b"", PATIENCE_S)
    assert await follow(store, owner) == Followed(State.COMPLETE, b"", [], 0, answer(), False, 0)


@pytest.mark.parametrize("state", ["lapsed", "unknown", "expired", "tombstone"])
async def test_what_has_ended_otherwise(store, probe, state):
    """Unknown, also where nobody has written that yet; and expired, of whose response nothing is told."""
    owner = await at(store, probe, state)
    now = State.UNKNOWN if state in ("lapsed", "unknown") else State.EXPIRED
    assert await follow(store, owner) == Followed(now, b"", [], 0, None, False, 0)


async def test_an_owner_that_died_in_the_middle(store, probe):
    """The lease is over: unknown, and never complete."""
    owner = await running(store, b"one")
    probe.change(KEY, lease=probe.now_ms() - 1)
    found = await follow(store, owner)
    assert (found.state, found.response, found.left_ms) == (State.UNKNOWN, None, 0)


@pytest.mark.parametrize("chunks", [(), (b"one",)], ids=["at once", "later"])
async def test_a_body_that_is_not_stored_any_more(store, chunks):
    """The owner says so while the response goes on: too large, or the store is full."""
    owner = await running(store, *chunks)
    await store.renew(owner, RESPONSE_BEGUN)
    assert not (await follow(store, owner)).dropped
    await store.renew(owner, DROPPED)
    found = await follow(store, owner)
    assert (found.state, found.dropped) == (State.IN_FLIGHT, True)
    view = await store.records.read(KEY)
    assert view is not None
    assert view.progress == DROPPED.description
    await store.store(owner, answer(*chunks, b"two", kept=False), b"", PATIENCE_S)
    assert not (await follow(store, owner)).dropped


async def test_a_clock_that_stepped_back(store, probe):
    """A lease never seems longer than it was."""
    owner = await running(store, b"one")
    probe.change(KEY, lease=probe.now_ms() + 3_600_000)
    assert (await follow(store, owner)).left_ms == LEASE_MS


async def test_another_claim_is_never_followed(store, probe):
    """Free, taken over, released by its owner or by an operator: gone for whoever names the old token."""
    owner = await running(store, b"one", mode=b"retry")
    assert await store.follow(KEY, FOREIGN, 0, READING_MS) is ReadFailure.GONE
    await store.mark_unknown(owner, "lost", PATIENCE_S)
    assert (await follow(store, owner)).chunks == []
    other = await claimed(store, b"retry")
    assert await store.follow(KEY, owner.token, 0, READING_MS) is ReadFailure.GONE
    await store.append(other, 0, b"another", PATIENCE_S, HEAD)
    assert await store.follow(KEY, owner.token, 0, READING_MS) is ReadFailure.GONE
    assert await store.release_by_operator(KEY, Deciding(other.token), b"O" * 16, b"9") is ResolveStatus.RELEASED
    assert await store.follow(KEY, other.token, 0, READING_MS) is ReadFailure.GONE
    probe.remove(KEY)
    assert await store.follow(KEY, other.token, 0, READING_MS) is ReadFailure.GONE
    owner = await running(store, b"one")
    await store.release(owner, PATIENCE_S)
    assert await store.follow(KEY, owner.token, 0, READING_MS) is ReadFailure.GONE
    assert probe.keys() == []


@pytest.mark.fault(36)
@pytest.mark.parametrize("lost", [0, 1])
async def test_a_chunk_that_a_failover_lost(store, probe, lost):
    """The owner has appended others since: who has it may go on, and nobody else waits for it."""
    owner = await running(store, b"0", b"1")
    await store.append(owner, 2, b"2", PATIENCE_S)
    probe.change(KEY, **{f"b{lost}": None})
    assert await store.follow(KEY, owner.token, lost, READING_MS) is ReadFailure.INCOMPLETE
    assert (await follow(store, owner, 2)).chunks == [b"2"]


async def test_a_store_that_is_away(store):
    """The reader knows nothing, and asks again."""
    owner = await running(store, b"one")
    await store.close()
    store.end_calls()
    assert await store.follow(KEY, owner.token, 0, READING_MS) is ReadFailure.UNCONFIRMED


# That somebody reads ...


async def test_the_owner_hears_that_somebody_reads(store, probe):
    """With its next chunk, and no more once nobody has read for a while. Readers write it once a second at most."""
    owner = await running(store, b"0")
    await follow(store, owner)
    assert await store.append(owner, 1, b"1", PATIENCE_S) is APPENDED
    await follow(store, owner, 0, READING_MS)
    noted = probe.fields(KEY)
    for _ in range(20):
        await follow(store, owner, 0, READING_MS)
    assert probe.fields(KEY) == noted
    assert await store.append(owner, 2, b"2", PATIENCE_S) is READ
    assert await store.append(owner, 2, b"2", PATIENCE_S) is READ
    assert (await follow(store, owner)).count == 3
    probe.change(KEY, readers_until=probe.now_ms() - 1)
    assert await store.append(owner, 3, b"3", PATIENCE_S) is APPENDED
    probe.change(KEY, readers_until=probe.now_ms() + READING_MS - 1001)
    await follow(store, owner, 0, READING_MS)
    assert int(probe.fields(KEY)["readers_until"]) - probe.now_ms() > READING_MS - 1000


async def test_a_time_to_come_is_not_believed_for_ever(store, probe):
    """The clock stepped back since somebody wrote it: the next reader writes it anew."""
    owner = await running(store, b"0")
    probe.change(KEY, readers_until=probe.now_ms() + 3_600_000)
    await follow(store, owner, 0, READING_MS)
    assert int(probe.fields(KEY)["readers_until"]) <= probe.now_ms() + READING_MS


@on_redis
@pytest.mark.parametrize("state", ["in flight", "no head", "unknown", "complete"])
async def test_nothing_is_noted_where_nobody_would_read_it(store, probe, state):
    """An owner of an older version counts the fields of its record, and does not know this one."""
    owner = await running(store, *([] if state == "in flight" else [b"0"]), head=HEAD if state == "complete" else b"")
    if state == "unknown":
        await store.mark_unknown(owner, "lost", PATIENCE_S)
    elif state == "complete":
        await store.store(owner, answer(b"0", b"1"), b"1", PATIENCE_S)
    before = probe.fields(KEY)
    await follow(store, owner, 0, READING_MS)
    assert probe.fields(KEY) == before


# The owner's settle ...

OVER = {
    "whole": ([b"ab", b"cd"], answer(b"ab", b"cd", b"e"), b"e", SettleStatus.STORED),
    "whole, all appended": ([b"ab", b"cd"], answer(b"ab", b"cd"), b"", SettleStatus.STORED),
    "one missing": ([b"ab"], answer(b"ab", b"cd", b"e"), b"e", SettleStatus.INCOMPLETE),
    "one too many": ([b"ab", b"cd", b"e"], answer(b"ab", b"cd"), b"", SettleStatus.INCOMPLETE),
    "two missing, for as many fields": ([b"ab"], answer(b"ab", b"", b""), b"", SettleStatus.INCOMPLETE),
    "one shorter": ([b"a"], answer(b"ab", b"cd"), b"cd", SettleStatus.INCOMPLETE),
}


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize(("chunks", "whole", "last", "status"), OVER.values(), ids=OVER)
async def test_the_settle_counts_chunks_alone(store, probe, chunks, whole, last, status, is_read):
    """Head and readers count neither as chunks nor for them, and nothing of them is left in a complete record."""
    owner = await running(store, *chunks)
    if is_read:
        await follow(store, owner, 0, READING_MS)
    await store.renew(owner)
    before = probe.fields(KEY)
    assert await store.store(owner, whole, last, PATIENCE_S) == SettleResult(status)
    after = probe.fields(KEY)
    if status is SettleStatus.INCOMPLETE:
        assert after == before
        assert await store.store(owner, replace(whole, body_stored=False), b"", PATIENCE_S) == SettleResult(
            SettleStatus.STORED
        )
        assert set(probe.fields(KEY)) == {"meta"}
        return
    assert set(after) == {"meta", *(f"b{index}" for index in range(whole.chunks))}
    found = await claim(store)
    assert isinstance(found, Record)
    assert found.response == whole
    read = await store.read(KEY, owner.token, 0)
    assert isinstance(read, list)
    assert intact(whole, b"".join(read))


@pytest.mark.parametrize("how", ["release", "mark unknown", "bare"])
async def test_every_other_end_leaves_nothing_of_it(store, probe, how):
    """No head and no reader without a response."""
    owner = await running(store, b"0", b"1")
    await follow(store, owner, 0, READING_MS)
    if how == "release":
        await store.release(owner, PATIENCE_S)
    elif how == "bare":
        await store.store(owner, answer(b"0", b"1", kept=False), b"", PATIENCE_S)
    else:
        await store.mark_unknown(owner, "lost", PATIENCE_S)
    assert {"head", "readers_until", "b0", "b1", "bytes"} & set(probe.fields(KEY)) == set()


# Late, repeated and refused ...


async def test_a_first_chunk_that_comes_again(store, probe):
    """A repeat brings nothing new, also without its head or with another one."""
    owner = await running(store, b"one")
    before = probe.fields(KEY)
    other = pack_head(StreamHead(500, b"No", b"", 1, False, False, 0))
    for head in (HEAD, b"", other):
        assert await store.append(owner, 0, b"one", PATIENCE_S, head) is APPENDED
        assert await store.append(owner, 0, b"two", PATIENCE_S, head) is AppendStatus.INCOMPLETE
    assert probe.fields(KEY) == before
    assert (await follow(store, owner)).head == HEAD


async def test_a_first_chunk_that_comes_too_late(store, probe):
    """Behind a settle it changes nothing; behind a takeover it is fenced."""
    owner = await claimed(store, b"retry")
    await store.mark_unknown(owner, "lost", PATIENCE_S)
    other = await claimed(store, b"retry")
    before = probe.fields(KEY)
    assert await store.append(owner, 0, b"one", PATIENCE_S, HEAD) is AppendStatus.FENCED
    assert probe.fields(KEY) == before
    await store_small(store, other)
    before = probe.fields(KEY)
    assert await store.append(other, 0, b"one", PATIENCE_S, HEAD) is AppendStatus.COMPLETE
    assert probe.fields(KEY) == before
    probe.remove(KEY)
    assert await store.append(other, 0, b"one", PATIENCE_S, HEAD) is AppendStatus.ABSENT
    assert probe.keys() == []


@on_redis
async def test_at_the_memory_limit(store, probe: RedisProbe):
    """A running response is followed as ever, though nobody can note it; its next chunk is refused."""
    owner = await running(store, b"one")
    before = probe.fields(KEY)
    probe.client.config_set("maxmemory", 1)
    try:
        found = await follow(store, owner, 0, READING_MS)
        assert (found.head, found.chunks) == (HEAD, [b"one"])
        assert await store.append(owner, 1, b"two", 0.0) is AppendStatus.NO_MEMORY
        assert probe.fields(KEY) == before
        assert await store.store(owner, answer(b"one", b"two"), b"two", PATIENCE_S) == SettleResult(SettleStatus.STORED)
        assert (await follow(store, owner, 1, READING_MS)).chunks == [b"two"]
    finally:
        probe.client.config_set("maxmemory", 0)


# What a claim has replaced ...


async def replaced(store: Store, owner: Claim) -> set[bool]:
    """Return what a reader is told in every way."""
    view = await store.records.read(KEY)
    assert view is not None
    shown = (await facts_of(store, view)).get("replaced_another", False)
    return {(await follow(store, owner)).replaced, view.kept.replaced, shown}


async def took_over(store: Store, probe: Probe, how: str) -> Claim:
    """Return a claim that took the place of another record."""
    former = await claimed(store, b"retry")
    if how == "released by an operator":
        await store.release_by_operator(KEY, Deciding(former.token), b"O" * 16, b"9")
        return await claimed(store, b"retry")
    if how == "past its window":
        await store_small(store, former)
        found = await claim(store, mode=b"retry", window_ms=ANY_AGE)
        assert isinstance(found, Claim)
        return found
    await store.append(former, 0, b"of another", PATIENCE_S, HEAD)
    if how == "lapsed":
        probe.change(KEY, lease=probe.now_ms() - 1)
    else:
        await store.mark_unknown(former, "lost", PATIENCE_S)
    return await claimed(store, b"retry")


@pytest.mark.parametrize("how", ["unknown", "lapsed", "released by an operator", "past its window"])
async def test_a_claim_that_replaced_another_says_so(store, probe, how):
    """In flight, renewed, with chunks, unknown and complete, small or large; and to an owner that claims again."""
    owner = await took_over(store, probe, how)
    assert was_replaced(owner.kept)
    assert await replaced(store, owner) == {True}
    again = await store.reclaim(replace(owner, kept=b""), SCOPE)
    assert isinstance(again, Claim)
    assert was_replaced(again.kept)
    await store.renew(owner)
    assert await replaced(store, owner) == {True}
    assert await store.append(owner, 0, b"one, ", PATIENCE_S, HEAD) is APPENDED
    assert await replaced(store, owner) == {True}
    again = await store.reclaim(owner, SCOPE)
    assert isinstance(again, Claim)
    assert was_replaced(again.kept)
    saved = probe.save(KEY)
    for settle in (
        store.store(owner, answer(b"one, ", b"two"), b"two", PATIENCE_S),
        store.mark_unknown(owner, "lost", PATIENCE_S, 502),
        store_small(store, owner),
    ):
        probe.remove(KEY)
        probe.restore(KEY, saved)
        assert (await settle).status.is_done
        assert await replaced(store, owner) == {True}
        found = await store.peek(KEY, SCOPE, LEASE_MS)
        assert isinstance(found, Record)
        assert was_replaced(found.kept)


async def test_a_claim_that_replaced_nothing(store, probe):
    """Of a free key, also where its own owner has released it, where an older claim left no record, and by a repeat."""
    for _ in range(2):
        owner = await running(store, b"one, ")
        assert not was_replaced(owner.kept)
        assert await replaced(store, owner) == {False}
        await store.release(owner, PATIENCE_S)
    owner = await running(store, b"one, ")
    again = await store.reclaim(owner, SCOPE)
    assert isinstance(again, Claim)
    assert not was_replaced(again.kept)
    await store.store(owner, answer(b"one, ", b"two"), b"two", PATIENCE_S)
    assert await replaced(store, owner) == {False}


@pytest.mark.parametrize("how", ["unknown", "lapsed", "released by an operator", "past its window"])
@pytest.mark.parametrize("has_begun", [False, True])
async def test_one_that_replaced_another_and_was_released(store, probe, how, has_begun):
    """Nothing was sent for it. The next claim replaces what that one had; its late owner changes nothing."""
    owner = await took_over(store, probe, how)
    if has_begun:
        await store.append(owner, 0, b"one", PATIENCE_S, HEAD)
    assert await store.release(owner, PATIENCE_S) == SettleResult(SettleStatus.RELEASED)
    assert await store.follow(KEY, owner.token, 0) is ReadFailure.GONE
    assert await store.append(owner, 0, b"one", PATIENCE_S, HEAD) in (AppendStatus.FENCED, AppendStatus.ABSENT)
    assert await store.renew(owner) in (RenewStatus.FENCED, RenewStatus.ABSENT)
    assert await store.peek(KEY, SCOPE, LEASE_MS) is None
    other = await claimed(store)
    assert int(other.fence) > int(owner.fence)
    assert was_replaced(other.kept)
    assert started_anew(probe.left_ms(KEY), UNKNOWN_RETENTION_MS)


@on_redis
async def test_what_is_left_of_it_expires(store, probe):
    """With the retention of the response that could be read on."""
    owner = await took_over(store, probe, "unknown")
    await store.release(owner, PATIENCE_S)
    assert started_anew(probe.left_ms(KEY), RETENTION_MS)
    probe.remove(KEY)
    assert not was_replaced((await claimed(store)).kept)


async def test_what_replaced_another_is_replaced_again(store, probe):
    """It is said once, however often that happens, and an operator's response says it, too."""
    owner = await took_over(store, probe, "unknown")
    for _ in range(3):
        await store.mark_unknown(owner, "lost", PATIENCE_S)
        owner = await claimed(store, b"retry")
        assert probe.fields(KEY)["more"] == pack_kept(Kept(replaced=True))
    view = await store.records.read(KEY)
    assert view is not None
    decided = replace(claim_of(view, 3_600_000), token=b"P" * 16)
    await store.resolve_by_operator(decided, Deciding(owner.token), pack(decided, answer(BODY)), BODY)
    assert await replaced(store, decided) == {True}


# Damage ...


async def test_a_damaged_head_is_no_head(store, probe):
    """Its readers wait for the end, and the owner is not disturbed."""
    owner = await running(store, b"one, ")
    probe.change(KEY, head=HEAD[:-1] + b"x")
    found = await follow(store, owner)
    assert (found.state, found.chunks) == (State.IN_FLIGHT, [b"one, "])
    assert unpack_head(found.head) is None
    whole = answer(b"one, ", b"two")
    assert await store.store(owner, whole, b"two", PATIENCE_S) == SettleResult(SettleStatus.STORED)


@pytest.mark.parametrize("field", ["state", "lease", "lease_ms", "readers_until", "more", "bytes", "head"])
async def test_no_damage_makes_a_running_response_a_complete_one(store, probe, field):
    """A reader that cannot understand the record breaks off, or waits; no damage is a clean end."""
    owner = await running(store, b"one, ")
    await follow(store, owner, 0, READING_MS)
    saved = probe.save(KEY)
    texts = (b"", b"x", b"-1", b"nan", b"complete", b"9" * 40, b"1e300", b"\xff" * 9, None)
    value = probe.fields(KEY).get(field, b"x")
    for wrong in texts if isinstance(probe, RedisProbe) else probe.damages(field, value):
        probe.change(KEY, **{field: wrong})
        found = await store.follow(KEY, owner.token, 0, READING_MS)
        assert isinstance(found, ReadFailure) or found.response is None, wrong
        probe.remove(KEY)
        probe.restore(KEY, saved)


@pytest.mark.parametrize("settled", ["small", "in chunks"])
async def test_a_damaged_complete_record_is_not_followed(store, probe, settled):
    """Neither one whose meta is not what it was, nor one that lacks a chunk."""
    owner = await running(store, *([b"one, "] if settled == "in chunks" else []))
    if settled == "small":
        await store_small(store, owner)
    else:
        await store.store(owner, answer(b"one, ", b"two"), b"two", PATIENCE_S)
        saved = probe.save(KEY)
        probe.change(KEY, b1=None)
        assert (await follow(store, owner)).chunks == [b"one, "]
        assert await store.follow(KEY, owner.token, 1) is ReadFailure.INCOMPLETE
        probe.remove(KEY)
        probe.restore(KEY, saved)
    for wrong in probe.damages("meta", probe.fields(KEY)["meta"]):
        if wrong is None:
            continue
        probe.change(KEY, meta=wrong)
        found = await store.follow(KEY, owner.token, 0)
        # In a packed record the head is under the digest of the response, as its body is.
        if isinstance(found, Followed) and found.state is State.COMPLETE:
            assert found.response is not None
            assert not intact(found.response, b"".join(found.chunks)), wrong
        else:
            assert found in (ReadFailure.INCOMPLETE, ReadFailure.GONE), wrong


@on_redis
async def test_another_type_in_the_place_of_the_record(store, probe: RedisProbe):
    """Nobody's record: there is nothing to follow, and no error."""
    owner = await claimed(store)
    probe.remove(KEY)
    probe.client.rpush(store_key(KEY), "x")
    assert await store.follow(KEY, owner.token, 0, READING_MS) is ReadFailure.UNCONFIRMED
