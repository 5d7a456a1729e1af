"""What tests are built with: the proxy as a process, a scripted upstream on raw sockets, a raw client."""

import ast
import asyncio
import gc
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Proxy:
    """`oncegate serve` as a process. Settings are given without their prefix."""

    upstream_socket: socket.socket  # of a proxy that stands for a whole module

    def __init__(self, upstream: str, store_url: str, folder: Path, settings: dict[str, object]) -> None:
        self.folder = folder
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
        self._env |= {
            "ONCEGATE_UPSTREAM": upstream,
            "ONCEGATE_STORE_URL": store_url,
            "ONCEGATE_DATA_DIR": str(folder / "data"),
            "ONCEGATE_LISTEN": "127.0.0.1:0",
            "ONCEGATE_ADMIN_LISTEN": "127.0.0.1:0",
            "ONCEGATE_ACCESS_LOG": "all",
            "ONCEGATE_IDENTITY_CHANGE": "accept",  # tests share a store, and its proxies may differ as they like
            # `TEST_HEAD_CACHE=off make …` runs the same tests without the head cache.
            **({"ONCEGATE_HEAD_CACHE": "false"} if os.environ.get("TEST_HEAD_CACHE") == "off" else {}),
            **{f"ONCEGATE_{name}": str(value) for name, value in settings.items()},
        }

    def start(self) -> None:
        """Start it and wait until it serves."""
        self._begin()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.serves():
                return
            time.sleep(0.01)
        raise AssertionError(f"the proxy did not start: {self.log()}")

    def _begin(self) -> None:
        self._log = self.folder / f"proxy-{time.monotonic_ns()}.log"
        self._log.touch()
        self._spawn()

    def _spawn(self) -> None:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "oncegate", "serve"], env=self._env, stderr=log, stdout=log, cwd=self.folder
            )

    def serves(self) -> bool:
        """Return whether it says where it listens."""
        for line in self.events("serving"):
            self.port = int(line["public"].rpartition(":")[2])
            self.admin_port = int(line["admin"].rpartition(":")[2])
            return True
        return False

    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        lines = [line for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in map(json.loads, lines) if line.get("event") == name]

    def admin(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, sample: str) -> float:
        """Return one sample, such as `requests_total{outcome="executed"}`."""
        for line in self.admin("/metrics")[1].splitlines():
            if line.startswith(f"oncegate_{sample} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no sample {sample}")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 40) -> int:
        """Send SIGTERM and return the exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


@dataclass
class Received:
    """One request as the upstream got it."""

    head: bytes
    body: bytes
    connection: int

    @property
    def line(self) -> bytes:
        return self.head.partition(b"\r\n")[0]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        lines = self.head.split(b"\r\n")[1:]
        return [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines if line)]

    def header(self, name: str) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name.lower().encode()]


Script = Callable[["RawUpstream", asyncio.StreamReader, asyncio.StreamWriter, Received], Awaitable[None]]


def answering(answer: bytes, delay_s: float = 0.0) -> Script:
    """Return a script that writes these bytes as they are."""

    async def script(_: "RawUpstream", __: asyncio.StreamReader, writer: asyncio.StreamWriter, ___: Received) -> None:
        await asyncio.sleep(delay_s)
        writer.write(answer)
        await writer.drain()

    return script


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def holding(until: asyncio.Event, answer: bytes = OK) -> Script:
    """Return a script that answers once `until` is set."""

    async def script(_: "RawUpstream", __: asyncio.StreamReader, writer: asyncio.StreamWriter, ___: Received) -> None:
        await until.wait()
        writer.write(answer)
        await writer.drain()

    return script


class Tap:
    """An answer that the test sends piece by piece; `script` is for one request."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def script(self, _: "RawUpstream", __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        while (piece := await self._pieces.get()) is not None:
            writer.write(piece)
            await writer.drain()

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._pieces.put_nowait(piece)

    def end(self, *pieces: bytes) -> None:
        """Send the last pieces; the connection stays for the next request."""
        self.send(*pieces)
        self._pieces.put_nowait(None)


