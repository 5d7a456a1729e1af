"""The hosts that a store's URL names, how to connect to one, and what a failed connect means to an operator."""

import asyncio
import socket
import ssl
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import asyncpg

from oncegate.hostnames.failures import failure_words

DEFAULT_PORT = 5432
# How long connecting may take, TLS included.
CONNECT_S = 5.0
# Of a pooler that does not know a setting of the first packet.
_POOLER = "unsupported startup parameter"
# What a driver's prepared statements meet where each statement goes to another backend.
_NO_STATEMENT = ("26000", "42P05")
# How long a statement waits for a backend that another transaction has.
SHARED_S = 1.0
PID = "SELECT pg_backend_pid()"
# A host that is gone is noticed after so long, also while a statement waits for its reply. One whose process is paused
# still answers these.
KEEPALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 4),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 2),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 3),
    ((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), 10_000),
)
SHARED = (
    "this is a connection pooler that gives each transaction another connection, where statements of several clients "
    "are mixed up; name the server itself, or a pool in session mode"
)

Connection = Any
T = TypeVar("T")


class Host(NamedTuple):
    """One server of the URL. `name`: a host name, an address, or the folder of a Unix socket."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


class Unreachable(Exception):
    """No connection could be made, or the server at its other end cannot be used. Its text is for operators."""


def hosts_of(url: str) -> tuple[Host, ...]:
    """Return the hosts of a URL, in order: those of its authority, or of its query (`host`, `port`)."""
    parts = urlsplit(url)
    query = dict(pair.partition("=")[::2] for pair in parts.query.split("&"))
    authority = parts.netloc.rpartition("@")[2]
    places = (authority or unquote(query.get("host", "")) or "localhost").split(",")
    ports = unquote(query.get("port", "")).split(",")
    return tuple(_host(place, ports[at] if at < len(ports) else ports[-1]) for at, place in enumerate(places))


def _host(place: str, port: str) -> Host:
    name, separator, own_port = place.rpartition(":")
    if separator and own_port.isdigit() and not place.startswith("/"):
        place, port = name, own_port
    return Host(unquote(place.strip("[]")), int(port or DEFAULT_PORT))


async def connect(url: str, host: Host) -> Connection:
    """Return a new connection to one host. Raises Unreachable.

    The driver gets no time limit for statements: it would cancel them, and a cancelled commit says that it succeeded.
    """
    connecting = asyncio.ensure_future(
        asyncpg.connect(
            url,
            host=host.name,
            port=host.port,
            timeout=CONNECT_S,
            # Prepared statements stay for as long as the connection does.
            max_cached_statement_lifetime=0,
            max_cacheable_statement_size=0,
            target_session_attrs="any",
        )
    )
    try:
        # Not cancelled: the driver would leave a future behind whose error nobody takes note of.
        connection = await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_discard)
        raise
    except Exception as error:
        raise Unreachable(reason_of(error)) from error
    # The driver has no public way to its socket.
    sock = connection._transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        for option, value in KEEPALIVE:
            sock.setsockopt(*option, value)
    return connection


def _discard(connecting: "asyncio.Future[Any]") -> None:
    """Close a connection that nobody waits for any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().terminate()


def reason_of(error: BaseException) -> str:
    """Return what a failed connect or statement means, for operators."""
    text = str(error).partition("\n")[0]
    match error:
        case TimeoutError():
            return "it does not answer"
        case ssl.SSLCertVerificationError():
            return f"its certificate is refused: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS fails: {error.reason or text}"
        case ConnectionError() if "rejected SSL upgrade" in text:
            return "it has no TLS, which sslmode asks for"
        case ConnectionRefusedError():
            return "the connection is refused"
        case asyncpg.PostgresError() if _POOLER in text:
            return f"this is a connection pooler ({text}); name the server itself"
        case asyncpg.PostgresError() if error.sqlstate in _NO_STATEMENT:
            return SHARED
        case _:
            return text or failure_words(error)


async def within(connection: Connection, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return the result of work on a connection that nobody else uses. Raises Unreachable if that fails.

    The connection is closed then. A cancelled statement would be cancelled at the server as well, at any later time.
    """
    task = asyncio.ensure_future(work)
    try:
        if not (await asyncio.wait([task], timeout=seconds))[0]:
            connection.terminate()
            # The closed connection ends it.
            await asyncio.wait([task])
        return task.result()
    except asyncio.CancelledError:
        connection.terminate()
        await asyncio.gather(task, return_exceptions=True)
        raise
    except Unreachable:
        connection.terminate()
        raise
    except Exception as error:
        connection.terminate()
        raise Unreachable(reason_of(error)) from error


def retrieve(task: "asyncio.Future[Any]") -> None:
    """Note how a task ended, so that the loop does not complain where nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


async def refuse_shared_backends(connection: Connection, url: str, host: Host) -> None:
    """Raise Unreachable if transactions of two connections can meet on one backend: a pooler in transaction mode.

    Called for a connection behind a pooler: it has another process id than its backend.
    """
    backend = await connection.fetchval(PID)
    other = await connect(url, host)
    try:
        # The transaction keeps the backend that a pooler gives to it, most likely the one that was used last.
        async with other.transaction():
            others = await other.fetchval(PID)
            asking = asyncio.ensure_future(connection.fetchval(PID))
            asking.add_done_callback(retrieve)
            done, _ = await asyncio.wait([asking], timeout=SHARED_S)
            if not done or others == backend or asking.result() != backend:
                raise Unreachable(SHARED)
    finally:
        other.terminate()
