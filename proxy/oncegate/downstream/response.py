"""The client's side: its request as parsed, its answer as bytes, with an end that is clean only when we say so.

aiohttp's own responses re-encode values, rewrite the reason and title-case names; a replay must not.
"""

import asyncio
import fcntl
import socket
import struct
import termios

from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.request import Request
from oncegate.messages.problems import Problem
from oncegate.messages.response_head import status_line

# How the kernel closes the socket, also that of a process that died: with a reset, or with its usual FIN.
_RESET, _FIN = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)

BACKLOG_BYTES = 65536


class ResponseWriter:
    """Who asked, and what goes to it. A client that left takes everything and keeps nothing."""

    awaits_continue = False
    started = False
    finished = False
    cut_off = False
    _http10 = _close = _head_only = False
    _frame = b""  # how the body's end is told: "chunked", "length" or "eof"
    _owed = 0  # bytes still to come, by length
    _held = b""

    def __init__(self, request: Request, pace: MinimumRate) -> None:
        message = request.message
        self._connection = request.protocol
        self.pace = pace
        if request.seen is not None:  # such heads alone are remembered
            self._head_only = message.method == "HEAD"
            return
        self._http10 = message.version < (1, 1)
        # What a client sends behind an upgrade is lost with the upgrade. aiohttp's parser (3.14.5) takes the last
        # trailer of a chunked body for the first field of the next request: there must be none.
        self._close = message.should_close or message.upgrade or message.chunked
        self._head_only = message.method == "HEAD"

    @property
    def keep_alive(self) -> bool:
        """Whether the connection can take another request: also one that retires, if this answer began before."""
        return self.finished and not self._close and not self._connection.over

    # Where it is ...

    @property
    def gone(self) -> bool:
        """Whether nobody takes the answer any more."""
        return self._connection.transport is None

    def asks_no_more(self) -> bool:
        """Whether the client closed its side: it left, or it waits for this answer as its last."""
        return self._connection.asks_no_more

    def leaving(self) -> "asyncio.Future[None]":
        """Return a future that is done once the client has left."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.gone:
            future.set_result(None)
        self._connection.gone = future
        return future

    def send_continue(self) -> None:
        """Tell a client that waits for it to send its body."""
        if self.awaits_continue:
            self.awaits_continue = False
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # A whole answer ...

    def answer(self, problem: "Problem", extra: bytes = b"", close: bool = False) -> None:
        """Send an answer of our own."""
        self._close = self._close or close
        body = b"" if self._head_only else problem.body(self._connection.docs_url)
        self.send(problem.status, problem.reason, problem.head_fields() + extra, body, bodiless=self._head_only)

    @staticmethod
    def closing_answer(problem: "Problem") -> bytes:
        """Return an answer for a connection that has no request."""
        body = problem.body()
        length = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        return status_line(problem.status, problem.reason) + problem.head_fields() + length + body

    def send(
        self,
        status: int,
        reason: bytes,
        block: bytes,
        body: bytes,
        *,
        stated_length: bool = False,
        bodiless: bool = False,
        close_delimited: bool = False,
    ) -> None:
        """Send an answer that is here whole, in one write. `stated_length`: `block` has a Content-Length."""
        if close_delimited:
            self._end_by_closing()
        framing = b"" if stated_length or bodiless or close_delimited else b"Content-Length: %d\r\n" % len(body)
        self._write(b"".join((status_line(status, reason), block, framing, self._connection_field(), b"\r\n", body)))
        self.started = self.finished = True

    def _connection_field(self) -> bytes:
        # A client that was not told to send its body may send the next request in its place.
        if self._close or self._connection.asks_no_more or self.awaits_continue:
            self._close = True
            return b"Connection: close\r\n"
        return b"Connection: keep-alive\r\n" if self._http10 else b""

    # An answer that comes bit by bit ...

    def begin(self, status: int, reason: bytes, block: bytes, *, length: int | None, stated: bool, eof: bool) -> None:
        """Send the head of an answer whose body follows. `stated`: `block` has the Content-Length already.

        Without a length it is chunked, or ended by closing for HTTP/1.0 and where the upstream did so.
        """
        self._frame = b"length" if length is not None else b"eof" if eof or self._http10 else b"chunked"
        self._owed = length or 0
        if self._frame == b"eof":
            self._end_by_closing()
        framing = b"Transfer-Encoding: chunked\r\n" if self._frame == b"chunked" else b""
        if length is not None and not stated:
            framing = b"Content-Length: %d\r\n" % length
        self._write(b"".join((status_line(status, reason), block, framing, self._connection_field(), b"\r\n")))
        self.started = True

    def switch(self, block: bytes) -> None:
        """Send the head after which the connection speaks another protocol, bytes as they are, to its end."""
        self._end_by_closing()
        self._write(b"HTTP/1.1 101 Switching Protocols\r\n" + block + b"\r\n")
        self.started = True

    def write(self, data: bytes) -> None:
        """Send the next bytes of the body, all but what would tell a client that it is whole."""
        if self._frame == b"chunked":
            self._write(b"%x\r\n%s\r\n" % (len(data), data))
            return
        if self._frame == b"length":
            self._owed -= len(data)
            if self._owed <= 0:
                data, self._held = data[:-1], data[-1:]
        self._write(data)

    def end(self) -> None:
        """Send the end: from here on the client knows that the answer is whole."""
        self._write(b"0\r\n\r\n" if self._frame == b"chunked" else self._held)
        self.finished = True

    def abort(self) -> None:
        """Close so that the client cannot take what it has for the whole answer."""
        transport = self._connection.transport
        if transport is None:
            return
        self._close = True
        self._connection.write_batcher.flush()  # a whole answer before this one may be in it
        transport.abort()
        self._connection.force_close()

    def _end_by_closing(self) -> None:
        """A FIN is the clean end of such an answer: until it is whole, whatever closes the connection resets it."""
        self._frame, self._close = b"eof", True
        self._closes_with(_RESET)

    def _closes_with(self, how: bytes) -> None:
        transport = self._connection.transport
        if transport is not None and (raw := transport.get_extra_info("socket")) is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)

    @property
    def ends_by_closing(self) -> bool:
        """Whether `close_cleanly` is still owed."""
        return self.finished and self._frame == b"eof"

    async def close_cleanly(self) -> None:
        """Let the closing be the clean end, once the last byte has left the process."""
        if (transport := self._connection.transport) is not None:
            transport.set_write_buffer_limits(0)  # from here on, room is when nothing is left
            while not await self.taken():
                pass
        if not self.cut_off:
            self._closes_with(_FIN)

    async def all_taken(self) -> None:
        """Wait until there is room to write more, or the client is cut off."""
        while not await self.taken():
            pass

    def _write(self, data: bytes) -> None:
        connection = self._connection
        transport = connection.transport
        if transport is None or transport.is_closing():
            return
        if self._close:  # at once, as what closes it may come next
            connection.write_batcher.flush()
            transport.write(data)
        else:
            connection.write_batcher.write(transport, data)

    @property
    def backlog(self) -> bool:
        """Whether so much is still to be written that no more should be fetched."""
        transport = self._connection.transport
        return transport is not None and transport.get_write_buffer_size() > BACKLOG_BYTES

    async def taken(self) -> bool:
        """Wait until there is room to write more, for a window of its pace at most; return whether there is.

        False: not yet, but the client goes on taking. One that took too little is cut off.
        """
        connection = self._connection
        if not connection.writing_paused and self.backlog:
            await asyncio.sleep(0)  # it may pause only once the transport has tried
        if not connection.writing_paused or (transport := connection.transport) is None:
            return True
        before = untaken_bytes(transport)
        connection.room = asyncio.get_running_loop().create_future()
        await asyncio.wait([connection.room], timeout=self.pace.window_s)
        if not connection.writing_paused or connection.transport is None:
            return True
        if before - untaken_bytes(transport) < self.pace.least:
            self.cut_off = True
            self.abort()
        return self.cut_off


def untaken_bytes(transport: asyncio.Transport) -> int:
    """Return what was written and the peer does not have yet.

    The kernel's part of it counts: it frees its room in lumps of a third, which a slow peer takes minutes for.
    """
    untaken = transport.get_write_buffer_size()
    raw = transport.get_extra_info("socket")
    if raw is not None and (untaken or not transport.is_closing()):
        untaken += struct.unpack("i", fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return untaken
