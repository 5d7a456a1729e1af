"""The reading side: event streams whose delays are measured, and a sink for a large response. Prints one JSON line.

python -m loadtest.bench.streams events PORT COUNT EVENTS EVERY_MS BYTES KEY, or ... sink PORT KEY; the key "-" is none.
"""

import asyncio
import json
import socket
import sys
import time
from typing import Any, cast

import uvloop

from loadtest.bench.scenarios import request_bytes

RAMP_S = 0.002  # between two streams, so that opening them is not what is measured


class Live:
    """How many streams are read now, and the most that were read at once."""

    now = most = 0

    def add(self, change: int) -> None:
        self.now += change
        self.most = max(self.most, self.now)


class Stream(asyncio.Protocol):
    """One stream. `delays_s`: the time of each event from its sender to this process; `sent_s`: when it was sent."""

    def __init__(self, request: bytes, live: Live, over: "asyncio.Future[None]") -> None:
        self._request, self._live, self._over = request, live, over
        self._rest = b""
        self.refused = False
        self.first_byte_s = 0.0
        self.delays_s: list[float] = []
        self.sent_s: list[float] = []
        self.disorder = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._asked = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if not self.first_byte_s:
            self.first_byte_s = now / 1e9 - self._asked
            self.refused = not data.startswith(b"HTTP/1.1 200 ")
            self._live.add(1)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                number, sent_ns, _ = line[6:].split()
                self.disorder += int(number) != len(self.delays_s)
                self.delays_s.append((now - int(sent_ns)) / 1e9)
                self.sent_s.append(int(sent_ns) / 1e9)
        if self.refused or (self._rest == b"" and lines[-2:] == [b"0\r", b"\r"]):
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        self._live.add(-1 if self.first_byte_s else 0)
        if not self._over.done():
            self._over.set_result(None)


async def events(port: int, count: int, number: int, every_ms: int, size: int, key: str) -> dict[str, Any]:
    """Read `count` streams of `number` events of `size` bytes at once."""
    loop = asyncio.get_running_loop()
    streams, ends, live = [], [], Live()
    for at in range(count):
        ends.append(loop.create_future())
        request = request_bytes(f"/events?n={number}&ms={every_ms}&bytes={size}", f"{key}-{at}" if key != "-" else "")
        streams.append(Stream(request, live, ends[-1]))
        await loop.create_connection(lambda one=streams[-1]: one, "127.0.0.1", port)  # type: ignore[misc]
        await asyncio.sleep(RAMP_S)
    await asyncio.wait(ends, timeout=number * every_ms / 1000 + 30)
    delays = sorted(delay for one in streams for delay in one.delays_s)
    first = sorted(one.first_byte_s for one in streams)
    refused = sum(one.refused for one in streams)
    return {
        "refused": refused,
        "most_live": live.most,
        "lost": (count - refused) * number - len(delays) + sum(one.disorder for one in streams),
        "first_p50": at_share(first, 0.5),
        "first_p99": at_share(first, 0.99),
        "event_p50": at_share(delays, 0.5),
        "event_p99": at_share(delays, 0.99),
    }


def at_share(values: list[float], share: float) -> float:
    """Return the value that this share of the sorted values does not exceed."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("inf")


def sink(port: int, key: str) -> dict[str, Any]:
    """Read one large response as fast as it arrives."""
    room = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request_bytes("/big", key if key != "-" else ""))
        began = time.monotonic()
        head = connection.recv(65536)
        body = len(head.partition(b"\r\n\r\n")[2])
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while body < length and (got := connection.recv_into(room)):
            body += got
    return {"seconds": time.monotonic() - began, "missing": length - body}


if __name__ == "__main__":
    what, *numbers, key = sys.argv[1:]
    if what == "sink":
        print(json.dumps(sink(int(numbers[0]), key)))
    else:
        port, count, number, every_ms, size = map(int, numbers)
        print(json.dumps(uvloop.run(events(port, count, number, every_ms, size, key))))
