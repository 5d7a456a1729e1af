"""Clients that take their time to hold places: heads, bodies and answers (T12)."""

import asyncio
import os
import random
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.parts import OK, Proxy, ask, request, until

MANY = 1000
STALL_S = 2.0
BIG = 4 << 20
LATE_S = 6.0  # beyond a limit, on a machine that is busy with all of this


class Sloth(asyncio.Protocol):
    """One slow client: sends `first`, then a byte of `rest` each `pause_s`, and reads nothing unless told."""

    def __init__(self, first: bytes, rest: bytes, pause_s: float, reads: bool) -> None:
        self._first, self._rest, self._pause_s, self._reads = first, rest, pause_s, reads
        self.came = b""
        self.over: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        transport.write(self._first)
        if not self._reads:
            transport.pause_reading()
        if self._rest:
            self._loop.call_later(random.uniform(0, self._pause_s), self._drip)

    def _drip(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._rest[:1])
            self._rest = self._rest[1:] + self._rest[:1]
            self._loop.call_later(self._pause_s, self._drip)

    def read(self) -> None:
        """From here on take what comes: only so does a client see that it was cut off."""
        with suppress(RuntimeError):
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.came += data[:100]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(time.monotonic())


async def sloths(port: int, rows: list[tuple[bytes, bytes]], pause_s: float = 0.5, reads: bool = True) -> list[Sloth]:
    """Open so many slow clients, in turn one of each row: what they send at once, and what by the byte."""
    made = []
    for start in range(0, MANY, 100):
        opened = [
            asyncio.get_running_loop().create_connection(
                partial(Sloth, *rows[number % len(rows)], pause_s, reads), "127.0.0.1", port
            )
            for number in range(start, start + 100)
        ]
        made += [protocol for _, protocol in await asyncio.gather(*opened)]
    return made


async def good(port: int, over: asyncio.Event) -> list[float]:
    """Work as a good client until told to stop; return how long each request took."""
    took = []
    while not over.is_set():
        began = time.monotonic()
        for status in (b"executed", b"replayed"):
            answer = await ask(port, request("POST", "/good", f"good-{len(took)}", b"1"))
            assert answer.header("oncegate-status") == status
        took.append((time.monotonic() - began) / 2)
        await asyncio.sleep(0.05)
    return took


