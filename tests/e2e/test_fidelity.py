"""Fidelity: what the upstream says is what the first client and every retry get, and the other way round."""

import asyncio
import contextlib
import gzip
import random
import string
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import with_and_without_head_cache
from tests.parts import Answer, Proxy, RawClient, RawUpstream, Received, request, serving, until

pytestmark = with_and_without_head_cache
MIB = 1 << 20
AT_ONCE = 8
Pairs = list[tuple[bytes, bytes]]

TOKEN = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()
VISIBLE = bytes(range(0x21, 0x7F)) + bytes(range(0x80, 0x100))
FRAMING = (b"content-length", b"transfer-encoding", b"connection")
REQUEST_ID = b"x-request-id"
OURS = (b"oncegate-status", b"oncegate-key-id", b"oncegate-request-id", b"idempotent-replayed", b"preference-applied")
HOP_BY_HOP = (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"transfer-encoding")
NOT_REPLAYED = (b"set-cookie", b"www-authenticate", b"authentication-info", b"age")
# Fields with a meaning for somebody on the way, each to be found in some answers.
TELLING: Pairs = [
    (b"Set-Cookie", b"a=1; Path=/"),
    (b"set-cookie", b"b=2; Expires=Wed, 21 Oct 2015 07:28:00 GMT"),
    (b"WWW-Authenticate", b'Basic realm="x", Digest nonce="y"'),
    (b"Authentication-Info", b'nextnonce="z"'),
    (b"Proxy-Authenticate", b"Basic"),
    (b"PROXY-Status", b"other; error=x"),
    (b"Age", b"17"),
    (b"Date", b"Wed, 21 Oct 2015 07:28:00 GMT"),
    (b"ETag", b'W/"a,b"'),
    (b"etag", b'"second"'),
    (b"Vary", b"*"),
    (b"Location", b"//evil.test/../%7Ea?x=\xe9"),
    (b"Cache-Control", b"no-store"),
    (b"Content-Type", b"text/event-stream"),
    (b"Content-Type", b"application/json; charset=utf-8"),
    (b"Content-Encoding", b"br"),
    (b"Content-Encoding", b"gzip, deflate"),
    (b"Retry-After", b"1"),
    (b"Via", b"1.1 other"),
    (b"Server", b""),
    (b"X-Accel-Buffering", b"no"),
    (b"Alt-Svc", b'h3=":443"'),
    (b"Keep-Alive", b"timeout=5"),
    (b"Trailer", b"X-Sum"),
    (b"Proxy-Connection", b"keep-alive"),
    (b"Oncegate-Status", b"replayed"),
    (b"oncegate-anything", b"x"),
    (b"Idempotent-Replayed", b"true"),
]


@dataclass
class Made:
    """An answer as the upstream makes it. `pairs` are its fields without framing; `body` what a client must get."""

    status: int
    reason: bytes
    pairs: Pairs
    body: bytes
    framing: str  # fixed, chunked, eof or none
    pieces: list[bytes]  # what is written, each followed by a turn of the loop; an empty one is a pause
    head_size: int  # of them belong to the head

    @property
    def disposition(self) -> bytes:
        if self.status in (307, 308, 401, 421, 425, 429):
            return b"released"
        gateways = (408, 502, 503, 504, *range(520, 528), 530, 598, 599)
        # As TELLING has it.
        says_it_itself = self.status >= 500 and any(name == b"PROXY-Status" for name, _ in self.pairs)
        return b"unknown" if self.status in gateways or says_it_itself else b"executed"


def visible(rng: random.Random, most: int) -> bytes:
    """Return a value of any allowed bytes, spaces and tabs within."""
    size = rng.randint(0, most)
    value = bytes(rng.choices(VISIBLE, k=size))
    return b"".join(rng.choice([b" ", b"\t", b"  ", b""]) if byte % 7 == 0 else bytes([byte]) for byte in value).strip()


