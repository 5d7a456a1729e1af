"""What is kept of an answer while it streams past: batches to the store, a running digest, a limit."""

import asyncio
from hashlib import blake2b

from oncegate.buffers.memory import MemoryBudget
from oncegate.store.leases import LeasedClaim
from oncegate.store.results import AppendStatus
from oncegate.store.store import Store

BATCH_BYTES = 262144
BATCH_S = 0.05
# What an append that did not go through makes of a recording; a vanished or incomplete record is stored bare.
_AFTER = {
    AppendStatus.NO_MEMORY: "dropped",
    AppendStatus.INCOMPLETE: "dropped",
    AppendStatus.ABSENT: "dropped",
    AppendStatus.UNCONFIRMED: "failed",
}
BROKEN = ("fenced", "failed")  # states in which the answer cannot end as a stored one
BACKLOG_BYTES = 2 * BATCH_BYTES  # unconfirmed; above it the exchange waits for the store
TIGHT_BYTES = BATCH_BYTES // 4  # the same where the worker's memory is short


class Recording:
    """The stored side of one answer. `state`: kept, dropped (too large, no memory), fenced or failed."""

    def __init__(
        self, store: Store, held: LeasedClaim, digest: blake2b, *, limit: int, patience_s: float, buffered: MemoryBudget
    ) -> None:
        self._store, self._held, self._limit, self._patience_s = store, held, limit, patience_s
        self._buffered = buffered
        self._digest = digest
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._unconfirmed = 0
        self._changed = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._ending = False
        self.size = 0
        self.chunks = 0
        self.state = "kept"

    @property
    def kept(self) -> bool:
        return self.state == "kept"

    def add(self, data: bytes) -> None:
        """Take the next bytes of the answer."""
        self.size += len(data)
        if not self.kept:
            return
        if self.size > self._limit:
            self._stop("dropped")
            return
        self._digest.update(data)
        self._batch.append(data)
        self._batch_bytes += len(data)
        self._unconfirmed += len(data)
        self._buffered.used += len(data)
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())
        self._changed.set()

    async def room(self) -> None:
        """Wait while too much is not in the store yet."""
        while self.kept and self._unconfirmed > (TIGHT_BYTES if self._buffered.tight else BACKLOG_BYTES):
            self._changed.clear()
            await self._changed.wait()

    async def finish(self) -> bytes:
        """Return the last batch, which goes with the settle, once all before it is in the store."""
        self._ending = True
        self._changed.set()
        if self._writer is not None:
            await self._writer
        last = b"".join(self._batch) if self.kept else b""
        if last:
            self.chunks += 1
        return last

    def digest(self) -> bytes:
        return self._digest.digest()

    def close(self) -> None:
        """Give the room back, whatever happened."""
        if self._writer is not None:
            self._writer.cancel()
            self._writer = None  # it refers back to this
        self._buffered.give(self._unconfirmed)
        self._unconfirmed = 0
        self._batch.clear()

    def _stop(self, state: str) -> None:
        self.state = state
        self._buffered.give(self._unconfirmed)
        self._unconfirmed = self._batch_bytes = 0
        self._batch.clear()
        self._changed.set()

    async def _write(self) -> None:
        try:
            await self._append_batches()
        except Exception:
            self._stop("failed")  # whoever waits for room must not wait for ever
            raise

    async def _append_batches(self) -> None:
        """Append batch after batch; the last one is left for the settle."""
        while self.kept and not (self._ending and self._batch_bytes <= BATCH_BYTES):
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
        while self.kept and self._batch_bytes < BATCH_BYTES and not self._ending:
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
        status = await self._store.append(self._held.claim, self.chunks, chunk, self._patience_s)
        if not self.kept:
            return
        if status is AppendStatus.APPENDED:
            self.chunks += 1
            self._unconfirmed -= len(chunk)
            self._buffered.give(len(chunk))
            self._changed.set()
        else:
            self._stop(_AFTER.get(status, "fenced"))
