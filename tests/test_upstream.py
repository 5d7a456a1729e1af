"""The upstream: one request on one connection, ended as not sent, lost, or answered whole. Against raw servers."""

import asyncio
import contextlib
import datetime
import socket
import ssl
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import trustme
import uvloop

from loadtest.ports import free_port
from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.write_batcher import write_batcher
from oncegate.hostnames.resolver import Resolver
from oncegate.messages.response_head import ResponseHead
from oncegate.messages.strict_head import strict_response
from oncegate.observe.labels import UPSTREAM_CONNECTIONS
from oncegate.upstream.connection import Connection
from oncegate.upstream.connector import client_tls
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.idle import MAX_REST_S
from oncegate.upstream.pool import REUSE_IDLE_S, Pool
from oncegate.upstream.request import OutgoingRequest
from oncegate.upstream.response import IncomingResponse
from oncegate.upstream.window import completes_within
from tests.name_server import NameServer
from tests.parts import CHUNKED, LAST_CHUNK, Blackhole, Raw, Talk, abort, chunk, serving, until

REQUEST = b"POST /v1/charges HTTP/1.1\r\nHost: api.test\r\nContent-Length: 2\r\n\r\n{}"
HEAD = b"HTTP/1.1 200 OK\r\n"
OK = HEAD + b"Content-Length: 2\r\n\r\nok"
CLOSING = HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nok"
MIB = 1 << 20
ROOT = Path(__file__).parents[1]
BATCH = 1 << 18


def says(*pieces: bytes, then_close: bool = False) -> Talk:
    """Return a talk that answers every request of a connection with these pieces, each in a write of its own."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await raw.request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if then_close:
                return

    return talk


@asynccontextmanager
async def pool_to(port: int, tls: ssl.SSLContext | None = None, **options: Any) -> AsyncIterator[Pool]:
    options = {
        "host": "127.0.0.1", "connect_timeout_s": 10.0, "connect_retries": 0, "max_connections": 8,
        "buffered": MemoryBudget(1 << 28), "resolver": Resolver(1.0), **options,
    }  # fmt: skip
    pool = Pool(options.pop("host"), port, tls, **options)
    try:
        yield pool
    finally:
        pool.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def sent(pool: Pool, head_only: bool = False, reuse_idle_s: float = 60) -> AsyncIterator[Connection]:
    """A connection on which REQUEST was sent; given back at the end."""
    connection = await pool.acquire(reuse_idle_s)
    try:
        connection.send(REQUEST, b"", head_only)
        yield connection
    finally:
        pool.release(connection)


async def answer_of(connection: Connection, silence_s: float = 20) -> tuple[ResponseHead, bytes]:
    """Return a whole answer."""
    head = await connection.wait_for_head(silence_s)
    body = b""
    while data := await connection.next_chunk(silence_s):
        body += data
    return head, body


async def ask(pool: Pool, head_only: bool = False, reuse_idle_s: float = 60) -> tuple[int, bytes]:
    """Send REQUEST and return the answer's status and body."""
    async with asyncio.timeout(30), sent(pool, head_only, reuse_idle_s) as connection:
        head, body = await answer_of(connection)
        return head.status, body


@pytest.fixture
def anyone() -> trustme.CA:
    return trustme.CA()


def server_tls(ca: trustme.CA, *names: str, tls12: bool = False, **issue: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*(names or ("127.0.0.1",)), **issue).configure_cert(context)
    if tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.fixture
def trusting(anyone: trustme.CA, tmp_path: Any) -> ssl.SSLContext:
    """Our side, told of its own CA."""
    anyone.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return client_tls(str(tmp_path / "ca.pem"), None, None)


# Nothing was sent ...


async def test_refused_is_not_sent():
    """A refused connection is NotSent."""
    async with pool_to(free_port()) as pool:
        with pytest.raises(NotSent):
            await pool.acquire(60)


@pytest.mark.fault(20)
async def test_a_name_that_does_not_resolve_is_not_sent():
    """A failing look-up of the upstream's name is NotSent."""
    async with pool_to(80, host="a." * 130 + "a") as pool:
        with pytest.raises(NotSent):
            await pool.acquire(60)


@pytest.fixture
def black_hole() -> Iterator[int]:
    """The port of a listener whose backlog is full: the kernel drops every further SYN."""
    hole = Blackhole()
    yield hole.place.getsockname()[1]
    hole.close()


@pytest.mark.fault(20)
async def test_a_dropped_syn_is_not_sent(black_hole):
    """A connection that does not come about within the connect timeout is NotSent."""
    async with pool_to(black_hole, connect_timeout_s=0.3, connect_retries=3) as pool:
        began = time.monotonic()
        with pytest.raises(NotSent):
            await pool.acquire(60)
        assert time.monotonic() - began < 5


@pytest.mark.fault(20)
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b""])
async def test_tls_to_a_plain_port_is_not_sent(answer, trusting):
    """A server that does not speak TLS, whether it answers the hello in plain text or not at all, is NotSent."""

    async def talk(_: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await reader.read()

    async with serving(talk) as raw, pool_to(raw.port, trusting, connect_timeout_s=0.5) as pool:
        with pytest.raises(NotSent):
            await pool.acquire(60)


LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("of_another_ca", "names", "issue", "reason"),
    [
        (True, ("127.0.0.1",), {}, "accepted: unable to get local issuer certificate"),
        (False, ("other.test",), {}, "accepted: it has another name"),
        (
            False,
            ("127.0.0.1",),
            {"not_before": LONG_AGO, "not_after": LONG_AGO + datetime.timedelta(days=1)},
            "accepted: certificate has expired",
        ),
    ],
    ids=["unknown CA", "another name", "expired"],
)
async def test_a_wrong_certificate_is_not_sent(of_another_ca, names, issue, reason, anyone, trusting):
    """A certificate of an unknown CA, of another name or past its date is NotSent, with the reason: the server sees no
    request."""
    tls = server_tls(trustme.CA() if of_another_ca else anyone, *names, **issue)
    async with serving(says(OK), tls=tls) as raw, pool_to(raw.port, trusting) as pool:
        with pytest.raises(NotSent, match=reason) as ended:
            await ask(pool)
        assert "127.0.0.1" not in str(ended.value)
        assert raw.requests == []


@pytest.mark.parametrize("secure", [False, True])
async def test_a_connection_closed_before_anything_was_sent_never_hangs(secure, anyone, trusting):
    """A server that accepts and closes or resets ends as NotSent or UpstreamLost, at once and never by timeout."""

    async def talk(raw: Raw, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if raw.accepted % 2:
            abort(writer)

    ours, theirs = (trusting, server_tls(anyone)) if secure else (None, None)
    async with serving(talk, tls=theirs) as raw, pool_to(raw.port, ours, max_connections=1) as pool:
        for _ in range(100):
            with pytest.raises((NotSent, UpstreamLost)) as ended:
                await ask(pool)
            assert not getattr(ended.value, "timeout", False)


# Connecting again ...


async def test_connecting_is_tried_again():
    """An upstream that comes up while the proxy is connecting gets the request, once."""
    port = free_port()
    async with pool_to(port, connect_retries=20) as pool:
        asking = asyncio.create_task(ask(pool))
        await asyncio.sleep(0.2)
        assert not asking.done()
        async with serving(says(OK), port=port) as raw:
            assert await asking == (200, b"ok")
            assert (raw.accepted, raw.requests) == (1, [REQUEST])


async def test_connecting_is_tried_no_more_often_than_allowed(trusting):
    """`connect_retries` further tries are made, no more."""

    async def talk(_: Raw, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"no TLS here\r\n\r\n")

    async with serving(talk) as raw, pool_to(raw.port, trusting, connect_retries=3) as pool:
        with pytest.raises(NotSent):
            await pool.acquire(60)
        assert raw.accepted == 4


async def test_tries_stay_within_the_connect_timeout():
    """However many tries are allowed, they end with the connect timeout."""
    async with pool_to(free_port(), connect_retries=20, connect_timeout_s=0.3) as pool:
        began = time.monotonic()
        with pytest.raises(NotSent):
            await pool.acquire(60)
        assert time.monotonic() - began < 5


async def test_every_address_of_a_name_is_tried():
    """A name with an address on which nobody listens is reached at its other one."""
    async with serving(says(OK)) as raw, pool_to(raw.port, host="localhost") as pool:
        assert await ask(pool) == (200, b"ok")


async def test_an_address_is_not_looked_up():
    """Connecting to an address takes no thread, whose every use costs two turns of the loop."""
    program = """
import asyncio, sys, uvloop
from pathlib import Path
from oncegate.buffers.memory import MemoryBudget
from oncegate.hostnames.resolver import Resolver
from oncegate.upstream.pool import Pool
async def main(port):
    options = dict(connect_timeout_s=10.0, connect_retries=0, max_connections=8, buffered=MemoryBudget(1 << 20))
    pool = Pool("127.0.0.1", port, None, resolver=Resolver(1.0), **options)
    connection = await pool.acquire(60)
    print(connection.transport.get_extra_info("peername")[1] == port, len([*Path("/proc/self/task").iterdir()]))
uvloop.run(main(int(sys.argv[1])))
"""
    async with serving(says(OK)) as raw:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            str(raw.port),
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(ROOT / "proxy")},
        )
        said, _ = await child.communicate()
    assert said == b"True 1\n"


async def test_connections_are_counted():
    """Opened, used again, not opened, and waited for in vain; and how many are in which state."""
    counts = dict.fromkeys(UPSTREAM_CONNECTIONS, 0.0)
    async with serving(says(OK)) as raw:
        async with pool_to(raw.port, counts=counts, max_connections=1, connect_timeout_s=0.2) as pool:
            assert await ask(pool) == await ask(pool) == (200, b"ok")
            assert pool.states == {"active": 0, "idle": 1, "connecting": 0, "waiting": 0}
            async with sent(pool) as connection:
                waiting = asyncio.ensure_future(pool.acquire(60))
                await until(lambda: pool.states == {"active": 1, "idle": 0, "connecting": 0, "waiting": 1})
                with pytest.raises(NotSent):
                    await waiting
                await answer_of(connection)
        assert counts == {"opened": 1, "reused": 2, "failed": 0, "no_room": 1}
    async with pool_to(raw.port, counts=counts) as pool:
        with pytest.raises(NotSent):
            await pool.acquire(60)
    assert counts == {"opened": 1, "reused": 2, "failed": 1, "no_room": 1}


# Names ...


