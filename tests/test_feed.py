"""A feed: what its readers get from memory and from the store, what it costs, and how it ends."""

import asyncio
import random
from collections.abc import Callable

import pytest

from oncegate.buffers.memory import MemoryBudget
from oncegate.decision import CANCELLED, HOLD, State
from oncegate.messages.response_head import response_digest
from oncegate.store.postgres.marks import NoWakes
from oncegate.store.record import StoredResponse, ViewState
from oncegate.store.record_view import RecordView, StoreError
from oncegate.store.results import Followed, ReadFailure
from oncegate.store.stream_head import StreamHead, pack_head
from oncegate.streams.cancels import READ, Note, unpack_note
from oncegate.streams.feed import READ_BYTES, WINDOW_BYTES, Feed, FeedEnd
from oncegate.streams.feeds import Feeds, Running
from oncegate.streams.followers import Followers
from tests.parts import until

KEY, TOKEN = b"k" * 24, b"t" * 16
HEAD = StreamHead(200, b"OK", b"Content-Type: text/event-stream\r\n", None, False, False, 0)
LEASE_MS = 200


class Tells:
    """Wakes of a store that tells; `told` is called before each, and loses the wake-up where it returns False."""

    def __init__(self, told: Callable[[], bool] = lambda: True) -> None:
        self._told, self.watchers = told, list[Callable[[], None]]()

    def watch(self, _key: bytes, wake: Callable[[], None]) -> Callable[[], None]:
        self.watchers.append(wake)
        return lambda: self.watchers.remove(wake)

    def is_live(self, _key: bytes) -> bool:
        return bool(self.watchers)

    def tell(self) -> None:
        for wake in self.watchers if self._told() else ():
            wake()


class Records:
    """A store with the record of one response, which a test writes; `reads` are the indexes that were asked for.

    `has_head`: the owner gives one while the response comes.
    """

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.state, self.response, self.token = State.IN_FLIGHT, None, TOKEN
        self.is_down, self.dropped, self.reads = False, False, list[int]()
        self.has_head = True
        self.wakes: NoWakes | Tells = NoWakes()
        self.posted: list[tuple[bytes, Note | None]] = []
        # What operators see, of a response that is lost.
        self.records, self.mode, self.lapsed_ms = self, HOLD, 0

    async def follow(self, _: bytes, token: bytes, first: int, reading_ms: int = 0) -> Followed | ReadFailure:
        self.reads.append(first)
        await asyncio.sleep(0)
        if self.is_down:
            return ReadFailure.UNCONFIRMED
        if token != self.token:
            return ReadFailure.GONE
        size, chunks = 0, []
        for chunk in self.chunks[first:]:
            if chunks and size + len(chunk) > WINDOW_BYTES:
                break
            size += len(chunk)
            chunks.append(chunk)
        has_head = self.has_head and self.chunks and not first and self.state is State.IN_FLIGHT
        head = pack_head(HEAD) if has_head else b""
        return Followed(self.state, head, chunks, len(self.chunks), self.response, False, 100, dropped=self.dropped)

    async def post(self, token: bytes, note: bytes) -> bool:
        await asyncio.sleep(0)
        self.posted.append((token, unpack_note(note)))
        return True

    async def read(self, key: bytes) -> RecordView | None:
        if self.is_down:
            raise StoreError
        return RecordView(key, ViewState.UNKNOWN, self.token, 100, mode=self.mode, lapsed_ms=self.lapsed_ms)

    def tell(self) -> None:
        if isinstance(self.wakes, Tells):
            self.wakes.tell()

    def complete(self) -> None:
        """Settle the response as it is."""
        body = b"".join(self.chunks)
        digest = response_digest(HEAD.status, HEAD.reason, HEAD.block)
        digest.update(body)
        self.state = State.COMPLETE
        self.response = StoredResponse(
            200, b"OK", HEAD.block, digest.digest(), len(self.chunks), len(body), True, False, False, 1, 1, 0
        )


