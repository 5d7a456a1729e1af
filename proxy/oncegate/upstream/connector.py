"""Opens connections to an origin: by name or address, over TLS, again after a failure."""

import asyncio
import random
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aiohappyeyeballs import start_connection

from oncegate.hostnames.resolver import HostName, Resolver, is_address
from oncegate.hostnames.system import look_up_failure
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent
from oncegate.upstream.rotation import Rotation
from oncegate.upstream.tls import connect_failure, connect_tls

# The upper bound of the random pause before an attempt to connect: it doubles from the first to the second of these.
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
# How long the next address of a name waits for the one before (RFC 8305, section 8).
HAPPY_EYEBALLS_DELAY_S = 0.25


class Connector:
    """Connects to one origin. `retries`: further attempts after the first. `name`: its name, None for an address."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, retries: int, resolver: Resolver) -> None:
        self._host, self._port, self._tls, self._retries = host, port, tls, retries
        # The dot of an absolute name is for its look-up alone (RFC 6066, section 3).
        self._tls_name = host.removesuffix(".")
        self.name = None if is_address(host) else resolver.name(host)
        self._rotation = Rotation()
        self._loop = asyncio.get_running_loop()

    async def connect(self, make: Callable[[], Connection]) -> Connection:
        """Connect, and repeat that after a failure: nothing was sent, so that is safe. Pauses have full jitter."""
        for attempt in range(self._retries + 1):
            try:
                if self.name is None:
                    return await self._open(make, self._host, host=self._host, port=self._port)
                return await self._connect_by_name(make, self.name)
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError) as error:
                if attempt == self._retries:
                    reason = (
                        connect_failure(error) if not isinstance(error, socket.gaierror) else look_up_failure(error)
                    )
                    raise NotSent(f"the upstream cannot be reached: {reason}") from error
                longest_s = min(MIN_BACKOFF_S * 2**attempt, MAX_BACKOFF_S)
                await asyncio.sleep(random.uniform(0, longest_s))
        raise AssertionError("unreachable")

    async def _connect_by_name(self, make: Callable[[], Connection], name: HostName) -> Connection:
        """Resolve and connect by RFC 8305 (happy eyeballs), then TLS; uvloop alone tries the addresses one by one.

        What fails at one address is tried at the others first.
        """
        order = self._rotation.order(await name.addresses(self._port))
        address, port, *more = order[0][4]
        # Of an IPv6 address with a scope, `address` is not all.
        if len(order) == 1 and not any(more):
            return await self._open(make, address, host=address, port=port)
        sock = await start_connection(order, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, interleave=0, loop=self._loop)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            address = sock.getpeername()[0]
            self._rotation.note_reached(order, address)
            return await self._open(make, address, sock=sock)
        except BaseException:
            self._rotation.note_failed(address)
            sock.close()
            raise

    async def _open(self, make: Callable[[], Connection], address: str, **where: Any) -> Connection:
        """Connect to an address, or over a connected socket, for which uvloop needs the help of a thread."""
        connection = make()
        connection.address = address
        if self._tls is None:
            await self._loop.create_connection(lambda: connection, **where)
        else:
            await connect_tls(self._loop, connection, self._tls, self._tls_name, **where)
        return connection


def client_tls(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Return the TLS side towards the upstream: verified, and a close without close_notify is an error."""
    context = ssl.create_default_context(cafile=ca_file)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context
