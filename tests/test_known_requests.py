"""Request heads of which more than the key differs: read as the parser reads them, and what is acted on is fixed."""

import ast
import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oncegate.known_heads import shapes
from oncegate.known_heads.requests import (
    _PLAIN_KEY,
    FIXED,
    FIXED_PREFIXES,
    WHOSE,
    HeadCache,
    KnownHead,
    WatchedFields,
)
from oncegate.known_heads.shapes import MAX_TRIED, Shape
from oncegate.messages.fields import HOP_BY_HOP
from oncegate.messages.request_head import FORWARDING, RequestHead
from tests.test_known_heads import both
from tests.wire import Segment, Side

SOURCES = Path(__file__).parents[1] / "proxy" / "oncegate"


def raw(
    *fields: bytes,
    key: bytes = b"k1",
    body: bytes = b"{}",
    line: bytes = b"POST /a HTTP/1.1",
    length: bytes | None = None,
) -> bytes:
    stated = b"%d" % len(body) if length is None else length
    lines = (line, b"Host: a", *fields, b"Idempotency-Key: " + key, b"Content-Length: " + stated)
    return b"\r\n".join((*lines, b"", body))


def trace(number: int, **changes: bytes) -> bytes:
    return raw(b"Trace: t%d" % number, key=b"k%d" % number, body=b"x" * number, **changes)


async def found(*requests: bytes) -> int:
    """Return how many of these requests were found in the table; assert that it changes nothing."""
    return await both([(number % 2, data) for number, data in enumerate(requests)])


async def test_key_trace_and_length_may_differ():
    """From the third head of one shape on, none is parsed."""
    assert await found(*map(trace, range(1, 8))) == 5


async def test_the_value_of_one_field_is_read_without_parsing():
    """In a gap, or the same in each of the heads; of a field that comes twice, none is taken."""
    same, twice = b"User-Agent: a", (b"Traceparent: 1", b"traceparent: 2")
    side = Side(remembers=True)
    parent = b"Traceparent: 00-%032x-%016x-01"
    await side.take([(0, raw(same, parent % (number, number), line=b"POST /v1?q HTTP/1.1")) for number in range(1, 6)])
    assert side.found == 3
    traces = [f"{number:032x}" for number in range(1, 6)]
    assert [one[3] for one in side.captured] == traces
    assert [one[1] for one in side.captured] == [b"00-%032x-%016x-01" % (number, number) for number in range(1, 6)]
    assert {(one[0], one[2], one[4]) for one in side.captured} == {(b"", b"a", "/v1")}
    assert await found(*[raw(*twice, b"Trace: %d" % number) for number in range(5)]) == 3


async def test_a_field_that_turns_out_to_differ_makes_the_shape_wider():
    """One head more is parsed, and none after it."""
    agents = [raw(b"User-Agent: a%d" % number, b"Trace: %d" % number) for number in range(3)]
    assert await found(*[raw(b"User-Agent: a", b"Trace: %d" % number) for number in range(3)], *agents) == 3


@pytest.mark.parametrize("length", [b"02", b"+2", b"2 ", b"2, 2", b"1", b"3", b"-1", b"", b"9999999999"])
async def test_a_length_that_is_not_that_of_the_body_goes_through_the_parser(length):
    """Only the canonical number of exactly the bytes that follow."""
    assert await found(trace(1), trace(3), raw(b"Trace: t", length=length), trace(4)) <= 1


@pytest.mark.parametrize("value", [b"", b" v", b"v ", b"\tv", b"v\tw", b"\xe9", b"v\x01", b"v\x7f", b"v\n", b"v\r"])
async def test_an_odd_value_goes_through_the_parser(value):
    """Neither does it match, nor does it teach a shape that would match it."""
    odd = raw(b"Trace: " + value)
    assert await found(trace(1), trace(2), odd, trace(3)) <= 1
    assert await found(odd, raw(b"Trace: 1"), odd, raw(b"Trace: 2"), odd) <= 2


@pytest.mark.parametrize("key", [b"", b"a b", b'"k\\"2"', b"k\xe9", b"k" * 256, b"k2\r\nIdempotency-Key: k3"])
async def test_an_odd_key_goes_through_the_parser(key):
    """A request whose key is odd is not even remembered: its plan would have the key in it."""
    assert await found(trace(1), trace(2), raw(b"Trace: t9", key=key), trace(4)) == 1
    assert await found(*[raw(b"Trace: t%d" % number, key=key) for number in range(5)]) == 0


