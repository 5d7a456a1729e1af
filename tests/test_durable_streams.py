"""The read half of Durable Streams: queries, offsets, cursors, and events."""

import json
import re
from base64 import b64decode

import pytest

from oncegate.streams.durable_streams import (
    BadQuery,
    Frames,
    StreamRead,
    is_text,
    next_cursor,
    offset_at,
    stream_read,
)

TOKEN, OTHER = b"t" * 16, b"u" * 16


@pytest.mark.parametrize(
    ("query", "wish"),
    [
        (b"", None),
        (b"x=1", None),
        (b"cursor=3", None),
        (b"offset=-1", StreamRead(0, "", None)),
        (b"offset=now", StreamRead(None, "", None)),
        (b"offset=-1&live=sse", StreamRead(0, "sse", None)),
        (b"live=long-poll&cursor=12&offset=now", StreamRead(None, "long-poll", 12)),
        (b"offset=-1&cursor=x", StreamRead(0, "", None)),
        (b"offset=" + offset_at(7, TOKEN).encode(), StreamRead(7, "", None)),
    ],
)
def test_what_a_query_reads(query, wish):
    assert stream_read(query, TOKEN) == wish


@pytest.mark.parametrize(
    "query",
    [
        b"live=sse",
        b"live=long-poll",
        b"offset=",
        b"offset=0",
        b"offset=0,1",
        b"offset=0%201",
        b"offset=0+1",
        b"offset=-1&offset=-1",
        b"offset=-1&live=poll",
        b"offset=-1&live=sse&live=sse",
        b"offset=NOW",
        b"offset=" + offset_at(7, OTHER).encode(),
        b"offset=" + offset_at(7, TOKEN).encode()[1:],
        b"offset=" + offset_at(7, TOKEN).upper().encode() + b"X",
        b"offset=%ff",
    ],
)
def test_what_is_refused(query):
    assert isinstance(stream_read(query, TOKEN), BadQuery)


def test_offsets_sort_as_text_and_name_their_stream():
    offsets = [offset_at(position, TOKEN) for position in (0, 9, 10, 99, 100, 10**12)]
    assert offsets == sorted(offsets)
    assert not any(re.search(r"[,&=?/]", offset) for offset in offsets)
    assert offset_at(9, OTHER) != offset_at(9, TOKEN)


def test_a_cursor_is_never_one_that_the_client_has():
    now_s = 1_800_000_000.0
    first = int(next_cursor(now_s, None))
    assert int(next_cursor(now_s + 20, None)) == first + 1
    for given in (first, first + 1, first + 1000):
        assert given < int(next_cursor(now_s, given)) <= given + 180
    assert int(next_cursor(now_s, first - 1)) == first


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        (b"text/plain", True),
        (b"Text/Event-Stream; charset=UTF-8", True),
        (b'application/json;charset="utf-8"', True),
        (b"text/plain; charset=latin-1", False),
        (b"application/x-ndjson", False),
        (b"application/octet-stream", False),
        (b"", False),
    ],
)
def test_which_types_are_text(content_type, text):
    assert is_text(content_type) is text


def read_events(raw: bytes) -> list[tuple[str, str]]:
    """Return the events as a reader of the protocol takes them."""
    found = []
    for block in raw.decode("utf-8", "surrogateescape").split("\n\n"):
        lines = block.split("\n")
        name = next((line[6:].strip() for line in lines if line.startswith("event:")), "")
        data = "\n".join(line[5:].removeprefix(" ") for line in lines if line.startswith("data:"))
        if name:
            found.append((name, data))
    return found


TEXTS = (
    "plain",
    "line1\nline2\n\nline4\n",
    " a blank first\n  two",
    "data: x\n\nevent: control\ndata: {}\n\n",
    "grüße 漢字 🎈 ende",
    "\n\n\n",
    ":comment\nid: 3\n",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_whole_however_it_is_cut(text):
    data = text.encode()
    for size in (1, 2, 3, 5, 1000):
        frames, read, position = Frames(0, TOKEN, is_text=True), b"", 0
        for at in range(0, len(data), size):
            event = frames.data(data[at : at + size], is_last=at + size >= len(data))
            assert event == b"" or frames.position > position
            position = frames.position
            for name, one in read_events(event):
                assert name == "data"
                one.encode()  # no character was cut
                read += one.encode()
        assert read == data
        assert frames.position == len(data)


@pytest.mark.parametrize(
    "text", ["a\r\nb\r\n\r\nc", "a\rb\r\rc", "\r\n", "a\r", "\r\nevent: control\r\ndata: {}\r\n\r\n"]
)
def test_each_line_end_of_a_text_is_an_lf(text):
    data, wanted = text.encode(), re.sub("\r\n|\r", "\n", text)
    for size in (1, 2, 3, 1000):
        frames, read = Frames(0, TOKEN, is_text=True), ""
        for at in range(0, len(data), size):
            events = read_events(frames.data(data[at : at + size], is_last=at + size >= len(data)))
            assert {name for name, _ in events} <= {"data"}
            read += "".join(one for _, one in events)
        assert read == wanted


def test_other_types_are_base64():
    data = bytes(range(256))
    frames = Frames(10, TOKEN, is_text=False)
    [(name, text)] = read_events(frames.data(data))
    assert (name, b64decode(text)) == ("data", data)
    assert frames.position == 266
    assert frames.data(b"") == b""


def test_a_text_that_is_none_comes_at_its_end():
    frames = Frames(0, TOKEN, is_text=True)
    assert frames.data(b"a\xe2\x82") == b"event: data\ndata:a\n\n"
    assert frames.position == 1
    assert frames.data(b"", is_last=True) == b"event: data\ndata:\xe2\x82\n\n"


def test_what_control_events_say():
    frames = Frames(4, TOKEN, is_text=True)
    [(name, data)] = read_events(frames.control("5", up_to_date=True, closed=False))
    assert (name, json.loads(data)) == (
        "control",
        {"streamNextOffset": offset_at(4, TOKEN), "streamCursor": "5", "upToDate": True},
    )
    [(_, data)] = read_events(frames.control("5", up_to_date=True, closed=True))
    assert json.loads(data) == {"streamNextOffset": offset_at(4, TOKEN), "streamClosed": True}
    frames.data(b"\xe2")
    # The reader has not got all there is.
    [(_, data)] = read_events(frames.control("5", up_to_date=True, closed=False))
    assert "upToDate" not in json.loads(data)
