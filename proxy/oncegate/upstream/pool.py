"""The upstream: a pool of connections to one origin. Nothing else opens connections to it."""

import asyncio
import random
import select
import socket
import ssl
from collections import deque
from typing import Any

from aiohappyeyeballs import start_connection

from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.write_batcher import write_batcher
from oncegate.messages.head_cache import RecentHeads
from oncegate.messages.response_head import ResponseHead
from oncegate.upstream.connection import Connection, NotSent, UpstreamLost

SWEEP_S = 0.05
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.05, 1.0
# Many servers (Node, uvicorn) close a connection after 5 s of idleness; a request must not meet that.
REUSE_IDLE_S = 4.0


class Pool:
    """The pool of connections to one origin."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        *,
        connect_timeout_s: float,
        connect_retries: int,
        max_connections: int,
        keep_idle_s: float = REUSE_IDLE_S,
        buffered: MemoryBudget,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.buffered, self.write_batcher = buffered, write_batcher(self.loop)
        self.known = RecentHeads[ResponseHead]()  # heads of answers
        self._host, self._port, self._tls = host, port, tls
        self._connect_timeout_s, self._connect_retries = connect_timeout_s, connect_retries
        self._max_connections, self._keep_idle_s = max_connections, keep_idle_s
        self._idle: list[Connection] = []  # the longest idle first
        self._readable = select.epoll()
        # What was found in this turn of the loop, and how many of the idle ones have been idle since before.
        self._touched, self._looked, self._looks_again = set[int](), 0, False
        self._open = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._active: set[Connection] = set()
        self._connecting: set[asyncio.Timeout] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._reaper: asyncio.TimerHandle | None = None
        self.shut = False  # nothing is sent any more

    async def acquire(self, reuse_idle_s: float) -> Connection:
        """Return a connection that nothing was sent on yet, reused only if idle for less than `reuse_idle_s`.

        Raises NotSent when none could be had within the connect timeout, waiting in the queue included.
        """
        if (ready := self.ready(reuse_idle_s)) is not None:
            return ready
        if self.shut:
            raise NotSent("the proxy was shut down")
        try:
            async with asyncio.timeout(self._connect_timeout_s) as limit:
                self._connecting.add(limit)
                return await self._reuse_or_connect(reuse_idle_s)
        except TimeoutError:
            raise NotSent("no connection to the upstream in time") from None
        finally:
            self._connecting.discard(limit)

    def ready(self, reuse_idle_s: float) -> Connection | None:
        """Return a connection that can be had at once, None where one has to be waited for."""
        return None if self._queue or self.shut else self._reuse(reuse_idle_s)

    def opened(self, descriptor: int) -> None:
        """Look at this socket, too, from now on. The kernel forgets it when it is closed."""
        self._readable.register(descriptor, select.EPOLLIN)

    def release(self, connection: Connection) -> None:
        """Take a connection back: kept for the next request if this one left it clean, else closed."""
        self._active.discard(connection)
        if connection.reusable:
            connection.rest()
            self._idle.append(connection)
            if self._reaper is None:
                self._reaper = self.loop.call_later(self._keep_idle_s, self._reap)
        else:
            connection.drop_body()
            self._discard(connection)
        if self._queue:
            self._next()

    def forget(self, connection: Connection) -> None:
        """Close an idle connection on which something happened; one in use is closed on its release."""
        if connection in self._idle:
            self._idle.remove(connection)
            self._looked = 0
            self._discard(connection)
            self._next()

    def cut(self, detail: str) -> int:
        """Fail every connection that is under way or still being made, and return how many there were; give no more."""
        self.shut = True
        active, connecting = list(self._active), list(self._connecting)
        for connection in active:
            connection.fail(UpstreamLost(detail))
        for limit in connecting:
            if not limit.expired():
                limit.reschedule(self.loop.time())
        return len(active) + len(connecting)

    def close(self) -> None:
        for connection in [*self._idle, *self._active]:
            connection.close()
        self._idle.clear()
        for timer in (self._sweeper, self._reaper):
            if timer is not None:
                timer.cancel()

    def _reap(self) -> None:
        """Close what has been idle for too long to be used again."""
        now = self.loop.time()
        self._looked = 0
        while self._idle and now - self._idle[0].idle_since >= self._keep_idle_s:
            self._discard(self._idle.pop(0))
        self._reaper = self.loop.call_later(self._keep_idle_s / 4, self._reap) if self._idle else None

    def _use(self, connection: Connection) -> None:
        """Hold a connection to its deadline from now on: one sweep for all, no timer for each."""
        self._active.add(connection)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in [one for one in self._active if one.deadline <= now]:
            connection.fail(UpstreamLost("the upstream was silent for too long", timeout=True))
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep) if self._active else None

    def _reuse(self, reuse_idle_s: float) -> Connection | None:
        idle, now = self._idle, self.loop.time()
        while idle:
            if not self._looked:
                self._look()
            connection = idle[self._looked - 1]
            if now - connection.idle_since >= reuse_idle_s:
                if self._looked == len(idle):
                    return None
                self._looked = 0  # there are younger ones
                continue
            self._looked -= 1
            del idle[self._looked]
            if connection.alive and connection.descriptor not in self._touched:
                self._use(connection)
                return connection
            self._discard(connection)
        return None

    def _look(self) -> None:
        """See on which connections something came: one call for all requests of a turn, as it holds no longer.

        A call for each took 5 % of an execution (measured). Those that become idle meanwhile have their turn once all
        the others are taken, with another look.
        """
        self._looked = len(self._idle)
        self._touched = {descriptor for descriptor, _ in self._readable.poll(0, self._max_connections)}
        if not self._looks_again:
            self._looks_again = True
            self.loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        self._looked, self._looks_again = 0, False

    def _discard(self, connection: Connection) -> None:
        connection.discard()
        self._open -= 1

    @property
    def _has_room(self) -> bool:
        return self._open < self._max_connections or bool(self._idle)

    async def _reuse_or_connect(self, reuse_idle_s: float) -> Connection:
        if self._queue or not self._has_room:
            await self._turn()
        if (connection := self._reuse(reuse_idle_s)) is not None:
            self._next()
            return connection
        if self._open >= self._max_connections:
            self._looked = 0
            self._discard(self._idle.pop(0))
        self._open += 1
        self._next()
        try:
            connection = await self._connect()
        except BaseException:
            self._open -= 1
            self._next()
            raise
        self._use(connection)
        return connection

    async def _turn(self) -> None:
        """Wait for room, first come first served. Who has its turn stays in the queue until it runs."""
        turn = self.loop.create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            self._queue.remove(turn)
            self._next()
            raise
        self._queue.remove(turn)

    def _next(self) -> None:
        if self._queue and self._has_room and not self._queue[0].done():
            self._queue[0].set_result(None)

    async def _connect(self) -> Connection:
        """Connect, again after a failure: nothing was sent, so that is safe. Full jitter between tries."""
        for attempt in range(self._connect_retries + 1):
            try:
                return await self._connect_once()
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError) as error:
                if attempt == self._connect_retries:
                    raise NotSent(f"the upstream cannot be reached: {type(error).__name__}") from error
                most_s = min(BACKOFF_FIRST_S * 2**attempt, BACKOFF_MOST_S)
                await asyncio.sleep(random.uniform(0, most_s))
        raise AssertionError("unreachable")

    async def _connect_once(self) -> Connection:
        """Resolve and connect as RFC 8305 says, then TLS; uvloop alone tries the addresses one by one."""
        addresses = await self.loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        host, port, *more = addresses[0][4]
        if len(addresses) == 1 and not any(more):  # of an IPv6 address with a scope `host` is not all
            return await self._open_connection(host=host, port=port)
        sock = await start_connection(addresses, happy_eyeballs_delay=0.25, loop=self.loop)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return await self._open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _open_connection(self, **where: Any) -> Connection:
        """Connect; uvloop does it by itself where it gets an address, and with a thread's help where a socket."""
        name = self._host if self._tls else None
        _, connection = await self.loop.create_connection(
            lambda: Connection(self), ssl=self._tls, server_hostname=name, **where
        )
        return connection


def client_tls(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Return the TLS side towards the upstream: verified, and a close without close_notify is an error."""
    context = ssl.create_default_context(cafile=ca_file)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context
