"""The keys that a person may have to decide: which of them an operator means, and decisions about many at once."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

from oncegate.operating.decisions import CANCEL, NOT_CARRIED_OUT, Decision, Desk, cancel, refusal, release, resolve
from oncegate.reconcile.answers import GivenResponse
from oncegate.store.open_keys.places import OpenCounts, OpenPage, add_counts, page_of, place_of, write_place
from oncegate.store.record_name import record_id
from oncegate.store.record_view import UNDECIDED, OpenKind, RecordView
from oncegate.store.results import ResolveStatus
from oncegate.store.store import Store

# Keys that the store returns at once, and the most that one search looks at.
PAGE, LOOKED_AT = 500, 20_000


@dataclass(frozen=True, slots=True)
class Filter:
    """Which open keys an operator means. An empty part means any.

    `text`: in the note, the reason or the progress, in any case, or at the beginning of the id. `rule`: its name.
    `status`: of the response that came.
    """

    text: str = ""
    rule: str = ""
    status: str = ""

    @property
    def is_set(self) -> bool:
        return bool(self.text or self.rule or self.status)

    def matches(self, record: RecordView) -> bool:
        """Return whether an operator means this key."""
        if self.rule and record.kept.rule != self.rule:
            return False
        if self.status and str(record.status or "none") != self.status:
            return False
        text = self.text.casefold()
        said = (record.kept.note, record.reason, record.progress)
        return record_id(record.key).startswith(self.text) or any(text in one.casefold() for one in said)


@dataclass(frozen=True, slots=True)
class Seen:
    """A key as an operator saw it: whose it was, and in which state."""

    key: bytes
    token: bytes
    state: str

    @classmethod
    def of(cls, record: RecordView) -> "Seen":
        return cls(record.key, record.token, record.state.value)


async def has_whole_index(store: Store) -> bool:
    """Return whether the index has every open key: it lacks some for a while after an upgrade. Raises StoreError."""
    return all(await asyncio.gather(*[server.index.is_complete() for server in store.records.servers]))


async def indexed_counts(store: Store) -> OpenCounts:
    """Return how many open keys of each kind the index has, without a look at any record. Raises StoreError."""
    return add_counts(await asyncio.gather(*[server.index.counts() for server in store.records.servers]))


async def worklist(
    store: Store, wanted: Filter, limit: int, after: str = "", kinds: Collection[OpenKind] = UNDECIDED
) -> OpenPage:
    """Return the oldest keys of the index behind the place `after` that an operator means.

    It looks at LOOKED_AT keys at most: `after` of the page then says where to go on. Raises StoreError, and ValueError
    for an `after` that no page gave.
    """
    found: list[RecordView] = []
    looked_at, size = 0, PAGE if wanted.is_set else limit
    while True:
        pages = await asyncio.gather(*[one.index.page(size, after, kinds) for one in store.records.servers])
        page = page_of([one for page in pages for one in page.records], size, any(page.after for page in pages))
        found += [record for record in page.records if wanted.matches(record)]
        looked_at, after = looked_at + len(page.records), page.after
        if len(found) > limit:
            return OpenPage(found[:limit], write_place(place_of(found[limit - 1])))
        if not after or not wanted.is_set or looked_at >= LOOKED_AT:
            return OpenPage(found, after)


async def read_seen(store: Store, action: str, seen: Seen) -> RecordView | str:
    """Return a key's record if an operator has seen it as it is, else what has changed. Raises StoreError."""
    record = await store.records.read(seen.key)
    if record is None:
        return NOT_CARRIED_OUT[ResolveStatus.ABSENT]
    if record.token != seen.token:
        return NOT_CARRIED_OUT[ResolveStatus.FENCED]
    # Its owner may have come back to life: what it does now was not seen either.
    if record.state.value != seen.state or refusal(action, record):
        return f"it is {record.state.value} by now; nothing was changed"
    return record


async def decide_seen(desk: Desk, action: str, seen: Seen, given: GivenResponse | None) -> Decision | str:
    """Decide about a key as an operator saw it, or return what has changed. `given`: the response, to resolve it.

    Raises StoreError.
    """
    record = await read_seen(desk.store, action, seen)
    if isinstance(record, str):
        return record
    if action == CANCEL:
        return await cancel(desk, record)
    return await (resolve(desk, record, given) if given is not None else release(desk, record))
