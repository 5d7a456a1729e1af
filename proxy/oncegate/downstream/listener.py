"""The public listener: makes the connections of one worker and holds them to their limits."""

import asyncio
import socket
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from oncegate.downstream.connection import HEAD_S, KEEP_ALIVE_S, ClientConnection, Handler
from oncegate.downstream.kernel import unsent_bytes
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.known_heads.requests import HeadCache
from oncegate.messages.request_head import ForwardedInfo
from oncegate.messages.request_line import USUAL_LIMITS, HeadLimits, Malformed
from oncegate.observe.outcome import Observe
from oncegate.settings.addresses import Network

# How long the rest of a refused body is read and dropped, so that its sender reads the response.
LINGER_S = 10.0
SWEEP_S = 0.5
SLOW_HEAD = Malformed(408, "the head took too long")
# Of a body that waits for its reader; at most twice as much is buffered.
READ_BYTES = 65536
# Of one connection in the kernel, which would take up to 4 MiB of a slow client's response.
UNSENT_BYTES = 131072


def bound_unsent(server: asyncio.Server) -> None:
    """Bound what the kernel holds unsent for each connection that `server` accepts. They inherit the option."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux, macOS
        for listening in server.sockets:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class Listener(web.Server):
    """Makes the connections of one public listener and holds them to their limits.

    `observe` takes the reports of what never becomes a request for `handler`. Clients in the networks `trusted` are
    proxies whose forwarding fields are kept.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        max_connections: int,
        minimum_rate: MinimumRate,
        observe: Observe,
        head_cache: HeadCache,
        trusted: Sequence[Network] = (),
        docs_url: str = "",
        head_limits: HeadLimits = USUAL_LIMITS,
    ) -> None:
        super().__init__(
            handler,  # type: ignore[arg-type]  # called by ClientConnection alone
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=min(LINGER_S, minimum_rate.window_s),
            auto_decompress=False,
            access_log=None,
            read_bufsize=READ_BYTES,
            max_line_size=head_limits.line_bytes,
            max_field_size=head_limits.line_bytes,
            max_headers=head_limits.fields,
        )
        self._max_connections, self.minimum_rate, self.observe = max_connections, minimum_rate, observe
        self.head_cache, self._trusted = head_cache, trusted
        self.head_s = min(HEAD_S, minimum_rate.window_s)
        # Connections that this side closed, with bytes that the peer has not received yet: since when (the loop's
        # time) a window of the minimum rate runs, and how many bytes were unsent then.
        self._closing: dict[asyncio.Transport, tuple[float, int]] = {}
        self._retired_s = 0.0
        self.retiring, self.docs_url, self.head_limits = False, docs_url, head_limits

    def __call__(self) -> RequestHandler:
        return ClientConnection(self, loop=self._loop, **self._kwargs)

    def has_room(self) -> bool:
        """Return whether the newest connection still fits."""
        return len(self._connections) <= self._max_connections

    def forwarded_info(self, peername: Any, is_tls: bool) -> ForwardedInfo:
        """Return what requests of a connection say about their client when they are forwarded."""
        address, is_trusted = "unknown", False
        if isinstance(peername, tuple):
            # On [::] a client of IPv4 has an address of IPv6 that stands for its own.
            address = str(peername[0]).removeprefix("::ffff:") if "." in peername[0] else str(peername[0])
            is_trusted = any(ip_address(address) in one for one in self._trusted)
        return ForwardedInfo(address.encode(), b"https" if is_tls else b"http", is_trusted)

    def _client_connections(self) -> Iterator[ClientConnection]:
        return (one for one in self.connections if isinstance(one, ClientConnection))

    def count_unsent(self) -> int:
        """Return how many connections have not received all of their response yet."""
        return sum(one.has_unsent_bytes for one in self._client_connections())

    def abort_stalled(self) -> None:
        """Close the connections that wait for their client."""
        for one in self._client_connections():
            if one.waits_for_client:
                one.abort()

    def abort(self) -> None:
        """Close every connection, so that no response looks complete that is not."""
        for one in self._client_connections():
            one.abort()

    def retire(self) -> None:
        """Let each connection end with its next response; a successor of this process takes new ones.

        An idle connection stays until then. Closed at once, it could meet a request that its client has just sent.
        """
        if not self.retiring:
            self.retiring, self._retired_s = True, self._loop.time()
        for one in self._client_connections():
            one.retiring = True

    def close_tunnels(self) -> None:
        """Close the WebSockets, which have no end of their own to wait for."""
        for one in self._client_connections():
            if one.is_tunnel:
                one.close()

    def close_quiet(self, quiet_s: float) -> None:
        """Close the connections on which nothing is answered, and was not for `quiet_s` seconds since they retired."""
        latest = self._loop.time() - quiet_s
        if latest >= self._retired_s:
            for one in list(self._client_connections()):
                one.close_quiet(latest)

    async def sweep(self) -> None:
        """Close connections whose head takes too long, and those whose last bytes nobody receives, until cancelled."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self.head_s / 4))
            now = self._loop.time()
            latest_start = now - self.head_s
            closing = []
            for connection, transport in list(self._connections.items()):
                if isinstance(connection, ClientConnection) and (connection.head_since_s or now) < latest_start:
                    connection.refuse_message(SLOW_HEAD)
                if transport.is_closing() and transport.get_write_buffer_size():
                    closing.append(transport)
            self._closing = {transport: self._check_closing(transport, now) for transport in closing}

    def _check_closing(self, transport: asyncio.Transport, now: float) -> tuple[float, int]:
        """Return since when a closed connection's window runs and what was unsent then; abort one that is too slow."""
        unsent = unsent_bytes(transport)
        since, before = self._closing.get(transport, (now, unsent))
        if now - since < self.minimum_rate.window_s:
            return since, before
        if before - unsent < self.minimum_rate.least:
            transport.abort()
        return now, unsent
