"""One connection to a Redis server, shared by all concurrent requests.

redis-py opens it (it knows AUTH, TLS, RESP); from then on the socket is ours: what is issued in one
turn of the event loop leaves together, one reader resolves the replies in order. A call costs a third
of what it costs through redis-py's own call. No command is cancelled half-way: a caller that
stops waiting leaves its place in the queue, so that the next reply still finds its owner.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from hashlib import sha1
from time import perf_counter
from typing import Any, cast

import hiredis
from redis.asyncio.connection import AbstractConnection

from oncegate.buffers.write_batcher import write_batcher
from oncegate.store.results import Unconfirmed

BATCH = 8  # commands that leave at once, so that the store works on them while the turn issues more
SWEEP_S = 0.05  # how late a deadline may be noticed
RECONNECT_FIRST_S, RECONNECT_MOST_S = 0.02, 1.0
CANCEL_AGAIN_S = 0.1
DEMOTED = ("READONLY", "MASTERDOWN")  # what a server says to writes that is, or became, a replica


class ErrorReply(Exception):
    """The server answered with an error; the first word of its text is the kind."""


class _Sizes(dict[int, bytes]):
    """How RESP announces a word of so many bytes. Bounded: a value may have any size."""

    def __missing__(self, size: int) -> bytes:
        announced = b"$%d\r\n" % size
        if size < 4096:
            self[size] = announced
        return announced


class _Numbers(dict[int, bytes]):
    """Numbers as words of a command. Bounded."""

    def __missing__(self, number: int) -> bytes:
        if len(self) >= 4096:
            self.clear()
        written = self[number] = resp(number)
        return written


SIZE = _Sizes()
NUMBER = _Numbers()
_COUNT = [b"*%d\r\n" % count for count in range(16)]
TAGS = 4096  # that a connection gives in turn; far more than commands wait on one


def resp(*words: bytes | str | int) -> bytes:
    """Return words of a command as they are written: RESP's bulk strings."""
    written = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"".join([SIZE[len(word)] + word + b"\r\n" for word in written])


# Each as it comes back, and as a word of a command. Numbers of one length: a reply says which command it answers.
_TAGS = [(tag, resp(tag)) for tag in (b"%04d" % number for number in range(TAGS))]


class Script:
    """One verb. `sha` is the name under which a server that has it runs it; `by_sha` and `by_body` are how a call
    with one key begins, by the number of its arguments."""

    def __init__(self, verb: str, body: bytes) -> None:
        self.verb, self.body = verb, body
        self.sha = sha1(body).hexdigest().encode()
        by_sha, by_body = resp(b"EVALSHA", self.sha, 1), resp(b"EVAL", body, 1)
        self.by_sha, self.by_body = [words + by_sha for words in _COUNT[5:]], [words + by_body for words in _COUNT[5:]]


# A command whose reply has not come: its future, the tag that comes back in the reply of a script, the verb, the
# deadline (the loop's time) and when it was issued (perf_counter's). A plain tuple: made twice for an execution.
_Waiting = tuple["asyncio.Future[Any]", bytes, str, float, float]


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)


