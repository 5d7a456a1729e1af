"""Open keys of a whole store, the oldest first, and those of a server without an index.

Every open key has a place among all others, so a page of a whole store is the first of the pages of its servers.
"""

import asyncio
from collections.abc import Collection

from oncegate.store.open_keys.places import OpenCount, OpenCounts, OpenPage, add_counts, page_of, place_of, read_place
from oncegate.store.open_keys.records import Records, ServerRecords
from oncegate.store.record_view import UNDECIDED, OpenKind


async def open_keys(records: Records, limit: int, after: str = "", kinds: Collection[OpenKind] = UNDECIDED) -> OpenPage:
    """Return the oldest open keys of a whole store, as `ServerRecords.open_keys` does of one server."""
    pages = await asyncio.gather(*[server.open_keys(limit, after, kinds) for server in records.servers])
    found = {one.key: one for page in pages for one in page.records}
    return page_of(found.values(), limit, any(page.after for page in pages))


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
