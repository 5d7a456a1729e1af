"""All records of a store as operators see them: one by its key, each in a scan, and the open ones by an index."""

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Protocol

from oncegate.store.open_keys.index import OpenIndex
from oncegate.store.open_keys.places import OpenCounts, OpenPage
from oncegate.store.record_view import UNDECIDED, OpenKind, RecordView


class ServerRecords(Protocol):
    """The records on one server of a store. `name` is its address for operators. All raise StoreError."""

    @property
    def name(self) -> str: ...

    @property
    def index(self) -> OpenIndex: ...

    @property
    def needs_scans(self) -> bool:
        """Whether work is left to those who look at every record now and then."""

    async def reserve(self, work: bytes, lasts_ms: int) -> bytes | None:
        """Reserve work that one of the replicas does. Nobody else gets it for `lasts_ms`.

        Return None if it is the caller's, else what whoever has it has noted, which may be empty.
        """

    async def note(self, work: bytes, found: bytes) -> None:
        """Note for the others what reserved work has found."""

    def scan(self, prefix: str = "") -> AsyncIterator[RecordView]:
        """Yield records as `Records.scan` does."""

    def scan_due(self, pause_s: float) -> AsyncIterator[RecordView]:
        """Yield the records that are open or past their retention, and perhaps others. `pause_s`: after each page."""

    async def open_keys(self, limit: int, after: str = "", kinds: Collection[OpenKind] = UNDECIDED) -> OpenPage:
        """Return a page as `OpenIndex.page` does, also where the index is not complete."""

    async def open_counts(self) -> OpenCounts:
        """Return counts as `OpenIndex.counts` does, also where the index is not complete."""


class Records(Protocol):
    """The records of a store for its operators. All raise StoreError.

    `finds_prefixes`: a scan for ids that begin alike looks at their records alone.
    """

    finds_prefixes: bool

    @property
    def servers(self) -> Sequence[ServerRecords]:
        """The servers that have records now, each with a part of them."""

    async def read(self, key: bytes) -> RecordView | None:
        """Return the record of a key, or None."""

    def scan(self, prefix: str = "") -> AsyncIterator[RecordView]:
        """Yield the records whose id begins with `prefix`.

        A record that comes or goes meanwhile may be left out, and any record may come twice.
        """

    async def proxy_of(self, token: bytes) -> tuple[str, int | None]:
        """Return the name of the proxy that made a token, and the ms since it last wrote its name (None: unknown)."""

    async def introduce(self, token: bytes, name: str, retention_ms: int) -> None:
        """Write the name behind a token, for operators who look at its record later."""

    async def identities(self) -> list[str]:
        """Return the settings by which the proxies on this store name keys."""

    async def proxies(self) -> list[str]:
        """Return the names of the proxies that were live a moment ago: one for each worker."""

    async def unpack(self) -> int:
        """Write packed records so that older versions read them, let these in again, and return how many there were.

        Raises StoreError while a proxy still packs records, and where a store has one layout alone.
        """

    async def begin_quarantine(self, lasts_ms: int) -> None:
        """Let the proxies that heed a quarantine refuse first-time keys for so long, as after a loss."""
