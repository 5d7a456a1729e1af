"""A request's head that comes in parts, or has a line that the parser would refuse or misread; what is wrong with one
that the parser refuses, and whether one may open a WebSocket."""

from typing import Any

from aiohttp.hdrs import SEC_WEBSOCKET_KEY, UPGRADE
from aiohttp.http import HttpProcessingError
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD

from oncegate.messages import transfer_coding
from oncegate.messages.request_line import NOT_WELL_FORMED, HeadLimits, Malformed, RequestLine, begun_line, whole_line

HEAD_END = b"\r\n\r\n"


class IncomingHead:
    """The head of a connection's next request, as far as it came.

    `is_whole`: its end came, too. `refused` says why it is not read further, None while it is. `shown` is what the
    parser was to see of it.
    """

    __slots__ = ("_begun", "_last_bytes", "_limits", "_line", "_size", "is_whole", "refused", "shown")

    def __init__(self, limits: HeadLimits) -> None:
        self.is_whole, self._size, self._limits = False, 0, limits
        self.refused: Malformed | None = None
        # The line, whole or as far as it came.
        self._line: RequestLine | None = None
        self._begun = b""
        # The beginning of the end may have come already.
        self._last_bytes = b""
        self.shown: list[bytes] = []

    def take(self, data: bytes) -> tuple[int, bytes]:
        """Return how many bytes of `data` belong to the head, and what the parser is to see of them."""
        room = self._limits.head_bytes - self._size
        end = (self._last_bytes + data[:room]).find(HEAD_END)
        self.is_whole = end >= 0
        part = data[: end + len(HEAD_END) - len(self._last_bytes) if self.is_whole else room]
        self._size += len(part)
        self._last_bytes = (self._last_bytes + part)[1 - len(HEAD_END) :]
        shown = part if self._line else self._take_line(part)
        if self.refused is None and not self.is_whole and self._size >= self._limits.head_bytes:
            self.refused = Malformed(431, "the head is too large")
        self.shown.append(shown)
        return len(part), shown

    def _take_line(self, part: bytes) -> bytes:
        """Return what the parser is to see: nothing before the line is whole and well-formed."""
        rest, end, behind = part.partition(b"\n")
        self._begun += rest + end
        if not end:
            self.refused = begun_line(self._begun, self._limits)
            return b""
        line = whole_line(self._begun, self._limits)
        if isinstance(line, Malformed):
            self.refused = line
            return b""
        self._line = line
        return line.shown + behind

    def restore(self, message: Any) -> Any:
        """Return the parsed request with its real method and target."""
        assert self._line is not None
        method, target, _ = self._line
        return message._replace(method=method.decode(), path=target.decode("utf-8", "surrogateescape"))


def opens_websocket(message: Any, body: Any) -> bool:
    """Return whether a request may be the opening of a WebSocket, behind which the client waits for its answer."""
    upgrade, is_get = message.headers.get(UPGRADE, ""), message.method == "GET" and message.version == (1, 1)
    return is_get and body is EMPTY_PAYLOAD and upgrade.lower() == "websocket" and SEC_WEBSOCKET_KEY in message.headers


def malformed(error: HttpProcessingError, data: bytes) -> Malformed:
    """Return what is wrong with bytes that the parser refused: a head, or a part of a body."""
    if isinstance(error, LineTooLong):
        return Malformed(431, "a field of the head is too long")
    if "Too many headers" in error.message:
        return Malformed(431, "the head has too many fields")
    # llhttp says this where chunked is not among the codings.
    if "Request has invalid `Transfer-Encoding`" in error.message and transfer_coding.are_unknown(
        transfer_coding.values_in(data)
    ):
        return Malformed(501, transfer_coding.UNKNOWN)
    return NOT_WELL_FORMED
