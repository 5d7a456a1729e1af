"""How the public listener treats a connection: its deadlines, counts and manners."""

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
import trustme

from tests.parts import (
    LAST_CHUNK,
    OK,
    RawClient,
    Talk,
    Tap,
    answering,
    answers_in,
    ask,
    chunk,
    converse,
    holding,
    read_answer,
    request,
    rest,
    until,
)

# How a connection lives ...


async def test_a_connection_serves_whatever_its_requests_end_with(proxies, upstream, valkey):
    """One connection goes on after executions, replays, every problem of a key, errors, HEAD, 204 and chunks."""
    gate = proxies(upstream, valkey.url)
    go = asyncio.Event()
    upstream.script = holding(go)
    running = asyncio.ensure_future(ask(gate.port, request(key="busy")))
    await until(lambda: upstream.received)
    nothing = b"HTTP/1.1 204 No Content\r\n\r\n"
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    failed = b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno"
    with closing(await RawClient.open(gate.port)) as client:
        for round_ in range(30):
            dialogue = [
                (OK, request(key=f"k{round_}"), 200, b"executed"),
                (OK, request(key=f"k{round_}"), 200, b"replayed"),
                (OK, request(key=f"k{round_}", body=b"another"), 422, b"refused"),
                (OK, request(key="busy"), 409, b"refused"),
                (OK, request(key="a,b"), 400, b"refused"),
                (OK, request("GET", key=None, body=b""), 200, None),
                (OK, request("HEAD", key=None, body=b""), 200, None),
                (nothing, request("DELETE", key=None, body=b""), 204, None),
                (chunks, request(key=None), 200, None),
                (chunks, request(key=f"c{round_}"), 200, b"executed"),
                (failed, request(key=f"f{round_}"), 500, b"executed"),
            ]
            for answer, raw, status, mark in dialogue:
                upstream.script = answering(answer)
                got = await client.ask(raw, head_only=raw.startswith(b"HEAD"))
                assert got is not None
                assert (got.status, got.header("oncegate-status"), got.header("connection")) == (status, mark, None)
                assert got.complete
        go.set()
        assert (await running).status == 200


async def test_pipelined_requests_are_answered_in_order(standing, behind):
    """A hundred requests in one write get their answers in their order, the refused ones in between too."""

    async def echo(_, __, writer, received):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(received.line), received.line))

    behind.script = echo
    wanted, raw = [], b""
    for number in range(25):
        keyed = request(target=f"/keyed/{number}", key=f"k{number}")
        raw += request("GET", f"/plain/{number}", None, b"") + keyed + keyed + request(key='"')
        wanted += [f"GET /plain/{number} HTTP/1.1"] + [f"POST /keyed/{number} HTTP/1.1"] * 2 + [400]
    answers = await converse(standing.port, raw)
    assert [answer.status if answer.status == 400 else answer.body.decode() for answer in answers] == wanted
    assert len(behind.received) == 50


