"""`python -m loadtest.soak.postgres [keys]`: so many keys in and out of a PostgreSQL, while housekeeping keeps up.

Keys come at half the rate that the machine can do. Each key is claimed and gets its response, expires, and leaves its
tombstone, which expires as well. Once the first keys are gone, the table must stay as large as it is. In every fifth
window of a few seconds housekeeping rests, so that one run has the times of claims with it and without it.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import asyncpg

from loadtest.bench.postgres_rows import migrate
from oncegate.keys.digests import Scope
from oncegate.messages.response_head import response_digest
from oncegate.server.embedded_postgres import EmbeddedPostgres
from oncegate.store.opening import open_store
from oncegate.store.postgres.housekeeping import Housekeeping
from oncegate.store.postgres.store import PostgresStore, hmac_pads
from oncegate.store.record import Claim, ClaimRequest, StoredResponse
from oncegate.store.record_view import StoreError
from oncegate.store.store import PostgresOptions, StoreConfig, Upkeep

PATIENCE_S = 20.0
SCOPE = Scope(b"default", b"n" * 16)
HEAD, BODY = b"X-Some: " + b"x" * 140 + b"\r\n", b"b" * 300
# How fast the machine is, is measured for so long, with so many calls at once.
MEASURED_S, CALLERS, RATE_SHARE = 5.0, 64, 0.5
# Where the machine can do less for a while, so many executions are under way at most.
MOST_RUNNING = 256
# How long a window is, as a share of the run and at most: what comes while housekeeping rests is late, and counts. It
# works in the next OPEN_WINDOWS.
WINDOW_SHARE, MAX_WINDOW_S, OPEN_WINDOWS = 0.01, 5.0, 4
# The share of the run after which the first keys are gone, and after which the table is compared.
LIVE_SHARE, SETTLED_SHARE = 0.2, 0.5
MOST_GROWTH, MOST_SLOWER = 1.5, 1.2
# Autovacuum looks once a minute by default, which is long where a day is a minute.
AUTOVACUUM = {"autovacuum_naptime": "1s", "shared_buffers": "512MB", "max_wal_size": "4GB"}


@dataclass(slots=True)
class Report:
    """What was seen. `claims_s`: the times of claims, while housekeeping rests and while it works."""

    keys: int = 0
    rate: float = 0.0
    lasted_s: float = 0.0
    live_bytes: int = 0
    most_bytes: int = 0
    claims_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    upkeep: Upkeep = field(default_factory=Upkeep)
    most_behind_s: float = 0.0
    most_dead: float = 0.0
    most_snapshot_s: float = 0.0

    def p99_s(self, works: bool) -> float:
        return quantiles(self.claims_s[works], n=100)[98]

    @property
    def growth(self) -> float:
        return self.most_bytes / self.live_bytes

    @property
    def slower(self) -> float:
        return self.p99_s(works=True) / self.p99_s(works=False)

    def lines(self) -> Iterator[str]:
        yield f"{self.keys} keys in and out, {self.keys / self.lasted_s:.0f} a second; {self.rate:.0f} were wanted"
        yield f"the table: {self.live_bytes / 1e6:.1f} MB with all live keys, then at most {self.growth:.2f} times that"
        times = [f"{self.p99_s(works) * 1000:.2f} ms" for works in (False, True)]
        yield f"p99 of a claim: {times[0]}, and {times[1]} while housekeeping works: {self.slower:.2f} times as long"
        yield f"housekeeping at most {self.most_behind_s:.1f} s behind; {self.upkeep.hot_ratio:.0%} of the updates HOT"
        yield f"at most {self.most_dead:.0%} of the rows dead, the oldest snapshot {self.most_snapshot_s:.1f} s old"

    def failures(self) -> list[str]:
        """Return what is off."""
        found = [f"the table grew to {self.growth:.2f} times the live set"] if self.growth > MOST_GROWTH else []
        return found + ([f"claims took {self.slower:.2f} times as long"] if self.slower > MOST_SLOWER else [])


class Windowed(Housekeeping):
    """Housekeeping that goes on where it was, whenever its window is open."""

    def __init__(self, store: PostgresStore) -> None:
        super().__init__(store._servers, b"the soak", (True, hmac_pads(b"k" * 32)))
        self.window = asyncio.Event()

    async def _step(self, first: int) -> Any | None:
        await self.window.wait()
        return await super()._step(first)


class Soak:
    """One run on one store. `lasts_ms`: how long a response is kept, and then its tombstone."""

    def __init__(self, store: PostgresStore, connection: asyncpg.Connection) -> None:
        self._store, self._keeper, self._connection = store, Windowed(store), connection
        self._lasts_ms = 60_000
        self.report = Report()

    async def execute(self) -> None:
        """Claim a key and store its response."""
        times = 60_000, self._lasts_ms, 2 * self._lasts_ms
        request = ClaimRequest(os.urandom(24), SCOPE, os.urandom(16), b"hold", *times, 0, self._lasts_ms)
        works, began = self._keeper.window.is_set(), time.perf_counter()
        claim = await self._store.claim(request)
        self.report.claims_s[works].append(time.perf_counter() - began)
        if not isinstance(claim, Claim):
            raise RuntimeError(f"not claimed: {claim}")
        await self._store.store(claim, response(), BODY, PATIENCE_S)

    async def rate(self) -> float:
        """Return how many keys a second the machine can do."""
        ends, done = time.monotonic() + MEASURED_S, 0

        async def call() -> None:
            nonlocal done
            while time.monotonic() < ends:
                await self.execute()
                done += 1

        await asyncio.gather(*[call() for _ in range(CALLERS)])
        return done / MEASURED_S

    async def run(self, keys: int) -> Report:
        report = self.report
        report.keys, report.rate = keys, await self.rate() * RATE_SHARE
        seconds = keys / report.rate
        self._lasts_ms = int(seconds * LIVE_SHARE / 2 * 1000)
        await self._connection.execute("TRUNCATE record")
        began = time.monotonic()
        window_s = min(MAX_WINDOW_S, seconds * WINDOW_SHARE)
        beside = [self._keep(), self._open_and_shut(window_s), self._watch(began, seconds)]
        tasks = [asyncio.create_task(one) for one in beside]
        await self._drive(keys, began)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return report

    async def _drive(self, keys: int, began: float) -> None:
        """Execute so many keys at an even rate, or as fast as the machine can do where that is less."""
        report, started = self.report, 0
        running: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            while started < keys:
                due = min(keys, int((time.monotonic() - began) * report.rate), started + MOST_RUNNING - len(running))
                for _ in range(due - started):
                    running.add(task := group.create_task(self.execute()))
                    task.add_done_callback(running.discard)
                started = max(started, due)
                await asyncio.sleep(0.002)
        report.lasted_s = time.monotonic() - began

    async def _keep(self) -> None:
        """Do the housekeeping, pass after pass."""
        while True:
            with suppress(StoreError):
                await self._keeper.sweep()

    async def _open_and_shut(self, window_s: float) -> None:
        """Let housekeeping rest in every fifth window."""
        while True:
            await asyncio.sleep(window_s)
            self._keeper.window.set()
            await asyncio.sleep(OPEN_WINDOWS * window_s)
            self._keeper.window.clear()
            report, upkeep = self.report, self._keeper.upkeep
            report.upkeep = upkeep
            report.most_behind_s = max(report.most_behind_s, upkeep.behind_s)
            report.most_dead = max(report.most_dead, upkeep.dead_ratio)
            report.most_snapshot_s = max(report.most_snapshot_s, upkeep.snapshot_s)

    async def _watch(self, began: float, seconds: float) -> None:
        """Note the size of the table: first with all live keys in it, then the largest."""
        report = self.report
        while True:
            await asyncio.sleep(0.5)
            size = await self._connection.fetchval("SELECT pg_total_relation_size('record')")
            share = (time.monotonic() - began) / seconds
            if share < LIVE_SHARE:
                report.live_bytes = size
                for times in report.claims_s.values():
                    times.clear()
            elif share > SETTLED_SHARE:
                report.most_bytes = max(report.most_bytes, size)


def response() -> StoredResponse:
    digest = response_digest(201, b"Created", HEAD)
    digest.update(BODY)
    return StoredResponse(201, b"Created", HEAD, digest.digest(), 1, len(BODY), True, False, True, 0, 1, 0)


async def soak(url: str, keys: int) -> Report:
    """Soak a server that nobody else uses."""
    migrate(url)
    config = StoreConfig(
        url=url,
        timeout_ms=int(PATIENCE_S * 1000),
        patience_s=PATIENCE_S,
        background=lambda work: work.close(),
        durability="fsync",
        postgres=PostgresOptions(audit_key=b"k" * 32),
    )
    store = open_store(config)
    assert isinstance(store, PostgresStore)
    connection = await asyncpg.connect(url, server_settings={"search_path": "oncegate"})
    store.start()
    try:
        if not await store.wait_up(PATIENCE_S):
            raise RuntimeError(f"the store is not up: {store.not_ready_reason()}")
        return await Soak(store, connection).run(keys)
    finally:
        await store.close()
        await connection.close()


def run(keys: int) -> Report:
    """Soak a server that is started for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = EmbeddedPostgres(port, AUTOVACUUM)
    try:
        server.create()
        server.start()
        return asyncio.run(soak(server.url, keys))
    finally:
        server.close()


def main(keys: int) -> int:
    report = run(keys)
    print("\n".join([*report.lines(), *report.failures()]))
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000))
