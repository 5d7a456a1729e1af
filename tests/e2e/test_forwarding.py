"""What goes on to the upstream and what comes back: fields by hop, forwarding fields, hosts, bodies as they are."""

import asyncio
import gzip
import itertools
import random
import zlib
from contextlib import closing

import pytest

from tests.conftest import with_and_without_head_cache
from tests.parts import (
    OK,
    Answer,
    Raw,
    RawClient,
    RawUpstream,
    Received,
    answering,
    ask,
    chunk,
    read_body,
    request,
    serving,
)

pytestmark = with_and_without_head_cache
HOP_BY_HOP = ("Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Upgrade", "HTTP2-Settings", "Proxy-Authorization")
PASSED = (
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("tracestate", "a=1,b=2"),
    ("baggage", "user=7"), ("Authorization", "Bearer  x"), ("Cookie", "a=1; b=2"), ("X-Api-Key", "k"),
    ("Content-Type", "Application/JSON;  charset=UTF-8"), ("Accept-Encoding", "gzip, br, zstd"), ("Range", "bytes=0-1"),
    ("Stripe-Signature", "t=1,v1=2"), ("User-Agent", "curl/8"), ("Prefer", "return=minimal"), ("Early-Data", "1"),
    ("X-Correlation-Id", "1"), ("Date", "Tue, 15 Nov 1994 08:12:31 GMT"), ("Content-Encoding", "gzip"), ("X-Empty", ""),
)  # fmt: skip
CASES = (str.lower, str.upper, str.title, str.swapcase)


@pytest.fixture(params=["guarded", "passed through"])
def key(request: pytest.FixtureRequest) -> str | None:
    """Both ways through the proxy."""
    return "forwarded" if request.param == "guarded" else None


async def forwarded(port: int, upstream: RawUpstream, key: str | None, *extra: str, **options: str) -> Received:
    """Send a request and return it as the upstream got it."""
    answer = await ask(port, request("POST", "/x", key, b"", *extra, **options))
    assert answer.status == 200
    return upstream.received[-1]


def names(message: Received | Answer) -> set[bytes]:
    return {name.lower() for name, _ in message.headers}


# Requests ...


@pytest.mark.parametrize("name", HOP_BY_HOP)
async def test_a_request_s_fields_of_one_hop_stay_there(standing, behind, key, name):
    """Fields that concern one connection alone do not reach the upstream, however they are spelled or repeated."""
    for number, spell in enumerate(CASES):
        extra = [f"{spell(name)}: x-{number}", f"{spell(name)}:y", "X-End: to-end"]
        received = await forwarded(standing.port, behind, key and f"{name}-{number}", *extra)
        assert name.lower().encode() not in names(received)
        assert received.header("x-end") == [b"to-end"]


NOMINATIONS = (
    ["x-mine"],
    ["X-MINE, close"],
    ["close,,  x-mine ,"],
    ["\tX-Mine\t"],
    ["keep-alive", "x-mine"],
    ["x-mine", "x-MINE"],
)


@pytest.mark.parametrize("connection", NOMINATIONS)
async def test_a_field_that_connection_nominates_stays_on_its_hop(standing, behind, key, connection):
    """What the client's Connection nominates is stripped, all of its lines and in any case; nothing else is."""
    extra = [*[f"Connection: {value}" for value in connection], "X-Mine: 1", "x-mine: 2", "X-Mine-Too: 3"]
    received = await forwarded(standing.port, behind, key, *extra)
    assert not names(received) & {b"x-mine", b"connection"}
    assert received.header("x-mine-too") == [b"3"]


async def test_end_to_end_fields_arrive_as_they_were_sent(standing, behind, key):
    """All other fields keep their order, case, spaces within, duplicates and bytes above 127."""
    fields = [*PASSED, ("X-Two", "1"), ("x-two", "2"), ("X-Bytes", "\xff\xe9"), ("X-Two", "1")]
    received = await forwarded(standing.port, behind, key, *[f"{name}: {value}" for name, value in fields])
    sent = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
    assert [pair for pair in received.headers if pair in sent] == sent


