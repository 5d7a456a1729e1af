"""Where the event with an id ends, and which ids events get that have none: at any cut, whatever ends the lines."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oncegate.adaptation.event_ids import (
    MAX_FIRST_LINE_BYTES,
    MAX_ID_LINE_BYTES,
    EventSearch,
    Numbering,
    comparable,
    execution_mark,
    marked_execution,
    number_events,
)
from oncegate.messages.response_head import ResponseHead, read_response_head
from tests.conftest import searched as searches

BOM = b"\xef\xbb\xbf"
TOKEN = b"t" * 16
MARK = execution_mark(TOKEN)
MANY = searches(600)


# Streams, and another reader of them ...


def events(stream: bytes) -> Iterator[tuple[int, bytes, tuple[bytes, ...]]]:
    """Yield of each event where it ends, the id that counts behind it, and its lines: byte by byte, as the standard
    tells it, and as slow as that is."""
    at, last_id, lines, line = 3 if stream.startswith(BOM) else 0, b"", [], b""
    while at < len(stream):
        byte, at = stream[at : at + 1], at + 1
        if byte not in b"\r\n":
            line += byte
            continue
        if byte == b"\r" and stream[at : at + 1] == b"\n":
            at += 1
        if line:
            name, _, value = line.partition(b":")
            if name == b"id" and b"\0" not in value:
                last_id = value.removeprefix(b" ")
            lines, line = [*lines, line], b""
        else:
            yield at, last_id, tuple(lines)
            lines = []


def fields(stream: bytes) -> list[tuple[bytes, ...]]:
    """Return the lines of each event, without ids of ours and comments."""
    read = [tuple(one for one in lines if one[:6] != b"id: og" and one[:1] != b":") for _, _, lines in events(stream)]
    return [lines for lines in read if lines]


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def searched(parts: Iterable[bytes], wanted: bytes, *, is_over: bool = True) -> EventSearch:
    search = EventSearch(wanted)
    for part in parts:
        search.feed(part)
    if is_over:
        search.end()
    return search


def numbered(parts: Iterable[bytes], token: bytes = TOKEN) -> bytes:
    numbering = Numbering(token)
    return b"".join([*map(numbering.feed, parts), numbering.rest()])


IDS = (b"1", b"2", b" 3", b"\t4 ", "é☃".encode(), b"\xff\xfe", b"a:b", b"a\0b", b"", b"x" * 40, b"og-1", b"id")
LINES = st.one_of(
    st.sampled_from(
        (
            b"data: x",
            b"data",
            b"data:",
            b": comment",
            b":",
            b"idx: 1",
            b"event: id",
            b"retry: 10",
            b"id",
            BOM + b"id: 1",
        )
    ),
    st.sampled_from(IDS).map(lambda event_id: b"id:" + event_id),
    st.sampled_from(IDS).map(lambda event_id: b"id: " + event_id),
    st.text(max_size=6).map(lambda text: b"data: " + text.encode().replace(b"\r", b"").replace(b"\n", b"")),
)
ENDS = st.sampled_from((b"\n", b"\r\n", b"\r"))


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A stream in one kind of line ends, or in all of them mixed."""
    of_all = draw(st.one_of(ENDS, st.none()))
    lines = draw(st.lists(st.one_of(LINES, st.just(b"")), max_size=24))
    return draw(st.sampled_from((b"", BOM))) + b"".join(line + (of_all or draw(ENDS)) for line in lines)


CUTS = st.lists(st.integers(0, 400), max_size=12)


# Searching ...


@MANY
@given(stream=streams(), cuts=CUTS)
@example(stream=b"id:1\r\rdata:x\r\n\r\n", cuts=[6])
@example(stream=b"id:1\r\n\r\ndata:x\r\n\r\n", cuts=[7])
@example(stream=BOM + b"id:1\n\ndata:x\n\n", cuts=[1, 2])
@example(stream=BOM + b"\nid:1\n\n", cuts=[])
@example(stream=b"id:1\n\nid:2\n\nid:1\n\n", cuts=[])
def test_the_tail_behind_every_event(stream: bytes, cuts: list[int]) -> None:
    """Behind the first event under an id there is what a reader has not seen; an id that came back has no place."""
    read = list(events(stream))
    for wanted in {comparable(event_id) for _, event_id, _ in read} - {b""}:
        ids = [comparable(event_id) for _, event_id, _ in read]
        first = ids.index(wanted)
        run = next((at for at, event_id in enumerate(ids) if at > first and event_id != wanted), len(ids))
        search = searched(pieces(stream, cuts), wanted)
        assert search.offset == read[first][0]
        assert search.is_repeated == (wanted in ids[run:])
        tail = [lines for _, _, lines in events(stream[search.offset :])]
        # A mark at the beginning of the tail would count as that of a stream.
        if not stream[search.offset :].startswith(BOM):
            assert tail == [lines for _, _, lines in read[first + 1 :]]


