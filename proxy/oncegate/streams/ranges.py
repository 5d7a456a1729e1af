"""Parts of a response, and whether it is still the one that the client has (RFC 9110, sections 13 and 14). Pure."""

import re
from typing import NamedTuple

from oncegate.messages.fields import Fields, only_value

# One range of bytes. Several in one field would have to be answered in several parts: they are ignored.
_RANGE = re.compile(rb"bytes[ \t]*=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)
_TAG = re.compile(rb'(?:W/)?"[^"]*"|\*')


class ByteRange(NamedTuple):
    """The bytes from `first` up to `end`, without that one."""

    first: int
    end: int

    def content_range(self, size: int) -> bytes:
        """Return the value of Content-Range, in which the last position is a part."""
        return b"bytes %d-%d/%d" % (self.first, self.end - 1, size)


class Unsatisfiable(NamedTuple):
    """No byte of the response is in the range."""


def requested_range(fields: Fields, size: int, etag: bytes) -> ByteRange | Unsatisfiable | None:
    """Return the part of a response of `size` bytes that a request wants, None for all of it.

    A malformed Range is ignored, and one whose If-Range names another response than the strong `etag`.
    """
    match = _RANGE.fullmatch(only_value(fields, b"range"))
    if match is None or (b"if-range" in fields and only_value(fields, b"if-range").strip() != etag):
        return None
    first, last = match.groups()
    if not first:
        return _suffix(int(last), size) if last else None
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        return Unsatisfiable()
    return ByteRange(int(first), min(int(last) + 1, size) if last else size)


def _suffix(length: int, size: int) -> ByteRange | Unsatisfiable | None:
    """Return the last `length` bytes. Of an empty response there is no part, and all of it is answered."""
    if not length:
        return Unsatisfiable()
    return ByteRange(max(0, size - length), size) if size else None


def is_same(fields: Fields, name: bytes, etag: bytes) -> bool | None:
    """Return whether If-Match or If-None-Match (`name`) has a tag; None where the request has no such field.

    For a tag that never changes, weak and strong comparison are one (RFC 9110, section 8.8.3.2).
    """
    if name not in fields:
        return None
    tags = _TAG.findall(b",".join(fields[name]))
    return b"*" in tags or etag in tags or (name == b"if-none-match" and b"W/" + etag in tags)
