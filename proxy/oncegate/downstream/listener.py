"""The public listener: makes the connections of one worker and holds them to their limits."""

import asyncio
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from oncegate.buffers.write_batcher import write_batcher
from oncegate.downstream.connection import HEAD_S, KEEP_ALIVE_S, ClientConnection
from oncegate.downstream.kernel import unsent_bytes
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.request import Request
from oncegate.known_heads.requests import HeadCache
from oncegate.messages.request_head import ForwardedInfo
from oncegate.messages.request_ids import RequestIds
from oncegate.messages.request_line import USUAL_LIMITS, HeadLimits, Malformed
from oncegate.observe.outcome import ClientCounts, Observe
from oncegate.settings.addresses import Network

# How long the rest of a refused body is read and dropped, so that its sender reads the response.
LINGER_S = 10.0
SWEEP_S = 0.5
SLOW_HEAD = Malformed(408, "the head took too long")
# Of one connection in the kernel, which would take up to 4 MiB of a slow client's response.
UNSENT_BYTES = 131072
# The number of clients for which the listener keeps what forwarded requests say of them.
KEPT_CLIENTS = 1024

Handler = Callable[[Request], Awaitable[None]]


def set_options(server: asyncio.Server) -> None:
    """Set the options of the connections that `server` accepts: they inherit them, which costs them no system call."""
    for listening in server.sockets:
        # A peer that vanished is found by the kernel.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux, macOS
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class Listener:
    """Makes the connections of one public listener and holds them to their limits.

    `observe` takes the reports of what never becomes a request for `handler`. `counts`: to be added to. Clients in the
    networks `trusted` are proxies whose forwarding fields are kept.
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
        counts: ClientCounts | None = None,
        request_ids: RequestIds | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.handler, self.write_batcher = handler, write_batcher(self.loop)
        self._max_connections, self.minimum_rate, self.observe = max_connections, minimum_rate, observe
        self.head_cache, self._trusted = head_cache, trusted
        self.head_s, self.linger_s = min(HEAD_S, minimum_rate.window_s), min(LINGER_S, minimum_rate.window_s)
        # With the transport, which a connection forgets when it closes.
        self._connections: dict[ClientConnection, asyncio.Transport] = {}
        self.counts = counts or ClientCounts(*[defaultdict[str, float](float) for _ in ClientCounts._fields])
        # Most connections come from a few clients.
        self._info_of = lru_cache(KEPT_CLIENTS)(self._new_info)
        # Connections that this side closed, with bytes that the peer has not received yet: since when (the loop's
        # time) a window of the minimum rate runs, and how many bytes were unsent then.
        self._closing: dict[asyncio.Transport, tuple[float, int]] = {}
        self._retired_s = 0.0
        self.request_ids = request_ids or RequestIds("")
        self.retiring, self.docs_url, self.head_limits = False, docs_url, head_limits

    def __call__(self) -> ClientConnection:
        return ClientConnection(self)

    @property
    def open_count(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @property
    def connections(self) -> list[ClientConnection]:
        """The connections that are open, or on which something is still answered."""
        return list(self._connections)

    def add(self, connection: ClientConnection) -> bool:
        """Take a connection that was made; return whether there is room for it."""
        assert connection.transport is not None
        self._connections[connection] = connection.transport
        has_room = len(self._connections) <= self._max_connections
        self.counts.connections["opened" if has_room else "refused"] += 1
        return has_room

    def forget(self, connection: ClientConnection) -> None:
        """Forget a connection that is over."""
        self._connections.pop(connection, None)

    def forwarded_info(self, peername: Any, is_tls: bool) -> ForwardedInfo:
        """Return what requests of a connection say about their client when they are forwarded."""
        return self._info_of(str(peername[0]) if isinstance(peername, tuple) else "", is_tls)

    def _new_info(self, address: str, is_tls: bool) -> ForwardedInfo:
        is_trusted = False
        if address:
            # On [::] a client of IPv4 has an address of IPv6 that stands for its own.
            address = address.removeprefix("::ffff:") if "." in address else address
            is_trusted = self._is_proxy(address)
        scheme = b"https" if is_tls else b"http"
        return ForwardedInfo(address.encode() or b"unknown", scheme, is_trusted, self._is_proxy)

    def _is_proxy(self, address: str) -> bool:
        """Return whether a client of this address is a trusted proxy. Raises ValueError where it is none."""
        return any(ip_address(address) in one for one in self._trusted)

    def count_unsent(self) -> int:
        """Return how many connections have not received all of their response yet."""
        return sum(one.has_unsent_bytes for one in self._connections)

    def abort_stalled(self) -> None:
        """Close the connections that wait for their client."""
        for one in self.connections:
            if one.waits_for_client:
                one.abort()

    def abort(self) -> None:
        """Close every connection, so that no response looks complete that is not."""
        for one in self.connections:
            one.abort()

    def retire(self) -> None:
        """Let each connection end with its next response; a successor of this process takes new ones.

        An idle connection stays until then. Closed at once, it could meet a request that its client has just sent.
        """
        if not self.retiring:
            self.retiring, self._retired_s = True, self.loop.time()
        for one in self._connections:
            one.retiring = True

    def close_tunnels(self) -> None:
        """Close the WebSockets, which have no end of their own to wait for."""
        for one in self.connections:
            if one.is_tunnel:
                one.close()

    def close_quiet(self, quiet_s: float) -> None:
        """Close the connections on which nothing is answered, and was not for `quiet_s` seconds since they retired."""
        latest = self.loop.time() - quiet_s
        if latest >= self._retired_s:
            for one in self.connections:
                one.close_quiet(latest)

    def pre_shutdown(self) -> None:
        """Let each connection end with the requests that it has taken."""
        for one in self.connections:
            one.close()

    async def shutdown(self, timeout_s: float) -> None:
        """End every connection; what does not end by itself is waited for twice, for so long, and then cancelled."""
        await asyncio.gather(*[one.finish(timeout_s) for one in self.connections])
        self._connections.clear()

    async def sweep(self) -> None:
        """Close connections whose head takes too long, those whose last bytes nobody receives, and idle ones.

        Until cancelled. One task for all of them costs less than a timer for each.
        """
        while True:
            await asyncio.sleep(min(SWEEP_S, self.head_s / 4))
            now = self.loop.time()
            latest_start = now - self.head_s
            closing = []
            for connection, transport in list(self._connections.items()):
                if (connection.head_since_s or now) < latest_start:
                    connection.refuse_message(SLOW_HEAD)
                connection.close_idle(now - KEEP_ALIVE_S)
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