@MANY
@given(stream=streams(), cuts=CUTS)
def test_only_whole_events_are_found(stream: bytes, cuts: list[int]) -> None:
    """An id of an event that has no end yet is not found; it is at once when the event ends, whatever follows."""
    read = list(events(stream))
    for size in range(len(stream) + 1):
        begun = stream[:size]
        ended = [(offset, comparable(event_id)) for offset, event_id, _ in read if offset <= size]
        for wanted in {event_id for _, event_id in ended} - {b""}:
            expected = next(offset for offset, event_id in ended if event_id == wanted)
            found = searched(pieces(begun, cuts), wanted, is_over=False).offset
            # Behind a CR at the very end may come the other half of the line's end.
            assert found == (None if expected == size and begun.endswith(b"\r") else expected)


def test_an_end_of_line_in_two_halves() -> None:
    """The LF behind a CR belongs to the event, also where it comes alone; without it the event ends at the CR."""
    search = searched([b"id: 1\r\n\r"], b"1", is_over=False)
    assert search.offset is None
    search.feed(b"\n")
    assert search.offset == 9
    assert searched([b"id: 1\r\n\r", b"data: x"], b"1", is_over=False).offset == 8
    assert searched([b"id: 1\r\n\r"], b"1").offset == 8


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        (b"7", b" 7 "),
        (b" 7\t", b"7"),
        ("Überweisung ☃".encode(), "Überweisung ☃".encode()),
        # A client reads what is no UTF-8 as U+FFFD, and sends that.
        (b"a\xffb", "a\ufffdb".encode()),
    ],
)
def test_ids_are_compared_as_they_come_back(written: bytes, sent: bytes) -> None:
    assert searched([b"id:", written, b"\n\ndata: x\n\n"], sent).offset == len(written) + 5


def test_long_events_and_long_ids() -> None:
    """A megabyte without an end of line is followed, not kept; an id that no head can carry is an id all the same."""
    long = b"id: 1\ndata: " + b"x" * 1_000_000 + b"\n\n"
    search = EventSearch(b"1")
    for at in range(0, len(long), 1000):
        search.feed(long[at : at + 1000])
        assert len(search._line) <= MAX_ID_LINE_BYTES
    assert search.offset == len(long)
    huge = b"id: " + b"x" * MAX_ID_LINE_BYTES
    assert searched([b"id: 1\n\n", huge, b"\n\nid: 1\n\n"], b"1").is_repeated
    assert searched([huge, b"\n\n"], b"x" * MAX_ID_LINE_BYTES).offset is None


def test_an_id_that_stays() -> None:
    """Events without an id of their own stand under the one before, and come again; that is no repetition."""
    stream = b"id: 1\ndata: a\n\ndata: b\n\nid: 1\ndata: c\n\nid: 2\ndata: d\n\n"
    search = searched([stream], b"1")
    assert (search.offset, search.is_repeated) == (15, False)


# Numbering ...


@MANY
@given(stream=streams(), cuts=CUTS)
@example(stream=BOM + b"data: x\r\n\r\ndata: y\r\n\r\n", cuts=[1, 2, 11, 12, 13, 14])
@example(stream=b": hello\r\rdata: x\r\r", cuts=[8, 9])
@example(stream=b"data: x" + b"x" * MAX_FIRST_LINE_BYTES + b"\r\n\r\ndata: y\r\n\r\n", cuts=[MAX_FIRST_LINE_BYTES])
@example(stream=b"d" * (MAX_FIRST_LINE_BYTES - 1) + b"\r\n\r\ndata: y\r\n\r\n", cuts=[MAX_FIRST_LINE_BYTES])
def test_numbering_does_not_depend_on_the_cuts(stream: bytes, cuts: list[int]) -> None:
    """The same stream has the same bytes, and no event but for its id is another one."""
    whole = numbered([stream])
    assert numbered(pieces(stream, cuts)) == whole
    assert numbered(stream[at : at + 1] for at in range(len(stream))) == whole
    assert fields(whole) == fields(stream)
    assert whole.startswith(BOM) == stream.startswith(BOM)


