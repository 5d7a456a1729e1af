"""What an index of open keys is for, whatever keeps it: counts, pages, and sweeps that mend it.

What stands in the index is believed only once its record was read: an entry may outlive its record, which ends by
itself. Entries are swept page by page by whoever counts them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from oncegate.store.open_keys.places import FIRST, OpenCount, OpenCounts, OpenPage, Place, page_of, place_of, read_place
from oncegate.store.open_keys.scores import range_of, score_of, score_of_record, since_of
from oncegate.store.record import ViewState
from oncegate.store.record_name import record_id
from oncegate.store.record_view import OpenKind, RecordView

# Entries that a server looks through before it serves others.
PAGE = 500
# In a cluster a claim may come so long after its entry, whose lease is counted from before.
LATE_CLAIM_MS = 10_000


_SWEPT = (OpenKind.UNKNOWN, OpenKind.WAIVED, OpenKind.LAPSED)


class Entry(NamedTuple):
    """An entry of an index. `token`: of the claim that wrote it, empty where entries are written with their records."""

    score: int
    key: bytes
    token: bytes = b""
    # The part of the index that has it.
    part: bytes = b""

    @property
    def place(self) -> Place:
        return since_of(self.score), record_id(self.key)


Records = Mapping[bytes, RecordView | None]


class Entries(Protocol):
    """The entries that one server keeps. All raise StoreError."""

    async def is_complete(self) -> bool: ...

    async def begin(self) -> None:
        """Note that somebody gives every open record an entry from now on."""

    async def note_complete(self) -> None:
        """Note that every open record has an entry, unless what `begin` noted was lost meanwhile."""

    async def now_ms(self) -> int: ...

    async def first(self, ranges: Sequence[tuple[int, int]], limit: int, place: Place) -> list[Entry]:
        """Return the first entries with scores in these ranges, by their places, and behind this place."""

    async def count(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int | None]]:
        """Return for each range of scores how many entries there are, and the least score."""

    async def records(self, entries: Iterable[Entry]) -> Records:
        """Return the records of entries, None for none. What is on its way between servers is left out."""

    async def change(self, changes: Sequence[tuple[Entry, int | None]]) -> None:
        """Give entries another score, or remove them (None), if they are still as they were read."""

    async def enter(self, records: Collection[RecordView]) -> None:
        """Give open records an entry, where they lack one."""


class OpenIndex:
    """The index of the open keys on one server: which they are, without a look at any other. All raise StoreError."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        # Whether it has all open keys, and this proxy may write it. It lacks those from before there was an index.
        self.is_complete, self.enter = entries.is_complete, entries.enter
        self.begin, self.note_complete = entries.begin, entries.note_complete

    async def counts(self) -> OpenCounts:
        """Return how many entries of each kind there are."""
        now_ms = await self._entries.now_ms()
        found = await self._entries.count([range_of(kind, now_ms) for kind in OpenKind])
        ages = [0 if least is None else max(0, now_ms - since_of(least)) for _, least in found]
        return {kind: OpenCount(keys, age) for kind, (keys, _), age in zip(OpenKind, found, ages, strict=True)}

    async def page(self, limit: int, after: str, kinds: Collection[OpenKind]) -> OpenPage:
        """Return the oldest open keys of these kinds behind the place `after`. Raises ValueError for no such place."""
        start = place = read_place(after)
        found, wanted = dict[bytes, RecordView](), frozenset(kinds)
        now_ms = await self._entries.now_ms()
        while True:
            entries = await self._entries.first(_ranges(wanted, now_ms, place), limit, place)
            records = await self._entries.records(entries)
            for record in (records.get(entry.key) for entry in entries):
                if record is not None and record.open_kind in wanted and place_of(record) > start:
                    found[record.key] = record
            if len(entries) < limit or len(found) >= limit:
                return page_of(found.values(), limit, len(entries) == limit)
            place = entries[-1].place

    async def sweep(self, place: Place = FIRST) -> Place | None:
        """Mend a page of entries whose outcome is unknown, from a place on.

        Return the place of the next page, None after the last. Keys in flight are left out: their owners settle them.
        """
        now_ms = await self._entries.now_ms()
        entries = await self._entries.first(_ranges(_SWEPT, now_ms, place), PAGE, place)
        records = await self._entries.records(entries)
        mended = [(entry, mend(entry, records[entry.key], now_ms)) for entry in entries if entry.key in records]
        await self._entries.change([(entry, score) for entry, score in mended if score != entry.score])
        return entries[-1].place if len(entries) == PAGE else None


def _ranges(kinds: Collection[OpenKind], now_ms: int, place: Place) -> list[tuple[int, int]]:
    """Return the scores of the entries of these kinds that are not before a place."""
    ranges = [(range_of(kind, now_ms), score_of(kind, place[0])) for kind in kinds]
    return [(max(least, first), most) for (least, most), first in ranges if first <= most]


def mend(entry: Entry, record: RecordView | None, now_ms: int) -> int | None:
    """Return the score that an entry should have by its record, None if it should go."""
    if record is not None and record.state is ViewState.CORRUPT:
        return entry.score
    if record is None or (entry.token and record.token != entry.token):
        # In a cluster the claim that wrote it may yet come.
        may_come = bool(entry.token) and now_ms < entry.score + LATE_CLAIM_MS
        return entry.score if may_come else None
    return score_of_record(record)
