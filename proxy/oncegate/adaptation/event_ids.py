"""The ids in a stream of server-sent events: where the event with an id ends, and ids for events without. Pure.

What the HTML standard (section 9.2.6) says and this file is built on: a line ends with CRLF, LF or CR; an empty line
ends an event; the last `id` counts for its event and for those behind it that have none; an id with a zero byte is
none; a byte order mark counts at the very beginning alone. An event that has no end yet is not dispatched.

Both classes are fed a stream in any pieces, and what they find does not depend on how it was cut.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

from oncegate.adaptation.heartbeats import DIGESTS
from oncegate.messages.fields import Pairs, tokens
from oncegate.messages.framing import CLOSING, COUNTED
from oncegate.messages.response_head import ResponseHead, read_response_head

BOM = b"\xef\xbb\xbf"
# Of the line with an id. No client could send a longer one back: it is a line of a head.
MAX_ID_LINE_BYTES = 8192
# Of the first line: as long as it has no end, it is not known how lines end.
MAX_FIRST_LINE_BYTES = 8192
# Fields about the very bytes of a body, which are others with numbers among them.
_ABOUT_BYTES = DIGESTS | {b"content-length", b"etag", b"accept-ranges"}

_LINE_END = re.compile(rb"\r\n?|\n")
_CR, _LF, _COLON = b"\r\n:"
_NUMBERED = re.compile(rb"og-([0-9a-f]{12})-[1-9][0-9]{0,17}")
# Of an event whose id is too long to be asked for. No id has a zero byte.
_UNASKABLE = b"\0"


def comparable(event_id: bytes) -> bytes:
    """Return an id as it comes back in Last-Event-ID: as UTF-8 that can be read, without white space around it."""
    return event_id.decode("utf-8", "replace").strip(" \t").encode()


class EventSearch:
    """Finds in a stream where the event with an id ends. `wanted`: as the client sent it; not empty.

    `offset`: in bytes, behind the first event under this id; None until it is certain. `is_repeated`: another id stood
    between two events with this one, so that nobody can tell which of them a client saw last.
    """

    def __init__(self, wanted: bytes) -> None:
        self._wanted, self._id = comparable(wanted), b""
        # How much of the stream was read before this piece.
        self._read = 0
        # The beginning of a line whose end has not come, and how long that is so far.
        self._line, self._line_bytes = b"", 0
        self._is_first_line, self._after_cr = True, False
        # Behind the event, unless the second half of its last line's end follows.
        self._found: int | None = None
        self._has_left = self.is_repeated = False

    @property
    def offset(self) -> int | None:
        """Where the event ends, None while that is not known."""
        return None if self._after_cr and self._found == self._read else self._found

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        at = 0
        if self._after_cr and data:
            if data[0] == _LF:
                at = 1
                self._found = self._read + 1 if self._found == self._read else self._found
            self._after_cr = False
        for end in _LINE_END.finditer(data, at):
            self._end_line(data[at : end.start()], self._read + end.end())
            at = end.end()
        self._read += len(data)
        if rest := data[at:]:
            self._line += rest[: MAX_ID_LINE_BYTES - len(self._line)]
            self._line_bytes += len(rest)
        elif data:
            self._after_cr = data[-1] == _CR

    def end(self) -> None:
        """Take note that nothing follows."""
        self._after_cr = False

    def _end_line(self, last: bytes, offset: int) -> None:
        """Take the last bytes of a line, behind which the stream is at `offset`."""
        size = self._line_bytes + len(last)
        line = self._line + last[:MAX_ID_LINE_BYTES] if self._line else last
        self._line, self._line_bytes = b"", 0
        if self._is_first_line:
            self._is_first_line = False
            if line.startswith(BOM):
                line, size = line[3:], size - 3
        if not size:
            self._end_event(offset)
        elif line.startswith(b"id"):
            name, _, value = line.partition(b":")
            if name == b"id" and b"\0" not in value:
                # One blank at most is no part of it, which trimming takes away as well.
                self._id = comparable(value) if size <= MAX_ID_LINE_BYTES else _UNASKABLE

    def _end_event(self, offset: int) -> None:
        if self._id != self._wanted:
            self._has_left = self._found is not None
        elif self._found is None:
            self._found = offset
        elif self._has_left:
            self.is_repeated = True


# Events without ids ...


def execution_mark(token: bytes) -> bytes:
    """Return what names an execution in its numbered ids, by its claim's token: 12 hexadecimal digits."""
    return blake2b(token, digest_size=6).hexdigest().encode()


def marked_execution(event_id: bytes) -> bytes | None:
    """Return the execution that a numbered id names, None for an id of the API's own."""
    numbered = _NUMBERED.fullmatch(comparable(event_id))
    return numbered[1] if numbered else None