@MANY
@given(stream=streams(), cuts=CUTS)
def test_every_event_gets_the_next_number(stream: bytes, cuts: list[int]) -> None:
    """From 1 on, blocks of comments alone left out; an id of the API's own counts for its event instead."""
    count = 0
    for (_, given_id, lines), (_, _, before) in zip(
        events(numbered(pieces(stream, cuts))), events(stream), strict=True
    ):
        if all(line.startswith(b":") for line in before):
            continue
        count += 1
        own = [line for line in before if line.partition(b":")[0] == b"id" and b"\0" not in line]
        assert b"id: og-%b-%d" % (MARK, count) in lines
        assert given_id == (own[-1].partition(b":")[2].removeprefix(b" ") if own else b"og-%b-%d" % (MARK, count))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_ids_end_as_the_stream_does(end: bytes) -> None:
    """A reader that splits a stream at one kind of end alone still reads it."""
    stream = b"data: a%b%bdata: b%b%b" % (end, end, end, end)
    ids = [b"id: og-%b-%d" % (MARK, number) for number in (1, 2)]
    expected = b"%b%bdata: a%b%b%b%bdata: b%b%b" % (ids[0], end, end, end, ids[1], end, end, end)
    assert numbered([stream]) == expected


def test_nothing_waits_behind_the_first_line() -> None:
    """What has come is passed on at once, but for a beginning without a whole line."""
    numbering = Numbering(TOKEN)
    assert numbering.feed(BOM[:2]) == b""
    assert numbering.feed(BOM[2:] + b"data: a") == b""
    assert numbering.feed(b"\n") == BOM + b"id: og-%b-1\ndata: a\n" % MARK
    assert numbering.feed(b"\ndat") == b"\nid: og-%b-2\ndat" % MARK
    assert numbering.feed(b"a: b") == b"a: b"
    assert numbering.rest() == b""


def test_ids_name_their_execution() -> None:
    """Another claim's ids are known as such, and ids of the API's own are none of these."""
    assert execution_mark(b"u" * 16) != MARK
    assert marked_execution(b" og-%b-17 " % MARK) == MARK
    for other in (b"", b"17", b"og-%b-0" % MARK, b"og-%b" % MARK, b"og-%b-1x" % MARK, b"x" + b"og-%b-1" % MARK):
        assert marked_execution(other) is None


def test_the_head_of_numbered_events() -> None:
    """It says nothing of the bytes that came, and has no length; all other fields stay as they were."""
    pairs = [
        (b"Content-Type", b"text/event-stream"),
        (b"Content-Length", b"7"),
        (b"ETag", b'"a"'),
        (b"Repr-Digest", b"sha-256=:x:"),
        (b"Trailer", b"Content-Digest, X-Sum"),
        (b"X-Own", b"1"),
    ]
    head = read_response_head(200, b"OK", pairs, head_only=False)
    assert isinstance(head, ResponseHead)
    given_head, numbering = number_events(head, TOKEN)
    assert numbering is not None
    assert given_head.forwarded_block == given_head.replayed_block == b"Content-Type: text/event-stream\r\nX-Own: 1\r\n"
    assert (given_head.length, given_head.close_delimited, given_head.framing.adds_length) == (None, False, True)
    assert given_head.fields[b"trailer"] == [b"x-sum"]


@pytest.mark.parametrize("more", [(b"Content-Encoding", b"gzip"), (b"Content-Encoding", b"identity, br")])
def test_coded_events_have_no_place_for_ids(more: tuple[bytes, bytes]) -> None:
    """They pass as they came, and their head says so, now and in each replay."""
    pairs = [(b"Content-Type", b"text/event-stream"), (b"ETag", b'"a"'), more]
    head = read_response_head(200, b"OK", pairs, head_only=False)
    assert isinstance(head, ResponseHead)
    given_head, numbering = number_events(head, TOKEN)
    assert numbering is None
    for block in (given_head.forwarded_block, given_head.replayed_block):
        assert b"Oncegate-Event-Ids: none; reason=coded\r\n" in block
        assert b'ETag: "a"' in block


def test_other_responses_stay_as_they_came() -> None:
    for status, kind in ((200, b"application/json"), (500, b"text/event-stream"), (204, b"text/event-stream")):
        head = read_response_head(status, b"", [(b"Content-Type", kind)], head_only=False)
        assert isinstance(head, ResponseHead)
        assert number_events(head, TOKEN) == (head, None)
