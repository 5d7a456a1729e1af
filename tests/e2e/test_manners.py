"""Manners on the wire: other protocols, limits of heads, and ends of connections that cost nobody an answer."""

import asyncio
import itertools
import socket
from contextlib import closing

import pytest

from tests.parts import RawClient, ask, converse, read_answer, request, rest, until

TLS = "Upgrade: TLS/1.2"  # what Apache's HttpClient 5.4 offers with every GET
H2C = (
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAA",
)  # what Java's HttpClient offers first


# Other protocols ...


async def test_an_upgrade_that_is_not_served_is_ignored(standing, behind):
    """RFC 9110, section 7.8: the request is answered, the connection goes on, and the upstream sees no offer."""
    offers = [
        request("GET", "/1", None, b"", "Connection: Upgrade", TLS),
        request("GET", "/2", None, b"", "Connection: Upgrade, HTTP2-Settings", *H2C),
        request("POST", "/3", "offered", b"x" * 200_000, "Connection: Upgrade, HTTP2-Settings", *H2C),
        request("PUT", "/4", None, b"hello", "Connection: upgrade", "upgrade: websocket"),
        request("GET", "/5", None, b"", "Connection: Upgrade", "Upgrade: websocket, h2c"),
        request("GET", "/6", None, b"", "Connection: Upgrade", "Upgrade: websocket"),
        request("GET", "/7", None, b"", "Connection: Upgrade, keep-alive", "Upgrade: websocket").replace(
            b"HTTP/1.1", b"HTTP/1.0"
        ),
        request("GET", "/8", None, b""),
    ]
    with closing(await RawClient.open(standing.port)) as client:
        for one in offers + offers[:2]:
            answer = await asyncio.wait_for(client.ask(one), 10)
            assert answer is not None
            assert (answer.status, answer.header("connection") in (None, b"keep-alive")) == (200, True)
    together = await converse(standing.port, b"".join(offers).replace(b"offered", b"again"))
    assert [answer.status for answer in together] == [200] * len(offers)
    assert [(one.header("upgrade"), one.header("http2-settings")) for one in behind.received] == [([], [])] * 18
    assert {len(one.body) for one in behind.received if b"/3 " in one.head} == {200_000}


# Limits of heads ...


async def test_the_limits_of_heads_are_settings(proxies, upstream, valkey):
    """A longer target or field, a larger head and more fields pass where the settings allow them, and no more."""
    gate = proxies(upstream, valkey.url, MAX_HEAD_LINE_BYTES=40_000, MAX_HEAD_BYTES=100_000, MAX_HEAD_FIELDS=200)

    def asked(target: int, field: int, fields: int, name: str = "X") -> bytes:
        extra = [f"{name}{number}: {'v' * field}" for number in range(fields)]
        return request("GET", "/" + "t" * (target - 1), None, b"", *extra)

    for raw, status in (
        (asked(40_000, 10, 1), 200),
        (asked(40_001, 10, 1), 414),
        (asked(10, 39_998, 2), 200),
        (asked(10, 40_001, 1), 431),
        (asked(10, 39_000, 3), 431),
        (asked(10, 10, 199), 200),
        (asked(10, 10, 200), 431),
    ):
        for pieces in ([raw], [raw[:9000], raw[9000:]]):
            (answer,) = await converse(gate.port, *pieces)
            assert answer.status == status, (len(raw), status)
    assert [len(one.line) for one in upstream.received[:2]] == [len("GET  HTTP/1.1") + 40_000] * 2


# Ends of connections ...


