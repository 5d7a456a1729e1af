"""Endings: how far the exchange with the upstream got decides what the client, the key and the metrics say."""

import asyncio
import contextlib
import random
import re
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trustme

from tests.conftest import Valkey
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Blackhole,
    Proxy,
    Raw,
    RawClient,
    RawUpstream,
    Received,
    Script,
    Talk,
    abort,
    answering,
    ask,
    chunk,
    read_answer,
    request,
    serving,
    standing_upstream,
    until,
)
from tests.postgres_database import Database
from tests.postgres_probe import PostgresProbe
from tests.probes import Probe, RedisProbe
from tests.test_upstream import EarlyAnswer, server_tls
from tests.zygote import Zygote, standing_proxy

HEAD = b"HTTP/1.1 200 OK\r\n"
EVENTS = HEAD + b"Content-Type: text/event-stream\r\n"
MIB = 1 << 20


class Counts:
    """What the proxy counted since this was made: requests by outcome, claims by how they were settled."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._before = self._now()

    def _now(self) -> Counter[str]:
        found = re.findall(
            r'^oncegate_(?:requests|settled)_total{(\w+="\w+")} (\S+)$', self._proxy.admin("/metrics")[1], re.M
        )
        return Counter({name: int(float(value)) for name, value in found})

    async def are(self, **expected: int) -> None:
        """Wait until they are these: `executed=1, unknown__settled=2`. A request is counted after its answer."""
        wanted = Counter(
            {
                f'settlement="{name.removesuffix("__settled")}"'
                if name.endswith("__settled")
                else f'outcome="{name}"': count
                for name, count in expected.items()
            }
        )
        with contextlib.suppress(AssertionError):
            await until(lambda: self._now() - self._before == wanted, 5)
        assert self._now() - self._before == wanted


# The standing proxy is on a store of each kind; under `make faults` on that in PostgreSQL.
@pytest.fixture(scope="module", params=["redis", pytest.param("postgres", marks=pytest.mark.full)])
def place(request: pytest.FixtureRequest) -> Valkey | Database:
    of: Valkey | Database = request.getfixturevalue(
        "shared_database" if request.param == "postgres" else "shared_valkey"
    )
    return of


@pytest.fixture(scope="module")
def standing(place: Valkey | Database, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with standing_proxy(zygote, place.url, tmp_path_factory.mktemp("standing")) as proxy:
        yield proxy


@pytest.fixture
def kept(place: Valkey | Database) -> Iterator[Probe]:
    """What the standing proxy's store keeps: nothing at first."""
    if isinstance(place, Database):
        # The proxy's connections stay.
        place.connection.execute("DELETE FROM record; DELETE FROM chunk; DELETE FROM open_key")
        yield PostgresProbe(place)
        return
    with place.client() as client:
        client.flushall()
        yield RedisProbe(client, place.url)


@pytest.fixture
async def behind(standing: Proxy, kept: Probe) -> AsyncIterator[RawUpstream]:
    async with standing_upstream(standing) as server:
        yield server


@pytest.fixture
def counts(standing: Proxy) -> Counts:
    return Counts(standing)


@contextlib.asynccontextmanager
async def talking(talk: Talk, proxy: Proxy) -> Any:
    """Let `talk` answer as the upstream of a standing proxy."""
    async with serving(talk, sock=proxy.upstream_socket.dup()) as raw:
        yield raw


def then(*answers: bytes, close: bool = True, reset: bool = False) -> Script:
    """Return a script that answers so, one write each, and ends the connection."""

    async def script(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, ___: Received) -> None:
        for answer in answers:
            writer.write(answer)
            await writer.drain()
        if reset:
            await asyncio.sleep(0.02)
            abort(writer)
        elif close:
            writer.close()

    return script


async def assert_unknown(port: int, raw: bytes, status: int | None = None) -> None:
    """The retry is told that nobody knows, and that it need not come again; and which status came."""
    answer = await ask(port, raw)
    assert (answer.status, answer.slug) == (409, "outcome-unknown")
    assert answer.header("Retry-After") is None
    assert answer.header("Oncegate-Status") == b"unknown"
    assert answer.problem.get("original_status") == status
    assert (f"status {status} came" in answer.problem["detail"]) is (status is not None)


def assert_problem(answer: Answer, slug: str, says: bytes) -> None:
    status = {"upstream-unreachable": 502, "upstream-lost": 502, "upstream-timeout": 504}[slug]
    assert (answer.status, answer.slug, answer.complete) == (status, slug, True)
    assert answer.header("Oncegate-Status") == says
    assert answer.problem["retryable"] is (says == b"refused")
    assert answer.problem["reuse_key"] is (True if says == b"refused" else None)
    assert answer.header("x-should-retry") == (b"true" if says == b"refused" else b"false")


