"""The incoming side of a client's connection: bytes become requests.

aiohttp's parser reads them, one message at a time: a head up to its end, then as many bytes as its body has, and only
then the beginning of the next head. So every byte is known to belong to a line, a field or a body before the parser
sees it, wherever the bytes were cut into segments. Around the parser, heads that came before are not parsed again,
targets may have any byte, and the bytes of a head are bounded and timed.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from aiohttp import StreamReader
from aiohttp.hdrs import CONTENT_LENGTH
from aiohttp.http import HttpProcessingError, HttpRequestParser
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestPayloadError

from oncegate.buffers.write_batcher import WriteBatcher
from oncegate.downstream.body import BufferedBody
from oncegate.downstream.incoming_head import HEAD_END, IncomingHead, malformed, opens_websocket
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.protocol import ParserProtocol
from oncegate.known_heads.memo import ConnectionMemo
from oncegate.known_heads.requests import HeadCache, KnownHead, KnownRequest, is_whole
from oncegate.messages.request_head import ForwardedInfo, RequestHead
from oncegate.messages.request_ids import RequestIds
from oncegate.messages.request_line import NOT_WELL_FORMED, HeadLimits, Malformed, usual_line_bytes
from oncegate.observe.outcome import ClientCounts, Observe

# What is due before the next message begins, where no number of bytes tells: a head's end came not yet, or no further
# request is taken.
IN_HEAD, NO_NEXT = -1, -2
# A parser keeps the head that it parsed last. One over this size is not kept by an idle connection.
KEPT_HEAD_BYTES = 4096
# Of the requests that wait for their turn, with their bodies, and their number: no more of them are read.
MAX_QUEUED_BYTES, MAX_QUEUED = 65536, 32
# Of a body that waits for its reader; at most twice as much is buffered.
READ_BYTES = 65536
# The beginning of a field that the parser must not see.
_UPGRADE = re.compile(rb"\nu(?=pgrade:)", re.IGNORECASE)
_EMPTY_LINES = re.compile(rb"[\r\n]*")


class ConnectionOwner(Protocol):
    """The listener, as far as its connections deal with it."""

    loop: asyncio.AbstractEventLoop
    write_batcher: WriteBatcher
    handler: Callable[[Any], Awaitable[None]]
    head_cache: HeadCache
    minimum_rate: MinimumRate
    observe: Observe
    retiring: bool
    docs_url: str
    head_limits: HeadLimits
    request_ids: RequestIds
    linger_s: float
    counts: ClientCounts

    def add(self, connection: Any) -> bool: ...

    def forget(self, connection: Any) -> None: ...

    def forwarded_info(self, peername: Any, is_tls: bool) -> ForwardedInfo: ...


class RequestReader(ParserProtocol):
    """Reads the requests of one connection.

    `memo` is what they have in common, `head_since_s` when the head that is on its way began (the loop's time). The
    parser is made for the first head that is not known, and the task for the first request.
    """

    __slots__ = (
        "_body", "_close", "_due", "_force_close", "_half_closed", "_has_begun", "_head", "_head_bytes",
        "_ignores_more", "_loop", "_messages", "_queued_bytes", "_rest", "_task", "_waiter", "_whole_segment",
        "head_since_s", "memo", "owner",
    )  # fmt: skip

    def __init__(self, owner: ConnectionOwner) -> None:
        super().__init__()
        self.owner, self._loop = owner, owner.loop
        self.memo = ConnectionMemo(owner.head_cache.key_label)
        self.head_since_s: float | None = None
        # Bytes of the newest message to come (0: the next byte surely begins one); of the head that was parsed last.
        self._due = self._head_bytes = 0
        # The head that is on its way, if any.
        self._head: IncomingHead | None = None
        # The requests that wait for their turn, with their bodies; what waits behind them; how many bytes they have.
        self._messages: list[tuple[Any, StreamReader | BufferedBody]] = []
        self._rest, self._queued_bytes = b"", 0
        # The newest segment, if it began with a message while nothing was being answered.
        self._whole_segment = b""
        # Whether the client closed its side, and whether more came behind the last request that is taken.
        self._half_closed = self._ignores_more = False
        self._body: StreamReader | BufferedBody | None = None  # of the last request whose head came
        # Whether a request came. Answers them, while there is a connection; and done when the next one has come.
        self._has_begun = False
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        # Nothing further is read; and: nor is anything answered.
        self._close = self._force_close = False

    async def start(self) -> None:
        """Answer the requests."""
        raise NotImplementedError

    @property
    def _is_idle(self) -> bool:
        """Whether nothing is being answered."""
        return not self._has_begun or (self._waiter is not None and not self._waiter.done())

    def _add(self, message: Any, content: StreamReader | BufferedBody) -> None:
        """Let a request, or what came in its place, be answered in its turn."""
        self._messages.append((message, content))
        if not self._has_begun:
            self._has_begun, self._task = True, self._loop.create_task(self.start())
        elif (waiter := self._waiter) is not None and not waiter.done():
            waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        # As `_is_idle`, without its frame: every request comes here.
        is_idle = not self._has_begun or ((waiter := self._waiter) is not None and not waiter.done())
        begins = is_idle and not self._due
        if begins and (known := self.owner.head_cache.find(data, self.memo.key_label)) is not None:
            self._take_known(known)
            return
        self._whole_segment = data if begins else b""
        if self._force_close or self._close:
            return
        self._receive(data)
        if self._due == IN_HEAD and is_idle and not self._messages and self.head_since_s is None:
            self.head_since_s = self._loop.time()

    def _take_known(self, request: KnownRequest) -> None:
        """Take a request under a known head, which the parser need not see."""
        if self._force_close or self._close:
            return
        known, values, data = request
        self._body = body = BufferedBody(known, values, data)
        if known.message.should_close:
            self._due = NO_NEXT
        self._add(known.message, body)

    def remember_head(self, message: Any, head: RequestHead) -> KnownHead | None:
        """Remember the head of the newest request, which passed all checks, if it may come again."""
        segment, self._whole_segment = self._whole_segment, b""
        cache = self.owner.head_cache
        if not (cache.enabled and segment and is_whole(segment, message, head)):
            return None
        known = cache.store(segment, message, head)
        if known is not None:
            self.memo.key_label = cache.key_label
        return known

    def _receive(self, data: bytes) -> None:
        """Give the parser what came, message by message, as long as there is room for more requests."""
        if not data:  # after a pause, in which the parser kept what it had
            self._continue(data)
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, size = 0, len(data)
        while at < size:
            due = self._due
            if due > 0:
                part = data[at : at + due]
                at += len(part)
                self._due = due - len(part)
                self._parse(part)
            elif due == NO_NEXT:
                self._continue(data[at:])
                return
            elif not self._messages or due == IN_HEAD or self._has_room():
                at = self._take_head(data, at)
            else:
                self._rest = data[at:]
                self._pause_for_buffer()
                return

    def _has_room(self) -> bool:
        """Return whether one more request may wait for its turn, with those that do."""
        return self._queued_bytes <= MAX_QUEUED_BYTES and len(self._messages) < MAX_QUEUED

    def _read_on(self) -> None:
        """Take what waited behind the requests that waited, which are being answered now, and read on."""
        if self._rest:  # else it was taken when a body was read on
            self.data_received(b"")
        if not self._rest:
            self._resume_for_buffer()

    def _take_head(self, data: bytes, at: int) -> int:
        """Take what `data` has of the next head from `at` on; return where that ends."""
        if self._head is None:
            if data[at] in b"\r\n":
                at = skip_empty_lines(data, at)
            limits = self.owner.head_limits
            end = data.find(HEAD_END, at, at + limits.head_bytes) + len(HEAD_END)
            if end >= len(HEAD_END) and 0 < usual_line_bytes(data, at) <= limits.line_bytes:  # as nearly all come
                self._head_bytes = end - at
                shown = data[at:end]
                self._take_message(self._parse(shown), shown)
                return end
            if at == len(data):
                return at
            self._head, self._head_bytes, self._due = IncomingHead(limits), 0, IN_HEAD
        head = self._head
        size, shown = head.take(data[at : at + self.owner.head_limits.head_bytes])
        self._head_bytes += size
        messages = self._parse(shown) if shown else ()
        if head.refused is not None and self._due != NO_NEXT:
            self.refuse_message(head.refused)
        elif head.is_whole:
            self._head = None
            messages = [(head.restore(message), content) for message, content in messages]
            self._take_message(messages, b"".join(head.shown))
        return at + size

    def _take_message(self, messages: Sequence[tuple[Any, StreamReader]], shown: bytes) -> None:
        """Take the request whose head is whole now. `shown` is what the parser saw of it."""
        if not messages:
            if self._due != NO_NEXT:  # the beginning of HTTP/2, of which the parser wants more
                self.refuse_message(NOT_WELL_FORMED)
            return
        message, self._body = messages[0]
        if message.upgrade and message.method != "CONNECT" and not opens_websocket(message, self._body):
            message = self._ignore_upgrade(message, shown)
        if not self._messages:
            self._queued_bytes = 0
        self.head_since_s = None
        self._add(message, self._body)
        if message.should_close or message.upgrade or message.chunked:  # see ResponseWriter.closes
            self._due = NO_NEXT
        else:
            self._due = 0 if self._body is EMPTY_PAYLOAD else int(message.headers[CONTENT_LENGTH])
            self._queued_bytes += self._head_bytes + self._due

    def _ignore_upgrade(self, message: Any, shown: bytes) -> Any:
        """Return a request without its wish for another protocol, which may be ignored (RFC 9110, section 7.8).

        A parser that saw the wish drops what comes behind the request, so another one reads the body and goes on.
        """
        self._parser, self._upgraded, self._message_tail = self._new_parser(), False, b""
        ((_, self._body),) = self._parse(_UPGRADE.sub(b"\nx", shown))
        return message._replace(upgrade=False)

    def _continue(self, data: bytes) -> None:
        """Take more of the body, or of the other protocol, that the newest request has begun, and of nothing else."""
        if self._upgraded or self._taker is not None:
            self._take_other(data)
        elif self._body is not None and not self._body.is_eof():
            self._parse(data)
        else:
            self._ignores_more = self._ignores_more or bool(data)

    def _parse(self, data: bytes) -> Sequence[tuple[Any, StreamReader]]:
        """Return what the parser makes of bytes. Where they are malformed, that is answered in its turn."""
        if self._parser is None:
            self._parser = self._new_parser()
        messages: Sequence[tuple[Any, StreamReader]]
        try:
            messages, self._upgraded, self._message_tail = self._parser.feed_data(data)
        except HttpProcessingError as error:
            self.refuse_message(malformed(error, b"".join(self._head.shown) if self._head else data))
            return ()
        return messages

    def refuse_message(self, malformed: Malformed) -> None:
        """Let the newest message be refused in its turn, and ignore whatever is behind it."""
        self._due, self._head, self.head_since_s = NO_NEXT, None, None
        refused: Any = (malformed, EMPTY_PAYLOAD)
        if self._body is None or self._body.is_eof():
            self._add(*refused)
        elif self._messages and self._messages[-1][1] is self._body:
            # The body of a request that nobody has begun to answer.
            self._messages[-1] = refused
        else:
            self._end_body()

    def _go_idle(self) -> None:
        """Time the head that began behind a request, from now on, and keep nothing of one that was large."""
        if self._due == IN_HEAD:
            self.head_since_s = self._loop.time()
        elif self._head_bytes > KEPT_HEAD_BYTES and self._parser is not None:
            self._head_bytes, self._parser = 0, None

    def _new_parser(self) -> HttpRequestParser:
        limits = self.owner.head_limits
        return HttpRequestParser(
            self,  # type: ignore[arg-type]  # as much of aiohttp's protocol as its parser and bodies use
            self._loop,
            READ_BYTES,
            max_line_size=limits.line_bytes,
            max_field_size=limits.line_bytes,
            max_headers=limits.fields,
            payload_exception=RequestPayloadError,
            auto_decompress=False,
        )

    def _end_body(self) -> None:
        """Wake whoever waits for more of a body that cannot become whole."""
        if self._body is not None and not self._body.is_eof():
            # aiohttp's own reading of the rest of a body takes no other exception than a TimeoutError for an end.
            self._body.set_exception(TimeoutError("the body is not well-formed"))

    def eof_received(self) -> bool | None:
        """Keep the connection for the response: the client has nothing more to say, which is not that it left."""
        if self._is_idle:
            return None
        self._half_closed = True
        self._end_body()
        self._end_other()
        # TLS has no half-closed connections.
        return self.transport is not None and self.transport.can_write_eof()


def skip_empty_lines(data: bytes, at: int) -> int:
    """Return where a head begins in `data`: RFC 9112, section 2.2, has empty lines before it ignored."""
    return _EMPTY_LINES.match(data, at).end()  # type: ignore[union-attr]  # it matches anything
