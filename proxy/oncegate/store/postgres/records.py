"""The view of operators on the records in PostgreSQL. Nothing here changes a record."""

import asyncio
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from oncegate.keys.digests import KEY_DIGEST_BYTES
from oncegate.store.membership import LIVE_S
from oncegate.store.open_keys.index import OpenIndex
from oncegate.store.open_keys.listing import scanned_open_counts, scanned_open_keys
from oncegate.store.open_keys.places import OpenCounts, OpenPage
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.connections.session import Lost, Refused
from oncegate.store.postgres.open_index import PostgresEntries
from oncegate.store.postgres.rows import MODE_OF, STAGES
from oncegate.store.postgres.servers import Servers
from oncegate.store.record import PREFIX_BYTES, ViewState, self_check
from oncegate.store.record_name import record_id
from oncegate.store.record_view import UNDECIDED, OpenKind, RecordView, StoreError, read_fields

# For one reply.
TIMEOUT_S = 5.0
PAGE = 500
_ID_CHARACTERS = 32
# `stands`: not of a row that says no more than a missing one; what an operator released is shown.
_COLUMNS = """
SELECT key, state, token, fence, mode, fingerprint, tenant || self AS self, lease, created, why, stage, bytes, lease_ms,
       status, meta, kept, expires, frees, now_ms() AS now,
       state = 4 AND token <> '' OR NOT is_free(state, created, lease, lease_ms, frees, now_ms()) AS stands
FROM record
"""
_READ = f"{_COLUMNS} WHERE key = $1"
_READ_ALL = f"{_COLUMNS} WHERE key = ANY($1::bytea[])"
# Rows that do not stand count as well, so that a page is short work among any number of them.
_SCAN = f"{_COLUMNS} WHERE key > $1 AND key <= $2 ORDER BY key LIMIT {PAGE}"
_RESERVE = """
INSERT INTO lease AS held (name, owner, until) VALUES ($1, '', now_ms() + $2)
ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until WHERE held.until <= now_ms()
RETURNING name
"""
_NOTE = "UPDATE lease SET owner = $2 WHERE name = $1"
_NOTED = "SELECT owner FROM lease WHERE name = $1"
_PROXY = "SELECT name, now_ms() - at_ms AS age FROM proxy WHERE prefix = $1"
_INTRODUCE = """
INSERT INTO proxy (prefix, counter, name, retention_ms, at_ms) VALUES ($1, 0, $2, $3, now_ms())
ON CONFLICT (prefix) DO UPDATE SET name = excluded.name, retention_ms = excluded.retention_ms, at_ms = excluded.at_ms
"""
_IDENTITIES = "SELECT DISTINCT settings FROM proxy WHERE identity IS NOT NULL AND at_ms + retention_ms > now_ms()"
# The proxies that serve: others have no identity.
_LIVE = "SELECT name FROM proxy WHERE identity IS NOT NULL AND at_ms >= now_ms() - $1 ORDER BY name"
# A store without an epoch is in quarantine as soon as a proxy founds it.
_QUARANTINE = "UPDATE epoch SET until = greatest(until, now_ms() + $1)"
_STATES = {1: b"in_flight", 2: b"unknown", 4: b"released"}
_STAGES = {number: stage.wire for stage, number in STAGES.items()}