# Nothing was sent: the key is free ...


@pytest.fixture
def closed_port() -> Iterator[socket.socket]:
    """A socket that has a port and refuses connections until it listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


@pytest.mark.fault(20)
async def test_a_refused_upstream_frees_the_key(closed_port, stored, proxies):
    """Refused: 502 upstream-unreachable, the key free; the retry executes as soon as the upstream is there."""
    proxy = proxies(f"http://127.0.0.1:{closed_port.getsockname()[1]}", stored.url, CONNECT_RETRIES=1)
    counts = Counts(proxy)
    for _ in range(3):
        assert_problem(await ask(proxy.port, request()), "upstream-unreachable", b"refused")
        assert stored.states() == []
    upstream = RawUpstream()
    closed_port.listen()
    await upstream.start(closed_port.dup())
    answer = await ask(proxy.port, request())
    assert (answer.status, answer.header("Oncegate-Status")) == (200, b"executed")
    assert len(upstream.received) == 1
    await upstream.close()
    await counts.are(upstream_unreachable=3, released__settled=3, executed=1, stored__settled=1)


@pytest.mark.fault(20)
async def test_a_refused_client_certificate_frees_the_key(valkey, proxies, tmp_path):
    """Under TLS 1.3 the refusal comes when the request is on its way, before any of it was read: nothing ran, and the
    problem names the reason, for a keyed request and for one without a key."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = server_tls(ca)
    tls.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(tls)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        proxy = proxies(url, valkey.url, UPSTREAM_CA_FILE=str(tmp_path / "ca.pem"))
        counts = Counts(proxy)
        for raw in (request(), request(), request("PUT", key=None)):
            asking = asyncio.ensure_future(ask(proxy.port, raw))
            with EarlyAnswer(OK, tls, listener.dup()):
                answer = await asking
            assert (answer.status, answer.slug) == (502, "upstream-unreachable")
            assert "certificate_required" in answer.problem["detail"]
            assert valkey.states() == []
    await counts.are(upstream_unreachable=3, released__settled=2)


@pytest.mark.fault(20)
@pytest.mark.parametrize("how", ["black hole", "TLS to a plain port", "no such name"])
async def test_an_upstream_that_cannot_be_reached_frees_the_key(how, upstream, valkey, proxies):
    """No connection, no TLS, no such name: nothing was sent, and the key is free at once."""
    hole = Blackhole()
    url = {
        "black hole": hole.url,
        "TLS to a plain port": f"https://127.0.0.1:{upstream.port}",
        "no such name": "http://no-such-host.invalid",
    }[how]
    proxy = proxies(url, valkey.url, CONNECT_TIMEOUT_S=0.5, CONNECT_RETRIES=0)
    counts = Counts(proxy)
    for _ in range(2):
        assert_problem(await ask(proxy.port, request()), "upstream-unreachable", b"refused")
        assert valkey.states() == []
    await counts.are(upstream_unreachable=2, released__settled=2)
    assert upstream.received == []
    hole.close()


@pytest.mark.fault(20)
async def test_no_free_connection_frees_the_key(upstream, stored, proxies):
    """A request that finds every upstream connection in use until the connect timeout was not sent."""
    proxy = proxies(upstream, stored.url, MAX_UPSTREAM_CONNECTIONS=1, CONNECT_TIMEOUT_S=0.3)
    going_on = asyncio.Event()

    async def hold(_: Any, __: Any, writer: asyncio.StreamWriter, ___: Any) -> None:
        await going_on.wait()
        writer.write(OK)

    upstream.script = hold
    first = asyncio.create_task(ask(proxy.port, request(key="first")))
    await until(lambda: upstream.received)
    assert_problem(await ask(proxy.port, request(key="second")), "upstream-unreachable", b"refused")
    assert stored.states() == [b"in_flight"]
    going_on.set()
    assert (await first).status == 200
    assert (await ask(proxy.port, request(key="second"))).header("Oncegate-Status") == b"executed"
    assert len(upstream.received) == 2


# Sent, and no whole head came: unknown ...


