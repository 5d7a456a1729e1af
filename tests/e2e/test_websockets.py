"""A WebSocket passes through where no key guards, and only what really is one."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.parts import OK, Proxy, Raw, RawClient, answering, ask, until

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
OPENING = (
    f"GET /chat?x=1 HTTP/1.1\r\nHost: api.test\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\nAuthorization: Bearer a\r\n\r\n"
).encode()
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nKeep-Alive: 5\r\n\r\n"
)
LARGE = bytes(range(256)) * 8192  # 2 MiB


class EchoUpstream(Raw):
    """Switches, says hello in the same write, and echoes what comes until its end."""

    def __init__(self, first: bytes = SWITCHED + b"hello") -> None:
        self.heads: list[bytes] = []
        self.echoed = 0
        self.first = first
        super().__init__(self._echo)

    async def _echo(self, _: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.first)
        while data := await reader.read(65536):
            self.echoed += len(data)
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def serving(server: Raw, proxy: Proxy | None = None) -> AsyncIterator[Raw]:
    """Let a server stand, behind the standing proxy where that is given."""
    await server.start(sock=proxy.upstream_socket.dup() if proxy else None)
    try:
        yield server
    finally:
        await server.close()


class SilentUpstream(Raw):
    """Switches and says nothing, however much comes; it takes its time with that."""

    def __init__(self) -> None:
        self.taken = 0
        super().__init__(self._take)

    async def _take(self, _: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        reader._limit = 65536  # else it takes all ahead
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED)
        while data := await reader.read(131_072):
            self.taken += len(data)
            await asyncio.sleep(0.02)


@pytest.fixture
async def echo(standing):
    async with serving(EchoUpstream(), standing) as server:
        yield server


@asynccontextmanager
async def opened(port: int, behind: bytes = b"") -> AsyncIterator[tuple[RawClient, bytes]]:
    """Give a client whose WebSocket is open, and the head of the answer."""
    client = await RawClient.open(port)
    try:
        client.writer.write(OPENING + behind)
        yield client, await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 10)
    finally:
        client.writer.transport.abort()


async def test_bytes_pass_both_ways(standing, echo):
    """The upgrade is made on both sides with this hop's own fields, and all bytes pass in both directions."""
    async with opened(standing.port, b"early") as (client, head):
        lines = head.lower().split(b"\r\n")
        assert lines[0] == b"http/1.1 101 switching protocols"
        assert [line for line in lines if line.startswith((b"upgrade", b"connection", b"keep-alive"))] == [
            b"connection: upgrade",
            b"upgrade: websocket",
        ]
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
        assert await client.reader.readexactly(10) == b"helloearly"
        sent = echo.heads[0]
        assert sent.startswith(b"GET /chat?x=1 HTTP/1.1\r\n")
        assert sent.count(b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n") == 1
        assert sent.lower().count(b"upgrade:") == sent.lower().count(b"connection:") == 1
        assert f"Sec-WebSocket-Key: {KEY}".encode() in sent
        assert b"Bearer a" in sent
        client.writer.write(LARGE)
        assert await asyncio.wait_for(client.reader.readexactly(len(LARGE)), 20) == LARGE
    await until(lambda: echo.finished == 1)
    await until(lambda: standing.events("request"))
    line = standing.events("request")[-1]
    assert (line["outcome"], line["status"]) == ("passthrough", 101)


async def test_the_client_ends_it(standing, echo):
    """What it sent last arrives at the upstream, and then the end does; a reset ends it as well."""
    async with opened(standing.port) as (client, _):
        client.writer.write(b"bye")
        client.writer.write_eof()
        await until(lambda: echo.echoed == 3)
        await asyncio.wait_for(client.reader.read(), 10)
    await until(lambda: echo.finished == 1)
    async with opened(standing.port) as (client, _):
        client.reset()
        await until(lambda: echo.finished == 2)


async def test_all_that_the_client_sent_arrives_before_its_end(standing):
    """Also where the upstream takes it slowly, and more is under way than the kernel holds."""
    async with serving(SilentUpstream(), standing) as server, opened(standing.port) as (client, _):
        client.writer.write(3 * LARGE)
        client.writer.write_eof()
        await until(lambda: server.finished == 1)
        assert server.taken == 3 * len(LARGE)


async def test_the_upstream_ends_it(standing):
    """Its last bytes arrive, then the end; where it breaks off, the client's connection breaks."""

    async def talk(server: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(SWITCHED)
        if await reader.readexactly(4) == b"quit":
            writer.write(b"goodbye")
            return
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *7 * [0]]))

    async with serving(Raw(talk), standing):
        async with opened(standing.port) as (client, _):
            client.writer.write(b"quit")
            assert await asyncio.wait_for(client.reader.read(), 10) == b"goodbye"
        async with opened(standing.port) as (client, _):
            client.writer.write(b"kill")
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(client.reader.read(), 10)


