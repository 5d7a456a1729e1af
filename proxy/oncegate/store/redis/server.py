"""A server by itself: how to connect to it, and what its INFO says of its fitness and its memory."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisError

from oncegate.store.redis.talk import ConnectionTalk, ask
from oncegate.store.redis.wire import ErrorReply, Script

Opener = Callable[[], AbstractConnection]
Prepare = Callable[[AbstractConnection], Awaitable[None]]
Info = dict[str, str]

# redis-py repeats no command: `Store` does, with the same token.
OPTIONS: dict[str, Any] = {"protocol": 2, "retry": None, "retry_on_error": []}
OLDEST = (7, 0)
# Above this share of the memory limit, responses are stored without their body.
FULL_RATIO = 0.9


class Unfit(RedisError):
    """The server cannot be used as this store: it is of another kind, too old, or lacks what the durability needs."""


def load_scripts() -> dict[str, Script]:
    """Return the scripts by verb."""
    bodies = {
        path.name[:-4]: path.read_bytes()
        for path in files("oncegate.store.redis.lua").iterdir()
        if path.name.endswith(".lua")
    }
    return {verb: Script(verb, body) for verb, body in bodies.items()}


def opener(url: str, timeout_s: float) -> Opener:
    """Return a function that makes unconnected redis-py connections to `url`."""
    if url.startswith("redis+unix://"):
        url = url.removeprefix("redis+")
    pool = ConnectionPool.from_url(url, **OPTIONS, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    return pool.make_connection


def is_refusal(reply: ErrorReply) -> bool:
    """Return whether the server has no such command or forbids it, as managed servers do with INFO."""
    text = str(reply).lower()
    return "no permissions" in text or text.startswith(("noperm", "err unknown", "unknown command", "err command"))


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


def preparer(
    scripts: dict[str, Script],
    on_time: Callable[[int], None],
    check: Callable[[Info], None] = check_mode,
    accept: Prepare | None = None,
    inspect: Callable[[ConnectionTalk], Awaitable[None]] | None = None,
) -> Prepare:
    """Return a function that prepares a new connection.

    It checks the version, calls `check` with the INFO, loads the scripts, and calls `on_time` with the server's clock
    in ms. Then it calls `accept`, and last `inspect`, so that losses are known before the first claim.
    """

    async def prepare(connection: AbstractConnection) -> None:
        talk = ConnectionTalk(connection)
        reply = await talk.command("INFO", "server")
        if isinstance(reply, bytes):
            info = parse_info(reply)
            check_version(info)
            check(info)
        elif not is_refusal(reply):
            raise reply
        for script in scripts.values():
            await ask(connection, "SCRIPT", "LOAD", script.body)
        seconds, micros = await ask(connection, "TIME")
        on_time(int(seconds) * 1000 + int(micros) // 1000)
        if accept is not None:
            await accept(connection)
        if inspect is not None:
            await inspect(talk)

    return prepare
