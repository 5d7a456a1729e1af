"""A server by itself: how to connect to it, and what its INFO says of its fitness and its memory."""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool, SSLConnection, parse_url
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from redis.exceptions import RedisError

from oncegate import __version__
from oncegate.hostnames.resolver import Resolver, is_address
from oncegate.settings.store_url import parse_server_group
from oncegate.store.redis.link import CONNECT_S, Link
from oncegate.store.redis.talk import Question, Talk, checked, command
from oncegate.store.redis.wire import ErrorReply, Script
from oncegate.store.store import StoreLogin

# Makes an unconnected connection, with other logins than the usual ones where they are given.
Opener = Callable[..., AbstractConnection]
Prepare = Callable[[Link, AbstractConnection], Awaitable[None]]
Info = dict[str, str]

INFO = command("INFO", "server", "memory", "replication", "persistence", "stats", "commandstats")

# redis-py repeats no command: `Store` does, with the same token.
OPTIONS: dict[str, Any] = {"protocol": 2, "retry": None, "retry_on_error": [], "driver_info": None}
OLDEST = (7, 0)
_INDEX = b"local index = 'once:open'"
# Above this share of the memory limit, responses are stored without their body.
FULL_RATIO = 0.9


class Unfit(RedisError):
    """The server cannot be used as this store: it is of another kind, too old, or lacks what the durability needs."""


class Clock:
    """A server's clock, as its replies report it. It may lag behind, and never runs ahead."""

    __slots__ = ("offset_ms",)

    def __init__(self) -> None:
        self.offset_ms = 0.0

    def note(self, now_ms: int) -> None:
        """Take over the server's time from a reply."""
        self.offset_ms = now_ms - time.monotonic() * 1000

    def now_ms(self, _key: bytes = b"") -> int:
        return int(time.monotonic() * 1000 + self.offset_ms)


def load_scripts(*, indexes: bool = True) -> dict[str, Script]:
    """Return the scripts by verb. `indexes`: they write the index of open keys, which no script of a cluster can."""
    bodies = {
        path.name[:-4]: path.read_bytes()
        for path in files("oncegate.store.redis.lua").iterdir()
        if path.name.endswith(".lua")
    }
    if not indexes:
        bodies = {verb: body.replace(_INDEX, b"local index = false") for verb, body in bodies.items()}
    return {verb: Script(verb, body) for verb, body in bodies.items()}


def limits(timeout_s: float) -> dict[str, float]:
    """Return the time limits of a redis-py connection whose replies take up to `timeout_s`."""
    return {"socket_timeout": timeout_s, "socket_connect_timeout": max(CONNECT_S, timeout_s)}


class _ByName:
    """A connection of redis-py whose host name a `Resolver` looks up.

    redis-py leaves that to threads of the loop, which all names share. Addresses are tried one after the other, in the
    system's order: all connections of a store have to lead to the same server.
    """

    host: str
    port: int
    # In place of redis-py's own, which is made anew for each connection, from files as they are by then.
    tls: ssl.SSLContext | None = None

    def __init__(self, *, resolver: Resolver, **options: Any) -> None:
        self._resolver = resolver
        self._address = ""
        super().__init__(**options)

    async def _connect(self) -> None:
        if is_address(self.host):
            addresses = [self.host]
        else:
            async with asyncio.timeout(self.socket_connect_timeout):  # type: ignore[attr-defined]
                found = await self._resolver.name(self.host.lower()).addresses(self.port)
            addresses = [one[4][0] for one in found]
        *others, last = addresses
        for self._address in others:
            with suppress(OSError):
                return await super()._connect()  # type: ignore[misc,no-any-return]
        self._address = last
        return await super()._connect()  # type: ignore[misc,no-any-return]

    def _connection_arguments(self) -> dict[str, Any]:
        arguments = {**super()._connection_arguments(), "host": self._address}  # type: ignore[misc]
        if "ssl" in arguments:
            arguments["ssl"] = self.tls or arguments["ssl"]
            arguments["server_hostname"] = self.host.removesuffix(".")
        return arguments


