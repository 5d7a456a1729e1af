"""A recording and real stores: what it appends when, how much it holds meanwhile, and when it stops."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.ticker import Ticker
from oncegate.decision import Settlement
from oncegate.gateway.recording import BACKLOG_BYTES, BATCH_BYTES, CHUNK_BYTES, TIGHT_BATCH_BYTES, Recording
from oncegate.messages.response_head import response_digest
from oncegate.store.leases import Leases, suspended_clock_s
from oncegate.store.results import AppendStatus, SettleStatus
from oncegate.store.store import Store
from oncegate.store.stream_head import StreamHead
from oncegate.streams.feed import Feed, FeedEnd
from tests.parts import until
from tests.probes import Probe
from tests.stores import FOREIGN, KEY, PATIENCE_S, answer, claimed, connected

HEAD = StreamHead(201, b"Made", b"X: 1\r\n", None, False, False, 0)
LONG_S = 3600.0  # no test waits for it


@pytest.fixture
async def store(probe: Probe) -> AsyncIterator[Store]:
    async with connected(probe.url) as store:
        yield store


@pytest.fixture
async def begin(store: Store) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that begins a recording. `every_s`: how long bytes wait for more."""
    begun = []

    async def begin(memory: MemoryBudget | None = None, every_s: float = LONG_S, **options: Any) -> Recording:
        leases = Leases(store, 600, lambda *_: None, asyncio.get_running_loop().time)
        held = leases.hold(await claimed(store), suspended_clock_s(), LONG_S)
        digest = response_digest(201, b"Made", b"X: 1\r\n")
        memory = memory or MemoryBudget(1 << 28)
        options = {
            "max_bytes": 1 << 24,
            "settle_timeout_s": PATIENCE_S,
            "memory": memory,
            "ticker": Ticker(asyncio.get_running_loop()),
            **options,
        }
        one = Recording(store, held, digest, **options)
        one.batch_s = every_s
        begun.append((one, asyncio.ensure_future(leases.run())))
        return one

    yield begin
    for one, renewing in begun:
        renewing.cancel()
        one.close()


def appended(probe: Probe) -> list[int]:
    """Return the sizes of the chunks in the record."""
    fields = probe.fields(KEY)
    return [len(fields[f"b{number}"]) for number in range(len(fields)) if f"b{number}" in fields]


async def test_what_comes_within_a_batchs_time_is_one_append(begin, probe):
    """The pieces of many turns of the loop go to the store together, once the time of the first is over."""
    one = await begin(every_s=0.3)
    for _ in range(10):
        one.add(b"piece")
        await asyncio.sleep(0.005)
    assert appended(probe) == []
    await until(lambda: one.chunks == 1)
    assert appended(probe) == [50]
    one.add(b"next")
    await until(lambda: one.chunks == 2)
    assert appended(probe) == [50, 4]


async def test_a_whole_batch_does_not_wait(begin, probe):
    """It is appended at once; what comes meanwhile goes with the next, and no chunk is larger than it may be."""
    one = await begin()
    one.add(b"a" * (BATCH_BYTES - 1))
    await asyncio.sleep(0.05)
    assert (one.chunks, appended(probe)) == (0, [])
    one.add(b"b")
    one.add(b"c" * BATCH_BYTES)
    one.add(b"d" * CHUNK_BYTES)
    await until(lambda: one.chunks == 3)
    assert appended(probe) == [BATCH_BYTES, CHUNK_BYTES, BATCH_BYTES]


@pytest.mark.parametrize("size", [0, 5, BATCH_BYTES - 1, BATCH_BYTES, 2 * CHUNK_BYTES + 5])
async def test_the_end_does_not_wait(begin, store, size):
    """What was not appended yet goes with the settle, and the record has the whole response."""
    memory = MemoryBudget(1 << 28)
    one, data = await begin(memory), b"x" * size
    for at in range(0, size, 1000):
        one.add(data[at : at + 1000])
    last = await one.finish()
    stored = replace(answer(data), chunks=one.chunks, digest=one.digest(b""))
    assert stored.digest == answer(data).digest
    assert (await store.store(one._held.claim, stored, last, PATIENCE_S)).status.is_done
    one.close()
    assert memory.used == 0
    found = [] if size == 0 else await store.read(KEY, one._held.claim.token, 0)
    assert b"".join(found) == data[: len(b"".join(found))]


async def test_where_memory_is_short_less_waits_for_less_time(begin, probe):
    """What is not appended yet counts in the budget. Above half of it a batch is smaller, and waits for less."""
    memory = MemoryBudget(limit=4 * TIGHT_BATCH_BYTES)
    one = await begin(memory)
    one.add(b"a" * TIGHT_BATCH_BYTES)
    await asyncio.sleep(0.05)
    assert (one.chunks, memory.used) == (0, TIGHT_BATCH_BYTES)
    one.add(b"b" * TIGHT_BATCH_BYTES + b"b")
    await until(lambda: one.chunks == 1)
    assert (appended(probe), memory.used) == ([2 * TIGHT_BATCH_BYTES + 1], 0)
    # Other requests need it.
    memory.used += memory.limit
    one.add(b"c")
    await until(lambda: one.chunks == 2)
    one.add(b"d" * TIGHT_BATCH_BYTES)
    await until(lambda: one.chunks == 3)
    assert memory.used == memory.limit


