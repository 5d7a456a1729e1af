"""Stores a response while it streams past: batches to the store, a running digest, a size limit."""

import asyncio
from enum import Enum
from hashlib import blake2b

from oncegate.buffers.memory import MemoryBudget
from oncegate.store.leases import LeasedClaim
from oncegate.store.results import AppendStatus
from oncegate.store.store import Store

BATCH_BYTES = 262144
BATCH_S = 0.05
# Bytes that the store has not confirmed, above which the exchange waits; the second where memory is short.
BACKLOG_BYTES = 2 * BATCH_BYTES
TIGHT_BACKLOG_BYTES = BATCH_BYTES // 4


class RecordingState(Enum):
    """Whether a response is still being stored."""

    STORING = "storing"
    # Too large, or the store has no memory: the response is stored without its body.
    DROPPED = "dropped"
    # The key has another owner by now.
    FENCED = "fenced"
    # The store confirmed nothing in time.
    FAILED = "failed"


# An append that did not succeed ends the recording. A record that vanished or lacks chunks is stored without its body.
_AFTER_APPEND = {
    AppendStatus.NO_MEMORY: RecordingState.DROPPED,
    AppendStatus.INCOMPLETE: RecordingState.DROPPED,
    AppendStatus.ABSENT: RecordingState.DROPPED,
    AppendStatus.UNCONFIRMED: RecordingState.FAILED,
}


class Recording:
    """The stored side of one response. `size` and `chunks` count what was added, in bytes and batches."""

    def __init__(
        self,
        store: Store,
        held: LeasedClaim,
        digest: blake2b,
        *,
        max_bytes: int,
        settle_timeout_s: float,
        memory: MemoryBudget,
    ) -> None:
        self._store, self._held, self._max_bytes = store, held, max_bytes
        self._settle_timeout_s, self._memory, self._digest = settle_timeout_s, memory, digest
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._unconfirmed = 0
        self._changed = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._ending = False
        self.size = 0
        self.chunks = 0
        self.state = RecordingState.STORING

    @property
    def is_storing(self) -> bool:
        return self.state is RecordingState.STORING

    @property
    def is_broken(self) -> bool:
        """Whether the response must not end as a complete one: the store has less of it than the client would."""
        return self.state in (RecordingState.FENCED, RecordingState.FAILED)

    def add(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        self.size += len(data)
        if not self.is_storing:
            return
        if self.size > self._max_bytes:
            self._stop(RecordingState.DROPPED)
            return
        self._digest.update(data)
        self._batch.append(data)
        self._batch_bytes += len(data)
        self._unconfirmed += len(data)
        self._memory.used += len(data)
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())
        self._changed.set()

    async def wait_room(self) -> None:
        """Wait while too much is not in the store yet."""
        while self.is_storing and self._unconfirmed > (TIGHT_BACKLOG_BYTES if self._memory.tight else BACKLOG_BYTES):
            self._changed.clear()
            await self._changed.wait()

    async def finish(self) -> bytes:
        """Return the last batch, which goes with the settle, once all before it is in the store."""
        self._ending = True
        self._changed.set()
        if self._writer is not None:
            await self._writer
        last = b"".join(self._batch) if self.is_storing else b""
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
            # It refers back to this.
            self._writer = None
        self._memory.give(self._unconfirmed)
        self._unconfirmed = 0
        self._batch.clear()

    def _stop(self, state: RecordingState) -> None:
        self.state = state
        self._memory.give(self._unconfirmed)
        self._unconfirmed = self._batch_bytes = 0
        self._batch.clear()
        self._changed.set()

    async def _write(self) -> None:
        try:
            await self._append_batches()
        except Exception:
            # Whoever waits for room must not wait for ever.
            self._stop(RecordingState.FAILED)
            raise

    async def _append_batches(self) -> None:
        """Append batch after batch; the last one is left for the settle."""
        while self.is_storing and not (self._ending and self._batch_bytes <= BATCH_BYTES):
            if not self._batch:
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._fill_batch()
            if self._ending and self._batch_bytes <= BATCH_BYTES:
                return
            await self._append(self._take())

    async def _fill_batch(self) -> None:
        deadline = asyncio.get_running_loop().time() + BATCH_S
        while self.is_storing and self._batch_bytes < BATCH_BYTES and not self._ending:
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _take(self) -> bytes:
        """Return at most one batch of what is waiting."""
        data = b"".join(self._batch)
        chunk, rest = data[:BATCH_BYTES], data[BATCH_BYTES:]
        self._batch = [rest] if rest else []
        self._batch_bytes = len(rest)
        return chunk

    async def _append(self, chunk: bytes) -> None:
        if not chunk:
            return
        status = await self._store.append(self._held.claim, self.chunks, chunk, self._settle_timeout_s)
        if not self.is_storing:
            return
        if status is AppendStatus.APPENDED:
            self.chunks += 1
            self._unconfirmed -= len(chunk)
            self._memory.give(len(chunk))
            self._changed.set()
        else:
            self._stop(_AFTER_APPEND.get(status, RecordingState.FENCED))
