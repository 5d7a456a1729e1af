"""Request bodies: read whole before the claim where a key guards them, streamed where none does.

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
from oncegate.known_heads.requests import KnownHead
from oncegate.messages.fields import Fields
from oncegate.values import Opaque

# Of one body. A longer one is spooled to disk.
MEMORY_BYTES = 1048576
BLOCK_BYTES = 262144
# Of the body of a duplicate that waits: 1,024 of them are 16 MiB.
WAITING_BYTES = 16384
# Up to this, aiohttp's buffer is taken directly where it is in one piece.
ONE_PIECE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The body is over the limit."""


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Memory or spool of this worker is full."""


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """The client left, was too slow (`stalled`) or broke its own framing before the body was whole."""

    stalled: bool = False


NoBody = TooLarge | NoRoom | BrokenOff


class BufferedBody(Opaque):
    """A body that came in one segment with its head, which is known, in the place of aiohttp's StreamReader.

    It is complete, so that nothing that happens to its client afterwards matters to it. `known` is the head, `values`
    are in its gaps.
    """

    known: KnownHead
    values: tuple[bytes, ...]
    data: bytes

    def is_eof(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return None

    def set_exception(self, exc: BaseException) -> None:
        pass

    def read_nowait(self) -> bytes:
        data, self.data = self.data, b""
        return data

    def at_eof(self) -> bool:
        return not self.data

    async def readany(self) -> bytes:
        return self.read_nowait()


class Body(Opaque):
    """A whole request body, in memory or in an unlinked spool file. `close` gives its room back.

    `data` are its bytes where it is in memory (not `spooled`), `size` their number in either case.
    """

    data: bytes
    size: int
    _memory: MemoryBudget
    _spool: MemoryBudget
    _file: IO[bytes] | None = None
    spooled: bool = False

    def blocks(self) -> Iterable[bytes]:
        """Return the body from its start, in blocks."""
        return (self.data,) if self._file is None else self._spooled_blocks(self._file.fileno())

    def _spooled_blocks(self, descriptor: int) -> Iterator[bytes]:
        """Yield what was spooled. It is still in the page cache."""
        offset = 0
        while block := os.pread(descriptor, BLOCK_BYTES, offset):
            offset += len(block)
            yield block

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the body from its start, for a sender."""
        for block in self.blocks():
            yield block

    def move_to(self, file: IO[bytes]) -> None:
        """Give the memory back: from now on the body is in a spool file that has all of it."""
        self._memory.give(self.size)
        self.data, self._file, self.spooled = b"", file, True

    def close(self) -> None:
        """Give its memory or its spool file back. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._spool.give(self.size)
        else:
            self._memory.used -= self.size
        self._file, self.data, self.size = None, b"", 0


class Bodies:
    """Reads request bodies within the worker's limits (in bytes), no slower than `minimum_rate` allows."""

    def __init__(
        self,
        memory: MemoryBudget,
        spool: MemoryBudget,
        spool_dir: str | None,
        max_bytes: int,
        minimum_rate: MinimumRate,
    ) -> None:
        self._memory, self._spool, self._spool_dir, self.max_bytes = memory, spool, spool_dir, max_bytes
        self._minimum_rate = minimum_rate

    def take(
        self, content: StreamReader | BufferedBody, fields: Fields, max_bytes: int | None = None
    ) -> Body | TooLarge | NoRoom | None:
        """Return the body if it came with the head, as small ones do, or why there will be none.

        None: it has to be read first. `fields` are the head's; `max_bytes` replaces the usual limit.
        """
        stated_bytes = stated_length(fields)
        max_bytes = self.max_bytes if max_bytes is None else max_bytes
        if stated_bytes is not None and stated_bytes > max_bytes:
            return TooLarge()
        if not content.is_eof():
            return None
        # Most are small, came in one piece and paused nothing. read_nowait takes 100 bytecodes to find that out.
        one_piece = isinstance(content, StreamReader) and stated_bytes and stated_bytes <= ONE_PIECE_BYTES
        if one_piece and isinstance(content, StreamReader) and len(content._buffer) == 1:
            data = content._buffer.popleft()
        else:
            data = content.read_nowait()
        if len(data) > max_bytes:
            return TooLarge()
        body = Body(data, len(data), self._memory, self._spool)
        return body if self._memory.take(len(data)) else NoRoom()

    def take_buffered(self, content: BufferedBody, max_bytes: int) -> Body | TooLarge | NoRoom:
        """Return the body of a request under a known head, which is in memory, or why there will be none."""
        data, content.data = content.data, b""
        if (size := len(data)) > max_bytes:
            return TooLarge()
        return Body(data, size, self._memory, self._spool) if self._memory.take(size) else NoRoom()

    async def read(self, content: StreamReader | BufferedBody, max_bytes: int | None = None) -> Body | NoBody:
        """Wait for a body that is still to come and return it, or why there is none."""
        max_bytes = self.max_bytes if max_bytes is None else max_bytes
        parts: list[bytes] = []
        size = 0
        watch = RateWatch(self._minimum_rate)
        while block := await read_block(content, watch):
            if isinstance(block, BrokenOff):
                return self._give_back(size, block)
            if size + len(block) > max_bytes:
                return self._give_back(size, TooLarge())
            if size + len(block) > MEMORY_BYTES or not self._take_memory(len(block)):
                self._memory.give(size)
                return await self._spool_rest(content, [*parts, block], max_bytes, watch)
            parts.append(block)
            size += len(block)
        return Body(b"".join(parts), size, self._memory, self._spool)

    def set_aside(self, body: Body) -> bool:
        """Move a body to the spool that may be needed only much later, unless it is small.

        Such bodies have half of the spool: the rest is for requests that execute. Return False and change nothing where
        that is used up.
        """
        if body.spooled or body.size <= WAITING_BYTES:
            return True
        if self._spool.tight or not self._spool.take(body.size):
            return False
        file: IO[bytes] | None = None
        try:
            file = tempfile.TemporaryFile(dir=self._spool_dir, buffering=0)  # noqa: SIM115 - the Body closes it
            _write_all(file, body.data)
        except OSError:  # as in `_spool_rest`
            self._discard(file, body.size)
            return False
        body.move_to(file)
        return True

    def _take_memory(self, size: int) -> bool:
        """Reserve memory for a body that is still on its way, if there is enough.

        Such bodies have half of it: clients that send slowly leave room for whole requests and for responses.
        """
        return not self._memory.tight and self._memory.take(size)

    def _give_back(self, size: int, reason: NoBody) -> NoBody:
        self._memory.give(size)
        return reason

    async def _spool_rest(
        self, content: StreamReader | BufferedBody, begun: list[bytes], max_bytes: int, watch: RateWatch
    ) -> Body | NoBody:
        file: IO[bytes] | None = None
        size = 0
        outcome: NoBody | None = None
        try:
            file = tempfile.TemporaryFile(dir=self._spool_dir, buffering=0)  # noqa: SIM115 - the Body closes it
            block: bytes | BrokenOff = b"".join(begun)
            while block and outcome is None:
                if isinstance(block, BrokenOff):
                    outcome = block
                elif size + len(block) > max_bytes:
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
            return Body(b"", size, self._memory, self._spool, file, True)
        self._discard(file, size)
        return outcome or NoRoom()

    def _discard(self, file: IO[bytes] | None, size: int) -> None:
        self._spool.give(size)
        if file is not None:
            file.close()


