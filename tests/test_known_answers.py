"""Heads of responses that came before, or have a known shape, are read as the parser would read them."""

import asyncio
import random
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncegate.buffers.memory import MemoryBudget
from oncegate.hostnames.resolver import Resolver
from oncegate.known_heads.answers import KnownAnswers, _gap
from oncegate.known_heads.shapes import MAX_SHAPES, PLAIN
from oncegate.messages import response_head
from oncegate.messages.fields import by_name
from oncegate.messages.response_head import ADDRESS_FIELDS, DECIDING_FIELDS, ResponseHead
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import UpstreamLost
from oncegate.upstream.pool import Pool
from tests.wire import Wire

# Segments of a response, and whether it is to HEAD.
Came = tuple[list[bytes], bool]

ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n",
    b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\n\r\nno length",
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
]


class Counting(KnownAnswers):
    """Counts the heads that were known, and those of them that had come before byte for byte."""

    def __init__(self, *, enabled: bool = True) -> None:
        super().__init__(enabled=enabled)
        self.found = 0
        self.came: set[bytes] = set()
        self.shaped = 0

    def find(self, data: bytes) -> tuple[ResponseHead, int] | None:
        known = super().find(data)
        self.found += known is not None
        head = data[: data.find(b"\r\n\r\n")]
        self.shaped += known is not None and head not in self.came
        self.came.add(head)
        return known


def described(head: ResponseHead | None) -> list[object]:
    """Return all that anybody can read of a head."""
    if head is None:
        return []
    members = [getattr(head, name) for name in type(head).__slots__ if not name.startswith("_")]
    with_cookies = head.with_cookies()
    return [
        *members,
        [*head.pairs],
        head.fields,
        head.passed_block(True),
        head.passed_block(False),
        head.digest().digest(),
        with_cookies.replayed_block,
        with_cookies.digest().digest(),
        with_cookies.fields,
    ]


def answered(came: Sequence[Came], table: KnownAnswers) -> list[object]:
    """Feed responses to connections of one pool; return what became of each."""

    async def run() -> list[object]:
        pool = Pool(
            "127.0.0.1",
            1,
            None,
            connect_timeout_s=1,
            connect_retries=0,
            max_connections=9,
            buffered=MemoryBudget(1 << 20),
            resolver=Resolver(1.0),
        )
        pool.known_answers = table
        saw: list[object] = []
        ours, theirs = socket.socketpair()
        with ours, theirs:
            connection: Connection | None = None
            for segments, head_only in came:
                if connection is None:
                    connection = Connection(pool)
                    connection.connection_made(Wire(ours))
                connection.send(b"GET / HTTP/1.1\r\n\r\n", b"", head_only)
                steps: list[object] = []
                for segment in segments:
                    connection.data_received(segment)
                    response = connection.response
                    steps.append((response.head is None, response.is_complete, response.buffered_bytes))
                try:
                    connection.next_arrival(0).add_done_callback(asyncio.Future.exception)  # nobody waits
                    failed = ""
                except UpstreamLost as lost:
                    failed = f"{lost} {lost.status}"
                response, reusable = connection.response, connection.is_reusable()
                saw.append(
                    (
                        *(described(response.head), steps, connection.take_body(), response.is_complete, reusable),
                        *(failed, pool.buffered.used, response.trailers, connection.is_unanswered),
                    )
                )
                connection = connection if reusable else None
                if connection is not None:
                    connection.become_idle(0.0)
        pool.close()
        return saw

    return asyncio.run(run())


def compared(came: Sequence[Came]) -> Counting:
    """Assert that the table changes nothing; return the table."""
    table = Counting()
    assert answered(came, table) == answered(came, KnownAnswers(enabled=False))
    return table


@st.composite
def answers(draw: st.DrawFn) -> list[Came]:
    came = []
    for _ in range(draw(st.integers(2, 8))):
        data = draw(st.sampled_from(ANSWERS[:2] * 4 + ANSWERS))
        cuts = sorted(draw(st.lists(st.integers(1, len(data) - 1), max_size=1)) if draw(st.booleans()) else [])
        segments = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        came.append((segments, draw(st.sampled_from([False, False, False, True]))))
    return came


def test_a_known_answer_within_an_answer_is_its_body():
    """A piece of a body, or what follows an interim answer's beginning, is no answer of its own."""
    within = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(ANSWERS[0])
    came = [([ANSWERS[0]], False), ([within, ANSWERS[0]], False), ([within[:-2], within[-2:], ANSWERS[0]], False)]
    came += [([b"HTTP/1.1 100 Continue\r\nX: ", ANSWERS[0]], False)]
    compared(came)


