"""What is asked of the server itself: how to reach it, whether it is fit, how full it is."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisError, ResponseError

from oncegate.store.redis.link import ErrorReply, Script

Opener = Callable[[], AbstractConnection]
Prepare = Callable[[AbstractConnection], Awaitable[None]]
Info = dict[str, str]

OPTIONS: dict[str, Any] = {"protocol": 2, "retry": None, "retry_on_error": []}  # repeating is ours
OLDEST = (7, 0)
FULL_RATIO = 0.9  # above it answers are stored without their body


class Unfit(RedisError):
    """A server that cannot keep the promise."""


def load_scripts() -> dict[str, Script]:
    """Return the scripts by verb."""
    bodies = {
        path.name[:-4]: path.read_bytes()
        for path in files("oncegate.store.redis.lua").iterdir()
        if path.name.endswith(".lua")
    }
    return {verb: Script(verb, body) for verb, body in bodies.items()}


def opener(url: str, timeout_s: float) -> Opener:
    """Return what makes unconnected redis-py connections to `url`; its own repeats are off."""
    if url.startswith("redis+unix://"):
        url = url.removeprefix("redis+")
    pool = ConnectionPool.from_url(url, **OPTIONS, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    return pool.make_connection


async def ask(connection: AbstractConnection, *words: Any) -> Any:
    """Send one command over a connection that is still redis-py's and return its reply."""
    await connection.send_command(*words)
    return await connection.read_response()


class Bare:
    """Talk over a connection that is still redis-py's; what the server refuses comes as a value."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection

    async def command(self, *words: Any) -> Any:
        try:
            return await ask(self._connection, *words)
        except ResponseError as error:
            return ErrorReply(error)

    async def script(self, script: Script, key: bytes, *args: Any) -> Any:
        reply = await self.command("EVAL", script.body, 1, key, "", *args)
        return reply[1:] if isinstance(reply, list) else reply


def is_refusal(reply: ErrorReply) -> bool:
    """Return whether a server knows no such command, or not for us, as managed ones do with INFO."""
    text = str(reply).lower()
    return "no permissions" in text or text.startswith(("noperm", "err unknown", "unknown command", "err command"))


def parse_info(text: bytes) -> Info:
    """Return the fields of an INFO reply."""
    lines = [line.partition(":") for line in text.decode("utf-8", "replace").splitlines() if ":" in line]
    return {name: value for name, _, value in lines}


def version_of(info: Info) -> tuple[int, ...]:
    """Return the Redis that a server is, or is compatible with (Valkey)."""
    return tuple(int(part) for part in info.get("redis_version", "0.0").split(".")[:2])


def check_version(info: Info) -> None:
    """Raise Unfit for a server whose scripts work differently."""
    if version_of(info) < OLDEST:
        raise Unfit(f"the store is Redis {info.get('redis_version')}; 7.0 is the oldest that works")


def check_mode(info: Info, cluster: bool = False) -> None:
    """Raise Unfit for a server that is of another kind than the URL says."""
    mode = info.get("redis_mode") or info.get("server_mode", "standalone")
    if mode == "sentinel":
        raise Unfit("this is a sentinel: name it as redis+sentinel://host:port/service")
    if cluster != (mode == "cluster"):
        raise Unfit(
            "this is no cluster: name it as redis://" if cluster else "this is a cluster: name it as redis+cluster://"
        )


def problem(info: Info) -> str | None:
    """Return why the server takes no claims or may forget them by itself, None where it is fit."""
    if info.get("role", "master") != "master":
        return "the store is a replica, which takes no writes"
    policy = info.get("maxmemory_policy", "noeviction")
    return None if policy == "noeviction" else f"the store's maxmemory-policy is {policy}, not noeviction"


def memory_ratio(info: Info) -> float:
    """Return how much of its memory limit the server uses, 0 where it has none. Its buffers do not count."""
    limit = int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    return used / limit if limit else 0.0


def preparer(
    scripts: dict[str, Script],
    on_time: Callable[[int], None],
    check: Callable[[Info], None] = check_mode,
    accept: Prepare | None = None,
    attend: Callable[["Bare"], Awaitable[None]] | None = None,
) -> Prepare:
    """Return what readies a new connection: version and `check` (by INFO), scripts loaded, clock read
    (`on_time`, ms), then `accept`, and last `attend`: what it learns is known before the first claim."""

    async def prepare(connection: AbstractConnection) -> None:
        talk = Bare(connection)
        said = await talk.command("INFO", "server")
        if isinstance(said, bytes):
            info = parse_info(said)
            check_version(info)
            check(info)
        elif not is_refusal(said):
            raise said
        for script in scripts.values():
            await ask(connection, "SCRIPT", "LOAD", script.body)
        seconds, micros = await ask(connection, "TIME")
        on_time(int(seconds) * 1000 + int(micros) // 1000)
        if accept is not None:
            await accept(connection)
        if attend is not None:
            await attend(talk)

    return prepare
