"""One connection to a Redis server, shared by all concurrent requests.

redis-py opens the connection (it knows addresses and TLS), and `Link` takes its socket over before the first command.
Commands that are issued in one turn of the event loop leave together, and one reader resolves the replies in order. A
call costs a third of a call through redis-py (measured).

No command is cancelled half-way. A caller that stops waiting leaves its place in the queue, so the next reply still
goes to the right caller.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from time import perf_counter
from types import MappingProxyType
from typing import Any, cast

import hiredis
from redis.asyncio.connection import AbstractConnection

from oncegate.buffers.write_batcher import write_batcher
from oncegate.hostnames.failures import failure_words
from oncegate.store.redis.wire import SIZE, TAG_COUNT, TAGS, ErrorReply, ScriptCall, resp
from oncegate.store.results import Unconfirmed
from oncegate.store.store import Observers

# Commands that leave at once, so that the server works on them while the loop's turn issues more.
BATCH = 8
SWEEP_S = 0.05  # how late a deadline may be noticed
MIN_RECONNECT_PAUSE_S, MAX_RECONNECT_PAUSE_S = 0.02, 1.0
CANCEL_RETRY_S = 0.1
# How long connecting may take, TLS included: three round trips to a server that is far away, and a lost packet.
CONNECT_S = 2.0
# How many replies one after the other a new connection may wait for until it is used.
PREPARE_STEPS = 4
# The share of `stall_s` for which a server may owe a reply and still count as one that answers.
RESPONSIVE_SHARE = 0.25
DEMOTED = ("READONLY", "MASTERDOWN")  # what a replica returns for writes

# A command that waits for its reply: its future, the tag that a script returns in its reply, the verb, the deadline
# (the loop's time) and when it was issued (perf_counter's). A plain tuple, as every execution makes two of them.
_Waiting = tuple["asyncio.Future[Any]", bytes, str, float, float]


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)


class Link(asyncio.Protocol):
    """The shared connection.

    `open_connection` makes a fresh, unconnected redis-py connection. `prepare(link, connection)` talks over the link
    once it is connected, and raises if the server cannot be used. `observers`, by a script's verb, are called with the
    seconds of each call.

    If the oldest command gets no reply for `stall_s` seconds, the connection is closed, every command on it becomes
    unconfirmed, and a new connection is made.
    """

    def __init__(
        self,
        open_connection: Callable[..., AbstractConnection],
        prepare: "Callable[[Link, AbstractConnection], Awaitable[None]]",
        stall_s: float,
        observers: Observers = MappingProxyType({}),
    ) -> None:
        self._open_connection, self._prepare = open_connection, prepare
        self.stall_s, self._observers = stall_s, observers
        self._loop = asyncio.get_running_loop()
        self._write_batcher = write_batcher(self._loop)
        self._transport: asyncio.Transport | None = None
        # Whether the connection is prepared, so that it carries requests.
        self.up = False
        # redis-py's streams over the same transport. They are referenced so that they do not close it.
        self._streams: object = None
        self._reader = hiredis.Reader(replyError=ErrorReply)
        self._out: list[bytes] = []
        self._waiting: deque[_Waiting] = deque()
        self._tag_number = 0
        self._up, self._lost = asyncio.Event(), asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._reconnect_task: asyncio.Task[None] | None = None
        self.down_reason = "not connected yet"
        # Host and port of the last connection, as the URL or the sentinels named them.
        self.at: tuple[str, int] | None = None

    async def login_refusal(self, logins: object) -> str:
        """Return why another connection with these logins fails; empty if it does not."""
        trial = Link(lambda: self._open_connection(logins), self._prepare, self.stall_s)
        try:
            await trial._connect()
        except Exception as error:
            return str(error) or type(error).__name__
        trial._drop("it was a trial")
        return ""

    # Its life ...

    def start(self) -> None:
        """Connect, and reconnect whenever the connection is lost, until `close`."""
        self._reconnect_task = self._loop.create_task(self._reconnect_loop())

    async def close(self) -> None:
        while self._reconnect_task and not self._reconnect_task.done():
            # Repeated, because redis-py may take a cancellation during a connect for a connection error.
            self._reconnect_task.cancel()
            await asyncio.wait([self._reconnect_task], timeout=CANCEL_RETRY_S)
        self._drop("closed")

    async def wait_up(self, deadline: float) -> bool:
        """Wait for the connection until `deadline` (the loop's time), and return whether it is up."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._up.wait()
        except TimeoutError:
            return False
        return True

    async def _reconnect_loop(self) -> None:
        pause_s = MIN_RECONNECT_PAUSE_S
        while True:
            try:
                await self._connect()
            except Exception as error:
                # Any error: if this task ended, the store would stay down for good.
                self.down_reason = str(error) or failure_words(error)
                # With jitter, so that all proxies do not come at once when the server is back.
                await asyncio.sleep(random.uniform(0.5, 1) * pause_s)
                pause_s = min(pause_s * 2, MAX_RECONNECT_PAUSE_S)
            else:
                pause_s = MIN_RECONNECT_PAUSE_S
                await self._lost.wait()

    async def _connect(self) -> None:
        connection, began_s = self._open_connection(), perf_counter()
        try:
            # A server that does not answer is noticed after `stall_s`, whatever it was asked.
            async with asyncio.timeout(max(CONNECT_S, self.stall_s) + PREPARE_STEPS * self.stall_s):
                await connection.connect()  # type: ignore[no-untyped-call]
                self._adopt(connection)
                await self._prepare(self, connection)
        except BaseException as error:
            await connection.disconnect(nowait=True)
            self._drop(str(error) or failure_words(error))
            raise
        if self._transport is None:
            raise ConnectionError(self.down_reason)
        if (observe_s := self._observers.get("connect")) is not None:
            observe_s(perf_counter() - began_s)
        self.up = True
        self._up.set()

    def _adopt(self, connection: AbstractConnection) -> None:
        """Take the socket over from redis-py.

        redis-py has no public way to hand a socket out, and would close it together with its streams.
        """
        writer = cast(asyncio.StreamWriter, connection._writer)
        transport = cast(asyncio.Transport, writer.transport)
        self._streams, connection._reader, connection._writer = (connection._reader, writer), None, None
        self._lost = asyncio.Event()
        self._transport = transport
        self._reader = hiredis.Reader(replyError=ErrorReply)
        transport.set_protocol(self)
        host = getattr(connection, "host", None)
        self.at = (host, connection.port) if host else None  # type: ignore[attr-defined]

    def _drop(self, reason: str) -> None:
        """Close the connection. Commands that wait on it become unconfirmed: the server may execute them or not."""
        if self._transport is None:
            return
        # Commands that are issued from here on, also by the callers woken below, are not sent.
        transport, self._transport, self.up = self._transport, None, False
        transport.abort()
        self.down_reason = reason
        self._up.clear()
        self._out.clear()
        waiting, self._waiting = self._waiting, deque()
        for future, *_ in waiting:
            _resolve(future, Unconfirmed(reason))
        self._lost.set()

    @property
    def connected(self) -> bool:
        """Whether there is a connection, be it one that is still being prepared."""
        return self._transport is not None

    @property
    def responsive(self) -> bool:
        """Whether the connection is up and the server owes no reply for long."""
        owes_for_s = perf_counter() - self._waiting[0][4] if self._waiting else 0.0
        return self.up and owes_for_s < RESPONSIVE_SHARE * self.stall_s

    def renew(self, reason: str) -> None:
        """Close this connection and make a new one. `reason` is what the commands on it report."""
        self._drop(reason)

    def end_calls(self) -> None:
        """Stop waiting. Commands that wait, and commands still to come, are unconfirmed at once."""
        if self._reconnect_task is not None:
            self._reconnect_task.cancel()
        self._drop("calls were ended")
        # Callers must not wait for a connection. Without one nothing is sent, so they get Unconfirmed.
        self._up.set()

    # Commands ...

    def script(self, call: ScriptCall, args: bytes) -> "asyncio.Future[Any]":
        """Issue a call of a script. `args`: the arguments after the tag, as RESP bulk strings.

        The future gives the reply without its tag, an ErrorReply or an Unconfirmed. It never raises.
        """
        script, key = call.script, call.key
        if call.asking:
            self.command("ASKING", deadline=call.deadline)
        self._tag_number = number = (self._tag_number + 1) % TAG_COUNT
        tag, tag_word = TAGS[number]
        begin = script.by_body if call.by_body else script.by_sha
        command = b"".join((begin[call.arg_count], SIZE[len(key)], key, b"\r\n", tag_word, args))
        return self._issue(command, call.deadline, tag, script.verb)

    def command(self, *words: bytes | str | int, deadline: float) -> "asyncio.Future[Any]":
        """Issue a plain command. The future gives the reply, an ErrorReply or an Unconfirmed; it never raises."""
        return self._issue(b"*%d\r\n" % len(words) + resp(*words), deadline)

    def _issue(self, command: bytes, deadline: float, tag: bytes = b"", verb: str = "") -> "asyncio.Future[Any]":
        future, out = self._loop.create_future(), self._out
        if self._transport is None:
            future.set_result(Unconfirmed(self.down_reason, maybe_executed=False))
            return future
        # The first command of a turn schedules the write; the others of the turn join it.
        if not out:
            self._loop.call_soon(self._flush)
        out.append(command)
        if len(out) >= BATCH:
            self._flush()
        self._waiting.append((future, tag, verb, deadline, perf_counter()))
        # One timer for all commands: a timer for each would cost every request.
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return future

    def _flush(self) -> None:
        if self._transport is not None and self._out:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _sweep(self) -> None:
        """Resolve commands past their deadline, and close the connection if the server has stalled."""
        self._sweeper = None
        now = self._loop.time()
        for future, _, _, deadline, _ in self._waiting:
            if deadline <= now:
                _resolve(future, Unconfirmed("no reply in time"))
        if self._waiting and perf_counter() - self._waiting[0][4] > self.stall_s:
            self._drop("the store does not answer")
        elif self._waiting:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    # What comes from the socket ...

    def data_received(self, data: bytes) -> None:
        reader, replies = self._reader, 0
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                if not self._resolve_oldest(reply):
                    self._drop("a reply that answers another command")
                    return
                replies += 1
        except hiredis.ProtocolError:
            self._drop("a reply that is no RESP")
        if replies > 1:
            # The callers that these replies wake will write in this turn, so their writes are sent together.
            self._write_batcher.hold()

    def _resolve_oldest(self, reply: Any) -> bool:
        """Resolve the oldest command with a reply. False: the reply belongs to another command.

        A script's reply must begin with the tag of its call. Shared connections that give a reply to the wrong caller
        leak data between users.
        """
        if not self._waiting:
            return False
        future, tag, verb, _, issued = self._waiting.popleft()
        # The usual reply comes first. As `listed`, without its frame.
        if tag and type(reply) is bytes:
            reply = reply.split(b" ")
        if tag and type(reply) is list:
            if not reply or reply.pop(0) != tag:
                return self._reject(future)
        elif isinstance(reply, ErrorReply):
            # A connection that is being prepared is judged by who prepares it.
            if self.up and str(reply).startswith(DEMOTED):
                _resolve(future, reply)
                # The address may lead to another server by now.
                self._drop("the store's server is a replica")
                return True
        elif tag:
            return self._reject(future)
        # Plain commands and the health checks have no verb, and are not measured.
        if (observe_s := self._observers.get(verb)) is not None:
            observe_s(perf_counter() - issued)
        # The caller may have stopped waiting, or the deadline may have passed.
        if not future.done():
            future.set_result(reply)
        return True

    @staticmethod
    def _reject(future: "asyncio.Future[Any]") -> bool:
        _resolve(future, Unconfirmed("a reply that answers another command"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop(str(exc) if exc else "the store closed the connection")

    def eof_received(self) -> None:
        self._drop("the store closed the connection")