def test_answers_are_read_as_without_the_table():
    """The same head, body, end and use of the connection, whatever came before it."""
    found = 0

    @settings(max_examples=500, deadline=None, database=None, derandomize=True)
    @given(answers())
    def compare(came: list[Came]) -> None:
        nonlocal found
        found += compared(came).found

    compare()
    assert found > 200, "the table was hardly used"


@pytest.mark.parametrize(
    "came",
    [
        [[b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(ANSWERS[0]), ANSWERS[0]]],  # as the body of another
        [[b"HTTP/1.1 200 OK\r\nX: ", ANSWERS[0]]],  # as the rest of a head
        [[b"HTTP/1.1 100 Continue\r\nX: ", ANSWERS[0]], [ANSWERS[0]]],
        [[ANSWERS[0][:30], ANSWERS[0][30:]], [ANSWERS[0][30:]]],  # the rest of a head alone
        [[ANSWERS[0], ANSWERS[1]], [ANSWERS[0]]],  # one too many
    ],
)
def test_what_a_known_answer_is_in_the_midst_of_another_stays_a_part_of_it(came):
    """Only what begins an answer is looked up, or remembered."""
    compared([(segments, False) for segments in [[ANSWERS[0]], [ANSWERS[0]], *came]])


def test_an_answer_before_its_request_was_sent_ends_the_connection(monkeypatch):
    """Known or not: what is left of the request could be taken for another one."""
    told = [([ANSWERS[0]], False)] * 3
    table: Any = KnownAnswers()
    assert [saw[4] for saw in answered(told, table)] == [True] * 3  # type: ignore[index]
    monkeypatch.setattr(Wire, "get_write_buffer_size", lambda _: 1)
    assert answered(told, table) == answered(told, KnownAnswers(enabled=False))
    assert not any(saw[4] for saw in answered(told, table))  # type: ignore[index]


# Shapes ...

USUAL: dict[bytes, Sequence[bytes]] = {
    b"Date": (b"Tue, 01 Dec 2026 01:12:51 GMT", b"Tue, 01 Dec 2026 01:12:52 GMT"),
    b"Server": (b"nginx",),
    b"Content-Type": (b"application/json", b"application/json", b"text/event-stream", b"text/html"),
    b"Request-Id": (b"req_0123456789", b"req_abcdef", b"req_ff ff"),
    b"X-Processing-Ms": (b"12", b"3456", b"9"),
    b"Set-Cookie": (b"session=1; Secure", b"session=22; Secure"),
    b"Location": (b"/v1/things/1", b"/v1/things/22", b"https://api.example/3"),
    b"Connection": (b"keep-alive", b"close", b"Request-Id", b"keep-alive, vary", b"Upgrade"),
    b"Upgrade": (b"h2c", b"h2c", b"websocket"),
    b"Trailer": (b"X-Sum", b"X-Sum, Vary"),
    b"Age": (b"1", b"22"),
    b"WWW-Authenticate": (b"Basic", b"Bearer", b"Negotiate"),
    b"Keep-Alive": (b"timeout=5, max=99", b"timeout=5, max=98"),
    b"Vary": (b"Origin", b"Accept"),
    b"Content-Encoding": (b"identity", b"gzip"),
}
ODD = (
    *(b"", b" ", b" x", b"x ", b"\tx", b"x\t", b"a\tb", b"a\x01b", b"a\x00b", b"a\x7fb", b"a\r\n b", b"a\rb", b"a\nb"),
    *(b"\xe9", b"\xc3\xa9", b"a  b", b"x" * 1200, b"x" * 3000, b"x" * 70000, b"close", b"chunked", b"0", b"5"),
    *(b"//other.example/", b"http://other.example/a", b"text/event-stream", b"Negotiate", b"x-id", b"a\r\nX: b"),
    *(b"Request-Id", b"keep-alive, request-id", b"false", b"true", b"upgrade", b"\r\n\r\nok", b"a\r\n\r\nb"),
)
NAMES = (
    *(*USUAL, b"Retry-After", b"Transfer-Encoding", b"Via"),
    *(
        b"Oncegate-Status",
        b"Idempotent-Replayed",
        b"X-Should-Retry",
        b"Content-Length",
        b"Proxy-Connection",
        b"Refresh",
    ),
    *(b"Access-Control-Allow-Origin", b"request-id", b"Request-ID", b"X_Y", b"Proxy-Status", b"Content-Location"),
)
LENGTHS = (b"%d", b"%d", b"0%d", b"+%d", b"-%d", b" %d", b"%d ", b"%d, %d", b"%d1", b"1%d", b"0x%d", b"", b"%d\x01")
ENDS = (
    b"0\r\n\r\n",
    b"0\r\n\r\n",
    b"0\r\nX-Sum: 1\r\nVary: 2\r\n\r\n",
    b"0\r\nage : 1\r\n\r\n",
    b"0\r\n",
    b"",
    b"0\r\n\r\nHTTP",
)
STATUSES = (
    *(b"200 OK", b"200 OK", b"201 Created", b"402 Payment Required", b"503 Service Unavailable", b"204 No Content"),
    *(b"304 Not Modified", b"200 ", b"200", b"999 Odd"),
)