class RawUpstream:
    """An upstream of raw bytes: `script` is run for each request; what came is in `received`."""

    def __init__(self) -> None:
        self.script: Script = answering(OK)
        self.received: list[Received] = []
        self.connections = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket | None = None, tls: ssl.SSLContext | None = None) -> None:
        """Listen, on `sock` where one is given, else on a port of its own."""
        place: dict[str, Any] = {"sock": sock} if sock else {"host": "127.0.0.1", "port": 0}
        self._server = await asyncio.start_server(self._serve, limit=1 << 26, backlog=2048, ssl=tls, **place)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def open_connections(self) -> int:
        """How many connections are open, as asyncio itself counts them."""
        return int(getattr(self._server, "_active_count"))  # noqa: B009

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self.writers.add(writer)
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n"))[:-2]
                request = Received(head, b"", number)
                self.received.append(request)
                request.body = await read_body(reader, request.headers)
                await self.script(self, reader, writer, request)
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def standing_upstream(proxy: Proxy) -> AsyncIterator[RawUpstream]:
    """The upstream of a standing proxy, new for each test."""
    server = RawUpstream()
    await server.start(proxy.upstream_socket.dup())
    yield server
    await server.close()


Talk = Callable[["Raw", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Raw:
    """A server below HTTP: `talk` is run for each connection, and may read, write and break off as it likes."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.accepted = 0
        self.finished = 0
        self.requests: list[bytes] = []  # those that `request` read whole
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, tls: ssl.SSLContext | None = None, port: int = 0, sock: socket.socket | None = None) -> None:
        place: dict[str, Any] = {"sock": sock} if sock else {"host": "127.0.0.1", "port": port}
        self._server = await asyncio.start_server(self._serve, ssl=tls, limit=1 << 26, **place)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await self.talk(self, reader, writer)
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            self.finished += 1
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """Read one whole request."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head + await read_body(reader, Received(head[:-2], b"", self.accepted).headers))
        return self.requests[-1]

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def serving(talk: Talk, **options: Any) -> AsyncIterator[Raw]:
    """Run a Raw server."""
    raw = Raw(talk)
    await raw.start(**options)
    try:
        yield raw
    finally:
        await raw.close()


def abort(writer: asyncio.StreamWriter) -> None:
    """End a connection with a RST."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


class Blackhole:
    """A listener whose backlog is full, so that connecting to it hangs; `place` is its socket."""

    def __init__(self) -> None:
        self.place = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._fillers: list[socket.socket] = []
        while not self._fillers or self._connected(self._fillers[-1]):
            assert len(self._fillers) < 64
            filler = socket.socket()
            self._fillers.append(filler)
            filler.setblocking(False)
            filler.connect_ex(self.place.getsockname())

    @staticmethod
    def _connected(filler: socket.socket) -> bool:
        return bool(select.select([], [filler], [], 0.1)[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.place.getsockname()[1]}"

    def close(self) -> None:
        for one in (self.place, *self._fillers):
            one.close()


async def read_body(reader: asyncio.StreamReader, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Read a request's body by its framing."""
    fields = {name.lower(): value for name, value in headers}
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return body
    return await reader.readexactly(int(fields.get(b"content-length", b"0")))


@dataclass
class Answer:
    """An answer as a client saw it. `complete`: its end was clean by its own framing."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    complete: bool
    interim: list[int] = field(default_factory=list)

    def header(self, name: str) -> bytes | None:
        found = [value for key, value in self.headers if key.lower() == name.lower().encode()]
        assert len(found) <= 1, f"{name} came {len(found)} times"
        return found[0] if found else None

    @property
    def problem(self) -> dict[str, Any]:
        assert self.header("content-type") == b"application/problem+json"
        return json.loads(self.body)  # type: ignore[no-any-return]

    @property
    def slug(self) -> str:
        return self.problem["type"].rpartition(":")[2]


async def read_answer(reader: asyncio.StreamReader, head_only: bool = False) -> Answer | None:
    """Read one answer strictly; None where the connection ended before a head."""
    interim: list[int] = []
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        line, *lines = head[:-4].split(b"\r\n")
        version, status, reason = line.split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers = [(name, value.strip()) for name, _, value in (one.partition(b":") for one in lines)]
        if 100 <= int(status) < 200:
            interim.append(int(status))
            continue
        body, complete = await _read_answer_body(reader, headers, head_only or int(status) in (204, 304))
        return Answer(int(status), reason, headers, body, complete, interim)


async def _read_answer_body(
    reader: asyncio.StreamReader, headers: list[tuple[bytes, bytes]], bodiless: bool
) -> tuple[bytes, bool]:
    fields = {name.lower(): value for name, value in headers}
    body = bytearray()
    if bodiless:
        return b"", True
    try:
        if b"transfer-encoding" in fields:
            assert fields[b"transfer-encoding"] == b"chunked"
            while size := int(await reader.readuntil(b"\r\n"), 16):
                while size:
                    part = await reader.read(size)
                    if not part:
                        return bytes(body), False
                    body += part
                    size -= len(part)
                await reader.readexactly(2)
            await reader.readexactly(2)
            return bytes(body), True
        if b"content-length" in fields:
            size = int(fields[b"content-length"])
            while len(body) < size:
                part = await reader.read(size - len(body))
                if not part:
                    return bytes(body), False
                body += part
            return bytes(body), True
        while part := await reader.read(65536):
            body += part
        return bytes(body), True
    except (asyncio.IncompleteReadError, ConnectionError):
        return bytes(body), False


class RawClient:
    """One connection to a proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, **options: Any) -> "RawClient":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26, **options))

    async def ask(self, raw: bytes, head_only: bool = False) -> Answer | None:
        self.writer.write(raw)
        return await read_answer(self.reader, head_only)

    def reset(self) -> None:
        """Leave with a RST."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()


def request(
    method: str = "POST",
    target: str = "/v1/charges",
    key: str | None = "key-1",
    body: bytes = b'{"amount": 1}',
    *extra: str,
    host: str = "api.test",
) -> bytes:
    """Return a request's bytes; `extra` are further header lines."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    if key is not None:
        lines.append(f"Idempotency-Key: {key}")
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in extra) and body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, *extra, "", ""]).encode("latin-1") + body


