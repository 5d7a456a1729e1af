"""Streams: what a chunk costs beside nginx + Lua and an earlier commit, in CPU of the proxy and of Redis.

Then what a live stream holds in memory. The contenders take turns, and medians of the rounds count.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

from loadtest.bench import contenders, scenarios
from loadtest.bench.contenders import Running, Site, in_turns, serving
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


SMALL, LARGE = Sizes(BYTES, 150, 100, 3, 28, 20), Sizes(16 * KIB, 15, 1000, 1)


def chunks(site: Site, quick: bool) -> list[Figure]:
    """A chunk's CPU time in the proxy, and a streamed answer's in Redis."""
    names = contenders.paired(site)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for number in range(1 if quick else 5):
        for name in in_turns(names, number):
            costs[name].append(_cost(site, name, CHUNKS // 2 if quick else CHUNKS))
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


def _cost(site: Site, name: str, number: int) -> Cost:
    """Start a contender and measure one round of streams."""
    with _started(site, name) as running:
        _read(site, running, STREAMS, 20, EVERY_MS, BYTES)  # warms it up
        idle_s, began = _redis_s(site), time.monotonic()
        time.sleep(1)
        idle_s = (_redis_s(site) - idle_s) / (time.monotonic() - began)
        cpu_s, redis_s, began = running.process.cpu_s(), _redis_s(site), time.monotonic()
        _read(site, running, STREAMS, number, EVERY_MS, BYTES)
        took_s = time.monotonic() - began
        time.sleep(scenarios.SETTLE_S)
        cpu_s, redis_s = running.process.cpu_s() - cpu_s, _redis_s(site) - redis_s
    redis_us = redis_s * 1e6 / STREAMS
    return Cost(cpu_s * 1e6 / (STREAMS * number), redis_us, redis_us - idle_s * took_s * 1e6 / STREAMS)


def live_streams(site: Site, quick: bool) -> list[Figure]:
    """The memory of each of 1,000 keyed streams above an idle proxy, with ten events of 100 B a second.

    Beside that, with one event of 16 KiB a second. No event may be lost, and no stream refused.
    """
    figures, names = list[Figure](), [name for name in contenders.paired(site) if name != LUA]
    for sizes in (SMALL,) if quick else (SMALL, LARGE):
        lives: dict[str, list[Live]] = {name: [] for name in names}
        for number in range(1 if quick else sizes.rounds):
            for name in in_turns(names, number):
                lives[name].append(_live(site, name, sizes))
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


def _live(site: Site, name: str, sizes: Sizes) -> Live:
    with _started(site, name) as running:
        cpu_s = running.process.cpu_s()
        with Peak(running) as memory:
            found = _read(site, running, LIVE, sizes.number, sizes.every_ms, sizes.bytes)
        cpu_s = running.process.cpu_s() - cpu_s
    kib, at_once = memory.above / found["most_live"] / KIB, found["most_live"]
    return Live(found["lost"], found["refused"], at_once, kib, cpu_s * 1e6 / (LIVE * sizes.number))


@contextmanager
def _started(site: Site, name: str) -> Iterator[Running]:
    scenarios.empty(site.redis)
    with serving(contenders.start(site, name, upstream=site.events)) as running:
        yield running


def _read(site: Site, running: Running, *numbers: int) -> dict[str, int]:
    return read(site, "events", running.port, *numbers, uuid.uuid4().hex)


def _redis_s(site: Site) -> float:
    return site.redis.process.cpu_s()