async def besieged(gate: Proxy, slow: list[Sloth], within_s: float) -> None:
    """All slow clients are closed within their limit, while a good one goes on working."""
    began, over = time.monotonic(), asyncio.Event()
    working = asyncio.ensure_future(good(gate.port, over))
    ends = await asyncio.wait_for(asyncio.gather(*(sloth.over for sloth in slow)), within_s + 30)
    over.set()
    took = sorted(await working)
    assert len(took) >= 5
    assert took[len(took) // 2] < 0.5
    assert max(ends) - began < within_s + LATE_S
    await until(lambda: not any(map(gate.metric, ("in_flight", "reading_bodies", "buffered_bytes"))), LATE_S)
    assert "Traceback" not in gate.log()


HEADS = [
    (b"P", b"OST /x HTTP/1.1\r\n"),
    (b"POST /x HTTP/1.1\r\nHost: a\r\n", b"A: b\r\n"),
    (b"POST /x HTTP/1.1\r\nHost: a\r\nIdempotency-Key: ", b"k"),
    (b"GET /\xe9", b"\xe9"),
    (b"GET /x HTTP/1.1\r\nHost: a\r\n\r\nGET /y HT", b""),  # the next one begins and never ends
]


async def test_slow_heads_are_closed(proxies, upstream, valkey):
    """T12: 1,000 heads that come by the byte, or never to an end, get 408 and the end once their time is over."""
    gate = proxies(upstream, valkey.url, CLIENT_STALL_S=STALL_S, ACCESS_LOG="off")
    slow = await sloths(gate.port, HEADS)
    await besieged(gate, slow, STALL_S)
    assert all(sloth.came.count(b"HTTP/1.1 408") == 1 for sloth in slow)


async def test_a_head_that_begins_behind_a_request_is_timed(proxies, upstream, valkey):
    """T12: the beginning of a head that came while a request was being answered has the same time as any other."""

    async def script(_, __, writer: asyncio.StreamWriter, ___) -> None:
        await asyncio.sleep(0.4)
        writer.write(OK)

    upstream.script = script
    gate = proxies(upstream, valkey.url, CLIENT_STALL_S=1)
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(request("PUT", "/x", None, b"1"))
    await asyncio.sleep(0.1)
    writer.write(b"GET /y HT")
    began = time.monotonic()
    came = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    assert (came.startswith(b"HTTP/1.1 200"), b"HTTP/1.1 408" in came) == (True, True)
    assert time.monotonic() - began < 1 + LATE_S


def body(method: str, key: str | None, *extra: str) -> bytes:
    return request(method, "/slow", key, b"", *extra)


async def test_slow_bodies_are_closed(proxies, upstream, valkey):
    """T12: 1,000 bodies that come by the byte, by length and in chunks, with a key and streamed, with a good start or
    without, get 408 and the end when a window passed with less than the least rate; none is claimed."""
    gate = proxies(upstream, valkey.url, CLIENT_STALL_S=STALL_S, ACCESS_LOG="off")
    rows = [
        (body("POST", "a", "Content-Length: 100000"), b"x"),
        (body("POST", "b", "Content-Length: 100000") + bytes(50_000), b"x"),
        (body("POST", "c", "Transfer-Encoding: chunked") + b"fffff\r\n", b"x"),
        (body("POST", "d", "Transfer-Encoding: chunked"), b"1\r\nx\r\n"),
        (body("POST", "e", "Transfer-Encoding: chunked") + b"1;", b"a"),
        (body("POST", "f", "Content-Length: 100000", "Expect: 100-continue"), b""),
        (body("PUT", None, "Content-Length: 100000"), b"x"),
        (body("POST", None, "Transfer-Encoding: chunked") + b"fffff\r\n", b"x"),
    ]
    slow = await sloths(gate.port, rows)
    await besieged(gate, slow, 3 * STALL_S)  # the answer is given a window as well
    assert {sloth.came.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")[:12] for sloth in slow} == {b"HTTP/1.1 408"}
    assert all(b"/slow" not in received.line or received.body == b"" for received in upstream.received)
    assert len(valkey.records()) <= len(upstream.received)


async def big(_, __, writer: asyncio.StreamWriter, received) -> None:
    """Answer with a lot, or with a little that a kernel alone does not take."""
    if b"/good" in received.line:
        writer.write(OK)
        return
    size = 150_000 if b"/medium" in received.line else BIG
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    for start in range(0, size, 65_536):
        writer.write(bytes(min(65_536, size - start)))
        await writer.drain()


async def test_slow_readers_are_cut_off(proxies, upstream, valkey):
    """T12: 1,000 clients that take nothing of an answer, replayed or passed through, large or of a size that is all
    written and not taken, are cut off, while a good client goes on working; then nothing of them is left."""
    upstream.script = big
    limits = {"MAX_UPSTREAM_CONNECTIONS": 2 * MANY, "STORE_TIMEOUT_MS": 20_000}
    gate = proxies(upstream, valkey.url, CLIENT_STALL_S=STALL_S, ACCESS_LOG="off", **limits)
    for target in ("/large", "/medium"):
        assert (await ask(gate.port, request("POST", target, f"stored{target[1:]}", b"1"))).complete
    raws = [
        request(method, target, key and f"stored{target[1:]}", b"1", "Connection: close")
        for target in ("/large", "/medium")
        for method, key in (("POST", "stored"), ("PUT", None))
    ]
    descriptors, before = open_files(gate), resident_bytes(gate.process.pid)
    raws += [raw.replace(b"HTTP/1.1", b"HTTP/1.0") for raw in raws]
    slow = await sloths(gate.port, [(raw, b"") for raw in raws], reads=False)
    try:
        over = asyncio.Event()
        working = asyncio.ensure_future(good(gate.port, over))
        # A connection that is kept is kept for good: a busy machine may take its time for a thousand of them.
        await until(lambda: open_files(gate) <= descriptors + 10, 90)
        over.set()
        assert len(await working) >= 5
        await until(lambda: gate.metric("in_flight") == 0, LATE_S)
        assert resident_bytes(gate.process.pid) - before < MANY * 300_000
    finally:
        over.set()
        for sloth in slow:
            sloth.read()
        await asyncio.wait_for(asyncio.gather(*(sloth.over for sloth in slow)), 30)


def open_files(gate: Proxy) -> int:
    return len(os.listdir(f"/proc/{gate.process.pid}/fd"))


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024