def tell_all(port: int, raw: bytes) -> bytes:
    """Send all of this before anything is read, as simple clients do, and return what came, to the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(raw)
        came = b""
        while data := client.recv(65536):
            came += data
        return came


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        (b"GET /x HTTP/1.1\r\nbroken\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", b"414"),
        (b"GET /x RTSP/1.0\r\nHost: a\r\n\r\n", b"400"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", b"501"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 8000000\r\n\r\n", b"400"),
    ],
    ids=["no field", "a long target", "another protocol", "a coding", "two hosts"],
)
async def test_a_client_that_is_still_sending_reads_its_refusal(standing, behind, begun, status):
    """Whatever is wrong with a request, its refusal is not lost to the reset of what comes behind it."""
    for _ in range(3):
        came = await asyncio.to_thread(tell_all, standing.port, begun + b"x" * 8_000_000)
        assert came[9:12] == status
        assert came.endswith(b"}}")
    assert behind.received == []


def resets(client: RawClient) -> bool:
    """Send a byte, and return whether the connection is reset by now."""
    client.writer.write(b"x")
    return client.writer.transport.is_closing()


async def test_a_client_that_never_ends_is_left_after_a_while(proxies, upstream, valkey):
    """A refused client that stays has the linger of one window, and no further request is answered."""
    gate = proxies(upstream, valkey.url, CLIENT_STALL_S=0.5)
    with closing(await RawClient.open(gate.port)) as client:
        client.writer.write(b"broken\r\n\r\n")
        answer = await read_answer(client.reader)
        assert answer is not None
        assert answer.status == 400
        client.writer.write(request("GET", "/x", None, b""))
        assert await rest(client) == b""
        await until(lambda: resets(client))
    assert upstream.received == []


async def test_requests_before_one_that_says_close_are_answered(standing, behind):
    """Pipelined requests get their answers in their order, up to the one that says close."""
    ends = request("GET", "/end", None, b"", "Connection: close")
    for before in (1, 3, 20):
        raw = b"".join(request("GET", f"/{number}", None, b"") for number in range(before)) + ends
        answers = await converse(standing.port, raw + request("GET", "/never", None, b""))
        assert [answer.status for answer in answers] == [200] * (before + 1)
        assert [answer.header("connection") for answer in answers] == [None] * before + [b"close"]
    assert b"/never" not in b"".join(one.line for one in behind.received)


# Hosts, targets and hops ...


async def test_a_url_as_target_names_the_host(proxies, upstream, valkey):
    """RFC 9112, section 3.2.2: Host is ignored beside it; a final dot names the same host, and 0.0.0.0 is not it."""
    gate = proxies(upstream, valkey.url, PASS_HOST="true", HOSTS="shop.test")
    for target, host, status in (
        ("http://shop.test/a", "other.test", 200),
        ("http://shop.test:8080/b", "shop.test", 200),
        ("/c", "Shop.Test.", 200),
        ("http://shop.test.:80/d", "x", 200),
        ("http://other.test/e", "shop.test", 421),
        ("/f", "shop.test..", 421),
    ):
        answer = await ask(gate.port, request("GET", target, None, b"", host=host))
        assert answer.status == status, target
    assert [(one.line.split()[1], *one.header("host")) for one in upstream.received] == [
        (b"/a", b"shop.test"),
        (b"/b", b"shop.test:8080"),
        (b"/c", b"Shop.Test."),
        (b"/d", b"shop.test.:80"),
    ]
    # It is one request under one key, whichever way the host is written.
    keyed = [await ask(gate.port, request("POST", "/pay", "k", host=host)) for host in ("shop.test", "Shop.test.")]
    assert [answer.header("oncegate-status") for answer in keyed] == [b"executed", b"replayed"]


async def test_options_are_forwarded_as_often_as_they_may_be(standing, behind):
    """Max-Forwards counts down; at 0 the answer is ours, and the connection goes on. Other methods ignore it."""
    with closing(await RawClient.open(standing.port)) as client:
        for method, value in (("OPTIONS", "0"), ("OPTIONS", "3"), ("OPTIONS", "3"), ("OPTIONS", "x"), ("GET", "0")):
            answer = await client.ask(request(method, "/x", None, b"", f"Max-Forwards: {value}"))
            assert answer is not None
            assert (answer.status, answer.header("connection")) == (200, None)
            assert answer.body == (b"" if (method, value) == ("OPTIONS", "0") else b"ok")
    forwarded = [one.header("max-forwards") for one in behind.received]
    assert forwarded == [[b"2"], [b"2"], [b"x"], [b"0"]]


async def test_options_whose_body_is_never_asked_for(standing):
    """The answer closes the connection: the next request might stand where the body should."""
    expecting = ("Max-Forwards: 0", "Expect: 100-continue", "Content-Length: 5")
    answer = await ask(standing.port, request("OPTIONS", "/x", None, b"", *expecting))
    assert (answer.status, answer.interim, answer.header("connection")) == (200, [], b"close")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
async def test_the_ipv6_wildcard_serves_both_families(proxies, upstream, valkey, workers):
    """On [::] clients of IPv4 are served as well, under their own addresses, and so is the admin listener."""
    gate = proxies(
        upstream, valkey.url, LISTEN="[::]:0", ADMIN_LISTEN="[::]:0", WORKERS=workers, TRUSTED_PROXIES="127.0.0.0/8"
    )
    for host, client, shown in (("127.0.0.1", b"127.0.0.1", b"9.9.9.9, 127.0.0.1"), ("::1", b"::1", b"::1")):
        reader, writer = await asyncio.open_connection(host, gate.port)
        writer.write(request("GET", "/x", None, b"", "X-Forwarded-For: 9.9.9.9"))
        answer = await read_answer(reader)
        writer.close()
        assert answer is not None
        assert answer.status == 200
        assert upstream.received[-1].header("x-forwarded-for") == [shown], client
    assert gate.admin("/healthz")[0] == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"RTSP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"ICE/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 100 Continue\r\n\r\nRTSP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"RTSP/1.0 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=["RTSP", "ICE", "RTSP behind a 100", "a 100 of RTSP"],
)
@pytest.mark.parametrize("cuts", [[], [2], [30]])
async def test_an_answer_of_another_protocol_is_none(standing, behind, answer, cuts):
    """The API got the request, so that nobody knows what became of it; nothing of the answer is passed on or stored."""

    async def script(_, __, writer, ___):
        for start, end in itertools.pairwise([0, *cuts, len(answer)]):
            writer.write(answer[start:end])
            await asyncio.sleep(0.01)

    behind.script = script
    lost = await ask(standing.port, request(key="rtsp"))
    assert (lost.status, lost.slug, lost.header("oncegate-status")) == (502, "upstream-lost", b"unknown")
    assert (await ask(standing.port, request(key="rtsp"))).slug == "outcome-unknown"
    assert len(behind.received) == 1


@pytest.mark.parametrize(
    "last", [request("GET", "/end", None, b"", "Connection: close"), request(key="end", host="a b")]
)
async def test_answers_are_not_lost_to_what_comes_behind_the_last_one(standing, behind, last):
    """Whoever sends more behind a request that ends the connection still reads the answers up to that one."""
    raw = request("GET", "/first", None, b"") * 3 + last + request("GET", "/never", None, b"") * 50_000
    for _ in range(3):
        came = await asyncio.to_thread(tell_all, standing.port, raw)
        assert came.count(b"HTTP/1.1 ") == 4
        assert came.endswith(b"ok" if b"/end" in last else b"}}")
    assert {one.line.split()[1] for one in behind.received} <= {b"/first", b"/end"}


async def test_a_response_that_ends_by_closing_ends_without_a_reset(standing, behind):
    """Its clean end is a FIN, however much the client has sent behind its request."""
    behind.script = answering_by_closing
    raw = request("GET", "/first", None, b"") + request("GET", "/never", None, b"") * 50_000
    for _ in range(5):
        came = await asyncio.to_thread(tell_all, standing.port, raw)
        assert came.endswith(b"\r\n\r\n" + b"x" * 300_000)


async def answering_by_closing(_, __, writer, ___):
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 300_000)
    await writer.drain()
    writer.close()
