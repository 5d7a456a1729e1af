"""The public listener's connections: aiohttp's low-level server, with the deadlines and manners it lacks.

aiohttp parses requests and keeps connections; here it learns to answer a client that half-closed, to
time out slow heads and slow takers, to take any byte in a target, to count connections, and to refuse in
our own words.
"""

import asyncio
import socket
from collections.abc import Iterator

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from oncegate.downstream.connection import HEAD_S, KEEP_ALIVE_S, ClientConnection, Handler
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.response import ResponseWriter, untaken_bytes
from oncegate.messages.head_cache import HeadCache
from oncegate.messages.problems import refusal
from oncegate.observe.outcome import Observe, Outcome, RequestReport

LINGER_S = 10.0  # for which the rest of a refused body is read and dropped, so that the answer is seen
SWEEP_S = 0.5
READ_BYTES = 65536  # of a body that wait for whoever reads it, twice as many at most
UNSENT_BYTES = 131072  # of one connection in the kernel, which would take up to 4 MiB from a slow client's answer


def bound_unsent(server: asyncio.Server) -> None:
    """Bound what the kernel holds unsent for each connection that `server` accepts: it hands the option down."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux, macOS
        for listening in server.sockets:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class Listener(web.Server):
    """Makes the connections of one public listener and holds them to their limits.

    `observe` is told of what never becomes a request for the handler.
    """

    def __init__(
        self, handler: Handler, *, max_connections: int, pace: MinimumRate, observe: Observe, docs_url: str = ""
    ) -> None:
        super().__init__(
            handler,  # type: ignore[arg-type]  # called by ClientConnection alone
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=min(LINGER_S, pace.window_s),
            auto_decompress=False,
            access_log=None,
            read_bufsize=READ_BYTES,
            max_line_size=16384,
            max_field_size=16384,
        )
        self._max_connections, self._pace, self.observe = max_connections, pace, observe
        self.head_s = min(HEAD_S, pace.window_s)
        # Closed on our side with bytes that the peer has still to take: since when, and how many.
        self._leaving: dict[asyncio.Transport, tuple[float, int]] = {}
        self.retiring = False
        self.docs_url = docs_url
        self.heads: HeadCache | None = None  # what new connections begin with
        self.label = b""

    def __call__(self) -> RequestHandler:
        return ClientConnection(self, loop=self._loop, **self._kwargs)

    def has_room(self) -> bool:
        """Return whether the newest connection still fits."""
        return len(self._connections) <= self._max_connections

    def _ours(self) -> Iterator[ClientConnection]:
        return (one for one in self.connections if isinstance(one, ClientConnection))

    def owing(self) -> int:
        """Return how many connections have not taken all of their answer yet."""
        return sum(one.owes for one in self._ours())

    def abort_stalled(self) -> None:
        """Close the connections that wait for their client, not for us."""
        for one in self._ours():
            if one.stalled:
                one.abort()

    def abort(self) -> None:
        """Close every connection on which something is under way."""
        for one in self._ours():
            one.abort()

    def retire(self) -> None:
        """Let each connection end with its next answer; a successor takes those that come instead.

        An idle one stays until then: closed at once, it could meet a request that its client has just sent.
        """
        self.retiring = True
        for one in self._ours():
            one.retiring = True

    async def sweep(self) -> None:
        """Close connections whose head takes too long, and those whose end nobody takes, until cancelled."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self.head_s / 4))
            now = self._loop.time()
            late = now - self.head_s
            leaving = []
            for connection, transport in list(self._connections.items()):
                if isinstance(connection, ClientConnection) and (connection.head_since or late + 1) < late:
                    self.cut_off(connection, 408, "the head took too long")
                if transport.is_closing() and transport.get_write_buffer_size():
                    leaving.append(transport)
            self._leaving = {transport: self._hurry(transport, now) for transport in leaving}

    def _hurry(self, transport: asyncio.Transport, now: float) -> tuple[float, int]:
        """Return since when a closed connection keeps up the pace and what it had to take then; cut off one that
        does not."""
        untaken = untaken_bytes(transport)
        since, before = self._leaving.get(transport, (now, untaken))
        if now - since < self._pace.window_s:
            return since, before
        if before - untaken < self._pace.least:
            transport.abort()
        return now, untaken

    def cut_off(self, connection: ClientConnection, status: int, detail: str) -> None:
        """Refuse a head before its end, and with it the connection."""
        self.observe(RequestReport(Outcome.REQUEST_REFUSED, status, ""))
        connection.tell(ResponseWriter.closing_answer(refusal(status, detail)))
        connection.force_close()