async def test_a_client_that_half_closes_gets_its_answers(standing, behind):
    """Whoever says that it has said all still gets everything that it asked for, large uploads included."""
    behind.script = answering(OK, delay_s=0.2)
    keyed, plain = request(key="h1"), request("GET", key=None, body=b"")
    body = random.Random(1).randbytes(3 << 20)
    chunks = b"".join(chunk(body[start : start + 70_000]) for start in range(0, len(body), 70_000))
    for raw, number in (
        (keyed, 1),
        (plain + keyed + plain, 3),
        (request(key="h2", body=body), 1),
        (request("PUT", key=None, body=body), 1),
        (request("POST", "/v1/charges", "h3", b"", "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n", 1),
    ):
        answers = await converse(standing.port, raw, pause_s=0)
        assert [answer.status for answer in answers] == [200] * number
        assert answers[-1].header("connection") == b"close"
    assert behind.received[-1].body == behind.received[-2].body == behind.received[-3].body == body


@pytest.mark.parametrize("key", ["cut", None])
async def test_a_client_that_half_closes_within_its_body_is_refused(standing, behind, valkey, key):
    """A body that its own framing calls incomplete when the client ends is no request: 400, and nothing claimed."""
    method = "POST" if key else "PUT"
    (answer,) = await converse(standing.port, request(method, key=key)[:-3])
    assert (answer.status, answer.header("connection")) == (400, b"close")
    assert valkey.records() == {}
    assert [received.body for received in behind.received if received.body] == []


async def test_a_client_that_resets_at_any_moment_is_no_error(proxies, upstream, valkey):
    """Whenever a client resets its connection, the proxy has nothing to complain about and serves the next."""
    gate = proxies(upstream, valkey.url)
    upstream.script = answering(OK, delay_s=0.01)
    raws = (request("GET", key=None, body=b""), request(key="r", body=b"x" * 100_000), request("PUT", key=None))
    for number in range(150):
        client = await RawClient.open(gate.port)
        raw = raws[number % 3]
        client.writer.write(raw[: len(raw) - number % 4])
        if number % 5:
            await asyncio.sleep(0.004 * (number % 5 - 1))
        client.reset()
    await until(lambda: gate.metric("in_flight") == 0)
    assert (await ask(gate.port, request(key="r", body=b"x" * 100_000))).status == 200
    lines = [json.loads(line) for line in gate.log().splitlines()]
    # What else is on the store, which other tests use too, is no concern of the client's.
    events = {line["event"] for line in lines if line["level"] != "warning" and "store" not in line["event"]}
    assert events == {"serving", "request"}
    warnings = {line["event"] for line in lines if line["level"] == "warning" and "store" not in line["event"]}
    assert warnings <= {"requests without a credential"}, lines


async def test_http_1_0_is_answered_in_its_own_terms(standing, behind):
    """HTTP/1.0 gets no chunks; the connection ends after the answer unless keep-alive was asked for and can be."""
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    old = request(key=None, body=b"x").replace(b"HTTP/1.1", b"HTTP/1.0")
    kept = old.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    keyed = kept.replace(b"Host", b"Idempotency-Key: old\r\nHost")
    rows = (
        (old, OK, b"close", True),
        (kept, OK, b"keep-alive", False),
        (keyed, OK, b"keep-alive", False),
        (keyed, OK, b"keep-alive", False),  # the replay
        (old, chunks, b"close", True),
        (kept, chunks, b"keep-alive", False),  # small: its length is known
    )
    for raw, answer, connection, ends in rows:
        behind.script = answering(answer)
        with closing(await RawClient.open(standing.port)) as client:
            got = await client.ask(raw)
            assert (got.status, got.body, got.header("connection")) == (200, b"ok", connection)
            assert got.header("transfer-encoding") is None
            if ends:
                assert await rest(client) == b""
            else:
                assert (await client.ask(raw)).status == 200


async def test_a_stream_to_http_1_0_ends_by_closing(standing, behind):
    """What comes bit by bit, without a length, reaches an HTTP/1.0 client whole and is ended by closing."""
    tap = Tap()
    behind.script = tap.script
    raw = request(key="s").replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host", b"Connection: keep-alive\r\nHost")
    with closing(await RawClient.open(standing.port)) as client:
        tap.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"a")
        )
        client.writer.write(raw)
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"\r\nConnection: close\r\n" in head
        assert b"ransfer-" not in head
        assert await client.reader.readexactly(1) == b"a"
        tap.end(chunk(b"b"), LAST_CHUNK)
        assert await rest(client) == b"b"


# Expect: 100-continue ...


