"""The read half of the Durable Streams protocol: queries, offsets, cursors, and its frames of events. Pure.

https://github.com/durable-streams/durable-streams/blob/main/PROTOCOL.md, sections 5.6 to 8. A response is a stream of
bytes here, of any type: messages of JSON are not told apart.
"""

import codecs
import json
import random
import re
from base64 import b64encode
from hashlib import blake2b
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

NEXT_OFFSET, UP_TO_DATE, CLOSED, CURSOR = (
    *(b"Stream-Next-Offset", b"Stream-Up-To-Date"),
    *(b"Stream-Closed", b"Stream-Cursor"),
)
LONG_POLL: Final = "long-poll"
SSE: Final = "sse"
# Of an offset, beside its sentinels: 16 digits so that offsets sort as text, and which stream it is of.
_OFFSET = re.compile(r"([0-9]{16})_([0-9a-f]{8})")
_CURSOR = re.compile(r"[0-9]{1,15}")
# Time is cut into intervals of so many seconds, counted from 2024-10-09 (section 8.1).
_INTERVAL_S, _EPOCH_S = 20, 1_728_432_000
# A cursor that the client has already grows by at most an hour.
_MOST_INTERVALS = 3600 // _INTERVAL_S
_LINE_ENDS = re.compile(r"\r\n|\r|\n")


class StreamRead(NamedTuple):
    """What a request reads: from position `start`, None for the end as of now. `live`: LONG_POLL, SSE, or empty."""

    start: int | None
    live: str
    cursor: int | None


class BadQuery(NamedTuple):
    """A query that cannot be understood, and why."""

    detail: str


def offset_at(position: int, token: bytes) -> str:
    """Return the offset of a position in the stream of a claim. It means nothing in another stream."""
    return f"{position:016d}_{blake2b(token, digest_size=4).hexdigest()}"


def stream_read(query: bytes, token: bytes) -> StreamRead | BadQuery | None:
    """Return what a query reads of the stream of a claim; None where it does not speak this protocol."""
    # A plus is a blank here, which no offset has.
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=None)
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    offsets, lives, cursors = (values.get(name, []) for name in ("offset", "live", "cursor"))
    if not offsets:
        return BadQuery("live needs an offset beside it") if lives else None
    if len(offsets) > 1 or len(lives) > 1:
        return BadQuery("offset and live come once")
    live = lives[0] if lives else ""
    if live not in ("", LONG_POLL, SSE):
        return BadQuery("live is long-poll or sse")
    cursor = int(cursors[0]) if cursors and _CURSOR.fullmatch(cursors[0]) else None
    if offsets[0] in ("-1", "now"):
        return StreamRead(0 if offsets[0] == "-1" else None, live, cursor)
    match = _OFFSET.fullmatch(offsets[0])
    if match is None or offset_at(int(match[1]), token) != offsets[0]:
        return BadQuery("the offset is not one of this stream")
    return StreamRead(int(match[1]), live, cursor)


def next_cursor(now_s: float, given: int | None) -> str:
    """Return the cursor of an answer: it grows with time, and is never one that the client has."""
    current = int(now_s - _EPOCH_S) // _INTERVAL_S
    if given is not None and given >= current:
        current = given + random.randint(1, _MOST_INTERVALS)
    return str(current)


def is_text(content_type: bytes) -> bool:
    """Return whether the events of a stream of this type carry its text as it is; base64 otherwise."""
    media_type, _, parameters = content_type.decode("latin-1").lower().partition(";")
    is_utf8 = "charset" not in parameters or "utf-8" in parameters
    return is_utf8 and (media_type.strip().startswith("text/") or media_type.strip() == "application/json")


class Frames:
    """Makes events of the bytes of a stream. `position`: up to where the stream is in the events made so far.

    A character and a line end are not cut: what has come of them waits for the rest. In an event every line end is an
    LF, as the protocol has it.
    """

    def __init__(self, position: int, token: bytes, *, is_text: bool) -> None:
        self.position, self._token, self._is_text = position, token, is_text
        self._held = b""

    def data(self, data: bytes, *, is_last: bool = False) -> bytes:
        """Return the event with the next bytes, empty while they wait. `is_last`: no more of them come."""
        data, self._held = self._held + data, b""
        if self._is_text and not is_last:
            whole = _whole(data)
            data, self._held = data[:whole], data[whole:]
        if not data:
            return b""
        self.position += len(data)
        if not self._is_text:
            return b"event: data\ndata:%s\n\n" % b64encode(data)
        lines = _LINE_ENDS.split(data.decode("utf-8", "surrogateescape"))
        # Readers take one blank off.
        text = "".join(f"data:{' ' if line.startswith(' ') else ''}{line}\n" for line in lines)
        return b"event: data\n%s\n" % text.encode("utf-8", "surrogateescape")

    def control(self, cursor: str, *, up_to_date: bool, closed: bool) -> bytes:
        """Return the event that says where the reader is."""
        said: dict[str, object] = {"streamNextOffset": offset_at(self.position, self._token)}
        if closed:
            said |= {"streamClosed": True}
        else:
            said |= {"streamCursor": cursor} | ({"upToDate": True} if up_to_date and not self._held else {})
        return b"event: control\ndata:%s\n\n" % json.dumps(said, separators=(",", ":")).encode()


def _whole(data: bytes) -> int:
    """Return how many bytes of a text end with a whole character, and not within a CR LF."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder.decode(data)
    whole = len(data) - len(decoder.getstate()[0])
    return whole - 1 if whole and data[whole - 1 : whole] == b"\r" else whole