def odd(dice: random.Random, lines: list[bytes]) -> list[bytes]:
    """Return the lines of a head with one thing that is not usual."""
    at, name, value = dice.randrange(len(lines)), dice.choice(NAMES), dice.choice(ODD)
    line = lines[at]
    match dice.randrange(10):
        case 0:
            changed = [line[: line.find(b":")] + b": " + value]
        case 1:
            changed = [line, name + b": " + value]
        case 2:
            changed = [line, line]
        case 3:
            changed = []
        case 4:
            changed = [line.replace(b": ", dice.choice((b":", b" : ", b":  ", b":\t", b" ")), 1)]
        case 5:
            changed = [line.swapcase()]
        case 6:
            changed = [line, name + b": " + dice.choice(USUAL.get(name, (b"1", b"2")))]
        case 7:
            changed = [line + b" ", b" " + value]
        case 8:
            changed = [line + b"\r\n" if dice.random() < 0.5 else b"\n".join((line, b"X: 1"))]
        case _:
            changed = [dice.randbytes(dice.randrange(30))]
    return [*lines[:at], *changed, *lines[at + 1 :]]


def cut(dice: random.Random, data: bytes) -> int:
    """Return where a response is cut, most often behind its head."""
    end = data.find(b"\r\n\r\n") + 4
    return dice.choice((end, end, end + 1, min(end + 3, len(data)), dice.randrange(1, len(data))))