@pytest.mark.fault(28)
@pytest.mark.parametrize("key", ["expected", None])
async def test_the_proxy_itself_asks_for_an_expected_body(standing, behind, key):
    """After its checks the proxy says 100 once; the expectation does not reach the upstream."""
    raw = request("POST", "/x", key, b"", "Expect: 100-continue", "Content-Length: 5")
    with closing(await RawClient.open(standing.port)) as client:
        client.writer.write(raw)
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        answer = await client.ask(b"hello")
        assert (answer.status, answer.interim) == (200, [])
        # A body that is there already needs no invitation.
        assert (await client.ask(request("POST", "/x", key, b"", "Expect: 100-continue"))).interim == []
    assert behind.received[0].body == b"hello"
    assert behind.received[0].header("expect") == []


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("extra", "status"),
    [
        (["Idempotency-Key: a", "Content-Length: 33554433"], 413),
        (['Idempotency-Key: "', "Content-Length: 5"], 400),
        (["Idempotency-Key: a", "Idempotency-Key: a", "Content-Length: 5"], 400),
        (["Idempotency-Key: a", "Authorization: Digest x", "Content-Length: 5"], 400),
        (["Idempotency-Key: a", "Connection: cookie", "Content-Length: 5"], 400),
        (["Host: b", "Content-Length: 5"], 400),
    ],
)
async def test_a_body_that_will_not_be_used_is_not_asked_for(standing, behind, valkey, extra, status):
    """A request that fails its checks is answered at once, without 100, and the connection ends: what the client
    sends next may be the body or another request."""
    asked = request("POST", "/x", None, b"", "Expect: 100-continue", *extra)
    (answer,) = await converse(standing.port, asked, request("GET", "/instead", None, b""), pause_s=0.05)
    assert (answer.status, answer.interim, answer.header("connection")) == (status, [], b"close")
    assert valkey.records() == {}
    assert behind.received == []


# Deadlines and counts ...


