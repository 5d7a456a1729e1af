"""The first line of a request: which ones are refused, and which the parser must not see as they came. Pure.

llhttp, the parser, refuses bytes beyond ASCII and methods that it does not know, and takes the lines of RTSP and ICE
for those of HTTP. Targets have such bytes, and a gateway passes on the methods that it does not know. So a line that is
not usual is judged here, and the parser is shown another one in its place.
"""

import re
from typing import NamedTuple

from oncegate.messages.fields import MAX_HEAD_BYTES

# The methods of HTTP that llhttp 9.3 knows, the usual ones first.
_KNOWN = (
    b"GET POST PUT PATCH DELETE HEAD OPTIONS CONNECT TRACE COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK BIND "
    b"REBIND UNBIND ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE PURGE MKCALENDAR LINK "
    b"UNLINK SOURCE QUERY"
).split()
_LONGEST_METHOD = 64
# What the parser is shown in the place of another method, and of a byte beyond ASCII: a small letter, which turns
# nothing into a method, a version or a scheme.
_STAND_IN_METHOD = b"LINK"
_STAND_INS = bytes(code if code < 128 else ord("x") for code in range(256))

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_USUAL = re.compile(rb"(?:%s) [!-~]+ HTTP/1\.[01]\r\n" % b"|".join(_KNOWN))
_BEGINNING = re.compile(rb"%s{1,%d}(?: |\Z)" % (_TOKEN, _LONGEST_METHOD))
_LONG_METHOD = re.compile(rb"%s{%d}" % (_TOKEN, _LONGEST_METHOD + 1))
# As all registered ones are.
_METHOD = re.compile(rb"[A-Z][A-Z0-9_-]*")
_LINE = re.compile(rb"(%s+) +([^\x00-\x20\x7f]+)(?: +([!-~]+))?\r\n" % _TOKEN)
_HTTP = re.compile(rb"HTTP/[0-9]\.[0-9]")


class HeadLimits(NamedTuple):
    """How large a request's head may be, in bytes: all of it, and its target and each field; and how many fields."""

    head_bytes: int = MAX_HEAD_BYTES
    line_bytes: int = 16384
    fields: int = 128


USUAL_LIMITS = HeadLimits()


class Malformed(NamedTuple):
    """What came in the place of a request: it is refused with `status`, and nothing behind it is read."""

    status: int
    detail: str


NOT_WELL_FORMED = Malformed(400, "the request is not well-formed HTTP")
LINE_TOO_LONG = Malformed(414, "the target is too long")
_UNKNOWN_METHOD = Malformed(501, "a method has a name in capital letters, of at most 64 characters")
_OTHER_PROTOCOL = Malformed(400, "the protocol is not HTTP")
OTHER_VERSION = Malformed(505, "this proxy speaks HTTP/1.0 and HTTP/1.1 only")


class RequestLine(NamedTuple):
    """A request's line that is well-formed. `shown` is what the parser gets in its place, with its end."""

    method: bytes
    target: bytes
    shown: bytes


def usual_line_bytes(data: bytes, at: int) -> int:
    """Return the size of the line that begins at `at`, with its end, if the parser may see it as it is; else 0."""
    line = _USUAL.match(data, at)
    return line.end() - at if line else 0


def begun_line(line: bytes, limits: HeadLimits) -> Malformed | None:
    """Return why a line is refused whatever follows these first bytes of it, None if it may become a request."""
    if not _BEGINNING.match(line):
        return _UNKNOWN_METHOD if _LONG_METHOD.match(line) else NOT_WELL_FORMED
    rest = line[line.find(b" ") :].lstrip(b" ") if b" " in line else b""
    end = rest.find(b" ", 0, limits.line_bytes + 1)
    return LINE_TOO_LONG if end < 0 and len(rest.rstrip(b"\r\n")) > limits.line_bytes else None


def whole_line(line: bytes, limits: HeadLimits) -> RequestLine | Malformed:
    """Return a line, which has its end, in its parts, or why it is refused (RFC 9112, section 3)."""
    if refused := begun_line(line, limits):
        return refused
    parts = _LINE.fullmatch(line)
    if parts is None:
        return NOT_WELL_FORMED
    method, target, version = parts.groups()
    if version is None:
        return OTHER_VERSION if target.startswith(b"/") else NOT_WELL_FORMED
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        return OTHER_VERSION if _HTTP.fullmatch(version) else _OTHER_PROTOCOL
    # An API that ignores their case would execute a request under a method that no key guards.
    if not _METHOD.fullmatch(method):
        return _UNKNOWN_METHOD
    shown_method = method if method in _KNOWN else _STAND_IN_METHOD
    return RequestLine(method, target, b"%s %s %s\r\n" % (shown_method, target.translate(_STAND_INS), version))
