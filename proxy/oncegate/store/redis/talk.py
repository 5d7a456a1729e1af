"""Commands outside the request path: several at once over one connection, so that a distant server costs one wait."""

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from oncegate.store.redis.link import Link
from oncegate.store.redis.wire import ErrorReply, Script, ScriptCall, resp
from oncegate.store.results import Unconfirmed


class Question(NamedTuple):
    """A command, or a call of a script with one key: then `args` are the arguments after its tag, in RESP."""

    words: tuple[Any, ...]
    script: Script | None = None
    key: bytes = b""
    arg_count: int = 0
    args: bytes = b""


def command(*words: Any) -> Question:
    return Question(words)


def call(script: Script, key: bytes, *args: Any) -> Question:
    return Question((), script, key, len(args), resp(*args))


class Talk:
    """Asks questions over a shared connection, also before it carries requests."""

    def __init__(self, link: Link) -> None:
        self._link, self._timeout_s = link, link.stall_s
        self._clock = asyncio.get_running_loop().time

    async def ask(self, *questions: Question) -> list[Any]:
        """Send the questions together and return the replies, which may be ErrorReply or Unconfirmed. Never raises."""
        deadline = self._clock() + self._timeout_s
        return await asyncio.gather(*[self._issue(question, deadline) for question in questions])

    def _issue(self, question: Question, deadline: float) -> "asyncio.Future[Any]":
        words, script, key, arg_count, args = question
        if script is None:
            return self._link.command(*words, deadline=deadline)
        # The way of a plain connection, also where claims wait for replicas: these calls do not.
        return Link.script(self._link, ScriptCall(script, key, arg_count, deadline, by_body=True), args)


def checked(reply: Any) -> Any:
    """Return a reply that the server gave. Raises ErrorReply for an error, ConnectionError for none."""
    if isinstance(reply, ErrorReply):
        raise reply
    if isinstance(reply, Unconfirmed):
        raise ConnectionError(reply.reason)
    return reply


async def ask(connection: AbstractConnection, *commands: tuple[Any, ...]) -> list[Any]:
    """Send commands together over a connection that redis-py owns, and return the replies, errors among them.

    Raises ConnectionError, TimeoutError and OSError if they do not come.
    """
    await connection.send_packed_command(connection.pack_commands(commands))
    replies: list[Any] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


def accepted(replies: list[Any]) -> list[Any]:
    """Return these replies of `ask`. Raises the first error among them."""
    for reply in replies:
        if isinstance(reply, ResponseError):
            raise reply
    return replies


async def first_answers(asked: list["asyncio.Task[Any]"], soon_s: float, far_s: float) -> set["asyncio.Task[Any]"]:
    """Wait for all of several servers for `soon_s`, and while none has answered, until `far_s`, for the first.

    Return the tasks that are done; the others are cancelled. A server that is down keeps nobody waiting for longer
    than `soon_s`, and servers that are all far away are heard.
    """
    loop = asyncio.get_running_loop()
    far = loop.time() + far_s
    try:
        done, late = await asyncio.wait(asked, timeout=soon_s)
        if _answered(done):
            return done
        while late and not _answered(done) and (left_s := far - loop.time()) > 0:
            more, late = await asyncio.wait(late, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        if late and _answered(done):
            # The others are about as far away.
            done |= (await asyncio.wait(late, timeout=soon_s))[0]
        return done
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def _answered(done: Iterable["asyncio.Task[Any]"]) -> bool:
    return any(task.exception() is None for task in done)
