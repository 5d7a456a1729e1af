"""The admin listener: where it listens, with which certificate, how many connections it has and for how long."""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

    handshakes: dict[Handshake, None] = {}

    async def limit_connections(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(_end_slow_connections(runner))
        yield
        task.cancel()
        for one in list(handshakes):
            one.abort()

    app.cleanup_ctx.append(limit_connections)
    await runner.setup()
    try:
        server = await _listen(runner, sock or settings.admin_listen, tls, handshakes)
    except OSError:
        await runner.cleanup()
        raise
    return AdminListener(parts, server, runner, access, certificate)


async def _listen(
    runner: web.AppRunner,
    where: socket.socket | Address,
    tls: ssl.SSLContext | None,
    handshakes: "dict[Handshake, None]",
) -> asyncio.Server:
    def connection() -> RequestHandler | Handshake:
        assert runner.server is not None
        # Those in their handshake first: who came through it may be of use.
        connections: list[RequestHandler | Handshake] = [*handshakes, *runner.server.connections]
        if len(connections) >= MOST_CONNECTIONS:
            _cut_one(connections)
        return Handshake(handshakes, runner.server, tls) if tls else runner.server()

    place: dict[str, Any] = {"sock": where}
    if isinstance(where, Address):
        both = where.host == "::"
        place = {"sock": both_families(where)} if both else {"host": where.host, "port": where.port}
    return await asyncio.get_running_loop().create_server(connection, **place)


class Handshake(asyncio.Protocol):
    """A connection in its TLS handshake: neither aiohttp nor a server of asyncio's lets anybody count or end these.

    `others`: all of them, the oldest first. Its socket goes on to a transport that does the handshake.
    """

    def __init__(
        self, others: "dict[Handshake, None]", served: Callable[[], RequestHandler], tls: ssl.SSLContext
    ) -> None:
        self._others, self._served, self._tls = others, served, tls
        self.host = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.host = _peer(transport)
        # A copy: the transport closes its own, before it has read anything.
        self._socket = transport.get_extra_info("socket").dup()
        transport.abort()  # type: ignore[attr-defined]
        self._others[self] = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        # Its client may send something else, or nothing. The transport closes the socket.
        with suppress(OSError):
            await loop.connect_accepted_socket(
                self._served, self._socket, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_S
            )
        self._others.pop(self, None)

    def abort(self) -> None:
        """Let the handshake fail."""
        self._others.pop(self, None)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


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


def _cut_one(connections: Sequence[RequestHandler | Handshake]) -> None:
    """Cut off the first connection of the address that has most."""
    hosts = [one.host if isinstance(one, Handshake) else _peer(one.transport) for one in connections]
    ((busiest, _),) = Counter(hosts).most_common(1)
    _abort(connections[hosts.index(busiest)])


def _peer(transport: asyncio.BaseTransport | None) -> str:
    name = transport.get_extra_info("peername") if transport else None
    return str(name[0]) if name else ""


def _abort(connection: RequestHandler | Handshake) -> None:
    if isinstance(connection, Handshake):
        connection.abort()
    elif connection.transport is not None:
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
