"""Commands outside the request path: over the shared connection, or over one that redis-py still owns."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from oncegate.store.redis.link import Link
from oncegate.store.redis.wire import ErrorReply, Script, ScriptCall, resp


class Talk(Protocol):
    """A conversation with one server. An error that the server returns comes as an ErrorReply; nothing raises it."""

    def command(self, *words: Any) -> Awaitable[Any]:
        """Return the reply to one command."""

    def script(self, script: Script, key: bytes, *args: Any) -> Awaitable[Any]:
        """Return the reply of one script, without its tag."""


class LinkTalk:
    """A conversation over the shared connection. No reply within `timeout_s`: the reply is an Unconfirmed."""

    def __init__(self, link: Link, timeout_s: float) -> None:
        self._link, self._timeout_s = link, timeout_s
        self._clock = asyncio.get_running_loop().time

    def command(self, *words: Any) -> Awaitable[Any]:
        return self._link.command(*words, deadline=self._clock() + self._timeout_s)

    def script(self, script: Script, key: bytes, *args: Any) -> Awaitable[Any]:
        deadline = self._clock() + self._timeout_s
        return self._link.script(ScriptCall(script, key, len(args), deadline, by_body=True), resp(*args))


class ConnectionTalk:
    """A conversation over a new connection, before a `Link` takes it over from redis-py."""

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


async def ask(connection: AbstractConnection, *words: Any) -> Any:
    """Send one command over a connection that redis-py owns, and return its reply. Raises RedisError and OSError."""
    await connection.send_command(*words)
    return await connection.read_response()