class _Connection(_ByName, Connection):
    """A connection to a server."""


class _TlsConnection(_ByName, SSLConnection):
    """A connection to a server over TLS."""


class _MasterConnection(_ByName, SentinelManagedConnection):
    """A connection to the master that the sentinels name."""


class _TlsMasterConnection(_ByName, SentinelManagedSSLConnection):
    """The same over TLS."""


def connection_options(url: str, resolver: Resolver, to_master: bool = False) -> dict[str, Any]:
    """Return the options of redis-py's connections to a URL. `to_master`: to the master that sentinels name."""
    options: dict[str, Any] = dict(parse_url(url))
    if "path" in options:
        return options
    secure = options.get("connection_class") is SSLConnection
    kinds = (_MasterConnection, _TlsMasterConnection) if to_master else (_Connection, _TlsConnection)
    return {**options, "connection_class": kinds[secure], "resolver": resolver}


async def say_nothing(_connection: AbstractConnection) -> None:
    """Leave AUTH and SELECT to `greet`: redis-py waits for each of its own greetings."""


class Login(NamedTuple):
    """What a connection authenticates with. Redis knows a password without a user as the default user's."""

    user: str
    password: str


class Logins(NamedTuple):
    """What connections of a store authenticate with: at its servers, and at the sentinels, which have own users."""

    server: Login
    sentinel: Login
    # None for connections without TLS.
    tls: ssl.SSLContext | None


def logins_of(login: StoreLogin) -> Logins:
    """Return what connections authenticate with. Raises OSError for files that cannot be used."""
    url, tls = login.url, None
    if url.startswith("rediss"):
        tls = ssl.create_default_context(cafile=login.ca_file)
        if login.cert_file:
            tls.load_cert_chain(login.cert_file, login.key_file)
    group = parse_server_group(url)
    urls = [url] * 2 if group is None else [group.server_url("localhost:1"), group.sentinel_url("localhost:1")]
    found = [parse_url(one.removeprefix("redis+")) for one in urls]
    server, sentinel = (Login(one.get("username") or "", one.get("password") or "") for one in found)
    return Logins(server, sentinel, tls)


class Openers:
    """Makes the functions that make unconnected redis-py connections. Replies may take up to `timeout_s`.

    `logins`: those of new connections, in place of those in the URLs.
    """

    def __init__(self, timeout_s: float, resolver: Resolver) -> None:
        self.timeout_s, self.resolver = timeout_s, resolver
        self.logins: Logins | None = None

    def with_logins(self, make: Callable[[], AbstractConnection], at_sentinel: bool = False) -> Opener:
        """Return a function that makes connections with the logins that count by then."""

        def open_connection(others: Logins | None = None) -> AbstractConnection:
            connection = make()
            if (logins := others or self.logins) is not None:
                login = logins.sentinel if at_sentinel else logins.server
                connection.username, connection.password = login
                connection.tls = logins.tls  # type: ignore[attr-defined]
            return connection

        return open_connection

    def to(self, url: str, greets: bool = False, at_sentinel: bool = False) -> Opener:
        """Return the function for the server at `url`, or for the sentinel.

        `greets`: redis-py authenticates, for a connection that no `Link` takes over.
        """
        if url.startswith("redis+unix://"):
            url = url.removeprefix("redis+")
        options = {**OPTIONS, **connection_options(url, self.resolver), **limits(self.timeout_s)}
        if not greets:
            options["redis_connect_func"] = say_nothing
        return self.with_logins(ConnectionPool(**options).make_connection, at_sentinel)


def is_refusal(reply: ErrorReply) -> bool:
    """Return whether the server has no such command or forbids it, as managed servers do with INFO."""
    text = str(reply).lower()
    # Redis 7.0 says the second and third of what a script may not do.
    denied = ("no permissions", "can't run this command", "can't access at least one of the keys")
    return any(one in text for one in denied) or text.startswith(("noperm", "err unknown command"))