def make_pairs(rng: random.Random) -> Pairs:
    pairs: Pairs = []
    for _ in range(rng.randint(0, 12)):
        name = bytes(rng.choices(TOKEN, k=rng.randint(1, 30)))
        if name.lower() not in FRAMING:
            pairs.append((name, visible(rng, rng.choice([8, 8, 40, 40, 1000]))))
    for name, value in rng.choices(pairs, k=rng.randint(0, 3)) if pairs else ():
        pairs.append((rng.choice([name.lower(), name.upper(), name]), rng.choice([value, b"other"])))
    pairs += rng.sample(TELLING, k=rng.randint(0, 5))
    if rng.random() < 0.15:
        pairs += [(b"Connection", b"X-Hop, x-other-hop"), (b"X-Hop", b"1"), (b"X-OTHER-hop", b"2")]
    rng.shuffle(pairs)
    return pairs


def make_body(rng: random.Random, number: int) -> bytes:
    match number % 32:
        case 0:
            size = rng.randint(MIB, 4 * MIB)
        case 1 | 2 | 3 | 4:
            size = 0
        case 5 | 6 | 7 | 8:
            size = rng.choice([1, 65535, 65536, 65537, 262143, 262144, 262145, 524289])
        case 9 | 10:
            return gzip.compress(rng.randbytes(rng.randint(0, 3000)) * 3, mtime=0)
        case _:
            size = int(2 ** rng.uniform(0, 17))
    return rng.randbytes(size)


