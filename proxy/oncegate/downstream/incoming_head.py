"""A request's head that comes in parts, or with bytes beyond ASCII in its line, which llhttp refuses."""

from typing import Any

from oncegate.messages.fields import MAX_HEAD_BYTES

HEAD_END = b"\r\n\r\n"
# What the parser is shown in the place of such a byte: a small letter, which turns nothing into a method, version or
# scheme.
_STAND_INS = bytes(code if code < 128 else ord("x") for code in range(256))


class IncomingHead:
    """The head of a connection's next request, as far as it came. `is_whole`: its end came, too."""

    __slots__ = ("_last_bytes", "_line", "_line_is_open", "_size", "is_whole")

    def __init__(self) -> None:
        self.is_whole, self._size = False, 0
        self._line, self._line_is_open = b"", True
        # The beginning of the end may have come already.
        self._last_bytes = b""

    def take(self, data: bytes) -> bytes:
        """Return the bytes of the head that `data` begins with, as many as they are, as the parser is to see them."""
        room = MAX_HEAD_BYTES - self._size
        end = (self._last_bytes + data[:room]).find(HEAD_END)
        self.is_whole = end >= 0
        part = data[: end + len(HEAD_END) - len(self._last_bytes) if self.is_whole else room]
        self._size += len(part)
        self._last_bytes = (self._last_bytes + part)[1 - len(HEAD_END) :]
        return self._hide(part) if self._line_is_open else part

    @property
    def is_too_large(self) -> bool:
        """Whether the limit is reached, and the end not."""
        return not self.is_whole and self._size >= MAX_HEAD_BYTES

    def _hide(self, part: bytes) -> bytes:
        """Keep what belongs to the line, and return `part` with the line in ASCII."""
        line, end, rest = part.partition(b"\n")
        self._line += line
        self._line_is_open = not end
        return line.translate(_STAND_INS) + end + rest

    def restore(self, message: Any) -> Any:
        """Return the parsed request with its real target."""
        if self._line.isascii():
            return message
        target = b" ".join(self._line.split(b" ")[1:-1]).strip(b" ")
        return message._replace(path=target.decode("utf-8", "surrogateescape"))