@pytest.mark.fault(30)
async def test_a_silent_upstream_makes_the_key_unknown(upstream, stored, proxies):
    """No answer in time: 504 upstream-timeout, unknown; the connection is closed, so that a late answer is nobody's."""
    proxy = proxies(upstream, stored.url, UPSTREAM_TIMEOUT_S=1)
    counts = Counts(proxy)
    closed = asyncio.Event()

    async def silent(_: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ___: Any) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        closed.set()
        writer.write(OK)

    upstream.script = silent
    assert_problem(await ask(proxy.port, request()), "upstream-timeout", b"unknown")
    await asyncio.wait_for(closed.wait(), 10)
    await assert_unknown(proxy.port, request())
    assert (len(upstream.received), stored.states()) == (1, [b"unknown"])
    await counts.are(upstream_timeout=1, unknown__settled=1, outcome_unknown=1)


@pytest.mark.fault(42)
async def test_silence_within_a_body_aborts_the_client(upstream, stored, proxies):
    """An answer that stops half-way and stays silent is cut off for the client and unknown for the retry."""
    proxy = proxies(upstream, stored.url, UPSTREAM_TIMEOUT_S=1)
    counts = Counts(proxy)
    upstream.script = then(HEAD + b"Content-Length: 5\r\n\r\nhe", close=False)
    answer = await ask(proxy.port, request())
    assert (answer.status, answer.body, answer.complete) == (200, b"he", False)
    await assert_unknown(proxy.port, request(), 200)
    assert len(upstream.received) == 1
    await counts.are(truncated=1, unknown__settled=1, outcome_unknown=1)


@pytest.mark.fault(24)
@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_lost_within_the_request_makes_the_key_unknown(reset, standing, kept, counts):
    """An upstream that leaves after any part of the request may have executed it: one connection, 502, unknown."""
    whole = 300
    size = 0

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.requests.append(await reader.readexactly(size))
        if reset:
            abort(writer)

    sizes = range(1, whole, 13)
    async with talking(talk, standing) as raw:
        for size in sizes:
            keyed = request(key=f"k{size}", body=b"a" * whole)
            assert_problem(await ask(standing.port, keyed), "upstream-lost", b"unknown")
            await assert_unknown(standing.port, keyed)
        assert raw.accepted == len(raw.requests) == len(sizes)
    assert kept.states() == [b"unknown"] * len(sizes)
    await counts.are(upstream_lost=len(sizes), unknown__settled=len(sizes), outcome_unknown=len(sizes))


