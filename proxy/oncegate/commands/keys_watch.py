"""`oncegate keys watch`: prints what changes of one key, or of all open keys, until it is interrupted."""

import argparse
import asyncio
import json
import sys
from datetime import UTC, datetime

from oncegate.operating.find_record import Finder, RecordName, open_records
from oncegate.operating.record_facts import facts_of, line_of
from oncegate.store.record_name import record_id
from oncegate.store.record_view import RecordView, StoreError
from oncegate.store.store import Store

# Of open keys that are watched, the oldest first: so many are one question of the store a moment.
MOST_KEYS = 1000
# For how many times as long as a look took, the store is left alone.
REST = 9
APPEARED, CHANGED, GONE = "appeared", "changed", "gone"


class Watch:
    """Compares what the store has with what was printed last."""

    def __init__(self, store: Store, is_json: bool) -> None:
        self._store, self._is_json = store, is_json
        self._known: dict[bytes, RecordView] = {}

    async def see(self, records: dict[bytes, RecordView]) -> None:
        """Print what is new among these records, what changed, and which are gone. Raises StoreError."""
        for key, record in records.items():
            before = self._known.get(key)
            if before is None or _looks(before) != _looks(record):
                await self._print(APPEARED if before is None else CHANGED, key, record)
        for key in self._known.keys() - records.keys():
            # No longer open: it is complete, or free, or behind more than MOST_KEYS others.
            found = await self._store.records.read(key)
            await self._print(GONE if found is None else CHANGED, key, found)
        self._known = records

    async def _print(self, change: str, key: bytes, record: RecordView | None) -> None:
        facts = {"id": record_id(key)} if record is None else await facts_of(self._store, record)
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._is_json:
            print(json.dumps({"at": at, "change": change, **facts}), flush=True)
        else:
            print(f"{at}  {change:8}  {facts['id'] if record is None else line_of(facts)}", flush=True)


def _looks(record: RecordView) -> tuple[object, ...]:
    """Return what of a record is worth a line."""
    return record.state, record.token, record.progress, record.reason, record.status


async def watch(finder: Finder, name: RecordName, options: argparse.Namespace) -> None:
    """Ask the store again and again, and print what changes. A store that does not answer is waited for."""
    key = await finder.key(name) if name.names_record else None
    clock, seen = asyncio.get_running_loop().time, Watch(finder.store, options.json)
    ends_s = clock() + (options.lasts_s or float("inf"))
    while True:
        began_s, pause_s = clock(), options.interval
        try:
            await seen.see(await watched(finder.store, key))
            # Where a look takes long, as without an index, the store has nine times as long to itself.
            pause_s = max(pause_s, REST * (clock() - began_s))
        except StoreError as error:
            print(f"the store: {error}", file=sys.stderr)
        if clock() + pause_s > ends_s:
            break
        await asyncio.sleep(pause_s)


async def watched(store: Store, key: bytes | None) -> dict[bytes, RecordView]:
    """Return the record of a key if it has one, or for None the open records. Raises StoreError."""
    if key is not None:
        record = await store.records.read(key)
        return {} if record is None else {key: record}
    found: dict[bytes, RecordView] = {}
    async for one in open_records(store):
        found[one.key] = one
        if len(found) == MOST_KEYS:
            break
    return found
