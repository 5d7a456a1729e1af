"""Housekeeping: responses whose retention is over are dropped, and the rows of keys that are free by now are removed.

It changes no answer: the state of a key is a function of its row and the clock, whether somebody has been there or not.
Of all workers of all proxies one does it. It goes through the table from its first block to its last, a few blocks in a
statement, and rests after each, so that claims hardly notice. Days of bodies and of the audit trail are dropped by
`oncegate migrate --maintain`, whose role owns them.
"""

import asyncio
import random
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.records import fetch
from oncegate.store.postgres.servers import Servers
from oncegate.store.record_view import StoreError
from oncegate.store.store import Upkeep

# Between two passes, and between two tries of a worker that does not have the work.
REST_S = 60.0
# How long the work is a worker's after its last statement.
TERM_MS = 30_000
# Of one statement: how many rows it should find due at most, and the time up to which the next one takes more blocks.
# Short steps let claims have the processor in between. Where the work is late they are larger: up to GROWN times.
MOST_ROWS, GROWN, STEP_S = 24, 5.0, 0.002
MIN_BLOCKS, MAX_BLOCKS = 8, 8192
# The pause after a statement, in times of its own. The further behind the work is, the shorter the pause. There is none
# once records stay for a tenth longer than they should, or for LATE_MS longer, or once a pass takes as long: what it
# has left behind waits for the next. So the work is done at the pace at which keys come, whatever that is. A busy
# machine, on which statements take long, does not make it slow.
REST, MAX_PAUSE_S = 8.0, 0.05
LATE_SHARE, LATE_MS = 0.1, 600_000
_SWEEP = "SELECT * FROM sweep_1($1, $2, $3, $4, $5, $6, $7)"
# A transaction that has written keeps old versions alive as well, also where it has no snapshot now. A role without
# pg_read_all_stats sees its own snapshots alone.
_MEASURE = """
SELECT pg_total_relation_size('record') AS record_bytes,
       (SELECT coalesce(sum(pg_total_relation_size(inhrelid)), 0)::bigint FROM pg_inherits
        WHERE inhparent = 'chunk'::regclass) AS chunk_bytes,
       (SELECT coalesce(sum(pg_total_relation_size(inhrelid)), 0)::bigint FROM pg_inherits
        WHERE inhparent = 'audit'::regclass) AS audit_bytes,
       coalesce(n_tup_hot_upd::float8 / nullif(n_tup_upd, 0), 1) AS hot_ratio,
       coalesce(n_dead_tup::float8 / nullif(n_live_tup + n_dead_tup, 0), 0) AS dead_ratio,
       (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(xact_start)), 0)::float8 FROM pg_stat_activity
        WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND pid <> pg_backend_pid()) AS snapshot_s
FROM pg_stat_user_tables WHERE relid = 'record'::regclass
"""


class Housekeeping:
    """The housekeeping of one worker. `owner` names it; `tail`: whether to audit, and the secret's blocks for that."""

    def __init__(self, servers: Servers, owner: bytes, tail: tuple[bool, bytes]) -> None:
        self._servers, self._owner, self._tail = servers, owner, tail
        self._clock = asyncio.get_running_loop().time
        self._blocks = MIN_BLOCKS
        # By the last step that found work: how late that was, and how late it may be.
        self._late_ms, self._may_be_late_ms = 0.0, float(LATE_MS)
        # What the last pass found, and how far behind this one is so far; all 0 where another worker does the work.
        self._found, self._behind_ms = Upkeep(), 0

    @property
    def upkeep(self) -> Upkeep:
        # A pass that takes long must not hide how far behind it is.
        return replace(self._found, behind_s=max(self._found.behind_s, self._behind_ms / 1000))

    async def run(self) -> None:
        """Go through the table again and again, until cancelled."""
        while True:
            # Not all workers at once.
            await asyncio.sleep(REST_S * random.uniform(0.5, 1.0))
            # Without a reply, or with another database: the next pass begins anew.
            with suppress(StoreError):
                await self.sweep()

    async def sweep(self) -> Upkeep:
        """Go through the table once, if no other worker does, and return what that found. Raises StoreError."""
        first, self._behind_ms, began = 0, 0, self._clock()
        while (found := await self._step(first)) is not None:
            first, self._behind_ms = first + self._blocks, max(self._behind_ms, found["behind"])
            if due := found["expired"] + found["removed"]:
                self._late_ms = found["behind"]
                self._may_be_late_ms = max(1.0, min(LATE_MS, found["life"] * LATE_SHARE))
            if first >= found["blocks"]:
                self._found = await self._measure()
                return self._found
            lateness = self._lateness(self._clock() - began)
            await asyncio.sleep(pause_s(self._took_s, lateness))
            most_rows = MOST_ROWS * min(GROWN, 1.0 + lateness)
            self._blocks = fitting(self._blocks, due, self._took_s, most_rows)
        self._found = Upkeep()
        return self._found

    def _lateness(self, pass_s: float) -> float:
        """Return how late the work is, as a share of how late it may be. `pass_s`: how long this pass has taken."""
        return max(self._late_ms, pass_s * 1000) / self._may_be_late_ms

    async def _step(self, first: int) -> Any | None:
        """Look at the next blocks. Return what was found, or None if another worker does the work."""
        began = self._clock()
        args = first, self._blocks, int(time.time() * 1000), self._owner, TERM_MS
        (row,) = await fetch(self._servers, Level.OFF, _SWEEP, *args, *self._tail)
        self._took_s = self._clock() - began
        return None if row["blocks"] is None else row

    async def _measure(self) -> Upkeep:
        (row,) = await fetch(self._servers, Level.OFF, _MEASURE)
        return Upkeep(behind_s=self._behind_ms / 1000, **dict(row))


def pause_s(took_s: float, lateness: float) -> float:
    """Return how long to rest after a step. `lateness`: the share of the time that the work may be late."""
    return min(MAX_PAUSE_S, took_s * REST * max(0.0, 1.0 - lateness))


def fitting(blocks: int, due: int, took_s: float, most_rows: float = MOST_ROWS) -> int:
    """Return how many blocks fit into a step, after so many had so many rows that were due."""
    if due > most_rows or (due == 0 and took_s > 2 * STEP_S):
        return max(MIN_BLOCKS, blocks // 2)
    # Where there is work, the time says how busy the machine is: that alone must not keep the steps small.
    return min(MAX_BLOCKS, blocks * 2) if due < most_rows / 2 and (due or took_s < STEP_S) else blocks
