"""`oncegate migrate` on a real PostgreSQL: idempotent, one at a time, killed at each statement, in nobody's way."""

import asyncio
import itertools
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from oncegate.commands.cli import main
from oncegate.server.embedded_postgres import find_programs
from oncegate.store.postgres.migrations import files, run
from oncegate.store.postgres.migrations.files import Migration, Statement, cut, migrations, schema_complaint
from oncegate.store.postgres.migrations.grants import IS_APART, grants
from oncegate.store.postgres.migrations.partitions import (
    DAY_MS,
    Partition,
    drop_partitions,
    missing_partitions,
)
from oncegate.store.postgres.migrations.run import MigrationError, Run, Target, connect, wait_for_schema
from oncegate.store.results import SettleStatus
from oncegate.store.store import PostgresOptions, Store
from tests import stores
from tests.postgres_server import shared_url
from tests.stores import claimed, key, store_small

Connection = Any
NUMBERS = itertools.count()

# Everything that a migration makes, in words that do not name the schema.
CATALOG = """\
SELECT 'relation', relname, relkind::text, relpersistence::text, coalesce(reloptions::text, '') FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace
UNION ALL SELECT 'column', attrelid::regclass::text, attname, format_type(atttypid, atttypmod),
        attstorage::text || attnotnull || coalesce(pg_get_expr(adbin, adrelid), '')
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE relnamespace = current_schema()::regnamespace AND attnum > 0 AND NOT attisdropped
UNION ALL SELECT 'index', indexrelid::regclass::text, replace(pg_get_indexdef(indexrelid), current_schema() || '.', ''),
        indisvalid::text, ''
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE relnamespace = current_schema()::regnamespace
UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '' FROM pg_constraint
    WHERE connamespace = current_schema()::regnamespace
UNION ALL SELECT 'partition', inhrelid::regclass::text, pg_get_expr(relpartbound, oid), inhdetachpending::text, ''
    FROM pg_inherits JOIN pg_class ON oid = inhrelid
    WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
UNION ALL SELECT 'function', proname, pg_get_function_arguments(oid), prosrc, coalesce(proconfig::text, '') FROM pg_proc
    WHERE pronamespace = current_schema()::regnamespace
UNION ALL SELECT 'version', version::text, '', '', '' FROM schema_version
ORDER BY 1, 2, 3, 4, 5"""


@pytest.fixture
def target() -> Target:
    """An empty schema of the run's server. Its commits need not wait for a disk."""
    return Target(
        f"{shared_url()}?synchronous_commit=off",
        f"migrate_{os.getpid()}_{next(NUMBERS)}",
        lock_timeout_ms=20,
        patience_s=20,
    )


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[Connection]:
    connection = await connect(target)
    try:
        yield connection
    finally:
        await connection.close()


async def migrated(target: Target, days: int = 0) -> int:
    """Run all that `oncegate migrate` runs, and return how many files it took."""
    async with connected(target) as connection:
        one = Run(connection, target)
        await one.start()
        taken = await one.migrate()
        await one.execute_each(missing_partitions(days))
        return taken


async def catalog(target: Target) -> list[Any]:
    async with connected(target) as connection:
        return [tuple(row) for row in await connection.fetch(CATALOG)]


def opened(target: Target) -> Any:
    """A proxy's store."""
    url = target.url.partition("?")[0]
    return stores.connected(url, durability="fsync", postgres=PostgresOptions(schema=target.schema))


