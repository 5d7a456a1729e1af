"""The responses that somebody in this worker reads while they come, and those that are under way here."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from oncegate.buffers.memory import MemoryBudget
from oncegate.store.store import Store
from oncegate.store.stream_head import StreamHead
from oncegate.streams.feed import Feed, FeedEnd
from oncegate.streams.pulling import Pull

# The pause between two reads of one response, and the reads of all responses together that the workers of one replica
# make: where the store tells that a response has gone on, so that each read finds something, and where it does not.
PAUSE_S, READS_PER_S, POLLS_PER_S = 0.05, 2000, 1000


# Returns the head of a response.
HeadOf = Callable[[], StreamHead]


class Source(Protocol):
    """What stores a response that comes in this worker."""

    def tap(self, feed: Feed) -> None:
        """Give a feed what the store does not have yet, and all that comes from now on."""

    def untap(self) -> None:
        """Give nothing more to a feed."""


class Running(NamedTuple):
    """A response that comes in this worker, from its head on. `source` None: it is not stored."""

    token: bytes
    head: HeadOf
    source: Source | None


class _Shared:
    """A feed with the number of its readers, and what brings its bytes from the store."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self.readers = feed, 0
        self.source: Source | None = None
        self.pull: asyncio.Task[None] | None = None

    def detach(self) -> None:
        """Let nothing bring bytes any more."""
        if self.pull is not None:
            self.pull.cancel()
        if self.source is not None:
            self.source.untap()
        self.pull = self.source = None


class Feeds:
    """The feeds of one worker, of which its replica has `workers`.

    `lease_ms`: a reader goes on for a lease and a second without the store. `running`: the responses that come here,
    by key. `head_came(key)`: called when one begins.
    """

    def __init__(self, store: Store, memory: MemoryBudget, lease_ms: int, workers: int) -> None:
        self._store, self._memory, self._silence_s = store, memory, lease_ms / 1000 + 1
        self._workers = workers
        self.head_came: Callable[[bytes], None] = lambda _: None
        self.running: dict[bytes, Running] = {}
        self._shared: dict[tuple[bytes, bytes], _Shared] = {}
        self._closed = False

    @contextmanager
    def reading(self, key: bytes, token: bytes) -> Iterator[Feed]:
        """Read the response of a claim until the end of the block. All who read it at a time share one feed."""
        name = key, token
        shared = self._shared.get(name) or self._open(key, token)
        shared.readers += 1
        try:
            yield shared.feed
        finally:
            shared.readers -= 1
            if not shared.readers:
                self._shared.pop(name, None)
                shared.detach()
                shared.feed.close()

    def _open(self, key: bytes, token: bytes) -> _Shared:
        feed = Feed(key, token, self._store, self._memory, self._silence_s)
        shared = self._shared[key, token] = _Shared(feed)
        running = self.running.get(key)
        is_here = running is not None and running.token == token
        if self._closed and is_here:
            feed.end(FeedEnd.DRAINING)
        elif running is not None and is_here:
            _connect(shared, running)
        else:
            feed.only_whole = self._closed
            pull = Pull(feed, self._store, self._silence_s)
            shared.pull = asyncio.get_running_loop().create_task(pull.run(self._pause_s))
        return shared

    def _pause_s(self, is_told: bool) -> float:
        """Return the pause between two reads of one response. `is_told`: the store tells when it has gone on.

        What is polled is read once a pause by all workers together, though each may have readers of it.
        """
        if is_told:
            return max(PAUSE_S, self._workers * len(self._shared) / READS_PER_S)
        return self._workers * max(PAUSE_S, len(self._shared) / POLLS_PER_S)

    # What exchanges say ...

    def begin(self, key: bytes, running: Running) -> None:
        """Take note of a response that comes in this worker, from its head on."""
        self.running[key] = running
        if self._shared and (shared := self._shared.get((key, running.token))) is not None and not shared.feed.size:
            shared.detach()
            _connect(shared, running)
        self.head_came(key)

    def over(self, key: bytes, token: bytes) -> None:
        """Forget a response whose exchange is over."""
        running = self.running.get(key)
        if running is not None and running.token == token:
            del self.running[key]

    def close(self) -> None:
        """Break off all readers of responses that still come, and refuse further ones. Those that the store has whole
        are read on."""
        self._closed = True
        for shared in list(self._shared.values()):
            # Nobody knows yet whether it still comes.
            shared.feed.only_whole = not shared.feed.is_known
            if shared.feed.is_known and shared.feed.response is None:
                shared.detach()
                shared.feed.end(FeedEnd.DRAINING)


def _connect(shared: _Shared, running: Running) -> None:
    """Let a feed have what comes in this worker."""
    feed, source = shared.feed, running.source
    feed.begin(running.head())
    if source is None:
        feed.end(FeedEnd.DROPPED)
    else:
        shared.source = source
        source.tap(feed)
        feed.note_current(True)
