"""Stores a response while it streams past: batches to the store, a running digest, a size limit."""

import asyncio
from collections.abc import Callable
from hashlib import blake2b

from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.ticker import Ticker
from oncegate.decision import Settlement
from oncegate.store.leases import LeasedClaim, do_nothing
from oncegate.store.results import AppendStatus, RenewStatus, SettleStatus
from oncegate.store.stages import DROPPED
from oncegate.store.store import Store
from oncegate.store.stream_head import StreamHead, pack_head
from oncegate.streams.feed import Feed, FeedEnd

# A batch goes to the store once it has so many bytes, or so long after its first; sooner where memory is short.
BATCH_BYTES, BATCH_S = 65536, 1.0
TIGHT_BATCH_BYTES, TIGHT_BATCH_S = 16384, 0.05
# The most that goes to the store at once: more than a batch has come while the one before was on its way.
CHUNK_BYTES = 262144
# Bytes that the store has not confirmed, above which the exchange waits; the second where memory is short.
BACKLOG_BYTES, TIGHT_BACKLOG_BYTES = 2 * CHUNK_BYTES, BATCH_BYTES
# After these the response is stored without its body: the store has no memory, or the record vanished or lacks chunks.
# After any other append that did not succeed the key has another owner, or nothing was confirmed in time.
_DROPS = (AppendStatus.NO_MEMORY, AppendStatus.INCOMPLETE, AppendStatus.ABSENT)


