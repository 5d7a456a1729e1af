"""The admin listener: where it listens, with which certificate, how many connections it has and for how long."""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from oncegate.admin.access import Access
from oncegate.admin.parts import AdminParts
from oncegate.admin.tokens import load_tokens
from oncegate.downstream.certificate import Replaceable, server_context
from oncegate.settings.addresses import Address
from oncegate.settings.errors import SettingsError
from oncegate.settings.settings import Settings
from oncegate.settings.wording import variable_name

# The most that a connection takes, from its beginning to the end of its one response. The least is half of it.
CONNECTION_S = 30.0
HANDSHAKE_S = 5.0
# Past it, each new connection cuts off the oldest of the address that has most: a stranger cannot keep others out.
MOST_CONNECTIONS = 256
# How long what is left of a request is read after its response.
LINGERING_S = 1.0
# How long a scrape that is under way at the end may still take.
SHUTDOWN_S = 0.05

# A defect is written with its traceback, what a stranger sends is not: it could fill the log, and is not ours to show.
_log = logging.getLogger("oncegate.admin")
_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))


def both_families(address: Address) -> socket.socket:
    """Return a socket that listens on every address of this machine, of IPv6 and of IPv4. Raises OSError."""
    place = (address.host, address.port)
    return socket.create_server(place, family=socket.AF_INET6, dualstack_ipv6=socket.has_dualstack_ipv6())


class AdminListener:
    """The open listener. `access` follows tokens that were read again."""

    def __init__(
        self,
        parts: AdminParts,
        server: asyncio.Server,
        runner: web.AppRunner,
        access: Access,
        certificate: Replaceable | None,
    ) -> None:
        self._parts = parts
        self._server, self._runner, self.access, self._certificate = server, runner, access, certificate

    @property
    def address(self) -> Address:
        """The first address in use: the system may have chosen the port."""
        return Address(*self._server.sockets[0].getsockname()[:2])

    @property
    def connections(self) -> list[RequestHandler]:
        """The open connections, the oldest first."""
        return self._runner.server.connections if self._runner.server else []

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Read tokens and certificates again, and return what takes them over. Raises SettingsError."""
        tokens, tls = load_tokens(settings.admin_tokens_file), admin_tls(settings)

        def take_over() -> None:
            self._parts.settings = settings
            self.access.follow(tokens)
            if self._certificate and tls:
                self._certificate.replace(tls)

        return take_over

    async def close(self) -> None:
        """Stop listening, and end what is under way after SHUTDOWN_S."""
        self._server.close()
        await self._runner.cleanup()


async def serve_admin(parts: AdminParts, sock: socket.socket | None = None) -> AdminListener:
    """Open the admin listener, on `sock` where one listens already.

    Raises OSError where the port is taken, and SettingsError for tokens and certificates that cannot be used.
    """
    # Imported here: of several workers none has this listener.
    from oncegate.admin.app import admin_app

    settings = parts.settings
    access = Access(settings, load_tokens(settings.admin_tokens_file), parts.log)
    tls = admin_tls(settings)
    certificate = Replaceable(tls) if tls else None
    app = admin_app(parts, access)
    runner = web.AppRunner(app, access_log=None, logger=_log, shutdown_timeout=SHUTDOWN_S, lingering_time=LINGERING_S)

    async def limit_connections(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(_end_slow_connections(runner))
        yield
        task.cancel()

    app.cleanup_ctx.append(limit_connections)
    await runner.setup()
    try:
        server = await _listen(runner, sock or settings.admin_listen, tls)
    except OSError:
        await runner.cleanup()
        raise
    return AdminListener(parts, server, runner, access, certificate)


async def _listen(runner: web.AppRunner, where: socket.socket | Address, tls: ssl.SSLContext | None) -> asyncio.Server:
    def connection() -> RequestHandler:
        assert runner.server is not None
        connections = runner.server.connections
        if len(connections) >= MOST_CONNECTIONS:
            _cut_one(connections)
        return runner.server()

    place: dict[str, Any] = {"sock": where}
    if isinstance(where, Address):
        both = where.host == "::"
        place = {"sock": both_families(where)} if both else {"host": where.host, "port": where.port}
    return await asyncio.get_running_loop().create_server(
        connection, **place, ssl=tls, ssl_handshake_timeout=HANDSHAKE_S if tls else None
    )


def admin_tls(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS side of the listener, None for plain HTTP. Raises SettingsError for files that cannot be used.

    A client may present a certificate of `ONCEGATE_ADMIN_TLS_CA_FILE`; the handshake fails for any other.
    """
    if settings.admin_tls_cert_file is None:
        return None
    with _named("admin_tls_cert_file"):
        context = server_context(settings.admin_tls_cert_file, settings.admin_tls_key_file)
    # A resumed session would keep its certificate past a change of the authority.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    if settings.admin_tls_ca_file is not None:
        with _named("admin_tls_ca_file"):
            context.load_verify_locations(settings.admin_tls_ca_file)
        # Probes and scrapes have none.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Name the setting whose file OpenSSL refuses. Raises SettingsError."""
    try:
        yield
    except OSError as error:
        raise SettingsError([f"{variable_name(setting)}: cannot be used: {error}"]) from error


def _cut_one(connections: list[RequestHandler]) -> None:
    """Cut off the oldest connection of the address that has most."""
    hosts = [_host(one) for one in connections]
    ((busiest, _),) = Counter(hosts).most_common(1)
    _abort(connections[hosts.index(busiest)])


def _host(connection: RequestHandler) -> str:
    name = connection.transport.get_extra_info("peername") if connection.transport else None
    return str(name[0]) if name else ""


def _abort(connection: RequestHandler) -> None:
    if connection.transport is not None:
        connection.transport.abort()


async def _end_slow_connections(runner: web.AppRunner) -> None:
    """Cut off the connections that were open at the last look and still are, until cancelled.

    aiohttp itself waits without an end for a client that takes nothing of its response.
    """
    seen: set[RequestHandler] = set()
    while True:
        await asyncio.sleep(CONNECTION_S / 2)
        open_now = runner.server.connections if runner.server else []
        for late in seen.intersection(open_now):
            _abort(late)
        seen = set(open_now)