async def test_slow_takers_hold_up_the_other_side(standing):
    """What one side does not take is not read from the other without bound."""

    async def talk(server: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(SWITCHED)
        writer.transport.pause_reading()
        await asyncio.Event().wait()

    async with serving(Raw(talk), standing), opened(standing.port) as (client, _):
        sent = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                while sent < 50_000_000:
                    client.writer.write(bytes(262_144))
                    await client.writer.drain()
                    sent += 262_144
        assert sent < 50_000_000
        assert standing.metric("buffered_bytes") < 1_000_000


async def test_an_upstream_that_declines_is_passed_on(standing, behind):
    """Its answer is an ordinary one, nothing behind the opening reaches it, and the connection closes."""
    behind.script = answering(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno")
    client = await RawClient.open(standing.port)
    answer = await client.ask(OPENING + b"GET /hidden HTTP/1.1\r\nHost: api.test\r\n\r\n")
    assert (answer.status, answer.body, answer.header("connection")) == (426, b"no", b"close")
    assert await client.reader.read() == b""
    assert len(behind.received) == 1
    client.close()


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nX: a\x00b\r\n\r\n", 502),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200),
    ],
    ids=["another protocol", "no protocol", "a NUL", "an interim answer first"],
)
async def test_what_is_no_switch_to_it(standing, first, status):
    """An upstream that switches to something else is not followed."""
    async with serving(EchoUpstream(first), standing) as server:
        assert (await ask(standing.port, OPENING)).status == status
        assert server.echoed == 0


@pytest.mark.parametrize(
    "opening",
    [
        OPENING.replace(b"GET", b"POST"),
        OPENING.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nIdempotency-Key: a\r\n\r\n"),
        OPENING.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\nab"),
        OPENING.replace(b"Sec-WebSocket-Key", b"Sec-WebSocket-Lock"),
        OPENING.replace(b"\r\n\r\n", f"\r\nSec-WebSocket-Key: {KEY}\r\n\r\n".encode()),
        OPENING.replace(b"WebSocket\r", b"websocket, h2c\r"),
        OPENING.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["POST", "POST with a key", "a body", "no nonce", "two nonces", "two protocols", "HTTP/1.0"],
)
async def test_what_is_no_websocket(standing, behind, opening):
    """Any other wish for an upgrade is ignored: the request is answered, and the upstream sees nothing of the wish."""
    answer = await ask(standing.port, opening)
    assert (answer.status, answer.body) == (200, b"ok")
    (received,) = behind.received
    assert (received.header("upgrade"), received.header("connection")) == ([], [])


async def test_silence_and_a_drain_end_it(proxies, valkey):
    """Without a byte from either side for the upstream's longest silence it is cut; a drain does not wait for it."""
    async with serving(SilentUpstream()) as silent:
        proxy = proxies(silent.url, valkey.url, UPSTREAM_TIMEOUT_S=1)
        async with opened(proxy.port) as (client, _):
            for count in (1, 2, 3):
                await asyncio.sleep(0.6)
                client.writer.write(b"x")
                await until(lambda: silent.taken == count)  # noqa: B023 - asked at once
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(client.reader.readexactly(1), 10)
        async with opened(proxy.port) as (client, _):
            assert await asyncio.to_thread(proxy.stop, 10) == 0
            assert await client.reader.read() == b""
