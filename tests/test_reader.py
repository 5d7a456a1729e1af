"""Bytes become requests: however they are cut into segments, and whenever they come, they are the same requests."""

import asyncio
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncegate.downstream.request import Request
from oncegate.messages.fields import MAX_HEAD_BYTES
from tests.wire import TURNS, Segment, Side, Wire

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
# So many bytes of fields, none of them too long by itself.
LONG = [b"X-%d: %s\r\n" % (number, b"v" * 12_000) for number in range(10)]


class Patient(Side):
    """A side whose handler takes its time: it waits for whole bodies, and `turns` of the loop before it answers."""

    def __init__(self, turns: int, remembers: bool = True, window_s: float = 5) -> None:
        super().__init__(remembers, window_s)
        self._turns = turns

    async def read(self, content: Any) -> bytes | str:
        for _ in range(self._turns):
            await asyncio.sleep(0)
        body = b""
        try:
            while not content.at_eof():
                body += await content.readany()
        except Exception as error:
            return type(error).__name__
        return body


LINES = [
    *[b"POST /pay", b"GET /a", b"PUT /caf\xc3\xa9", b"PUT /\xff?\xe9", b"HEAD /a", b"POST http://a/\xc3\xa9"],
    *[b"BREW /a", b"MKROOM /caf\xc3\xa9", b"get /a", b"M" * 80 + b" /a", b"GET /a" + b"b" * 17_000],
    *[b"\r\nPOST /a", b"\r\n\r\n\r\nGET /\xc3\xa9", b"\nGET /a", b"GET /a /theirs", b"G\xc9T /a", b"GET a"],
]
FIELDS = [
    *[b"", b"X-Note: \xc3\xa9 /theirs x\r\n", b"X-Note: \xff\r\n", b"Authorization: Bearer x /pay\r\n"],
    *[b"Authorization: Bearer \xc3\xa9 /pay\r\n", b"X: \r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n"],
    *[
        b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n",
        b"X\xc3\xa9: 1\r\n",
        b"A: 1\nB: 2\r\n",
        b"Host: b\r\n",
    ],
    *[b"Idempotency-Key: k\r\n", b"".join(LONG[:5]), b"".join(LONG)],
]
BODIES = [None, None, b"", b"{}", b"\r\n\r\n", b"\xc3\xa9 /theirs x\r\n\r\n", GET, b"\r\n" + GET * 3, b"x" * 200_000]
ORDINARY = st.sampled_from([0] * 8 + [*range(18)])


@st.composite
def asked(draw: st.DrawFn) -> bytes:
    """Return a request, by length or in chunks; some are odd, some malformed."""
    line, field = LINES[draw(ORDINARY) % len(LINES)], FIELDS[draw(ORDINARY) % len(FIELDS)]
    version = draw(
        st.sampled_from(
            [b" HTTP/1.1\r\n"] * 12 + [b" HTTP/1.0\r\n", b" HTTP/2.0\r\n", b"\r\n", b" RTSP/1.0\r\n", b" HTTP/1.1\n"]
        )
    )
    body, framing = draw(st.sampled_from(BODIES)), b""
    if body is not None and draw(st.integers(0, 7)):
        framing = b"Content-Length: %d\r\n" % len(body)
    elif body:
        framing, body = b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\nA: 1\r\n\r\n" % (len(body), body)
    elif body is not None:
        framing, body = b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"
    return b"".join((line, version, b"Host: a\r\n", field, framing, b"\r\n", body or b""))


@st.composite
def cut(draw: st.DrawFn) -> tuple[list[bytes], list[Segment], int, bool]:
    """Return requests, the segments that their bytes come in, how slowly they are answered, and the cache's state."""
    pool = draw(st.lists(asked(), min_size=1, max_size=4))
    requests = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=6))
    whole = b"".join(requests)
    # Nearly all that can go wrong goes wrong near an end.
    edges = [0]
    for one in requests:
        head = one.find(b"\r\n\r\n", len(one) - len(one.lstrip(b"\r\n")))
        edges += [edges[-1] + (head if head >= 0 else 0), edges[-1] + len(one)]
    places = [
        min(max(draw(st.sampled_from(edges)) + draw(st.integers(-5, 8)), 0), len(whole))
        if draw(st.booleans())
        else draw(st.integers(0, len(whole)))
        for _ in range(draw(st.integers(0, 9)))
    ]
    pieces = [whole[one:two] for one, two in pairwise(sorted({0, *places, len(whole)}))]
    segments: list[Segment] = [
        (0, piece, "at once") if draw(st.integers(0, 2)) else (0, piece) for piece in pieces if piece
    ]
    return requests, segments, draw(st.sampled_from([0, 0, 3, 40])), draw(st.booleans())


