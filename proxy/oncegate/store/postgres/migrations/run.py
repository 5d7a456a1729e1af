"""One run at a time that brings a schema to the newest version, statement by statement.

The session that does the work holds the lock as well: an advisory lock of the session. So the lock lasts exactly as
long as its statements do, also when this process is killed, and when the server ends the session, the run ends with it.
A session that waits for the lock asks again and again instead of waiting inside the server: a statement that waits has
a snapshot, and CREATE INDEX CONCURRENTLY waits for every older snapshot, for ever (seen).
"""

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import asyncpg

from oncegate.hostnames.failures import failure_words
from oncegate.store.postgres.migrations.files import (
    create_schema,
    migrations,
    newest_version,
    note_version,
    quoted,
    schema_complaint,
)

# The first of the two numbers of our advisory lock. Claims lock single numbers, which never meet pairs.
LOCK_CLASS = 0x6F6E6365
# Between two questions for the lock, and for the schema.
POLL_S = 0.2
CONNECT_TIMEOUT_S = 10.0
_CONCURRENTLY = re.compile(
    r"CREATE\s+(?:UNIQUE\s+)?INDEX\s+CONCURRENTLY\s+(?:IF\s+NOT\s+EXISTS\s+)?(\S+)", re.IGNORECASE
)
_OWNER = "; set ONCEGATE_MIGRATE_URL to the URL of the owner, who needs a schema of its own or the right to create one"
_BUSY = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)


class MigrationError(Exception):
    """Why a run ended before its end. The text is for the operator; the next run goes on where this one ended."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to migrate. `url` is the owner's.

    `lock_timeout_ms`: the longest wait for one lock, as claims wait behind it. `patience_s`: how long to try again.
    `any_server`: a standby will do, as nothing is written.
    """

    url: str
    schema: str = "oncegate"
    lock_timeout_ms: int = 100
    patience_s: float = 60.0
    any_server: bool = False


async def connect(target: Target) -> "asyncpg.Connection[asyncpg.Record]":
    """Return a connection of the owner's role. Raises MigrationError."""
    settings = {
        "application_name": "oncegate command",
        "search_path": quoted(target.schema),
        # The role or the database may have other defaults, made for requests.
        "default_transaction_isolation": "read committed",
        "default_transaction_read_only": "off",
        "lock_timeout": str(target.lock_timeout_ms),
        "statement_timeout": "0",
        "client_min_messages": "warning",
        # A statement whose process was killed ends soon, and with it the lock.
        "client_connection_check_interval": "1000",
    }
    try:
        connection = await asyncpg.connect(
            target.url,
            timeout=CONNECT_TIMEOUT_S,
            server_settings=settings,
            target_session_attrs="any" if target.any_server else "primary",
        )
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise MigrationError(f"cannot connect: {error or failure_words(error)}") from error
    if await connection.fetchval("SELECT pg_backend_pid()") != connection.get_server_pid():
        await connection.close()
        raise MigrationError("a pooler is between here and the server, and loses the lock; connect to the server")
    return connection


async def schema_version(connection: "asyncpg.Connection[asyncpg.Record]") -> int:
    """Return the version of the schema, 0 for none."""
    if await connection.fetchval("SELECT to_regclass('schema_version')") is None:
        return 0
    return int(await connection.fetchval("SELECT coalesce(max(version), 0) FROM schema_version"))


async def wait_for_schema(target: Target) -> None:
    """Return as soon as this release works with the schema. Raises MigrationError when the patience ends."""
    deadline = asyncio.get_running_loop().time() + target.patience_s
    while True:
        try:
            connection = await connect(target)
            try:
                complaint = schema_complaint(await schema_version(connection))
            finally:
                await connection.close()
        except (MigrationError, OSError, asyncpg.PostgresError) as error:
            complaint = str(error)
        if complaint is None:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise MigrationError(complaint)
        await asyncio.sleep(POLL_S)