class Numbering:
    """Gives each event of a stream an id: `og-`, the execution's mark, and the event's number from 1 on.

    The line stands before the first field of an event, so that an id of the API's own counts instead. Comments, and
    blocks of nothing else, get none. It ends as the stream's first line does: a reader that knows one end of line alone
    goes on reading.
    """

    def __init__(self, token: bytes) -> None:
        self._label, self._count = b"id: og-%b-%%d" % execution_mark(token), 0
        # The beginning, until its first line has an end.
        self._first: bytes | None = b""
        # Whether the next byte begins a line, may be the second half of a line's end, and whether the event has its id.
        self._at_line, self._after_cr, self._has_id = True, False, False

    def feed(self, data: bytes) -> bytes:
        """Return the bytes of the stream that are certain now."""
        if self._first is None:
            return self._numbered(data, 0)
        self._first += data
        end = _LINE_END.search(self._first, 0, MAX_FIRST_LINE_BYTES)
        is_open = end is None or (end.end() == len(self._first) and end[0] == b"\r")
        return b"" if is_open and len(self._first) < MAX_FIRST_LINE_BYTES else self._begin(end)

    def through(self, pass_on: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
        """Return what takes the bytes of the stream, and passes them on with the ids among them."""

        def pass_numbered(data: bytes) -> bool:
            numbered = self.feed(data)
            return pass_on(numbered) if numbered else True

        return pass_numbered

    def rest(self) -> bytes:
        """Return what was held back of a stream that has ended."""
        return b"" if self._first is None else self._begin(_LINE_END.search(self._first))

    def _begin(self, end: re.Match[bytes] | None) -> bytes:
        """Return the beginning of the stream. `end`: of its first line."""
        data, self._first = self._first or b"", None
        self._label += end[0] if end else b"\n"
        return self._numbered(data, len(BOM) if data.startswith(BOM) else 0)

    def _numbered(self, data: bytes, at: int) -> bytes:
        """Return bytes with the ids among them. Before `at` there is nothing to look at."""
        pieces, copied = [], 0
        if self._after_cr and data.startswith(b"\n"):
            at = 1
        self._after_cr = self._after_cr and not data
        while at < len(data):
            if self._at_line:
                first, self._at_line = data[at], False
                if first in (_CR, _LF):
                    self._has_id = False
                elif first != _COLON and not self._has_id:
                    self._has_id, self._count = True, self._count + 1
                    pieces += [data[copied:at], self._label % self._count]
                    copied = at
            if (end := _LINE_END.search(data, at)) is None:
                break
            at, self._at_line = end.end(), True
            self._after_cr = at == len(data) and data[-1] == _CR
        return b"".join((*pieces, data[copied:]))


# What a response says whose events have no ids of ours.
UNNUMBERED = b"Oncegate-Event-Ids: none; reason=coded\r\n"


def number_events(head: ResponseHead, token: bytes) -> tuple[ResponseHead, Numbering | None]:
    """Return the head of a response whose events get ids, and what gives them; the head says where that cannot be.

    A response that is no stream of events stays as it came.
    """
    if not is_stream(head):
        return head, None
    if is_coded(head):
        forwarded, replayed = head.forwarded_block + UNNUMBERED, head.replayed_block + UNNUMBERED
        return replace(head, forwarded_block=forwarded, replayed_block=replayed), None
    numbered = read_response_head(head.status, head.reason, without_byte_fields(head.pairs), head_only=False)
    # With fewer fields, it is as good as it was.
    assert isinstance(numbered, ResponseHead)
    framing = CLOSING if head.close_delimited else COUNTED
    return replace(numbered, close_delimited=head.close_delimited, framing=framing), Numbering(token)


def without_byte_fields(pairs: Pairs) -> list[tuple[bytes, bytes]]:
    """Return the fields of a head without those about the very bytes of its body, also where they would trail it."""
    kept = [(name, value) for name, value in pairs if name.lower() not in _ABOUT_BYTES]
    return [(name, _without_digests(value) if name.lower() == b"trailer" else value) for name, value in kept]


def _without_digests(names: bytes) -> bytes:
    return b", ".join(name for name in tokens((names,)) if name not in DIGESTS)


def is_stream(head: ResponseHead) -> bool:
    """Return whether a response is a stream of events, as readers of events take one."""
    return head.status == 200 and head.is_event_stream and not head.bodiless


def is_coded(head: ResponseHead) -> bool:
    """Return whether the bytes of a response are not those of its content."""
    return not set(tokens(head.fields.get(b"content-encoding", ()))) <= {b"identity"}
