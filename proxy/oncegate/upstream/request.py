"""The request that leaves on a connection to the upstream: all at once, or block by block."""

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable

from oncegate.buffers.write_batcher import WriteBatcher
from oncegate.messages.bound_authentication import request_binds_connection

# The most bytes of a body that are copied behind the head for one write. A copy of more would take too much memory.
MAX_JOINED_BYTES = 65536
# SO_LINGER: the socket is closed with a reset.
_RESET = struct.pack("ii", 1, 0)
_NOTHING = bytes(4)


class OutgoingRequest:
    """Writes the requests of a connection, one after the other, no faster than the transport takes them.

    `transport` is None before the connection is made and once it is lost; what is written then is dropped.
    `binds_connection`: a request authenticated its user for the whole connection, which nobody else may use.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, batcher: WriteBatcher) -> None:
        self._loop, self._batcher = loop, batcher
        self.binds_connection = False
        self.transport: asyncio.Transport | None = None
        self._sending: asyncio.Task[None] | None = None
        self._is_paused = False
        # Done when the transport takes more bytes, or is lost.
        self._room: asyncio.Future[None] | None = None

    def send(self, head: bytes, body: bytes, may_bind: bool = True) -> None:
        """Write a whole request. A small one leaves in one write with those of other connections.

        `may_bind`: its head may authenticate the connection. A head that is known never does.
        """
        if may_bind and request_binds_connection(head):
            self.binds_connection = True
        transport = self.transport
        if transport is not None and not transport.is_closing():
            if len(body) > MAX_JOINED_BYTES:
                transport.writelines((head, body))
            else:
                self._batcher.write(transport, head + body if body else head)

    def send_blocks(
        self, head: bytes, body: AsyncIterator[bytes], chunked: bool, failed: Callable[[Exception], None]
    ) -> None:
        """Write a head, then from a task the blocks of its body. `chunked`: as chunks (RFC 9112, section 7.1).

        `failed` is called with what broke the body.
        """
        if request_binds_connection(head):
            self.binds_connection = True
        self.write(head)
        # Only the task refers to `failed`: as an attribute, a connection's own method would make each connection a
        # reference cycle, which only a garbage collection frees.
        self._sending = self._loop.create_task(self._send_blocks(body, chunked, failed))

    async def _send_blocks(
        self, body: AsyncIterator[bytes], chunked: bool, failed: Callable[[Exception], None]
    ) -> None:
        try:
            async for block in body:
                if self.transport is None:
                    return
                self.transport.writelines((b"%x\r\n" % len(block), block, b"\r\n") if chunked else (block,))
                # Before the next block is asked for: whether it may be sent is decided then.
                await self.wait_for_room()
            if chunked:
                self.write(b"0\r\n\r\n")
        except Exception as error:
            failed(error)

    def write(self, data: bytes) -> None:
        """Write bytes as they are."""
        if self.transport is not None:
            self.transport.write(data)

    async def wait_for_room(self) -> None:
        """Wait until the transport takes more bytes, or is lost."""
        while self._is_paused and self.transport is not None:
            self._room = self._loop.create_future()
            await self._room

    async def wait_until_written(self) -> None:
        """Wait until everything that was written has left the process."""
        while self.transport is not None and self.transport.get_write_buffer_size():
            await asyncio.sleep(0.01)

    def is_sent(self) -> bool:
        """Return whether every byte of the request has left the process."""
        is_written = self._sending is None or self._sending.done()
        return is_written and self.transport is not None and self.transport.get_write_buffer_size() == 0

    def end_with_reset(self) -> None:
        """Let the connection be closed with a reset, if the upstream's kernel has all of the request.

        The side that closes with a FIN keeps the port for a minute (TIME-WAIT). 28,000 ports last for 470 new
        connections a second.
        """
        if self.is_sent() and self.transport is not None and not self.transport.is_closing():
            raw: socket.socket = self.transport.get_extra_info("socket")
            # In a bytearray it costs half of what it costs in bytes (Python 3.11, counted).
            unconfirmed = bytearray(_NOTHING)
            fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, unconfirmed)
            # A reset would drop what the other side has not confirmed.
            if unconfirmed == _NOTHING:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def pause(self) -> None:
        """Write no further block: the transport's buffer is full."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on with the next block."""
        self._is_paused = False
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def cancel(self) -> None:
        """Send no more blocks."""
        if self._sending is not None and not self._sending.done():
            self._sending.cancel()

    def transport_lost(self) -> None:
        """Forget the transport, and end every wait for it."""
        self.transport = None
        self.resume()