class Recording:
    """The stored side of one response. `size` and `chunks` count what was added, in bytes and batches.

    `is_storing`: nothing has ended it. `is_broken`: the response must not end as a complete one, because the store has
    less of it than the client would, or the key has another owner; `on_broken` is called then. `batch_s`: how
    long bytes wait for more before they go to the store, unless somebody elsewhere reads them from there.
    """

    batch_s = BATCH_S

    def __init__(
        self,
        store: Store,
        held: LeasedClaim,
        digest: blake2b,
        *,
        max_bytes: int,
        settle_timeout_s: float,
        memory: MemoryBudget,
        ticker: Ticker,
        on_broken: Callable[[], None] = do_nothing,
        shown: Callable[[], StreamHead] | None = None,
    ) -> None:
        self._store, self._held, self._max_bytes = store, held, max_bytes
        self._settle_timeout_s, self._memory, self._digest = settle_timeout_s, memory, digest
        self._shown = shown
        self._feed: Feed | None = None
        self._loop = asyncio.get_running_loop()
        # What waits for the next append, and how many bytes that is; and with what is on its way.
        self._batch: list[bytes] = []
        self._batch_bytes = self._unconfirmed = 0
        # What is on its way to the store, or goes there with the settle.
        self._taken = b""
        # Either the tick of the timer for what waits (0 for none), or an append that is under way.
        self._ticker, self._tick = ticker, 0
        self._writer: asyncio.Task[None] | None = None
        # Done when there may be room again.
        self._room: asyncio.Future[None] | None = None
        self.size = self.chunks = 0
        self.is_storing, self.is_broken = True, False
        self._telling: asyncio.Task[RenewStatus] | None = None
        self._on_broken = on_broken
        # When something was last appended that is read elsewhere (the loop's time).
        self._appended_s = 0.0
        held.on_fenced, held.on_read = self._break, self._hurry

    def add(self, data: bytes) -> bool:
        """Take the next bytes of the body; return whether more may be added at once."""
        size = len(data)
        self.size += size
        if not self.is_storing:
            return not self.is_broken
        if self.size > self._max_bytes:
            self._drop()
            return True
        if self._feed is not None:
            self._feed.publish(data)
        self._batch.append(data)
        self._batch_bytes += size
        self._unconfirmed += size
        self._memory.used += size
        if self._writer is None and (not self._tick or self._batch_bytes >= TIGHT_BATCH_BYTES):
            self._write_when_due()
        return self._unconfirmed <= TIGHT_BACKLOG_BYTES or self._has_room

    @property
    def _has_room(self) -> bool:
        return self._unconfirmed <= (TIGHT_BACKLOG_BYTES if self._memory.tight else BACKLOG_BYTES)

    async def wait_room(self) -> None:
        """Wait while too much is not in the store yet."""
        while not self._has_room:
            self._room = self._loop.create_future()
            await self._room

    async def finish(self) -> bytes:
        """Return the last batch, which goes with the settle, once all before it is in the store."""
        while self._writer is not None:
            await self._writer
        self._stop_timer()
        last = self._take()
        if last:
            self.chunks += 1
        return last

    def digest(self, trailers: bytes) -> bytes:
        """Return the digest of the whole response. To be called once: `trailers` are added to it."""
        digest = self._digest.copy()
        digest.update(trailers)
        return digest.digest()

    def close(self) -> None:
        """Give the room back, whatever happened."""
        if self._writer is not None:
            self._writer.cancel()
        self._end_feed(FeedEnd.BROKEN)
        self._forget()
        # These refer back to this.
        self._writer, self._on_broken, self._held.on_fenced, self._held.on_read = None, *[do_nothing] * 3

    # Who reads it while it comes, in this worker ...

    def tap(self, feed: Feed) -> None:
        """Give a feed what the store does not have yet, and all that comes from now on."""
        self._feed = feed
        feed.start_behind(self.size - self._unconfirmed)
        for data in (self._taken, *self._batch):
            feed.publish(data)
        if not self.is_storing:
            self._end_feed(FeedEnd.DROPPED)

    def untap(self) -> None:
        """Give nothing more to a feed."""
        self._feed = None

    def settled(self, status: SettleStatus, settlement: Settlement | None, trailers: bytes) -> None:
        """End the feed as the original's own client learns it: cleanly where the store has the whole response."""
        if self._feed is None:
            return
        match status, settlement:
            case SettleStatus.STORED, Settlement.STORE:
                self._feed.complete(trailers)
            case SettleStatus.STORED, _:
                self._feed.end(FeedEnd.DROPPED)
            case SettleStatus.UNCONFIRMED, _:
                self._feed.end(FeedEnd.UNSTORED)
            case SettleStatus.FENCED, _:
                self._feed.end(FeedEnd.GONE)
            case _, Settlement.CANCELLED:
                self._feed.end(FeedEnd.STOPPED)
            case _:
                self._feed.end(FeedEnd.BROKEN)

    def _end_feed(self, how: FeedEnd) -> None:
        if self._feed is not None:
            self._feed.end(how)

    # What becomes of it ...

    def _drop(self, how: FeedEnd = FeedEnd.DROPPED) -> None:
        """Store no more of the response, which goes on. Whoever reads it elsewhere learns that from its record."""
        self.is_storing = False
        self._end_feed(how)
        self._held.stage = DROPPED
        if self._shown is not None and self.chunks and not self.is_broken:
            self._telling = self._loop.create_task(self._store.renew(self._held.claim, DROPPED))
        self._forget()

    def _break(self, how: FeedEnd = FeedEnd.GONE) -> None:
        """Store no more of the response, which must not go on: another owner has the key, unless something is told."""
        if self.is_storing:
            self.is_broken = True
            self._drop(how)
            self._on_broken()

    def _forget(self) -> None:
        """Give back what is not in the store, and let nobody wait for that."""
        self._stop_timer()
        self._memory.give(self._unconfirmed)
        self._unconfirmed = self._batch_bytes = 0
        self._batch.clear()
        self._wake()

    def _wake(self) -> None:
        """Let whoever waits for room look again."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    # Appending ...

    def _write_when_due(self) -> None:
        """Append what waits: now if it is a whole batch, else once its time is over."""
        is_tight = self._memory.tight
        if self._batch_bytes >= (TIGHT_BATCH_BYTES if is_tight else BATCH_BYTES):
            self._write()
        elif self._batch and not self._tick:
            is_read = self._held.read_elsewhere
            # After a silence its readers get it at once.
            if is_read and self._loop.time() >= self._appended_s + TIGHT_BATCH_S:
                self._write()
            else:
                self._tick = self._ticker.call_later(
                    TIGHT_BATCH_S if is_tight or is_read else self.batch_s, self._write
                )

    def _hurry(self) -> None:
        """Somebody elsewhere begins to read: let nothing wait for as long as it does for the store alone."""
        self._stop_timer()
        if self._writer is None:
            self._write_when_due()

    def _write(self) -> None:
        self._stop_timer()
        self._writer = self._loop.create_task(self._append(self._take()))

    def _stop_timer(self) -> None:
        if self._tick:
            self._ticker.cancel(self._tick, self._write)
            self._tick = 0

    def _take(self) -> bytes:
        """Return the next chunk: what waits, up to the size of a chunk."""
        data = b"".join(self._batch)
        chunk, rest = data[:CHUNK_BYTES], data[CHUNK_BYTES:]
        self._batch = [rest] if rest else []
        self._batch_bytes, self._taken = len(rest), chunk
        self._digest.update(chunk)
        return chunk

    async def _append(self, chunk: bytes) -> None:
        try:
            head = b"" if self.chunks or self._shown is None else pack_head(self._shown())
            status = await self._store.append(self._held.claim, self.chunks, chunk, self._settle_timeout_s, head)
        except Exception:
            # Whoever waits for room must not wait for ever. What failed is raised where the end is waited for.
            self._break(FeedEnd.BROKEN)
            raise
        self._writer = None
        if not self.is_storing:
            return
        if status is AppendStatus.APPENDED or status is AppendStatus.APPENDED_READ:
            # With the first chunk comes the head, without which readers do not write into the record.
            if self.chunks or status is AppendStatus.APPENDED_READ:
                self._held.read_elsewhere = status is AppendStatus.APPENDED_READ
            if self._held.read_elsewhere:
                self._appended_s = self._loop.time()
            self.chunks += 1
            self._unconfirmed -= len(chunk)
            self._taken = b""
            self._memory.give(len(chunk))
            if self._feed is not None:
                self._feed.stored(self.size - self._unconfirmed)
            self._wake()
            self._write_when_due()
        elif status in _DROPS:
            self._drop()
        else:
            self._break(FeedEnd.GONE if status is AppendStatus.FENCED else FeedEnd.UNSTORED)
