"""Heads that came before are read as the parser would read them: the same segments with and without the table."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncegate.known_heads.recent import MAX_HEADS, MAX_STORED_HEAD_BYTES, MISSES_BEFORE_SAMPLING, RecentHeads
from tests.wire import TURNS, Segment, Side, Wire

REQUEST = b"POST /a HTTP/1.1\r\nHost: a\r\nIdempotency-Key: %s\r\nContent-Length: 2\r\n\r\n{}"


async def both(segments: Sequence[Segment]) -> int:
    """Assert that the table changes nothing; return how many requests were found in it."""
    sides = [Side(remembers) for remembers in (True, False)]
    told = [await side.take(segments) for side in sides]
    assert sides[0].saw == sides[1].saw
    assert sides[0].captured == sides[1].captured
    assert told[0] == told[1]
    return sides[0].found


KEYS = [
    b"", b"Idempotency-Key: k1\r\n", b"Idempotency-Key: k2\r\n", b'Idempotency-Key: "k1"\r\n', b"Idempotency-Key: \r\n",
    b"idempotency-key: k1\r\n", b"Idempotency-Key:k1\r\n", b"Idempotency-Key: k1 \r\n", b"Idempotency-Key: a b\r\n",
    b"Idempotency-Key: k1\r\nIdempotency-Key: k2\r\n", b"Idempotency-Key: k1\r\nidempotency-key: k2\r\n",
    b"Idempotency-Key: " + b"k" * 255 + b"\r\n", b"Idempotency-Key: " + b"k" * 256 + b"\r\n",
    b"Idempotency-Key: \xe9\r\n",
    b"X: \r\n Idempotency-Key: k1\r\n", b"X: Idempotency-Key: k1\r\n", b"Idempotency_Key: k1\r\n",
]  # fmt: skip
FIELDS = [b"", b"", b"", b"Authorization: Bearer a\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
          b"Expect: 100-continue\r\n", b"X: \xc3\xa9\r\n", b"Upgrade: h2c\r\nConnection: Upgrade\r\n"]  # fmt: skip
BODIES = [b"", b"{}", b"\r\n\r\n", REQUEST % b"k9"]
LENGTHS: list[Callable[[int], bytes]] = [
    *[lambda size: b"Content-Length: %d\r\n" % size] * 6, lambda _: b"", lambda size: b"Content-Length: 0%d\r\n" % size,
    lambda size: b"Content-Length: %d\r\n" % (size + 3), lambda size: b"Content-Length: %d\r\n" % max(0, size - 1),
    lambda _: b"Transfer-Encoding: chunked\r\n",
]  # fmt: skip


@st.composite
def asked(draw: st.DrawFn) -> bytes:
    """Return the bytes of a request, odd or even broken."""
    line = draw(
        st.sampled_from([b"POST /a", b"POST /a", b"GET /a", b"GET /\xe9", b"\r\nPOST /a", b"\r\n\r\nA /a", b"HEAD /a"])
    )
    version = draw(st.sampled_from([b" HTTP/1.1\r\n"] * 7 + [b" HTTP/1.0\r\n"]))
    body = draw(st.sampled_from(BODIES))
    length = draw(st.sampled_from(LENGTHS))(len(body))
    if length.startswith(b"T"):
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\nX: 1\r\n\r\n"
    fields = b"".join((b"Host: a\r\n", draw(st.sampled_from(FIELDS)), draw(st.sampled_from(KEYS)), length))
    return line + version + fields + b"\r\n" + body


@st.composite
def traffic(draw: st.DrawFn) -> list[Segment]:
    """Return segments of a few connections; few requests that come several times, most of them whole."""
    pool = [REQUEST % b"k1", REQUEST % b"k2", *draw(st.lists(asked(), min_size=1, max_size=3))]
    segments: list[Segment] = []
    for _ in range(draw(st.integers(2, 10))):
        number, data = draw(st.integers(0, 2)), draw(st.sampled_from(pool))
        match draw(st.sampled_from(["whole"] * 6 + ["cut", "glued", "at once"])):
            case "cut":
                at = draw(st.integers(1, len(data) - 1))
                segments += [(number, data[:at]), (number, data[at:])]
            case "glued":
                other = draw(st.sampled_from(pool))
                segments.append((number, data + other[: draw(st.integers(0, len(other)))]))
            case "at once":
                other = draw(st.sampled_from(pool))
                segments += [(number, data, "at once"), (number, other[: draw(st.integers(0, len(other)))])]
            case _:
                segments.append((number, data))
    return segments


def test_requests_are_read_as_without_the_table():
    """Whatever comes, however it is cut: the handler sees the same, and the clients are told the same."""
    found = 0

    @settings(max_examples=500, deadline=None, database=None, derandomize=True)
    @given(traffic())
    def compare(segments: list[Segment]) -> None:
        nonlocal found
        found += asyncio.run(both(segments))

    compare()
    assert found > 200, "the table was hardly used"


@pytest.mark.parametrize("key", [b"k2", b'"k2"', b"k" * 255])
async def test_the_key_may_differ(key):
    """A head is known whatever the plain key in it, on any connection."""
    assert await both([(0, REQUEST % b"k1"), (0, REQUEST % key), (1, REQUEST % key)]) == 2


@pytest.mark.parametrize("key", [b"", b"a b", b"k2 ", b'"k\\"2"', b"k\xe9", b"k" * 256, b"k2\r\nIdempotency-Key: k3"])
async def test_an_unusual_key_goes_through_the_parser(key):
    """Where its value is not plain, nothing is taken for granted, neither before nor after."""
    assert await both([(0, REQUEST % b"k1"), (1, REQUEST % key), (2, REQUEST % b"k2")]) == 1
    assert await both([(0, REQUEST % key), (1, REQUEST % key)]) == 0


@pytest.mark.parametrize(
    "end", [b"GET /b HTTP/1.1\r\nHost: a\r\nX: ", b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 200\r\n\r\n"]
)
@pytest.mark.parametrize("apart", [True, False])
async def test_what_a_head_is_in_the_midst_of_another_request_stays_a_part_of_it(end, apart):
    """A known head behind the beginning of another request is no request of its own, and teaches nothing."""
    known = REQUEST % b"k1"
    segments = [(0, known), (1, known), *([(1, known), (1, end)] if apart else [(1, known + end)]), (1, known)]
    await both([*segments, (1, known), (2, known)])


async def test_a_head_that_ends_its_connection_is_known_and_ends_it():
    """A client that makes a connection for each request is not parsed anew. What comes behind is no request."""
    last = REQUEST.replace(b"Host", b"Connection: close\r\nHost")
    assert await both([(number, last % b"k%d" % number) for number in range(3)]) == 2
    assert await both([(0, last % b"k0"), (1, last % b"k1", "at once"), (1, last % b"k2"), (2, last % b"k3")]) == 2


async def test_a_connection_with_known_heads_alone_has_no_parser():
    side = Side(remembers=True)
    await side.take([(0, REQUEST % b"k1")])
    connection = side.listener()
    connection.connection_made(Wire())
    for number in range(3):
        connection.data_received(REQUEST % b"k%d" % number)
        for _ in range(TURNS):
            await asyncio.sleep(0)
    assert side.found == 3
    assert connection._parser is None
    connection.connection_lost(None)


@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_a_whole_request_behind_the_rest_of_another_teaches_nothing(method):
    """What completes another request is read as that, on its connection and on others."""
    crafted = b"POST / HTTP/1.1\r\nHost: a\r\n\r\n"
    await both([(0, method + b" /other HTTP/1.1\r\nX: "), (0, crafted), (0, crafted), (1, crafted), (2, crafted)])


async def test_what_comes_while_a_request_is_answered_stays_before_what_comes_next():
    """A request that begins meanwhile is not forgotten for a known head behind it."""
    known, begun = REQUEST % b"k1", b"GET /b HTTP/1.1\r\nHost: a\r\nX: "
    assert await both([(0, known), (0, known, "at once"), (0, begun), (0, known)]) == 1
    assert await both([(0, known, "at once"), (0, begun), (0, known), (1, known)]) == 0


async def test_a_head_whose_body_comes_later_is_not_whole():
    """Of chunks as well: the same head alone, once more, still has its body to come."""
    head, chunks = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n"
    assert await both([(0, head), (0, chunks), (1, head), (1, chunks)]) == 0
    head = (REQUEST % b"k1")[:-2]
    apart: list[Segment] = [(0, head), (0, b"{}"), (1, head), (1, b"{}")]
    assert await both([*apart, (0, head + b"{}")]) == 0
    # Once it came whole, also on a connection on which it came apart, it is known.
    assert await both([*apart, (0, head + b"{}"), (2, head + b"{}")]) == 1


async def test_a_head_that_asks_for_trailers_is_not_remembered():
    """Whether a client takes trailers is in its own head."""
    asking = (REQUEST % b"k1").replace(b"Host:", b"TE: trailers\r\nHost:", 1)
    assert await both([(0, asking), (0, asking), (1, asking)]) == 0


async def test_a_switch_of_protocols_is_never_taken_from_the_table():
    """Only the parser knows that what comes next is no request."""
    switch = b"GET /a HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    switch += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    assert await both([(0, switch), (1, switch), (2, switch), (2, switch)]) == 0


@pytest.mark.parametrize("key", [b"", b"Idempotency-Key: k1\r\n"])
@pytest.mark.parametrize("before", [b"\r\n\r\n", b"\r\n\r\n\r\n", b"\r\n", b"\n\r\n\r\n"])
async def test_empty_lines_before_a_request_are_not_its_end(before, key):
    """A head whose Content-Length is its own size catches nobody else's request behind the same empty lines."""
    request = b"POST /b HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer b\r\nContent-Length: 0\r\n\r\n"
    begun = b"POST /a HTTP/1.1\r\nHost: a\r\n%sContent-Length: %%d\r\nX: " % key
    for size in range(len(before) - 4, len(before) + 5):  # of what an observer could take for the body
        head = begun % (len(request) + size)
        head += b"x" * (len(request) - len(head) - 4) + b"\r\n\r\n"
        segments = [(0, before + head), (1, before + request), (2, before + head), (1, before + request)]
        assert await both(segments) == 0


# The table ...


def test_the_table_is_bounded():
    """So many heads, of so many bytes, and no more."""
    table = RecentHeads[int]()
    for number in range(3 * MAX_HEADS):
        table.store(number, 10, number)
    assert len([number for number in range(3 * MAX_HEADS) if table.find(number) is not None]) <= MAX_HEADS
    table.store("long", MAX_STORED_HEAD_BYTES + 1, 1)
    assert table.find("long") is None


def test_few_are_kept_where_none_comes_again():
    """After so many in vain one in so many is wanted, until one pays."""
    table = RecentHeads[int]()
    assert all(table.wants_more() for _ in range(MISSES_BEFORE_SAMPLING))
    assert sum(table.wants_more() for _ in range(10 * MISSES_BEFORE_SAMPLING)) == 10
    table.misses = 0
    assert table.wants_more()