@pytest.mark.parametrize(
    "name",
    [
        *(b"Api_Key", b"Proxy-Authorization", b"Cookie", b"Prefer", b"Content-Type", b"Content-Encoding", b"Origin"),
        *(b"X-Forwarded-For", b"X-Forwarded-Anything", b"Via", b"Forwarded", b"X-Forwarded-User", b"Expect"),
        *(b"X_Trace", b"Keep-Alive", b"Sec-Fetch-Mode", b"Accept-Encoding", b"Max-Forwards", b"Mcp-Session-Id"),
        *(b"Access-Control-Request-Method", b"Sec-WebSocket-Key", b"X-Read-By-A-Rule"),
    ],
)
def test_what_is_acted_on_does_not_vary(name):
    """Each value is a head of its own."""
    cache = HeadCache()
    cache.reset(b"idempotency-key", [b"x-read-by-a-rule"])
    assert cache._gap_of(name.lower()) is None


async def test_a_credential_may_differ():
    """Whose the request is, is decided for each. A cookie may not: several names say who sent it."""
    heads = [raw(b"Authorization: Bearer %d" % (number % 3), b"Trace: %d" % number) for number in range(8)]
    assert await found(*heads) == 6
    heads = [raw(b"Cookie: id=%d" % number, b"Trace: %d" % number) for number in range(8)]
    assert await found(*heads) == 0


async def test_no_credential_is_that_of_another_request_while_no_shape_may_be_compiled(monkeypatch):
    """Whoever uses up the ration makes no head stand for another one."""
    monkeypatch.setattr(shapes, "COMPILED_AT_ONCE", 1)
    mine, other = (
        [raw(b"Authorization: Bearer " + who, b"Trace: %d" % number) for number in range(4)] for who in (b"a", b"b")
    )
    assert await found(*mine[:2], *other, *mine[2:]) == 2


async def test_what_authenticates_a_connection_is_not_known():
    """Each head that the upstream gets is searched for it, but not a known one: neither alone nor by its shape."""
    for scheme in (b"NTLM", b"negotiate", b"Kerberos", b"NEGO2", b"CredSSP"):
        assert await found(*[raw(b"Authorization: %b abc" % scheme, key=b"k%d" % number) for number in range(4)]) == 0
    values = (b"Bearer 1", b"Bearer 2", b"Bearer 3", b"NTLM 4", b"Basic NTLM", b"ntlm", b"NTLMv2")
    assert await found(*[raw(b"Authorization: %b" % value) for value in values]) == 3


def paid(number: int, *, customer: bytes = b"cus_N", version: bytes = b"v1", query: bytes = b"") -> bytes:
    line = b"POST /%b/customers/%b/pay%b HTTP/1.1" % (version, customer.replace(b"N", b"%d" % number), query)
    return raw(b"Trace: t%d" % number, key=b"k%d" % number, line=line)


async def test_ids_in_the_path_may_differ():
    """Each request has its own target."""
    assert await found(*[paid(number) for number in range(10, 18)]) == 6
    assert await found(*[paid(number, query=b"?a=1") for number in range(10, 18)]) == 6
    assert await found(*[paid(number % 3, version=b"v%d" % (number % 2)) for number in range(8)]) >= 4


@pytest.mark.parametrize(
    "customer", [b"me", b"%6N", b"a.N", b"..", b"", b"1/N", b"\xe9N", b"a~N", b"1" * 129 + b"N", b"a,N", b"?N", b"N#"]
)
async def test_a_path_with_other_parts_is_another_one(customer):
    """Escapes, dots and empty parts have a meaning, and a word may choose a rule."""
    known = [paid(number) for number in (1, 2)]
    others = [paid(number, customer=customer) for number in (3, 3)]
    assert await found(*known, *others, paid(5)) <= 2
    assert await found(*others, *known, paid(5)) <= 2


async def test_a_field_that_connection_names_is_not_forwarded_from_a_shape():
    """Which fields end at this hop is in the head, so that such a head is known whole or not at all."""
    heads = [raw(b"Connection: Trace", b"Trace: %d" % number, key=b"k%d" % number) for number in (1, 2, 3, 3)]
    assert await found(*heads) == 1


@pytest.mark.parametrize(
    "line", [b"GET /a HTTP/1.0", b"GET http://b/a HTTP/1.1", b"HEAD /a HTTP/1.1", b"GET /\xe9 HTTP/1.1"]
)
async def test_other_requests_are_read_as_without_the_table(line):
    """Whatever their line says."""
    await found(*[raw(b"Trace: %d" % number, body=b"", line=line) for number in range(5)])