class Source:
    """An exchange in this worker, as far as it feeds readers."""

    def __init__(self, stored: int = 0, rest: bytes = b"") -> None:
        self.stored, self.rest, self.feed = stored, rest, None

    def tap(self, feed: Feed) -> None:
        self.feed = feed
        feed.start_behind(self.stored)
        feed.publish(self.rest)

    def untap(self) -> None:
        self.feed = None


@pytest.fixture
def records() -> Records:
    return Records()


@pytest.fixture
def memory() -> MemoryBudget:
    return MemoryBudget(1 << 24)


@pytest.fixture
async def feeds(records: Records, memory: MemoryBudget) -> Feeds:
    return Feeds(records, memory, LEASE_MS, 1)  # type: ignore[arg-type]


async def read_all(feed: Feed, offset: int = 0) -> bytes:
    """Return what a reader gets from an offset to the end."""
    came = b""
    while True:
        async with asyncio.timeout(10):
            await feed.beyond(offset)
        if offset == feed.size:
            return came
        data = await feed.read(offset)
        if data is None:
            return came
        came += data
        offset += len(data)


def cut(body: bytes, random_: random.Random, most: int) -> list[bytes]:
    """Cut a body in pieces of random sizes."""
    pieces = []
    while body:
        size = random_.randint(1, most)
        pieces.append(body[:size])
        body = body[size:]
    return pieces