async def ask(port: int, raw: bytes, seconds: float = 30) -> Answer:
    """Send one request on a connection of its own and return its answer."""
    client = await RawClient.open(port)
    try:
        async with asyncio.timeout(seconds):
            answer = await client.ask(raw)
        assert answer is not None, "the connection ended without an answer"
        return answer
    finally:
        client.close()


async def lazy(port: int) -> RawClient:
    """Return a client that reads nothing by itself and has little room."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    client = RawClient(*await asyncio.open_connection(sock=sock, limit=65536))
    client.writer.transport.pause_reading()
    return client


def open_files(pid: int) -> list[str]:
    """Return what a process has open, as the kernel names it; what it closes meanwhile is left out."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return found


def store_process(proxy: Proxy) -> int:
    """Return the process id of a proxy's embedded store: its one child."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = status.read_text().rpartition(") ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields.split()[1]) == proxy.process.pid and "server" in name:
            children.append(int(status.parent.name))
    assert len(children) == 1
    return children[0]


def signals_of(pid: int, field: str) -> set[int]:
    """Return the signals that a process catches (SigCgt) or blocks (SigBlk)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {number for number in range(1, 65) if int(status[field], 16) >> (number - 1) & 1}


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped. What one says that stops itself, it says before it does."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.01)


class Talk(asyncio.Protocol):
    """What comes back on a connection. A stream reader would forget it where the end is a reset."""

    def __init__(self) -> None:
        self.came = b""
        self.over = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.came += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


async def converse(port: int, *pieces: bytes, pause_s: float = 0.003) -> list[Answer]:
    """Send these pieces in segments of their own, half-close, and return the answers that came before the end."""
    transport, talk = await asyncio.get_running_loop().create_connection(Talk, "127.0.0.1", port)
    for piece in pieces:
        transport.write(piece)
        await asyncio.sleep(pause_s)
    with suppress(OSError):  # it has ended already
        transport.write_eof()
    async with asyncio.timeout(20):
        await talk.over.wait()
    return await answers_in(talk.came)


async def answers_in(raw: bytes) -> list[Answer]:
    """Return the answers that these bytes are, to the last byte."""
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    answers = []
    while not reader.at_eof():
        answer = await read_answer(reader)
        assert answer is not None
        assert answer.complete
        answers.append(answer)
    return answers


async def rest(client: RawClient) -> bytes:
    """Return all that comes until the connection is closed, which must not take long."""
    async with asyncio.timeout(20):
        return await client.reader.read()


def parsed(path: Path) -> ast.Module:
    """Return a file's syntax tree. Python 3.11 fails where garbage is collected in the middle of making one."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def tracked() -> list[str]:
    """Return the files of the tree that git knows, or would take: what a clean copy has."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())
