"""Request bodies: whole before the claim where a key guards them, streamed where none does.

The bytes that are digested are the bytes that are sent: one buffer, or one spool file.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from aiohttp import StreamReader

from oncegate.buffers.memory import MemoryBudget
from oncegate.downstream.minimum_rate import MinimumRate, RateWatch
from oncegate.messages.head_cache import BufferedBody

MEMORY_BYTES = 1048576  # of one body; what is longer is spooled
BLOCK_BYTES = 262144
AT_ONCE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The body is over the limit."""


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Memory or spool of this worker is full."""


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """The client left, was too slow or broke its own framing before the body was whole."""

    stalled: bool = False


class Body:
    """A whole request body, in memory or in an unlinked spool file; `close` gives its room back."""

    def __init__(self, data: bytes, memory: MemoryBudget, spool: MemoryBudget, file: IO[bytes] | None = None) -> None:
        self.data, self._file = data, file
        self._memory, self._spool = memory, spool
        self.size = len(data) if file is None else file.tell()

    @property
    def spooled(self) -> bool:
        return self._file is not None

    def blocks(self) -> Iterable[bytes]:
        """Return the body from its start, in blocks."""
        return (self.data,) if self._file is None else self._spooled(self._file.fileno())

    def _spooled(self, descriptor: int) -> Iterator[bytes]:
        """Yield what was spooled; it is still in the page cache."""
        offset = 0
        while block := os.pread(descriptor, BLOCK_BYTES, offset):
            offset += len(block)
            yield block

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the body from its start, for a sender."""
        for block in self.blocks():
            yield block

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._spool.give(self.size)
        else:
            self._memory.give(self.size)
        self._file, self.data, self.size = None, b"", 0


class Bodies:
    """Reads request bodies within the worker's limits (all in bytes), as fast as `pace` asks for."""

    def __init__(
        self, memory: MemoryBudget, spool: MemoryBudget, spool_dir: str | None, max_bytes: int, pace: MinimumRate
    ) -> None:
        self._memory, self._spool, self._spool_dir, self.max_bytes = memory, spool, spool_dir, max_bytes
        self._pace = pace

    def here(
        self, content: StreamReader | BufferedBody, length: int | None, most: int | None = None
    ) -> Body | TooLarge | NoRoom | None:
        """Return the whole body where it came with the head, as small ones do, or why there will be none.

        None: it has to be read. `length`: what Content-Length states; `most`: another limit than the usual.
        """
        most = self.max_bytes if most is None else most
        if length is not None and length > most:
            return TooLarge()
        if not content.is_eof():
            return None
        # Most are small, came in one piece and paused nothing; read_nowait takes 100 bytecodes to find that out.
        if isinstance(content, StreamReader) and length and length <= AT_ONCE_BYTES and len(content._buffer) == 1:
            data = content._buffer.popleft()
        else:
            data = content.read_nowait()
        if len(data) > most:
            return TooLarge()
        return Body(data, self._memory, self._spool) if self._memory.take(len(data)) else NoRoom()

    def again(self, content: StreamReader | BufferedBody) -> Body | NoRoom:
        """Return the body of a request that came whole, as long as one that was within the limit."""
        data = content.read_nowait()
        return Body(data, self._memory, self._spool) if self._memory.take(len(data)) else NoRoom()

    async def read(
        self, content: StreamReader | BufferedBody, most: int | None = None
    ) -> Body | TooLarge | NoRoom | BrokenOff:
        """Return the whole body, which is still to come, or why there is none; `most`: another limit than the usual."""
        most = self.max_bytes if most is None else most
        parts: list[bytes] = []
        size = 0
        watch = RateWatch(self._pace)
        while block := await read_block(content, watch):
            if isinstance(block, BrokenOff):
                return self._give_up(size, block)
            if size + len(block) > most:
                return self._give_up(size, TooLarge())
            if size + len(block) > MEMORY_BYTES:
                self._memory.give(size)
                return await self._spool_rest(content, [*parts, block], most, watch)
            if not self._memory.take(len(block)):
                return self._give_up(size, NoRoom())
            parts.append(block)
            size += len(block)
        return Body(b"".join(parts), self._memory, self._spool)

    def _give_up(self, size: int, why: "TooLarge | NoRoom | BrokenOff") -> "TooLarge | NoRoom | BrokenOff":
        self._memory.give(size)
        return why

    async def _spool_rest(
        self, content: StreamReader | BufferedBody, begun: list[bytes], most: int, watch: RateWatch
    ) -> Body | TooLarge | NoRoom | BrokenOff:
        file: IO[bytes] | None = None
        size = 0
        outcome: TooLarge | NoRoom | BrokenOff | None = None
        try:
            file = tempfile.TemporaryFile(dir=self._spool_dir, buffering=0)  # noqa: SIM115 - the Body closes it
            block: bytes | BrokenOff = b"".join(begun)
            while block and outcome is None:
                if isinstance(block, BrokenOff):
                    outcome = block
                elif size + len(block) > most:
                    outcome = TooLarge()
                elif not self._spool.take(len(block)):
                    outcome = NoRoom()
                else:
                    size += len(block)
                    _write_all(file, block)
                    block = await read_block(content, watch)
        except OSError:  # the disk is full, or there are no descriptors left
            outcome = NoRoom()
        except BaseException:
            self._discard(file, size)
            raise
        if outcome is None and file is not None:
            return Body(b"", self._memory, self._spool, file)
        self._discard(file, size)
        return outcome or NoRoom()

    def _discard(self, file: IO[bytes] | None, size: int) -> None:
        self._spool.give(size)
        if file is not None:
            file.close()


def _write_all(file: IO[bytes], block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


async def read_block(content: StreamReader | BufferedBody, watch: RateWatch) -> bytes | BrokenOff:
    """Return the next bytes of a body, empty at its end."""
    now = asyncio.get_running_loop().time
    while True:
        began, block = now(), b""
        try:
            async with asyncio.timeout(watch.left_s):
                block = await content.readany()
        except Exception as error:  # what aiohttp made of the client's framing or leaving, or our own timeout
            error.with_traceback(None)  # the content keeps it, and it would keep all of this
            if not isinstance(error, TimeoutError) or content.exception() is not None:
                return BrokenOff()
        if not watch.keeps_up(now() - began, len(block)) and not content.at_eof():
            return BrokenOff(stalled=True)
        if block or content.at_eof():
            return block


def arrived(content: StreamReader | BufferedBody | Body) -> bytes | None:
    """Return the body where all of it is in memory already, None where it comes in blocks."""
    if isinstance(content, Body):
        return None if content.spooled else content.data
    return content.read_nowait() if content.is_eof() and content.exception() is None else None


async def stream(content: StreamReader | BufferedBody, pace: MinimumRate) -> AsyncIterator[bytes]:
    """Yield the bytes of a body as they come. Raises ConnectionError where it breaks off, TimeoutError if slowly."""
    watch = RateWatch(pace)
    while block := await read_block(content, watch):
        if isinstance(block, BrokenOff):
            raise TimeoutError if block.stalled else ConnectionError("the client's body broke off")
        yield block
