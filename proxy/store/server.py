"""What is asked of the server itself: how to reach it, whether it is fit, how full it is."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisError

from proxy.store.link import Script

OLDEST = (7, 0)
FULL_RATIO = 0.9  # above it answers are stored without their body


class Unfit(RedisError):
    """A server that cannot keep the promise."""


def load_scripts() -> dict[str, Script]:
    """Return the scripts by verb."""
    bodies = {path.name[:-4]: path.read_bytes() for path in files("proxy.lua").iterdir() if path.name.endswith(".lua")}
    return {verb: Script(verb, body) for verb, body in bodies.items()}


def opener(url: str, timeout_s: float) -> Callable[[], AbstractConnection]:
    """Return what makes unconnected redis-py connections to `url`; its own repeats are off."""
    if url.startswith("redis+unix://"):
        url = url.removeprefix("redis+")
    pool = ConnectionPool.from_url(
        url, protocol=2, retry=None, retry_on_error=[], socket_timeout=timeout_s, socket_connect_timeout=timeout_s
    )
    return pool.make_connection


async def ask(connection: AbstractConnection, *words: Any) -> Any:
    """Send one command over a connection that is still redis-py's and return its reply."""
    await connection.send_command(*words)
    return await connection.read_response()


def parse_info(text: bytes) -> dict[str, str]:
    """Return the fields of an INFO reply."""
    lines = [line.partition(":") for line in text.decode("utf-8", "replace").splitlines() if ":" in line]
    return {name: value for name, _, value in lines}


def check_version(info: dict[str, str]) -> None:
    """Raise Unfit for a server whose scripts work differently. Valkey tells the Redis it is compatible with."""
    version = info.get("redis_version", "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise Unfit(f"the store is Redis {version}; 7.0 is the oldest that works")


def problem(info: dict[str, str]) -> str | None:
    """Return why the server takes no claims or may forget them by itself, None where it is fit."""
    if info.get("role", "master") != "master":
        return "the store is a replica, which takes no writes"
    policy = info.get("maxmemory_policy", "noeviction")
    return None if policy == "noeviction" else f"the store's maxmemory-policy is {policy}, not noeviction"


def memory_ratio(info: dict[str, str]) -> float:
    """Return how much of its memory limit the server uses, 0 where it has none."""
    limit = int(info.get("maxmemory", 0))
    return int(info.get("used_memory", 0)) / limit if limit else 0.0


def preparer(
    scripts: dict[str, Script], on_time: Callable[[int], None]
) -> Callable[[AbstractConnection], Awaitable[None]]:
    """Return what readies a new connection: version checked, scripts loaded, clock read (`on_time`, ms)."""

    async def prepare(connection: AbstractConnection) -> None:
        check_version(parse_info(await ask(connection, "INFO", "server")))
        for script in scripts.values():
            await ask(connection, "SCRIPT", "LOAD", script.body)
        seconds, micros = await ask(connection, "TIME")
        on_time(int(seconds) * 1000 + int(micros) // 1000)

    return prepare