async def fetch(
    servers: Servers, level: Level, statement: str, *args: object, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """Return the rows of one statement. Raises StoreError."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + timeout_s
    session = await servers.free_session(level, ends)
    if session is None:
        raise StoreError(servers.not_ready_reason() or "no connection to the store was free in time")
    try:
        async with asyncio.timeout_at(ends):
            return (await session.run(statement, *args)).rows
    except (Lost, Refused) as failed:
        raise StoreError(failed.reason) from failed
    except TimeoutError:
        raise StoreError("the store did not reply in time") from None


def view(row: Mapping[str, Any]) -> RecordView | None:
    """Return the record in a row, or None for a key that is free."""
    if not row["stands"]:
        return None
    if row["state"] == 5:
        return _tombstone(row)
    numbers = [b"%d" % row[name] for name in ("fence", "lease", "created", "bytes", "lease_ms", "status")]
    fence, lease, created, size, lease_ms, status = numbers
    fields: list[bytes | None] = [
        row["meta"], _STATES.get(row["state"], b"?"), row["token"], fence, MODE_OF.get(row["mode"], b"?"),
        row["fingerprint"], row["self"], lease, created, row["why"], _STAGES.get(row["stage"]), size, lease_ms, status,
        b"%d" % row["expires"], row["kept"],
    ]  # fmt: skip
    record = read_fields(row["key"], fields, row["now"])
    if record is None:
        return None
    # A renewal leaves the end of the retention alone.
    renewed_ms = max(0, row["lease"] - row["lease_ms"] - row["created"]) if row["state"] == 1 else 0
    return record._replace(left_ms=max(0, row["frees"] + renewed_ms - row["now"]))


def _tombstone(row: Mapping[str, Any]) -> RecordView:
    """Return what stays of a record whose response was dropped."""
    key, check, token = row["key"], row["self"], row["token"]
    mode, fingerprint, tenant = MODE_OF.get(row["mode"], b"?"), row["fingerprint"], check[:16]
    is_whole = check == self_check(key, tenant, token, mode, fingerprint)
    return RecordView(
        key,
        ViewState.EXPIRED if is_whole else ViewState.CORRUPT,
        token,
        row["now"],
        fingerprint=fingerprint,
        tenant=tenant,
        created_ms=row["created"],
        status=row["status"],
        left_ms=max(0, row["frees"] - row["now"]),
    )


class PostgresRecords:
    """The records of a store, as `Records` and as its one server's `ServerRecords`."""

    name = "the store"
    # Housekeeping does what a scan would.
    needs_scans = False
    finds_prefixes = True

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self.index: OpenIndex = OpenIndex(PostgresEntries(partial(fetch, servers, Level.OFF), self._read_all))

    async def _read_all(self, keys: list[bytes]) -> list[RecordView]:
        rows = await fetch(self._servers, Level.OFF, _READ_ALL, keys)
        return [record for row in rows if (record := view(row)) is not None]

    @property
    def servers(self) -> Sequence["PostgresRecords"]:
        return [self]

    async def read(self, key: bytes) -> RecordView | None:
        rows = await fetch(self._servers, Level.OFF, _READ, key)
        return view(rows[0]) if rows else None

    async def scan_due(self, pause_s: float) -> AsyncIterator[RecordView]:
        async for record in self.scan("", pause_s):
            yield record

    async def scan(self, prefix: str = "", pause_s: float = 0.0) -> AsyncIterator[RecordView]:
        # Ids are the keys in base64url: those that begin alike are one range of keys.
        after, last = _first_key(prefix), urlsafe_b64decode(prefix.ljust(_ID_CHARACTERS, "_"))
        while rows := await fetch(self._servers, Level.OFF, _SCAN, after, last):
            for row in rows:
                if (record := view(row)) is not None and record_id(record.key).startswith(prefix):
                    yield record
            after = rows[-1]["key"]
            await asyncio.sleep(pause_s)

    async def open_keys(self, limit: int, after: str = "", kinds: Collection[OpenKind] = UNDECIDED) -> OpenPage:
        if await self.index.is_complete():
            return await self.index.page(limit, after, kinds)
        return await scanned_open_keys(self, limit, after, kinds)

    async def open_counts(self) -> OpenCounts:
        return await self.index.counts() if await self.index.is_complete() else await scanned_open_counts(self)

    async def reserve(self, work: bytes, lasts_ms: int) -> bytes | None:
        rows = await fetch(self._servers, Level.OFF, _RESERVE, work, lasts_ms)
        return None if rows else (await fetch(self._servers, Level.OFF, _NOTED, work))[0]["owner"]

    async def note(self, work: bytes, found: bytes) -> None:
        await fetch(self._servers, Level.OFF, _NOTE, work, found)

    async def proxy_of(self, token: bytes) -> tuple[str, int | None]:
        rows = await fetch(self._servers, Level.OFF, _PROXY, token[:PREFIX_BYTES])
        return (rows[0]["name"].decode("utf-8", "replace"), max(0, rows[0]["age"])) if rows else ("unknown", None)

    async def introduce(self, token: bytes, name: str, retention_ms: int) -> None:
        args = token[:PREFIX_BYTES], name.encode("utf-8", "replace"), retention_ms
        await fetch(self._servers, Level.OFF, _INTRODUCE, *args)

    async def identities(self) -> list[str]:
        return [row["settings"].decode() for row in await fetch(self._servers, Level.OFF, _IDENTITIES)]

    async def proxies(self) -> list[str]:
        rows = await fetch(self._servers, Level.OFF, _LIVE, int(LIVE_S * 1000))
        return [row["name"].decode("utf-8", "replace") for row in rows]

    async def unpack(self) -> int:
        raise StoreError("records in PostgreSQL have one layout: there is nothing to unpack")

    async def begin_quarantine(self, lasts_ms: int) -> None:
        await fetch(self._servers, Level.CLAIM, _QUARANTINE, lasts_ms)


def _first_key(prefix: str) -> bytes:
    """Return a key before all whose ids begin with `prefix`: the last one below the first of them."""
    first = int.from_bytes(urlsafe_b64decode(prefix.ljust(_ID_CHARACTERS, "A")), "big")
    return (first - 1).to_bytes(KEY_DIGEST_BYTES, "big") if first else b""
