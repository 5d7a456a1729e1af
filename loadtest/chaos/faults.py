"""The faults: a table of what can break beside the store, a scheduler that draws by a seed, and the timeline as it was.

A line of the timeline (JSON): kind, place, replica (or null), begun and ended in seconds of CLOCK_MONOTONIC, detail.
A fault ends when the broken part works again; for a process that was restarted, when it serves.
"""

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loadtest.chaos.link import Link
from loadtest.chaos.parts import Replica, Upstream


class World(NamedTuple):
    """What can be broken beside the store. Times are in seconds."""

    replicas: list[Replica]
    upstream: Upstream
    lease_s: float


Act = Callable[[World, Replica, random.Random], Awaitable[str]]


class Kind(NamedTuple):
    """One row of the table. `place`: the part that is busy with the fault; `each`: whether every replica has one.

    `loses`: what the store had acknowledged and may have lost: `claims` (answers, too), `answers` alone, or `answers to
    unknown`: those of keys that are unknown from then on, without a report.
    """

    name: str
    weight: int
    place: str
    each: bool
    act: Act
    loses: str = ""


# Processes ...


async def proxy_kill(world: World, replica: Replica, rng: random.Random) -> str:
    replica.kill()
    away_s = rng.choice((0.0, 0.3, 1.5 * world.lease_s))
    await asyncio.sleep(away_s)
    replica.start_again()
    await replica.serving()
    return f"started again after {away_s:.1f} s"


async def proxy_stop(world: World, replica: Replica, _: random.Random) -> str:
    replica.signal(signal.SIGSTOP)
    stopped_s = 2 * world.lease_s
    await asyncio.sleep(stopped_s)
    replica.signal(signal.SIGCONT)
    return f"suspended for {stopped_s:.1f} s"


async def proxy_term(_: World, replica: Replica, __: random.Random) -> str:
    replica.signal(signal.SIGTERM)
    code = await replica.ended(12)
    if code is None:
        replica.kill()
    replica.start_again()
    await replica.serving()
    return f"exit code {code}"


async def upstream_kill(world: World, _: Replica, __: random.Random) -> str:
    world.upstream.kill()
    world.upstream.start()
    await world.upstream.serving()
    return ""


# Links ...


async def _cut(link: Link, _: random.Random) -> str:
    return f"{link.cut()} ends reset"


async def _cut_after(link: Link, rng: random.Random) -> str:
    """Cut some connections after a random number of bytes, in either direction."""
    cuts = rng.randint(3, 10)
    for _ in range(cuts):
        way = rng.choice((link.up, link.down))
        way.cut_after(rng.randint(1, 3000), with_reset=rng.random() < 0.7)
        await asyncio.sleep(0.1)
    link.heal()
    return f"{cuts} cuts in the middle"


async def _drop(link: Link, rng: random.Random) -> str:
    """Lose single replies together with their connection."""
    drops = rng.randint(2, 6)
    for _ in range(drops):
        link.down.drop(rng.randint(1, 12))
        await asyncio.sleep(0.2)
    link.heal()
    return f"{drops} replies lost"


async def _hole(link: Link, rng: random.Random, seconds: float) -> str:
    """Let nothing pass. The bytes arrive late, or are lost with their connections."""
    way = rng.choice((None, link.up, link.down))
    link.hole() if way is None else way.hole()
    await asyncio.sleep(seconds)
    lost = rng.random() < 0.5
    if lost:
        link.cut()
    link.heal()
    which = "both ways" if way is None else "towards it" if way is link.up else "from it"
    return f"{seconds:.1f} s {which}, then {'lost' if lost else 'delivered'}"


async def _slow(link: Link, rng: random.Random) -> str:
    latency_s, most = rng.choice((0.005, 0.05, 0.2)), rng.choice((0, 3, 200))
    for way in (link.up, link.down):
        way.slow(latency_s, latency_s, most)
    await asyncio.sleep(2)
    link.heal()
    return f"{latency_s * 1000:.0f} ms" + (f", slices of {most} bytes at most" if most else "")


async def _refuse(link: Link, rng: random.Random) -> str:
    link.refuse()
    link.cut()
    await asyncio.sleep(rng.uniform(0.3, 1.5))
    await link.start()
    return "nobody listened"


def _on(side: str, fault: Callable[[Link, random.Random], Awaitable[str]]) -> Act:
    """Return a fault of one of a replica's links, in the form of the table."""

    async def act(_: World, replica: Replica, rng: random.Random) -> str:
        link: Link = getattr(replica, f"{side}_link")
        return await fault(link, rng)

    return act