def cut(rng: random.Random, data: bytes, most: int) -> Iterator[bytes]:
    """Yield `data` in pieces of random sizes."""
    at = 0
    while at < len(data):
        size = rng.randint(1, max(1, len(data) // rng.randint(1, most)))
        yield data[at : at + size]
        at += size


def make_answer(rng: random.Random, number: int, status: int) -> Made:
    """Return a random answer of this status."""
    reason = rng.choice(
        [b"", b"OK", b"Very  Much Done", b" led by a space", visible(rng, 40), b"\xe9t\xe9 \xff", b"a" * 900]
    )
    pairs, body = make_pairs(rng), make_body(rng, number)
    framing = rng.choice(["fixed", "chunked", "eof"])
    if status in (204, 304):
        framing, body = ("fixed" if status == 304 and body else "none"), b""
    fields = list(pairs)
    at = rng.randint(0, len(fields))
    if framing == "fixed":
        length = len(body) if status != 304 else rng.randint(0, 10**9)
        fields.insert(at, (rng.choice([b"Content-Length", b"content-length"]), b"%d" % length))
    elif framing == "chunked":
        fields.insert(at, (rng.choice([b"Transfer-Encoding", b"TRANSFER-encoding"]), b"chunked"))
    elif framing == "eof" and rng.random() < 0.5:
        fields.insert(at, (b"connection", b"close"))
    interim = rng.choice([b""] * 5 + [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nX-Early: 1\r\n\r\n"])
    lines = b"".join(b"%s:%s%s\r\n" % (name, rng.choice([b" ", b"", b"\t "]), value) for name, value in fields)
    head = b"%sHTTP/1.1 %d %s\r\n%s\r\n" % (interim, status, reason, lines)
    content = [body]
    if framing == "chunked":
        chunks = (
            rng.choice([b"%x\r\n", b"%X\r\n", b"000%x\r\n"]) % len(one) + one + b"\r\n" for one in cut(rng, body, 9)
        )
        content = [*chunks, b"0\r\n\r\n"]
    if rng.random() < 0.3:
        content = list(cut(rng, b"".join(content), 6))
    heads = list(cut(rng, head, 4)) if rng.random() < 0.2 else [head]
    if rng.random() < 0.1:
        heads.append(b"")  # the body comes after the proxy stopped waiting for the end of a small answer
    if rng.random() < 0.3 and heads[-1] and content and status not in (204, 304):
        heads[-1] += content.pop(0)
        return Made(status, reason, pairs, body, framing, [*heads, *content], len(heads) - 1)
    return Made(status, reason, pairs, body, framing, [*heads, *content], len(heads))


class Answers:
    """The script of an upstream that answers `/answers/<n>` with the n-th answer made."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        statuses = [*range(200, 600), *(204, 205, 304) * 6, *(200, 201) * 15]
        rng.shuffle(statuses)
        self.made = [make_answer(rng, number, status) for number, status in enumerate(statuses)]

    async def __call__(
        self, _: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Received
    ) -> None:
        method, target, _version = asked.line.split(b" ")
        made = self.made[int(target.rpartition(b"/")[2])]
        pieces = made.pieces
        if method == b"HEAD":
            whole = b"".join(pieces)
            end = whole.index(b"\r\n\r\n", whole.index(b"HTTP/1.1 %d" % made.status)) + 4
            pieces = [whole[:end]]
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0 if piece else 0.08)
        if made.framing == "eof":
            writer.close()


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers(seed=5)


def but(pairs: Sequence[tuple[bytes, bytes]], *names: bytes) -> Pairs:
    """Return the fields without these names."""
    return [pair for pair in pairs if pair[0].lower() not in names]


def passed(made: Made) -> Pairs:
    """Return the fields that a client must get of what no key guards: all but those of one hop."""
    hop = HOP_BY_HOP + ((b"x-hop", b"x-other-hop") if (b"Connection", b"X-Hop, x-other-hop") in made.pairs else ())
    return [pair for pair in made.pairs if pair[0].lower() not in hop]


def end_to_end(made: Made) -> Pairs:
    """Return the fields that a client must get: all but those of one hop and those that only we may say."""
    return [
        pair
        for pair in passed(made)
        if pair[0].lower() != b"idempotent-replayed" and not pair[0].lower().startswith(b"oncegate-")
    ]


def replayed(pairs: Pairs) -> Pairs:
    return [pair for pair in but(pairs, *NOT_REPLAYED) if not pair[0].lower().startswith(b"proxy-")]


class Callers:
    """Clients of one port that keep their connections: a byte too many or too few spoils the next answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[RawClient] = []

    async def ask(self, raw: bytes, head_only: bool = False) -> Answer:
        client = self._idle.pop() if self._idle else await RawClient.open(self._port)
        async with asyncio.timeout(60):
            answer = await client.ask(raw, head_only)
        assert answer is not None
        framed = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in answer.headers)
        if (b"Connection", b"close") in answer.headers or not (framed or head_only or answer.status in (204, 304)):
            assert await client.reader.read() == b""
            client.close()
        else:
            self._idle.append(client)
        return answer

    async def close(self) -> None:
        for client in self._idle:
            client.writer.write_eof()
            async with asyncio.timeout(60):
                assert await client.reader.read() == b""
            client.close()


@pytest.fixture
async def callers(standing: Proxy) -> AsyncIterator[Callers]:
    """Clients of the proxy."""
    callers = Callers(standing.port)
    yield callers
    await callers.close()


async def over(port: int, raw: bytes) -> Answer:
    """Ask on a connection of its own."""
    callers = Callers(port)
    answer = await callers.ask(raw)
    await callers.close()
    return answer


def differences(made: Made, got: Answer, expected: Pairs, head_only: bool = False, adds_own: bool = True) -> list[str]:
    """Return in what an answer differs from what was made, framing and our own fields aside."""
    found = []
    if (got.status, got.reason) != (made.status, made.reason):
        found.append(f"status line {got.status} {got.reason!r} for {made.status} {made.reason!r}")
    ours = OURS if adds_own and expected is not made.pairs else ()
    fields = but(got.headers, *FRAMING, REQUEST_ID, *ours)
    if fields != but(expected, *FRAMING):
        found.append(f"fields {fields} for {expected}")
    if got.body != (b"" if head_only else made.body):
        found.append(f"body of {len(got.body)} bytes for {len(made.body)}")
    if not got.complete or got.interim:
        found.append(f"complete {got.complete}, interim {got.interim}")
    if made.framing == "fixed" and len([1 for name, _ in got.headers if name.lower() == b"content-length"]) != 1:
        found.append("its length is not stated once")
    return found


def ours(answer: Answer) -> list[bytes | None]:
    return [answer.header("Oncegate-Status"), answer.header("Idempotent-Replayed")]


async def gather(works: Iterator[Awaitable[list[str]]]) -> list[str]:
    """Run a few at a time; return every difference that was found."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(work: Awaitable[list[str]]) -> list[str]:
        async with limit:
            return await work

    return [difference for found in await asyncio.gather(*map(one, works)) for difference in found]


async def test_an_answer_is_the_same_direct_at_first_and_replayed(callers, behind, answers):
    """Status, reason, fields and body are the same from the upstream, on the first pass and on a replay."""
    behind.script = answers

    async def one(number: int, made: Made) -> list[str]:
        raw = request(("POST", "PATCH")[number % 2], f"/answers/{number}", f"fidelity-{number}")
        direct = await over(behind.port, raw)
        direct.interim.clear()
        first = await callers.ask(raw)
        again = await callers.ask(raw)
        found = [f"direct: {one}" for one in differences(made, direct, made.pairs)]
        found += [f"first: {one}" for one in differences(made, first, end_to_end(made))]
        if ours(first) != [made.disposition, None]:
            found.append(f"first says {ours(first)}")
        match made.disposition:
            case b"released":
                found += [f"second: {one}" for one in differences(made, again, end_to_end(made))]
            case b"unknown":
                if again.slug != "outcome-unknown":
                    found.append(f"then {again.slug}")
            case b"executed":
                age = int(again.header("Age") or -1)
                if not 0 <= age - (17 if (b"Age", b"17") in made.pairs else 0) < 60:
                    found.append(f"age {age}")
                again.headers = but(again.headers, b"age")
                found += [f"replay: {one}" for one in differences(made, again, replayed(end_to_end(made)))]
                if ours(again) != [b"replayed", b"true"]:
                    found.append(f"replay says {ours(again)}")
        return [f"{number} ({made.status}, {made.framing}, {len(made.body)}): {one}" for one in found]

    assert await gather(one(number, made) for number, made in enumerate(answers.made)) == []
    executions = sum(2 if made.disposition == b"released" else 1 for made in answers.made)
    assert len(behind.received) == executions + len(answers.made)


async def test_a_passed_through_answer_is_the_same(callers, behind, answers):
    """Without a key or a guarded method an answer is passed on as it is, with what its upstream says of replays, and
    nothing is added."""
    behind.script = answers

    async def one(method: str, number: int, made: Made) -> list[str]:
        key = None if method == "POST" else f"pass-{number}"
        raw = request(method, f"/answers/{number}", key, b"" if method == "HEAD" else b"x")
        got = await callers.ask(raw, method == "HEAD")
        found = differences(made, got, passed(made), method == "HEAD", adds_own=False)
        return [f"{method} {number} ({made.status}, {made.framing}, {len(made.body)}): {one}" for one in found]

    numbered = list(enumerate(answers.made))
    shares = (("GET", numbered[::3]), ("POST", numbered[1::3]), ("HEAD", numbered))
    assert await gather(one(method, number, made) for method, share in shares for number, made in share) == []


async def test_trailers_are_dropped_on_the_way_back(callers, behind):
    """Trailers of an answer are dropped; the body before them is whole."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n"

    async def script(_: Any, __: Any, writer: asyncio.StreamWriter, ___: Any) -> None:
        writer.write(answer)

    behind.script = script
    for key in ("a-key", "a-key", None):
        got = await callers.ask(request(key=key))
        assert (got.body, got.complete, got.header("X-Sum"), got.header("Trailer")) == (b"ok", True, None, None)


async def test_a_length_named_by_connection_still_frames(callers, behind):
    """An answer whose Connection field nominates Content-Length keeps its framing on a kept connection."""

    async def script(_: Any, __: Any, writer: asyncio.StreamWriter, ___: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 2\r\n\r\nok")

    behind.script = script
    for key in ("a", "a", None, "b"):
        got = await callers.ask(request(key=key))
        assert (got.status, got.body, got.complete) == (200, b"ok", True)
        assert got.header("Content-Length") == b"2"


# The request ...

TARGETS = [
    b"/",
    b"/?",
    b"/??",
    b"/a?",
    b"/a?b=?c",
    b"/%7Ea/../b?x=%2F",
    b"/~a/./b/../../c",
    b"//evil//x",
    b"///",
    b"/a//b///?c//d",
    b"/a;b=c;d?x;y",
    b"/%",
    b"/%zz/%2",
    b"/a%00b%0d%0a",
    b"/a%23b%3Fc",
    b"/?a=b&a=b&c",
    b"/a?x=http://evil.test/?y",
    b"/http://evil.test/",
    b"/*",
    b"/:80",
    b"/@user:pass@host/",
    b"/\\windows\\..",
    b"/'(quoted)'\"<>{}|^`[]",
    b"/a+b?c+d=%20",
    b"/" + b"long/" * 3000,
    b"/?" + b"q=%41&" * 2000,
    b"/caf\xc3\xa9",
    b"/?q=\xc3\xa9",
    b"/\xff",
    b"/\xed\xa0\x80",
]


async def test_a_target_goes_on_byte_for_byte(upstream, valkey, proxies):
    """The target is forwarded as it came, below the upstream's own path, with a key and without."""
    for prefix in ("", "/base%7E/v1"):
        proxy = proxies(upstream.url + prefix, valkey.url, NAMESPACE=f"below{prefix}")
        for number, target in enumerate(TARGETS):
            for method, key in (("POST", f"target-{number}"), ("POST", None), ("GET", None)):
                before = len(upstream.received)
                raw = request(method, "/TARGET", key, b"x").replace(b"/TARGET", target, 1)
                assert (await over(proxy.port, raw)).status == 200, target
                wanted = b"%s %s%s HTTP/1.1" % (method.encode(), prefix.encode(), target)
                assert [one.line for one in upstream.received[before:]] == [wanted]


async def test_a_target_that_no_url_can_hold_is_refused_and_never_rewritten(standing, behind, valkey):
    """Controls and fragments in a target get 400: nothing is sent in their place, no key is claimed."""
    for target in (b"/a#b", b"/a\x7fb", b"/a\x01", b"/\xe9#b", b"/\xe9\x7f"):
        for key in ("a-key", None):
            raw = request("POST", "/TARGET", key, b"x").replace(b"/TARGET", target, 1)
            assert (await over(standing.port, raw)).status == 400, target
    assert behind.received == []
    assert valkey.records() == {}


ADDED = (
    b"host",
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-forwarded-host",
    b"via",
    b"oncegate-execution",
    b"oncegate-key-id",
    REQUEST_ID,
    *FRAMING,
)


async def test_request_fields_go_on_as_they_came(callers, behind):
    """Order, case, duplicates and bytes of end-to-end request fields reach the upstream, the key among them."""
    rng = random.Random(7)
    for number in range(150):
        pairs = [
            (
                bytes(rng.choices(TOKEN.replace(b"_", b""), k=rng.randint(4, 30))),
                visible(rng, rng.choice([8, 60, 3000])),
            )
            for _ in range(rng.randint(0, 10))
        ]
        pairs += [(name.swapcase(), value) for name, value in pairs[:2]]
        pairs += [(b"Cookie", b"a=1"), (b"traceparent", b"00-1-2-03"), (b"accept", b"*/*"), (b"Accept", b"a/b")]
        pairs += [(b"Content-Encoding", b"gzip"), (b"CONTENT-TYPE", b"a/b; c=\xe9")]
        if number % 3 == 0:
            pairs.append((b"idempotency-KEY", b'"fields-%d"' % number))
        rng.shuffle(pairs)
        lines = b"".join(b"%s: %s\r\n" % pair for pair in pairs)
        method = b"GET" if number % 3 == 1 else b"POST"
        raw = b"%s /f HTTP/1.1\r\nHost: api.test\r\n%sContent-Length: 1\r\n\r\nx" % (method, lines)
        assert (await callers.ask(raw)).status == 200
        assert but(behind.received[-1].headers, *ADDED) == pairs
    assert len(behind.received) == 150


def in_chunks(rng: random.Random, body: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in cut(rng, body, 9)) + b"0\r\n\r\n"


async def test_a_request_body_goes_on_as_it_came(callers, behind):
    """A request's body arrives byte for byte; a guarded one with its length, another one framed as it came."""
    rng = random.Random(11)

    async def one(method: str, guarded: bool, chunked: bool, body: bytes) -> None:
        before = len(behind.received)
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
        head = request(method, "/", f"body-{before}" if guarded else None, b"", framing, "Content-Encoding: gzip")
        answer = await callers.ask(head + (in_chunks(rng, body) if chunked else body))
        assert (answer.status, answer.body) == (200, b"ok")
        [got] = behind.received[before:]
        assert got.body == body
        if chunked and not guarded:
            assert (got.header("Transfer-Encoding"), got.header("Content-Length")) == ([b"chunked"], [])
        else:
            assert (got.header("Transfer-Encoding"), got.header("Content-Length")) == ([], [b"%d" % len(body)])
        assert got.header("Content-Encoding") == [b"gzip"]

    for size in (0, 1, 1000, 65536, 65537, MIB - 1, MIB, MIB + 1, 3 * MIB + 7, 4 * MIB):
        body = gzip.compress(rng.randbytes(1000)) if size == 1000 else rng.randbytes(size)
        for chunked in (False, True):
            await one("POST", True, chunked, body)
            await one("POST", False, chunked, body)
            await one("PUT", False, chunked, body)


async def test_a_request_without_a_body_gets_none(callers, behind):
    """A request without Content-Length and Transfer-Encoding is passed through without both."""
    for method in ("GET", "DELETE", "OPTIONS", "POST"):
        assert (await callers.ask(request(method, "/", None, b""))).status == 200
        got = behind.received[-1]
        assert (got.header("Transfer-Encoding"), got.header("Content-Length"), got.body) == ([], [], b"")


async def test_trailers_are_dropped_on_the_way_in(callers, behind):
    """Trailers of a request are dropped; the body before them is whole."""
    for key in ("trailers", None):
        head = request("POST", "/", key, b"", "Transfer-Encoding: chunked", "Trailer: X-Sum")
        assert (await callers.ask(head + b"2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n")).status == 200
        got = behind.received[-1]
        assert (got.body, got.header("X-Sum"), got.header("Trailer")) == (b"ok", [], [])


async def test_a_trailer_never_becomes_a_field_of_the_next_request(standing, behind):
    """What follows a chunked body on its connection, in the same write or later, is free of its trailers."""
    for number, key in enumerate(("trailers", None)):
        for in_one_write in (True, False):
            head = request("POST", f"/{number}{in_one_write}", key, b"", "Transfer-Encoding: chunked")
            client = await RawClient.open(standing.port)
            trailed = head + b"2\r\nok\r\n0\r\nIdempotency-Key: stolen\r\n\r\n"
            async with asyncio.timeout(20):
                answer = await client.ask(trailed + (request(key=None) if in_one_write else b""))
                assert answer.status in (200, 422)
                with contextlib.suppress(ConnectionError):
                    client.writer.write(request(key=None))
                    await client.reader.read()
            client.close()
    keys = [one.header("Idempotency-Key") for one in behind.received]
    assert [b"stolen"] not in keys


async def test_a_passed_through_body_is_streamed(proxies, valkey):
    """Without a key, the upstream sees the first bytes of a body before the client sends the last ones."""
    seen = bytearray()

    async def talk(_: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            while not seen.endswith((b"\nworld\r\n0\r\n\r\n", b"helloworld")):
                seen.extend(await reader.read(65536))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with serving(talk) as raw:
        proxy = proxies(raw.url, valkey.url)
        for framing, first, last in (
            ("Transfer-Encoding: chunked", b"5\r\nhello\r\n", b"5\r\nworld\r\n0\r\n\r\n"),
            ("Content-Length: 10", b"hello", b"world"),
        ):
            seen.clear()
            client = await RawClient.open(proxy.port)
            client.writer.write(request("POST", "/", None, b"", framing) + first)
            await until(lambda: b"hello" in seen)
            async with asyncio.timeout(20):
                answer = await client.ask(last)
            assert (answer.status, answer.body) == (200, b"ok")
            client.close()