@pytest.mark.parametrize("value", ["abc", '"abc"', '"a\\"b\\\\c d"', "a-B_9;x=1", "A" * 255])
async def test_the_key_goes_on_as_received(standing, behind, value):
    """The upstream sees the client's own spelling of the key header."""
    received = await forwarded(standing.port, behind, None, f"iDempotency-KEY:  {value}")
    assert (b"iDempotency-KEY", value.encode()) in received.headers


async def test_trailers_of_a_request_are_dropped(standing, behind, key):
    """What follows the last chunk is no part of the request."""
    head = request("POST", "/x", key, b"", "Transfer-Encoding: chunked", "Trailer: X-Sum")
    assert (await ask(standing.port, head + chunk(b"hello") + b"0\r\nX-Sum: 1\r\n\r\n")).status == 200
    (received,) = behind.received
    assert received.body == b"hello"
    assert not names(received) & {b"x-sum", b"trailer"}


# Forwarding fields ...

CLAIMED = (
    "X-Forwarded-For: 203.0.113.9",
    "x-forwarded-for: 203.0.113.10",
    "X-FORWARDED-PROTO: https",
    "X-Forwarded-Host: claimed.test",
    "X-Forwarded-Port: 1",
    "X-Forwarded-Server: claimed",
    "X-Forwarded-Prefix: /claimed",
    "Forwarded: for=203.0.113.9;proto=https",
    "X-Real-IP: 203.0.113.9",
    "Via: 1.1 claimed",
)


async def test_the_upstream_learns_who_asked_and_how(standing, behind, key):
    """X-Forwarded-For, -Proto and -Host name the client's address, scheme and Host as sent; Via names the proxy."""
    received = await forwarded(standing.port, behind, key, host="API.test:8443")
    assert received.header("x-forwarded-for") == [b"127.0.0.1"]
    assert received.header("x-forwarded-proto") == [b"http"]
    assert received.header("x-forwarded-host") == [b"API.test:8443"]
    assert received.header("via") == [b"1.1 oncegate"]
    assert received.header("host") == [b"127.0.0.1:%d" % behind.port]


async def test_each_request_of_a_connection_is_described_by_itself(standing, behind):
    """What was said with one request of a connection is not said of the next."""
    rows = (("one.test", "HTTP/1.1"), ("two.test:81", "HTTP/1.0"), ("", "HTTP/1.0"), ("one.test", "HTTP/1.1"))
    with closing(await RawClient.open(standing.port)) as client:
        for number, (host, version) in enumerate(rows):
            for key in (f"each-{number}", None):
                raw = request("POST", "/x", key, b"", f"X-{number}: 1", "Connection: keep-alive", host=host)
                raw = raw.replace(b"HTTP/1.1", version.encode(), 1)
                assert (await client.ask(raw if host else raw.replace(b"Host: \r\n", b""))).status == 200
                received = behind.received[-1]
                assert received.header("x-forwarded-host") == ([host.encode()] if host else [])
                assert received.header("via") == [f"{version[5:]} oncegate".encode()]
                assert [name for name, _ in received.headers if name[:2] == b"X-" and len(name) == 3] == [
                    b"X-%d" % number
                ]


async def test_a_trusted_peer_s_forwarding_fields_are_kept(proxies, upstream, valkey, key):
    """From a trusted network the chain is continued: For and Via appended to, the others kept."""
    gate = proxies(upstream, valkey.url, TRUSTED_PROXIES="10.0.0.0/8,127.0.0.0/8")
    received = await forwarded(gate.port, upstream, key, *CLAIMED)
    assert b", ".join(received.header("x-forwarded-for")) == b"203.0.113.9, 203.0.113.10, 127.0.0.1"
    assert b", ".join(received.header("via")) == b"1.1 claimed, 1.1 oncegate"
    assert received.header("x-forwarded-proto") == [b"https"]
    assert received.header("x-forwarded-host") == [b"claimed.test"]
    assert received.header("x-forwarded-port") == [b"1"]
    assert received.header("x-forwarded-server") == [b"claimed"]
    assert received.header("x-forwarded-prefix") == [b"/claimed"]
    assert received.header("forwarded") == [b"for=203.0.113.9;proto=https"]
    assert received.header("x-real-ip") == [b"203.0.113.9"]


