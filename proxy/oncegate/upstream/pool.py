"""The pool of connections to one origin of an upstream. Nothing else opens connections to it."""

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
from oncegate.known_heads.recent import RecentHeads
from oncegate.messages.response_head import ResponseHead
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.tls import connect_tls

# How often deadlines are checked.
SWEEP_S = 0.05
# The upper bound of the random pause before an attempt to connect: it doubles from the first to the second of these.
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
# How long the next address of a name waits for the one before (RFC 8305, section 8).
HAPPY_EYEBALLS_DELAY_S = 0.25
# Many servers (Node, uvicorn) close a connection after 5 s of idleness; a request must not meet that.
REUSE_IDLE_S = 4.0


class Pool:
    """The pool of connections to one origin. Times in seconds.

    `max_connections` bounds open connections, idle ones included. An idle connection is closed after `keep_idle_s`.
    `buffered` is the memory budget that the bodies of responses count in.
    """

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
        head_cache: bool = True,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.buffered, self.write_batcher = buffered, write_batcher(self.loop)
        # Heads of responses that came before.
        self.recent_heads = RecentHeads[ResponseHead](enabled=head_cache)
        self._host, self._port, self._tls = host, port, tls
        self._connect_timeout_s, self._connect_retries = connect_timeout_s, connect_retries
        self._max_connections, self._keep_idle_s = max_connections, keep_idle_s
        # The longest idle first.
        self._idle: list[Connection] = []
        self._epoll = select.epoll()
        # The sockets with something to read, as epoll reported them in this turn of the loop, and how many connections
        # at the beginning of `_idle` that report covers. 0: epoll has to report first.
        self._readable, self._checked = set[int](), 0
        self._is_recheck_due = False
        self._open_count = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._active: set[Connection] = set()
        self._connecting: set[asyncio.Timeout] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._reaper: asyncio.TimerHandle | None = None
        # After `cut`: nothing is sent any more.
        self.shut = False

    async def acquire(self, reuse_idle_s: float) -> Connection:
        """Return a connection that no byte of a request is on, reused only if idle for less than `reuse_idle_s`.

        Raises NotSent when there is none within the connect timeout, the wait in the queue included.
        """
        if (connection := self.ready(reuse_idle_s)) is not None:
            return connection
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
        """Return an idle connection at once, None where `acquire` has to wait for one."""
        return None if self._queue or self.shut else self._reuse(reuse_idle_s)

    def release(self, connection: Connection) -> None:
        """Take a connection back. It stays open for the next request if this one left it clean."""
        self._active.discard(connection)
        if connection.is_reusable:
            connection.become_idle()
            self._idle.append(connection)
            if self._reaper is None:
                self._reaper = self.loop.call_later(self._keep_idle_s, self._reap)
        else:
            connection.discard_body()
            self._discard(connection)
        if self._queue:
            self._wake_first()

    def cut(self, detail: str) -> int:
        """Fail every exchange and every attempt to connect, and return their number. No connection is given after."""
        self.shut = True
        active, connecting = list(self._active), list(self._connecting)
        for connection in active:
            connection.fail(UpstreamLost(detail))
        for limit in connecting:
            if not limit.expired():
                limit.reschedule(self.loop.time())
        return len(active) + len(connecting)

    def close(self) -> None:
        """Close all connections."""
        for connection in [*self._idle, *self._active]:
            connection.close()
        self._idle.clear()
        for timer in (self._sweeper, self._reaper):
            if timer is not None:
                timer.cancel()

    # What connections report ...

    def opened(self, descriptor: int) -> None:
        """Watch this socket as well. The kernel forgets it when it is closed."""
        self._epoll.register(descriptor, select.EPOLLIN)

    def forget(self, connection: Connection) -> None:
        """Close an idle connection on which something came; one in use is closed on its release."""
        if connection in self._idle:
            self._idle.remove(connection)
            self._checked = 0
            self._discard(connection)
            self._wake_first()

    # Deadlines and idleness ...

    def _reap(self) -> None:
        """Close connections that have been idle for too long to be used again."""
        now = self.loop.time()
        self._checked = 0
        while self._idle and now - self._idle[0].idle_since >= self._keep_idle_s:
            self._discard(self._idle.pop(0))
        self._reaper = self.loop.call_later(self._keep_idle_s / 4, self._reap) if self._idle else None

    def _activate(self, connection: Connection) -> None:
        """Hold a connection to its deadline from now on: one sweep for all costs less than a timer for each."""
        self._active.add(connection)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in [one for one in self._active if one.deadline <= now]:
            connection.fail(UpstreamLost("the upstream was silent for too long", timeout=True))
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep) if self._active else None

    # Reuse ...

    def _reuse(self, reuse_idle_s: float) -> Connection | None:
        """Return the connection that became idle last, if it is clean and young enough; close those that are not clean.

        A request must not be sent on a connection that the upstream has closed: nobody could know whether it arrived.
        """
        idle, now = self._idle, self.loop.time()
        while idle:
            if not self._checked:
                self._check_idle()
            connection = idle[self._checked - 1]
            if now - connection.idle_since >= reuse_idle_s:
                if self._checked == len(idle):
                    return None
                # Younger ones became idle since the check.
                self._checked = 0
                continue
            self._checked -= 1
            del idle[self._checked]
            if connection.is_alive and connection.descriptor not in self._readable:
                self._activate(connection)
                return connection
            self._discard(connection)
        return None

    def _check_idle(self) -> None:
        """Ask the kernel on which sockets something came, once for all requests of a turn of the loop.

        One call for each request takes 5 % of an execution (measured). The answer holds for one turn, as the loop reads
        nothing before. Connections that become idle meanwhile get a check of their own, once the others are taken.
        """
        self._checked = len(self._idle)
        self._readable = {descriptor for descriptor, _ in self._epoll.poll(0, self._max_connections)}
        if not self._is_recheck_due:
            self._is_recheck_due = True
            self.loop.call_soon(self._expire_check)

    def _expire_check(self) -> None:
        self._checked, self._is_recheck_due = 0, False

    def _discard(self, connection: Connection) -> None:
        connection.discard()
        self._open_count -= 1

    # Connecting ...

    @property
    def _has_room(self) -> bool:
        return self._open_count < self._max_connections or bool(self._idle)

    async def _reuse_or_connect(self, reuse_idle_s: float) -> Connection:
        if self._queue or not self._has_room:
            await self._queue_up()
        if (connection := self._reuse(reuse_idle_s)) is not None:
            self._wake_first()
            return connection
        if self._open_count >= self._max_connections:
            # None of the idle ones may be reused, but the longest idle makes room.
            self._checked = 0
            self._discard(self._idle.pop(0))
        self._open_count += 1
        self._wake_first()
        try:
            connection = await self._connect()
        except BaseException:
            self._open_count -= 1
            self._wake_first()
            raise
        self._activate(connection)
        return connection

    async def _queue_up(self) -> None:
        """Wait for room, first come first served. A waiter that was woken stays in the queue until it runs."""
        turn = self.loop.create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            self._queue.remove(turn)
            self._wake_first()
            raise
        self._queue.remove(turn)

    def _wake_first(self) -> None:
        if self._queue and self._has_room and not self._queue[0].done():
            self._queue[0].set_result(None)

    async def _connect(self) -> Connection:
        """Connect, and repeat that after a failure: nothing was sent, so that is safe. Pauses have full jitter."""
        for attempt in range(self._connect_retries + 1):
            try:
                return await self._connect_once()
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError) as error:
                if attempt == self._connect_retries:
                    raise NotSent(f"the upstream cannot be reached: {type(error).__name__}") from error
                longest_s = min(MIN_BACKOFF_S * 2**attempt, MAX_BACKOFF_S)
                await asyncio.sleep(random.uniform(0, longest_s))
        raise AssertionError("unreachable")

    async def _connect_once(self) -> Connection:
        """Resolve and connect by RFC 8305 (happy eyeballs), then TLS; uvloop alone tries the addresses one by one."""
        addresses = await self.loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        host, port, *more = addresses[0][4]
        # Of an IPv6 address with a scope, `host` is not all.
        if len(addresses) == 1 and not any(more):
            return await self._open_connection(host=host, port=port)
        sock = await start_connection(addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S, loop=self.loop)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return await self._open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _open_connection(self, **where: Any) -> Connection:
        """Connect to an address, or over a connected socket, for which uvloop needs the help of a thread."""
        connection = Connection(self)
        if self._tls is None:
            await self.loop.create_connection(lambda: connection, **where)
        else:
            await connect_tls(self.loop, connection, self._tls, self._host, **where)
        return connection


def client_tls(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Return the TLS side towards the upstream: verified, and a close without close_notify is an error."""
    context = ssl.create_default_context(cafile=ca_file)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context
