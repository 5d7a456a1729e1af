"""One connection to the upstream, and the one request that is on it. Parsed by llhttp, never sent twice.

A request ends in exactly one of three ways, and which one is certain: NotSent (no byte of it left us),
Lost (some did, and no whole answer came), or an answer that is whole by its own framing.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import httptools

from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.write_batcher import WriteBatcher
from oncegate.messages.fields import MAX_HEAD_BYTES, tokens
from oncegate.messages.head_cache import RecentHeads
from oncegate.messages.response_head import ResponseHead, read_response_head

MAX_INTERIM = 16  # 1xx answers before the final one
JOINED_BYTES = 65536  # of a body that is copied behind its head for one write; a larger one would take twice its room
HIGH_WATER, LOW_WATER = 131072, 65536  # buffered bytes of an answer at which reading pauses and goes on


class NotSent(Exception):
    """No byte of the request left us."""


class UpstreamLost(Exception):
    """The request was sent, at least in part, and no whole answer came.

    `timeout`: it was too slow. `body`: the request's own body broke off or stalled.
    """

    def __init__(self, detail: str, timeout: bool = False, body: bool = False) -> None:
        super().__init__(detail)
        self.timeout, self.body = timeout, body


class Owner(Protocol):
    """The pool, as far as its connections deal with it."""

    loop: asyncio.AbstractEventLoop
    buffered: MemoryBudget
    write_batcher: WriteBatcher
    known: RecentHeads[ResponseHead]

    def opened(self, descriptor: int) -> None: ...

    def forget(self, connection: "Connection") -> None: ...


class Connection(asyncio.Protocol):
    """One connection, and the one request that is on it. Between requests it rests in the pool."""

    def __init__(self, pool: Owner) -> None:
        self._pool = pool
        self._loop = pool.loop
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0  # the loop's time
        self.descriptor = -1
        self.deadline = float("inf")  # the loop's time; swept by the pool
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._writing_paused = self._reading_paused = False
        self._spare: httptools.HttpResponseParser | None = None  # as good as new; making one costs 0.8 us (measured)
        self._parser: httptools.HttpResponseParser | None = None
        self._reset(head_only=False)

    def _reset(self, head_only: bool) -> None:
        self._sender: asyncio.Task[None] | None = None
        self._head_only = head_only
        self._pairs: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._head_bytes = 0
        self._interim = 0
        self._chunks: list[bytes] = []
        self.buffered = 0
        self._keep_alive = False
        self._surplus = False
        self._may_switch = self._switched = False
        self._window_over = False
        self._failure: UpstreamLost | None = None
        self.answer: ResponseHead | None = None
        self.complete = False
        self._ended = False  # by llhttp's reading, too: it waits for the body of an answer to HEAD

    # The request ...

    def _begin(self, head_only: bool) -> None:
        self._reset(head_only)
        self._parser, self._spare = self._spare or httptools.HttpResponseParser(self), None

    def _write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def send(self, head: bytes, body: bytes, head_only: bool = False) -> None:
        """Send a whole request. From here on it counts as sent."""
        self._begin(head_only)
        if self.transport is not None and not self.transport.is_closing():
            if len(body) > JOINED_BYTES:
                self.transport.writelines((head, body))
            else:
                self._pool.write_batcher.write(self.transport, head + body if body else head)

    def send_stream(self, head: bytes, body: AsyncIterator[bytes], chunked: bool, head_only: bool = False) -> None:
        """Send a request whose body comes in blocks, while its answer may already be coming."""
        self._begin(head_only)
        self._write(head)
        self._sender = self._loop.create_task(self._send_blocks(body, chunked))

    def send_upgrade(self, head: bytes) -> None:
        """Send a request that the upstream may answer by another protocol (101); then what comes is its body."""
        self._begin(head_only=False)
        self._may_switch = True
        self._write(head)

    async def write(self, data: bytes, silence_s: float) -> None:
        """Send bytes of that other protocol; they count as a sign of life."""
        await self._wait_room()
        if self.transport is not None:
            self.transport.write(data)
            self.deadline = max(self.deadline, self._loop.time() + silence_s)

    async def drained(self) -> None:
        """Wait until everything that was written has left the process."""
        while self.transport is not None and self.transport.get_write_buffer_size():
            await asyncio.sleep(0.01)

    async def _send_blocks(self, body: AsyncIterator[bytes], chunked: bool) -> None:
        try:
            async for block in body:
                await self._wait_room()
                if self.transport is None:
                    return
                self.transport.writelines((b"%x\r\n" % len(block), block, b"\r\n") if chunked else (block,))
            if chunked and self.transport is not None:
                self.transport.write(b"0\r\n\r\n")
        except Exception as error:  # the client's side broke: the upstream must not take the rest for whole
            stalled = isinstance(error, TimeoutError)
            self.fail(UpstreamLost(f"the request's body broke off: {type(error).__name__}", timeout=stalled, body=True))

    async def _wait_room(self) -> None:
        while self._writing_paused and self.transport is not None:
            self._room = self._loop.create_future()
            await self._room

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    @property
    def wholly_sent(self) -> bool:
        sent = self._sender is None or self._sender.done()
        return sent and self.transport is not None and self.transport.get_write_buffer_size() == 0

    # The answer ...

    async def head(self, silence_s: float, moved: Callable[[], None] = lambda: None) -> ResponseHead:
        """Return the head of the final answer. Raises Lost where it, or an interim one, takes longer than silence.

        `moved()` hears at the beginning and of every interim one: from then on it may take as long again.
        """
        now, until, interim = self._loop.time, 0.0, -1
        extensions = 1  # a pause of our own process may have taken the time
        while self.answer is None:
            if self._interim > interim:
                until, interim = now() + silence_s, self._interim
                moved()
            elif extensions and now() >= until:
                until, extensions = now() + silence_s, 0
            await self.arrival(until - now())
        return self.answer

    async def whole(self, most_bytes: int, window_s: float) -> bool:
        """Return whether the answer's end comes within a short window and no more than `most_bytes`."""
        self._window_over = False
        closing = self._loop.call_later(window_s, self._close_window)
        try:
            while not (self.complete or self._window_over or self.buffered > most_bytes):
                await self.arrival(float("inf"))  # the window ends it
        finally:
            closing.cancel()
        return self.is_small(most_bytes)

    def is_small(self, most_bytes: int) -> bool:
        """Return whether the answer is here whole, in no more than `most_bytes`."""
        return self.complete and self.buffered <= most_bytes

    def _close_window(self) -> None:
        self._window_over = True
        self._wake()

    async def chunk(self, silence_s: float) -> bytes:
        """Return the next bytes of the body, empty at its whole end. Raises Lost where it broke off."""
        while not self._chunks:
            if self.complete:
                return b""
            self._resume()
            await self.arrival(silence_s)
        return self.take()

    def take(self) -> bytes:
        """Return the bytes of the body that are here."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._pool.buffered.give(self.buffered)
        self.buffered = 0
        if self._reading_paused:
            self._resume()
        return data

    def arrival(self, silence_s: float) -> "asyncio.Future[None]":
        """Return what is done when something comes, or raises Lost when nothing will."""
        if self._failure is not None:
            raise self._failure
        self.deadline = self._loop.time() + silence_s
        self._waiter = self._loop.create_future()
        return self._waiter

    def _wake(self) -> None:
        self.deadline = float("inf")  # the sweep may come before the one who waits runs
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, failure: UpstreamLost) -> None:
        """End the exchange as lost, unless its answer is whole already."""
        if not self.complete and self._failure is None:
            self._failure = failure
        self.deadline = float("inf")
        if self._waiter is not None and not self._waiter.done() and self._failure is not None:
            self._waiter.set_exception(self._failure)
        self.close()

    # What comes from the socket ...

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.descriptor = transport.get_extra_info("socket").fileno()
        self._pool.opened(self.descriptor)

    def data_received(self, data: bytes) -> None:
        if self._switched:
            self.on_body(data)
            self._after_feed(len(data), body=True)
            return
        if self._parser is None:  # idle, or already whole: never the next answer
            self._surplus = True
            self._pool.forget(self)
            return
        held, begins = self.buffered, self.answer is None and not self._head_bytes
        if begins and self._came_before(data):
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:  # also what a callback of ours raised
            self._surplus = True
            self.fail(UpstreamLost(f"the upstream's answer is unusable: {error.__context__ or error}"))
        self._after_feed(len(data), body=self.buffered > held)
        if begins and self.reusable and self.answer is not None:
            self._remember(data, self.answer)

    def _came_before(self, data: bytes) -> bool:
        """Take an answer that came in one piece under a head that is known."""
        known, end = self._pool.known, data.find(b"\r\n\r\n") + 4
        head = known.find(data[:end])
        if head is None or head.length != len(data) - end or self._head_only:
            return False
        known.paid()
        self.answer, self._keep_alive = head, self.wholly_sent
        if head.length:
            self._chunks.append(data[end:])
            self.buffered = head.length
            self._pool.buffered.used += head.length
        self._ended = self.complete = True
        self._spare, self._parser = self._parser, None  # which saw nothing of it
        self._wake()
        return True

    def _remember(self, data: bytes, head: ResponseHead) -> None:
        """Remember the head of a whole answer: what is made of the next one depends on its bytes alone."""
        if head.length is not None and not head.bodiless and self._pool.known.wants():
            end = len(data) - head.length
            self._pool.known.keep(data[:end], end, head)

    def _after_feed(self, size: int, body: bool) -> None:
        # Trailers and chunk extensions count like a head: they may not come for ever without a byte of body.
        self._head_bytes = 0 if body else self._head_bytes + size
        if self.complete:
            self._spare = None if self._surplus or not self._ended or not self._keep_alive else self._parser
            self._parser = None
        elif self._head_bytes > MAX_HEAD_BYTES:
            self.fail(UpstreamLost("the upstream's head is too large"))
        elif self.buffered > (LOW_WATER if self._pool.buffered.tight else HIGH_WATER):
            self.pause()
        self._wake()

    def _switch(self, rest: bytes) -> None:
        if self.answer is None or self.answer.status != 101:
            self.fail(UpstreamLost("the upstream switched protocols"))
            return
        self.complete, self._switched, self._parser = False, True, None
        if rest:
            self.on_body(rest)

    def pause(self) -> None:
        """Read no further until more is asked for."""
        if self.transport is not None and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self._reading_paused and self.transport is not None:
            self._reading_paused = False
            self.transport.resume_reading()

    def eof_received(self) -> None:
        if self.answer is not None and self.answer.close_delimited and not self.complete:
            self._end()
            self._wake()
        self.fail(UpstreamLost("the upstream closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._parser is not None:
            self._read_tls_rest()
        self.transport = None
        self.resume_writing()
        self._pool.forget(self)
        self.fail(UpstreamLost(f"the upstream's connection broke: {exc or 'closed'}"))

    def _read_tls_rest(self) -> None:
        """Take what uvloop's TLS side still holds: it drops that when the connection ends after a pause."""
        tls = self.transport.get_extra_info("ssl_object") if self.transport is not None else None
        with contextlib.suppress(ssl.SSLError):  # wants more bytes: there was no close_notify
            while tls is not None and (data := tls.read(HIGH_WATER)):
                self.data_received(data)
            if tls is not None:
                self.eof_received()

    # What llhttp calls ...

    def on_message_begin(self) -> None:
        if self.complete:
            self._surplus = True
        self._pairs, self._reason, self._ended = [], b"", False

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.answer is None:  # after it come trailers, which are dropped
            self._pairs.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser is None or self.complete:
            return
        if parser.get_http_version() not in ("1.1", "1.0"):
            raise httptools.HttpParserError("another version of HTTP")
        status = parser.get_status_code()
        if 100 <= status < 200 and not (status == 101 and self._may_switch):
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise httptools.HttpParserError("too many interim answers")
            return
        head = read_response_head(status, self._reason, self._pairs, self._head_only)
        if isinstance(head, str):
            raise httptools.HttpParserError(head)
        if status == 101 and tokens(head.fields.get(b"upgrade", ())) != [b"websocket"]:
            raise httptools.HttpParserError("another protocol than was asked for")
        self.answer = head
        self._keep_alive = parser.should_keep_alive() and not head.close_delimited and self.wholly_sent
        if head.bodiless:
            self._end()

    def on_body(self, data: bytes) -> None:
        if self.complete:
            self._surplus = True
            return
        if self.answer is None:
            raise httptools.HttpParserError("an interim answer with a body")
        self._chunks.append(data)
        self.buffered += len(data)
        self._pool.buffered.used += len(data)

    def on_message_complete(self) -> None:
        self._ended = True
        if self.answer is not None and not self.complete:
            self._end()

    def _end(self) -> None:
        self.complete = True

    # Its end ...

    @property
    def reusable(self) -> bool:
        sound = self.complete and self._keep_alive and not self._surplus
        return sound and self.transport is not None and not self.transport.is_closing()

    def rest(self) -> None:
        """Forget the exchange, keep the connection."""
        if self.buffered:
            self.drop_body()
        if self._reading_paused:
            self._resume()  # what paused it for a slow client need not have asked for more
        self._parser = None
        self.idle_since = self._loop.time()

    @property
    def alive(self) -> bool:
        """Whether nothing is known to have come on an idle connection, and it was not closed."""
        return not (self._surplus or self.transport is None or self.transport.is_closing())

    def close(self) -> None:
        if self._sender is not None and not self._sender.done():
            self._sender.cancel()
        self._parser = self._spare = None  # what still comes is not looked at
        if self.transport is not None:
            self.transport.abort()

    def discard(self) -> None:
        """Close it for good, and let go of how it ended: an exception has the frames that have this connection."""
        self.close()
        self._failure = self._waiter = None

    def drop_body(self) -> None:
        if self.buffered:
            self._pool.buffered.give(self.buffered)
            self._chunks.clear()
            self.buffered = 0
