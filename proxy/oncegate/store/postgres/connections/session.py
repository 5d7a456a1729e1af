"""One connection to a server, which runs one statement at a time.

A statement is never cancelled, and the driver gets no time limit for it: a cancelled wait for a standby ends with a
success and a warning, and the commit may be lost later. A caller that stops waiting leaves the connection to its reply.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import asyncpg

from oncegate.store.postgres.connections.durability import LOOK, Durability, Level, Look
from oncegate.store.postgres.connections.facts import Backend, Facts, ask
from oncegate.store.postgres.connections.hosts import (
    PID,
    Connection,
    Host,
    Unreachable,
    connect,
    reason_of,
    refuse_shared_backends,
    retrieve,
    within,
)

# Of each connection, set when it is made and read back: a role or a database may have other defaults.
SETTINGS = {
    # Under REPEATABLE READ a claim would not see what it waited for.
    "default_transaction_isolation": "read committed",
    # The least that shows the warning that a wait for a standby was cancelled.
    "client_min_messages": "warning",
    "statement_timeout": "0",
    # Since PostgreSQL 17.
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    # Statements are planned while their tables are empty. All of them go by keys.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}
# Only those that the server has.
_SET = """
SELECT name, set_config(name, one.value, false) AS value
FROM unnest($1::text[], $2::text[]) AS one(name, value) JOIN pg_settings USING (name)
"""
# How long a new connection may take for its settings and its facts.
PREPARE_S = 5.0
# For how many times a claim's time a statement waits for a lock. No statement of ours holds one for long, so somebody
# else does. The callers have stopped waiting by then, and the connection is free again.
LOCK_TIMES = 4
# The pauses between two looks at standbys that do not have a commit yet.
MIN_LOOK_PAUSE_S, MAX_LOOK_PAUSE_S = 0.0005, 0.02
# Of a warning that a commit may not be where it should be: its wait for a standby was cancelled, or its backend ended.
_BELOW = ("01000", "57P01")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to one statement, whose commit is over.

    `is_below`: its commit may be on fewer servers than the level asks for.
    """

    rows: list[Any]
    is_below: bool = False


