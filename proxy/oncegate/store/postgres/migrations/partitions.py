"""The partitions of each day: made ahead of their day, and dropped when nobody needs anything in them any more.

A partition is made as a table of its own and attached, in one transaction. Attaching it does not conflict with readers
and writers of its parent. `CREATE TABLE ... PARTITION OF` needs the parent for itself: behind one long reader it stops
every claim (seen). For the same reason an old partition is detached concurrently before it is dropped.

A claim does not need the partition of its own day: without it, `partition_day` gives it the nearest one before.
"""

from datetime import date, timedelta
from typing import NamedTuple

from oncegate.store.postgres.migrations.run import Run

DAYS_AHEAD = 60
DAY_MS = 86_400_000
EPOCH = date(1970, 1, 1)
# A detach waits for the transactions that use its parent. Nobody waits for the detach.
DETACH_WAIT_MS = 5000

# The statements that are missing, each of them one transaction. A table that is there was detached by somebody.
_MISSING = """\
SELECT format('CREATE TABLE IF NOT EXISTS %1$I (LIKE %2$I INCLUDING ALL);'
    ' ALTER TABLE %2$I ATTACH PARTITION %1$I FOR VALUES FROM (%3$s) TO (%4$s)',
    parent || to_char(date '1970-01-01' + day, '_YYYYMMDD'), parent, day, day + 1)
FROM (SELECT floor(extract(epoch FROM clock_timestamp()) / 86400)::integer AS today) AS clock,
    generate_series(today, today + {days_ahead}) AS day, unnest(ARRAY['audit', 'chunk']) AS parent
WHERE NOT EXISTS (SELECT FROM partition_days(parent) AS there WHERE there = day)
ORDER BY parent, day"""
_NOW_MS = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_TABLES = """\
SELECT relname, inhrelid IS NOT NULL AS is_attached, coalesce(inhdetachpending, false) AS is_leaving
FROM pg_class LEFT JOIN pg_inherits ON inhrelid = pg_class.oid
WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' AND relname ~ '^(audit|chunk)_[0-9]{8}$'
ORDER BY relname"""
# Days of bodies that are kept, or whose exchange goes on. It reads all records, as no index has their days.
_NEEDED_CHUNKS = "SELECT DISTINCT bucket FROM record WHERE bucket = ANY($1::integer[]) AND (state = 1 OR expires > $2)"


class Partition(NamedTuple):
    """The table of one day. `day` counts from 1970-01-01 (UTC). `is_leaving`: a detach of it did not end."""

    parent: str
    day: int
    is_attached: bool = False
    is_leaving: bool = False

    @property
    def name(self) -> str:
        """Return the name of the table, such as audit_20270131."""
        return f"{self.parent}_{EPOCH + timedelta(self.day):%Y%m%d}"


def missing_partitions(days_ahead: int = DAYS_AHEAD) -> str:
    """Return the query for the statements that make the partitions that are missing from today on."""
    return _MISSING.format(days_ahead=days_ahead)


async def drop_partitions(run: Run, audit_retention_ms: int) -> tuple[list[str], list[str]]:
    """Drop the partitions that nobody needs any more. Raises MigrationError.

    Return the names of those that were dropped, and of those that are left for the next run, as something reads them.
    """
    now_ms = await run.value(_NOW_MS)
    partitions = await _partitions(run)
    unneeded = [
        *await _unneeded_chunks(run, [one for one in partitions if one.parent == "chunk"], now_ms),
        *await _unneeded_audit(run, [one for one in partitions if one.parent == "audit"], now_ms - audit_retention_ms),
    ]
    dropped: list[str] = []
    kept: list[str] = []
    # A parent has one that leaves at a time, which goes first.
    busy = set()
    for partition in sorted(unneeded, key=lambda one: not one.is_leaving):
        if partition.parent not in busy and await _drop(run, partition):
            dropped.append(partition.name)
        else:
            busy.add(partition.parent)
            kept.append(partition.name)
    return dropped, kept


async def _unneeded_chunks(run: Run, partitions: list[Partition], now_ms: int) -> list[Partition]:
    # Around midnight, claims still write to the day before.
    old = [one for one in partitions if one.day < now_ms // DAY_MS - 1]
    if not old:
        return []
    needed = {row[0] for row in await run.rows(_NEEDED_CHUNKS, [one.day for one in old], now_ms)}
    return [one for one in old if one.day not in needed]


async def _unneeded_audit(run: Run, partitions: list[Partition], oldest_ms: int) -> list[Partition]:
    # A partition has entries of later days, too, if theirs were missing.
    needed = "SELECT EXISTS (SELECT FROM {} WHERE at >= $1)"
    old = [one for one in partitions if (one.day + 1) * DAY_MS <= oldest_ms]
    return [one for one in old if not await run.value(needed.format(one.name), oldest_ms)]


async def _partitions(run: Run) -> list[Partition]:
    found = []
    for row in await run.rows(_TABLES):
        parent, _, day = row["relname"].partition("_")
        number = (date.fromisoformat(day) - EPOCH).days
        found.append(Partition(parent, number, row["is_attached"], row["is_leaving"]))
    return found


async def _drop(run: Run, partition: Partition) -> bool:
    """Detach and drop a partition. Return whether it is gone."""
    if partition.is_attached:
        how = "FINALIZE" if partition.is_leaving else "CONCURRENTLY"
        detach = f"ALTER TABLE {partition.parent} DETACH PARTITION {partition.name} {how}"
        if not await run.execute_patiently(detach, DETACH_WAIT_MS):
            return False
    await run.execute(f"DROP TABLE IF EXISTS {partition.name}")
    return True
