"""The sessions at one level: who has one, and who waits for one."""

import asyncio
from collections import deque

from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.connections.session import Session


class Pool:
    """Up to `size` sessions at a level. Those that are idle go to callers in the order in which they asked."""

    def __init__(self, level: Level, size: int) -> None:
        self.level, self.size = level, size
        # How many may be busy at once.
        self.limit = size
        self.sessions: list[Session] = []
        self._waiting: deque[asyncio.Future[Session | None]] = deque()
        # Whether nobody gets a session any more.
        self.has_ended = False
        # Why the last connect failed; empty after one that did not.
        self.down_reason = "not connected yet"

    @property
    def is_up(self) -> bool:
        """Whether there is a session, be it a busy one."""
        return bool(self.sessions) or not self.size

    def busy(self) -> list[Session]:
        return [session for session in self.sessions if session.busy_since is not None]

    def take(self) -> Session | None:
        """Return an idle session, reserved for one statement, or None."""
        room, idle = self.limit, None
        for session in self.sessions:
            if session.is_idle:
                idle = session
            elif session.busy_since is not None:
                room -= 1
        if idle is None or room <= 0:
            return None
        idle.reserve()
        return idle

    async def wait(self, deadline: float) -> Session | None:
        """Return an idle session, reserved for one statement, or None if there is none until `deadline`."""
        if not self._waiting and (session := self.take()) is not None:
            return session
        loop = asyncio.get_running_loop()
        if self.has_ended or loop.time() >= deadline:
            # Whoever asks again and again lets others run.
            await asyncio.sleep(0)
            return None
        future: asyncio.Future[Session | None] = loop.create_future()
        self._waiting.append(future)
        try:
            await asyncio.wait([future], timeout=deadline - loop.time())
        except asyncio.CancelledError:
            if future.done() and (session := future.result()) is not None:
                session.free()
            raise
        finally:
            if not future.done():
                self._waiting.remove(future)
        return future.result() if future.done() else None

    def serve(self) -> None:
        """Give idle sessions to those who wait."""
        while self._waiting and (session := self.take()) is not None:
            self._waiting.popleft().set_result(session)

    def add(self, session: Session) -> None:
        self.down_reason = ""
        self.sessions.append(session)
        self.serve()

    def remove(self, session: Session) -> None:
        self.down_reason = session.lost_reason
        self.sessions.remove(session)

    def close(self, reason: str) -> None:
        """Close all connections. Statements under way are lost."""
        for session in list(self.sessions):
            session.end(reason)

    def end(self, reason: str) -> None:
        """Close all connections, and let nobody wait for another one."""
        self.has_ended = True
        self.close(reason)
        while self._waiting:
            self._waiting.popleft().set_result(None)
