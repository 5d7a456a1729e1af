"""One client's connection: aiohttp's request handler, with the deadlines and manners it lacks."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import StreamReader
from aiohttp.http import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from oncegate.buffers.write_batcher import write_batcher
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.messages.fields import MAX_HEAD_BYTES
from oncegate.messages.head_cache import BufferedBody, HeadCache, KnownRequest, is_whole
from oncegate.messages.problems import refusal
from oncegate.messages.request_head import ForwardedInfo, RequestHead
from oncegate.observe.outcome import Observe, Outcome, RequestReport
from oncegate.rules.identity import ScopeMemo

HEAD_S = 10.0  # for a request's head, from its first byte, or a shorter window of the clients' pace
KEEP_ALIVE_S = 75.0  # between requests

# llhttp refuses a byte beyond ASCII in a target, which real clients send: it is shown a letter in its place. A small
# one, which makes no method, version or scheme of anything.
_AS_LETTERS = bytes(code if code < 128 else ord("x") for code in range(256))

Handler = Callable[[Request], Awaitable[ResponseWriter]]


class Owner(Protocol):
    """The listener, as far as its connections deal with it; aiohttp's `Server`, too."""

    observe: Observe
    heads: HeadCache | None
    label: bytes
    retiring: bool
    docs_url: str

    def has_room(self) -> bool: ...

    def cut_off(self, connection: Any, status: int, detail: str) -> None: ...


