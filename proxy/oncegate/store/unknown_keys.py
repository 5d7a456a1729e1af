"""Scans the store for unknown keys, so that an operator hears of them before they expire.

Each server is scanned once an hour, by one of the replicas. The scan also drops what nobody needs any more: responses
of expired keys, whose tombstones stay, and what an owner that died had stored of a response.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from oncegate.decision import HOLD
from oncegate.store.record import ViewState
from oncegate.store.record_name import record_id
from oncegate.store.record_view import ServerRecords, StoreError, claim_of
from oncegate.store.store import Store

# Between two scans, and after a start.
PERIOD_S, START_S = 3600.0, 10.0
# How long a scan keeps other replicas from another one. Less than the period, so that each period has one.
SHARED_MS = int(PERIOD_S * 900)
# Between two pages of keys: a scan of a million records takes up to two minutes.
PAGE_PAUSE_S = 0.05
# How long before its end a key is reported, and how many keys of one scan are named.
WARN_MS = 7 * 86_400_000
NAMED = 20
# For marking one key.
MARK_S = 1.0


@dataclass(slots=True)
class Found:
    """What one scan of a server found: how many keys are unknown, and which of them expire soon."""

    unknown: int = 0
    expiring: int = 0


class UnknownKeys:
    """The unknown keys of a store, as of this replica's last scan; none while another replica scans.

    Keys in the mode `retry` do not count: the next request with such a key executes.
    `retention_ms`: of a complete response; a partial one is removed after as long. `warn(event, **fields)` is called
    with keys that expire soon, and when a scan fails for the first time.
    """

    def __init__(self, store: Store, retention_ms: int, unknown_retention_ms: int, warn: Callable[..., None]) -> None:
        self._store, self._retention_ms, self._warn = store, retention_ms, warn
        # Where unknown keys live for less than a few weeks, a week would be most of their life.
        self._warn_ms = min(WARN_MS, unknown_retention_ms // 4)
        self._found: dict[str, Found] = {}
        self._has_failed = False

    @property
    def count(self) -> int:
        return sum(found.unknown for found in self._found.values())

    @property
    def expiring(self) -> int:
        return sum(found.expiring for found in self._found.values())

    async def run(self) -> None:
        """Scan once an hour, until cancelled."""
        pause_s = START_S
        while True:
            await asyncio.sleep(pause_s)
            await self.scan()
            pause_s = PERIOD_S

    async def scan(self) -> None:
        """Scan each server that no other replica scanned within the hour."""
        found: dict[str, Found] = {}
        for server in self._store.records.servers:
            try:
                if await server.reserve_scan(SHARED_MS):
                    found[server.name] = await self._scan_server(server)
            except StoreError as error:
                self._report_failure(server, error)
        self._found = found

    async def _scan_server(self, server: ServerRecords) -> Found:
        found = Found()
        async for record in server.scan(pause_s=PAGE_PAUSE_S):
            if record.state is ViewState.EXPIRED and record.response is not None:
                await self._store.drop(record)
            if record.state is not ViewState.UNKNOWN or record.mode != HOLD:
                continue
            found.unknown += 1
            left_ms = record.left_ms
            if left_ms > 0 and record.bytes_stored and record.lapsed_ms > self._retention_ms:
                await self._store.mark_unknown(claim_of(record, left_ms), record.reason, MARK_S)
            # The key of a form is kept for minutes: nobody could decide it in time.
            is_short_lived = record.now_ms - record.created_ms + left_ms < self._retention_ms
            if 0 <= left_ms < self._warn_ms and not is_short_lived:
                found.expiring += 1
                if found.expiring <= NAMED:
                    self._warn("unknown outcome expires soon", key_id=record_id(record.key), hours=left_ms // 3_600_000)
        return found

    def _report_failure(self, server: ServerRecords, error: StoreError) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._warn("cannot scan for unknown keys", server=server.name, reason=str(error))
