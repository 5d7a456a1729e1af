"""The incoming side of a client's connection: bytes become requests.

aiohttp's parser reads them. Around it, heads that came before are not parsed again, targets may have any byte, and the
bytes of a head are bounded and timed.
"""

import asyncio
from typing import Any, Protocol

from aiohttp import StreamReader
from aiohttp.http import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from oncegate.downstream.body import BufferedBody
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.request_line import RequestLine
from oncegate.known_heads.memo import ConnectionMemo
from oncegate.known_heads.requests import HeadCache, KnownHead, KnownRequest, is_whole
from oncegate.messages.fields import MAX_HEAD_BYTES
from oncegate.messages.request_head import ForwardedInfo, RequestHead
from oncegate.observe.outcome import Observe


class ConnectionOwner(Protocol):
    """The listener, as far as its connections deal with it."""

    head_cache: HeadCache
    minimum_rate: MinimumRate
    observe: Observe
    retiring: bool
    docs_url: str

    def has_room(self) -> bool: ...

    def forwarded_info(self, peername: Any, is_tls: bool) -> ForwardedInfo: ...

    def refuse_head(self, connection: Any, status: int, detail: str) -> None: ...


class RequestReader(RequestHandler):
    """Reads the requests of one connection.

    `memo` is what they have in common, `head_since_s` when the head that is on its way began (the loop's time).
    """

    __slots__ = (
        "_body", "_half_closed", "_head_bytes", "_line", "_next_head_begun", "_parser_is_empty", "_whole_segment",
        "head_since_s", "memo", "owner",
    )  # fmt: skip

    def __init__(self, owner: ConnectionOwner, **kwargs: Any) -> None:
        super().__init__(owner, **kwargs)  # type: ignore[arg-type]  # aiohttp's Server
        self.owner = owner
        self.memo = ConnectionMemo(owner.head_cache.key_label)
        self.head_since_s: float | None = None
        self._head_bytes = 0
        # The next head began while a request is being answered.
        self._next_head_begun = False
        self._line = RequestLine()
        # The parser surely holds nothing of a next request, as it was given whole ones alone; and the newest of them.
        self._parser_is_empty = True
        self._whole_segment = b""
        self._half_closed = False
        # The body of the last request whose head came.
        self._body: StreamReader | BufferedBody | None = None

    def data_received(self, data: bytes) -> None:
        if self._request_count and (self._waiter is None or self._waiter.done()):
            self._receive_behind(data)
            return
        if self._parser_is_empty and (known := self.owner.head_cache.find(data, self.memo.key_label)) is not None:
            self._take_known(known)
            return
        self._parser_is_empty, self._whole_segment = False, data if self._parser_is_empty else b""
        if self._line.is_open or (self.head_since_s is None and not data.isascii()):
            data = self._line.hide(data)
        if self._parse(data):
            self.head_since_s = None
            if self._line.line:
                self._restore_target()
            self._note_newest()
        elif data:
            self._begin_head(data)

    def _parse(self, data: bytes) -> bool:
        """Parse bytes while nothing is being answered; return whether a request, or a malformed one, is complete.

        In the place of aiohttp's own method, which provides for a body or another protocol to go on here.
        """
        if self._force_close or self._close or self._parser is None:
            return False
        try:
            messages, self._upgraded, self._message_tail = self._parser.feed_data(data)
        except HttpProcessingError as error:
            messages = [(_ErrInfo(400, error.with_traceback(None), error.message), EMPTY_PAYLOAD)]
        if messages:
            self._messages.extend(messages)
            self._request_count += len(messages)
            wake(self._waiter)
            if len(self._messages) >= self._max_msg_queue_size and not self._buffer_paused:
                self._pause_reading_for_buffer()
        return bool(messages)

    def _take_known(self, known: KnownRequest) -> None:
        """Take a request under a known head, which the parser need not see."""
        if self._force_close or self._close:
            return
        self._body = body = BufferedBody(known.body)
        self._messages.append((known, body))  # type: ignore[arg-type]  # its own loop reads them
        self._request_count += 1
        wake(self._waiter)

    def remember_head(self, message: Any, head: RequestHead) -> KnownHead | None:
        """Remember the head of the newest request, which passed all checks, if it may come again."""
        segment, self._whole_segment = self._whole_segment, b""
        cache = self.owner.head_cache
        if not (cache.enabled and segment and is_whole(segment, message, head)):
            return None
        self._parser_is_empty = True
        known = cache.store(segment, message, head)
        if known is not None:
            self.memo.key_label = cache.key_label
        return known

    def _begin_head(self, data: bytes) -> None:
        """Count the bytes of an incomplete head. aiohttp bounds its fields alone: 128 of 16 KiB."""
        if self.head_since_s is None:
            self.head_since_s, self._head_bytes = self._loop.time(), 0
            if not self._line.line:
                self._line.hide(data)
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.owner.refuse_head(self, 431, "the head is too large")

    def _receive_behind(self, data: bytes) -> None:
        """Take bytes while a request is being answered: more of its body, or requests behind it."""
        self._parser_is_empty, self._whole_segment = False, b""
        count, body_is_whole = self._request_count, self._body is None or self._body.is_eof()
        super().data_received(data)
        if self._request_count > count:
            self._note_newest()
        self._next_head_begun = body_is_whole and self._request_count == count

    def _restore_target(self) -> None:
        """Give the newest request its real target back."""
        message, content = self._messages[0]
        restored = self._line.restore(message) if not isinstance(message, _ErrInfo) else message
        self._messages[0] = (restored, content)

    def _note_newest(self) -> None:
        """Note the newest request's body; framing that turned out to be broken ends the one before it."""
        message, content = self._messages[-1]
        if isinstance(message, _ErrInfo):
            self._end_body()
        else:
            self._body = content

    def _end_body(self) -> None:
        """Wake whoever waits for more of a body that cannot become whole."""
        if self._body is not None and not self._body.is_eof():
            # aiohttp's own reading of the rest of a body takes no other exception than a TimeoutError for an end.
            self._body.set_exception(TimeoutError("the body is not well-formed"))

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the response: the client has nothing more to say, which is not that it left."""
        if not self._request_count or (self._waiter is not None and not self._waiter.done()):
            # No request is unanswered.
            return None
        self._half_closed = True
        self._end_body()
        if self._payload_parser is not None:
            self._payload_parser.feed_eof()
        # TLS has no half-closed connections.
        return not self.ssl_context


def wake(future: "asyncio.Future[None] | None") -> None:
    """Let whoever waits for a future go on, if anybody does."""
    if future is not None and not future.done():
        future.set_result(None)