def _hole_on(side: str, seconds: tuple[float, ...]) -> Act:
    async def act(_: World, replica: Replica, rng: random.Random) -> str:
        link: Link = getattr(replica, f"{side}_link")
        return await _hole(link, rng, rng.choice(seconds))

    return act


async def _end(link: Link, _: random.Random) -> str:
    return f"{link.cut(with_reset=False)} ends closed"


KINDS = (
    Kind("proxy-kill", 12, "proxy", True, proxy_kill),
    Kind("proxy-stop", 8, "proxy", True, proxy_stop),
    Kind("proxy-term", 4, "proxy", True, proxy_term),
    Kind("upstream-kill", 4, "upstream", False, upstream_kill),
    Kind("store-link-cut", 6, "store-link", True, _on("store", _cut)),
    Kind("store-link-cut-after", 6, "store-link", True, _on("store", _cut_after)),
    Kind("store-link-drop", 8, "store-link", True, _on("store", _drop)),
    Kind("store-link-hole", 5, "store-link", True, _hole_on("store", (0.3, 1.5, 3.5))),
    Kind("store-link-slow", 4, "store-link", True, _on("store", _slow)),
    Kind("upstream-link-cut", 6, "upstream-link", True, _on("upstream", _cut)),
    Kind("upstream-link-end", 4, "upstream-link", True, _on("upstream", _end)),
    Kind("upstream-link-cut-after", 6, "upstream-link", True, _on("upstream", _cut_after)),
    Kind("upstream-link-drop", 4, "upstream-link", True, _on("upstream", _drop)),
    Kind("upstream-link-hole", 4, "upstream-link", True, _hole_on("upstream", (0.5, 2.5))),
    Kind("upstream-link-slow", 3, "upstream-link", True, _on("upstream", _slow)),
    Kind("upstream-link-refuse", 4, "upstream-link", True, _on("upstream", _refuse)),
    Kind("client-link-cut", 6, "client-link", True, _on("client", _cut)),
    Kind("client-link-cut-after", 6, "client-link", True, _on("client", _cut_after)),
    Kind("client-link-drop", 4, "client-link", True, _on("client", _drop)),
    Kind("client-link-hole", 4, "client-link", True, _hole_on("client", (0.5, 2.5))),
    Kind("client-link-slow", 4, "client-link", True, _on("client", _slow)),
)


class Scheduler:
    """Breaks something at least every `pause_s[1]` seconds. The same seed draws the same faults."""

    def __init__(self, world: World, seed: int, path: Path, kinds: Sequence[Kind]) -> None:
        self._world, self._kinds = world, kinds
        self._rng = random.Random(f"faults {seed}")
        self._file = path.open("w")
        self._busy: set[str] = set()
        self._running: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []

    async def run(self, pause_s: tuple[float, float] = (0.7, 1.8)) -> None:
        """Break things until cancelled. Faults overlap, but never two in one place."""
        while True:
            kind, replica = await self._draw()
            work = self._break(kind, replica, random.Random(self._rng.random()))
            task = asyncio.ensure_future(work)
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(self._rng.uniform(*pause_s))

    async def _draw(self) -> tuple[Kind, Replica]:
        while True:
            kind = self._rng.choices(self._kinds, [kind.weight for kind in self._kinds])[0]
            replica = self._rng.choice(self._world.replicas)
            if self._place(kind, replica) not in self._busy:
                return kind, replica
            await asyncio.sleep(0.01)

    @staticmethod
    def _place(kind: Kind, replica: Replica) -> str:
        return f"{kind.place} {replica.number}" if kind.each else kind.place

    async def _break(self, kind: Kind, replica: Replica, rng: random.Random) -> None:
        place, begun = self._place(kind, replica), time.monotonic()
        self._busy.add(place)
        self.counts[kind.name] += 1
        try:
            detail = await kind.act(self._world, replica, rng)
        except Exception as error:  # the run is void, and says so
            self.failed.append(f"{kind.name} at {place}: {error}")
            detail = f"FAILED {error}"
        finally:
            self._busy.discard(place)
        self._write(
            kind=kind.name,
            place=place,
            replica=replica.number if kind.each else None,
            begun=begun,
            ended=time.monotonic(),
            detail=detail,
            loses=kind.loses,
        )

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    async def mend(self) -> None:
        """Wait until everything works again."""
        await asyncio.gather(*self._running)

    async def close(self) -> None:
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._file.close()