@pytest.mark.parametrize("seed", range(20))
async def test_every_reader_gets_every_byte_once(feeds, records, memory, seed):
    """Readers that join anywhere, from any offset, fast and slow, in the exchange's worker: the same bytes."""
    draw = random.Random(seed)
    body = draw.randbytes(draw.choice([10, 5_000, 900_000]))
    pieces, stored, size = cut(body, draw, max(1, len(body) // 7)), 0, 0
    source, got = Source(), []

    async def reader(offset: int, pause_s: float) -> tuple[int, bytes]:
        await asyncio.sleep(pause_s)
        with feeds.reading(KEY, TOKEN) as feed:
            return offset, await read_all(feed, offset)

    feeds.begin(KEY, Running(TOKEN, lambda: HEAD, source))
    for piece in pieces:
        size += len(piece)
        if source.feed is not None:
            source.feed.publish(piece)
        else:
            source.rest += piece
        if draw.random() < 0.5:
            # Into the store goes all that came, in chunks that have other ends.
            records.chunks += cut(body[stored:size], draw, 200_000)
            stored, source.stored, source.rest = size, size, b""
            if source.feed is not None:
                source.feed.stored(stored)
        got.append(asyncio.ensure_future(reader(draw.randint(0, size), draw.random() / 500)))
        await asyncio.sleep(draw.random() / 250)
    records.chunks += [body[stored:]] if stored < len(body) else []
    records.complete()
    if source.feed is not None:
        source.feed.complete()
    feeds.over(KEY, TOKEN)
    for offset, came in await asyncio.gather(*got):
        assert came == body[offset:]
    assert memory.used == 0


@pytest.mark.parametrize("wakes", ["none", "all", "half", "lost"])
@pytest.mark.parametrize("seed", range(5))
async def test_a_feed_from_the_store_is_the_same(feeds, records, memory, seed, wakes):
    """The same, of a response that comes in another process, whether the store tells of it, or half of it is lost."""
    draw = random.Random(seed)
    if wakes != "none":
        records.wakes = Tells({"all": lambda: True, "half": lambda: draw.random() < 0.5, "lost": lambda: False}[wakes])
    body = draw.randbytes(draw.choice([10, 5_000, 900_000]))

    async def reader(pause_s: float) -> tuple[bytes, FeedEnd | None]:
        await asyncio.sleep(pause_s)
        with feeds.reading(KEY, TOKEN) as feed:
            return await read_all(feed), feed.ended

    got = [asyncio.ensure_future(reader(draw.random() / 5)) for _ in range(5)]
    for chunk in cut(body, draw, max(1, min(200_000, len(body) // 5))):
        records.chunks.append(chunk)
        records.tell()
        await asyncio.sleep(draw.random() / 20)
    records.complete()
    records.tell()
    assert await asyncio.gather(*got) == [(body, FeedEnd.COMPLETE)] * 5
    assert memory.used == 0
    assert isinstance(records.wakes, NoWakes) or records.wakes.watchers == []


async def test_where_the_store_tells_it_is_hardly_asked(feeds, records):
    """In silence a few times a second, and at once when it tells of more; never twice within a pause."""
    records.wakes, loop = Tells(), asyncio.get_running_loop()
    records.chunks.append(b"first")
    with feeds.reading(KEY, TOKEN) as feed:
        reading = asyncio.ensure_future(read_all(feed))
        await asyncio.sleep(1)
        assert 2 <= len(records.reads) <= 6
        asked, told_s = len(records.reads), loop.time()
        records.chunks.append(b", second")
        for _ in range(20):
            records.tell()
        async with asyncio.timeout(10):
            await feed.beyond(5)
        # A pause at most, and not the one of silence; a busy machine takes its time.
        assert len(records.reads) <= asked + 1 + (loop.time() - told_s) / 0.05
        records.complete()
        records.tell()
        assert await reading == b"first, second"
    assert records.wakes.watchers == []


async def test_a_head_that_comes_with_the_end_has_all_behind_it(feeds, records, memory):
    """A body that may still free its key has no head while it comes. Once it is stored, its readers get all of it."""
    records.has_head = False
    records.chunks += [b"first ", b"x" * WINDOW_BYTES, b" second "]
    with feeds.reading(KEY, TOKEN) as feed:
        reader = asyncio.ensure_future(read_all(feed))
        await until(lambda: 3 in records.reads)
        records.chunks.append(b"last")
        records.complete()
        assert await reader == b"".join(records.chunks)
        assert feed.ended is FeedEnd.COMPLETE
    assert memory.used == 0


async def test_a_complete_record_is_not_watched(feeds, records):
    """A connection for it would be for nothing."""
    records.wakes = Tells()
    records.wakes.watch = None  # type: ignore[method-assign, assignment]
    records.chunks.append(b"all")
    records.complete()
    with feeds.reading(KEY, TOKEN) as feed:
        assert await read_all(feed) == b"all"
    assert records.posted == []


async def test_a_thousand_readers_are_one_read_a_pause(feeds, records):
    """However many readers wait for news of one response, the store is asked once for all of them."""
    records.chunks.append(b"first")

    async def reader() -> bytes:
        with feeds.reading(KEY, TOKEN) as feed:
            return await read_all(feed)

    loop = asyncio.get_running_loop()
    began_s, got = loop.time(), [asyncio.ensure_future(reader()) for _ in range(1000)]
    for number in range(5):
        await asyncio.sleep(0.06)
        records.chunks.append(b"%d" % number)
    records.complete()
    assert set(await asyncio.gather(*got)) == {b"first01234"}
    # Its owner is told once that it is read.
    assert records.posted == [(TOKEN, Note(READ, KEY, TOKEN))]
    # Each look that finds something is followed by a pause, too.
    assert len(records.reads) <= (loop.time() - began_s) / 0.05 + 2


async def test_a_slow_reader_costs_its_window_alone(feeds, records, memory):
    """What the store has leaves the memory, whoever has not read it yet; the slow reader gets it from the store."""
    source = Source()
    feeds.begin(KEY, Running(TOKEN, lambda: HEAD, source))
    with feeds.reading(KEY, TOKEN) as feed:
        for number in range(40):
            piece = bytes([number]) * 50_000
            feed.publish(piece)
            records.chunks.append(piece)
            feed.stored(feed.size)
            assert memory.used <= WINDOW_BYTES
        records.complete()
        feed.complete()
        assert await read_all(feed) == b"".join(records.chunks)
    assert memory.used == 0


async def test_what_the_store_lacks_stays_in_memory(feeds, memory):
    """However much that is: a reader finds it nowhere else. Once the store has it, the window alone is kept."""
    feeds.begin(KEY, Running(TOKEN, lambda: HEAD, Source()))
    with feeds.reading(KEY, TOKEN) as feed:
        for number in range(10):
            feed.publish(bytes([number]) * 60_000)
        assert await feed.read(0) == bytes(60_000) + b"\x01" * (READ_BYTES - 60_000)
        assert memory.used == 600_000
        feed.stored(600_000)
        assert (memory.used, feed.at_hand(0)) == (WINDOW_BYTES, b"")


def _broken(records: Records, feed: Feed) -> None:
    records.state = State.UNKNOWN


def _stopped(records: Records, feed: Feed) -> None:
    records.state, records.mode = State.UNKNOWN, CANCELLED


def _abandoned(records: Records, feed: Feed) -> None:
    records.state, records.lapsed_ms = State.UNKNOWN, 1


def _untold(records: Records, feed: Feed) -> None:
    """The store does not say why."""
    records.state, records.records = State.UNKNOWN, Records()
    records.records.is_down = True


def _taken_over_since(records: Records, feed: Feed) -> None:
    records.state, records.records = State.UNKNOWN, Records()
    records.records.token = b"u" * 16


def _taken_over(records: Records, feed: Feed) -> None:
    records.token, records.chunks = b"u" * 16, [b"another execution"]


def _dropped(records: Records, feed: Feed) -> None:
    records.dropped = True


def _down(records: Records, feed: Feed) -> None:
    records.is_down = True


def _expired(records: Records, feed: Feed) -> None:
    records.state = State.EXPIRED


def _altered(records: Records, feed: Feed) -> None:
    records.complete()
    records.chunks.append(b"!")
    assert records.response is not None
    records.response.chunks, records.response.size = 2, records.response.size + 1


@pytest.mark.parametrize(
    ("what", "how"),
    [
        (_broken, FeedEnd.BROKEN),
        (_untold, FeedEnd.BROKEN),
        (_stopped, FeedEnd.STOPPED),
        (_abandoned, FeedEnd.ABANDONED),
        (_taken_over_since, FeedEnd.GONE),
        (_taken_over, FeedEnd.GONE),
        (_dropped, FeedEnd.DROPPED),
        (_down, FeedEnd.UNREACHABLE),
        (_expired, FeedEnd.GONE),
        (_altered, FeedEnd.CORRUPT),
    ],
)
async def test_what_is_not_whole_has_no_clean_end(feeds, records, what: Callable[[Records, Feed], None], how: FeedEnd):
    """Whatever becomes of a record but a whole response breaks its readers off, and gives them no further byte."""
    records.chunks.append(b"first")
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(0)
        cut_off = []
        feed.on_broken.add(lambda: cut_off.append(True))
        what(records, feed)
        async with asyncio.timeout(5):
            await feed.beyond(feed.size if how is not FeedEnd.CORRUPT else 6)
        assert feed.ended is how
        assert feed.is_lost
        assert cut_off == [True]
        assert await feed.read(0) == b"first" or what is _altered


async def test_the_owner_hears_of_a_reader_that_waits_for_the_head_otherwise(feeds, records):
    """Such as a duplicate that joins as soon as there is one: it leaves the feed, and the note goes out."""
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(-1)
        assert feed.head is None
    await until(lambda: records.posted == [(TOKEN, Note(READ, KEY, TOKEN))])


async def test_a_store_that_never_answers_ends_the_wait_for_a_head(feeds, records, monkeypatch):
    """Also where a single read hangs for longer than a reader may wait, and with nothing told to a silent store."""
    monkeypatch.setattr(records, "follow", lambda *_: asyncio.sleep(60))
    monkeypatch.setattr(feeds, "_silence_s", 0.2)
    with feeds.reading(KEY, TOKEN) as feed:
        async with asyncio.timeout(5):
            await feed.beyond(-1)
        assert feed.ended is FeedEnd.UNREACHABLE
    assert records.posted == []


async def test_a_reader_that_was_slow_outlasts_a_failed_read(feeds, records, monkeypatch):
    """The store is silent from the first read on that it does not answer, not since somebody last had to ask it."""
    records.chunks.append(b"first")
    monkeypatch.setattr(feeds, "_silence_s", 0.5)
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(0)
        # Nobody asks for more meanwhile.
        await asyncio.sleep(0.7)
        records.is_down = True
        waiting = asyncio.ensure_future(feed.beyond(feed.size))
        asked = len(records.reads)
        await until(lambda: len(records.reads) > asked)
        records.is_down = False
        records.chunks.append(b"second")
        async with asyncio.timeout(5):
            await waiting
        assert (feed.ended, feed.size) == (None, 11)


async def test_a_failure_leaves_nobody_waiting(feeds, records, monkeypatch):
    """Whatever fails while a response is pulled breaks its readers off."""
    records.chunks.append(b"first")
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(0)

        async def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(records, "follow", fail)
        pull = feeds._shared[KEY, TOKEN].pull
        async with asyncio.timeout(5):
            await feed.beyond(feed.size)
            with pytest.raises(ZeroDivisionError):
                await pull
        assert feed.ended is FeedEnd.BROKEN


async def test_a_drain_breaks_readers_off(feeds, records):
    """Nobody reads on once the worker stops, and nobody begins."""
    records.chunks.append(b"first")
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(0)
        feeds.close()
        assert feed.ended is FeedEnd.DRAINING
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(-1)
        assert feed.ended is FeedEnd.DRAINING
    feeds.begin(KEY, Running(TOKEN, lambda: HEAD, Source()))
    with feeds.reading(KEY, TOKEN) as feed:
        assert feed.ended is FeedEnd.DRAINING


async def test_what_the_store_has_whole_is_read_through_a_drain(feeds, records):
    """By who reads it already, or has just come, and by who comes then."""
    records.chunks += [bytes([number]) * 200_000 for number in range(4)]
    records.complete()
    with feeds.reading(KEY, TOKEN) as feed:
        feeds.close()
        assert await read_all(feed) == b"".join(records.chunks)
    feeds._closed = False
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(0)
        feeds.close()
        assert await read_all(feed) == b"".join(records.chunks)
    with feeds.reading(KEY, TOKEN) as feed:
        assert await read_all(feed) == b"".join(records.chunks)
        assert feed.ended is FeedEnd.COMPLETE


def test_how_often_a_response_is_read(feeds):
    """Every 50 ms at most, and less often where a worker reads very many. What is polled is read so often by a whole
    replica."""
    for workers, streams, told_s, polled_s in (
        (1, 1, 0.05, 0.05),
        (1, 50, 0.05, 0.05),
        (1, 200, 0.1, 0.2),
        (4, 1, 0.05, 0.2),
        (4, 25, 0.05, 0.2),
        (4, 50, 0.1, 0.2),
    ):
        feeds._workers, feeds._shared = workers, dict.fromkeys(range(streams))
        assert (feeds._pause_s(True), feeds._pause_s(False)) == pytest.approx((told_s, polled_s))
    feeds._shared = {}


async def test_a_response_that_begins_here_needs_no_store(feeds, records):
    """A reader that came before the head gets it from the exchange, once that begins in this worker."""
    with feeds.reading(KEY, TOKEN) as feed:
        await feed.beyond(-1)
        assert feed.head is None
        source = Source()
        feeds.begin(KEY, Running(TOKEN, lambda: HEAD, source))
        assert (feed.head, source.feed) == (HEAD, feed)
        reads = len(records.reads)
        await asyncio.sleep(0.12)
        assert len(records.reads) == reads
    assert source.feed is None


async def test_one_tenant_has_a_quarter_of_the_places():
    """Others still find a place, up to the limit."""
    followers = Followers(6)
    places = [followers.following(tenant) for tenant in (b"a", b"a", b"b", b"b", b"c")]
    for place in places:
        place.__enter__()
    assert [followers.has_room(tenant) for tenant in (b"a", b"b", b"c", b"d")] == [False, False, True, True]
    with followers.following(b"d"):
        assert (len(followers), followers.has_room(b"e")) == (6, False)
    for place in places:
        place.__exit__(None, None, None)
    assert (len(followers), followers.has_room(b"a")) == (0, True)
    assert not Followers(0).has_room(b"a")