@asynccontextmanager
async def serving_at(*addresses: str, port: int, talk: Talk) -> AsyncIterator[dict[str, Raw]]:
    """Servers on several addresses of this machine, at one port."""
    async with contextlib.AsyncExitStack() as stack:
        served = {}
        for address in addresses:
            sock = socket.create_server((address, port))
            served[address] = await stack.enter_async_context(serving(talk, sock=sock))
        yield served


async def test_many_requests_at_once_look_a_name_up_once():
    """300 requests at once, by a name whose look-up takes 50 ms: all are answered."""
    names = NameServer("127.0.0.1")
    names.delay_s = 0.05
    options = {"host": "api.test", "resolver": Resolver(60.0, names), "max_connections": 300}
    async with serving(says(OK)) as raw, pool_to(raw.port, **options) as pool:
        assert await asyncio.gather(*[ask(pool) for _ in range(300)]) == [(200, b"ok")] * 300
    assert len(names.asked) == 1


async def test_a_silent_name_server_stalls_no_other_upstream():
    """Requests to an upstream whose name nobody answers for are not sent; those to another are answered meanwhile."""
    silent, quick = NameServer(), NameServer("127.0.0.1")
    silent.open.clear()
    names = Resolver(1.0, lambda host: silent(host) if host == "silent.test" else quick(host))
    try:
        async with (
            serving(says(OK)) as raw,
            pool_to(raw.port, host="silent.test", resolver=names, connect_timeout_s=0.4) as stalled,
            pool_to(raw.port, host="quick.test", resolver=names) as pool,
        ):
            refused = asyncio.gather(*[ask(stalled) for _ in range(8)], return_exceptions=True)
            async with asyncio.timeout(0.35):
                assert await ask(pool) == (200, b"ok")
            assert {str(one) for one in await refused} == {"no name server answered in time"}
            assert silent.most_running == 1
    finally:
        silent.open.set()


async def test_connections_are_spread_over_the_addresses():
    """Each address of a name gets its share of new connections."""
    port, addresses = free_port(), ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    names = Resolver(1.0, NameServer(*addresses))
    async with (
        serving_at(*addresses, port=port, talk=says(OK)) as served,
        pool_to(port, host="api.test", resolver=names, keep_idle_s=0) as pool,
    ):
        for _ in range(12):
            await ask(pool)
        assert [raw.accepted for raw in served.values()] == [4, 4, 4]


async def test_an_address_that_fails_is_left_for_the_others():
    """What one address refuses goes to the next within the same attempt, and for a while none is tried first that
    failed."""
    port, addresses = free_port(), ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    names = Resolver(1.0, NameServer(*addresses))
    async with (
        serving_at("127.0.0.2", "127.0.0.3", port=port, talk=says(OK)) as served,
        pool_to(port, host="api.test", resolver=names, keep_idle_s=0) as pool,
    ):
        for _ in range(12):
            assert await ask(pool) == (200, b"ok")
        assert all(raw.accepted >= 5 for raw in served.values())


async def test_a_handshake_that_fails_at_one_address_is_tried_at_the_next(anyone, trusting):
    """An address without TLS does not keep a request from the others."""
    port = free_port()
    names = Resolver(1.0, NameServer("127.0.0.1", "127.0.0.2"))
    sock = socket.create_server(("127.0.0.2", port))
    options = {"host": "localhost", "resolver": names, "connect_retries": 1, "keep_idle_s": 0}

    async def talk(_: Raw, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"no TLS here\r\n\r\n")

    async with (
        serving_at("127.0.0.1", port=port, talk=talk),
        serving(says(OK), sock=sock, tls=server_tls(anyone, "localhost")),
        pool_to(port, trusting, **options) as pool,
    ):
        assert [await ask(pool) for _ in range(4)] == [(200, b"ok")] * 4


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_both_families_are_reached():
    """A name with an IPv6 and an IPv4 address is reached at the one that is served, whichever the system prefers."""
    for address in ("127.0.0.1", "::1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.create_server((address, 0), family=family)
        port = sock.getsockname()[1]
        names = Resolver(1.0, NameServer("::1", "127.0.0.1"))
        async with serving(says(OK), sock=sock), pool_to(port, host="api.test", resolver=names) as pool:
            assert await ask(pool) == (200, b"ok")


async def test_a_moved_name_is_followed_under_steady_traffic():
    """Within the time that an answer is kept, requests go to the new address, though the connections to the old one
    are open and in use. A request under way is left alone."""
    ttl_s, port = 0.3, free_port()
    names = NameServer("127.0.0.1")
    slow = asyncio.Event()

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            if b"/slow" in await raw.request(reader):
                await slow.wait()
            writer.write(OK)

    async with (
        serving_at("127.0.0.1", "127.0.0.2", port=port, talk=talk) as served,
        pool_to(port, host="api.test", resolver=Resolver(ttl_s, names)) as pool,
    ):
        running = await pool.acquire(60)
        running.send(b"GET /slow HTTP/1.1\r\nHost: api.test\r\n\r\n", b"")
        assert await ask(pool) == (200, b"ok")
        names.addresses = ("127.0.0.2",)
        moved = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < moved + ttl_s:
            await ask(pool)
            await asyncio.sleep(0.01)
        before, new = len(served["127.0.0.1"].requests), len(served["127.0.0.2"].requests)
        for _ in range(10):
            await ask(pool)
        assert len(served["127.0.0.1"].requests) == before
        assert len(served["127.0.0.2"].requests) == new + 10
        slow.set()
        assert (await answer_of(running))[1] == b"ok"
        pool.release(running)
        assert running.is_discarded


async def test_a_name_is_watched_only_while_connections_are_open():
    """Without connections nobody is asked."""
    names = NameServer("127.0.0.1")
    options = {"host": "api.test", "resolver": Resolver(0.1, names), "keep_idle_s": 0.3}
    async with serving(says(OK)) as raw, pool_to(raw.port, **options) as pool:
        await ask(pool)
        await asyncio.sleep(0.25)
        assert len(names.asked) > 1
        await until(lambda: not pool._open_count)
        await asyncio.sleep(0.1)
        asked = len(names.asked)
        await asyncio.sleep(0.25)
        assert len(names.asked) == asked


async def test_the_dot_of_an_absolute_name_is_not_in_the_handshake(anyone, trusting):
    """Neither the server name nor the check of the certificate has it (RFC 6066, section 3)."""
    tls, told = server_tls(anyone, "localhost"), []
    tls.sni_callback = lambda _, name, __: told.append(name)
    async with serving(says(OK), tls=tls) as raw, pool_to(raw.port, trusting, host="localhost.") as pool:
        assert await ask(pool) == (200, b"ok")
    assert told == ["localhost"]


# TLS ...


async def test_an_own_ca_is_trusted(anyone, trusting):
    """An https upstream whose certificate a given CA signed is asked and its connection used again."""
    async with serving(says(OK), tls=server_tls(anyone)) as raw, pool_to(raw.port, trusting) as pool:
        assert [await ask(pool), await ask(pool)] == [(200, b"ok")] * 2
        assert raw.requests == [REQUEST] * 2


@pytest.mark.parametrize(("tls12", "shown"), [(True, True), (False, True), (True, False), (False, False)])
async def test_a_client_certificate(tls12, shown, anyone, tmp_path):
    """A demanded client certificate is shown; without one, TLS 1.2 refuses before the request, and 1.3 after it, which
    this server does without an alert."""
    anyone.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ours = anyone.issue_cert("oncegate.test")
    ours.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "our.pem"))
    pem = str(tmp_path / "our.pem") if shown else None
    tls = server_tls(anyone, tls12=tls12)
    tls.verify_mode = ssl.CERT_REQUIRED
    anyone.configure_trust(tls)
    async with (
        serving(says(OK), tls=tls) as raw,
        pool_to(raw.port, client_tls(str(tmp_path / "ca.pem"), pem, pem)) as pool,
    ):
        if shown:
            assert await ask(pool) == (200, b"ok")
        else:
            with pytest.raises(NotSent if tls12 else UpstreamLost):
                await ask(pool)
            assert raw.requests == []


class OneConnection(ABC):
    """A server in a thread that takes one connection."""

    def __init__(self, listener: socket.socket | None = None) -> None:
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    @abstractmethod
    def _serve(self) -> None:
        """Accept and serve the connection."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


class EarlyAnswer(OneConnection):
    """A server in a thread that answers one request with its body unread, and closes: the kernel sends a RST."""

    def __init__(
        self,
        answer: bytes,
        context: ssl.SSLContext | None,
        listener: socket.socket | None = None,
        before: bytes = b"",
    ) -> None:
        super().__init__(listener)
        # `before` leaves at once, `answer` once something of the body is there.
        self._before, self._answer, self._context = before, answer, context
        # Something of the body is unread; the connection is over.
        self.body_came, self.ended = threading.Event(), threading.Event()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        sock.settimeout(20)
        # All of the answer arrives before the reset, which discards what has not left.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ssl.SSLError), sock:
            tls = self._context.wrap_socket(sock, server_side=True) if self._context is not None else sock
            with tls:
                tls.recv(1 if not self._before else 65536)
                tls.sendall(self._before)
                self.body_came.wait(20)
                tls.sendall(self._answer)
        self.ended.set()


@pytest.mark.fault(20)
@pytest.mark.parametrize("late", [False, True])
async def test_a_refused_certificate_is_not_sent(late, anyone, tmp_path):
    """Under TLS 1.3 the server refuses our certificate when the request is on its way, and says so before it reads
    anything: NotSent, with the reason. Also where a write to the closed connection fails before that was read."""
    anyone.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = server_tls(anyone)
    tls.verify_mode = ssl.CERT_REQUIRED
    anyone.configure_trust(tls)
    with EarlyAnswer(OK, tls) as server:

        async def upload() -> AsyncIterator[bytes]:
            server.ended.wait(20)  # nothing of ours runs
            for _ in range(3):
                yield b"a" * BATCH
                time.sleep(0.01)

        async with pool_to(server.port, client_tls(str(tmp_path / "ca.pem"), None, None)) as pool:
            connection = await pool.acquire(60)
            if late:
                connection.send_stream(b"POST / HTTP/1.1\r\n\r\n", upload(), chunked=True)
            else:
                connection.send(REQUEST, b"")
            with pytest.raises(NotSent, match="certificate_required"):
                await answer_of(connection)
            pool.release(connection)


def alert(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}]")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "before", "tls12", "ending"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "", False, NotSent),
        ("SSLV3_ALERT_BAD_CERTIFICATE", "", False, NotSent),
        ("TLSV1_ALERT_UNKNOWN_CA", "", False, NotSent),
        # A server of TLS 1.2 may read the request, and then ask for another handshake.
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "", True, UpstreamLost),
        # What the server says of itself, or of a record.
        ("TLSV1_ALERT_INTERNAL_ERROR", "", False, UpstreamLost),
        ("TLSV1_ALERT_ACCESS_DENIED", "", False, UpstreamLost),
        ("SSLV3_ALERT_BAD_RECORD_MAC", "", False, UpstreamLost),
        # Our own judgement, no alert of the server.
        ("CERTIFICATE_VERIFY_FAILED", "", False, UpstreamLost),
        # The handshake had ended: something came, in this exchange or in one before it.
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "interim", False, UpstreamLost),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "part of a head", False, UpstreamLost),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "an exchange", False, UpstreamLost),
    ],
)
async def test_only_an_alert_of_the_handshake_is_not_sent(reason, before, tls12, ending, anyone, trusting):
    """A fatal alert frees the key only where the server can have read nothing before it: a refused certificate, under
    TLS 1.3, on a connection that nothing else came on."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write({"interim": b"HTTP/1.1 102 P\r\n\r\n", "part of a head": HEAD, "an exchange": OK}.get(before, b""))
        await raw.request(reader)
        await reader.read()

    async with serving(talk, tls=server_tls(anyone, tls12=tls12)) as raw, pool_to(raw.port, trusting) as pool:
        if before == "an exchange":
            await ask(pool)
        async with sent(pool) as connection:
            await until(lambda: len(raw.requests) == 1 + (before == "an exchange"))
            if before in ("interim", "part of a head"):
                await until(lambda: connection.response._head_pieces)
            transport = connection.transport
            assert transport is not None
            connection.connection_lost(alert(reason))
            with pytest.raises(ending) as ended:
                await answer_of(connection)
            assert type(ended.value) is ending
            transport.abort()
        assert raw.accepted == 1