async def test_what_is_read_elsewhere_does_not_wait(begin, store, probe, monkeypatch):
    """What waits when that is noted goes at once, and so does what comes after a silence; else a short batch waits.

    A record has no reader before its first chunk: that changes nothing of what a note has said.
    """
    one = await begin(shown=lambda: HEAD)
    one.add(b"a")
    await asyncio.sleep(0.05)
    assert (one.chunks, appended(probe)) == (0, [])
    one._held.read_elsewhere = True
    one._held.on_read()
    await until(lambda: one.chunks == 1)
    assert one._held.read_elsewhere
    await store.follow(KEY, one._held.claim.token, 0, 60_000)
    monkeypatch.setattr("oncegate.gateway.recording.TIGHT_BATCH_S", LONG_S)
    one.add(b"b")
    one.add(b"cc")
    await asyncio.sleep(0.05)
    assert one.chunks == 1
    one._stop_timer()
    one._appended_s = float("-inf")  # after a silence
    one.add(b"ddd")
    await until(lambda: one.chunks == 2)
    assert (appended(probe), one._held.read_elsewhere) == ([1, 6], True)
    monkeypatch.undo()
    one.add(b"eeee")
    await until(lambda: one.chunks == 3)
    # Nobody reads any more.
    probe.change(KEY, readers_until=probe.now_ms() - 1)
    one.add(b"f")
    await until(lambda: one.chunks == 4)
    assert not one._held.read_elsewhere
    one.add(b"g")
    await asyncio.sleep(0.2)
    assert one.chunks == 4


async def test_a_store_that_falls_behind_is_waited_for(begin):
    """More than the backlog is not taken at once, and there is room again when the store has taken some."""
    one = await begin()
    assert one.add(b"a" * BACKLOG_BYTES)
    assert not one.add(b"b")
    async with asyncio.timeout(PATIENCE_S):
        await one.wait_room()
    assert one.add(b"c")
    assert one.chunks


async def test_an_owner_without_a_batch_learns_that_it_is_fenced(begin, probe):
    """The renewal of its lease says so at once: no append is needed, and nothing of the recording is held then."""
    memory = MemoryBudget(1 << 28)
    broken = asyncio.Event()
    one = await begin(memory, on_broken=broken.set)
    one.add(b"some")
    probe.change(KEY, token=FOREIGN)
    async with asyncio.timeout(PATIENCE_S):
        await broken.wait()
    assert (one.is_broken, one.is_storing, memory.used) == (True, False, 0)
    one.add(b"more")
    assert (memory.used, await one.finish(), appended(probe)) == (0, b"", [])


@pytest.mark.parametrize("meets", ["fenced", "absent", "too large"])
async def test_what_ends_a_recording_early(begin, probe, meets):
    """Another owner breaks the response; without a record, or over the limit, it goes on and its body is not kept."""
    memory = MemoryBudget(1 << 28)
    broken: list[bool] = []
    one = await begin(memory, max_bytes=2 * BATCH_BYTES, on_broken=lambda: broken.append(True))
    match meets:
        case "fenced":
            probe.change(KEY, token=FOREIGN)
        case "absent":
            probe.remove(KEY)
    one.add(b"a" * BATCH_BYTES * (3 if meets == "too large" else 1))
    await until(lambda: not one.is_storing)
    assert one.is_broken == (meets == "fenced") == bool(broken)
    assert (memory.used, await one.finish()) == (0, b"")


async def test_nothing_is_appended_once_it_is_closed(begin, store, probe):
    """Also not what waited behind an append that was under way: the settle comes next, and it drops the chunks."""
    memory = MemoryBudget(1 << 28)
    one = await begin(memory)
    one.add(b"a" * BATCH_BYTES)
    one.add(b"b" * BATCH_BYTES)
    await asyncio.sleep(0)
    one.close()
    assert (await store.mark_unknown(one._held.claim, "it broke off", PATIENCE_S)).status is SettleStatus.MARKED_UNKNOWN
    await asyncio.sleep(0.1)
    assert (memory.used, appended(probe)) == (0, [])


async def test_an_append_that_fails_in_here_is_raised_at_the_end(begin, store, monkeypatch):
    """Nobody waits for ever, and the failure is not lost."""

    async def append(*_: object) -> AppendStatus:
        raise RuntimeError("a bug")

    monkeypatch.setattr(store, "append", append)
    one = await begin()
    one.add(b"a" * (BACKLOG_BYTES + 1))
    await one.wait_room()
    assert one.is_broken
    with pytest.raises(RuntimeError, match="a bug"):
        await one.finish()


async def test_a_reader_in_this_worker_gets_what_the_store_lacks(begin, store):
    """What is on its way there, what waits for more, and what comes next; and no more of it is kept than that."""
    one, memory = await begin(), MemoryBudget(1 << 20)
    pieces = [b"a" * BATCH_BYTES, b"waits", b"comes"]
    one.add(pieces[0])
    one.add(pieces[1])
    # The first is under way.
    feed = Feed(KEY, one._held.claim.token, store, memory, 1.0)
    assert (one.chunks, feed.size) == (0, 0)
    one.tap(feed)
    one.add(pieces[2])
    assert feed.whole() == b"".join(pieces)
    await until(lambda: one.chunks == 1)
    late = Feed(KEY, one._held.claim.token, store, memory, 1.0)
    one.tap(late)
    assert (late.whole(), late.at_hand(BATCH_BYTES), late.size) == (None, b"waitscomes", sum(map(len, pieces)))
    assert await late.read(10) == pieces[0][10:]
    one.settled(SettleStatus.STORED, Settlement.STORE, b"")
    assert (late.ended, feed.ended) == (FeedEnd.COMPLETE, None)
