"""Brings a feed its bytes from the store, where the exchange runs in another worker or replica.

Whatever the number of its readers, a feed that waits for news is one read of the store after each pause. Where the
store tells of each chunk, a read waits for that.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b

from oncegate.decision import CANCELLED, State
from oncegate.messages.response_head import response_digest
from oncegate.store.record import StoredResponse, ViewState
from oncegate.store.record_view import OpenKind, StoreError
from oncegate.store.results import Followed, ReadFailure
from oncegate.store.store import Store
from oncegate.store.stream_head import StreamHead, unpack_head
from oncegate.streams.cancels import READ, Note, pack_note
from oncegate.streams.feed import Feed, FeedEnd

# The owner learns that somebody reads, and writes smaller batches, for so long after each read.
READING_MS = 3000
# For the store to say why a response ended without a whole one.
TELLING_S = 0.5
# Between two reads at most, while the store tells of each chunk: what it told may have been lost.
UNTOLD_S = 0.25


class Pull:
    """Pulls the response of one feed, which ends if the store cannot be read for `silence_s`."""

    def __init__(self, feed: Feed, store: Store, silence_s: float) -> None:
        self._feed, self._store, self._silence_s = feed, store, silence_s
        self._next = 0
        # Over status, reason, fields and what of the body has come.
        self._digest: blake2b | None = None
        self._loop = asyncio.get_running_loop()
        # When the first read began that the store has not answered, None while it answers.
        self._silent_since_s: float | None = None
        self._telling: asyncio.Task[bool] | None = None
        # How the response ended where the outcome of its request is unknown, or the record cannot be read.
        self._lost = FeedEnd.BROKEN

    async def run(self, pause_s: Callable[[bool], float]) -> None:
        """Read until the response has ended, and only while a reader waits for more.

        `pause_s(is_told)`: between two reads at least, unless there is more already. `is_told`: the store tells of it.
        """
        feed, news = self._feed, asyncio.Event()
        stop: Callable[[], None] | None = None
        try:
            while feed.ended is None:
                await feed.wanted()
                news.clear()
                began_s = self._loop.time()
                found = await self._read(began_s)
                if found is ReadFailure.INCOMPLETE or (isinstance(found, Followed) and found.state is State.UNKNOWN):
                    # Before anybody is told of what was found.
                    self._lost = await self._why_lost()
                if self._take(found) or feed.ended is not None:
                    continue
                if stop is None and self._silent_since_s is None:
                    stop = self._store.wakes.watch(feed.key, news.set)
                    # The record says so, too, but the owner reads it with its next chunk alone. A reader that waits
                    # otherwise until there is a head ends this meanwhile: it needs the note as well.
                    note = pack_note(Note(READ, feed.key, feed.token))
                    self._telling = self._loop.create_task(self._store.post(feed.token, note))
                await self._rest(began_s, pause_s, news)
        except Exception:
            # Readers must not wait for ever.
            feed.end(FeedEnd.BROKEN)
            raise
        finally:
            if stop is not None:
                stop()

    async def _rest(self, began_s: float, pause_s: Callable[[bool], float], news: asyncio.Event) -> None:
        """Wait after a read that began at `began_s` (the loop's time): for a pause, and for news where they come.

        Before the head nobody says anything: the owner hears of readers with its first append.
        """
        is_told = self._feed.head is not None and self._store.wakes.is_live(self._feed.key)
        if is_told:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(began_s + UNTOLD_S):
                    await news.wait()
        await asyncio.sleep(max(0.0, began_s + pause_s(is_told) - self._loop.time()))

    async def _read(self, began_s: float) -> Followed | ReadFailure:
        """Read the record once, for as long as the store may be silent at most."""
        if self._silent_since_s is None:
            self._silent_since_s = began_s
        try:
            async with asyncio.timeout_at(self._silent_since_s + self._silence_s):
                return await self._store.follow(self._feed.key, self._feed.token, self._next, READING_MS)
        except TimeoutError:
            return ReadFailure.UNCONFIRMED

    def _take(self, found: Followed | ReadFailure) -> bool:
        """Take what a read found; return whether more is there already."""
        feed = self._feed
        if isinstance(found, ReadFailure):
            self._fail(found)
            return False
        self._silent_since_s = None
        feed.replaced, feed.response = found.replaced, found.response
        if feed.head is None:
            head = unpack_head(found.head) if found.head else _head_of(found.response)
            if head is not None:
                self._digest = response_digest(head.status, head.reason, head.block)
            feed.begin(head)
            if head is not None and self._next:
                # Nobody gets a byte before the head, so that what came before it was not taken.
                self._next = 0
                return True
        self._publish(found.chunks)
        has_more = self._next < found.count
        feed.note_current(not has_more)
        if not has_more or found.state is not State.COMPLETE:
            self._end(found)
        return has_more

    def _publish(self, chunks: list[bytes]) -> None:
        feed = self._feed
        if self._digest is not None:
            feed.note_chunks(self._next, feed.size, chunks)
            for chunk in chunks:
                self._digest.update(chunk)
                feed.stored(feed.size + len(chunk))
                feed.publish(chunk)
        self._next += len(chunks)

    def _fail(self, failure: ReadFailure) -> None:
        if failure is not ReadFailure.UNCONFIRMED:
            self._feed.end(FeedEnd.GONE if failure is ReadFailure.GONE else self._lost)
        elif self._silent_since_s is not None and self._loop.time() >= self._silent_since_s + self._silence_s:
            self._feed.end(FeedEnd.UNREACHABLE)

    def _end(self, found: Followed) -> None:
        """End the feed where the record says that nothing more comes."""
        feed, response = self._feed, found.response
        if found.state is State.COMPLETE and response is not None:
            if not response.body_stored:
                feed.end(FeedEnd.DROPPED)
            elif self._is_whole(response):
                feed.complete(response.trailers)
            else:
                feed.end(FeedEnd.CORRUPT)
        elif found.state is State.EXPIRED:
            feed.end(FeedEnd.GONE)
        elif found.state is not State.IN_FLIGHT:
            feed.end(self._lost)
        elif found.dropped:
            feed.end(FeedEnd.DROPPED)
        elif feed.only_whole:
            feed.end(FeedEnd.DRAINING)

    async def _why_lost(self) -> FeedEnd:
        """Return how a response ended whose record says that the outcome is unknown, or cannot be read."""
        try:
            async with asyncio.timeout(TELLING_S):
                view = await self._store.records.read(self._feed.key)
        except (TimeoutError, StoreError):
            return FeedEnd.BROKEN
        if view is None or view.token != self._feed.token or view.state is ViewState.IN_FLIGHT:
            # In flight: a failover lost a part of it.
            return FeedEnd.GONE
        if view.state is not ViewState.UNKNOWN:
            return FeedEnd.CORRUPT
        if view.open_kind is OpenKind.LAPSED:
            return FeedEnd.ABANDONED
        return FeedEnd.STOPPED if view.mode == CANCELLED else FeedEnd.BROKEN

    def _is_whole(self, response: StoredResponse) -> bool:
        """Return whether what has come is the whole response, as its digest says."""
        if self._digest is None or self._feed.size != response.size:
            return False
        self._digest.update(response.trailers)
        return self._digest.digest() == response.digest


def _head_of(response: StoredResponse | None) -> StreamHead | None:
    """Return the head of a complete response."""
    if response is None:
        return None
    # Its length is known by now.
    return StreamHead(
        response.status, response.reason, response.block, response.size, response.stated_length,
        response.close_delimited, response.age_s,
    )  # fmt: skip
