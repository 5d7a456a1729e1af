"""The idle connections of a pool: how long they rest, and which of them a request may use."""

import asyncio
import select
from bisect import insort
from collections import deque
from operator import attrgetter

from oncegate.upstream.connection import Connection
from oncegate.upstream.pool_entry import NEVER

# A connection rests for as long as its longest exchange took, but not for longer than this.
MAX_REST_S = 0.5


class IdleConnections:
    """Clean connections between two requests. Times in seconds; `max_connections` bounds those of the pool.

    A connection rests before it is used again: for `rest_s`, or longer after long exchanges; 0: not at all. If the
    upstream answers a request twice, its second answer comes within the rest, and nobody gets it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, rest_s: float, max_connections: int) -> None:
        self._loop, self._rest_s, self._max_connections = loop, rest_s, max_connections
        # By the end of their rest: the longest rested first.
        self.by_rest: deque[Connection] = deque()
        self._epoll = select.epoll()
        # The sockets with something to read, as epoll reported them at its last check, the number of checks, and
        # whether the last one was made in this turn of the loop.
        self._readable, self._checks, self._is_checked = set[int](), 0, False

    def __len__(self) -> int:
        return len(self.by_rest)

    def add(self, connection: Connection) -> None:
        """Let a clean connection rest."""
        by_rest, now, rest_s = self.by_rest, self._loop.time(), self._rest_s
        connection.become_idle(now)
        connection.is_idle = True
        if rest_s and connection.longest_s > rest_s:
            # What answers twice may take as long for it as for the first answer.
            rest_s = max(rest_s, min(connection.longest_s, MAX_REST_S))
        connection.rested_at, connection.checks_before = now + rest_s, self._checks
        if by_rest and by_rest[-1].rested_at > connection.rested_at:
            insort(by_rest, connection, key=_rested_at)
        else:
            by_rest.append(connection)

    def take(self, reuse_idle_s: float) -> Connection | None:
        """Return the connection that has rested longest, if it is clean and idle for less than `reuse_idle_s`.

        It closes those that are not. A request must not be sent on a connection that the upstream has closed: nobody
        could know whether it arrived.
        """
        by_rest, now = self.by_rest, self._loop.time()
        while reuse_idle_s and by_rest and by_rest[0].rested_at <= now:
            connection = by_rest.popleft()
            connection.is_idle = False
            if now - connection.idle_since < reuse_idle_s and self._is_untouched(connection):
                connection.is_reused, connection.taken_at, connection.makes_room_at = True, now, NEVER
                return connection
            connection.discard()
        return None

    def make_room(self) -> None:
        """Close the connection that would rest longest from now on. Its port is free at once (`end_with_reset`)."""
        self._discard(self.by_rest.pop())

    def close(self) -> None:
        """Close all connections."""
        while self.by_rest:
            self._discard(self.by_rest.pop())

    def close_those_idle_for(self, seconds: float) -> None:
        """Close connections that have been idle for so long."""
        now = self._loop.time()
        while self.by_rest and now - self.by_rest[0].idle_since >= seconds:
            self._discard(self.by_rest.popleft())

    def close_those_elsewhere(self, hosts: frozenset[str]) -> None:
        """Close the connections to any other address than these."""
        elsewhere = [one for one in self.by_rest if one.address not in hosts]
        for connection in elsewhere:
            self.remove(connection)

    def remove(self, connection: Connection) -> None:
        """Close an idle connection, such as one on which something came."""
        self.by_rest.remove(connection)
        self._discard(connection)

    @staticmethod
    def _discard(connection: Connection) -> None:
        connection.is_idle = False
        connection.discard()

    def _is_untouched(self, connection: Connection) -> bool:
        """Return whether an idle connection is open and nothing has come on it, by the kernel's word."""
        transport = connection.transport
        if transport is None or transport.is_closing() or connection.response.has_surplus:
            return False
        is_new = connection.descriptor < 0
        if is_new:
            # Not earlier: many connections are never used again. The kernel forgets it when it is closed.
            connection.descriptor = transport.get_extra_info("socket").fileno()
            self._epoll.register(connection.descriptor, select.EPOLLIN)
        if is_new or not self._is_checked or connection.checks_before == self._checks:
            self._check()
        return connection.descriptor not in self._readable

    def _check(self) -> None:
        """Ask the kernel on which sockets something came, once for all requests of a turn of the loop.

        One call for each request takes 5 % of an execution (measured). The answer holds for one turn, as the loop reads
        nothing before, and for connections that were idle already.
        """
        if not self._is_checked:
            self._loop.call_soon(self._expire_check)
        self._checks, self._is_checked = self._checks + 1, True
        self._readable = {descriptor for descriptor, _ in self._epoll.poll(0, self._max_connections)}

    def _expire_check(self) -> None:
        self._is_checked = False


_rested_at = attrgetter("rested_at")
