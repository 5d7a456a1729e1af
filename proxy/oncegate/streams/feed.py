"""One response as far as it has come, for everybody in this worker who reads it.

The bytes come from the exchange itself where it runs in this worker, else from the store (`pulling.py`). The newest of
them are kept in memory. A reader that is further behind gets its bytes from the store, so that it costs its exchange
nothing. A feed says COMPLETE only of a response that the store has as complete: nothing else may end cleanly.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable
from enum import Enum

from oncegate.buffers.memory import MemoryBudget
from oncegate.store.record import StoredResponse
from oncegate.store.results import Followed, ReadFailure
from oncegate.store.store import Store
from oncegate.store.stream_head import StreamHead

# The newest bytes of a response, for readers that keep up. Those that the store does not have yet stay beside them.
WINDOW_BYTES = 262144
# What one read returns at most from memory. From the store it is about 256 KiB.
READ_BYTES = 65536
# No response has so many chunks: a read from there brings none.
FAR = 1_000_000_000
# Between two tries to reach a store that did not answer.
AGAIN_S = 0.2


# Takes bytes, and returns whether it takes the next ones, too.
Take = Callable[[bytes], bool]


class FeedEnd(Enum):
    """How a feed ended. `label` says it to operators, as the reason why a reader was broken off."""

    COMPLETE = "the store has the whole response"
    # The exchange ended otherwise.
    BROKEN = "the request that it read from ended without a whole response"
    STOPPED = "somebody stopped the request that it read from"
    ABANDONED = "the proxy that had the request is gone, or paused: its lease is over"
    UNSTORED = "the store did not confirm the response in time"
    # The exchange goes on.
    DROPPED = "the response is no longer stored: it grew too large, or the store did not take it"
    GONE = "the record is gone, or the key has another claim"
    CORRUPT = "the record is damaged, or lacks a part of the response"
    UNREACHABLE = "the store could not be read for too long"
    DRAINING = "this worker stops or is replaced"

    def __init__(self, label: str) -> None:
        self.label = label


# How a feed seems to end to a reader for whom a read from the store brought nothing.
_UNREAD = {ReadFailure.UNCONFIRMED: FeedEnd.UNREACHABLE, ReadFailure.INCOMPLETE: FeedEnd.CORRUPT}


class Feed:
    """The response of one claim, named by `key` and `token`.

    `head`: None until there is one. `is_known`: somebody has looked for it. `size`: the bytes that a reader can have
    now, and `is_current`: they are all that the store has. `response`, `trailers`: of a complete one. `replaced`: the
    claim replaced another one, so that ids of events may be another execution's. `silence_s`: for how long the store
    may fail to answer. `only_whole`: it ends unless the store has the whole response. `on_broken`: is called if the
    feed ends without a whole response, for readers that are in the middle of a write.
    """

    def __init__(self, key: bytes, token: bytes, store: Store, memory: MemoryBudget, silence_s: float) -> None:
        self.key, self.token = key, token
        self._store, self._memory, self._silence_s = store, memory, silence_s
        self._loop = asyncio.get_running_loop()
        self.head: StreamHead | None = None
        self.is_known = False
        self.size = 0
        self.ended: FeedEnd | None = None
        self.trailers = b""
        self.replaced = False
        self.response: StoredResponse | None = None
        self.is_current = self.only_whole = False
        # Why the last read from the store brought nothing.
        self._unread = FeedEnd.GONE
        # The newest bytes, from `_start` on; the store has those before `_stored`.
        self._window, self._start, self._stored = bytearray(), 0, 0
        # What came last, for the readers that keep up.
        self._last = b""
        # Where the chunks in the store end, from the first on, as far as they are known.
        self._ends: list[int] = []
        self._reads: dict[int, asyncio.Task[Followed | ReadFailure]] = {}
        # The readers that have all there is: what wakes each, and what takes the next bytes instead.
        self._waiting: dict[asyncio.Future[None], Take | None] = {}
        self.on_broken: set[Callable[[], None]] = set()
        self._wanted = asyncio.Event()

    # What readers do ...

    def has_beyond(self, offset: int) -> bool:
        """Return whether `beyond` would return at once."""
        return self.ended is not None or (self.size > offset if offset >= 0 else self.is_known)

    async def beyond(self, offset: int) -> None:
        """Wait for a byte behind `offset`, or for the end. Negative: until it is known whether there is a head."""
        while not self.has_beyond(offset):
            await self.wait(self._loop.create_future())

    async def wait(self, news: "asyncio.Future[None]", take: "Take | None" = None) -> None:
        """Wait until anything of this has changed, or until `news` is done otherwise.

        `take`: is given the next bytes as they come, without waking anybody, as long as it returns True.
        """
        self._waiting[news] = take
        self._wanted.set()
        try:
            await news
        finally:
            self._waiting.pop(news, None)

    async def wanted(self) -> None:
        """Wait until a reader has all there is and waits for more."""
        while not self._waiting:
            self._wanted.clear()
            await self._wanted.wait()

    def at_hand(self, offset: int) -> bytes:
        """Return bytes from `offset` on that are in memory, at most 64 KiB; nothing if they are elsewhere."""
        if offset == self.size - len(self._last):
            return self._last
        begin = offset - self._start
        return bytes(self._window[begin : begin + READ_BYTES]) if begin >= 0 else b""

    def whole(self) -> bytes | None:
        """Return all that has come, None if a part of it is no longer in memory."""
        return bytes(self._window) if self._start == 0 else None

    async def read(self, offset: int) -> bytes | None:
        """Return bytes from `offset` on, which is below `size`: 256 KiB at most. None: they cannot be read."""
        return self.at_hand(offset) or await self._read_stored(offset)

    async def replaces_another(self) -> bool | None:
        """Return whether its claim replaced another one, whose events may have had the same ids; None: not known."""
        found = await self._read_from(FAR)
        return None if isinstance(found, ReadFailure) else found.replaced

    async def _read_stored(self, offset: int) -> bytes | None:
        index = bisect_right(self._ends, offset)
        while offset < self.size:
            begin = self._ends[index - 1] if index else 0
            found = await self._read_from(index)
            if isinstance(found, ReadFailure) or not found.chunks:
                self._unread = _UNREAD.get(found, FeedEnd.GONE) if isinstance(found, ReadFailure) else FeedEnd.GONE
                return None
            ends = self.note_chunks(index, begin, found.chunks)
            if offset < ends[-1]:
                return b"".join(found.chunks)[offset - begin :]
            index += len(found.chunks)
        return None

    def note_chunks(self, index: int, begin: int, chunks: list[bytes]) -> list[int]:
        """Note where these chunks in the store end, the first of which has this index and begins there."""
        ends = []
        for chunk in chunks:
            begin += len(chunk)
            ends.append(begin)
        if index <= len(self._ends) < index + len(ends):
            self._ends[index:] = ends
        return ends

    async def _read_from(self, index: int) -> Followed | ReadFailure:
        """Read chunks from the store, once for all who ask for them at the same time."""
        if (task := self._reads.get(index)) is None:
            task = self._reads[index] = self._loop.create_task(self._retry_read(index))
            task.add_done_callback(lambda _: self._reads.pop(index, None))
        return await asyncio.shield(task)

    async def _retry_read(self, index: int) -> Followed | ReadFailure:
        deadline_s = self._loop.time() + self._silence_s
        while True:
            found = await self._store.follow(self.key, self.token, index)
            if found is not ReadFailure.UNCONFIRMED or self._loop.time() > deadline_s or self.is_lost:
                return found
            await asyncio.sleep(AGAIN_S)

    @property
    def is_lost(self) -> bool:
        """Whether no reader may get a clean end."""
        return self.ended not in (None, FeedEnd.COMPLETE)

    @property
    def why_lost(self) -> FeedEnd:
        """Why a reader does not get the rest: the feed is lost, or a read brought nothing."""
        return self.ended if self.ended is not None and self.is_lost else self._unread

    # What brings the bytes ...

    def note_current(self, is_current: bool) -> None:
        """Take note whether this has all that the store has."""
        if is_current and not self.is_current:
            self._wake_all()
        self.is_current = is_current

    def begin(self, head: StreamHead | None) -> None:
        """Take the head, or take note that there is none yet."""
        self.head, self.is_known = head, True
        self._wake_all()

    def publish(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        if self.ended is not None:
            return
        size = len(data)
        self.size += size
        self._window += data
        self._last = data
        self._memory.used += size
        if len(self._window) > WINDOW_BYTES:
            self._trim()
        for news, take in list(self._waiting.items()):
            try:
                if take is None or not take(data):
                    self._wake(news)
            except Exception as error:
                # It is that reader's alone.
                self._waiting.pop(news)
                if not news.done():
                    news.set_exception(error)

    def stored(self, size: int) -> None:
        """Take note that the store has so many bytes from the beginning on."""
        self._stored = size
        if len(self._window) > WINDOW_BYTES:
            self._trim()

    def _trim(self) -> None:
        surplus = min(len(self._window) - WINDOW_BYTES, self._stored - self._start)
        if surplus > 0:
            del self._window[:surplus]
            self._start += surplus
            self._memory.give(surplus)

    def start_behind(self, size: int) -> None:
        """Begin behind so many bytes, which the store has."""
        self.size = self._start = self._stored = size

    def complete(self, trailers: bytes = b"") -> None:
        """End: the store has the whole response."""
        if self.ended is None:
            self.trailers, self._stored = trailers, self.size
            self.end(FeedEnd.COMPLETE)

    def end(self, how: FeedEnd) -> None:
        """End, unless it has ended."""
        if self.ended is None:
            self.ended = how
            self._wake_all()
            if self.is_lost:
                for break_off in list(self.on_broken):
                    break_off()

    def _wake_all(self) -> None:
        for news in list(self._waiting):
            self._wake(news)

    def _wake(self, news: "asyncio.Future[None]") -> None:
        self._waiting.pop(news, None)
        if not news.done():
            news.set_result(None)

    def close(self) -> None:
        """Give the memory back: nobody reads any more."""
        self._memory.give(len(self._window))
        self._window, self._last, self._start = bytearray(), b"", self.size