def varying(dice: random.Random) -> list[Came]:
    """Return responses of an API with one or two kinds of heads, whose values vary; some of them are odd."""
    kinds = [dice.sample([*USUAL], dice.randint(1, 5)) for _ in range(dice.randint(1, 2))]
    oddly = [dice.sample(NAMES, dice.randint(0, 1)) for _ in kinds]
    chunked = [dice.choice((0, 0, 1, 0.5)) for _ in kinds]
    came: list[Came] = []
    for _ in range(dice.randint(5, 24)):
        status, kind = b"200 OK", dice.randrange(len(kinds))
        body = dice.choice((b"ok", b"fine", b"", b"\r\n\r\n", b"x" * 300))
        lines = [name + b": " + dice.choice(USUAL[name]) for name in kinds[kind]]
        lines += [name + b": " + dice.choice(USUAL.get(name, ODD)) for name in oddly[kind] if dice.random() < 0.9]
        length, is_odd = b"Content-Length: %d" % len(body), dice.random() < 0.2
        if is_odd and dice.random() < 0.5:
            length = b"Content-Length: " + dice.choice(LENGTHS).replace(b"%d", b"%d" % len(body))
        if is_odd and dice.random() < 0.5:
            status = dice.choice(STATUSES)
        lines.insert(len(lines) // 2, length)
        if is_odd and dice.random() < 0.5:
            lines = odd(dice, lines)
        if dice.random() < chunked[kind]:
            lines = [line for line in lines if line is not length] + [b"Transfer-Encoding: chunked"]
            body = dice.choice((b"2\r\nok\r\n", b"2;a=b\r\nok\r\n1 \r\nx\r\n", b"zz\r\n", b"2\r\nok")) + dice.choice(
                ENDS
            )
        data = b"HTTP/1.1 " + b"\r\n".join((status, *lines, b"", b"")) + body
        if is_odd and dice.random() < 0.5:
            data += dice.choice((b"x", data))
        cuts = sorted(cut(dice, data) for _ in range(dice.choice((0, 0, 1, 1, 2))))
        segments = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        came.append(([segment for segment in segments if segment], dice.random() < 0.05))
    return came


@pytest.mark.parametrize("seed", range(4))
def test_answers_with_other_values_are_read_as_without_the_table(seed):
    """Whatever varies, and however oddly: nothing that anybody can read of a response is another one."""
    dice, found = random.Random(seed), 0
    for _ in range(200):
        came = varying(dice)
        try:
            found += compared(came).shaped
        except AssertionError:
            raise AssertionError(f"read otherwise with the table: {came}") from None
    assert found > 100, "hardly any head had a known shape"


@pytest.mark.parametrize("status", [200, 204, 304, 101])
@pytest.mark.parametrize("name", [*sorted(DECIDING_FIELDS), b"content-length", b"x-id"])
def test_what_decides_about_a_head_is_named(monkeypatch, status, name):
    """`read_response_head` reads no field but those that are named, so that none other can be stale in a shape."""
    read: set[bytes] = set()

    class Watched(dict[bytes, list[bytes]]):
        def get(self, key: bytes, default: object = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __getitem__(self, key: bytes) -> list[bytes]:
            read.add(key)
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            assert isinstance(key, bytes)
            read.add(key)
            return super().__contains__(key)

        def values(self) -> Any:
            raise AssertionError("all values are read")

        items = values

    monkeypatch.setattr(response_head, "by_name", lambda pairs: Watched(by_name(pairs)))
    made = response_head.read_response_head(status, b"OK", [(name, b"1")], head_only=False)
    assert isinstance(made, ResponseHead) or name in (b"transfer-encoding",)
    assert read <= DECIDING_FIELDS | {b"content-length"}


def test_every_field_that_decides_is_fixed_or_checked():
    """In a shape it is equal in all heads; an address and the length are read from the head at hand."""
    for name in DECIDING_FIELDS - ADDRESS_FIELDS:
        assert _gap(name) is None
    assert _gap(b"content-length") is not PLAIN


ID = b"HTTP/1.1 200 OK\r\nRequest-Id: %s\r\nContent-Length: %d\r\nContent-Type: a/b\r\n%s\r\n"


def test_an_answer_with_another_id_and_length_is_known():
    """From the third on: two teach which values vary."""
    came = [
        ([ID % (b"req_%d" % number, size, b"X-Ms: 1\r\n") + b"x" * size], False)
        for number, size in enumerate((2, 3, 4, 500, 0, 10))
    ]
    assert compared(came).found == 4


@pytest.mark.parametrize("status", [b"200 OK", b"503 Service Unavailable"])
def test_what_is_read_of_a_known_shape_is_in_the_head_at_hand(status):
    """Fields by which a key is released or left unknown vary, and are read from this head alone."""
    came = [
        ([b"HTTP/1.1 %s\r\nContent-Length: 0\r\nRetry-After: %d\r\nVia: 1.1 %s\r\n\r\n" % (status, after, name)], False)
        for after, name in ((1, b"a"), (2, b"b"), (3, b"c"), (44, b"d"))
    ]
    table = KnownAnswers()
    answered(came, table)
    known = table.find(came[-1][0][0])
    assert known is not None
    assert known[0].fields[b"via"] == [b"1.1 d"]
    assert known[0].fields[b"retry-after"] == [b"44"]
    assert compared(came).found == 2


def test_an_address_in_a_known_shape_is_seen():
    """Whether a field names a host is read from its value."""
    heads = [
        b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % to for to in (b"/1", b"/2", b"//h/3")
    ]
    table = KnownAnswers()
    saw = answered([([head], False) for head in (*heads, heads[0])], table)
    assert [row[0][names_address_at()] for row in saw] == [False, False, True, False]  # type: ignore[index]
    compared([([head], False) for head in heads])


def names_address_at() -> int:
    return [name for name in ResponseHead.__slots__ if not name.startswith("_")].index("names_address")


def test_heads_that_cannot_be_learned_cost_little():
    """Where each head has a name of its own, only one in so many is looked at."""
    table = KnownAnswers()
    looked_up = 0
    find = table._shapes.find

    def counted(data: bytes) -> Any:
        nonlocal looked_up
        looked_up += 1
        return find(data)

    table._shapes.find = counted  # type: ignore[method-assign]
    answered(
        [([b"HTTP/1.1 200 OK\r\nX-%d: 1\r\nContent-Length: 0\r\n\r\n" % number], False) for number in range(640)], table
    )
    assert looked_up < 80
    assert len(table._shapes._skeletons) <= MAX_SHAPES


def test_the_table_can_be_switched_off():
    """Then nothing is kept and nothing found."""
    table = KnownAnswers(enabled=False)
    came = [([ID % (b"req_%d" % number, 2, b"") + b"ok"], False) for number in range(5)]
    answered([*came, came[0]], table)
    assert table.find(came[0][0][0]) is None
    assert not table._shapes._skeletons
