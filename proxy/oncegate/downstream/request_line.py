"""A request line with bytes beyond ASCII, which real clients send and llhttp refuses."""

from typing import Any

# What the parser is shown in the place of such a byte: a small letter, which turns nothing into a method, version or
# scheme.
_STAND_INS = bytes(code if code < 128 else ord("x") for code in range(256))


class RequestLine:
    """The line of a connection's next request, as far as it came, if it is not ASCII or comes in parts.

    `is_open`: its end is still to come.
    """

    __slots__ = ("is_open", "line")

    def __init__(self) -> None:
        self.line, self.is_open = b"", False

    def hide(self, data: bytes) -> bytes:
        """Keep the line that `data` begins with or goes on with; return `data` with the line in ASCII."""
        line, end, rest = data.partition(b"\n")
        self.line += line
        self.is_open = not end
        return line.translate(_STAND_INS) + end + rest

    def restore(self, message: Any) -> Any:
        """Return the parsed request with its real target, and forget the line."""
        line, self.line, self.is_open = self.line, b"", False
        if line.isascii():
            return message
        target = b" ".join(line.split(b" ")[1:-1]).strip(b" ")
        return message._replace(path=target.decode("utf-8", "surrogateescape"))