async def test_what_is_behind_or_missing_goes_through_the_parser():
    """A shape is a whole request: neither the beginning of one, nor one with another behind it."""
    whole = [trace(number) for number in range(1, 6)]
    for cut in (-1, -6, 40):
        segments: list[Segment] = [(0, whole[0]), (0, whole[1]), (1, whole[4][:cut]), (1, whole[4][cut:])]
        await both([*segments, (1, whole[2]), (0, whole[3])])
        await both([(0, whole[0]), (0, whole[1]), (0, whole[2] + whole[4][:cut]), (0, whole[4][cut:]), (0, whole[3])])


# What the parser does ...

NAMES = [b"Trace", b"trace", b"Baggage", b"X-Id", b"User-Agent", b"Authorization", b"X_Trace", b"Connection", b"Prefer"]
VALUES = [
    b"1",
    b"2",
    b"3",
    b"a b",
    b"x" * 90,
    b"k=v,w",
    b"",
    b" 1",
    b"\xc3\xa9",
    b"1\t2",
    b"Trace",
    b"close",
    b"keep-alive",
]
KEYS = [b"k1", b"k2", b"k3", b'"k4"', b"a b", b""]
ODD_LINES = [
    b"X:1",
    b"X : 1",
    b": 1",
    b"X: 1\n",
    b" folded",
    b"Idempotency-Key: k9",
    b"Content-Length: 1",
    b"TE: trailers",
]


@st.composite
def requests(draw: st.DrawFn) -> list[Segment]:
    """Return requests of a few kinds, of which everything differs that may and some of what may not."""
    kinds = draw(st.lists(st.lists(st.sampled_from(NAMES[:5] * 3 + NAMES), max_size=5), min_size=1, max_size=2))
    segments: list[Segment] = []
    for _ in range(draw(st.integers(6, 14))):
        fields = [
            name + b": " + draw(st.sampled_from(VALUES[:5] * 6 + VALUES)) for name in draw(st.sampled_from(kinds))
        ]
        if draw(st.integers(0, 11)) == 0:
            fields.insert(draw(st.integers(0, len(fields))), draw(st.sampled_from(ODD_LINES)))
        key = draw(st.sampled_from(KEYS[:3] * 8 + KEYS))
        body = draw(st.sampled_from([b"", b"{}", b"{1}", b"\r\n\r\n", b"x" * 20]))
        length = draw(st.sampled_from([None] * 20 + [b"1", b"02", b"2"]))
        data = raw(*fields, key=key, body=body, length=length)
        match draw(st.sampled_from(["whole"] * 12 + ["cut", "glued"])):
            case "cut":
                at = draw(st.integers(1, len(data) - 1))
                segments += [(draw(st.integers(0, 2)), data[:at]), (draw(st.integers(0, 2)), data[at:])]
            case "glued":
                segments.append((draw(st.integers(0, 2)), data + data[: draw(st.integers(0, len(data)))]))
            case _:
                segments.append((draw(st.integers(0, 2)), data))
    return segments


def test_heads_that_vary_are_read_as_without_the_table():
    """T26: the handler sees the same head, field by field, and the same body; the clients are told the same."""
    hits = 0

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(requests())
    def compare(segments: list[Segment]) -> None:
        nonlocal hits
        hits += asyncio.run(both(segments))

    compare()
    assert hits > 300, "the table was hardly used"


# Who varies everything ...


