"""An upstream of event streams: each event says when it was sent, in ns of the system's monotonic clock.

A request for /events?n=N&ms=M&bytes=B gets N events of B bytes, one every M ms, whatever its method.
usage: python -m loadtest.peers.events PORT
"""

import asyncio
import random
import re
import sys
import time
from typing import cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASKED = re.compile(rb"[A-Z]+ /events\?n=(\d+)&ms=(\d+)(?:&bytes=(\d+))? HTTP/1\.1\r\n(?:.+\r\n)*?\r\n")
BYTES = 100


class Events(asyncio.Protocol):
    """One connection; the request's body, if any, comes with its head and is dropped."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._head = cast(asyncio.Transport, transport), b""
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._head += data
        if found := ASKED.match(self._head):
            self._head, self._left, self._pause_s = b"", int(found[1]), int(found[2]) / 1000
            self._bytes, self._sent = int(found[3] or BYTES), 0
            self._next = self._loop.time() + random.random() * self._pause_s
            self._transport.write(HEAD)
            self._send()

    def _send(self) -> None:
        if self._transport.is_closing():
            return
        facts = b"data: %d %d " % (self._sent, time.monotonic_ns())
        event = facts + b"x" * (self._bytes - len(facts) - 2) + b"\n\n"
        self._sent += 1
        last = self._sent == self._left
        self._transport.write(b"%x\r\n%b\r\n%b" % (len(event), event, b"0\r\n\r\n" if last else b""))
        if not last:
            self._next += self._pause_s
            self._loop.call_at(self._next, self._send)


async def main(port: int) -> None:
    """Serve until killed."""
    await asyncio.get_running_loop().create_server(Events, "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
