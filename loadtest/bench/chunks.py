"""Streams: what a chunk costs beside nginx + Lua and an earlier commit, in CPU of the proxy and of Redis.

Then what a live stream holds in memory. The contenders take turns, and medians of the rounds count.
"""

import time
import uuid
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from loadtest.bench import contenders, scenarios
from loadtest.bench.contenders import Running, Site, in_turns, side_by_side
from loadtest.bench.goals import LUA, OURS
from loadtest.bench.readers import Peak, read
from loadtest.bench.table import Figure

STREAMS, CHUNKS, EVERY_MS, BYTES = 32, 200, 25, 100
LIVE, KIB = 1000, 1024


class Cost(NamedTuple):
    """CPU time of one round: of the proxy for a chunk, of Redis for a stream, and of Redis above an idle one."""

    chunk_us: float
    redis_us: float
    above_idle_us: float


# The goals of a Cost's fields beside nginx + Lua.
ROWS: dict[str, tuple[str, float | None, float | None]] = {
    "chunk_us": ("a streamed chunk: CPU", 2.0, 1.7),
    "redis_us": ("a streamed answer: CPU of Redis", 1.8, 1.5),
    "above_idle_us": ("a streamed answer: CPU of Redis above idle", None, None),
}


class Live(NamedTuple):
    """Of one run of LIVE streams; `kib` is for one of `at_once`, `event_us` for one event."""

    lost: int
    refused: int
    at_once: int
    kib: float
    event_us: float


class Sizes(NamedTuple):
    """What each of LIVE streams carries, how often that is measured, and the goal of its memory."""

    bytes: int
    number: int
    every_ms: int
    rounds: int
    limit_kib: float | None = None
    wish_kib: float | None = None


SMALL, LARGE = Sizes(BYTES, 150, 100, 2, 28, 20), Sizes(16 * KIB, 15, 1000, 1)
SHORT = SMALL._replace(number=60, rounds=1)


def chunks(site: Site, quick: bool) -> list[Figure]:
    """A chunk's CPU time in the proxy, and a streamed answer's in Redis."""
    names, number = contenders.paired(site), CHUNKS // 2 if quick else CHUNKS
    starts, takes = (1, 1) if quick else (2, 3)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for _ in range(starts):
        with side_by_side(site, names, upstream=site.events) as pairs:
            for running, _ in pairs.values():
                _read(site, running, STREAMS, 20, EVERY_MS, BYTES)  # warms it up
            for take in range(takes):
                for name in in_turns(names, take):
                    costs[name].append(_cost(site, *pairs[name], number))
    return [figure for other in names[1:] for figure in compared(other, costs[OURS], costs[other])]


def compared(other: str, ours: Sequence[Cost], theirs: Sequence[Cost]) -> list[Figure]:
    """Return the ratios of the medians. The goals are those beside nginx + Lua."""
    figures = []
    for field, (name, limit, wish) in ROWS.items():
        cost, beside = (median(getattr(one, field) for one in costs) for costs in (ours, theirs))
        goal = (limit, wish) if other == LUA else (None, None)
        note = f"{cost:.1f} and {beside:.1f} us"
        figures.append(Figure(f"{name}, {OURS} of {other}", cost / beside, "x", goal[0], note=note, wish=goal[1]))
    return figures


def _cost(site: Site, running: Running, store: Running, number: int) -> Cost:
    """Measure one round of streams."""
    idle_s, began = store.process.cpu_s(), time.monotonic()
    time.sleep(1)
    idle_s = (store.process.cpu_s() - idle_s) / (time.monotonic() - began)
    cpu_s, redis_s, began = running.process.cpu_s(), store.process.cpu_s(), time.monotonic()
    _read(site, running, STREAMS, number, EVERY_MS, BYTES)
    time.sleep(scenarios.SETTLE_S)
    cpu_s, redis_s = running.process.cpu_s() - cpu_s, store.process.cpu_s() - redis_s
    redis_us, idle_us = (spent_s * 1e6 / STREAMS for spent_s in (redis_s, idle_s * (time.monotonic() - began)))
    return Cost(cpu_s * 1e6 / (STREAMS * number), redis_us, redis_us - idle_us)


def live_streams(site: Site, quick: bool) -> list[Figure]:
    """The memory of each of 1,000 keyed streams above an idle proxy, with ten events of 100 B a second.

    Beside that, with one event of 16 KiB a second. No event may be lost, and no stream refused.
    """
    figures, names = list[Figure](), [name for name in contenders.paired(site) if name != LUA]
    for sizes in (SHORT,) if quick else (SMALL, LARGE):
        lives: dict[str, list[Live]] = {name: [] for name in names}
        for number in range(sizes.rounds):
            with side_by_side(site, names, upstream=site.events) as pairs:
                for name in in_turns(names, number):
                    lives[name].append(_live(site, pairs[name][0], sizes))
        figures += _told(sizes, lives)
    return figures


def _told(sizes: Sizes, lives: dict[str, list[Live]]) -> list[Figure]:
    ours, what = lives[OURS], f"1,000 live streams, events of {sizes.bytes:,} B"
    kib = {name: median(one.kib for one in found) for name, found in lives.items()}
    live = f"at least {min(one.at_once for one in ours)} at once"
    event = f"{median(one.event_us for one in ours):.0f} us CPU each"
    return [
        Figure(f"{what}: events lost", sum(one.lost for one in ours), "", 0, note=event),
        Figure(f"{what}: streams refused", sum(one.refused for one in ours), "", 0),
        Figure(f"{what}: memory a stream", kib[OURS], "KiB", sizes.limit_kib, note=live, wish=sizes.wish_kib),
        *(
            Figure(f"{what}: memory, {OURS} of {name}", kib[OURS] / kib[name], "x", None, note=f"{kib[name]:.1f} KiB")
            for name in [*kib][1:]
        ),
    ]


def _live(site: Site, running: Running, sizes: Sizes) -> Live:
    cpu_s = running.process.cpu_s()
    with Peak(running) as memory:
        found = _read(site, running, LIVE, sizes.number, sizes.every_ms, sizes.bytes)
    cpu_s, at_once = running.process.cpu_s() - cpu_s, found["most_live"]
    kib, event_us = memory.above / max(1, at_once) / KIB, cpu_s * 1e6 / (LIVE * sizes.number)
    return Live(found["lost"], found["refused"], at_once, kib, event_us)


def _read(site: Site, running: Running, *numbers: int) -> dict[str, int]:
    return read(site, "events", running.port, *numbers, uuid.uuid4().hex)
