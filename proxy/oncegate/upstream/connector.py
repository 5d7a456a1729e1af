"""Opens connections to an origin: by name or address, over TLS, again after a failure."""

import asyncio
import random
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from aiohappyeyeballs import start_connection

from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent
from oncegate.upstream.tls import connect_failure, connect_tls

# The upper bound of the random pause before an attempt to connect: it doubles from the first to the second of these.
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
# How long the next address of a name waits for the one before (RFC 8305, section 8).
HAPPY_EYEBALLS_DELAY_S = 0.25


class Connector:
    """Connects to one origin. `retries`: further attempts after the first."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, retries: int) -> None:
        self._host, self._port, self._tls, self._retries = host, port, tls, retries
        self._is_address = _is_address(host)
        self._loop = asyncio.get_running_loop()

    async def connect(self, make: Callable[[], Connection]) -> Connection:
        """Connect, and repeat that after a failure: nothing was sent, so that is safe. Pauses have full jitter."""
        for attempt in range(self._retries + 1):
            try:
                if self._is_address:
                    return await self._open(make, host=self._host, port=self._port)
                return await self._connect_by_name(make)
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError) as error:
                if attempt == self._retries:
                    raise NotSent(f"the upstream cannot be reached: {connect_failure(error)}") from error
                longest_s = min(MIN_BACKOFF_S * 2**attempt, MAX_BACKOFF_S)
                await asyncio.sleep(random.uniform(0, longest_s))
        raise AssertionError("unreachable")

    async def _connect_by_name(self, make: Callable[[], Connection]) -> Connection:
        """Resolve and connect by RFC 8305 (happy eyeballs), then TLS; uvloop alone tries the addresses one by one."""
        addresses = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        host, port, *more = addresses[0][4]
        # Of an IPv6 address with a scope, `host` is not all.
        if len(addresses) == 1 and not any(more):
            return await self._open(make, host=host, port=port)
        sock = await start_connection(addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, loop=self._loop)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return await self._open(make, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _open(self, make: Callable[[], Connection], **where: Any) -> Connection:
        """Connect to an address, or over a connected socket, for which uvloop needs the help of a thread."""
        connection = make()
        if self._tls is None:
            await self._loop.create_connection(lambda: connection, **where)
        else:
            await connect_tls(self._loop, connection, self._tls, self._host, **where)
        return connection


def _is_address(host: str) -> bool:
    """Return whether a host is an address that needs no look-up: no name, and without a scope."""
    with suppress(ValueError):
        return not getattr(ip_address(host), "scope_id", None)
    return False


def client_tls(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Return the TLS side towards the upstream: verified, and a close without close_notify is an error."""
    context = ssl.create_default_context(cafile=ca_file)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context