def stated_length(fields: Fields) -> int | None:
    """Return the size of a request's body in bytes, None where only its end will tell (RFC 9112, section 6.3)."""
    if b"transfer-encoding" in fields:
        return None
    return int((fields.get(b"content-length") or [b"0"])[0])


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
            async with asyncio.timeout(watch.window_left_s):
                block = await content.readany()
        except Exception as error:  # what aiohttp made of the client's framing or leaving, or our own timeout
            # The content keeps the error, whose traceback would keep every frame of this request.
            error.with_traceback(None)
            if not isinstance(error, TimeoutError) or content.exception() is not None:
                return BrokenOff()
        if not watch.keeps_up(now() - began, len(block)) and not content.at_eof():
            return BrokenOff(stalled=True)
        if block or content.at_eof():
            return block


def buffered_bytes(content: StreamReader | BufferedBody | Body) -> bytes | None:
    """Return the body if all of it is in memory already, None if it comes in blocks."""
    if isinstance(content, Body):
        return None if content.spooled else content.data
    return content.read_nowait() if content.is_eof() and content.exception() is None else None


async def stream(content: StreamReader | BufferedBody, minimum_rate: MinimumRate) -> AsyncIterator[bytes]:
    """Yield the bytes of a body as they come.

    Raises ConnectionError where it breaks off, TimeoutError where the client sends too slowly.
    """
    watch = RateWatch(minimum_rate)
    while block := await read_block(content, watch):
        if isinstance(block, BrokenOff):
            raise TimeoutError if block.stalled else ConnectionError("the client's body broke off")
        yield block