async def taken(segments: Sequence[Segment], turns: int, remembers: bool) -> tuple[list[Any], list[Any]]:
    """Return what the handler saw of these segments, and what the client was told."""
    side = Patient(turns, remembers)
    told = await side.take([*segments, *[(0, b"")] * 2 * turns])
    return side.saw, told


def test_requests_are_the_same_wherever_their_bytes_are_cut():
    """Any sequence of requests, cut anywhere, gives what it gives when each comes in a segment of its own."""

    met: Counter[str] = Counter()

    @settings(max_examples=600, deadline=None, database=None, derandomize=True)
    @given(cut())
    def compare(drawn: tuple[list[bytes], list[Segment], int, bool]) -> None:
        requests, segments, turns, remembers = drawn
        saw, told = asyncio.run(taken([(0, one) for one in requests], 0, True))
        assert asyncio.run(taken(segments, turns, remembers)) == (saw, told)
        met["several"] += len(saw) > 2
        met["beyond ASCII"] += any(isinstance(one, tuple) and not one[1].isascii() for one in saw[1:])
        met["431"] += b"HTTP/1.1 431" in told[0][0]
        met["400 behind 200"] += b"HTTP/1.1 200" in told[0][0] and b"HTTP/1.1 400" in told[0][0]

    compare()
    assert min(met[name] for name in ("several", "beyond ASCII", "431", "400 behind 200")) > 5, met


@pytest.mark.parametrize("value", [b"\xc3\xa9 /theirs x", b"\xff", b"Bearer \xc3\xa9 /pay"])
@pytest.mark.parametrize("turns", [0, 20])
async def test_bytes_that_come_later_do_not_change_a_request(value, turns):
    """A field that is cut before a byte above 127, while the request before it is answered, stays this field."""
    begun = b"PUT /mine HTTP/1.1\r\nHost: a\r\nAuthorization: "
    side = Patient(turns)
    ((told, _),) = await side.take([(0, GET + begun), *[(0, b"")] * 3, (0, value + b"\r\n\r\n"), *[(0, b"")] * 3])
    assert told.count(b"HTTP/1.1 200 OK") == 2
    method, target, *_, fields, body = side.saw[1]  # type: ignore[misc]
    assert (method, target, fields[b"authorization"], body) == ("PUT", b"/mine", [value], b"")


# Limits ...


class Holding(Side):
    """A side whose handler answers once `go` is set."""

    def __init__(self, window_s: float = 5) -> None:
        super().__init__(True, window_s)
        self.go = asyncio.Event()

    async def answer(self, request: Request) -> None:
        await self.go.wait()
        await super().answer(request)


def connect(side: Side) -> tuple[Any, Wire]:
    connection, wire = side.listener(), Wire()
    connection.connection_made(wire)
    return connection, wire


async def settle() -> None:
    for _ in range(4 * TURNS):
        await asyncio.sleep(0)


@pytest.mark.parametrize("size", [1_000, 65_536, 200_000])
@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("ends", [True, False])
async def test_a_head_is_bounded_whenever_and_however_it_comes(size, busy, ends):
    """Over 64 KiB it gets 431 in its turn: in one segment or in many, also while another request is answered."""
    side = Holding()
    connection, wire = connect(side)
    if busy:
        connection.data_received(GET)
        await settle()
    raw = GET[:-2] + b"".join(LONG * 30)[: MAX_HEAD_BYTES * (1 if ends else 60)] + b"\r\n\r\n"
    for start in range(0, len(raw), size):
        connection.data_received(raw[start : start + size])
    side.go.set()
    await settle()
    assert re.findall(rb"HTTP/1.1 (\d+)", wire.written) == ([b"200", b"431"] if busy else [b"431"])
    assert wire.closed


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (GET[:-2] + b"Cookie: a=" + b"b" * 16_384 + b"\r\n\r\n", b"431"),
        (GET.replace(b"GET /", b"GET /" + b"a" * 16_384), b"414"),
        (GET[:-2] + b"".join(b"A%d: b\r\n" % number for number in range(128)) + b"\r\n", b"431"),
    ],
    ids=["a long field", "a long target", "many fields"],
)
async def test_a_line_and_the_number_of_fields_are_bounded(head, status):
    """A well-formed head is refused with 414 or 431 where it is too large, in whatever parts it comes."""
    for size in (len(head), 1000):
        connection, wire = connect(Holding())
        for start in range(0, len(head), size):
            connection.data_received(head[start : start + size])
        await settle()
        assert re.findall(rb"HTTP/1.1 (\d+)", wire.written) == [status]
        assert wire.closed


