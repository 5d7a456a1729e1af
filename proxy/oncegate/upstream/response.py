"""The response that arrives on a connection to the upstream: parsed by llhttp, or known by the bytes of its head.

httptools calls the `on_...` methods of `IncomingResponse` by their names, within `feed`. What an exception in one of
them says is the reason that `feed` returns.
"""

import httptools

from oncegate.known_heads.answers import KnownAnswers
from oncegate.messages.fields import tokens
from oncegate.messages.response_head import Interim, ResponseHead, read_response_head
from oncegate.messages.strict_head import HEAD_END, MAX_INTERIM, names_http, stated_status, strict_response
from oncegate.messages.trailers import trailer_block


class IncomingResponse:
    """The response to the request that is on a connection, as far as it has arrived.

    One object serves all requests of a connection: `begin` resets it. `head` is None until the final head has come.
    `chunks` are the bytes of the body that nobody took yet, `buffered_bytes` is their size. `has_surplus`: bytes came
    that belong to no request, so that the connection is not to be used again. `interims` came before the head.
    `trailers`: those that may be passed on, as they are written, once the response is complete.
    """

    def __init__(self) -> None:
        # `parser` is None while nothing is expected: before a request, and once its response is complete.
        self.parser: httptools.HttpResponseParser | None = None
        # A parser that read one whole response is as good as new; making one costs 0.8 us (measured).
        self._spare: httptools.HttpResponseParser | None = None
        self._was_fed = True
        self.begin(head_only=False)
        # `begin` made the parser for the first request.
        self._spare, self.parser = self.parser, None

    def _new_parser(self) -> httptools.HttpResponseParser:
        parser = httptools.HttpResponseParser(self)
        # Apache pads chunk sizes (RFC 9112, section 7.1.1, allows blanks before an extension).
        parser.set_dangerous_leniencies(lenient_spaces_after_chunk_size=True)
        return parser

    def begin(self, head_only: bool, may_switch: bool = False) -> None:
        """Expect the response to a new request. `head_only`: to HEAD. `may_switch`: it may be a 101 to WebSocket."""
        self.parser, self._spare = self._spare or self._new_parser(), None
        self._head_only, self._may_switch = head_only, may_switch
        self.head: ResponseHead | None = None
        self.chunks: list[bytes] = []
        self.buffered_bytes = 0
        self.is_complete = self.has_surplus = self.keep_alive = False
        # Whether llhttp read it to its end, too: it waits for a body after the head of a response to HEAD.
        self._is_parsed = False
        if self._was_fed:
            self._forget_parsing()

    def _forget_parsing(self) -> None:
        """Begin anew all that only `feed` changes. Most responses have a known head, and nothing of this."""
        self._was_fed = False
        self._pairs: list[tuple[bytes, bytes]] = []
        self._reason = self.trailers = b""
        # What came before the head was whole, for a head that llhttp refuses.
        self._head_pieces: list[bytes] = []
        # llhttp refused the head, which is not whole yet; and: a strict one is parsed in its place.
        self._is_doubtful = self._is_rewritten = False
        self.interims: list[Interim] = []
        # So many of them were taken.
        self._taken = 0
        self.is_switched = False

    # Responses whose head is known ...

    def take_known(self, data: bytes, known_answers: KnownAnswers) -> bytes:
        """Take the head with which `data` begins, if it is known; return what is left for `feed`.

        Nothing is left of a whole response. Otherwise, a short head that says how the body is framed stands before the
        rest of it: the parser needs no more.
        """
        known = None if self._head_only else known_answers.find(data)
        if known is None:
            return data
        head, end = known
        size = len(data) - end
        if head.length is not None and head.length < size:  # what is behind it is for the parser to judge
            return data
        self.head, self.keep_alive = head, True
        if head.length != size:
            return _framing_head(head.length) + data[end:]
        if size:
            self.chunks.append(data[end:])
            self.buffered_bytes = size
        self._is_parsed = self.is_complete = True
        # The parser saw nothing of this response.
        self._spare, self.parser = self.parser, None
        return b""

    def remember(self, data: bytes, known_answers: KnownAnswers) -> None:
        """Remember the head of a response, if it was the first thing in `data`: what is made of it depends on it alone.

        `data` was the first that came. Another request may follow on the connection, as far as this response says.
        """
        head = self.head
        if head is not None and self.keep_alive and not (head.bodiless or self.interims or self.has_surplus):
            known_answers.learn(data, head)

    # Parsing ...

    def feed(self, data: bytes) -> str:
        """Parse bytes. Return why they are no response that can be passed on, empty where they are or may be one."""
        self._was_fed, pieces = True, self._head_pieces
        if self.head is None:
            pieces.append(data)
        reason = self._parse_whole_head(data) if self._is_doubtful else self._parse(data)
        if self.head is not None:
            pieces.clear()
        if self.is_complete:
            is_clean = self._is_parsed and self.keep_alive and not self.has_surplus
            self._spare, self.parser = self.parser if is_clean else None, None
        return reason

    def _parse(self, data: bytes) -> str:
        assert self.parser is not None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._switch(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if self.head is None and not self._is_rewritten:
                return self._rewrite_head()
            self.has_surplus = True
            # An exception of a callback is the context of llhttp's own.
            return f"the upstream's answer is unusable: {error.__context__ or error}"
        return ""

    # A head that llhttp refuses ...

    def _rewrite_head(self) -> str:
        """Parse a strict head in the place of one that llhttp refused, if that can mean only one thing."""
        strict = strict_response(b"".join(self._head_pieces))
        self._is_doubtful = strict is None
        if isinstance(strict, bytes):
            self._is_rewritten, self.interims, self.parser = True, [], self._new_parser()
            return self._parse(strict)
        return f"the upstream's answer is unusable: {strict}" if strict else ""

    def _parse_whole_head(self, data: bytes) -> str:
        """Go on with a doubtful head once its end may have come: the end of a line is not worth a look at all of it."""
        before = b"".join(self._head_pieces[-3:-1])
        return self._rewrite_head() if HEAD_END.search(before[-2:] + data) else ""

    def take_interims(self) -> list[Interim]:
        """Return the interim responses that nobody took yet."""
        new, self._taken = self.interims[self._taken :], len(self.interims)
        return new

    def came_status(self) -> int:
        """Return the status that came, also in a head that cannot be used or is not whole; 0 for none."""
        return self.head.status if self.head is not None else stated_status(b"".join(self._head_pieces))

    def _switch(self, rest: bytes) -> str:
        """Begin the other protocol after a 101; `rest` are its first bytes. From now on all bytes are the body."""
        if self.head is None or self.head.status != 101:
            return "the upstream switched protocols"
        self.is_complete, self.is_switched, self.parser = False, True, None
        if rest:
            self.on_body(rest)
        return ""

    def end_by_closing(self) -> bool:
        """Return whether the end of the connection completes the response (RFC 9112, section 6.3, rule 8)."""
        if self.head is None or self.is_complete or not self.head.close_delimited:
            return False
        self.is_complete = True
        return True

    def stop(self) -> None:
        """Parse nothing more on this connection."""
        self.parser = self._spare = None

    # Callbacks of llhttp ...

    def on_message_begin(self) -> None:
        if self.is_complete:
            self.has_surplus = True
        self._pairs, self._reason, self._is_parsed = [], b"", False

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._pairs.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self.parser
        if parser is None or self.is_complete:
            return
        if self.head is not None:  # it was known
            self._pairs = []
            return
        # llhttp takes 0.9 and 2.0 as well.
        if parser.get_http_version() not in ("1.1", "1.0"):
            raise httptools.HttpParserError("another version of HTTP")
        # llhttp takes answers of RTSP and ICE as well.
        if not (self._is_rewritten or names_http(b"".join(self._head_pieces), len(self.interims))):
            raise httptools.HttpParserError("another protocol than HTTP")
        status = parser.get_status_code()
        if 100 <= status < 200 and not (status == 101 and self._may_switch):
            self.interims.append(Interim(status, self._reason, self._pairs))
            if len(self.interims) > MAX_INTERIM:
                raise httptools.HttpParserError("too many interim answers")
            return
        head = read_response_head(status, self._reason, self._pairs, self._head_only)
        if isinstance(head, str):
            raise httptools.HttpParserError(head)
        if status == 101 and tokens(head.fields.get(b"upgrade", ())) != [b"websocket"]:
            raise httptools.HttpParserError("another protocol than was asked for")
        # Fields after the final head are trailers.
        self.head, self._pairs = head, []
        # Whoever writes such a head may frame the next one differently than we read it.
        self.keep_alive = parser.should_keep_alive() and not (head.close_delimited or self._is_rewritten)
        self.is_complete = head.bodiless

    def on_body(self, data: bytes) -> None:
        # llhttp reads a body after the head of a response to HEAD, which has none (RFC 9110, section 9.3.2).
        if self.is_complete:
            self.has_surplus = True
            return
        if self.head is None:
            raise httptools.HttpParserError("an interim answer with a body")
        self.chunks.append(data)
        self.buffered_bytes += len(data)

    def on_message_complete(self) -> None:
        self._is_parsed = True
        if self.head is not None:
            if self._pairs and not self.is_complete:
                self.trailers = trailer_block(self._pairs, self.head.fields)
            self.is_complete = True


def _framing_head(length: int | None) -> bytes:
    """Return a head that says no more than how the body is framed; `length` None: it is chunked."""
    framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    return b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % framing