async def test_hostile_heads_cost_a_few_looks(monkeypatch):
    """However many shapes were learned, a head is compared with a few of them."""
    looks = 0
    match = Shape.match

    def counted(shape: Shape, data: bytes) -> object:
        nonlocal looks
        looks += 1
        return match(shape, data)

    monkeypatch.setattr(Shape, "match", counted)
    side = Side(True)
    heads = [raw(b"Authorization: Bearer %d" % (number // 2), b"Trace: %d" % number) for number in range(400)]
    await side.take([(0, head) for head in heads])
    assert looks <= MAX_TRIED * len(heads)
    looks = 0
    await side.take([(1, raw(b"Authorization: Bearer new", b"Trace: %d" % number)) for number in range(100)])
    assert looks <= MAX_TRIED * 100


# A reload ...


def checked(data: bytes) -> RequestHead:
    pairs = [tuple(line.split(b": ", 1)) for line in data.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]]
    fields = {name.lower(): [value] for name, value in pairs}
    return RequestHead("POST", b"/a", False, b"a", pairs, fields)  # type: ignore[arg-type]


class Message:
    """What the table asks of a message of aiohttp's."""

    def _replace(self, **_: object) -> "Message":
        return self


def learned(cache: HeadCache) -> KnownHead:
    for number in (1, 2):
        known = cache.store(trace(number), Message(), checked(trace(number)))
    assert known is not None
    assert cache.find(trace(3), b"") is not None
    return known


def test_a_connection_that_began_before_the_first_head_finds_it_whatever_its_key():
    """It needs no shape for that, which costs more."""
    cache = HeadCache()
    cache.reset(b"idempotency-key")
    assert cache.store(raw(key=b"k1"), Message(), checked(raw(key=b"k1"))) is not None
    found = cache.find(raw(key=b"k2"), b"")
    assert found is not None
    known, values, _ = found
    assert (values, known.has_shape) == ((b"k2",), False)


@given(st.binary(max_size=4) | st.integers(250, 260).map(lambda size: b"k" * size), st.sampled_from([b"", b'"']))
def test_only_a_plain_key_is_looked_for(key: bytes, quote: bytes) -> None:
    """Any other goes through the parser, as one that is too long does."""
    key = quote + key + quote
    assume(not set(key) & set(b"\r\n"))
    cache = HeadCache()
    cache.reset(b"idempotency-key")
    cache.store(raw(key=b"k1"), Message(), checked(raw(key=b"k1")))
    assert (cache.find(raw(key=key), b"") is not None) == (_PLAIN_KEY.fullmatch(key) is not None)


def test_no_shape_outlives_a_reload():
    """Rules that are read anew may act on a field that was a gap: it is one no more."""
    cache = HeadCache()
    cache.reset(b"idempotency-key")
    assert learned(cache).names == [b"trace", b"idempotency-key", b"content-length"]
    cache.reset(b"idempotency-key", [b"trace"])
    assert cache.find(trace(3), b"") is None
    for number in (4, 5, 6):
        known = cache.store(trace(number), Message(), checked(trace(number)))
        assert known is None or b"trace" not in known.names
    cache.reset(b"idempotency-key")
    assert cache.find(trace(7), b"") is None


@pytest.mark.parametrize("options", [{"enabled": False}, {"max_line_bytes": 1024}])
def test_no_shape_is_learned_where_none_may_be(options):
    """Neither with the table off, nor where a value could exceed the limit of a line."""
    cache = HeadCache(**options)
    cache.reset(b"idempotency-key")
    for number in (1, 2, 3):
        cache.store(trace(number), Message(), checked(trace(number)))
    assert cache.find(trace(4), b"") is None


# Nobody acts on what varies ...


@pytest.mark.parametrize(
    "read",
    [
        lambda fields: fields[b"trace"],
        lambda fields: fields.get(b"trace"),
        lambda fields: fields.get(b"trace", ()),
        lambda fields: [*fields.items()],
        lambda fields: [*fields.values()],
        lambda fields: {**fields},
        lambda fields: dict(fields),
        lambda fields: {} | fields,
        lambda fields: fields | {},
        lambda fields: fields.copy(),
        lambda fields: [fields[name] for name in fields],
    ],
)
def test_a_value_that_was_read_is_noted(read):
    """Whatever the way: what is decided by it is not decided for another value."""
    cache = HeadCache()
    cache.reset(b"idempotency-key")
    known = learned(cache)
    head = known.watched(checked(trace(2)))
    assert isinstance(head.fields, WatchedFields)
    assert b"trace" in head.fields  # that it is there is so in every head of the shape
    assert head.fields[b"idempotency-key"] == [b"k2"]
    assert not known.varies_in(head.fields)
    read(head.fields)
    assert known.varies_in(head.fields)


def test_what_was_not_watched_may_vary():
    """A plan that was made of any other fields counts for one head alone."""
    cache = HeadCache()
    cache.reset(b"idempotency-key")
    assert learned(cache).varies_in(checked(trace(2)).fields)


# What decides before any plan: whether a request is one, is admitted, is whole, and how its head goes on.
BEFORE = [f"messages/{name}.py" for name in ("admission", "request_head", "fields", "transfer_coding")]
BEFORE += [f"downstream/{name}.py" for name in ("reader", "request", "incoming_head", "body")]
# Members of values, and what is no field of a request.
NO_FIELDS = {b"chunked", b"100-continue", b"close", b"wait", b"join", b"trailers", b"websocket", b"identity", b"x"}


@pytest.mark.parametrize("path", BEFORE)
def test_every_field_that_is_read_before_a_plan_is_fixed(path):
    """A new name in the code is a name in FIXED, or one more here."""
    constants = [
        node.value for node in ast.walk(ast.parse((SOURCES / path).read_text())) if isinstance(node, ast.Constant)
    ]
    names = {
        value.lower() for value in constants if isinstance(value, bytes) and re.fullmatch(rb"[A-Za-z][\w-]*", value)
    }
    assert {name for name in names if name not in FIXED | WHOSE and not name.startswith(FIXED_PREFIXES)} <= NO_FIELDS


def test_what_is_of_one_hop_is_fixed():
    """Whoever adds such a field adds it here as well."""
    assert FORWARDING | HOP_BY_HOP <= FIXED
