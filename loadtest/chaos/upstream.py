"""The API behind the proxies. Before it responds, it appends every execution to a file.

Lines (tab separated; times of CLOCK_MONOTONIC in seconds):
  begin  time execution tenant key variant replica kind
  end    time execution how digest       (how: whole, declined, cut: as planned; lost: the connection broke)
  mixed  time replica text               (a request that contradicts itself: bytes of two requests in one)
  idle   time replica                    (a connection that was idle was ended with a 408)
Asked with GET about a key, it shows the execution that counts, by this file: also what ran before it was killed.
A request that arrived only in part is an execution too; its unknown fields are `?`.
"""

import asyncio
import os
import random
import sys
import time
from pathlib import Path
from typing import cast

import uvloop

from loadtest.chaos.link import reset
from loadtest.chaos.plan import (
    DECLINED,
    EARLY_BYTES,
    LARGE_BYTES,
    OVERSIZE_BYTES,
    RECEIVERS,
    answer_kind,
    filler,
    identification,
    is_answered_early,
)
from loadtest.chaos.wire import answer_digest

SILENCE_S = 30.0
# How late the second copy of an answer comes: not later than what a proxy promises to notice.
SURPLUS_S = 0.04
STATUS = {
    "failed": b"500 It Failed",
    "empty": b"204 Done",
    "busy": b"429 Too Many",
    "later": b"503 Later",
    "early": b"413 Too Large",
}
SIZES = {"large": LARGE_BYTES, "oversize": OVERSIZE_BYTES, "streamed": 3000, "cut-chunks": 3000}
AT_ONCE = frozenset(("small", "failed", "empty", "busy", "later", "twice", "idle-408"))
CHUNKED = frozenset(("streamed", "cut-chunks"))


IDLE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
# As Varnish writes it when the answer of the API was lost.
MADE_UP = (
    b"HTTP/1.1 503 Backend fetch failed\r\nX-Varnish: 7\r\nVia: 1.1 cache (Varnish/7.1)\r\nRetry-After: 5\r\n"
    b"Content-Length: 0\r\n\r\n"
)


