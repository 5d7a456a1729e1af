"""The pool of connections to one origin of an upstream. Nothing else opens connections to it."""

import asyncio
import ssl
from collections import defaultdict, deque

from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.write_batcher import write_batcher
from oncegate.hostnames.resolver import Resolver
from oncegate.known_heads.answers import KnownAnswers
from oncegate.observe.labels import UPSTREAM_STATES
from oncegate.upstream.connection import Connection
from oncegate.upstream.connector import Connector
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.idle import IdleConnections
from oncegate.upstream.name_watch import NameWatch

# How often deadlines are checked.
SWEEP_S = 0.05
# Many servers (Node, uvicorn) close a connection after 5 s of idleness; a request must not meet that.
REUSE_IDLE_S = 4.0
# A new connection that waits for its first response for so long, or twice as long as exchanges took lately, has an idle
# one closed for it.
MAKE_ROOM_S = 0.1
# By how much each exchange makes those before it count less.
FADING = 0.98


class Pool:
    """The pool of connections to one origin. Times in seconds.

    `max_connections` bounds open connections, idle ones included. An idle connection is closed after `keep_idle_s`;
    0: none is kept. `buffered` is the memory budget that the bodies of responses count in. `counts`: of connections by
    event, to be added to; the events are `labels.UPSTREAM_CONNECTIONS`.

    A request that finds no idle connection that has rested for `rest_s` closes a resting one and connects, so that no
    more are open than requests ran at once. An upstream may serve each with a process of its own, and the new one needs
    one. Up to `spare_connections` are left open; if the new connection has no response after a while, one is closed.
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
        rest_s: float = 0.0,
        spare_connections: int = 0,
        buffered: MemoryBudget,
        resolver: Resolver,
        counts: dict[str, float] | None = None,
        head_cache: bool = True,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.buffered, self.write_batcher = buffered, write_batcher(self.loop)
        # Heads of responses that came before.
        self.known_answers = KnownAnswers(enabled=head_cache)
        self._connector = Connector(host, port, tls, connect_retries, resolver)
        name = self._connector.name
        self._name_watch = None if name is None else NameWatch(name, lambda: self._open_count > 0, self._follow)
        self._connect_timeout_s = connect_timeout_s
        self._max_connections, self._keep_idle_s = max_connections, keep_idle_s
        self._spare_connections = spare_connections
        self._idle = IdleConnections(self.loop, rest_s, max_connections)
        self._connecting_count = 0
        self._counts = defaultdict[str, float](float) if counts is None else counts
        # The longest exchange on a connection that was used before, fading.
        self._usual_s = 0.0
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
        queues = False
        try:
            async with asyncio.timeout(self._connect_timeout_s) as limit:
                self._connecting.add(limit)
                if self._queue or not self._has_room:
                    queues = True
                    await self._queue_up()
                    queues = False
                    if (connection := self._reuse(reuse_idle_s)) is not None:
                        self._wake_first()
                        return connection
                return await self._connect()
        except NotSent:
            self._counts["failed"] += 1
            raise
        except TimeoutError:
            self._counts["no_room" if queues else "failed"] += 1
            name = self._connector.name
            is_silent = name is not None and name.is_waited_for
            detail = "no name server answered" if is_silent else "no connection to the upstream"
            raise NotSent(f"{detail} in time") from None
        finally:
            self._connecting.discard(limit)

    def ready(self, reuse_idle_s: float) -> Connection | None:
        """Return an idle connection at once, None where `acquire` has to wait for one."""
        return None if self._queue or self.shut else self._reuse(reuse_idle_s)

    def release(self, connection: Connection) -> None:
        """Take a connection back. It stays open for the next request if this one left it clean."""
        self._active.discard(connection)
        if self._keep_idle_s and connection.is_reusable() and not connection.is_retired:
            self._idle.add(connection)
            if connection.is_reused:
                # On a new one the request may have waited for a process.
                took_s, faded_s = connection.idle_since - connection.taken_at, self._usual_s * FADING
                self._usual_s = took_s if took_s > faded_s else faded_s
            if self._reaper is None:
                self._reaper = self.loop.call_later(self._keep_idle_s, self._reap)
        else:
            connection.discard_body()
            connection.discard()
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
        self._idle.close()
        for connection in self._active:
            connection.close()
        if self._name_watch is not None:
            self._name_watch.stop()
        for timer in (self._sweeper, self._reaper):
            if timer is not None:
                timer.cancel()

    # A name that moves ...

    def _follow(self, hosts: frozenset[str]) -> None:
        """Send nothing more to addresses that the origin's name has no more. Requests under way are left alone."""
        self._idle.close_those_elsewhere(hosts)
        for connection in self._active:
            connection.is_retired = connection.address not in hosts
        self._wake_first()

    # What connections report ...

    def forget(self, connection: Connection) -> None:
        """Close an idle connection on which something came; one in use is closed on its release."""
        if connection.is_idle:
            self._idle.remove(connection)
            self._wake_first()

    # Deadlines and idleness ...

    def _reap(self) -> None:
        """Close connections that have been idle for too long to be used again."""
        self._idle.close_those_idle_for(self._keep_idle_s)
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
        for connection in [one for one in self._active if one.makes_room_at <= now]:
            if self._idle and connection.response.head is None:
                # The process that is free then may go to another that waits: once more, after three times the time.
                connection.makes_room_at = now + 2 * (now - connection.taken_at)
                self._idle.make_room()
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep) if self._active else None

    # Reuse ...

    def _reuse(self, reuse_idle_s: float) -> Connection | None:
        connection = self._idle.take(reuse_idle_s)
        if connection is not None:
            self._counts["reused"] += 1
            self._activate(connection)
        return connection

    # Connecting ...

    @property
    def states(self) -> dict[str, int]:
        """How many connections are in each state, and how many requests wait for one."""
        counts = len(self._active), len(self._idle), self._connecting_count, len(self._queue)
        return dict(zip(UPSTREAM_STATES, counts, strict=True))

    @property
    def _open_count(self) -> int:
        return len(self._active) + len(self._idle) + self._connecting_count

    @property
    def _has_room(self) -> bool:
        return bool(self._idle) or self._open_count < self._max_connections

    async def _connect(self) -> Connection:
        """Return a new connection. None of the idle ones may be used, and there is room for one more."""
        if len(self._idle) > self._spare_connections or self._open_count >= self._max_connections:
            self._idle.make_room()
        self._connecting_count += 1
        self._wake_first()
        try:
            connection = await self._connector.connect(lambda: Connection(self))
        except BaseException:
            self._connecting_count -= 1
            self._wake_first()
            raise
        self._counts["opened"] += 1
        self._connecting_count -= 1
        if self._name_watch is not None:
            self._name_watch.start()
            # The name may have moved meanwhile.
            connection.is_retired = connection.address not in self._name_watch.hosts
        connection.taken_at = self.loop.time()
        connection.makes_room_at = connection.taken_at + max(MAKE_ROOM_S, 2 * self._usual_s)
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