class Lost(Exception):
    """A statement has no reply, and never will. `maybe_executed`: it left, so the server may execute it at any time.

    `backend`: the server's process, which may still be at work on it.
    """

    def __init__(self, reason: str, backend: Backend, maybe_executed: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.maybe_executed, self.backend = reason, maybe_executed, backend


class Refused(Exception):
    """The server refused a statement, and has undone all of it."""

    def __init__(self, reason: str, sqlstate: str) -> None:
        super().__init__(reason)
        self.reason, self.sqlstate = reason, sqlstate


@dataclass(slots=True)
class SessionConfig:
    """What all sessions of a store have in common. The credentials in `url` may change. `timeout_s`: of a claim."""

    url: str
    schema: str
    durability: Durability
    timeout_s: float
    # Called with the seconds that a new connection took.
    connected: Callable[[float], None] = lambda _: None

    def settings(self, level: Level) -> dict[str, str]:
        """Return the settings of a session."""
        return {
            **SETTINGS,
            "synchronous_commit": self.durability.commit(level),
            "lock_timeout": str(max(1, int(self.timeout_s * LOCK_TIMES * 1000))),
            "search_path": quoted(self.schema),
        }


def quoted(name: str) -> str:
    """Return an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class Session:
    """One connection. `changed(session)` is called when it is free again, and when it is lost.

    Whoever took it out of `Servers` runs one statement, or frees it.
    """

    def __init__(
        self,
        connection: Connection,
        facts: Facts,
        level: Level,
        config: SessionConfig,
        changed: Callable[["Session"], None],
    ) -> None:
        self._connection, self._config, self._changed = connection, config, changed
        self.facts, self.level = facts, level
        self._loop = asyncio.get_running_loop()
        self._looks = level is Level.CLAIM and config.durability.is_replicated
        self._is_below = False
        self._task: asyncio.Task[Any] | None = None
        self.lost_reason = ""
        # The loop's time when the statement under way was sent; None without one.
        self.busy_since: float | None = None
        # The reply to the last statement, once it has come.
        self.last_answer: Answer | None = None
        self._retires = ""
        # Set once the connection is lost.
        self.ended = asyncio.Event()
        connection.add_log_listener(self._note_message)
        connection.add_termination_listener(self._note_end)

    @property
    def is_lost(self) -> bool:
        return bool(self.lost_reason)

    @property
    def is_idle(self) -> bool:
        return self.busy_since is None and not self.lost_reason

    def busy_for_s(self) -> float:
        """Return for how long a statement has been under way, 0 without one."""
        return 0.0 if self.busy_since is None else self._loop.time() - self.busy_since

    async def run(self, statement: str, *args: object) -> Answer:
        """Run one statement. Raises Refused, and Lost for any other end without a reply.

        A caller that is cancelled stops waiting. The statement goes on, and the session is busy until its reply.
        """
        return await asyncio.shield(self.start(statement, *args))

    def start(self, statement: str, *args: object) -> asyncio.Task[Answer]:
        """Begin one statement, as `run` does. Nobody may cancel the task."""
        return self._begin(self._fetch(statement, args))

    async def ask(self) -> Facts:
        """Return what the server says of itself now. Raises as `run` does."""
        return await asyncio.shield(self._begin(ask(self._connection, self._config.schema)))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        if self._task is not None or self.lost_reason:
            work.close()
            task = self._loop.create_task(self._not_begun())
        else:
            self._is_below, self.last_answer, self.busy_since = False, None, self._loop.time()
            self._task = task = self._loop.create_task(self._run(work))
        task.add_done_callback(retrieve)
        return task

    async def _not_begun(self) -> Any:
        raise Lost(self.lost_reason or "the connection is busy", self.facts.backend, maybe_executed=False)

    async def _fetch(self, statement: str, args: tuple[object, ...]) -> Answer:
        rows = await self._connection.fetch(statement, *args)
        if self._looks and not self._is_below:
            self._is_below = not await self._is_confirmed()
        self.last_answer = answer = Answer(rows, self._is_below)
        return answer

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except asyncpg.PostgresError as error:
            # The driver raises a DataError of its own for a value that it cannot send: nothing has left.
            if error.severity_en == "ERROR" or (isinstance(error, asyncpg.DataError) and not error.severity_en):
                raise Refused(reason_of(error), error.sqlstate or "") from error
            raise self._lost(error) from error
        except Exception as error:
            # The driver has errors of its own for a connection in an unknown state: none says what the server did.
            raise self._lost(error) from error
        finally:
            self._task = None
            self.free()

    async def _is_confirmed(self) -> bool:
        """Look at the standbys behind a commit, until they have it or are no longer waited for.

        Where the server refuses the look, nobody knows: the commit itself is not undone.
        """
        durability, upto, pause_s = self._config.durability, None, MIN_LOOK_PAUSE_S
        ends = self._loop.time() + self._config.timeout_s
        while True:
            try:
                look = Look(*await self._connection.fetchrow(LOOK, upto))
            except asyncpg.PostgresError as error:
                if error.severity_en != "ERROR":
                    raise
                return False
            verdict = durability.is_confirmed(look)
            if verdict is not None or self._loop.time() > ends:
                return bool(verdict)
            upto = look.upto
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_LOOK_PAUSE_S)

    def free(self) -> None:
        """Give the session back: its statement has its reply, or was never sent."""
        self.busy_since = None
        if self._retires and not self.lost_reason:
            self.end(self._retires)
        self._changed(self)

    def reserve(self) -> None:
        """Take the session for one statement."""
        self.busy_since = self._loop.time()

    def retire(self, reason: str) -> None:
        """Close the connection once no statement is under way."""
        self._retires = reason
        if self.is_idle:
            self.end(reason)

    def end(self, reason: str) -> None:
        """Close the connection. A statement under way is lost: the server may still execute it."""
        self.lost_reason = self.lost_reason or reason
        self._connection.terminate()

    def _lost(self, error: Exception) -> Lost:
        reason = self.lost_reason or reason_of(error)
        self.end(reason)
        return Lost(reason, self.facts.backend)

    def _note_message(self, _connection: Any, message: Any) -> None:
        self._is_below |= message.sqlstate in _BELOW

    def _note_end(self, _connection: Any) -> None:
        self.lost_reason = self.lost_reason or "the store closed the connection"
        self.ended.set()
        if self._task is None:
            self.free()


async def open_session(host: Host, level: Level, config: SessionConfig, changed: Callable[[Session], None]) -> Session:
    """Connect to a host and prepare the connection. Raises Unreachable."""
    began_s = perf_counter()
    connection = await connect(config.url, host)
    facts = await within(connection, _prepare(connection, host, level, config), PREPARE_S)
    config.connected(perf_counter() - began_s)
    return Session(connection, facts, level, config, changed)


async def _prepare(connection: Connection, host: Host, level: Level, config: SessionConfig) -> Facts:
    """Set and read back the settings of a new connection, and return the server's facts."""
    if await connection.fetchval(PID) != connection.get_server_pid():
        await refuse_shared_backends(connection, config.url, host)
    settings = config.settings(level)
    rows = await connection.fetch(_SET, tuple(settings), tuple(settings.values()))
    # As the server writes them, with their units.
    wanted = {row["name"]: row["value"] for row in rows}
    facts = await ask(connection, names=tuple(wanted))
    for name, value in wanted.items():
        if facts.settings[name] != value:
            raise Unreachable(f"the setting {name} was {value}, and is {facts.settings[name]} in the next statement")
    return facts