class TlsOnce(OneConnection):
    """A TLS server in a thread that answers one connection and ends it with or without close_notify.

    `patient`: after its close_notify it waits for the other's before it closes, as few servers do.
    """

    def __init__(self, context: ssl.SSLContext, answer: bytes, *, notify: bool, patient: bool = True) -> None:
        super().__init__()
        self._context, self._answer, self._notify, self._patient = context, answer, notify, patient

    def _serve(self) -> None:
        plain, _ = self._listener.accept()
        plain.settimeout(20)
        with self._context.wrap_socket(plain, server_side=True) as tls, contextlib.suppress(OSError):
            tls.recv(65536)
            tls.sendall(self._answer)
            if self._notify:
                tls.settimeout(20 if self._patient else 0)
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.unwrap()
                tls.settimeout(20)
            tls.shutdown(socket.SHUT_WR)  # a FIN; of the TLS session it says nothing
            tls.recv(1)


@pytest.mark.parametrize("size", [0, 5, MIB])
@pytest.mark.parametrize("tls12", [True, False])
@pytest.mark.parametrize("notify", [True, False])
async def test_over_tls_an_answer_ended_by_closing_needs_close_notify(notify, tls12, size, anyone, trusting):
    """Over TLS, an answer delimited by closing is whole after close_notify and UpstreamLost without it."""
    body = b"a" * size
    with TlsOnce(server_tls(anyone, tls12=tls12), HEAD + b"\r\n" + body, notify=notify) as server:
        async with pool_to(server.port, trusting) as pool:
            if notify:
                assert await ask(pool) == (200, body)
            else:
                with pytest.raises(UpstreamLost):
                    await ask(pool)


def end_by_alert(listener: socket.socket, context: ssl.SSLContext, answer: bytes) -> None:
    """Answer one connection by TLS, and end it with a fatal alert: as if a record of it had come damaged."""
    sock, _ = listener.accept()
    sock.settimeout(20)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)

    def run(step: Any) -> None:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))

    with sock:
        run(tls.do_handshake)
        run(lambda: tls.read(65536))
        tls.write(answer)
        sock.sendall(outgoing.read())
        time.sleep(0.05)
        incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(ssl.SSLError):
            tls.read(65536)
        sock.sendall(outgoing.read())
        sock.recv(1)


async def test_over_tls_an_alert_is_no_end(anyone, trusting):
    """A fatal alert never completes an answer that ends by closing: the rest of it may not have come."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=end_by_alert, args=(listener, server_tls(anyone), HEAD + b"\r\nok"))
        thread.start()
        async with pool_to(listener.getsockname()[1], trusting) as pool:
            with pytest.raises(UpstreamLost, match="bad_record_mac"):
                await ask(pool)
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("notify", [True, False])
async def test_over_tls_a_stated_length_counts(notify, anyone, trusting):
    """Over TLS, an answer shorter than its stated length is UpstreamLost, whatever close_notify says."""
    with TlsOnce(server_tls(anyone), HEAD + b"Content-Length: 3\r\n\r\nok", notify=notify) as server:
        async with pool_to(server.port, trusting) as pool:
            with pytest.raises(UpstreamLost):
                await ask(pool)
    with TlsOnce(server_tls(anyone), OK, notify=notify) as server:
        async with pool_to(server.port, trusting) as pool:
            assert await ask(pool) == (200, b"ok")


@pytest.mark.parametrize("size", [420_000, 540_000, 860_000])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(("notify", "patient"), [(True, True), (True, False), (False, False)])
async def test_over_tls_the_end_of_a_paused_answer_is_seen(notify, patient, stated, size, anyone, trusting):
    """The end of an answer that waited for a slow consumer is judged like any other, with all that came before it."""
    length = b"Content-Length: %d\r\n" % size if stated else b""
    answer = HEAD + length + b"\r\n" + b"a" * size
    with TlsOnce(server_tls(anyone), answer, notify=notify, patient=patient) as server:
        async with pool_to(server.port, trusting) as pool, sent(pool) as connection:
            await connection.wait_for_head(20)
            await asyncio.sleep(0.1)  # the rest and the end of the connection come while nobody takes anything
            got = 0
            with contextlib.nullcontext() if notify or stated else pytest.raises(UpstreamLost):
                while data := await connection.next_chunk(20):
                    got += len(data)
            assert got == size


# The limit on connections ...


async def test_no_free_connection_in_time_is_not_sent():
    """A request that gets no connection within the connect timeout is NotSent; none is opened over the limit."""
    async with serving(says(OK)) as raw, pool_to(raw.port, max_connections=2, connect_timeout_s=0.3) as pool:
        held = [await pool.acquire(60), await pool.acquire(60)]
        with pytest.raises(NotSent):
            await ask(pool)
        await until(lambda: raw.accepted == 2)
        for connection in held:
            pool.release(connection)
        assert await ask(pool) == (200, b"ok")
        assert raw.accepted <= 3


async def test_the_queue_is_served_in_order():
    """Who waits longest for a connection gets the next one; who comes later does not overtake."""
    async with serving(says(OK)) as raw, pool_to(raw.port, max_connections=1) as pool:
        served: list[int] = []

        async def one(number: int) -> None:
            async with sent(pool) as connection:
                served.append(number)
                await answer_of(connection)

        async with sent(pool) as first:
            await answer_of(first)
            waiting = [asyncio.create_task(one(number)) for number in range(5)]
            await asyncio.sleep(0.05)
        await one(5)  # it asks right after the release, before those who wait have run
        await asyncio.wait_for(asyncio.gather(*waiting), 30)
        assert served == [0, 1, 2, 3, 4, 5]
        assert raw.accepted == 1


async def test_who_stops_waiting_passes_its_turn_on():
    """A request that gives up at the moment its turn comes does not take the turn with it."""
    async with serving(says(OK)) as raw, pool_to(raw.port, max_connections=1) as pool:
        held = await pool.acquire(60)
        leaving = asyncio.create_task(ask(pool))
        staying = asyncio.create_task(ask(pool))
        await asyncio.sleep(0.05)
        pool.release(held)
        leaving.cancel()
        assert await asyncio.wait_for(staying, 5) == (200, b"ok")
        assert raw.accepted <= 2


async def test_a_failed_try_frees_its_place():
    """Whatever a connection came to, its place under the limit is free again."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write([b"", b"garbage", HEAD, HEAD + b"Content-Length: 3\r\n\r\n", CLOSING][raw.accepted % 5])

    async with serving(talk) as raw, pool_to(raw.port, max_connections=1) as pool:
        outcomes = [await asyncio.gather(ask(pool), return_exceptions=True) for _ in range(20)]
    lost = [isinstance(outcome, UpstreamLost) for [outcome] in outcomes]
    assert lost.count(True) == 16
    assert raw.accepted == 20
    async with pool_to(free_port(), max_connections=1, connect_timeout_s=1) as pool:
        for _ in range(3):
            with pytest.raises(NotSent, match="reached"):
                await pool.acquire(60)


# Idle connections ...


@pytest.mark.fault(25)
async def test_a_connection_is_used_again_only_within_the_idle_guard():
    """A connection idle for less than the guard is used again; for longer, or with the guard at 0, a fresh one is."""
    async with serving(says(OK)) as raw, pool_to(raw.port) as pool:
        await ask(pool)
        await ask(pool, reuse_idle_s=60)
        assert raw.accepted == 1
        await ask(pool, reuse_idle_s=0)
        assert raw.accepted == 2
        await asyncio.sleep(0.1)
        await ask(pool, reuse_idle_s=0.05)
        assert raw.accepted == 3


async def test_a_connection_that_was_paused_is_read_again():
    """Whoever paused it for a slow client need not have asked for more: the next answer on it comes all the same."""
    async with serving(says(OK)) as raw, pool_to(raw.port) as pool:
        async with asyncio.timeout(10), sent(pool) as connection:
            while not connection.response.is_complete:
                await connection.next_arrival(10)
            assert connection.take_body() == b"ok"
            connection.pause_reading()
        assert await ask(pool) == (200, b"ok")
        assert raw.accepted == 1


async def test_connections_that_nobody_uses_again_are_closed():
    """What was idle for too long to be used again is closed; a later request gets a fresh connection."""
    async with serving(says(OK)) as raw, pool_to(raw.port, keep_idle_s=0.2) as pool:
        await asyncio.gather(*[ask(pool) for _ in range(5)])
        assert raw.accepted == 5
        async with asyncio.timeout(10):
            while pool._open_count:
                await asyncio.sleep(0.02)
        assert not pool._idle
        await ask(pool)
        assert raw.accepted == 6