class Run:
    """A run that holds the lock, from `start` until its connection ends."""

    def __init__(
        self,
        connection: "asyncpg.Connection[asyncpg.Record]",
        target: Target,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._connection, self._target, self._report = connection, target, report
        self._deadline = asyncio.get_running_loop().time() + target.patience_s

    async def start(self) -> None:
        """Wait until no other run is at work on this schema. Raises MigrationError."""
        number = crc32(self._target.schema.encode()) - 2**31
        waiting = False
        while not await self.value("SELECT pg_try_advisory_lock($1, $2)", LOCK_CLASS, number):
            if not waiting:
                self._report("another run is at work; waiting for it")
            waiting = True
            await self._pause(POLL_S, "another run is at work")

    async def migrate(self) -> int:
        """Bring the schema to the newest version, and return how many files that took. Raises MigrationError."""
        before = await schema_version(self._connection)
        if before > newest_version():
            if complaint := schema_complaint(before):
                raise MigrationError(complaint)
            return 0
        # Also where the schema is there already, it would ask for the right to create one.
        if not await self.value("SELECT to_regnamespace($1) IS NOT NULL", quoted(self._target.schema)):
            await self.execute(create_schema(self._target.schema))
        due = [migration for migration in migrations() if migration.version > before]
        for migration in due:
            for statement in migration.statements:
                await (self.execute_each if statement.generates else self.execute)(statement.text)
            await self.execute(note_version(migration.version))
            self._report(f"version {migration.version}")
        return len(due)

    async def execute_each(self, query: str) -> int:
        """Execute each row of a query as a statement, and return their number. Raises MigrationError."""
        rows = await self.rows(query)
        for row in rows:
            await self.execute(row[0])
        return len(rows)

    async def execute(self, sql: str) -> None:
        """Execute one statement, again after each wait for a lock that took too long. Raises MigrationError."""
        if (index := _CONCURRENTLY.match(sql)) is not None:
            await self._index_concurrently(sql, index[1])
            return
        while not await self._tried(sql):
            # Claims that waited behind this statement go first: for ten times as long as it stopped them.
            pause_s = self._target.lock_timeout_ms / 100 * (1 + random.random())
            await self._pause(pause_s, f"no lock for: {_first_line(sql)}{await self._holders()}")

    async def execute_patiently(self, sql: str, wait_ms: int) -> bool:
        """Execute a statement that no claim waits for. Return False if its own wait took too long (0: no limit)."""
        await self._tried(f"SET lock_timeout = {wait_ms}")
        done = await self._tried(sql)
        await self._tried(f"SET lock_timeout = {self._target.lock_timeout_ms}")
        return done

    async def _tried(self, sql: str) -> bool:
        """Execute a statement once, and return whether it got its locks. Raises MigrationError."""
        try:
            with _reported(sql):
                await self._connection.execute(sql)
        except _BUSY:
            return False
        return True

    async def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Return the rows of a query. Raises MigrationError."""
        with _reported(query):
            return list(await self._connection.fetch(query, *args))

    async def value(self, query: str, *args: object) -> Any:
        """Return the one value of a query, None for no row. Raises MigrationError."""
        with _reported(query):
            return await self._connection.fetchval(query, *args)

    async def _index_concurrently(self, sql: str, name: str) -> None:
        """Create an index while rows change. A run that was killed leaves it invalid: then it is made anew."""
        if await self.value("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)", name) is False:
            await self.execute_patiently(f"DROP INDEX CONCURRENTLY {name}", 0)
        await self.execute_patiently(sql, 0)

    async def _holders(self) -> str:
        """Return who holds locks on our tables: what a long transaction is known by to the operator."""
        rows = await self.rows(
            "SELECT DISTINCT pid FROM pg_locks JOIN pg_class ON relation = pg_class.oid"
            " WHERE relnamespace = to_regnamespace($1) AND granted AND pid <> pg_backend_pid() ORDER BY pid LIMIT 5",
            quoted(self._target.schema),
        )
        pids = ", ".join(str(row["pid"]) for row in rows)
        return f" (locks are held by {pids}: see pg_stat_activity)" if pids else ""

    async def _pause(self, pause_s: float, reason: str) -> None:
        if asyncio.get_running_loop().time() + pause_s > self._deadline:
            raise MigrationError(f"{reason}; run it again to go on")
        await asyncio.sleep(pause_s)


@contextmanager
def _reported(sql: str) -> Iterator[None]:
    """Make a MigrationError of whatever ends a statement, but for locks that took too long."""
    try:
        yield
    except _BUSY:
        raise
    except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncpg.PostgresConnectionError) as error:
        raise MigrationError(f"the connection ended ({error}); run it again to go on") from error
    except asyncpg.PostgresError as error:
        remedy = _OWNER if isinstance(error, asyncpg.InsufficientPrivilegeError) else ""
        raise MigrationError(f"{error} ({error.sqlstate}), in: {_first_line(sql)}{remedy}") from error


def _first_line(sql: str) -> str:
    return next(line for line in sql.splitlines() if line and not line.startswith("--"))[:100]
