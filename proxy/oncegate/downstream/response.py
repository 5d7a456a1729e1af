"""Writes the response to one request, byte for byte, with an end that looks complete only when it is.

aiohttp's own response classes re-encode values, rewrite the reason and title-case names. A replay must change nothing.
"""

import asyncio
from typing import Any, Protocol

from oncegate.buffers.write_batcher import WriteBatcher
from oncegate.downstream.heartbeat import EventComments
from oncegate.downstream.kernel import FIN, RESET, set_linger, unsent_bytes
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.messages.framing import COUNTED, STATED, Framing
from oncegate.messages.problems import Problem, Render, as_problem_json, reason_of
from oncegate.messages.response_head import status_line
from oncegate.messages.trailers import takes_trailers
from oncegate.observe.outcome import ClientCounts
from oncegate.values import Opaque

# Unsent bytes of one response in this process, above which no more of it should be fetched.
WRITE_BACKLOG_BYTES = 65536


class ResponseConnection(Protocol):
    """A client's connection, as far as a response deals with it."""

    write_batcher: WriteBatcher
    transport: asyncio.Transport | None
    minimum_rate: MinimumRate
    counts: ClientCounts
    room_waiter: "asyncio.Future[None] | None"
    leave_waiter: "asyncio.Future[None] | None"
    reader_waiter: "asyncio.Future[None] | None"

    @property
    def docs_url(self) -> str: ...

    @property
    def writing_paused(self) -> bool: ...

    def is_last_response(self) -> bool: ...

    @property
    def is_half_closed(self) -> bool: ...

    def force_close(self) -> None: ...