class Log:
    """The file of executions."""

    def __init__(self, path: Path, name: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._name, self._count = name, 0
        # By tenant and key, the executions that were not declined.
        self.counted: dict[tuple[str, str], list[str]] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        for line in path.read_text().splitlines():
            words = line.split("\t")
            if words[0] == "begin":
                self._note_begin(words[2], (words[3], words[4]))
            elif words[0] == "end":
                self._note_end(words[2], words[3])

    def _note_begin(self, execution: str, key: tuple[str, str]) -> None:
        self._keys[execution] = key
        self.counted.setdefault(key, []).append(execution)

    def _note_end(self, execution: str, how: str) -> None:
        if how == "declined":
            self.counted[self._keys[execution]].remove(execution)

    def _line(self, *words: object) -> None:
        os.write(self._file, ("\t".join(map(str, words)) + "\n").encode())

    def begin(self, request: "Request", replica: int, kind: str) -> str:
        self._count += 1
        execution = f"{self._name}.{self._count}"
        now = f"{time.monotonic():.6f}"
        self._line("begin", now, execution, request.tenant, request.key, request.variant, replica, kind)
        self._note_begin(execution, (request.tenant, request.key))
        return execution

    def end(self, execution: str, how: str, digest: str = "-") -> None:
        self._line("end", f"{time.monotonic():.6f}", execution, how, digest)
        self._note_end(execution, how)

    def idle(self, replica: int) -> None:
        self._line("idle", f"{time.monotonic():.6f}", replica)

    def mixed(self, replica: int, what: bytes) -> None:
        self._line("mixed", f"{time.monotonic():.6f}", replica, repr(what))


class Request:
    """A request, or the part of it that arrived."""

    def __init__(self, data: bytes) -> None:
        head, separator, rest = data.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        method, _, rest_of_line = line.partition(b" ")
        target, named, _ = rest_of_line.partition(b" ")
        path = target.split(b"/")
        self.tenant, self.key = (path[1].decode(), path[2].decode()) if named and len(path) == 3 else ("?", "?")
        self.fields = {name.lower(): value.strip() for name, _, value in (one.partition(b":") for one in lines)}
        self.length = int(self.fields.get(b"content-length", b"0")) if separator else 0
        self.whole = bool(separator) and len(rest) >= self.length
        self.size = len(head) + 4 + self.length
        self.body = rest[: self.length]
        # Of a request that is there in part: what its beginning says.
        self.likely_variant = self._variant(method)
        self.variant = self.likely_variant if self.whole else "?"

    def _variant(self, method: bytes) -> str:
        typed = 3 if self.fields.get(b"content-type") == b"text/plain" else int(self.body[:1] or b"0")
        return str(2 if method == b"PATCH" else typed)

    def consistent(self) -> bool:
        """Return whether request line, header fields and body belong to one request."""
        return (
            all(self._says(field) for field in identification(self.tenant, self.key.encode()).split(b"\r\n"))
            and (b"idempotency-key" in self.fields) == (self.tenant not in RECEIVERS)
            and self.body[2 : 3 + len(self.key)] == self.key.encode() + b":"
        )

    def _says(self, field: bytes) -> bool:
        name, _, value = field.partition(b": ")
        return self.fields.get(name.lower(), b"").strip(b'"') == value


class Service(asyncio.Protocol):
    """One connection from a proxy."""

    def __init__(self, log: Log, seed: int, replica: int, times: dict[tuple[str, str], int]) -> None:
        self._log, self._seed, self._replica, self._times = log, seed, replica, times
        self._data = self._written = b""
        self._task: asyncio.Task[None] | None = None
        self._running: str | None = None  # the execution that is being answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._task is None and b"\r\n\r\n" in self._data:
            self._next()

    def _next(self) -> None:
        if self._data.startswith(b"GET /asked/"):
            self._tell()
            return
        request = Request(self._data)
        at = (request.tenant, request.key)
        nth = self._times.get(at, 0) + 1
        if not request.whole:
            if request.size > EARLY_BYTES and request.body and is_answered_early(self._seed, *at, nth):
                self._refuse_early(request, nth)
            return
        self._data = self._data[request.size :]
        if not request.consistent():
            self._log.mixed(self._replica, request.body[:80])
        self._times[at] = nth
        kind = answer_kind(self._seed, *at, nth)
        execution = self._running = self._log.begin(request, self._replica, kind)
        echo = f"{request.tenant} {request.key} {request.variant}"
        if kind in AT_ONCE:
            self._whole(execution, kind, echo)
            self._go_wrong_later(kind, time.monotonic())
            if self._data:
                self._next()
        else:
            self._task = asyncio.ensure_future(self._answer(execution, kind, echo))

    def _tell(self) -> None:
        """Show what became of a key."""
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        _, _, tenant, key = head.split(b" ", 2)[1].decode().split("/")
        counted = self._log.counted.get((tenant, key))
        lines, body = [b"HTTP/1.1 404 Nothing"], b""
        if counted:
            body = b'{"key": "%b", "execution": "%b", "state": "done"}' % (key.encode(), counted[0].encode())
            lines = [b"HTTP/1.1 200 Done", b"X-Execution: " + counted[0].encode()]
        more = [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
        self._transport.write(b"\r\n".join([*lines, *more, b"", body]))
        if b"\r\n\r\n" in self._data:
            self._next()

    def _refuse_early(self, request: Request, nth: int) -> None:
        """Respond before the request is whole, and close with the rest of it unread, as gunicorn does."""
        request.variant = request.likely_variant
        self._times[request.tenant, request.key] = nth
        execution = self._running = self._log.begin(request, self._replica, "early")
        self._transport.pause_reading()
        self._data = b""
        self._whole(execution, "early", f"{request.tenant} {request.key} {request.variant}")
        asyncio.get_running_loop().call_later(0.02, self._transport.close)

    def _go_wrong_later(self, kind: str, answered: float) -> None:
        """Say something that nobody asked for, some time after an answer."""
        loop, written = asyncio.get_running_loop(), self._written
        if kind == "twice":
            loop.call_later(random.uniform(0, SURPLUS_S * 0.8), self._repeat, written, answered)
        elif kind == "idle-408":
            loop.call_later(random.uniform(0.005, 0.6), self._end_idle)

    def _repeat(self, written: bytes, answered: float) -> None:
        # On a busy machine a timer may be late, and a copy that comes too late is no fair test.
        if time.monotonic() - answered < SURPLUS_S and not self._transport.is_closing():
            self._transport.write(written)

    def _end_idle(self) -> None:
        if self._running is None and self._task is None and not self._data and not self._transport.is_closing():
            self._log.idle(self._replica)
            self._transport.write(IDLE)
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if self._running is not None:
            self._log.end(self._running, "lost")
            self._running = None
        elif self._data:
            self._log.end(self._log.begin(Request(self._data), self._replica, "part"), "lost")
        if self._task is not None:
            self._task.cancel()

    def _head(self, execution: str, kind: str, echo: str) -> list[bytes]:
        lines = [
            b"HTTP/1.1 " + STATUS.get(kind, b"200 Fine"),
            b"Content-Type: application/x-filler",
            b"X-Execution: " + execution.encode(),
            b"X-Echo: " + echo.encode(),
            b"x-Twice: one",
            b"X-twice: \xc3\xa4 two",
        ]
        more = [b"Retry-After: 1"] if kind in DECLINED else [b"Connection: close"] if kind == "early" else []
        return lines + more

    def _whole(self, execution: str, kind: str, echo: str) -> None:
        """Respond at once, in one piece."""
        lines = self._head(execution, kind, echo)
        body = b"" if kind == "empty" else filler(execution, SIZES.get(kind, 120))
        self._done(execution, "declined" if kind in DECLINED else "whole", answer_digest(lines, body))
        length = [] if kind == "empty" else [b"Content-Length: %d" % len(body)]
        self._written = b"\r\n".join([*lines, *length, b"", body])
        self._transport.write(self._written)

    def _done(self, execution: str, how: str, digest: str = "-") -> None:
        self._running = None
        self._log.end(execution, how, digest)

    async def _answer(self, execution: str, kind: str, echo: str) -> None:
        """Respond slowly, in pieces, or badly."""
        rng = random.Random(execution)
        if kind == "silent":
            await asyncio.sleep(SILENCE_S)
        await asyncio.sleep(rng.uniform(0, 0.05) if kind != "slow" else rng.uniform(0.05, 1.0))
        match kind:
            case "slow" | "large" | "oversize":
                self._whole(execution, kind, echo)
            case "streamed" | "cut-chunks" | "eof":
                await self._pieces(execution, kind, echo, rng)
            case _:
                self._bad(execution, kind, echo)
        self._task = None
        if self._data:
            self._next()

    async def _pieces(self, execution: str, kind: str, echo: str, rng: random.Random) -> None:
        lines = self._head(execution, kind, echo)
        body = filler(execution, SIZES.get(kind, 800))
        chunked = kind in CHUNKED
        framing = b"Transfer-Encoding: chunked" if chunked else b"Connection: close"
        self._transport.write(b"\r\n".join([*lines, framing, b"", b""]))
        step = len(body) // rng.randint(2, 8)
        for at in range(0, len(body), step):
            await asyncio.sleep(rng.uniform(0, 0.03))
            piece = body[at : at + step]
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if kind == "cut-chunks":
            self._done(execution, "cut")
            self._transport.close()
            return
        self._done(execution, "whole", answer_digest(lines, body))
        if chunked:
            self._transport.write(b"0\r\n\r\n")
        else:
            self._transport.close()

    def _bad(self, execution: str, kind: str, echo: str) -> None:
        self._done(execution, "cut")
        head = b"\r\n".join(self._head(execution, kind, echo))
        match kind:
            case "gateway":
                self._transport.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            case "made-up":
                self._transport.write(MADE_UP)
            case "cut-length":
                self._transport.write(head + b"\r\nContent-Length: 500\r\n\r\n" + filler(execution, 300))
                self._transport.close()
            case "cut-head":
                self._transport.write(head[: len(head) // 2])
                self._transport.close()
            case "garbage":
                self._transport.write(b"\x16\x03\x01 no answer at all\r\n\r\n")
                reset(self._transport)
            case _:
                reset(self._transport)


async def serve(path: Path, name: str, seed: int, ports: list[int]) -> None:
    """Serve one port for each replica, until the process ends."""
    loop = asyncio.get_running_loop()
    log = Log(path, name)
    times: dict[tuple[str, str], int] = {}
    for replica, port in enumerate(ports):

        def service(replica: int = replica) -> Service:
            return Service(log, seed, replica, times)

        await loop.create_server(service, "127.0.0.1", port, backlog=1024)
    print("serving", flush=True)
    await loop.create_future()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), [int(port) for port in sys.argv[4:]]))