def parse_info(text: bytes) -> Info:
    """Return the fields of an INFO reply."""
    lines = [line.partition(":") for line in text.decode("utf-8", "replace").splitlines() if ":" in line]
    return {name: value for name, _, value in lines}


def version_of(info: Info) -> tuple[int, ...]:
    """Return the version of Redis that the server has, or is compatible with (Valkey)."""
    return tuple(int(part) for part in info.get("redis_version", "0.0").split(".")[:2])


def check_version(info: Info) -> None:
    """Raise Unfit for a Redis older than OLDEST."""
    if version_of(info) < OLDEST:
        raise Unfit(f"the store is Redis {info.get('redis_version')}; 7.0 is the oldest that works")


def check_mode(info: Info, cluster: bool = False) -> None:
    """Raise Unfit for a server of another kind than the URL says."""
    mode = info.get("redis_mode") or info.get("server_mode", "standalone")
    if mode == "sentinel":
        raise Unfit("this is a sentinel: name it as redis+sentinel://host:port/service")
    if cluster != (mode == "cluster"):
        raise Unfit(
            "this is no cluster: name it as redis://" if cluster else "this is a cluster: name it as redis+cluster://"
        )


def not_ready_reason(info: Info) -> str | None:
    """Return why the server takes no claims, or may forget them by itself; None for a fit server."""
    if info.get("role", "master") != "master":
        return "the store is a replica, which takes no writes"
    policy = info.get("maxmemory_policy", "noeviction")
    return None if policy == "noeviction" else f"the store's maxmemory-policy is {policy}, not noeviction"


def memory_ratio(info: Info) -> float:
    """Return the used share of the server's memory limit, 0 without a limit. Buffers that do not count are left out."""
    limit = int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    return used / limit if limit else 0.0


async def greet(talk: Talk, connection: AbstractConnection) -> None:
    """Authenticate a new connection and select its database, as its URL says. Raises ErrorReply and OSError."""
    asked: list[Question] = []
    if connection.username or connection.password:
        # Redis knows a password without a user as the default user's.
        names = (connection.username,) if connection.username else ()
        asked.append(command("AUTH", *names, connection.password or ""))
    if connection.db:
        asked.append(command("SELECT", connection.db))
    for reply in await talk.ask(*asked):
        checked(reply)


async def set_up(
    talk: Talk, scripts: dict[str, Script], check: Callable[[Info], None], *others: Question
) -> tuple[Any, int, list[Any]]:
    """Load the scripts on a new connection. Return the reply to INFO, the server's time in ms, and the other replies.

    `check` gets its INFO. Raises ErrorReply, Unfit and OSError for a server that cannot be used.
    """
    loads = [command("SCRIPT", "LOAD", script.body) for script in scripts.values()]
    names = [command("CLIENT", "SETINFO", "LIB-NAME", "oncegate"), command("CLIENT", "SETINFO", "LIB-VER", __version__)]
    info, clock, *replies = await talk.ask(INFO, command("TIME"), *loads, *others, *names)
    # First, because a server of another kind does not know the other commands.
    _check_info(info, check)
    for loaded in replies[: len(loads)]:
        checked(loaded)
    seconds, micros = checked(clock)
    return info, int(seconds) * 1000 + int(micros) // 1000, replies[len(loads) : len(loads) + len(others)]


def _check_info(reply: Any, check: Callable[[Info], None]) -> None:
    """Raise for a server whose INFO says that it cannot be used. Managed servers refuse INFO, and are taken."""
    if isinstance(reply, ErrorReply) and is_refusal(reply):
        return
    if not isinstance(checked(reply), bytes):
        raise Unfit("the store has no INFO")
    info = parse_info(reply)
    check_version(info)
    check(info)