class Link(asyncio.Protocol):
    """The shared connection. `open_connection` makes a fresh, unconnected redis-py connection;
    `prepare` talks over it once it is connected (and raises what makes it unusable). `observe(verb, seconds)`
    hears of every script's reply.

    A server that has not answered the oldest command for `stall_s` seconds is given up: the connection
    is closed, everything on it is unconfirmed, and a new one is made.
    """

    def __init__(
        self,
        open_connection: Callable[[], AbstractConnection],
        prepare: Callable[[AbstractConnection], Awaitable[None]],
        stall_s: float,
        observe: Callable[[str, float], None] = lambda _, __: None,
    ) -> None:
        self._open_connection = open_connection
        self._prepare = prepare
        self._stall_s, self._observe = stall_s, observe
        self._loop = asyncio.get_running_loop()
        self._write_batcher = write_batcher(self._loop)
        self._transport: asyncio.Transport | None = None
        self.up = False  # whether it stands
        self._streams: object = None  # redis-py's, over the same transport
        self._reader = hiredis.Reader(replyError=ErrorReply)
        self._out: list[bytes] = []
        self._waiting: deque[_Waiting] = deque()
        self._tags = 0
        self._up = asyncio.Event()
        self._lost = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.down_because = "not connected yet"
        self.at: tuple[str, int] | None = None  # the host and port it was connected to last, as they were named

    # Its life ...

    def start(self) -> None:
        """Connect, and connect anew whenever the connection is lost, until closed."""
        self._keeper = self._loop.create_task(self._keep())

    async def close(self) -> None:
        while self._keeper and not self._keeper.done():
            self._keeper.cancel()  # again where redis-py, while it connects, took the cancellation for an error
            await asyncio.wait([self._keeper], timeout=CANCEL_AGAIN_S)
        self._drop("closed")

    async def wait_up(self, deadline: float) -> bool:
        """Return whether the connection stands, waiting for it until `deadline` (the loop's time)."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._up.wait()
        except TimeoutError:
            return False
        return True

    async def _keep(self) -> None:
        pause_s = RECONNECT_FIRST_S
        while True:
            try:
                await self._connect()
            except Exception as error:  # whatever it is: without this task the store would stay down for good
                self.down_because = str(error) or type(error).__name__
                await asyncio.sleep(random.uniform(0.5, 1) * pause_s)
                pause_s = min(pause_s * 2, RECONNECT_MOST_S)
            else:
                pause_s = RECONNECT_FIRST_S
                await self._lost.wait()

    async def _connect(self) -> None:
        connection = self._open_connection()
        try:
            async with asyncio.timeout(self._stall_s):
                await connection.connect()  # type: ignore[no-untyped-call]
                await self._prepare(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._adopt(connection)

    def _adopt(self, connection: AbstractConnection) -> None:
        """Take the socket over. redis-py has no public way to hand it out, and would close it with its streams."""
        writer = cast(asyncio.StreamWriter, connection._writer)
        transport = cast(asyncio.Transport, writer.transport)
        self._streams, connection._reader, connection._writer = (connection._reader, writer), None, None
        self._lost = asyncio.Event()
        self._transport, self.up = transport, True
        self._reader = hiredis.Reader(replyError=ErrorReply)
        transport.set_protocol(self)
        host = getattr(connection, "host", None)
        self.at = (host, connection.port) if host else None  # type: ignore[attr-defined]
        self._up.set()

    def _drop(self, why: str) -> None:
        """Forget the connection; what was on it may or may not be executed."""
        if self._transport is None:
            return
        transport, self._transport, self.up = self._transport, None, False
        transport.abort()
        self.down_because = why
        self._up.clear()
        self._out.clear()
        waiting, self._waiting = self._waiting, deque()
        for future, *_ in waiting:
            _resolve(future, Unconfirmed(why))
        self._lost.set()

    def renew(self, why: str) -> None:
        """Leave this connection and make a new one."""
        self._drop(why)

    def give_up(self) -> None:
        """Wait for nothing any more: whatever was asked or will be asked is unconfirmed at once."""
        if self._keeper is not None:
            self._keeper.cancel()
        self._drop("given up")
        self._up.set()  # nobody waits for a connection, and without one nothing is sent

    # Commands ...

    def script(
        self, script: Script, key: bytes, args: bytes, count: int, deadline: float, whole: bool = False
    ) -> "asyncio.Future[Any]":
        """Issue a script with one key and `count` arguments in RESP: by its sha, or `whole` by its body.

        The future gives the reply without its tag, or Unconfirmed, or ErrorReply; it never raises.

        The command is written here because hiredis formats each word anew: 23k instructions for a claim, 4k so
        (measured).
        """
        self._tags = number = (self._tags + 1) % TAGS
        tag, tag_word = _TAGS[number]
        begin = script.by_body if whole else script.by_sha
        command = b"".join((begin[count], SIZE[len(key)], key, b"\r\n", tag_word, args))
        return self._issue(command, deadline, tag, script.verb)

    def script_asking(self, *call: Any) -> "asyncio.Future[Any]":
        """Issue a script on a server of a cluster that is only just taking the key over."""
        self.command("ASKING", deadline=call[4])
        return self.script(*call)

    def command(self, *words: bytes | str | int, deadline: float) -> "asyncio.Future[Any]":
        """Issue a plain command; its reply comes as it is."""
        return self._issue(_COUNT[len(words)] + resp(*words), deadline)

    def _issue(self, command: bytes, deadline: float, tag: bytes = b"", verb: str = "") -> "asyncio.Future[Any]":
        future, out = self._loop.create_future(), self._out
        if self._transport is None:
            future.set_result(Unconfirmed(self.down_because, maybe_executed=False))
            return future
        if not out:
            self._loop.call_soon(self._flush)
        out.append(command)
        if len(out) >= BATCH:
            self._flush()
        self._waiting.append((future, tag, verb, deadline, perf_counter()))
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return future

    def _flush(self) -> None:
        if self._transport is not None and self._out:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _sweep(self) -> None:
        """End the waits whose time is over, and the connection if nothing comes at all."""
        self._sweeper = None
        now = self._loop.time()
        for future, _, _, deadline, _ in self._waiting:
            if deadline <= now:
                _resolve(future, Unconfirmed("no reply in time"))
        if self._waiting and perf_counter() - self._waiting[0][-1] > self._stall_s:
            self._drop("the store does not answer")
        elif self._waiting:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    # What comes from the socket ...

    def data_received(self, data: bytes) -> None:
        reader, replies = self._reader, 0
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                if not self._give(reply):
                    self._drop("a reply that answers another command")
                    return
                replies += 1
        except hiredis.ProtocolError:
            self._drop("a reply that is no RESP")
        if replies > 1:  # what they wake writes
            self._write_batcher.hold()

    def _give(self, reply: Any) -> bool:
        """Give a reply to the oldest command; a script's reply must name the command it answers, in its first word.

        A reply given to another's question is how shared connections leak data between users.
        """
        if not self._waiting:
            return False
        future, tag, verb, _, issued = self._waiting.popleft()
        if tag and type(reply) is list:  # as nearly all are
            if not reply or reply.pop(0) != tag:
                return self._refuse(future)
        elif isinstance(reply, ErrorReply):
            if str(reply).startswith(DEMOTED):
                _resolve(future, reply)
                self._drop("the store's server is a replica")  # the address may lead to another one by now
                return True
        elif tag:
            return self._refuse(future)
        if verb:
            self._observe(verb, perf_counter() - issued)
        if not future.done():
            future.set_result(reply)
        return True

    @staticmethod
    def _refuse(future: "asyncio.Future[Any]") -> bool:
        _resolve(future, Unconfirmed("a reply that answers another command"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop(str(exc) if exc else "the store closed the connection")

    def eof_received(self) -> None:
        self._drop("the store closed the connection")