@pytest.mark.fault(24)
@pytest.mark.parametrize("reset", [False, True])
async def test_a_large_request_half_taken_is_unknown(reset, standing, kept, counts):
    """The same for a spooled body that the upstream took half of."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.requests.append(await reader.readexactly(2 * MIB))
        if reset:
            abort(writer)

    keyed = request(body=b"a" * 4 * MIB)
    async with talking(talk, standing) as raw:
        assert_problem(await ask(standing.port, keyed), "upstream-lost", b"unknown")
        await assert_unknown(standing.port, keyed)
        assert raw.accepted == 1
    await counts.are(upstream_lost=1, unknown__settled=1, outcome_unknown=1)


UNUSABLE = {
    "closed": b"",
    "half a head": HEAD + b"Content-Le",
    "garbage": b"\x00\xff garbage\r\n\r\n",
    "interim only": b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\n",
    "interim flood": b"HTTP/1.1 100 Continue\r\n\r\n" * 30 + OK,
    "101": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    "length and coding": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 02\r\n\r\nok",
    "obs-fold": HEAD + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
    "another coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\nok",
    "control character": HEAD + b"Content-Length: 2\x01\r\n\r\nok",
    "head too large": HEAD + b"X: y\r\n" * 20000 + b"Content-Length: 2\r\n\r\nok",
    "bare LF in a head": HEAD + b"X: a\nContent-Length: 2\r\n\r\nok",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/0.9": b"ok",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "TLS alert": b"\x15\x03\x03\x00\x02\x02\x16",
    "a request": b"POST / HTTP/1.1\r\nHost: us\r\nContent-Length: 2\r\n\r\nok",
    "no status": b"HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\nok",
    "status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
    "status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
    "status 000": b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nok",
    "no version": b"HTTP 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "lengths in a list": HEAD + b"Content-Length: 2, 3\r\n\r\nok",
    "lengths that differ": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "negative length": HEAD + b"Content-Length: -2\r\n\r\nok",
    "signed length": HEAD + b"Content-Length: +2\r\n\r\nok",
    "hexadecimal length": HEAD + b"Content-Length: 0x2\r\n\r\nok",
    "no length": HEAD + b"Content-Length: \r\n\r\nok",
    "length of 30 digits": HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nok",
    "coding twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "coding with more": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "space before a second length": HEAD + b"Content-Length : 2\r\nContent-Length: 3\r\n\r\nok",
    "no colon": HEAD + b"Content-Length 2\r\n\r\nok",
    "no name": HEAD + b": 2\r\nContent-Length: 2\r\n\r\nok",
    "NUL in a value": HEAD + b"X: a\x00b\r\nContent-Length: 2\r\n\r\nok",
    "bare CR in a value": HEAD + b"X: a\rb\r\nContent-Length: 2\r\n\r\nok",
    "chunk size that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n",
    "chunk without its end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok0\r\n\r\n",
}


# Of the others, 200 came.
WITHOUT_STATUS = {
    *("closed", "garbage", "interim only", "HTTP/0.9", "another protocol", "TLS alert", "a request", "no status"),
    *("status of two digits", "status of four digits", "status 000", "no version"),
}


@pytest.mark.fault(31)
async def test_an_unusable_answer_makes_the_key_unknown(standing, behind, kept, counts):
    """Without a usable head the request may have been executed all the same: 502 upstream-lost, never sent again. What
    came of a status is told, now and to every retry."""
    for name, answer in UNUSABLE.items():
        behind.script = then(answer)
        keyed = request(key=name.replace(" ", "-"))
        status = None if name in WITHOUT_STATUS else 101 if name == "101" else 200
        first = await ask(standing.port, keyed)
        assert_problem(first, "upstream-lost", b"unknown")
        assert first.problem.get("original_status") == status
        await assert_unknown(standing.port, keyed, status)
    many = len(UNUSABLE)
    assert (len(behind.received), behind.connections) == (many, many)
    assert kept.states() == [b"unknown"] * many
    await counts.are(upstream_lost=many, unknown__settled=many, outcome_unknown=many)


# The head came and the body did not finish: unknown ...

CUT = {
    "fixed": (b"Content-Length: 5\r\n\r\nhel", False),
    "fixed, by reset": (b"Content-Length: 5\r\n\r\nhel", True),
    "chunked, within a chunk": (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", False),
    "chunked, after a chunk": (b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"hel"), False),
    "chunked, before the last line": (b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"hel") + b"0\r\n", False),
    "chunked, malformed": (b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"hel") + b"what?", False),
    "chunked, by reset": (b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"hel"), True),
    "until closed, by reset": (b"\r\nhel", True),
}


@pytest.mark.fault(42)
@pytest.mark.parametrize("name", CUT)
async def test_an_answer_cut_before_its_head_was_passed_on(name, standing, behind, kept, counts):
    """A small answer that breaks off was not passed on yet: 502 upstream-lost, unknown, nothing of it kept."""
    rest, reset = CUT[name]
    behind.script = then(HEAD + rest, reset=reset)
    assert_problem(await ask(standing.port, request()), "upstream-lost", b"unknown")
    await assert_unknown(standing.port, request(), 200)
    assert len(behind.received) == 1
    assert all(b"hel" not in value for fields in kept.records().values() for value in fields.values())
    await counts.are(upstream_lost=1, unknown__settled=1, outcome_unknown=1)


@pytest.mark.fault(42)
@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
@pytest.mark.parametrize("name", CUT)
async def test_an_answer_cut_after_its_head_was_passed_on(name, version, standing, behind, kept, counts):
    """A streamed answer that breaks off breaks off for the client too, without a clean end; the retry gets nothing."""
    rest, reset = CUT[name]
    going_on = asyncio.Event()

    async def script(_: Any, __: Any, writer: asyncio.StreamWriter, ___: Any) -> None:
        writer.write(EVENTS + rest.removesuffix(b"what?"))
        await going_on.wait()
        writer.write(b"what?" if rest.endswith(b"what?") else b"")
        abort(writer) if reset else writer.close()

    behind.script = script
    keyed = request().replace(b"HTTP/1.1", version)
    client = await RawClient.open(standing.port)
    client.writer.write(keyed)
    async with asyncio.timeout(20):
        seen = await client.reader.readuntil(b"hel")
        assert seen.startswith(b"HTTP/1.1 200 OK\r\n")
        going_on.set()
        framed = version == b"HTTP/1.1" and not rest.startswith(b"\r\n")
        with contextlib.nullcontext() if framed or rest.startswith(b"Content") else pytest.raises(ConnectionResetError):
            left = await client.reader.read()
            assert b"0\r\n" not in left
    client.close()
    await assert_unknown(standing.port, keyed, 200)
    assert (len(behind.received), kept.states()) == (1, [b"unknown"])
    await counts.are(truncated=1, unknown__settled=1, outcome_unknown=1)


@pytest.mark.fault(42)
async def test_a_large_answer_cut_leaves_nothing_behind(standing, behind, kept, counts):
    """Chunks that were stored of an answer that broke off are dropped, and never served."""
    behind.script = then(HEAD + b"Content-Length: 4000000\r\n\r\n" + b"a" * 3_000_000)
    answer = await ask(standing.port, request())
    assert (answer.complete, answer.body) == (False, b"a" * len(answer.body))
    await assert_unknown(standing.port, request(), 200)
    [record] = kept.records().values()
    assert sum(map(len, record.values())) < 1000
    await counts.are(truncated=1, unknown__settled=1, outcome_unknown=1)


# Connections that are used again ...


@pytest.mark.fault(25)
async def test_an_upstream_that_closes_idle_connections_loses_nothing(proxies, valkey):
    """A connection that the upstream closed between two requests is not used: every request is executed, once."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(raw.accepted % 3):
            await raw.request(reader)
            writer.write(OK)
        await raw.request(reader)
        writer.write(OK)

    many = 150
    async with serving(talk) as raw:
        proxy = proxies(raw.url, valkey.url, UPSTREAM_REST_S=0)
        for number in range(many):
            key = f"k{number}" if number % 3 else None
            answer = await ask(proxy.port, request(key=key))
            assert (answer.status, answer.body) == (200, b"ok")
            # Until the connection that served its last request is closed; a close on its way is another matter.
            await until(lambda: raw.finished == closed(len(raw.requests)))
        assert len(raw.requests) == many
    assert valkey.states() == [b"complete"] * 100


