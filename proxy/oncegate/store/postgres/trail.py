"""Reads the audit trail on a connection of its own. Nothing here changes anything."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from oncegate.store.postgres.audit import Entry, Finding, Head, verify, verify_without_entries

_COLUMNS = ", ".join(Entry._fields)
_BY_KEY = f"SELECT {_COLUMNS} FROM audit ORDER BY key, no, at"
_OF_KEY = f"SELECT {_COLUMNS} FROM audit WHERE key = $1 ORDER BY at, no"
_OF_DAY = f"SELECT {_COLUMNS} FROM audit WHERE day = $1 AND at >= $2 AND at < $3 ORDER BY at, key, no"
# From the place that the record names to that of each entry before. The index of times finds them.
_CHAIN = f"""
WITH RECURSIVE chain AS (
    SELECT last.* FROM record AS r, LATERAL
        (SELECT * FROM audit WHERE key = r.key AND at = r.audit_at AND no = r.audit_no LIMIT 1) AS last
    WHERE r.key = $1
    UNION ALL
    SELECT before.* FROM chain AS c, LATERAL
        (SELECT * FROM audit WHERE key = c.key AND at = c.before_at AND no = c.no - 1 LIMIT 1) AS before
)
SELECT {_COLUMNS} FROM chain ORDER BY no
"""
_HEADS = "SELECT key, audit_no, audit_at, audit_digest FROM record WHERE audit_no > 0 ORDER BY key"
_HEAD = "SELECT audit_no, audit_at, audit_digest FROM record WHERE key = $1"
_FIRST_DAY = "SELECT min(day) FROM partition_days('audit') AS day"
# Rows that come at once.
_PAGE = 1000

Connection = Any


class Checked(NamedTuple):
    """What was found of one key."""

    key: bytes
    entries: int
    has_record: bool
    findings: list[Finding]


async def chain_of(connection: Connection, key: bytes) -> list[Entry]:
    """Return the entries that the record of a key leads to, the first one first. Empty without a record."""
    async with connection.transaction(readonly=True):
        await connection.execute("SET LOCAL enable_seqscan = off")
        return [Entry(*row) for row in await connection.fetch(_CHAIN, key)]


async def entries_of(connection: Connection, key: bytes) -> list[Entry]:
    """Return all entries of a key, by their time. It reads the whole trail, which has no index of keys."""
    return [Entry(*row) for row in await connection.fetch(_OF_KEY, key)]


async def head_of(connection: Connection, key: bytes) -> tuple[Head | None, int]:
    """Return what the record of a key says of its last entry, None without a record; and the trail's oldest day."""
    row = await connection.fetchrow(_HEAD, key)
    return Head(*row) if row else None, int(await connection.fetchval(_FIRST_DAY))


async def export(connection: Connection, since_ms: int, until_ms: int) -> AsyncIterator[Entry]:
    """Yield the entries from `since_ms` to before `until_ms`, a day at a time."""
    for row in await connection.fetch("SELECT day FROM partition_days('audit') AS day ORDER BY day"):
        async with connection.transaction(readonly=True):
            async for entry in connection.cursor(_OF_DAY, row[0], since_ms, until_ms, prefetch=_PAGE):
                yield Entry(*entry)


async def check(connection: Connection, audit_key: bytes) -> AsyncIterator[Checked]:
    """Yield what there is to say of each key, in one look at the trail and the records.

    Both are read in the order of their keys, side by side.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        first_day = await connection.fetchval(_FIRST_DAY)
        heads = aiter(connection.cursor(_HEADS, prefetch=_PAGE))
        row = await anext(heads, None)
        async for key, entries in _by_key(connection):
            while row is not None and row[0] < key:
                yield Checked(row[0], 0, True, verify_without_entries(row[0], Head(*row[1:]), first_day))
                row = await anext(heads, None)
            head = Head(*row[1:]) if row is not None and row[0] == key else None
            yield Checked(key, len(entries), head is not None, verify(entries, head, first_day, audit_key))
            if head is not None:
                row = await anext(heads, None)
        while row is not None:
            yield Checked(row[0], 0, True, verify_without_entries(row[0], Head(*row[1:]), first_day))
            row = await anext(heads, None)


async def _by_key(connection: Connection) -> AsyncIterator[tuple[bytes, list[Entry]]]:
    """Yield each key of the trail with its entries."""
    entries: list[Entry] = []
    async for row in connection.cursor(_BY_KEY, prefetch=_PAGE):
        entry = Entry(*row)
        if entries and entries[0].key != entry.key:
            yield entries[0].key, entries
            entries = []
        entries.append(entry)
    if entries:
        yield entries[0].key, entries
