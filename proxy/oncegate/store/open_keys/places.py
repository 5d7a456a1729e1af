"""Places of open keys among all others, the oldest first, so that they can be read page by page. Pure."""

import heapq
from collections.abc import Collection, Sequence
from typing import NamedTuple

from oncegate.store.record_name import RECORD_ID, record_id
from oncegate.store.record_view import OpenKind, RecordView

# The `since_ms` of an open key, and its id.
Place = tuple[int, str]
FIRST: Place = (0, "")


class OpenCount(NamedTuple):
    """How many open keys of one kind there are, and how long ago the `since_ms` of the oldest was."""

    keys: int = 0
    oldest_ms: int = 0


OpenCounts = dict[OpenKind, OpenCount]


class OpenPage(NamedTuple):
    """Some open keys, the oldest first. `after` names the place of the last, and is empty after the last page."""

    records: list[RecordView]
    after: str = ""


def place_of(record: RecordView) -> Place:
    """Return the place of an open key among the others. It stays the same until its lease or its state changes."""
    return record.since_ms, record_id(record.key)


def write_place(place: Place) -> str:
    return f"{place[0]}-{place[1]}"


def read_place(text: str) -> Place:
    """Return the place that a page has named, or the first for an empty text. Raises ValueError."""
    since, _, name = text.partition("-")
    if not text:
        return FIRST
    if not since.isdigit() or len(since) > 15 or not RECORD_ID.fullmatch(name):
        raise ValueError("no place in the list of open keys")
    return int(since), name


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