class ResponseWriter(Opaque):
    """Writes the response to one request. Writing to a client that left does nothing and raises nothing.

    `started`: the head was written. `finished`: the end was, too. `cut_off`: the client took its response too slowly
    and was disconnected. `closes`: the connection takes no request after this one. `problem`: what was sent of
    oncegate's own.
    """

    _connection: ResponseConnection
    _head_only: bool
    closes: bool
    _http10: bool = False
    # Whether the client said that it takes trailers. A head that says so is not remembered.
    takes_trailers: bool = False
    awaits_continue: bool = False
    started: bool = False
    finished: bool = False
    cut_off: bool = False
    # The period of 102 (Processing) in seconds, 0 for a client that gets none; and how many interim responses it got.
    heartbeat_s: float = 0.0
    interim_count: int = 0
    problem: Problem | None = None
    # What follows the body of the response, each line ended; to be set before its end is written.
    trailers: bytes = b""
    _comments: EventComments | None = None
    # How the client sees the end of a body that is written in pieces: "chunked", "length" or "close".
    _body_end: str = ""
    # Of a body with a stated length: how much is to come, and its last byte, held back until `end`.
    _bytes_left: int = 0
    _last_byte: bytes = b""

    # The client ...

    @property
    def client_gone(self) -> bool:
        """Whether nobody receives the response any more."""
        return self._connection.transport is None

    def client_half_closed(self) -> bool:
        """Return whether the client closed its side: it left, or it waits for this response as its last."""
        return self._connection.is_last_response()

    def client_leaves(self) -> "asyncio.Future[None]":
        """Return a future that is done once the client has left."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.client_gone:
            future.set_result(None)
        self._connection.leave_waiter = future
        return future

    def reader_has_left(self) -> bool:
        """Return whether the client has left, or closed its side: nearly all that close their side have left."""
        return self.client_gone or self._connection.is_half_closed

    def reader_leaves(self) -> "asyncio.Future[None]":
        """Return a future that is done once `reader_has_left`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.reader_has_left():
            future.set_result(None)
        self._connection.reader_waiter = future
        return future

    def send_continue(self) -> None:
        """Tell a client that waits for a 100 (Continue) to send its body."""
        if self.awaits_continue:
            self.awaits_continue = False
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def send_interim(self, head: bytes) -> bool:
        """Send an interim response (RFC 9110, section 15.2); return whether the client can take one, and more of them.

        None goes to HTTP/1.0 (section 15.2), and none after the final head.
        """
        connection = self._connection
        if self.started or self._http10 or self.awaits_continue or self.client_gone or connection.writing_paused:
            return False
        self.interim_count += 1
        self._write(head)
        return True

    def move_to(self, connection: ResponseConnection) -> None:
        """Write to another connection from now on."""
        self._connection = connection

    # A response that is here whole ...

    def send_problem(
        self, problem: Problem, fields: bytes = b"", *, close: bool = False, render: Render = as_problem_json
    ) -> None:
        """Send a response of oncegate itself; `fields` are further ones, each line ended. `close`: then close."""
        self.closes, self.problem = self.closes or close, problem
        status, own_fields, body, is_page = render(problem, self._connection.docs_url)
        self._connection.counts.pages[""] += is_page
        body, framing = (b"", STATED) if self._head_only else (body, COUNTED)
        self.send(status, reason_of(status), own_fields + fields, body, framing)

    def send(self, status: int, reason: bytes, block: bytes, body: bytes, framing: Framing) -> None:
        """Send a whole response in one write. `block` has its fields, each line ended."""
        if self.trailers and self.takes_trailers:
            # Only a chunked body has a place for them.
            self.begin(status, reason, block, None, COUNTED)
            if body:
                self.write(body)
            self.end()
            return
        if framing.closes:
            self._end_by_closing()
        length = b"Content-Length: %d\r\n" % len(body) if framing.adds_length else b""
        self._write(b"".join((status_line(status, reason), block, length, self._connection_field(), b"\r\n", body)))
        self.started = self.finished = True

    def _connection_field(self) -> bytes:
        # A client that was not told to send its body may send the next request in its place.
        if self.closes or self._connection.is_last_response() or self.awaits_continue:
            self.closes = True
            return b"Connection: close\r\n"
        return b"Connection: keep-alive\r\n" if self._http10 else b""

    # A response that comes in pieces ...

    def begin(self, status: int, reason: bytes, block: bytes, length: int | None, framing: Framing) -> None:
        """Send the head of a response whose body follows; `length` is the body's size in bytes where it is known.

        Without a length the body is chunked, or ended by closing: for HTTP/1.0, and where `framing` says so.
        """
        if length is not None:
            self._body_end, self._bytes_left = "length", length
            framing_field = b"Content-Length: %d\r\n" % length if framing.adds_length else b""
        elif framing.closes or self._http10:
            self._end_by_closing()
            framing_field = b""
        else:
            self._body_end, framing_field = "chunked", b"Transfer-Encoding: chunked\r\n"
        self._write(b"".join((status_line(status, reason), block, framing_field, self._connection_field(), b"\r\n")))
        self.started = True

    def switch_protocols(self, block: bytes) -> None:
        """Send a 101 head. What follows is another protocol, written as it comes, until the connection closes."""
        self._end_by_closing()
        self._write(b"HTTP/1.1 101 Switching Protocols\r\n" + block + b"\r\n")
        self.started = True

    def comment_every(self, period_s: float) -> None:
        """Write a comment between the events of this response wherever it is silent for so long."""
        self._comments = EventComments(self, period_s)

    def write_between(self, data: bytes) -> None:
        """Write bytes that are no part of the response, unless the client is slow anyway."""
        if not (self.finished or self.client_gone or self.has_backlog or self._connection.writing_paused):
            self._write_body(data)
            self._connection.counts.heartbeats["comment"] += 1

    def write(self, data: bytes) -> None:
        """Write body bytes.

        The last byte of a Content-Length body is held back until `end()`: it tells the client that the response is
        complete, and the store has not confirmed yet.
        """
        self._write_body(data if self._comments is None else self._comments.note(data))

    def _write_body(self, data: bytes) -> None:
        if self._body_end == "chunked":
            if data:  # an empty chunk is the end
                self._write(b"%x\r\n%s\r\n" % (len(data), data))
            return
        if self._body_end == "length":
            self._bytes_left -= len(data)
            if self._bytes_left <= 0:
                data, self._last_byte = data[:-1], data[-1:]
        self._write(data)

    def end(self) -> None:
        """Write the end: from here on the client knows that the response is complete."""
        self._stop_comments()
        if self._body_end != "chunked":
            self._write(self._last_byte)
        elif self.trailers and self.takes_trailers:
            self._write(b"0\r\n%s\r\n" % self.trailers)
        else:
            self._write(b"0\r\n\r\n")
        self.finished = True

    def abort(self) -> None:
        """Close the connection so that the client cannot take what it has for a complete response."""
        self._stop_comments()
        transport = self._connection.transport
        if transport is None:
            return
        self.closes = True
        # A complete response to an earlier request may still wait in the batcher.
        self._connection.write_batcher.flush()
        transport.abort()
        self._connection.force_close()

    def _stop_comments(self) -> None:
        if self._comments is not None:
            self._comments.stop()

    def _end_by_closing(self) -> None:
        """Let closing be the end. A FIN is its clean form: until the body is whole, any closing resets instead."""
        self._body_end, self.closes = "close", True
        set_linger(self._connection.transport, RESET)

    @property
    def owes_clean_close(self) -> bool:
        """Whether `close_cleanly` is still due."""
        return self.finished and self._body_end == "close"

    async def close_cleanly(self) -> None:
        """Let the connection close with a FIN once the last byte has left the process."""
        if (transport := self._connection.transport) is not None:
            # From here on, there is room only when nothing is left to send.
            transport.set_write_buffer_limits(0)
            await self.wait_room()
        if not self.cut_off:
            set_linger(self._connection.transport, FIN)

    def _write(self, data: bytes) -> None:
        connection = self._connection
        transport = connection.transport
        if transport is None or transport.is_closing():
            return
        if self.closes:  # at once, as what closes the connection may come next
            connection.write_batcher.flush()
            transport.write(data)
        else:
            connection.write_batcher.write(transport, data)

    # A client that is slow ...

    @property
    def has_backlog(self) -> bool:
        """Whether so much is still unsent that no more should be fetched."""
        transport = self._connection.transport
        return transport is not None and transport.get_write_buffer_size() > WRITE_BACKLOG_BYTES

    async def wait_room(self) -> None:
        """Wait until there is room to write more, or the client is cut off."""
        while not await self.has_room():
            pass

    async def has_room(self) -> bool:
        """Wait for room to write more, for at most one window of the minimum rate; return whether there is room.

        False: not yet, but the client keeps receiving. A client that received too little in the window is cut off.
        """
        connection = self._connection
        if not connection.writing_paused and self.has_backlog:
            # The protocol is paused only once the transport has tried to write.
            await asyncio.sleep(0)
        if not connection.writing_paused or (transport := connection.transport) is None:
            return True
        before = unsent_bytes(transport)
        connection.room_waiter = asyncio.get_running_loop().create_future()
        await asyncio.wait([connection.room_waiter], timeout=connection.minimum_rate.window_s)
        if not connection.writing_paused or connection.transport is None:
            return True
        if before - unsent_bytes(transport) < connection.minimum_rate.least:
            self.cut_off = True
            self.abort()
        return self.cut_off


def response_to(message: Any, connection: ResponseConnection) -> ResponseWriter:
    """Return the writer of the response to a request, as aiohttp parsed it, whose head is not known."""
    http10 = message.version < (1, 1)
    te = () if http10 else message.headers.getall("TE", ())
    takes = takes_trailers(one.encode("latin-1", "replace") for one in te)
    # What a client sends behind an upgrade is lost with the upgrade. aiohttp's parser (3.14.5) puts the last
    # trailer of a chunked body in front of the next request's fields, so there must be no next request.
    closes = message.should_close or message.upgrade or message.chunked
    return ResponseWriter(connection, message.method == "HEAD", closes, http10, takes)
