"""What speaks the store's protocol in tests: a scripted server, and a relay that loses what it is told to lose."""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis

Value = bytes | int | None | list[Any]
Words = list[bytes]
Script = Callable[["Connection", Words], bytes | None]

OK = b"+OK\r\n"


def resp(value: Value) -> bytes:
    """Return a value as a server writes it."""
    match value:
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(value), value)
        case int():
            return b":%d\r\n" % value
        case None:
            return b"$-1\r\n"
        case list():
            return b"*%d\r\n" % len(value) + b"".join(map(resp, value))


def echo(_: "Connection", words: Words) -> bytes:
    """Answer a script as it would: its tag, then its other arguments."""
    return resp(words[4:])


GREETING = {
    b"AUTH": OK,
    b"CLIENT": OK,
    b"INFO": resp(b"redis_version:7.2.0\r\nmaxmemory_policy:noeviction\r\n"),
    b"SCRIPT": resp(b"0" * 40),
    b"SELECT": OK,
    b"TIME": resp([b"1763960000", b"0"]),
}


class Connection(asyncio.Protocol):
    """One connection of a RespServer; a script may write to its `transport` whenever it likes."""

    def __init__(self, server: "RespServer") -> None:
        self._server = server
        self._reader = hiredis.Reader()
        self.lost = False
        self.behind: list[bytes] | None = None  # replies that wait for one that is still to come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._server.connections.append(self)
        if self._server.closes_at_once:
            transport.abort()  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def data_received(self, data: bytes) -> None:
        self._server.segments.append(data)
        self._reader.feed(data)
        while (words := self._reader.gets()) is not False:
            reply = self._server.answer(self, words)
            if reply is not None and self.behind is not None:
                self.behind.append(reply)
            elif reply is not None and not self.transport.is_closing():
                self.transport.write(reply)


class RespServer:
    """A server of scripted replies on a port of loopback: what a real one never does, or not on demand.

    What redis-py and the store say on a new connection is answered by `greeting`; the rest by `script`, which
    returns a reply's bytes, or None for none. `calls` has what came to it, `segments` what each read brought.
    """

    def __init__(self, script: Script = echo) -> None:
        self.script = script
        self.greeting: dict[bytes, bytes | None] = dict(GREETING)
        self.closes_at_once = False
        self.connections: list[Connection] = []
        self.calls: list[Words] = []
        self.segments: list[bytes] = []

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", 0, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    def answer(self, connection: Connection, words: Words) -> bytes | None:
        if words[0] in self.greeting:
            return self.greeting[words[0]]
        if words[0] in (b"WAIT", b"WAITAOF") and words[1] == b"0":
            return resp(0)  # asked on a new connection: may this user wait?
        self.calls.append(words)
        return self.script(connection, words)

    def close(self) -> None:
        self._server.close()
        for connection in self.connections:
            connection.transport.abort()


class RespFraming:
    """What is asked and replied on one connection, as far as a relay has to know it."""

    def __init__(self) -> None:
        self._requests, self._replies = hiredis.Reader(), hiredis.Reader()
        self._asked: deque[bool] = deque()

    def note_requests(self, data: bytes) -> None:
        self._requests.feed(data)
        while (words := self._requests.gets()) is not False:
            self._asked.append(words[0] in (b"EVALSHA", b"EVAL") and words[3].startswith(b"once:{"))

    def replies_in(self, data: bytes) -> int:
        """Return how many replies to verbs on records end in this data."""
        self._replies.feed(data)
        found = 0
        while self._replies.gets() is not False:
            found += self._asked.popleft()
        return found


class Relay:
    """Stands between a store and its real server. It passes everything on, until it is told otherwise."""

    framing: Callable[[], Any] = RespFraming

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()  # towards the stores
        self._passing = asyncio.Event()
        self._passing.set()
        self._lose: int | None = None
        self.unreachable = False  # from now on: new connections end at once
        self.scripts = 0  # replies to verbs on records that came from the server
        self.lost = 0  # of them, those that were not delivered

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def lose_reply(self, number: int = 1, then_unreachable: bool = False) -> None:
        """Cut the connection instead of delivering the reply to the `number`th verb from now on."""
        self._lose = self.scripts + number
        self._then_unreachable = then_unreachable

    def hold(self) -> None:
        """Keep what the store says from the server, until `let_go`."""
        self._passing.clear()

    def let_go(self) -> None:
        self._passing.set()

    def silence(self) -> None:
        """Let nothing more pass on the connections that there are, without an end; new ones pass everything."""
        silenced, self._passing = self._passing, asyncio.Event()
        self._passing.set()
        silenced.clear()

    def cut(self) -> None:
        """End all connections on the store's side. What was held on them is held on; new ones pass everything."""
        held, self._passing = self._passing, asyncio.Event()
        self._passing.set()
        self.let_go = held.set  # type: ignore[method-assign]
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.unreachable:
            writer.close()
            return
        self._writers.add(writer)
        from_server, to_server = await self._connect()
        framing = self.framing()
        for work in (self._requests(reader, to_server, framing), self._replies(from_server, writer, framing)):
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._socket_path)

    async def _requests(self, reader: asyncio.StreamReader, to_server: asyncio.StreamWriter, framing: Any) -> None:
        """Pass requests on. What has left the store reaches the server, even if the store has hung up meanwhile."""
        passing = self._passing
        try:
            while data := await reader.read(1 << 16):
                framing.note_requests(data)
                await passing.wait()
                to_server.write(data)
        except ConnectionError:
            pass
        finally:
            to_server.close()

    async def _replies(self, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter, framing: Any) -> None:
        try:
            while data := await from_server.read(1 << 16):
                self.scripts += framing.replies_in(data)
                if self._lose is not None and self.scripts >= self._lose:
                    self._lose = None
                    self.lost += 1
                    self.unreachable = self._then_unreachable
                    for one in self._writers if self.unreachable else (writer,):
                        one.transport.abort()
                    return
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def relaying(socket_path: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Relay]:
    """A relay in front of the server at `socket_path`."""
    async with started(Relay(socket_path), tls) as relay:
        yield relay


@asynccontextmanager
async def started(relay: Relay, tls: ssl.SSLContext | None = None) -> AsyncIterator[Relay]:
    await relay.start(tls)
    try:
        yield relay
    finally:
        await relay.close()