class ClientConnection(RequestHandler):
    """One client's connection."""

    __slots__ = (
        "around_key",
        "behind",
        "body",
        "came",
        "clean",
        "familiar",
        "gone",
        "half_closed",
        "head_bytes",
        "head_since",
        "heads",
        "hop",
        "label",
        "last",
        "line",
        "line_open",
        "owner",
        "prepared",
        "retiring",
        "room",
        "write_batcher",
    )

    def __init__(self, owner: Owner, **kwargs: Any) -> None:
        super().__init__(owner, **kwargs)  # type: ignore[arg-type]  # aiohttp's Server
        self.owner = owner
        self.write_batcher = write_batcher(self._loop)
        self.head_since: float | None = None
        self.head_bytes = 0  # of it, that came in parts
        self.behind = False  # the next head has begun while a request is being answered
        self.line = b""  # the next request's, as far as it came, where it is not ASCII or came in parts
        self.line_open = False
        self.hop: ForwardedInfo | None = None  # what forwarded requests say of this side
        self.familiar: ScopeMemo | None = None
        # Of the newest request that said what came before: what was made of that, and its head for the upstream.
        self.prepared: object = None
        self.around_key = (b"", b"")
        # The heads that may come again, and how the line with a key begins in them; from the newest connection's on.
        self.heads, self.label = owner.heads, owner.label
        self.clean = True  # the parser has nothing of a next request: for sure, as it had whole ones alone
        self.came = b""  # the newest request, as it came while that was so
        self.half_closed = False
        self.last = False  # no further request is taken
        self.retiring = owner.retiring  # the next answer is the last
        self.body: StreamReader | BufferedBody | None = None  # of the last request whose head came
        self.room: asyncio.Future[None] | None = None  # somebody waits until more can be written
        self.gone: asyncio.Future[None] | None = None  # somebody waits while the client stays

    @property
    def docs_url(self) -> str:
        """Where docs/ is served, for the types of problems; empty for none."""
        return self.owner.docs_url

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self.owner.has_room():
            self.owner.observe(RequestReport(Outcome.OVERLOADED, 503, ""))
            problem = refusal(503, "too many connections")
            self.tell(ResponseWriter.closing_answer(problem))
            self.force_close()

    def data_received(self, data: bytes) -> None:
        if self._request_count and (self._waiter is None or self._waiter.done()):
            self._receive_meanwhile(data)
            return
        if self.clean and self.heads is not None and (again := self.heads.find(data, self.label)) is not None:
            self._take(again)
            return
        self.clean, self.came = False, data if self.clean else b""
        if self.line_open or (self.head_since is None and not data.isascii()):
            data = self._in_ascii(data)
        if self._feed(data):
            self.head_since = None
            if self.line:
                self._restore(self.line)
            self._look_at(*self._messages[-1])
        elif data:
            self._begin_head(data)

    def _feed(self, data: bytes) -> bool:
        """Parse what came while nothing is being answered; return whether a request is there, or what cannot be one.

        In place of aiohttp's own way, which provides for a body or another protocol to go on here.
        """
        if self._force_close or self._close or self._parser is None:
            return False
        try:
            found, self._upgraded, self._message_tail = self._parser.feed_data(data)
        except HttpProcessingError as error:
            found = [(_ErrInfo(400, error.with_traceback(None), error.message), EMPTY_PAYLOAD)]
        if found:
            self._messages.extend(found)
            self._request_count += len(found)
            self._settle(self._waiter)
            if len(self._messages) >= self._max_msg_queue_size and not self._buffer_paused:
                self._pause_reading_for_buffer()
        return bool(found)

    def _take(self, again: KnownRequest) -> None:
        """Go on with a request as the parser would, which need not see it."""
        if self._force_close or self._close:
            return
        seen, key, data = again
        self.body = body = BufferedBody(data)
        self._messages.append((Request(seen.message, body, self, seen, key), body))  # type: ignore[arg-type]
        self._request_count += 1
        self._settle(self._waiter)

    def remember(self, heads: HeadCache, message: Any, head: RequestHead) -> None:
        """Hear of the newest request, which passed all checks: remember its head for when it comes again."""
        came, self.came = self.came, b""
        if came and is_whole(came, message, head):
            self.heads, self.clean = heads, True
            if heads.wants():
                self.label = heads.keep(came, message, head) or self.label
                self.owner.heads, self.owner.label = heads, self.label

    def _begin_head(self, data: bytes) -> None:
        """Count a head that has not come to its end: aiohttp bounds its fields alone, 128 of 16 KiB."""
        if self.head_since is None:
            self.head_since, self.head_bytes = self._loop.time(), 0
            if not self.line:
                self._in_ascii(data)
        self.head_bytes += len(data)
        if self.head_bytes > MAX_HEAD_BYTES:
            self.owner.cut_off(self, 431, "the head is too large")

    def _receive_meanwhile(self, data: bytes) -> None:
        """While a request is being answered: more of its body, requests behind it, or the beginning of one."""
        self.clean, self.came = False, b""
        count, begins = self._request_count, self.body is None or self.body.is_eof()
        super().data_received(data)
        if self._request_count > count:
            self._look_at(*self._messages[-1])
        self.behind = begins and self._request_count == count

    def _in_ascii(self, data: bytes) -> bytes:
        """Return the beginning of a request with a line of ASCII alone, and remember the real one."""
        line, end, rest = data.partition(b"\n")
        self.line += line
        self.line_open = not end
        return line.translate(_AS_LETTERS) + end + rest

    def _restore(self, line: bytes) -> None:
        """Give the request its real target back."""
        self.line, self.line_open = b"", False
        message, content = self._messages[0]
        if not (line.isascii() or isinstance(message, _ErrInfo)):
            target = b" ".join(line.split(b" ")[1:-1]).strip(b" ")
            message = message._replace(path=target.decode("utf-8", "surrogateescape"))
            self._messages[0] = (message, content)

    def _look_at(self, message: object, content: StreamReader) -> None:
        """Remember the newest request's body, and end its reading when its framing turns out to be broken."""
        if isinstance(message, _ErrInfo):
            self._end_body()
        else:
            self.body = content

    def _end_body(self) -> None:
        """Wake whoever waits for more of a body that cannot become whole."""
        if self.body is not None and not self.body.is_eof():
            # A TimeoutError, because aiohttp's own reading of what is left of a body takes no other for an end.
            self.body.set_exception(TimeoutError("the body is not well-formed"))

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the answer: the client said all it had to say, not that it left."""
        if not self._request_count or (self._waiter is not None and not self._waiter.done()):
            return None  # nothing was asked, or all of it is answered
        self.half_closed = True
        self._end_body()
        if self._payload_parser is not None:
            self._payload_parser.feed_eof()
        return not self.ssl_context  # TLS has no half-closed connections

    @property
    def over(self) -> bool:
        """Whether no further request is answered: we close, or the client half-closed and asks no more."""
        return self.last or (self.half_closed and not self._messages)

    @property
    def asks_no_more(self) -> bool:
        """Whether an answer that begins now is to say that it is the last."""
        return self.over or (self.retiring and not self._messages)

    def close(self) -> None:
        """Take no further request; aiohttp's own way would drop what is still to come of a body, too."""
        self.last = True
        if self._payload_parser is not None:
            self._payload_parser.feed_eof()  # a tunnel has no end to wait for
        if self.body is None or self.body.is_eof():
            super().close()
        else:
            self._keepalive = False

    @property
    def owes(self) -> bool:
        """Whether something of an answer is still to leave the process."""
        return self.transport is not None and self.transport.get_write_buffer_size() > 0

    @property
    def stalled(self) -> bool:
        """Whether it is the client that has to move: to take its answer, or to send the rest of its request."""
        return self.owes or (self.body is not None and not self.body.is_eof())

    def abort(self) -> None:
        """Close at once, and never so that what was sent looks whole."""
        if self.transport is not None:
            self.transport.abort()
        self.force_close()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Go on reading, if it paused: aiohttp asks for it after every read, and feeds its parser nothing each time."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._settle(self.room)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._settle(self.room)
        self._settle(self.gone)

    @staticmethod
    def _settle(future: "asyncio.Future[None] | None") -> None:
        if future is not None and not future.done():
            future.set_result(None)

    async def start(self) -> None:
        """Answer one request after the other until the connection ends.

        In place of aiohttp's own loop, which makes a task and four objects more for each request that
        nothing here uses.
        """
        try:
            while not (self._force_close or self._close):
                if not self._messages:
                    await self._arrival()
                    self._waiter = None
                message, content = self._messages.popleft()
                if self._parser is not None:
                    self._parser.message_consumed()
                if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
                    self._resume_reading_if_drained()
                if isinstance(message, _ErrInfo):
                    self._refuse(message.status)
                    break
                request = message if isinstance(message, Request) else Request(message, content, self)
                self._request_in_progress, self._current_request = True, request  # type: ignore[assignment]
                try:
                    client: ResponseWriter = await self._request_handler(request)  # type: ignore[arg-type, assignment, misc]
                finally:
                    self._request_in_progress, self._current_request = False, None
                    if self._handler_waiter is not None:  # the end of the process waits for this answer
                        self._settle(self._handler_waiter)
                if client.ends_by_closing:
                    await client.close_cleanly()
                elif self.writing_paused:  # the next answer would only be heaped upon this one
                    await client.all_taken()
                self._keepalive = client.keep_alive
                if not content.is_eof():
                    await self._drop_rest(content)
                if not self._keepalive:
                    break
                self._expect_more()
        finally:
            self._task_handler = None
            if self.transport is not None:
                self.write_batcher.flush()
                self.transport.close()

    def _arrival(self) -> "asyncio.Future[None]":
        """Return what is done when the next request's head has come."""
        if self.behind:
            self.behind, self.head_since = False, self._loop.time()
        self._waiter = self._loop.create_future()
        return self._waiter

    def _refuse(self, status: int) -> None:
        """Answer what aiohttp could not parse, with nothing of it."""
        self.owner.observe(RequestReport(Outcome.REQUEST_REFUSED, status, ""))
        self.tell(ResponseWriter.closing_answer(refusal(status, "the request is not well-formed HTTP")))

    def tell(self, answer: bytes) -> None:
        """Write an answer to what is no request, behind those to requests."""
        if self.transport is not None:
            self.write_batcher.flush()
            self.transport.write(answer)

    async def _drop_rest(self, content: StreamReader) -> None:
        """Read what is left of a refused body for a while, so that its sender sees the answer; then close."""
        try:
            async with asyncio.timeout(self._lingering_time):
                while not content.is_eof() and not self._force_close:
                    await content.readany()
        except Exception:  # broken off, malformed, or too long: all the same now
            self._keepalive = False
        content.set_exception(ConnectionError("the body was dropped"))

    def _expect_more(self) -> None:
        self._next_keepalive_close_time = close_at = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_at, self._process_keepalive)
