"""Pages of open keys, the oldest first, of one server or of a whole store.

Every open key has a place among all others, so that a page of a whole store is the first of the pages of its servers.
"""

import asyncio
import heapq
from collections.abc import Collection, Sequence

from oncegate.store.record_name import parse_record_id, record_id
from oncegate.store.record_view import (
    UNDECIDED,
    OpenCount,
    OpenCounts,
    OpenKind,
    OpenPage,
    Records,
    RecordView,
    ServerRecords,
)


def place_of(record: RecordView) -> tuple[int, bytes]:
    """Return the place of an open key among the others. It stays the same until its lease or its state changes."""
    return record.since_ms, record.key


def write_place(place: tuple[int, bytes]) -> str:
    return f"{place[0]}-{record_id(place[1])}"


def read_place(text: str) -> tuple[int, bytes]:
    """Return the place that a page has named, or the first for an empty text. Raises ValueError."""
    since, _, name = text.partition("-")
    if not text:
        return 0, b""
    if not since.isdigit() or len(since) > 15 or (key := parse_record_id(f"once:{{{name}}}")) is None:
        raise ValueError("no place in the list of open keys")
    return int(since), key


def page_of(records: Collection[RecordView], limit: int, has_more: bool = False) -> OpenPage:
    """Return the first of some open keys as a page. `has_more`: there are others behind these."""
    first = heapq.nsmallest(limit, records, key=place_of)
    return OpenPage(first, write_place(place_of(first[-1])) if first and (has_more or len(records) > limit) else "")


def add_counts(counts: Sequence[OpenCounts]) -> OpenCounts:
    """Return the counts of several servers as one."""
    by_kind = {kind: [one[kind] for one in counts if kind in one] for kind in OpenKind}
    return {
        kind: OpenCount(sum(one.keys for one in ones), max((one.oldest_ms for one in ones), default=0))
        for kind, ones in by_kind.items()
    }


# Of a whole store ...


async def open_keys(records: Records, limit: int, after: str = "", kinds: Collection[OpenKind] = UNDECIDED) -> OpenPage:
    """Return the oldest open keys of a whole store, as `ServerRecords.open_keys` does of one server."""
    pages = await asyncio.gather(*[server.open_keys(limit, after, kinds) for server in records.servers])
    return page_of([one for page in pages for one in page.records], limit, any(page.after for page in pages))


async def open_counts(records: Records) -> OpenCounts:
    """Return how many open keys of each kind a whole store has. Raises StoreError."""
    return add_counts(await asyncio.gather(*[server.open_counts() for server in records.servers]))


# Without an index ...


async def scanned_open_keys(server: ServerRecords, limit: int, after: str, kinds: Collection[OpenKind]) -> OpenPage:
    """Find open keys by looking at every record."""
    place, wanted = read_place(after), frozenset(kinds)
    found = [one async for one in server.scan() if one.open_kind in wanted and place_of(one) > place]
    return page_of({one.key: one for one in found}.values(), limit)


async def scanned_open_counts(server: ServerRecords) -> OpenCounts:
    """Count open keys by looking at every record."""
    found = {one.key: one async for one in server.scan() if one.open_kind is not None}
    counts: OpenCounts = dict.fromkeys(OpenKind, OpenCount())
    for one in found.values():
        if (kind := one.open_kind) is not None:
            keys, oldest_ms = counts[kind]
            counts[kind] = OpenCount(keys + 1, max(oldest_ms, one.now_ms - one.since_ms))
    return counts