def closed(requests: int) -> int:
    """Return how many connections have served their last request: they serve 2, 3, 1, 2, 3, 1 ..."""
    count = 0
    while requests >= (serves := (count + 1) % 3 + 1):
        requests -= serves
        count += 1
    return count


async def test_bytes_behind_an_answer_are_nobodys(standing, behind, counts):
    """An answer with bytes behind it is whole and stored; its connection serves nobody else."""
    behind.script = then(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nWRONG", close=False)
    for number in range(5):
        for _ in range(2):
            answer = await ask(standing.port, request(key=f"k{number}"))
            assert (answer.status, answer.body) == (200, b"ok")
    assert (len(behind.received), behind.connections) == (5, 5)
    await counts.are(executed=5, stored__settled=5, replayed=5)


# Statuses ...


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ("status", "field", "settled"),
    [
        (b"200 OK", b"", "store"),
        (b"301 Moved", b"Location: {elsewhere}\r\n", "store"),
        (b"307 Again", b"Location: {elsewhere}\r\n", "release"),
        (b"308 There", b"Location: {elsewhere}\r\n", "release"),
        (b"400 Bad", b"", "store"),
        (b"401 Who", b"WWW-Authenticate: Basic realm=x\r\n", "release"),
        (b"407 Who", b"Proxy-Authenticate: Basic realm=x\r\n", "store"),
        (b"408 Slow", b"", "unknown"),
        (b"409 Conflict", b"Retry-After: 1\r\n", "store"),
        (b"413 Large", b"", "store"),
        (b"421 Elsewhere", b"", "release"),
        (b"422 No", b"", "store"),
        (b"425 Early", b"", "release"),
        (b"429 Many", b"", "release"),
        (b"429 Many", b"Retry-After: 7\r\n", "release"),
        (b"429 Many", b"x-should-retry: false\r\n", "store"),
        (b"500 Broken", b"", "store"),
        (b"500 Broken", b"Server: lighttpd/1.4.69\r\n", "unknown"),
        (b"501 What", b"", "store"),
        (b"502 Gateway", b"", "unknown"),
        (b"503 Busy", b"", "unknown"),
        (b"503 Busy", b"Retry-After: 7\r\n", "unknown"),
        (b"504 Slow", b"", "unknown"),
        (b"504 Slow", b"Retry-After: 7\r\n", "unknown"),
        (b"524 Odd", b"", "unknown"),
        (b"599 Odd", b"", "unknown"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
async def test_what_a_status_means(status, field, settled, large, standing, behind, upstream, kept, counts):
    """Complete answers are passed on: most are stored, "not executed" frees the key, a gateway's words say nothing."""
    body = b"a" * 200_000 if large else b"body"
    field = field.replace(b"{elsewhere}", upstream.url.encode())
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    behind.script = answering(b"HTTP/1.1 " + status + b"\r\n" + field + length + body)
    first, again = await ask(standing.port, request()), await ask(standing.port, request())
    says = {"store": b"executed", "release": b"released", "unknown": b"unknown"}[settled]
    assert (b"%d %s" % (first.status, first.reason), first.body, first.complete) == (status, body, True)
    assert first.header("Oncegate-Status") == says
    assert [line for line in field.split(b"\r\n") if line] == [
        b"%s: %s" % pair for pair in first.headers if field and pair[0] == field.partition(b":")[0]
    ]
    match settled:
        case "store":
            assert (again.status, again.body, again.header("Oncegate-Status")) == (first.status, body, b"replayed")
            assert (len(behind.received), kept.states()) == (1, [b"complete"])
            await counts.are(executed=1, stored__settled=1, replayed=1)
        case "release":
            assert (again.status, again.body, again.header("Oncegate-Status")) == (first.status, body, b"released")
            assert (len(behind.received), kept.states()) == (2, [])
            await counts.are(released=2, released__settled=2)
        case "unknown":
            assert (again.status, again.slug, again.problem["original_status"]) == (
                409,
                "outcome-unknown",
                first.status,
            )
            assert (len(behind.received), kept.states()) == (1, [b"unknown"])
            assert all(b"aaaa" not in value for fields in kept.records().values() for value in fields.values())
            await counts.are(unknown=1, outcome_unknown=1, unknown__settled=1)
    assert upstream.received == []  # nobody followed


async def test_a_redirected_request_executes_at_its_new_place(standing, behind):
    """307 and 308 say "send this there": the client does, with its key, and that request is executed once."""
    for number, status in enumerate((b"307 Again", b"308 There")):
        key, there = f"moved-{number}", f"/there/{number}"
        behind.script = answering(b"HTTP/1.1 " + status + b"\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n")
        assert (await ask(standing.port, request(key=key))).header("Oncegate-Status") == b"released"
        behind.script = answering(OK)
        told = [(await ask(standing.port, request(target=there, key=key))).header("Oncegate-Status") for _ in range(2)]
        assert told == [b"executed", b"replayed"]


# An answer before the whole request was sent ...


@pytest.mark.fault(27)
@pytest.mark.parametrize("size", [512 * 1024, 8 * MIB])
async def test_an_early_answer_counts(size, standing, kept, counts):
    """An answer that comes while the body is still being sent is stored like any other; the connection is closed."""
    released = asyncio.Event()

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.transport.pause_reading()
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await released.wait()

    keyed = request(body=b"a" * size)
    async with talking(talk, standing) as raw:
        for says in (b"executed", b"replayed", b"replayed"):
            answer = await ask(standing.port, keyed)
            assert (answer.status, answer.body, answer.header("Oncegate-Status")) == (413, b"no", says)
        assert len(raw.requests) == 1
        released.set()
    await counts.are(executed=1, stored__settled=1, replayed=2)


@pytest.mark.fault(27)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("size", [MIB // 2, 4 * MIB])
async def test_an_early_answer_is_not_lost_with_its_connection(reset, size, standing, kept, counts):
    """The upstream answers and leaves with the upload unread: what arrived before its reset is stored and replayed."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.transport.pause_reading()
        writer.write(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        if reset:
            abort(writer)

    async with talking(talk, standing) as raw:
        for number in range(10):
            keyed = request(key=f"k{number}", body=b"a" * size)
            for says in (b"executed", b"replayed"):
                answer = await ask(standing.port, keyed)
                assert (answer.status, answer.body, answer.header("Oncegate-Status")) == (413, b"no", says)
        assert raw.accepted == len(raw.requests) == 10
    await counts.are(executed=10, stored__settled=10, replayed=10)


@pytest.mark.fault(27)
@pytest.mark.parametrize("framing", [f"Content-Length: {4 * MIB}", "Transfer-Encoding: chunked"])
async def test_an_early_answer_to_a_streamed_upload_reaches_its_client(framing, standing, kept, counts):
    """A client that sends all of its upload before it reads gets the answer that came in the middle of it."""
    answered = asyncio.Event()

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        answered.set()

    block = b"a" * 65536 if "Length" in framing else chunk(b"a" * 65536)
    async with talking(talk, standing):
        for _ in range(3):
            answered.clear()
            with contextlib.closing(await RawClient.open(standing.port)) as client:
                client.writer.write(request("PUT", "/x", None, b"", framing) + block)
                await answered.wait()
                for _ in range(4 * MIB // 65536 - 1):
                    client.writer.write(block)
                    await client.writer.drain()
                    await asyncio.sleep(0)
                if "Length" not in framing:
                    client.writer.write(LAST_CHUNK)
                answer = await read_answer(client.reader)
                assert answer is not None
                assert (answer.status, answer.body) == (413, b"no")
    await counts.are(passthrough=3)


# The limit of what is stored ...


@pytest.mark.fault(40)
@pytest.mark.parametrize("limit", [1000, 300_000])
async def test_an_answer_over_the_limit_is_passed_on_and_not_kept(limit, upstream, stored, proxies):
    """Up to the limit an answer is replayed; over it the first client gets all, the others `response-not-kept`."""
    proxy = proxies(upstream, stored.url, MAX_STORED_BYTES=limit)
    counts = Counts(proxy)
    kept = too_large = 0
    for size in (limit - 1, limit, limit + 1, 10 * limit):
        body = random.Random(size).randbytes(size)
        for framing in ("fixed", "chunked", "until closed"):
            match framing:
                case "fixed":
                    upstream.script = answering(b"HTTP/1.1 201 Made\r\nContent-Length: %d\r\n\r\n" % size + body)
                case "chunked":
                    parts = b"".join(chunk(body[at : at + 70_000]) for at in range(0, size, 70_000))
                    upstream.script = answering(CHUNKED.replace(b"200", b"201") + parts + LAST_CHUNK)
                case "until closed":
                    upstream.script = then(b"HTTP/1.1 201 Made\r\n\r\n" + body)
            keyed = request(key=f"{size}-{framing.replace(' ', '-')}")
            first = await ask(proxy.port, keyed)
            assert (first.status, first.body, first.complete) == (201, body, True)
            assert first.header("Oncegate-Status") == b"executed"
            again = await ask(proxy.port, keyed)
            if size <= limit:
                kept += 1
                assert (again.status, again.body, again.header("Oncegate-Status")) == (201, body, b"replayed")
            else:
                too_large += 1
                assert (again.status, again.slug) == (409, "response-not-kept")
                assert again.problem["original_status"] == 201
                assert again.header("Retry-After") is None
    sizes = [sum(map(len, fields.values())) for fields in stored.records().values()]
    assert len([size for size in sizes if size < 700]) == too_large
    assert len(upstream.received) == kept + too_large == 12
    await counts.are(
        executed=12,
        stored__settled=kept,
        stored_without_body__settled=too_large,
        replayed=kept,
        response_not_kept=too_large,
    )


# An answer that ends by closing ...


@pytest.mark.parametrize("size", [0, 5, 70_000, 3 * MIB])
@pytest.mark.parametrize("slow", [False, True])
async def test_an_answer_ended_by_closing_is_stored_whole(size, slow, standing, behind, kept, counts):
    """An answer without a stated end is passed on ended by closing, stored, counted, and replayed byte for byte."""
    body = random.Random(size).randbytes(size)

    async def script(_: Any, __: Any, writer: asyncio.StreamWriter, ___: Any) -> None:
        writer.write(HEAD + b"X-A: b\r\n\r\n" + body[: size // 2])
        await writer.drain()
        await asyncio.sleep(0.1 * slow)
        writer.write(body[size // 2 :])
        writer.close()

    behind.script = script
    framed = standing.metric("close_delimited_total")
    first = await ask(standing.port, request())
    assert (first.status, first.body, first.complete) == (200, body, True)
    assert (first.header("Connection"), first.header("Content-Length"), first.header("Transfer-Encoding")) == (
        b"close", None, None,
    )  # fmt: skip
    client = await RawClient.open(standing.port)
    for _ in range(2):  # on one connection: a replay knows its length
        client.writer.write(request())
        async with asyncio.timeout(20):
            again = await read_answer(client.reader)
        assert (again.status, again.body, again.header("X-A"), again.complete) == (200, body, b"b", True)
        assert again.header("Content-Length") == b"%d" % size
    client.close()
    assert standing.metric("close_delimited_total") == framed + 1
    assert (len(behind.received), kept.states()) == (1, [b"complete"])
    await counts.are(executed=1, stored__settled=1, replayed=2)


# Without a key the same endings claim nothing ...


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_without_a_key_an_ending_is_only_told(method, upstream, closed_port, valkey, proxies):
    """Pass-through: the same problems and the same abort, no word about a key, nothing in the store, no second try."""
    proxy = proxies(upstream, valkey.url, UPSTREAM_TIMEOUT_S=1)
    counts = Counts(proxy)
    plain = request(method, key=None)
    for script, slug in (
        (then(b""), "upstream-lost"),
        (then(b"garbage\r\n\r\n"), "upstream-lost"),
        (then(HEAD, reset=True), "upstream-lost"),
        (then(HEAD, close=False), "upstream-timeout"),
    ):
        upstream.script = script
        answer = await ask(proxy.port, plain)
        assert (answer.status, answer.slug) == (504 if slug == "upstream-timeout" else 502, slug)
        assert answer.header("Oncegate-Status") is None
    for rest, reset in CUT.values():
        upstream.script = then(HEAD + rest, reset=reset)
        answer = await ask(proxy.port, plain)
        assert (answer.status, answer.complete) in ((200, False), (502, True))
    assert len(upstream.received) == 4 + len(CUT)
    assert valkey.records() == {}
    await until(lambda: sum((counts._now() - counts._before).values()) == 4 + len(CUT))
    found = counts._now() - counts._before
    assert set(found) <= {'outcome="upstream_lost"', 'outcome="upstream_timeout"', 'outcome="truncated"'}
    nowhere = proxies(f"http://127.0.0.1:{closed_port.getsockname()[1]}", valkey.url, CONNECT_RETRIES=0)
    answer = await ask(nowhere.port, plain)
    assert (answer.status, answer.slug, answer.header("Oncegate-Status")) == (502, "upstream-unreachable", None)
    await Counts.are(Counts(nowhere))


@pytest.mark.parametrize("framing", ["Content-Length: 8388608", "Transfer-Encoding: chunked"])
async def test_an_early_answer_passes_while_the_client_still_sends(framing, standing, counts):
    """Without a key, an answer that comes before the client sent all of its body reaches it at once."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await reader.read()

    async with talking(talk, standing) as raw:
        client = await RawClient.open(standing.port)
        part = chunk(b"a" * MIB) if framing.startswith("Transfer") else b"a" * MIB
        async with asyncio.timeout(20):
            answer = await client.ask(request("POST", "/", None, b"", framing) + part)
        assert (answer.status, answer.body) == (413, b"no")
        client.close()
        await until(lambda: raw.finished == 1)  # half a request was on it: its connection is of no more use
    await counts.are(passthrough=1)


async def test_every_ending_is_counted_once(standing, behind, kept: Probe, counts):
    """Over a random mix of endings, the settlements add up to the claims, the outcomes to the requests."""
    rng = random.Random(3)
    kinds = {
        "stored": (answering(OK), "executed"),
        "released": (answering(b"HTTP/1.1 429 Many\r\nContent-Length: 0\r\n\r\n"), "released"),
        "unknown": (answering(b"HTTP/1.1 502 Gateway\r\nContent-Length: 0\r\n\r\n"), "unknown"),
        "lost": (then(b""), "upstream_lost"),
        "truncated": (then(EVENTS + b"Content-Length: 5\r\n\r\nhel"), "truncated"),
    }
    chosen = [rng.choice(list(kinds)) for _ in range(200)]

    async def script(raw: Any, reader: Any, writer: Any, asked: Received) -> None:
        kind = chosen[int(asked.line.split(b" ")[1][1:])]
        await kinds[kind][0](raw, reader, writer, asked)

    behind.script = script
    limit = asyncio.Semaphore(20)

    async def one(number: int) -> None:
        async with limit:
            await ask(standing.port, request(target=f"/{number}", key=f"k{number}"))

    await asyncio.gather(*map(one, range(200)))
    assert len(behind.received) == 200
    outcomes = Counter(kinds[kind][1] for kind in chosen)
    settled = Counter({"lost": "unknown", "truncated": "unknown"}.get(kind, kind) for kind in chosen)
    await counts.are(**outcomes, **{f"{settlement}__settled": count for settlement, count in settled.items()})
    assert Counter(kept.states()) == Counter({b"complete": settled["stored"], b"unknown": settled["unknown"]})
    assert standing.metric("in_flight") == 0
    assert standing.metric("buffered_bytes") == 0


@pytest.mark.fault(38)
async def test_an_upstream_that_says_it_is_at_it_keeps_its_key_in_flight(proxies, upstream, valkey):
    """However long interim answers go on, its lease is renewed, and nobody takes the key over."""
    gate = proxies(
        upstream, valkey.url, LEASE_MS=600, UPSTREAM_TIMEOUT_S=1.6, CLIENT_STALL_S=1, SETTLE_TIMEOUT_S=1,
        ON_UNKNOWN="retry",
    )  # fmt: skip

    async def at_it(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, ___: Received) -> None:
        for _ in range(13):  # longer than any single wait of an exchange may take with these settings: 14.6 s
            await asyncio.sleep(1.3)
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        writer.write(OK)

    upstream.script = at_it
    first = asyncio.create_task(ask(gate.port, request(key="at-it")))
    await asyncio.sleep(15.9)
    assert (await ask(gate.port, request(key="at-it"))).slug == "in-flight"
    assert (await first).header("oncegate-status") == b"executed"
    assert len(upstream.received) == 1
