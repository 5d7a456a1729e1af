"""Watches the open keys of a store: how many there are, how old the oldest is, and which are about to expire undecided.

All replicas share the work: in each period one of them counts at a server, and the others take over what it noted.

Once an hour one of them looks at every key that somebody may have to decide. In Redis it also looks at every record,
because the index does not have all: it drops the responses of expired keys, whose tombstones stay, and gives entries to
open records of versions that write none. A store that was used before there was an index is looked through at once.
"""

import asyncio
from collections.abc import Callable

from oncegate.decision import HOLD
from oncegate.store.open_keys.places import FIRST, OpenCount, OpenCounts, Place, add_counts
from oncegate.store.open_keys.records import ServerRecords
from oncegate.store.record import ViewState
from oncegate.store.record_name import record_id
from oncegate.store.record_view import UNDECIDED, OpenKind, RecordView, StoreError, claim_of
from oncegate.store.store import Store

# Between two counts, and how long one keeps other replicas from another.
COUNT_S = 10.0
COUNT_MS = int(COUNT_S * 900)
# Between two looks at all that is undecided, after a start, and while there is no index.
PERIOD_S, START_S, BUILD_S = 3600.0, 10.0, 60.0
# How long a look keeps other replicas from another one. Less than the period, so that each period has one.
SHARED_MS = int(PERIOD_S * 900)
COUNT, SCAN, BUILD = b"counts", b"scan", b"indexing"
# Between two pages of keys: a scan of a million records takes up to four minutes, and 2 % of a core.
PAGE, PAGE_PAUSE_S = 500, 0.1
# How long before its end a key is reported, and how many keys of one look are named.
WARN_MS = 7 * 86_400_000
NAMED = 20
# For marking one key.
MARK_S = 1.0


