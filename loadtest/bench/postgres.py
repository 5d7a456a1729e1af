"""oncegate on PostgreSQL, in turns with the recipe of most articles, and with itself on a Redis that syncs each write.

All three are fully durable: a claim and a response are on the disk before they count. The stores are on the core of the
load, their files in the same folder.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from statistics import median
from typing import NamedTuple

from loadtest.bench import contenders, scenarios
from loadtest.bench.contenders import Running, Site, await_ready
from loadtest.bench.postgres_rows import Rows, measure_rows, migrate
from loadtest.bench.scenarios import Run, Scenario
from loadtest.bench.slow_disk import slower_syncs
from loadtest.bench.table import Figure, Table
from loadtest.ports import free_port
from oncegate.server.embedded_postgres import EmbeddedPostgres

EXECUTION, REPLAY = Scenario("execution", (), mode="unique"), Scenario("replay", (), mode="many")
# Its own defaults beside these: fsync, synchronous_commit and full_page_writes are on. No checkpoint falls into a run.
OPTIONS = {"shared_buffers": "256MB", "max_wal_size": "8GB", "checkpoint_timeout": "1h", "jit": "off"}
# Disks over a network take about this much longer than one in the machine.
SLOW_DISK_MS = 2
RECIPE, REDIS, SPARE = "recipe", "redis-sync", "spare"
# What is compared with whom, in which field, and the goal.
Ratio = tuple[Scenario, str, str, float | None, bool]
RATIOS: tuple[Ratio, ...] = (
    (EXECUTION, RECIPE, "rate", 3.0, True),
    (EXECUTION, RECIPE, "p99_ms", 1.0, False),
    (EXECUTION, REDIS, "rate", 0.5, True),
    (EXECUTION, SPARE, "rate", None, True),
    (REPLAY, RECIPE, "rate", 2.0, True),
)
WORDS = {"rate": "requests a second", "p99_ms": "p99"}


class Length(NamedTuple):
    """How long to measure: seconds for each measurement, with so many callers."""

    rounds: int
    seconds: int
    callers: tuple[int, ...]


def postgres(site: Site, quick: bool) -> list[Figure]:
    """Compare three durable stores. The table is printed, too."""
    length = Length(1, 1, (32,)) if quick else Length(3, 2, (32, 256))
    with started_database() as database:
        table = Table(_rounds(site, database, length))
        rows = asyncio.run(measure_rows(database.url))
    print("", "durable stores; 'oncegate' is on PostgreSQL", *table.lines(), sep="\n", flush=True)
    sync_ms = _sync_ms()
    with started_database(SLOW_DISK_MS) as database:
        slow = Table(_rounds(site, database, length, with_redis=False))
    print("", f"the same on a disk that takes {SLOW_DISK_MS} ms more", *slow.lines(), sep="\n", flush=True)
    return [
        *_compared(table, RATIOS, sync_ms),
        *_compared(slow, [ratio for ratio in RATIOS if ratio[1] == RECIPE], sync_ms + SLOW_DISK_MS),
        Figure("durable: one fdatasync of 8 KiB, median", sync_ms, "ms", None),
        *of_rows(rows),
    ]


def _compared(table: Table, ratios: Sequence[Ratio], sync_ms: float) -> list[Figure]:
    return [
        compared(table, cell.connections, ratio, sync_ms)
        for cell in table.cells.values()
        if (cell.contender, cell.scenario) == ("oncegate", EXECUTION.name)
        for ratio in ratios
    ]


@contextmanager
def started_database(slower_ms: int = 0) -> Iterator[EmbeddedPostgres]:
    """Start a database, on a disk whose syncs take so much longer."""
    database = EmbeddedPostgres(free_port(), OPTIONS)
    try:
        database.create()
        with slower_syncs(database.folder, slower_ms * 1000) if slower_ms else nullcontext():
            database.start()
        yield database
    finally:
        database.close()


def _rounds(site: Site, database: EmbeddedPostgres, length: Length, *, with_redis: bool = True) -> Iterator[Run]:
    redis = contenders.open_redis(site.cores, durable=True)
    ways: dict[str, Callable[[], Running]] = {
        "oncegate": lambda: _oncegate(site, database.url),
        RECIPE: lambda: contenders.obvious_postgres(site, database.url),
    }
    if with_redis:
        ways[SPARE] = lambda: _oncegate(site, database.url, UPSTREAM_SPARE_CONNECTIONS=1000)
        ways[REDIS] = lambda: contenders.oncegate(site, store_url=f"redis://127.0.0.1:{redis.port}/0")
    try:
        for number in range(length.rounds):
            first = number % len(ways)
            for name in [*ways][first:] + [*ways][:first]:
                running = ways[name]()
                try:
                    if running.admin_port:
                        await_ready(running)
                    scenarios.warm(site, running)
                    for callers, scenario in product(length.callers, (EXECUTION, REPLAY)):
                        yield scenarios.measure(site, running, scenario, name, callers, length.seconds, number)
                finally:
                    running.process.stop()
    finally:
        redis.process.stop()


def _oncegate(site: Site, url: str, **settings: object) -> Running:
    migrate(url)
    return contenders.oncegate(site, store_url=url, **settings)


def _sync_ms() -> float:
    """Return the median time of a write of 8 KiB with its fdatasync, in the folder of the stores."""
    taken, block = [], os.urandom(8192)
    with tempfile.TemporaryFile() as file:
        for _ in range(200):
            began = time.perf_counter()
            os.pwrite(file.fileno(), block, 0)
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - began) * 1e3)
    return median(taken)


def compared(table: Table, callers: int, ratio: Ratio, sync_ms: float) -> Figure:
    scenario, other, field, limit, least = ratio
    ours, theirs = (table.cells[scenario.name, callers, name].median(field) for name in ("oncegate", other))
    name = f"durable {scenario.name}, {callers} callers: {WORDS[field]}, of {other}'s"
    unit = "ms" if field.endswith("ms") else "a second"
    note = f"{ours:.0f} and {theirs:.0f} {unit}; heads repeat, fdatasync {sync_ms:.1f} ms"
    return Figure(name, ours / theirs, "x", limit, least, note)


def of_rows(rows: Rows) -> list[Figure]:
    sizes = "300 B body, 150 B head, audited; no checkpoint"
    return [
        Figure("WAL of an execution on PostgreSQL", rows.execution_bytes, "B", 2000, note=sizes),
        Figure("WAL of a renewal on PostgreSQL", rows.renewal_bytes, "B", 170),
        Figure("updates that are HOT, 5,000 in flight, 300 B heads", rows.hot * 100, "%", 85, True),
    ]