@pytest.mark.parametrize("surprise", [b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", OK])
async def test_an_idle_connection_on_which_something_happened_is_dropped(surprise):
    """An idle connection that was closed, or on which bytes came, is closed as soon as the loop sees it."""
    writers: list[asyncio.StreamWriter] = []

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await says(OK)(raw, reader, writer)

    async with serving(talk) as raw, pool_to(raw.port) as pool:
        assert await ask(pool) == (200, b"ok")
        if surprise:
            writers[0].write(surprise)
        else:
            writers[0].close()
        await until(lambda: raw.finished == 1)
        assert await ask(pool) == (200, b"ok")
        assert (raw.accepted, raw.requests) == (2, [REQUEST] * 2)


@pytest.mark.fault(25)
@pytest.mark.parametrize("surprise", [b"", OK])
async def test_an_idle_connection_is_checked_before_it_is_used(surprise):
    """What happened on an idle connection counts at check-out too, before the loop has seen it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []

        def answer_one() -> None:
            sock, _ = listener.accept()
            accepted.append(sock)
            sock.recv(65536)
            sock.sendall(OK)

        async with pool_to(listener.getsockname()[1]) as pool:
            for number in (1, 2):
                thread = threading.Thread(target=answer_one)
                thread.start()
                assert await ask(pool) == (200, b"ok")
                thread.join()
                assert len(accepted) == number
                # No turn of the loop between the event and the next check-out.
                if surprise:
                    accepted[-1].sendall(surprise)
                else:
                    accepted[-1].close()
                time.sleep(0.02)
        for sock in accepted:
            sock.close()


@pytest.mark.fault(25)
def test_a_check_of_idle_connections_holds_for_one_turn_of_the_loop():
    """What came on one of several idle connections since another was used, a turn before, counts as well: on the loop
    of production, whose clock has whole milliseconds."""

    async def check_twice() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with pool_to(listener.getsockname()[1]) as pool:
                made = [await pool.acquire(4) for _ in range(2)]
                accepted = {sock.getpeername(): sock for sock, _ in (listener.accept() for _ in made)}
                theirs = [accepted[one.transport.get_extra_info("sockname")] for one in made if one.transport]
                for connection, sock in zip(made, theirs, strict=True):
                    connection.send(REQUEST, b"")
                    sock.sendall(OK)
                    await answer_of(connection)
                    pool.release(connection)
                await asyncio.sleep(0.01)
                first = pool.ready(4)
                assert first is not None
                await asyncio.sleep(0)  # another turn, of the same millisecond
                theirs[1 - made.index(first)].sendall(OK)  # is there at once: both are on this machine
                assert pool.ready(4) is None
                pool.release(first)
            for sock in theirs:
                sock.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check_twice())


@pytest.mark.parametrize(
    ("pieces", "then_close"),
    [
        ((HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nok",), False),
        ((HEAD + b"Transfer-Encoding: chunked\r\nConnection: Close\r\n\r\n2\r\nok\r\n0\r\n\r\n",), False),
        ((b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",), False),
        ((HEAD + b"\r\nok",), True),
        ((b"HTTP/1.0 200 OK\r\n\r\nok",), True),
        ((OK + b"surplus",), False),
        ((OK + OK,), False),
        ((CHUNKED + chunk(b"ok") + LAST_CHUNK + b"HTTP/1.1 200 OK\r\n",), False),
        ((HEAD + b"Content-Length: 2\r\n\r\n", b"ok" + OK), False),
    ],
)
async def test_a_connection_that_is_not_clean_is_not_used_again(pieces, then_close):
    """After `Connection: close`, HTTP/1.0, an end by closing or bytes beyond the answer, a fresh one is opened."""
    async with serving(says(*pieces, then_close=then_close)) as raw, pool_to(raw.port) as pool:
        for number in (1, 2, 3):
            assert await ask(pool) == (200, b"ok")
            assert (raw.accepted, len(raw.requests)) == (number, number)


async def test_bytes_right_after_an_answer_close_the_connection():
    """Bytes that follow an answer in a segment of their own are never the next answer."""
    surplus = asyncio.Event()

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(OK)
        await surplus.wait()
        writer.write(HEAD + b"Content-Length: 5\r\n\r\nWRONG")
        await reader.read()

    async with serving(talk) as raw, pool_to(raw.port) as pool:
        async with sent(pool) as connection:
            assert (await answer_of(connection))[1] == b"ok"
            surplus.set()
            await until(lambda: connection.transport is None or not connection.is_reusable())
        assert await ask(pool) == (200, b"ok")
        assert raw.accepted == 2


# Rest ...


async def idle_port(pool: Pool, reuse_idle_s: float = 60) -> int | None:
    """Send REQUEST on an idle connection alone; return our port of it, None where none may be used."""
    if (connection := pool.ready(reuse_idle_s)) is None:
        return None
    assert connection.transport
    connection.send(REQUEST, b"")
    await answer_of(connection)
    port = connection.transport.get_extra_info("sockname")[1]
    pool.release(connection)
    return port


async def test_a_connection_rests_before_it_is_used_again():
    """A request that finds a resting connection alone closes it and connects; once it has rested it is used again."""
    async with serving(says(OK)) as raw, pool_to(raw.port, rest_s=0.2) as pool:
        await ask(pool)
        assert await idle_port(pool) is None
        await ask(pool)
        await until(lambda: raw.finished == 1)
        assert raw.accepted == 2
        await until(lambda: pool.loop.time() >= pool._idle.by_rest[0].rested_at)
        await ask(pool)
        assert raw.accepted == 2


async def test_a_connection_that_makes_room_keeps_no_port():
    """It ends with a reset. After an orderly close its port would be taken for a minute, and ports would run out."""
    ends: list[BaseException | None] = []

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(OK)
        try:
            assert await reader.read() == b""
            ends.append(None)
        except ConnectionError as error:
            ends.append(error)

    async with serving(talk) as raw, pool_to(raw.port, rest_s=60) as pool:
        await ask(pool)
        await ask(pool)
        await until(lambda: ends)
        assert isinstance(ends[0], ConnectionResetError)


async def test_what_comes_within_the_rest_closes_the_connection():
    """A second answer that comes within the rest is nobody's, and the next request goes to another connection."""
    late: list[asyncio.StreamWriter] = []

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        late.append(writer)
        await says(OK)(raw, reader, writer)

    async with serving(talk) as raw, pool_to(raw.port, rest_s=0.1) as pool:
        await ask(pool)
        late[0].write(HEAD + b"Content-Length: 5\r\n\r\nWRONG")
        await until(lambda: not pool._idle)
        assert (await ask(pool), raw.accepted) == ((200, b"ok"), 2)


async def test_the_longest_rested_is_used_first_and_the_last_to_rest_makes_room():
    """Connections are used in the order in which their rest ended; the one that is closed is the last in that order."""
    async with serving(says(OK)) as raw, pool_to(raw.port, rest_s=0.2) as pool:
        made = [await pool.acquire(60) for _ in range(4)]
        ports = [one.transport.get_extra_info("sockname")[1] for one in made if one.transport]
        for connection in made:
            connection.send(REQUEST, b"")
            await answer_of(connection)
            pool.release(connection)
            await asyncio.sleep(0.01)
        async with sent(pool) as fifth:
            await answer_of(fifth)
            await until(lambda: raw.finished == 1)
            assert made[3].transport is None or made[3].transport.is_closing()
            await until(lambda: pool.loop.time() >= pool._idle.by_rest[-1].rested_at)
            assert [await idle_port(pool) for _ in range(3)] == ports[:3]


async def test_a_connection_rests_as_long_as_its_longest_exchange_took():
    """After an exchange that took longer than the least rest, each rest of its connection is as long, up to a limit."""
    took_s = 0.25

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await raw.request(reader)
            await asyncio.sleep(took_s)
            writer.write(OK)

    async with serving(talk) as raw, pool_to(raw.port, rest_s=0.05) as pool:
        rests = []
        for took_s in (0.25, 0.0, 0.7):  # noqa: B007 - the talk reads it
            await ask(pool)
            rests.append(pool._idle.by_rest[0].rested_at - pool._idle.by_rest[0].idle_since)
            await until(lambda: pool.loop.time() >= pool._idle.by_rest[0].rested_at)
        assert raw.accepted == 1
        assert 0.24 <= rests[0] == rests[1] < rests[2] == MAX_REST_S


@pytest.mark.parametrize(
    ("clients", "options"),
    [
        (4, {"rest_s": 0.1}),
        (9, {"rest_s": 0.1}),
        (9, {"rest_s": 0}),
        (9, {"keep_idle_s": 0}),
    ],
)
async def test_an_upstream_that_serves_one_connection_with_one_process(clients, options):
    """No request waits for long for a process that an idle connection holds: with as many requests as processes, with
    more, without a rest, and where no connection is kept."""
    processes, most, open_now = asyncio.Semaphore(4), 0, 0

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most, open_now
        open_now += 1
        most = max(most, open_now)
        try:
            async with processes:
                await says(OK)(raw, reader, writer)
        finally:
            open_now -= 1

    async with serving(talk) as raw, pool_to(raw.port, max_connections=64, **options) as pool:

        async def client() -> None:
            for _ in range(25):
                assert await ask(pool) == (200, b"ok")

        # Less than the time after which an idle connection is closed.
        await asyncio.wait_for(asyncio.gather(*[client() for _ in range(clients)]), REUSE_IDLE_S * 0.9)
    # Beside them, ends that are on their way to the upstream.
    assert most <= 2 * clients


async def test_spare_connections_rest_beside_those_in_use():
    """Up to the number of spare connections none is closed for a new one; all of them are used again after their rest,
    and one more makes room."""
    async with serving(says(OK)) as raw, pool_to(raw.port, rest_s=0.1, spare_connections=3) as pool:
        for _ in range(4):
            await ask(pool)
        assert (raw.accepted, raw.finished, len(pool._idle)) == (4, 0, 4)
        await ask(pool)
        assert (raw.accepted, len(pool._idle)) == (5, 4)
        await until(lambda: pool.loop.time() >= pool._idle.by_rest[-1].rested_at)
        for _ in range(4):
            assert await idle_port(pool) is not None
        assert raw.accepted == 5


async def test_a_new_connection_that_gets_no_response_has_an_idle_one_closed():
    """A spare connection that holds the only process of an upstream is closed for a new one that waits."""
    process = asyncio.Semaphore(1)

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with process:
            await says(OK)(raw, reader, writer)

    async with serving(talk) as raw, pool_to(raw.port, rest_s=0.5, spare_connections=1) as pool:
        await ask(pool)
        await asyncio.wait_for(ask(pool), REUSE_IDLE_S / 2)
        assert (raw.accepted, raw.finished) == (2, 1)


async def test_a_pool_that_keeps_nothing_idle_closes_each_connection():
    """With nothing kept, a connection is closed after its response, whoever may reuse one."""
    async with serving(says(OK)) as raw, pool_to(raw.port, keep_idle_s=0) as pool:
        for number in (1, 2, 3):
            await ask(pool)
            await until(lambda number=number: raw.finished == number)
            assert (raw.accepted, pool._open_count) == (number, 0)


@pytest.mark.parametrize("options", [{"rest_s": 60.0}, {"keep_idle_s": 0}], ids=["makes room", "keeps none"])
@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_connection_that_is_closed_between_requests_keeps_no_port(anyone, trusting, options, is_tls):
    """It is closed by a reset: the side that closes by a FIN keeps the port for a minute, and soon has none left."""
    ends: list[BaseException] = []

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await says(OK)(raw, reader, writer)
        except (OSError, asyncio.IncompleteReadError) as end:
            ends.append(end)

    tls = server_tls(anyone) if is_tls else None
    async with serving(talk, tls=tls) as raw, pool_to(raw.port, trusting if is_tls else None, **options) as pool:
        for _ in range(3):
            await ask(pool)
        await until(lambda: len(ends) >= 2)
        assert raw.accepted == 3
        assert {type(end) for end in ends} == {ConnectionResetError}


async def test_a_request_that_was_answered_early_is_not_cut_by_the_close():
    """While the upstream's kernel has not taken the whole request, its connection is closed by a FIN behind it."""
    answered, body, came = asyncio.Event(), b"x" * 60_000, []

    async def talk(_: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(OK)
        await answered.wait()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        came.append(len(head + await reader.read(-1)))

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    async with serving(talk, sock=listener) as raw, pool_to(raw.port, keep_idle_s=0) as pool:
        connection = await pool.acquire(0)
        connection.send(REQUEST, body)
        await answer_of(connection)
        pool.release(connection)
        await asyncio.sleep(0.01)
        answered.set()
        await until(lambda: came)
    assert came == [len(REQUEST + body)]


# Answers ...


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nX-Early: 1\r\n\r\n",
        b"HTTP/1.1 104 Upload Resumption Supported\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 \r\n\r\nHTTP/1.1 103 Early\r\nA: b\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 16,
    ],
)
@pytest.mark.parametrize("apart", [True, False])
async def test_interim_answers_are_skipped(interim, apart):
    """1xx answers before the final one leave no trace in it, in one segment with it or in their own."""
    pieces = (interim, OK) if apart else (interim + OK,)
    async with serving(says(*pieces)) as raw, pool_to(raw.port) as pool:
        for _ in range(2):
            async with sent(pool) as connection:
                head, body = await answer_of(connection)
            assert (head.status, head.reason, body) == (200, b"OK", b"ok")
            assert list(head.pairs) == [(b"Content-Length", b"2")]
        assert raw.accepted == 1


async def test_each_interim_answer_is_a_sign_of_life():
    """Whoever waits for the head hears of it at the beginning, and of each interim answer as it comes."""
    heard = 0

    def on_progress() -> None:
        nonlocal heard
        heard += 1

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        for number in (1, 2, 3):
            await until(lambda number=number: heard == number)
            writer.write(b"HTTP/1.1 102 \r\n\r\n" if number < 3 else OK)

    async with serving(talk) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        assert (await connection.wait_for_head(20, on_progress)).status == 200
    assert heard == 3


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 H\r\nLink: a\r\n\r\n"])
async def test_a_flood_of_interim_answers_is_lost(interim):
    """More 1xx answers than a limit are UpstreamLost, though a final one follows."""
    async with serving(says(interim * 17 + OK)) as raw, pool_to(raw.port) as pool:
        with pytest.raises(UpstreamLost):
            await ask(pool)
        assert raw.accepted == 1


async def test_an_endless_flood_of_interim_answers_is_lost():
    """1xx answers without end are UpstreamLost, long before anything is full."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        while True:
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0)

    async with serving(talk) as raw, pool_to(raw.port) as pool:
        with pytest.raises(UpstreamLost):
            await ask(pool)


LENGTH = b"Content-Length: 0\r\n\r\n"
MALFORMED = {
    "garbage": b"\x16\x03\x01 not HTTP at all\r\n\r\n",
    "a request": b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "a greeting": b"220 mail.test ESMTP\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\n" + LENGTH,
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\n" + LENGTH,
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\n" + LENGTH,
    "HTTP/1": b"HTTP/1 200 OK\r\n" + LENGTH,
    "lower-case http": b"http/1.1 200 OK\r\n" + LENGTH,
    "leading space": b" HTTP/1.1 200 OK\r\n" + LENGTH,
    "two spaces": b"HTTP/1.1  200 OK\r\n" + LENGTH,
    "status 99": b"HTTP/1.1 99 No\r\n" + LENGTH,
    "status 099": b"HTTP/1.1 099 No\r\n" + LENGTH,
    "status 2000": b"HTTP/1.1 2000 No\r\n" + LENGTH,
    "status abc": b"HTTP/1.1 abc No\r\n" + LENGTH,
    "status -200": b"HTTP/1.1 -200 No\r\n" + LENGTH,
    "status missing": b"HTTP/1.1 \r\n" + LENGTH,
    "NUL in reason": b"HTTP/1.1 200 O\x00K\r\n" + LENGTH,
    "bare CR in reason": b"HTTP/1.1 200 O\rX: y\r\n" + LENGTH,
    "101": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK,
    "101 upgraded": b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" + OK,
    "interim with a body": b"HTTP/1.1 104 No\r\nContent-Length: 3\r\n\r\nabc" + OK,
    "interim in chunks": b"HTTP/1.1 104 No\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + OK,
    "differing lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "a list of differing lengths": HEAD + b"Content-Length: 2, 3\r\n\r\nok",
    "lengths that differ by a zero": HEAD + b"Content-Length: 2\r\nContent-Length: 02\r\n\r\nok",
    "a list with an empty length": HEAD + b"Content-Length: 2,\r\n\r\nok",
    "a differing length with a space before its colon": HEAD + b"Content-Length: 2\r\nContent-Length : 3\r\n\r\nok",
    "control in a length": HEAD + b"Content-Length: 2\x01\r\n\r\nok",
    "VT before a coding": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "length with a space before its colon, and coding": CHUNKED[:-2]
    + b"Content-Length : 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "coding with a space before its colon, and length": (
        HEAD + b"Transfer-Encoding : chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    ),
    "negative length": HEAD + b"Content-Length: -2\r\n\r\nok",
    "signed length": HEAD + b"Content-Length: +2\r\n\r\nok",
    "hex length": HEAD + b"Content-Length: 0x2\r\n\r\nok",
    "length with letters": HEAD + b"Content-Length: 2a\r\n\r\nok",
    "broken length": HEAD + b"Content-Length: 1 0\r\n\r\nok",
    "empty length": HEAD + b"Content-Length:\r\n\r\nok",
    "huge length": HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\nok",
    "length and coding": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "coding and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "coding gzip": HEAD + b"Transfer-Encoding: gzip\r\n\r\nok",
    "coding gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "coding chunked, gzip": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked, chunked": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "coding xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "coding with parameter": HEAD + b"Transfer-Encoding: chunked;q=1\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "empty coding": HEAD + b"Transfer-Encoding:\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\nok",
    "obs-fold": HEAD + b"X: a\r\n b\r\n" + LENGTH,
    "obs-fold by tab": HEAD + b"X: a\r\n\tb\r\n" + LENGTH,
    "fold after start line": HEAD + b" X: a\r\n" + LENGTH,
    "no colon": HEAD + b"X\r\n" + LENGTH,
    "no name": HEAD + b": a\r\n" + LENGTH,
    "obs-text in a name": HEAD + b"X\xe9: a\r\n" + LENGTH,
    "NUL in a value": HEAD + b"X: a\x00b\r\n" + LENGTH,
    "bare CR in a value": HEAD + b"X: a\rY: b\r\n" + LENGTH,
    "bare LF after a value": HEAD + b"X: a\n" + LENGTH,
    "bare LF after the line": b"HTTP/1.1 200 OK\n" + LENGTH,
    "bare LF at the end": HEAD + b"Content-Length: 0\r\n\n",
    "bare LF, then CRLF": b"HTTP/1.1 200 OK\nX: a\r\n" + LENGTH,
    "bare LF and a bare CR": b"HTTP/1.1 200 OK\nX: a\rb\nContent-Length: 0\n\n",
    "bare LF and a NUL": b"HTTP/1.1 200 OK\nX: a\0b\nContent-Length: 0\n\n",
    "bare LF and a fold": b"HTTP/1.1 200 OK\nX: a\n b\nContent-Length: 0\n\n",
    "bare LF, length and coding": b"HTTP/1.1 200 OK\nContent-Length: 2\nTransfer-Encoding: chunked\n\n0\r\n\r\n",
    "bare LF and HTTP/1.2": b"HTTP/1.2 200 OK\nContent-Length: 0\n\n",
    "bare LF and too many interim ones": b"HTTP/1.1 100 C\n\n" * 17 + b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "bare LF and a head over 64 KiB": b"HTTP/1.1 200 OK\n" + b"X: a\n" * 20000 + b"Content-Length: 0\n\n",
    "space in a name": HEAD + b"X Y : a\r\n" + LENGTH,
    "space in place of a name": HEAD + b" : a\r\n" + LENGTH,
    "head over 64 KiB": HEAD + b"X: a\r\n" * 20000 + LENGTH,
    "one value over 64 KiB": HEAD + b"X: " + b"a" * 66000 + b"\r\n" + LENGTH,
    "one name over 64 KiB": HEAD + b"X" * 66000 + b": a\r\n" + LENGTH,
    "reason over 64 KiB": b"HTTP/1.1 200 " + b"a" * 66000 + b"\r\n" + LENGTH,
    "no chunk size": CHUNKED + b"\r\nok\r\n0\r\n\r\n",
    "no hex chunk size": CHUNKED + b"g\r\nok\r\n0\r\n\r\n",
    "signed chunk size": CHUNKED + b"+2\r\nok\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED + b"-2\r\nok\r\n0\r\n\r\n",
    "0x chunk size": CHUNKED + b"0x2\r\nok\r\n0\r\n\r\n",
    "chunk size overflow": CHUNKED + b"10000000000000002\r\nok\r\n0\r\n\r\n",
    "chunk too long": CHUNKED + b"2\r\nokay\r\n0\r\n\r\n",
    "chunk without CRLF": CHUNKED + b"2\r\nok0\r\n\r\n",
    "bare LF in chunks": CHUNKED + b"2\nok\n0\n\n",
    "chunk extension garbage": CHUNKED + b"2;\x00\x01\r\nok\r\n0\r\n\r\n",
    "LF in a chunk extension": CHUNKED + b"2;a\nb\r\nok\r\n0\r\n\r\n",
    "blank before a chunk size": CHUNKED + b" 2\r\nok\r\n0\r\n\r\n",
    "two chunk sizes": CHUNKED + b"2 2\r\nok\r\n0\r\n\r\n",
    "chunk size garbage": CHUNKED + b"2 garbage\r\nok\r\n0\r\n\r\n",
    "broken trailer": CHUNKED + b"2\r\nok\r\n0\r\nno trailer\r\n\r\n",
    "framing in a trailer": CHUNKED + b"2\r\nok\r\n0\r\nContent-Length: 9\r\n\r\n",
    "NUL in a trailer": CHUNKED + b"2\r\nok\r\n0\r\nX: \x00\r\n\r\n",
}


@pytest.mark.fault(31)
@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("by_the_byte", [False, True])
async def test_a_malformed_answer_is_lost(name, by_the_byte):
    """An answer that is not well-formed, or over a limit, is UpstreamLost; the request is not sent again."""
    answer = MALFORMED[name]
    if by_the_byte and len(answer) > 4096:
        answer = answer[-1000:].rjust(70000, b"A")
    pieces = [answer[at : at + 1] for at in range(len(answer))] if by_the_byte and len(answer) < 4096 else [answer]
    async with serving(says(*pieces, then_close=True)) as raw, pool_to(raw.port) as pool:
        with pytest.raises(UpstreamLost) as lost:
            await ask(pool)
        assert not lost.value.timeout
        assert (raw.accepted, len(raw.requests)) == (1, 1)


@pytest.mark.parametrize(
    "flood",
    [
        HEAD + b"X: ",
        HEAD + b"X",
        b"HTTP/1.1 200 ",
        b"HTTP/1.1 103 H\r\nX: ",
        CHUNKED + b"2\r\nok\r\n0\r\nX: ",
        CHUNKED + b"2;a",
        CHUNKED + b"0",
    ],
    ids=["value", "name", "reason", "interim", "trailer", "chunk extension", "chunk size"],
)
async def test_what_never_ends_is_lost(flood):
    """A field, reason, trailer, chunk extension or size that never ends is UpstreamLost before it fills the memory."""
    wrote = 0

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal wrote
        await raw.request(reader)
        writer.write(flood)
        while wrote < 64 * MIB:
            writer.write((b"0" if flood.endswith(b"0") else b"a") * 16384)
            wrote += 16384
            await writer.drain()
            await asyncio.sleep(0)

    async with serving(talk) as raw, pool_to(raw.port) as pool:
        with pytest.raises(UpstreamLost):
            await ask(pool)
    assert wrote < 32 * MIB


GOOD = {
    "a reason of obs-text": (b"HTTP/1.1 200 \xe9t\xe9\r\n" + LENGTH, 200, b""),
    "no reason": (b"HTTP/1.1 200 \r\n" + LENGTH, 200, b""),
    "no reason, no space": (b"HTTP/1.1 200\r\n" + LENGTH, 200, b""),
    "space around a length": (HEAD + b"Content-Length:  2 \t\r\n\r\nok", 200, b"ok"),
    "a length with zeros": (HEAD + b"Content-Length: 002\r\n\r\nok", 200, b"ok"),
    "capitals": (HEAD + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200, b"ok"),
    "space around a coding": (HEAD + b"Transfer-Encoding:\t chunked \r\n\r\n2\r\nok\r\n0\r\n\r\n", 200, b"ok"),
    "a chunk extension": (CHUNKED + b'2;a=b;c="d"\r\nok\r\n0;e\r\n\r\n', 200, b"ok"),
    "zeros before a chunk size": (CHUNKED + b"0000002\r\nok\r\n0000\r\n\r\n", 200, b"ok"),
    "hex chunk sizes": (CHUNKED + b"A\r\n0123456789\r\nb\r\n0123456789a\r\n0\r\n\r\n", 200, b"01234567890123456789a"),
    "trailers": (CHUNKED + b"2\r\nok\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a\r\n\r\n", 200, b"ok"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "204 with a length": (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, b""),
    "205 by its framing": (b"HTTP/1.1 205 Reset\r\nContent-Length: 2\r\n\r\nok", 205, b"ok"),
    "304 with a length": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n", 304, b""),
    "304 chunked": (b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", 304, b""),
    "599": (b"HTTP/1.1 599 X\r\n" + LENGTH, 599, b""),
    "600": (b"HTTP/1.1 600 X\r\n" + LENGTH, 600, b""),
    "999": (b"HTTP/1.1 999 X\r\n" + LENGTH, 999, b""),
    "padded chunk sizes": (CHUNKED + b"2  \t\r\nok\r\n0 \r\n\r\n", 200, b"ok"),
    "a blank before a chunk extension": (CHUNKED + b"2 ;a=b\r\nok\r\n0\r\n\r\n", 200, b"ok"),
    "leading empty line": (b"\r\n" + OK, 200, b"ok"),
    "a head just below 64 KiB": (HEAD + b"X: " + b"a" * 65000 + b"\r\n" + LENGTH, 200, b""),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("by_the_byte", [False, True])
async def test_an_odd_but_sound_answer_is_whole(name, by_the_byte):
    """An answer that is sound by RFC 9112 is whole, however it is cut into segments, and the connection stays."""
    answer, status, body = GOOD[name]
    size = max(1, len(answer) // 200) if by_the_byte else len(answer)
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    async with serving(says(*pieces)) as raw, pool_to(raw.port) as pool:
        for _ in range(2):
            assert await ask(pool) == (status, body)
        assert raw.accepted == 1


LF_HEAD = b"HTTP/1.1 200 O\x01K\nX: a\nContent-Length: 2\n\n"
TWO = (b"Content-Length", b"2")
# Answers that no strict parser takes, though they can mean one thing alone; and their fields as we read them.
REWRITTEN = {
    "two equal lengths": (HEAD + b"Content-Length: 2\r\nX: a\r\ncontent-length: 2\r\n\r\nok", [TWO, (b"X", b"a")]),
    "a list of equal lengths": (HEAD + b"Content-Length: 2, 2\r\n\r\nok", [TWO]),
    "controls in a value": (HEAD + b"X: a\x01\x1b[0m\x7f\x0bb\r\n" + OK[len(HEAD):], [(b"X", b"a  [0m  b"), TWO]),
    "controls in the reason": (b"HTTP/1.1 200 O\x01K\r\n" + OK[len(HEAD):], [TWO]),
    "bare LF": (LF_HEAD + b"ok", [(b"X", b"a"), TWO]),
    "bare LF after interim ones": (b"HTTP/1.1 103 H\nLink: a\n\n" + LF_HEAD + b"ok", [(b"X", b"a"), TWO]),
    "CRLF after interim ones in bare LF": (b"HTTP/1.1 100 C\n\n" + OK, [TWO]),
    "space before the colon": (HEAD + b"X \t: a\r\nContent-Length : 2\r\n\r\nok", [(b"X", b"a"), TWO]),
    "chunks after bare LF": (
        b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n" + chunk(b"ok") + LAST_CHUNK,
        [(b"Transfer-Encoding", b"chunked")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.parametrize("by_the_byte", [False, True])
async def test_an_answer_that_is_not_strict_is_read_in_the_one_way_it_can_be(name, by_the_byte):
    """What can mean one thing alone is read so, however it is cut into segments. Its connection is not used again."""
    answer, fields = REWRITTEN[name]
    pieces = [answer[at : at + 1] for at in range(len(answer))] if by_the_byte else [answer]
    async with serving(says(*pieces)) as raw, pool_to(raw.port) as pool:
        for number in (1, 2):
            async with sent(pool) as connection:
                head, body = await answer_of(connection)
            assert (head.status, body, list(head.pairs)) == (200, b"ok", fields)
            assert head.reason in (b"OK", b"O K")
            assert raw.accepted == number


async def test_a_switch_that_is_not_strict_is_one():
    """After a 101 whose head was written anew, the other protocol begins with the byte behind the head."""
    switch = b"HTTP/1.1 101 S\nConnection: upgrade\nUpgrade : websocket\n\n\x81\x05he"
    async with serving(says(switch, b"llo")) as raw, pool_to(raw.port) as pool:
        connection = await pool.acquire(60)
        connection.send_upgrade(REQUEST)
        assert (await connection.wait_for_head(20)).status == 101
        got = b""
        while len(got) < 7:
            got += await connection.next_chunk(20)
        assert got == b"\x81\x05hello"
        pool.release(connection)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\nX: ", b"HTTP/1.1 200 OK\n", b"HTTP/1.1 103 H\n\n" * 17])
async def test_a_head_that_is_not_strict_is_looked_at_a_few_times_alone(start, monkeypatch):
    """However such a head is cut, it is read as a whole once, and once more for each interim head before it."""
    looks = 0

    def look(data: bytes) -> bytes | str | None:
        nonlocal looks
        looks += 1
        return strict_response(data)

    monkeypatch.setattr("oncegate.upstream.response.strict_response", look)
    response = IncomingResponse()
    response.begin(head_only=False)
    answer = start + b"a: b\n" * 1000
    assert not response.feed(answer[:16])
    refused = next((at for at in range(16, len(answer)) if response.feed(answer[at : at + 1])), 0)
    assert refused == (len(start) - 1 if start.startswith(b"HTTP/1.1 103") else 0)
    assert looks <= 2 + 2 * start.count(b"103")


async def test_trailers_are_dropped():
    """Trailers of a chunked answer never reach its fields."""
    answer = CHUNKED + chunk(b"ok") + b"0\r\nX-Sum: 1\r\n\r\n"
    async with serving(says(answer)) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        head, body = await answer_of(connection)
        assert body == b"ok"
        assert b"x-sum" not in head.fields


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"Content-Length: 500\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Content-Length: 0\r\n\r\n",
        HEAD + b"\r\n",
    ],
)
async def test_an_answer_to_head_has_no_body(head):
    """An answer to HEAD is whole with its head, whatever its framing says, and a framed one keeps its connection."""
    async with serving(says(head)) as raw, pool_to(raw.port) as pool:
        for _ in range(3):
            assert await ask(pool, head_only=True) == (200, b"")
        assert raw.accepted == (3 if head == HEAD + b"\r\n" else 1)


async def test_a_body_in_an_answer_to_head_is_not_the_next_answer():
    """A server that sends a body to HEAD loses its connection, never its next answer."""
    async with serving(says(OK)) as raw, pool_to(raw.port) as pool:
        for number in (1, 2):
            assert await ask(pool, head_only=True) == (200, b"")
            assert raw.accepted == number


WHOLE = {
    "fixed": OK,
    "chunked": CHUNKED + chunk(b"he") + chunk(b"llo") + LAST_CHUNK,
    "chunked with trailers": CHUNKED + chunk(b"ok") + b"0\r\nX-Sum: 1\r\n\r\n",
    "after interim ones": b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 103 H\r\nLink: a\r\n\r\n" + OK,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("reset", [False, True])
async def test_an_answer_is_whole_only_with_its_last_byte(name, reset):
    """An answer cut after any byte, by FIN or RST, is UpstreamLost; with its last byte it is whole."""
    answer = WHOLE[name]
    size = 0

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(answer[:size])
        await writer.drain()
        if reset:
            await asyncio.sleep(0.002)
            abort(writer)

    async with serving(talk) as raw, pool_to(raw.port, max_connections=1) as pool:
        for size in range(len(answer)):  # noqa: B007 - the talk reads it
            with pytest.raises(UpstreamLost) as lost:
                await ask(pool)
            assert not lost.value.timeout
        size = len(answer)
        assert (await ask(pool))[0] == 200
        assert len(raw.requests) == len(answer) + 1


@pytest.mark.parametrize("reset", [False, True])
async def test_an_answer_ended_by_closing_is_lost_within_its_head_or_by_a_reset(reset):
    """Without a stated end, closing ends the body, not the head; a RST is never an end."""
    answer = HEAD + b"X: y\r\n\r\nok"
    size = 0

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(answer[:size])
        await writer.drain()
        if reset:
            await asyncio.sleep(0.01)
            abort(writer)

    async with serving(talk) as raw, pool_to(raw.port) as pool:
        for size in range(len(answer) + 1):
            if size < len(answer) - 2 or reset:
                with pytest.raises(UpstreamLost):
                    await ask(pool)
            else:
                assert await ask(pool) == (200, answer[len(answer) - 2 : size])


# Time ...


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 100 C\r\n\r\n", HEAD, HEAD + b"Content-Length: 3\r\n\r\nok", CHUNKED])
async def test_silence_is_a_timeout(said):
    """An upstream that is silent for too long, before the head or within the body, is UpstreamLost by timeout."""
    async with serving(says(said)) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        with pytest.raises(UpstreamLost) as lost:
            await answer_of(connection, silence_s=0.2)
        assert lost.value.timeout
        await until(lambda: raw.finished == 1)  # the connection was closed: a late answer is nobody's


async def test_what_comes_slowly_is_not_silence():
    """The silence is counted from the last byte of a body: an answer that drips takes as long as it takes."""
    body = b"x" * 40

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(HEAD + b"Content-Length: 40\r\n\r\n")
        for at in range(len(body)):
            writer.write(body[at : at + 1])
            await asyncio.sleep(0.03)

    async with serving(talk) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        assert (await answer_of(connection, silence_s=0.8))[1] == body


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 102 Processing\r\n\r\n"])
async def test_a_head_that_never_ends_is_silence(before):
    """A head that drips is UpstreamLost once it takes longer than allowed, counted from the last interim answer."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        if before:
            await asyncio.sleep(0.4)
        writer.write(before + HEAD)
        while not writer.is_closing():
            writer.write(b"A: b\r\n")
            await asyncio.sleep(0.05)

    async with serving(talk) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        with pytest.raises(UpstreamLost) as lost:
            await answer_of(connection, silence_s=0.6)
        assert lost.value.timeout


@pytest.mark.parametrize("size", [5, len(OK) - 2, len(OK) - 1, len(OK)])
async def test_what_waits_for_us_is_not_silence(size):
    """After a pause of the whole process, what came meanwhile is taken, though the time is over."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                asked.set()
                resting.wait(20)
                sock.sendall(OK[:size])
                rested.wait(20)
                if size < len(OK):
                    sock.sendall(OK[size:])

        asked, resting, rested = threading.Event(), threading.Event(), threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        async with pool_to(listener.getsockname()[1]) as pool, sent(pool) as connection:
            answering = asyncio.create_task(answer_of(connection, silence_s=0.6))
            await until(asked.is_set)
            resting.set()
            time.sleep(0.9)  # nothing of ours runs
            await asyncio.sleep(0.1)
            rested.set()
            assert (await answering)[1] == b"ok"
        thread.join()


@pytest.mark.parametrize("pause_s", [0.0, 1.4])
async def test_an_answer_that_does_not_end_within_the_window_goes_on(pause_s):
    """`completes_within` says no after its short window, and the body may come as late as the silence allows."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(HEAD + b"Content-Length: 2\r\n\r\n")
        await asyncio.sleep(pause_s)
        writer.write(b"ok")

    async with serving(talk) as raw, pool_to(raw.port, max_connections=64) as pool:

        async def one(number: int) -> None:
            await asyncio.sleep(number / 1000)  # windows that end at different fractions of a second
            async with sent(pool) as connection:
                await connection.wait_for_head(20)
                assert await completes_within(connection, 0.05, 65536) is (pause_s == 0)
                assert await connection.next_chunk(20) == b"ok"

        await asyncio.gather(*[one(number) for number in range(40)])


async def test_a_small_answer_is_whole_only_up_to_a_size():
    """`completes_within` says no as soon as more is there than it was asked for."""
    for size, small in ((1000, True), (1001, False)):
        answer = CHUNKED + chunk(b"a" * size) + LAST_CHUNK
        async with serving(says(answer)) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
            await connection.wait_for_head(20)
            assert await completes_within(connection, 10, 1000) is small


# Back-pressure ...


@pytest.mark.parametrize("framing", ["fixed", "chunked", "eof"])
async def test_a_slow_consumer_bounds_what_is_held(framing):
    """Of an answer that nobody takes, about a megabyte is held and counted; all of it arrives once it is taken."""
    size = 64 * MIB

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        length = b"Content-Length: %d\r\n" % size
        coding = b"Transfer-Encoding: chunked\r\n"
        writer.write(HEAD + {"fixed": length, "chunked": coding, "eof": b""}[framing] + b"\r\n")
        for _ in range(size // BATCH):
            writer.write(chunk(b"a" * BATCH) if framing == "chunked" else b"a" * BATCH)
            await writer.drain()
        writer.write(LAST_CHUNK if framing == "chunked" else b"")

    buffered = MemoryBudget(1 << 28)
    async with serving(talk) as raw, pool_to(raw.port, buffered=buffered) as pool:
        async with sent(pool) as connection:
            await connection.wait_for_head(20)
            await until(lambda: connection.response.buffered_bytes > BATCH)
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert connection.response.buffered_bytes == buffered.used <= MIB
            got = 0
            while data := await connection.next_chunk(20):
                got += len(data)
                assert len(data) <= MIB
            assert got == size
        assert buffered.used == 0


async def test_over_the_workers_limit_less_is_held():
    """Where the worker's memory for buffers is used up, an answer gets room for much less."""
    buffered = MemoryBudget(limit=BATCH, used=BATCH)
    async with serving(says(HEAD + b"Content-Length: 8388608\r\n\r\n" + b"a" * 8 * MIB)) as raw:
        async with pool_to(raw.port, buffered=buffered) as pool, sent(pool) as connection:
            await connection.wait_for_head(20)
            await until(lambda: connection.response.buffered_bytes > 65536)
            await asyncio.sleep(0.1)
            assert connection.response.buffered_bytes <= 2 * BATCH
            assert len(await connection.next_chunk(20)) <= 2 * BATCH
        assert buffered.used == BATCH


@pytest.mark.parametrize("framing", ["fixed", "chunked", "eof"])
async def test_a_body_is_passed_on_as_it_comes(framing):
    """Each piece is taken within the event that it came in; only a pause, a call of `wake` and the end wake anybody."""
    pieces, woken, taken = [b"%02d" % number for number in range(20)], 0, []

    async def talk(server, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        field = {"fixed": b"Content-Length: 40\r\n", "chunked": b"Transfer-Encoding: chunked\r\n", "eof": b""}[framing]
        writer.write(HEAD + field + b"\r\n")
        for piece in pieces:
            await until(lambda piece=piece: len(taken) == int(piece))
            writer.write(chunk(piece) if framing == "chunked" else piece)
        writer.write(LAST_CHUNK if framing == "chunked" else b"")
        if framing == "eof":
            writer.close()

    def take(data: bytes) -> bool:
        taken.append(data)
        return len(taken) != 10

    buffered = MemoryBudget(1 << 28)
    async with serving(talk) as raw, pool_to(raw.port, buffered=buffered) as pool, sent(pool) as connection:
        await connection.wait_for_head(20)
        asyncio.get_running_loop().call_later(0.05, connection.wake)
        while await connection.pass_body(take, 20):
            woken += 1
        assert (taken, buffered.used) == (pieces, 0)
    assert 2 <= woken <= 4  # the call of `wake`, the pause and the end, of which one may come with another


async def test_whoever_takes_no_more_gets_nothing_until_it_asks_again():
    """Nothing is read meanwhile, so that a slow client holds up its upstream."""
    taken = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return False

    answer = HEAD + b"Content-Length: 8388608\r\n\r\n" + b"a" * 8 * MIB
    async with serving(says(answer)) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        await connection.wait_for_head(20)
        while len(taken) < 3:
            assert await connection.pass_body(take, 20)
        await asyncio.sleep(0.1)
        assert (len(taken), connection.response.chunks) == (3, [])
        while await connection.pass_body(take, 20):
            pass
        assert len(b"".join(taken)) == 8 * MIB


async def test_what_a_taker_raises_belongs_to_whoever_waits():
    """Not to the event loop, which would only log it; nobody is left waiting."""

    def take(_: bytes) -> bool:
        raise RuntimeError("a bug")

    async def talk(server, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"Content-Length: 2\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"o")

    async with serving(talk) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        await connection.wait_for_head(20)
        with pytest.raises(RuntimeError, match="a bug"):
            await connection.pass_body(take, 20)


async def test_a_silence_between_two_pieces_is_limited():
    """Each piece that is passed on begins it again."""
    taken = []

    async def talk(server, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"Content-Length: 20\r\n\r\n")
        for _ in range(8):
            await asyncio.sleep(0.1)
            writer.write(b"a")
        await reader.read()

    def take(data: bytes) -> bool:
        taken.append(data)
        return True

    async with serving(talk) as raw, pool_to(raw.port) as pool, sent(pool) as connection:
        await connection.wait_for_head(20)
        with pytest.raises(UpstreamLost, match="silent"):
            await connection.pass_body(take, 0.5)
        assert len(taken) == 8


async def test_an_answer_given_up_gives_its_room_back():
    """A connection released or cut with a body that nobody took leaves nothing counted."""
    buffered = MemoryBudget(1 << 28)
    answer = HEAD + b"Content-Length: 8388608\r\n\r\n" + b"a" * 8 * MIB
    async with serving(says(answer)) as raw, pool_to(raw.port, buffered=buffered, max_connections=1) as pool:
        for cut in (False, True):
            async with sent(pool) as connection:
                await connection.wait_for_head(20)
                await until(lambda one=connection: one.response.buffered_bytes)
                if cut:
                    assert pool.cut("shut down") == 1
                    with pytest.raises(UpstreamLost):
                        await answer_of(connection)
            assert buffered.used == 0


# The request ...


async def blocks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_body_is_streamed_as_it_is_framed():
    """A body that comes in blocks goes out as they are, under its length or in chunks."""
    got: list[bytes] = []

    async def talk(_: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        got.append(await (reader.readuntil(b"0\r\n\r\n") if b"chunked" in head else reader.readexactly(5)))
        writer.write(OK)

    async with serving(talk) as raw, pool_to(raw.port) as pool:
        for framing in (b"Content-Length: 5", b"Transfer-Encoding: chunked"):
            connection = await pool.acquire(0)
            connection.send_stream(
                b"POST / HTTP/1.1\r\n%s\r\n\r\n" % framing, blocks(b"he", b"llo"), chunked=framing.startswith(b"T")
            )
            assert (await answer_of(connection))[1] == b"ok"
            pool.release(connection)
    assert got == [b"hello", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"]


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_that_breaks_off_never_looks_whole(chunked):
    """A request's body whose source breaks is cut off for the upstream, never ended, and UpstreamLost."""
    ended: list[bytes] = []

    async def talk(_: Raw, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            ended.append(await reader.read(-1))

    async def breaking() -> AsyncIterator[bytes]:
        yield b"hel"
        await asyncio.sleep(0.05)
        raise ConnectionError("gone")

    async with serving(talk) as raw, pool_to(raw.port) as pool:
        connection = await pool.acquire(0)
        connection.send_stream(b"POST / HTTP/1.1\r\n\r\n", breaking(), chunked=chunked)
        with pytest.raises(UpstreamLost):
            await connection.wait_for_head(20)
        pool.release(connection)
        await until(lambda: raw.finished == 1)
    assert not any(body.endswith(b"0\r\n\r\n") for body in ended)


async def test_an_upstream_that_does_not_read_slows_the_body():
    """A body is asked for no faster than the upstream takes it."""
    taken = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(256):
            taken += 1
            yield b"a" * BATCH

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()
        await reading.wait()
        writer.transport.resume_reading()
        await reader.readexactly(256 * BATCH)
        writer.write(OK)

    reading = asyncio.Event()
    async with serving(talk) as raw, pool_to(raw.port) as pool:
        connection = await pool.acquire(0)
        connection.send_stream(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (256 * BATCH), source(), False)
        await until(lambda: taken > 2)
        await asyncio.sleep(0.3)
        assert taken < 128
        reading.set()
        assert (await answer_of(connection))[1] == b"ok"
        assert taken == 256
        pool.release(connection)


async def test_a_block_is_asked_for_when_it_can_be_sent():
    """Not earlier: whether it may be sent still is decided as it is asked for."""
    taken, loop = 0, asyncio.get_running_loop()

    async def source() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"a" * BATCH

    here, there = socket.socketpair()
    there.setblocking(False)
    sending = OutgoingRequest(loop, write_batcher(loop))
    protocol = type("_", (asyncio.Protocol,), {"pause_writing": sending.pause, "resume_writing": sending.resume})
    sending.transport, _ = await loop.create_connection(protocol, sock=here)
    sending.send_blocks(b"", source(), False, pytest.fail)
    await until(lambda: taken)
    await asyncio.sleep(0.05)
    left, came = sending.transport.get_write_buffer_size(), 0
    with contextlib.suppress(BlockingIOError):
        while data := there.recv(BATCH):
            came += len(data)
    assert came + left == taken * BATCH
    sending.cancel()
    sending.transport.abort()
    there.close()


@pytest.mark.parametrize("framing", [b"Content-Length: 8388608", b"Transfer-Encoding: chunked"])
async def test_an_answer_before_the_request_was_sent_is_whole_and_the_connection_closed(framing):
    """An answer that comes while the request is still being sent counts; its connection is never used again."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.transport.pause_reading()
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await released.wait()

    released = asyncio.Event()
    async with serving(talk) as raw, pool_to(raw.port) as pool:
        for number in (1, 2):
            connection = await pool.acquire(60)
            body = blocks(*[b"a" * BATCH] * 32)
            connection.send_stream(
                b"POST / HTTP/1.1\r\n%s\r\n\r\n" % framing, body, chunked=framing.startswith(b"Transfer")
            )
            head, text = await answer_of(connection)
            assert (head.status, text) == (413, b"no")
            pool.release(connection)
            assert raw.accepted == number
        released.set()


NO = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
EARLY = {
    "small": (NO, b"no"),
    "in chunks": (b"HTTP/1.1 413 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"no") + LAST_CHUNK, b"no"),
    "after 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + NO, b"no"),
    "large": (b"HTTP/1.1 413 No\r\nContent-Length: 40000\r\n\r\n" + b"n" * 40_000, b"n" * 40_000),
}


@pytest.mark.fault(27)
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("name", EARLY)
async def test_a_failed_write_loses_no_answer_that_came_before_it(name, secure, anyone, trusting):
    """The upstream answers and closes with the upload unread. The write that meets its reset comes before anything was
    read: the answer is whole all the same, over TLS as well."""
    answer, body = EARLY[name]
    ours, theirs = (trusting, server_tls(anyone)) if secure else (None, None)
    with EarlyAnswer(answer, theirs) as server:

        async def upload() -> AsyncIterator[bytes]:
            yield b"a" * BATCH
            server.body_came.set()
            server.ended.wait(20)  # nothing of ours runs, so that nothing is read meanwhile
            for _ in range(8):
                yield b"a" * BATCH

        async with pool_to(server.port, ours) as pool:
            connection = await pool.acquire(60)
            head = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (9 * BATCH)
            connection.send_stream(head, upload(), chunked=False)
            got, text = await answer_of(connection)
            assert (got.status, text) == (413, body)
            assert not connection.is_reusable()
            pool.release(connection)
            assert pool.buffered.used == 0


@pytest.mark.fault(27)
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("answer", [NO[:-1], HEAD + b"\r\nok"], ids=["cut", "ended by closing"])
async def test_a_failed_write_completes_no_answer(answer, secure, anyone, trusting):
    """What came before a reset is not whole because of it: a reset is no end of an answer."""
    ours, theirs = (trusting, server_tls(anyone)) if secure else (None, None)
    with EarlyAnswer(answer, theirs) as server:

        async def upload() -> AsyncIterator[bytes]:
            yield b"a" * BATCH
            server.body_came.set()
            server.ended.wait(20)
            yield b"a" * BATCH

        async with pool_to(server.port, ours) as pool:
            connection = await pool.acquire(60)
            connection.send_stream(b"POST / HTTP/1.1\r\n\r\n", upload(), chunked=True)
            with pytest.raises(UpstreamLost):
                await answer_of(connection)
            pool.release(connection)


@pytest.mark.parametrize("secure", [False, True])
async def test_a_failed_write_loses_nothing_of_another_protocol(secure, anyone, trusting):
    """What a WebSocket's upstream said before it reset the connection arrives, and is not its clean end."""
    switch = b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    ours, theirs = (trusting, server_tls(anyone)) if secure else (None, None)
    with EarlyAnswer(b"goodbye", theirs, before=switch) as server:
        async with pool_to(server.port, ours) as pool:
            connection = await pool.acquire(60)
            connection.send_upgrade(REQUEST)
            assert (await connection.wait_for_head(20)).status == 101
            await connection.write(b"a" * BATCH, 20)
            server.body_came.set()
            server.ended.wait(20)  # nothing of ours runs
            await connection.write(b"a", 20)
            assert await connection.next_chunk(20) == b"goodbye"
            with pytest.raises(UpstreamLost):
                await connection.next_chunk(20)
            pool.release(connection)
            assert pool.buffered.used == 0


async def test_an_answer_before_a_whole_head_was_sent_closes_the_connection():
    """An early answer to a request whose bytes are still in our own buffer counts the same."""

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()
        writer.write(OK)
        await released.wait()

    released = asyncio.Event()
    async with serving(talk) as raw, pool_to(raw.port) as pool:
        for number in (1, 2):
            connection = await pool.acquire(60)
            connection.send(b"POST / HTTP/1.1\r\nContent-Length: 16777216\r\n\r\n", b"a" * 16 * MIB)
            assert (await answer_of(connection))[1] == b"ok"
            pool.release(connection)
            assert raw.accepted == number
        released.set()


@pytest.mark.fault(26)
async def test_a_request_is_written_on_one_connection():
    """Of many requests over connections that break in every way, each reaches the upstream at most once."""
    seen: list[bytes] = []

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for turn in range(1 + raw.accepted % 3):
            request = await reader.readuntil(b"\r\n\r\n")
            seen.append(request.split(b" ")[1])
            if turn == raw.accepted % 3:
                match raw.accepted % 4:
                    case 0:
                        return
                    case 1:
                        abort(writer)
                        return
                    case 2:
                        writer.write(OK[:-1])
                        return
            writer.write(OK)

    async with serving(talk) as raw, pool_to(raw.port, max_connections=4, connect_retries=3) as pool:
        outcomes: dict[bytes, str] = {}

        async def one(number: int) -> None:
            target = b"/%d" % number
            connection = await pool.acquire(60)
            try:
                connection.send(b"POST %s HTTP/1.1\r\nContent-Length: 0\r\n\r\n" % target, b"")
                outcomes[target] = (await answer_of(connection))[1].decode()
            except UpstreamLost:
                outcomes[target] = "lost"
            finally:
                pool.release(connection)

        await asyncio.wait_for(asyncio.gather(*[one(number) for number in range(200)]), 60)
    assert len(seen) == len(set(seen))
    answered = {target for target, outcome in outcomes.items() if outcome == "ok"}
    assert answered <= set(seen)
    assert len(answered) > 50
    assert len(outcomes) == 200


async def test_cut_ends_what_is_under_way():
    """`cut` loses every exchange under way and says how many there were; idle connections are not counted."""
    async with serving(says(b"HTTP/1.1 100 C\r\n\r\n")) as raw, pool_to(raw.port) as pool:
        asking = [asyncio.create_task(ask(pool)) for _ in range(3)]
        await until(lambda: len(raw.requests) == 3)
        assert pool.cut("the proxy was shut down") == 3
        ended = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(one, UpstreamLost) and "shut down" in str(one) for one in ended)
        assert pool.cut("again") == 0