async def test_a_network_that_does_not_hold_the_peer_trusts_nobody(proxies, upstream, valkey, key):
    """Being one of some trusted networks counts, not that there are any."""
    gate = proxies(upstream, valkey.url, TRUSTED_PROXIES="10.0.0.0/8,127.0.0.2,::1/128")
    received = await forwarded(gate.port, upstream, key, *CLAIMED)
    assert b"claimed" not in received.head
    assert received.header("x-forwarded-for") == [b"127.0.0.1"]


async def test_a_trusted_peer_that_says_nothing_is_described_itself(proxies, upstream, valkey, key):
    """Without fields to keep, a trusted peer gets the same ones as any other."""
    gate = proxies(upstream, valkey.url, TRUSTED_PROXIES="127.0.0.1")
    received = await forwarded(gate.port, upstream, key)
    assert received.header("x-forwarded-for") == [b"127.0.0.1"]
    assert received.header("x-forwarded-proto") == [b"http"]
    assert received.header("x-forwarded-host") == [b"api.test"]
    assert received.header("via") == [b"1.1 oncegate"]


@pytest.mark.parametrize("varies", [True, False])
async def test_clients_that_send_the_same_head_are_each_described_as_they_are(proxies, upstream, valkey, key, varies):
    """One is trusted, one is not, and a third is trusted, too: nothing of one goes on with a request of another."""
    gate = proxies(upstream, valkey.url, TRUSTED_PROXIES="127.0.0.2,127.0.0.4")
    for number, host in enumerate(3 * ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")):
        client = await RawClient.open(gate.port, local_addr=(host, 0))
        trace = f"traceparent: 00-{number * varies:032x}-{1:016x}-01"
        answer = await client.ask(
            request("POST", "/x", None if key is None else f"{key}-{number}", b"{}", *CLAIMED, trace)
        )
        assert answer is not None
        assert answer.status == 200
        client.close()
        received, claims = upstream.received[-1], b"203.0.113.9, 203.0.113.10, "
        is_trusted = host in ("127.0.0.2", "127.0.0.4")
        assert b", ".join(received.header("x-forwarded-for")) == (claims if is_trusted else b"") + host.encode()
        assert received.header("x-forwarded-proto") == [b"https" if is_trusted else b"http"]
        assert received.header("traceparent") == [trace[13:].encode()]


# Hosts and targets ...


async def test_the_client_s_host_is_passed_on_where_wanted(proxies, upstream, valkey, key):
    """With PASS_HOST the upstream gets the client's Host as sent, and its own where HTTP/1.0 sends none."""
    gate = proxies(upstream, valkey.url, PASS_HOST="true")
    received = await forwarded(gate.port, upstream, key, host="Shop.Test:81")
    assert received.header("host") == [b"Shop.Test:81"]
    assert (await ask(gate.port, b"GET /old HTTP/1.0\r\n\r\n")).status == 200
    assert upstream.received[-1].header("host") == [b"127.0.0.1:%d" % upstream.port]
    assert upstream.received[-1].header("x-forwarded-host") == []
    assert upstream.received[-1].header("via") == [b"1.0 oncegate"]


async def test_an_upstream_may_have_an_absolute_name(proxies, upstream, valkey, key):
    """A name with a dot at its end is looked up as it is, and told to the upstream without the dot."""
    gate = proxies(f"http://localhost.:{upstream.port}", valkey.url)
    received = await forwarded(gate.port, upstream, key)
    assert received.header("host") == [b"localhost:%d" % upstream.port]


@pytest.mark.parametrize("prefix", ["", "/base/v2", "/base/"])
async def test_the_target_goes_on_below_the_upstream_s_path(proxies, upstream, valkey, prefix):
    """The target is added to the path prefix of the upstream byte for byte, without any tidying up."""
    gate = proxies(upstream.url + prefix, valkey.url)
    targets = ["/", "/a/../b/./c", "//x//", "/%7Ea/%2e%2E/b?x=%2F&y=a+b%20c", "/?", "/x?a?b", "/;p=1", "/%ff%00"]
    for target in targets:
        await ask(gate.port, request("POST", target, f"at-{target}".replace('"', ""), b""))
    got = [received.line.decode() for received in upstream.received]
    assert got == [f"POST {prefix.rstrip('/')}{target} HTTP/1.1" for target in targets]


SERVED = {
    "api.test": 200, "API.Test": 200, "api.test:1234": 200, "shop.test:81": 200, "SHOP.test:81": 200,
    "[2001:db8::1]": 200, "[2001:db8::1]:8080": 200, "[2001:DB8::1]": 200,
    "api.test.": 200,
    "shop.test": 421, "shop.test:82": 421, "evil.test": 421, "api.test.evil.test": 421, "xapi.test": 421,
    "[2001:db8::2]": 421, "127.0.0.1": 421, "localhost": 421,
}  # fmt: skip


async def test_only_our_hosts_are_served(proxies, upstream, valkey):
    """With HOSTS a request for another host gets 421, with a key and without, and nothing is forwarded or claimed."""
    gate = proxies(upstream, valkey.url, HOSTS="api.test, shop.test:81, [2001:db8::1]")
    for host, status in SERVED.items():
        for key in (f"hosts-{host.strip('[]')}", None):
            answer = await ask(gate.port, request("POST", f"http://{host}/x", key, b"", host=host))
            assert answer.status == status, host
            if status == 421:
                assert (answer.header("connection"), answer.problem["retryable"]) == (b"close", False)
    assert (await ask(gate.port, b"GET / HTTP/1.0\r\n\r\n")).status == 421
    fine = list(SERVED.values()).count(200)
    assert (len(upstream.received), len(valkey.records())) == (2 * fine, fine)


# Answers ...


async def all_ways(port: int, key: str | None) -> list[Answer]:
    """Return the answer as it is passed on, and with a key also as it is replayed."""
    raw = request("POST", "/x", key, b"")
    answers = [await ask(port, raw)]
    if key is not None:
        answers.append(await ask(port, raw))
        assert answers[1].header("idempotent-replayed") == b"true"
    return answers


@pytest.mark.parametrize("name", [*HOP_BY_HOP, "Connection"])
async def test_an_answer_s_fields_of_one_hop_stay_there(standing, behind, key, name):
    """Fields that concern the upstream's connection alone reach no client, now or in a replay."""
    for number, spell in enumerate(CASES):
        fields = f"{spell(name)}: x-{number}\r\n{spell(name)}: keep-alive\r\nX-End: to-end"
        behind.script = answering(f"HTTP/1.1 200 OK\r\n{fields}\r\nContent-Length: 2\r\n\r\nok".encode())
        for answer in await all_ways(standing.port, key and f"{name}-{number}"):
            assert name.lower().encode() not in names(answer)
            assert (answer.header("x-end"), answer.body) == (b"to-end", b"ok")


@pytest.mark.parametrize("connection", ["x-mine", "close, X-MINE", "x-mine\r\nconnection: x-other", " ,x-mine,"])
async def test_a_field_that_the_upstream_nominates_stays_on_its_hop(standing, behind, key, connection):
    """What the upstream's Connection nominates is stripped from the answer and from its replay."""
    fields = f"Connection: {connection}\r\nX-Mine: 1\r\nx-mine: 2\r\nX-Mine-Too: 3"
    behind.script = answering(f"HTTP/1.1 200 OK\r\n{fields}\r\nContent-Length: 2\r\n\r\nok".encode())
    for answer in await all_ways(standing.port, key):
        assert not names(answer) & {b"x-mine", b"connection"}
        assert (answer.header("x-mine-too"), answer.body) == (b"3", b"ok")


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", "Date", "Oncegate-Status"])
async def test_an_answer_stays_framed_whatever_the_upstream_nominates(standing, behind, key, name):
    """An upstream that nominates the framing of its answer takes no answer's end away."""
    behind.script = answering(f"HTTP/1.1 200 OK\r\nConnection: {name}\r\nContent-Length: 2\r\n\r\nok".encode())
    for answer in await all_ways(standing.port, key):
        assert (answer.status, answer.body, answer.complete) == (200, b"ok", True)
        assert answer.header("content-length") == b"2"


@pytest.mark.parametrize("name", ["Idempotent-Replayed", "Oncegate-Status", "Oncegate-Anything"])
async def test_the_proxy_s_own_fields_are_its_own(standing, behind, key, name):
    """An upstream cannot say for the proxy whether a guarded request was executed or replayed. What it says of a
    request that passes through is its own: it may be another oncegate."""
    for number, spell in enumerate(CASES):
        field = f"{spell(name)}: replayed\r\n{spell(name)}: true"
        behind.script = answering(f"HTTP/1.1 200 OK\r\n{field}\r\nContent-Length: 2\r\n\r\nok".encode())
        first, *again = await all_ways(standing.port, key and f"{name}-{number}")
        if key is None:
            stated = [value for lower, value in first.headers if lower.lower() == name.lower().encode()]
            assert stated == [b"replayed", b"true"]
            continue
        assert first.header("idempotent-replayed") is None
        assert first.header("oncegate-status") == b"executed"
        assert first.header("oncegate-anything") is None
        for replay in again:
            assert replay.header("oncegate-status") == b"replayed"
            assert replay.header("oncegate-anything") is None


async def test_fields_that_only_look_like_the_proxy_s_pass(standing, behind, key):
    """Only the exact names are the proxy's: others that begin alike are the upstream's."""
    fields = "Idempotent-Replayed-At: noon\r\nOncegates: 2\r\nX-Oncegate-Status: 3"
    behind.script = answering(f"HTTP/1.1 200 OK\r\n{fields}\r\nContent-Length: 2\r\n\r\nok".encode())
    for answer in await all_ways(standing.port, key):
        assert names(answer) >= {b"idempotent-replayed-at", b"oncegates", b"x-oncegate-status"}


async def test_trailers_of_an_answer_are_dropped(standing, behind, key):
    """What follows the last chunk of an answer is no part of it, and cannot mark it either."""
    head = b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n"
    trailers = b"0\r\nX-Sum: 1\r\nIdempotent-Replayed: true\r\nSet-Cookie: a=1\r\n\r\n"
    behind.script = answering(head + chunk(b"hello") + trailers)
    for answer in await all_ways(standing.port, key):
        assert (answer.body, answer.complete) == (b"hello", True)
        assert not names(answer) & {b"x-sum", b"trailer", b"set-cookie"}


async def to_the_end(port: int, raw: bytes) -> bytes:
    """Return all that comes for a request that ends its connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


@pytest.mark.fault(41)
@pytest.mark.parametrize("size", [5, 90_000], ids=["small", "streamed"])
async def test_trailers_reach_a_client_that_takes_them(standing, behind, key, size):
    """Who says `TE: trailers` gets the trailers of an answer that is passed on, executed or replayed, and the upstream
    learns it. Who does not gets the same body without them."""
    body = b"x" * size
    head = b"HTTP/1.1 200 OK\r\nTrailer: X-Sum, Date\r\nTransfer-Encoding: chunked\r\n\r\n"
    behind.script = answering(head + chunk(body) + b"0\r\nX-Sum: 1\r\nDate: never\r\nX-Late: 2\r\n\r\n")
    taking = request("POST", "/x", key and f"{key}-{size}", b"", "TE: trailers, deflate", "Connection: close, TE")
    for number in range(2 if key else 1):
        raw = await to_the_end(standing.port, taking)
        fields, _, rest = raw.partition(b"\r\n\r\n")
        assert rest.endswith(b"\r\n0\r\nX-Sum: 1\r\nX-Late: 2\r\n\r\n")
        assert rest.count(b"x") == size
        announced = b"Trailer: X-Sum, X-Late" if number else b"Trailer: x-sum"
        assert announced in fields.split(b"\r\n")
    assert behind.received[-1].header("TE") == [b"trailers"]
    assert behind.received[-1].header("Connection") == [b"TE"]
    (*_, plain) = await all_ways(standing.port, key and f"{key}-{size}")
    assert (plain.body, plain.complete) == (body, True)
    assert not names(plain) & {b"trailer", b"x-sum"}
    old = taking.replace(b"HTTP/1.1", b"HTTP/1.0")
    assert (await to_the_end(standing.port, old)).endswith(b"\r\n\r\n" + body)


async def test_a_redirect_is_passed_on(standing, behind, key):
    """The proxy follows no redirect: each is an answer like any other, with the upstream's own address as a path. 307
    and 308 free the key for it."""
    for status, number in zip((301, 302, 303, 307, 308), itertools.count()):
        place = f"http://127.0.0.1:{behind.port}/elsewhere"
        behind.script = answering(f"HTTP/1.1 {status} Go\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode())
        sent = key and f"redirect-{number}"
        if sent and status in (307, 308):
            answers = [await ask(standing.port, request("POST", "/x", sent, b""))]
            assert answers[0].header("oncegate-status") == b"released"
        else:
            answers = await all_ways(standing.port, sent)
        for answer in answers:
            assert (answer.status, answer.header("location")) == (status, b"/elsewhere")
    assert [received.line for received in behind.received] == [b"POST /x HTTP/1.1"] * 5


# Bodies ...

BOMB = gzip.compress(bytes(16 << 20), mtime=0)  # a thousand times its size
CODED = {
    "gzip": BOMB,
    "x-gzip": BOMB,
    "deflate": zlib.compress(bytes(4 << 20)),
    "br": random.Random(2).randbytes(5000),  # not even the coding it claims
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(100),
    "gzip, gzip": gzip.compress(BOMB, mtime=0),
    "GZIP": b"no gzip at all",
    "identity": b"plain",
}


@pytest.mark.parametrize("coding", CODED)
async def test_bodies_are_never_decoded(standing, behind, key, coding):
    """What is compressed, or says so, goes both ways and into the store byte for byte."""
    body = CODED[coding]
    field = f"Content-Encoding: {coding}"
    behind.script = answering(f"HTTP/1.1 200 OK\r\n{field}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    raw = request("POST", "/x", key, body, field, f"Accept-Encoding: gzip, {coding}")
    answers = [await ask(standing.port, raw) for _ in range(2)]
    for answer in answers:
        assert (answer.body == body, answer.header("content-encoding")) == (True, coding.encode())
        assert answer.header("content-length") == b"%d" % len(body)
    for received in behind.received:
        assert (received.body == body, received.header("content-encoding")) == (True, [coding.encode()])
    assert len(behind.received) == (1 if key else 2)


@pytest.mark.parametrize("size", [300, 700_000], ids=["small", "large"])
async def test_a_replay_is_decoded_for_a_client_that_does_not_accept_its_coding(standing, behind, size):
    """A retry that accepts no gzip gets the body itself. Everybody else gets what was stored, byte for byte."""
    plain = random.Random(3).randbytes(size) + b"a" * 3000
    coded = gzip.compress(plain)
    fields = b'Content-Encoding: gzip\r\nETag: "a"\r\nX-Kept: 1\r\nContent-Length: %d' % len(coded)
    behind.script = answering(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % fields + coded)
    key = f"coded-{size}"
    first = await ask(standing.port, request("POST", "/x", key, b"", "Accept-Encoding: identity"))
    assert (first.body, first.header("content-encoding")) == (coded, b"gzip")
    for accepted in ((), ("Accept-Encoding: gzip, br",), ("Accept-Encoding: identity;q=0",), ("Accept-Encoding: *",)):
        again = await ask(standing.port, request("POST", "/x", key, b"", *accepted))
        assert (again.body, again.header("content-encoding"), again.header("etag")) == (coded, b"gzip", b'"a"')
        assert again.header("content-length") == b"%d" % len(coded)
    for refused in ("identity", "gzip;q=0, *", ""):
        again = await ask(standing.port, request("POST", "/x", key, b"", f"Accept-Encoding: {refused}"))
        assert (again.status, again.body == plain, again.complete) == (200, True, True)
        assert not names(again) & {b"content-encoding"}
        assert (again.header("etag"), again.header("vary")) == (b'W/"a"', b"Accept-Encoding")
        assert (again.header("x-kept"), again.header("idempotent-replayed")) == (b"1", b"true")
        assert again.header("content-length") == b"%d" % len(plain)
    assert len(behind.received) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"no gzip",
        gzip.compress(b"x" * 99)[:-1],
        gzip.compress(random.Random(4).randbytes(300_000))[:-1],
        gzip.compress(bytes(17 << 20)),
        gzip.compress(random.Random(4).randbytes(1_100_000)),
    ],
    ids=["no gzip", "cut", "large and cut", "too large decoded", "too large"],
)
async def test_a_body_that_cannot_be_decoded_is_replayed_as_it_is(standing, behind, body):
    """Where the body is not in the coding that its head names, is cut, or would be too large, it stays what it is."""
    fields = b"Content-Encoding: gzip\r\nContent-Length: %d" % len(body)
    behind.script = answering(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % fields + body)
    for answer in await all_ways(standing.port, f"damaged-{len(body)}"):
        assert (answer.body, answer.header("content-encoding")) == (body, b"gzip")
    raw = request("POST", "/x", f"damaged-{len(body)}", b"", "Accept-Encoding: identity")
    assert (await ask(standing.port, raw)).body == body


@pytest.mark.parametrize("size", [300, 100_000], ids=["small", "large"])
async def test_a_decoded_replay_has_no_digest_of_the_coded_body(standing, behind, size):
    """Nor in a trailer; other trailers follow as they were stored."""
    plain = random.Random(6).randbytes(size)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    digest = b"Content-Digest: sha-256=:x:\r\n"
    behind.script = answering(head + chunk(gzip.compress(plain)) + b"0\r\n" + digest + b"X-Sum: 1\r\n\r\n")
    for accepted, trailers in (("gzip", digest + b"X-Sum: 1\r\n"), ("identity", b"X-Sum: 1\r\n")):
        fields = ("TE: trailers", "Connection: close, TE", f"Accept-Encoding: {accepted}")
        raw = request("POST", "/x", f"digest-{size}", b"", *fields)
        await ask(standing.port, request("POST", "/x", f"digest-{size}", b"", "Accept-Encoding: gzip"))
        reader, writer = await asyncio.open_connection("127.0.0.1", standing.port)
        writer.write(raw)
        found = await reader.read()
        writer.close()
        assert found.endswith(b"\r\n0\r\n" + trailers + b"\r\n")
        assert (b"Content-Digest" in found.partition(b"\r\n\r\n")[0]) == (accepted == "gzip")


@pytest.mark.parametrize("status", [b"204 No Content", b"200 OK"])
async def test_a_coding_of_nothing_is_not_decoded(standing, behind, status):
    """A response without a body is replayed as it is: a 204 has no Content-Length (RFC 9110, section 8.6)."""
    length = b"" if status.startswith(b"204") else b"Content-Length: 0\r\n"
    behind.script = answering(b"HTTP/1.1 %s\r\nContent-Encoding: gzip\r\n%s\r\n" % (status, length))
    raw = request("POST", "/x", f"empty-{len(status)}", b"", "Accept-Encoding: identity")
    first, again = await ask(standing.port, raw), await ask(standing.port, raw)
    assert again.header("idempotent-replayed") == b"true"
    for answer in (first, again):
        assert (answer.header("content-encoding"), answer.header("content-length")) == (b"gzip", length[16:-2] or None)


async def test_an_upstream_that_answers_at_the_head_keeps_its_connection(proxies, valkey):
    """A body that is here leaves with its head: an answer that comes before the rest costs no connection."""

    async def hasty(_: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            writer.write(OK)
            await read_body(reader, Received(head[:-2], b"", 0).headers)

    async with serving(hasty) as upstream:
        proxy = proxies(upstream.url, valkey.url, UPSTREAM_REST_S=0)
        client = await RawClient.open(proxy.port)
        for _ in range(5):
            answer = await client.ask(request(key=None, body=b"x" * 1000))
            assert answer is not None
            assert answer.body == b"ok"
        client.close()
        assert upstream.accepted == 1