@pytest.fixture
def tls_files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A certificate for this host, its key, and the authority that made them."""
    authority = trustme.CA()
    made = authority.issue_cert("localhost", "127.0.0.1")
    cert, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    made.private_key_pem.write_to_path(key)
    cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    authority.cert_pem.write_to_path(ca)
    return cert, key, ca


async def test_a_slow_head_is_cut_off_and_nobody_else(proxies, upstream, valkey, tls_files):
    """A head that is not whole 10 s, or CLIENT_STALL_S, after its first byte gets 408, a TLS handshake that long the
    end; a long request and good clients are served meanwhile."""

    async def script(_, reader, writer, received):
        await answering(OK, 4 if b"/long" in received.line else 0)(_, reader, writer, received)

    upstream.script = script
    gate = proxies(upstream, valkey.url, CLIENT_STALL_S=3)
    secure = proxies(upstream, valkey.url, CLIENT_STALL_S=3, TLS_CERT_FILE=tls_files[0], TLS_KEY_FILE=tls_files[1])
    began = time.monotonic()

    async def stall(*pieces: bytes, drip: bytes = b"") -> None:
        transport, talk = await asyncio.get_running_loop().create_connection(Talk, "127.0.0.1", gate.port)
        for piece in pieces:
            transport.write(piece)
            await asyncio.sleep(0.3)
        while not talk.over.is_set():
            assert time.monotonic() - began < 30
            if drip and not transport.is_closing():
                transport.write(drip)
            await asyncio.sleep(0.3)
        last = (await answers_in(talk.came))[-1]
        assert (last.status, last.header("connection"), last.problem["retryable"]) == (408, b"close", True)
        assert time.monotonic() - began > 2.5

    async def handshake() -> None:
        with closing(await RawClient.open(secure.port)) as client:
            assert await rest(client) == b""

    async def work() -> None:
        for number in range(20):
            assert (await ask(gate.port, request(key=f"good-{number}"))).status == 200
            await asyncio.sleep(0.2)

    began_head = b"POST /x HTTP/1.1\r\nHost: api.test\r\nA: "
    await asyncio.gather(
        stall(b"G"),
        stall(began_head),
        stall(began_head, drip=b"x"),
        stall(request()[:-20]),
        stall(request("GET", key=None, body=b""), b"GET / HT"),
        *[stall(began_head, drip=b"\r\nA: b") for _ in range(20)],
        handshake(),
        work(),
        ask(gate.port, request(target="/long", key=None)),
        ask(gate.port, request(target="/long", key="long")),
    )
    assert len(upstream.received) == 23
    assert gate.metric('requests_total{outcome="request_refused"}') == 25


async def test_a_head_in_parts_has_64_kib(standing, behind):
    """A head that comes bit by bit is refused with 431 once it is too large, though each of its fields is fine."""
    fields = [b"A: " + b"b" * 10_000 + b"\r\n"] * 12
    answers = await converse(standing.port, b"GET /x HTTP/1.1\r\nHost: a\r\n", *fields, pause_s=0.03)
    assert [(answer.status, answer.header("connection")) for answer in answers] == [(431, b"close")]
    assert behind.received == []


async def test_over_its_limit_of_connections_the_proxy_says_so_and_closes(proxies, upstream, valkey):
    """The connection over MAX_CONNECTIONS gets 503 and the end; when another has left, there is room again."""
    gate = proxies(upstream, valkey.url, MAX_CONNECTIONS=3)
    plain = request("GET", key=None, body=b"")
    inside = [await RawClient.open(gate.port) for _ in range(3)]
    for client in inside:
        assert (await client.ask(plain)).status == 200
    for _ in range(5):
        with closing(await RawClient.open(gate.port)) as outside:
            answer = await read_answer(outside.reader)
            assert (answer.status, answer.header("connection"), answer.header("retry-after")) == (503, b"close", b"1")
            assert answer.problem["retryable"] is True
            assert await rest(outside) == b""
    assert gate.metric('requests_total{outcome="overloaded"}') == 5
    counted = [gate.metric(f'client_connections_total{{event="{event}"}}') for event in ("opened", "refused")]
    assert (counted, gate.metric("client_open_connections")) == ([3, 5], 3)
    for client in inside:
        assert (await client.ask(plain)).status == 200
    inside.pop().close()
    with closing(await RawClient.open(gate.port)) as newcomer:
        async with asyncio.timeout(10):
            while (await newcomer.ask(plain)).status == 503:
                newcomer.close()
                newcomer = await RawClient.open(gate.port)
        newcomer.close()
    for client in inside:
        client.close()


# TLS ...


@asynccontextmanager
async def over_tls(port: int, context: ssl.SSLContext) -> AsyncIterator[RawClient]:
    client = await RawClient.open(port, ssl=context, server_hostname="localhost")
    try:
        yield client
    finally:
        client.close()
        with suppress(OSError):
            await client.writer.wait_closed()


async def test_the_public_listener_speaks_tls(proxies, upstream, valkey, tls_files):
    """With a certificate the listener speaks TLS alone, agrees on http/1.1, and tells the upstream https."""
    cert, key, ca = tls_files
    gate = proxies(upstream, valkey.url, TLS_CERT_FILE=cert, TLS_KEY_FILE=key)
    context = ssl.create_default_context(cafile=str(ca))
    for offered, agreed in ((["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)):
        context.set_alpn_protocols(offered)
        async with over_tls(gate.port, context) as client:
            assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() == agreed
            for status in (b"executed", b"replayed"):
                assert (await client.ask(request(key=f"tls-{len(offered)}"))).header("oncegate-status") == status
    assert upstream.received[-1].header("x-forwarded-proto") == [b"https"]
    with closing(await RawClient.open(gate.port)) as client:
        client.writer.write(request())
        assert b"HTTP/1.1 2" not in await rest(client)
    assert len(upstream.received) == 3


async def test_a_client_that_closes_tls_during_its_request_is_one_that_left(proxies, upstream, valkey, tls_files):
    """close_notify in the middle ends the connection, not the execution: the retry gets the replay."""
    cert, key, ca = tls_files
    gate = proxies(upstream, valkey.url, TLS_CERT_FILE=cert, TLS_KEY_FILE=key)
    context = ssl.create_default_context(cafile=str(ca))
    go = asyncio.Event()
    upstream.script = holding(go)
    async with over_tls(gate.port, context) as client:
        client.writer.write(request())
        await until(lambda: upstream.received)
    await until(lambda: gate.metric("in_flight") == 1)
    go.set()
    await until(lambda: gate.metric('requests_total{outcome="executed"}') == 1)
    async with over_tls(gate.port, context) as again:
        assert (await again.ask(request())).header("oncegate-status") == b"replayed"
    warnings = {line["event"] for line in map(json.loads, gate.log().splitlines()) if line["level"] == "warning"}
    assert warnings <= {"store problem", "store without a secret", "requests without a credential"}