async def today(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT now_ms() / 86400000"))


# The files ...


def test_a_text_is_cut_at_its_semicolons() -> None:
    """A semicolon in a comment, a string, a quoted name or a body of a function ends no statement."""
    text = """
        -- a; comment 'with a quote
        SELECT 'it''s; -- text', "a;b" /* ; */;
        CREATE FUNCTION f() AS $x$ BEGIN; '$$ ; $$' END $x$; SELECT 6 / 2 - 1, $1;
        SELECT 'CREATE ...' \\gexec
        -- an end
    """
    assert list(cut(text)) == [
        Statement("""SELECT 'it''s; -- text', "a;b" /* ; */"""),
        Statement("CREATE FUNCTION f() AS $x$ BEGIN; '$$ ; $$' END $x$"),
        Statement("SELECT 6 / 2 - 1, $1"),
        Statement("SELECT 'CREATE ...'", generates=True),
    ]


def test_a_text_ends_with_its_last_statement() -> None:
    with pytest.raises(ValueError, match="a statement has no end: SELECT 2"):
        list(cut("SELECT 1; SELECT 2"))


def test_the_files_are_numbered() -> None:
    assert [migration.version for migration in migrations()] == list(range(1, len(migrations()) + 1))


@pytest.mark.parametrize("migration", migrations(), ids=lambda migration: str(migration.version))
def test_a_statement_can_be_repeated(migration: Migration) -> None:
    """By its words; test_killed_at_each_statement repeats them. No transactions, which would hold their locks."""
    for statement in migration.statements:
        words = statement.text.upper().split()
        if words[0] == "CREATE":
            assert words[1:3] == ["OR", "REPLACE"] or "IF NOT EXISTS" in " ".join(words[:8]), statement.text[:80]
        assert words[0] not in ("BEGIN", "START", "COMMIT", "SET", "GRANT"), statement.text[:80]


def test_which_schema_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release works with its own schema and the ones before and after it, never with none."""
    monkeypatch.setattr(files, "newest_version", lambda: 5)
    assert [version for version in range(10) if schema_complaint(version) is None] == [4, 5, 6]
    for version, word in ((0, "has no tables of oncegate"), (3, "run `oncegate migrate`"), (7, "run a newer release")):
        assert word in str(schema_complaint(version))


# Runs ...


async def test_a_second_run_changes_nothing(target: Target) -> None:
    assert await migrated(target) == len(migrations())
    first = await catalog(target)
    assert {row[0] for row in first} == {
        "relation",
        "column",
        "index",
        "constraint",
        "partition",
        "function",
        "version",
    }
    assert await migrated(target) == 0
    assert await catalog(target) == first


class Killed(Exception):
    """What a test ends a run with."""


class Fragile:
    """A connection whose process dies right before the n-th statement, which is right after the one before."""

    def __init__(self, connection: Connection, at: int) -> None:
        self._connection, self._left = connection, at

    async def execute(self, sql: str) -> None:
        self._left -= 1
        if self._left == 0:
            raise Killed
        await self._connection.execute(sql)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


async def died(target: Target, at: int) -> bool:
    """Run a migration that is killed before its n-th statement; return False if it came to its end."""
    connection = await connect(target)
    try:
        one = Run(Fragile(connection, at), target)
        await one.start()
        await one.migrate()
        await one.execute_each(missing_partitions(0))
    except Killed:
        return True
    finally:
        # As the kernel does it for a dead process: without a word to the server.
        connection.terminate()
    return False


async def test_killed_at_each_statement(target: Target) -> None:
    """A run may die at any statement: the next one goes on, and the end is the same as that of a whole run."""
    whole = Target(target.url, f"{target.schema}_whole")
    await migrated(whole)
    at = 1
    while await died(target, at):
        at += 1
    assert at > len(migrations()[0].statements)
    assert await catalog(target) == await catalog(whole)


async def test_the_server_ends_the_session_of_a_run(target: Target) -> None:
    """With its session, a run loses the lock: it ends, says so, and another run can take its place."""

    class Ended(Fragile):
        async def execute(self, sql: str) -> None:
            self._left -= 1
            if self._left == 0:
                async with connected(target) as other:
                    await other.execute(f"SELECT pg_terminate_backend({self._connection.get_server_pid()})")
            await self._connection.execute(sql)

    connection = await connect(target)
    one = Run(Ended(connection, 7), target)
    await one.start()
    with pytest.raises(MigrationError, match="the connection ended"):
        await one.migrate()
    connection.terminate()
    assert await migrated(target) == len(migrations())


async def test_two_runs_at_once(target: Target) -> None:
    """One works, the other waits for it and finds nothing to do."""
    assert sorted(await asyncio.gather(migrated(target), migrated(target))) == [0, len(migrations())]


async def test_a_run_that_waits_holds_no_snapshot(target: Target) -> None:
    """CREATE INDEX CONCURRENTLY waits for every snapshot that is older than its own."""
    await migrated(target)
    said: list[str] = []
    async with connected(target) as first, connected(target) as second:
        one, other = Run(first, target), Run(second, target, said.append)
        await one.start()
        waiting = asyncio.create_task(other.start())
        while not said:
            await asyncio.sleep(0.01)
        activity = "SELECT backend_xmin IS NULL AND xact_start IS NULL FROM pg_stat_activity WHERE pid = $1"
        while not await first.fetchval(activity, second.get_server_pid()):
            await asyncio.sleep(0.01)
        await asyncio.wait_for(one.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS extra ON lease (until)"), 10)
        assert not waiting.done()
        first.terminate()
        await asyncio.wait_for(waiting, 10)
    assert said == ["another run is at work; waiting for it"]


EACH_PARTITION = """\
SELECT format('CREATE INDEX CONCURRENTLY IF NOT EXISTS %1$s_extra ON %1$s (status)', inhrelid::regclass)
FROM pg_inherits WHERE inhparent = 'audit'::regclass"""


async def test_indexes_of_partitions(target: Target) -> None:
    """One partition at a time, without a lock that claims wait for. What a killed run left invalid is made anew."""
    await migrated(target, days=2)
    # Names without a schema are those of this one.
    valid = "SELECT count(*) FROM pg_index WHERE indexrelid::regclass::text ~ '^[^.]*_extra$' AND indisvalid"
    async with connected(target) as connection, connected(target) as claims, connected(target) as third:
        one = Run(connection, target)
        first = await today(connection)
        assert await one.execute_each(EACH_PARTITION) == 3
        index = f"{Partition('audit', first).name}_extra"
        await connection.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass")
        assert await connection.fetchval(valid) == 2
        async with claims.transaction():
            await claims.execute(entry(str(first)))
            making = asyncio.create_task(one.execute_each(EACH_PARTITION))
            # It waits for this transaction, and nobody waits for it.
            for _ in range(20):
                await asyncio.wait_for(third.execute(entry(str(first))), 10)
            assert not making.done()
        assert await asyncio.wait_for(making, 10) == 3
        assert await connection.fetchval(valid) == 3


async def test_a_long_reader_stops_no_claim(target: Target) -> None:
    """A statement that needs a table for itself gives up soon and tries again; claims go on between its tries."""
    await migrated(target)
    async with connected(target) as reader, connected(target) as claims, connected(target) as connection:
        one = Run(connection, target)
        reading = reader.transaction()
        await reading.start()
        await reader.fetch("SELECT * FROM record")
        altering = asyncio.create_task(one.execute("ALTER TABLE record ADD COLUMN IF NOT EXISTS extra int"))
        await claims.execute("SET lock_timeout = 0")
        for number in range(50):
            await asyncio.wait_for(claims.execute(f"INSERT INTO record (key, state) VALUES ('{number}', 1)"), 10)
        assert not altering.done()
        await reading.rollback()
        await asyncio.wait_for(altering, 10)


async def test_a_reader_that_stays(target: Target) -> None:
    """When its patience ends, a run says which statement got no lock, and who holds locks."""
    await migrated(target)
    hasty = Target(target.url, target.schema, lock_timeout_ms=5, patience_s=0.3)
    async with connected(target) as reader, connected(hasty) as connection, reader.transaction():
        await reader.fetch("SELECT * FROM lease")
        with pytest.raises(MigrationError, match=rf"no lock for: ALTER TABLE lease .*{reader.get_server_pid()}"):
            await Run(connection, hasty).execute("ALTER TABLE lease ADD COLUMN extra int")


NEXT = """\
ALTER TABLE record ADD COLUMN IF NOT EXISTS extra int;
ALTER TABLE audit ADD COLUMN IF NOT EXISTS extra int;
SELECT format('CREATE INDEX CONCURRENTLY IF NOT EXISTS %1$s_extra ON %1$s (status)', inhrelid::regclass)
FROM pg_inherits WHERE inhparent = 'audit'::regclass \\gexec
CREATE OR REPLACE FUNCTION now_ms() RETURNS bigint LANGUAGE sql VOLATILE AS
$$ SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint $$;
"""


async def test_requests_during_a_migration(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the version before goes on executing while the next version comes, killed at each of its statements.

    Its own version is in between afterwards, so it stays ready; and so does a proxy that knew the next one before.
    """
    await migrated(target)
    following = (*migrations(), Migration(len(migrations()) + 1, NEXT))
    executions = 0
    is_over = asyncio.Event()

    async def work(store: Store, number: int) -> None:
        nonlocal executions
        for count in itertools.count():
            if is_over.is_set():
                return
            owner = await claimed(store, key=key(1000 * number + count))
            assert (await store_small(store, owner)).status is SettleStatus.STORED
            executions += 1

    async with opened(target) as store:
        working = [asyncio.create_task(work(store, number)) for number in range(4)]
        monkeypatch.setattr(run, "migrations", lambda: following)
        monkeypatch.setattr(run, "newest_version", lambda: len(following))
        for at in itertools.count(1):
            before = executions
            if await died(target, at):
                # Until requests have been executed between two tries.
                while executions < before + 4:
                    await asyncio.sleep(0.001)
                continue
            break
        is_over.set()
        await asyncio.gather(*working)
        assert store.not_ready_reason() is None
    assert at > 6
    async with connected(target) as connection:
        assert await connection.fetchval("SELECT count(*) FROM record WHERE state = 3 AND extra IS NULL") == executions


async def test_a_schema_of_a_newer_release(target: Target) -> None:
    """It is left alone: the next release's is fine, a later one's is an error."""
    await migrated(target)
    async with connected(target) as connection:
        one = Run(connection, target)
        newest = len(migrations())
        await connection.execute(files.note_version(newest + 1))
        assert await one.migrate() == 0
        await connection.execute(files.note_version(newest + 2))
        with pytest.raises(MigrationError, match="run a newer release"):
            await one.migrate()


async def test_waiting_for_the_schema(target: Target) -> None:
    """A sidecar waits until another run has ended, and gives up with the reason."""
    with pytest.raises(MigrationError, match="has no tables of oncegate"):
        await wait_for_schema(Target(target.url, target.schema, patience_s=0.0))
    waiting = asyncio.create_task(wait_for_schema(target))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await migrated(target)
    await asyncio.wait_for(waiting, 10)


# Partitions ...


def entry(day: str) -> str:
    columns = "day, at, no, before_at, fence, event, key, token, actor, digest"
    values = f"partition_day('audit', {day}), {day}::bigint * {DAY_MS}, 1, 0, 1, 1, '', '', '', ''"
    return f"INSERT INTO audit ({columns}) VALUES ({values})"


PLACES = "SELECT tableoid::regclass::text FROM audit ORDER BY at"


async def test_partitions_of_the_next_days(target: Target) -> None:
    """They begin with today's; what is missing among them is made, what was detached is attached."""
    await migrated(target, days=3)
    async with connected(target) as connection:
        one = Run(connection, target)
        first = await today(connection)
        days = "SELECT array_agg(day ORDER BY day) FROM partition_days('audit') AS day"
        assert await connection.fetchval(days) == [first, first + 1, first + 2, first + 3]
        assert await connection.fetchval("SELECT partition_days_left('chunk')") == 3
        await connection.execute(f"DROP TABLE {Partition('audit', first + 1).name}")
        await connection.execute(f"ALTER TABLE audit DETACH PARTITION {Partition('audit', first + 2).name}")
        assert await one.execute_each(missing_partitions(3)) == 2
        assert await one.execute_each(missing_partitions(3)) == 0
        assert await connection.fetchval(days) == [first, first + 1, first + 2, first + 3]


async def test_a_partition_that_nobody_made(target: Target) -> None:
    """The nearest partition before takes the entries of its day, or else the nearest after."""
    await migrated(target, days=2)
    async with connected(target) as connection:
        first = await today(connection)
        hole = Partition("audit", first + 1)
        await connection.execute(f"DROP TABLE {hole.name}")
        for day in (first - 1, first, first + 1, first + 2, first + 60):
            await connection.execute(entry(str(day)))
        names = [Partition("audit", day).name for day in (first, first, first, first + 2, first + 2)]
        assert [row[0] for row in await connection.fetch(PLACES)] == names


async def test_a_long_reader_stops_no_partition(target: Target) -> None:
    """Partitions are attached beside readers and writers of their parent, and no claim waits for that."""
    await migrated(target)
    async with connected(target) as reader, connected(target) as writer, connected(target) as connection:
        first = await today(connection)
        async with reader.transaction(), writer.transaction():
            await reader.fetch("SELECT * FROM audit")
            await writer.execute(entry(str(first)))
            assert await asyncio.wait_for(Run(connection, target).execute_each(missing_partitions(2)), 10) == 4
            await asyncio.wait_for(connection.execute(entry(str(first + 2))), 10)


async def old_partitions(target: Target, connection: Connection, first: int) -> list[Partition]:
    """Make partitions of ten and three days ago, each with a row; return them."""
    old = [Partition(parent, day) for parent in ("audit", "chunk") for day in (first - 10, first - 3)]
    for one in old:
        bounds = f"FOR VALUES FROM ({one.day}) TO ({one.day + 1})"
        await connection.execute(f"CREATE TABLE {one.name} PARTITION OF {one.parent} {bounds}")
        row = f"({one.day}, 'k', 't', 0, 'x')"
        await connection.execute(
            entry(str(one.day))
            if one.parent == "audit"
            else f"INSERT INTO chunk (day, key, token, index, bytes) VALUES {row}"
        )
    return old


async def test_partitions_past_use_are_dropped(target: Target) -> None:
    """Days of the trail past its retention go, and days of bodies that no record needs."""
    await migrated(target, days=1)
    async with connected(target) as connection:
        one = Run(connection, target)
        first = await today(connection)
        older_audit, newer_audit, older_chunk, newer_chunk = await old_partitions(target, connection, first)
        # A body that is kept, and one whose exchange may go on although its time is over.
        record = "INSERT INTO record (key, bucket, state, expires) VALUES"
        await connection.execute(f"{record} ('kept', {newer_chunk.day}, 3, {(first + 1) * DAY_MS})")
        await connection.execute(f"{record} ('runs', {older_chunk.day}, 1, 5)")
        assert await drop_partitions(one, 5 * DAY_MS) == ([older_audit.name], [])
        await connection.execute("DELETE FROM record WHERE key = 'runs'")
        assert await drop_partitions(one, 5 * DAY_MS) == ([older_chunk.name], [])
        assert await drop_partitions(one, 5 * DAY_MS) == ([], [])
        days = "SELECT array_agg(day ORDER BY day) FROM partition_days($1) AS day"
        for parent, newer in (("audit", newer_audit), ("chunk", newer_chunk)):
            assert await connection.fetchval(days, parent) == [newer.day, first, first + 1]


async def test_a_partition_with_later_entries_is_kept(target: Target) -> None:
    """It took those of a day whose partition was missing."""
    await migrated(target)
    async with connected(target) as connection:
        one = Run(connection, target)
        first = await today(connection)
        older, *_ = await old_partitions(target, connection, first)
        await connection.execute(entry(str(first - 4)))
        assert await drop_partitions(one, 5 * DAY_MS) == (
            [Partition("chunk", first - 10).name, Partition("chunk", first - 3).name],
            [],
        )
        assert (await connection.fetchval("SELECT count(*) FROM audit WHERE day = $1", older.day)) == 2


async def test_a_partition_that_is_read_is_dropped_later(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader does not hold a run up, nor does the run hold up claims; the next run ends what this one began."""
    waits = "oncegate.store.postgres.migrations.partitions.DETACH_WAIT_MS"
    monkeypatch.setattr(waits, 50)
    await migrated(target)
    async with connected(target) as reader, connected(target) as connection:
        one = Run(connection, target)
        first = await today(connection)
        old = [one.name for one in await old_partitions(target, connection, first) if one.parent == "audit"]
        async with reader.transaction():
            await reader.fetch("SELECT * FROM audit")
            _, kept = await drop_partitions(one, DAY_MS)
            assert set(kept) == set(old)
            assert await one.execute_each(missing_partitions(1)) == 2
            await asyncio.wait_for(connection.execute(entry(str(first))), 10)
        # The end of a detach waits for all older snapshots, also for those of other tests.
        monkeypatch.setattr(waits, 30_000)
        assert await drop_partitions(one, DAY_MS) == (old, [])


# The rights of the proxies' role ...


@pytest.fixture
async def role(target: Target) -> AsyncIterator[str]:
    """A role without rights."""
    name = f"proxy_{target.schema}"
    async with connected(target) as connection:
        await connection.execute(f"CREATE ROLE {name} LOGIN")
        yield name
        await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_rights_of_the_proxies(target: Target, role: str) -> None:
    """They read and change records, and add to the trail. Nothing lets them change it, nor the tables."""
    await migrated(target)
    async with connected(target) as connection:
        one = Run(connection, target)
        first = await today(connection)
        # What somebody granted once too often is taken away.
        await connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {target.schema} TO {role}")
        for _ in range(2):
            assert await one.execute_each(grants(role)) == 1
        assert await one.value(IS_APART, role)
        assert not await one.value(IS_APART, "postgres")
        assert await one.value(IS_APART, "nobody_has_this_name") is None
        await connection.execute(f"SET ROLE {role}")
        for statement in (
            entry(str(first)),
            "SELECT * FROM audit",
            "SELECT nextval('fence')",
            "INSERT INTO record (key, state) VALUES ('k', 1)",
            "UPDATE record SET state = 2",
            "DELETE FROM record",
            "INSERT INTO mark (name, value, expires) VALUES ('n', 'v', 1)",
            "SELECT max(version) FROM schema_version",
        ):
            await connection.execute(statement)
        partition = Partition("audit", first).name
        for table in ("audit", partition):
            for statement in (
                f"UPDATE {table} SET actor = 'x'",
                f"DELETE FROM {table}",
                f"TRUNCATE {table}",
                f"DROP TABLE {table}",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
        for statement in (
            f"SELECT * FROM {partition}",
            f"INSERT INTO {partition} SELECT * FROM audit",
            f"ALTER TABLE audit DETACH PARTITION {partition}",
            "UPDATE schema_version SET version = 9",
            "CREATE TABLE mine (x int)",
            "ALTER TABLE audit DISABLE TRIGGER ALL",
            "TRUNCATE record",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)


# The command ...


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(target: Target, role: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Command:
    """Run `oncegate migrate`; return its exit code and what it printed. No upstream is set."""
    monkeypatch.setenv("ONCEGATE_STORE_SCHEMA", target.schema)
    monkeypatch.setenv("ONCEGATE_MIGRATE_URL", shared_url())
    monkeypatch.setenv("ONCEGATE_STORE_URL", shared_url().replace("postgres@", f"{role}@"))

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["migrate", "--timeout", "5", *arguments])
        return code, "".join(capsys.readouterr())

    return run


def test_the_command(command: Command) -> None:
    """At first a migration is due. After it, the proxies have their rights, and 61 days have their partitions."""
    code, said = command("--check")
    newest = len(migrations())
    assert (code, said.splitlines()[0]) == (3, f"the schema has version 0, this release has {newest}")
    assert command("--wait", "--timeout", "0") == (1, f"migrate: {schema_complaint(0)}\n")
    code, said = command()
    assert code == 0
    assert "has the rights of a proxy" in said
    assert said.endswith("122 partitions made; those of the next 60 days are there\n")
    assert command("--check") == (0, f"the schema has version {newest}, this release has {newest}\n")
    assert command("--wait") == (0, "")
    code, said = command("--maintain")
    assert (code, said.splitlines()[0]) == (0, "0 partitions made; those of the next 60 days are there")


@pytest.fixture
def few_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer partitions."""
    monkeypatch.setattr("oncegate.commands.migrate.missing_partitions", lambda: missing_partitions(1))


@pytest.mark.usefixtures("few_days")
def test_the_script(command: Command, target: Target) -> None:
    """psql makes of --sql what a run makes, twice over; the run finds nothing left to do."""
    _, script = command("--sql")
    psql = [find_programs() / "psql", "-Xq", "-v", "ON_ERROR_STOP=1", shared_url()]
    for _ in range(2):
        subprocess.run(psql, input=script, text=True, check=True, timeout=60)
    made = asyncio.run(catalog(target))
    code, said = command()
    assert code == 0
    assert "0 partitions made" in said
    assert asyncio.run(catalog(target)) == made


@pytest.mark.usefixtures("few_days")
def test_the_owner_is_not_the_proxies(command: Command) -> None:
    """A proxy that connects as the owner is warned of; a role that does not exist is named, with what makes it."""
    code, said = command("--role", "nobody_has_this_name")
    assert (code, said.splitlines()[-1]) == (
        1,
        "migrate: the role nobody_has_this_name does not exist; create it first: "
        "CREATE ROLE \"nobody_has_this_name\" LOGIN PASSWORD '...'",
    )
    code, said = command("--role", "postgres")
    assert code == 0
    assert "warning: proxies that connect as the owner of the tables can change the audit trail" in said


def test_the_proxies_role_cannot_migrate(command: Command, role: str) -> None:
    """It may not create a schema. The operator reads whose URL is missing."""
    code, said = command("--url", shared_url().replace("postgres@", f"{role}@"))
    assert code == 1
    assert "permission denied for database" in said
    assert "set ONCEGATE_MIGRATE_URL to the URL of the owner" in said


def test_a_store_without_tables(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in Redis needs no migration: exit code 2."""
    monkeypatch.delenv("ONCEGATE_MIGRATE_URL")
    monkeypatch.setenv("ONCEGATE_STORE_URL", "redis://h")
    assert command()[0] == 2


def test_a_server_that_is_not_there(command: Command) -> None:
    code, said = command("--url", "postgresql://owner:secret@127.0.0.1:1/db")
    assert code == 1
    assert said.startswith("migrate: cannot connect: ")
    assert "secret" not in said