@pytest.mark.parametrize("size", [65_536, 1 << 20])
async def test_reading_goes_on_behind_a_large_body(size):
    """Requests that came behind a body for which reading paused are answered, and so is whatever comes later."""
    connection, wire = connect(Patient(3))
    raw = GET * 2 + b"PUT /a HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000 + GET * 3
    for start in range(0, len(raw), size):
        connection.data_received(raw[start : start + size])
    for _ in range(6):
        await settle()
    assert (wire.written.count(b"HTTP/1.1 200"), wire.paused) == (6, False)


async def test_what_waits_behind_a_request_is_bounded():
    """While one request is answered, heads and bodies behind it are taken up to a limit; then nothing is read."""
    for behind in (
        GET[:-2] + b"".join(LONG[:5]) + b"\r\n",
        b"PUT /a HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000,
        GET,
    ):
        side = Holding()
        connection, wire = connect(side)
        connection.data_received(GET)
        await settle()
        tracemalloc.start()
        sent = 0
        while not wire.paused:
            connection.data_received(behind)
            sent += 1
            assert sent * len(behind) < 8 * MAX_HEAD_BYTES
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 8 * MAX_HEAD_BYTES
        side.go.set()
        await settle()
        assert wire.written.count(b"HTTP/1.1 200 OK") == 1 + sent
        assert not wire.paused


async def test_an_idle_connection_does_not_hold_its_last_head():
    """Whoever sent a head of 60 kB and then nothing holds a connection, as anybody else does."""
    side = Side(remembers=False)
    held = []
    for fields in (b"", b"".join(LONG[:5])):
        connections = [connect(side) for _ in range(20)]
        await settle()
        tracemalloc.start()
        for connection, wire in connections:
            connection.data_received(GET[:-2] + fields + b"\r\n")
            await settle()
            assert wire.written.startswith(b"HTTP/1.1 200 OK")
            side.saw.clear()
        held.append(tracemalloc.get_traced_memory()[0] / len(connections))
        tracemalloc.stop()
    assert held[1] < held[0] + 8_000


@pytest.mark.parametrize(
    ("segments", "is_begun"),
    [
        ([GET + GET[:9]], True),
        ([GET + b"GET /\xc3\xa9"], True),
        ([GET, GET[:9]], True),
        ([GET[:-1]], True),
        ([GET + b"\r\n"], False),
        ([GET, b"\r\n"], False),
        ([GET, b"\r", b"\n\r\n"], False),
        ([b"\r\n"], False),
    ],
)
async def test_a_head_is_timed_from_its_first_byte_and_an_empty_line_is_none(segments, is_begun):
    """What begins a head gets 408 once its time is over, also behind a request in one segment; an empty line, which
    RFC 9112 has us ignore, begins nothing: whoever sends one is idle."""
    side = Side(remembers=True, window_s=0.1)
    sweep = asyncio.ensure_future(side.listener.sweep())
    connection, wire = connect(side)
    for one in segments:
        connection.data_received(one)
        await settle()
    later, control = connect(side)
    later.data_received(b"GET")
    async with asyncio.timeout(10):
        while not control.closed:
            await asyncio.sleep(0.01)
    sweep.cancel()
    assert b"HTTP/1.1 408" in control.written
    assert (b"HTTP/1.1 408" in wire.written, wire.closed) == (is_begun, is_begun)
    if not is_begun:
        connection.data_received(GET)
        await settle()
        assert wire.written.count(b"HTTP/1.1 200 OK") == b"".join(segments).count(GET) + 1