class UnknownKeys:
    """The open keys of a store, as of the last count of any replica.

    `retention_ms`: of a complete response; a partial one is removed after as long. `warn(event, **fields)` is called
    with keys that expire soon, and when the store cannot be asked for the first time.
    """

    def __init__(self, store: Store, retention_ms: int, unknown_retention_ms: int, warn: Callable[..., None]) -> None:
        self._store, self._retention_ms, self._warn = store, retention_ms, warn
        # Where unknown keys live for less than a few weeks, a week would be most of their life.
        self._warn_ms = min(WARN_MS, unknown_retention_ms // 4)
        # By server.
        self._counts: dict[str, OpenCounts] = {}
        self._expiring: dict[str, int] = {}
        self._swept: dict[str, Place | None] = {}
        self._warned_of: set[str] = set()
        # Whether it says what keeps it from counting: of several workers one does, as all would say the same.
        self.says_failures = True

    @property
    def counts(self) -> OpenCounts:
        return add_counts(list(self._counts.values()))

    @property
    def count(self) -> int:
        """How many keys somebody may have to decide."""
        return sum(self.counts[kind].keys for kind in UNDECIDED)

    @property
    def expiring(self) -> int:
        return sum(self._expiring.values())

    async def run(self) -> None:
        """Count and look, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._count_often())
            tasks.create_task(self._look_hourly())

    async def _count_often(self) -> None:
        while True:
            await asyncio.sleep(COUNT_S)
            await self.recount()

    async def _look_hourly(self) -> None:
        pause_s = START_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = PERIOD_S if await self.look() else BUILD_S

    # Counts ...

    async def recount(self) -> None:
        """Count at each server where no other replica did so within the period."""
        servers = self._store.records.servers
        self._counts = {server.name: self._counts.get(server.name, {}) for server in servers}
        for server in servers:
            try:
                noted = await server.reserve(COUNT, COUNT_MS)
                if noted is None:
                    await self._count(server)
                elif noted:
                    self._counts[server.name] = read_counts(noted)
            except StoreError as error:
                self._warn_once("cannot count open keys", server, str(error))

    async def _count(self, server: ServerRecords) -> None:
        if not await server.index.is_complete():
            return
        # A page in each period: what ended without its owner is no more than a few.
        self._swept[server.name] = await server.index.sweep(self._swept.get(server.name) or FIRST)
        counts = self._counts[server.name] = await server.index.counts()
        await server.note(COUNT, write_counts(counts))

    # What is undecided ...

    async def look(self) -> bool:
        """Look at each server where no other replica did so within the hour. Return whether an hour may pass now."""
        servers, are_complete = self._store.records.servers, True
        self._expiring = {server.name: self._expiring.get(server.name, 0) for server in servers}
        for server in servers:
            try:
                is_complete = await server.index.is_complete()
                noted = await server.reserve(SCAN if is_complete else BUILD, SHARED_MS)
                if noted is None:
                    expiring = self._expiring[server.name] = await self._look_at(server, is_complete)
                    if not is_complete:
                        # Nobody has to look again within the hour.
                        await server.reserve(SCAN, SHARED_MS)
                    await server.note(SCAN, b"%d" % expiring)
                elif noted:
                    self._expiring[server.name] = int(noted)
                # Else another replica gives open keys their entries now.
                are_complete = are_complete and (is_complete or noted is None)
            except StoreError as error:
                self._warn_once("cannot scan for unknown keys", server, str(error))
        return are_complete

    async def _look_at(self, server: ServerRecords, is_complete: bool) -> int:
        """Look at one server, and return how many keys expire soon."""
        if server.needs_scans or not is_complete:
            await self._scan(server)
        if not is_complete and not await server.index.is_complete():
            self._warn_once("open keys are not counted", server, "the store's user may not write their index")
            return 0
        named, place = 0, ""
        while True:
            page = await server.index.page(PAGE, place, UNDECIDED)
            for record in page.records:
                named += await self._look_at_key(record, named)
            if not (place := page.after):
                return named
            await asyncio.sleep(PAGE_PAUSE_S)

    async def _scan(self, server: ServerRecords) -> None:
        """Look at every record of a server about which there may be something to do."""
        await server.index.begin()
        async for record in server.scan_due(PAGE_PAUSE_S):
            if record.state is ViewState.EXPIRED and record.response is not None:
                await self._store.drop(record)
            if record.open_kind is not None:
                await server.index.enter([record])
        await server.index.note_complete()

    async def _look_at_key(self, record: RecordView, named: int) -> bool:
        """Drop what a dead owner stored, and return whether the key expires soon. `named`: how many were named."""
        left_ms = record.left_ms
        if left_ms > 0 and record.bytes_stored and record.lapsed_ms > self._retention_ms:
            await self._store.mark_unknown(claim_of(record, left_ms), record.reason, MARK_S)
        # The key of a form is kept for minutes: nobody could decide it in time.
        is_short_lived = record.now_ms - record.created_ms + left_ms < self._retention_ms
        if record.mode != HOLD or not 0 <= left_ms < self._warn_ms or is_short_lived:
            return False
        if named < NAMED:
            self._warn("unknown outcome expires soon", key_id=record_id(record.key), hours=left_ms // 3_600_000)
        return True

    def _warn_once(self, event: str, server: ServerRecords, reason: str) -> None:
        if self.says_failures and event not in self._warned_of:
            self._warned_of.add(event)
            self._warn(event, server=server.name, reason=reason)


def write_counts(counts: OpenCounts) -> bytes:
    """Return counts as a note for other replicas."""
    return b" ".join(b"%d %d" % counts.get(kind, OpenCount()) for kind in OpenKind)


def read_counts(noted: bytes) -> OpenCounts:
    """Return the counts in a note, none for any other text: a later version may write more."""
    numbers = [int(word) for word in noted.split(b" ") if word.isdigit()]
    pairs = zip(OpenKind, numbers[::2], numbers[1::2], strict=False)
    return {kind: OpenCount(keys, oldest_ms) for kind, keys, oldest_ms in pairs}
