"""The connections to the server of a store."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asyncpg

from oncegate.store.breaker import Breaker
from oncegate.store.postgres.durability import Level
from oncegate.store.postgres.session import SETTINGS, Lost, Refused, Session
from oncegate.store.results import ClaimsSuspended, Forbidden, NotAttempted, StoreFull

_IS_ALIVE = "SELECT count(*) AS alive FROM pg_stat_get_activity($1) WHERE backend_start = $2"
SIZES = {Level.CLAIM: 4, Level.DISK: 2, Level.OFF: 2}
_COMMIT = {Level.CLAIM: "on", Level.DISK: "local", Level.OFF: "off"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersConfig:
    """What the servers of a store are told. `timeout_s`: of a claim, and of one try of any other call."""

    url: str
    timeout_s: float
    durability: str
    schema: str = "oncegate"
    promotion: str = "any"
    log: Callable[..., None] = lambda *_, **__: None
    breaker_opened: Callable[[], None] = lambda: None
    member: Any = None
    max_bytes: int = 0
    resolver: Any = None


class Servers:
    """The connections to one server."""

    def __init__(self, config: ServersConfig) -> None:
        self._config, self._loop = config, asyncio.get_running_loop()
        self.breaker = Breaker(self._loop.time, config.breaker_opened)
        self._sessions: dict[Level, list[Session]] = {level: [] for level in Level}
        self._waiting: dict[Level, deque[asyncio.Future[Session]]] = {level: deque() for level in Level}
        self._tasks: list[asyncio.Task[None]] = []
        self._up = asyncio.Event()
        self._offset_ms = 0.0
        self._reason = "not connected yet"
        self.memory_ratio, self.quarantine_left_s, self.rules_differ, self.is_full = 0.0, 0.0, False, False

    def start(self) -> None:
        self._tasks = [self._loop.create_task(self._keep(level)) for level in Level for _ in range(SIZES[level])]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for sessions in self._sessions.values():
            for session in list(sessions):
                session.end()

    def end_calls(self) -> None:
        for sessions in self._sessions.values():
            for session in list(sessions):
                session.end()

    async def wait_up(self, deadline: float) -> bool:
        await asyncio.wait([self._loop.create_task(self._up.wait())], timeout=max(0.0, deadline - self._loop.time()))
        return self._up.is_set()

    def not_ready_reason(self) -> str | None:
        return None if self._up.is_set() else f"the store is not reachable: {self._reason}"

    def notice(self) -> str | None:
        return None

    def refusal(self) -> NotAttempted | ClaimsSuspended | None:
        return None if self._up.is_set() else NotAttempted(self._reason)

    def note_refusal(self, reason: StoreFull | Forbidden) -> None:
        self.is_full = isinstance(reason, StoreFull)

    @property
    def readable(self) -> bool:
        return self._up.is_set()

    def session(self, level: Level) -> Session | None:
        session = next((one for one in self._sessions[level] if not one.is_busy and not one.is_lost), None)
        if session is not None:
            session.is_busy = True
        return session

    async def free_session(self, level: Level, deadline: float) -> Session | None:
        if (session := self.session(level)) is not None:
            return session
        future: asyncio.Future[Session] = self._loop.create_future()
        self._waiting[level].append(future)
        await asyncio.wait([future], timeout=max(0.0, deadline - self._loop.time()))
        if not future.done():
            self._waiting[level].remove(future)
            return None
        return future.result()

    async def is_gone(self, backend: Any) -> bool:
        """Return whether a server's process is gone for sure that had a statement without a reply."""
        session = await self.free_session(Level.OFF, self._loop.time() + 1)
        if session is None:
            return False
        try:
            answer = await session.run(_IS_ALIVE, *backend)
        except (Lost, Refused):
            return False
        return not answer.rows[0]["alive"]

    def now_ms(self) -> int:
        return int(time.monotonic() * 1000 + self._offset_ms)

    def note_time(self, now_ms: int) -> None:
        self._offset_ms = now_ms - time.monotonic() * 1000

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def probe(self) -> None:
        await asyncio.Event().wait()

    async def _keep(self, level: Level) -> None:
        while True:
            try:
                lost = asyncio.Event()
                session = await self._open(level, lost)
                self._sessions[level].append(session)
                if all(self._sessions.values()):
                    self._up.set()
                self._serve(level)
                await lost.wait()
                self._sessions[level].remove(session)
                self._up.clear()
            except (OSError, asyncpg.PostgresError) as error:
                self._reason = str(error)
            await asyncio.sleep(0.1)

    async def _open(self, level: Level, lost: asyncio.Event) -> Session:
        settings = {
            **SETTINGS, "synchronous_commit": _COMMIT[level], "search_path": f'"{self._config.schema}"',
        }  # fmt: skip
        connection = await asyncpg.connect(self._config.url, server_settings=settings, timeout=5)
        self.note_time(await connection.fetchval("SELECT now_ms()"))

        def changed(session: Session) -> None:
            if session.is_lost:
                lost.set()
            else:
                self._serve(level)

        backend = await connection.fetchrow("SELECT pid, backend_start FROM pg_stat_get_activity(pg_backend_pid())")
        return Session(connection, tuple(backend), changed)

    def _serve(self, level: Level) -> None:
        waiting = self._waiting[level]
        while waiting and (session := self.session(level)) is not None:
            waiting.popleft().set_result(session)
