"""What two workers get out of two cores, by the CPU time of a request.

Two saturated workers and their load take four cores. Here one worker has a core for itself, as the goal has it, while
its sibling serves with what the load leaves of the other core: 2 x what one alone costs there / what this one costs is
what two cores are worth. The sibling gives way because a load that starves leaves the worker asleep between a few
requests, each of them dearer. Two on one core cost more, related or not, presumably for cold caches: a process that
only spins there does it, too. The pairs that take turns show that, and would show what workers add to it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from loadtest.bench import contenders, scenarios, wrk
from loadtest.bench.contenders import Running, Site, await_ready
from loadtest.bench.machine import cpu_s, family, give_way
from loadtest.bench.table import Figure

CONNECTIONS = 32  # of each load; a pair has two loads
SECONDS = 1
ALONE, APART, TURNS, UNRELATED = "alone", "apart", "taking turns", "unrelated, taking turns"


class Work(NamedTuple):
    """What a process has done so far: the CPU seconds, and the bytes that it read, which requests share evenly."""

    cpu_s: float
    read_bytes: int


def workers(site: Site, quick: bool) -> list[Figure]:
    """Two workers against one: with a core for each; and taking turns on one, as two unrelated proxies do."""
    costs: dict[str, list[float]] = {ALONE: [], APART: [], TURNS: [], UNRELATED: []}
    for number in range(1 if quick else 4):  # started anew: where code and data lie in memory bends the figures, too
        with _services(site) as (one, other, pair, apart):
            supervisor, *both = family(apart.process.pid)
            mine = both.pop(number % 2)
            give_way(both[0], site.cores.other)
            _cost(site, [one, other, pair, apart], [one.process.pid])  # warms them up
            for _ in range(2):
                costs[ALONE].append(_cost(site, [one], [one.process.pid]))
                costs[APART].append(_cost(site, [apart, apart], [mine], [supervisor]))
                costs[TURNS].append(_cost(site, [pair, pair], family(pair.process.pid)))
                costs[UNRELATED].append(_cost(site, [one, other], [one.process.pid, other.process.pid]))
    rows: tuple[tuple[str, str, float | None], ...] = (
        ("2 workers against 1, by CPU time, a core for each", APART, 1.8),
        ("the same, taking turns on one core", TURNS, None),
        ("2 unrelated proxies against 1, taking turns on one core", UNRELATED, None),
    )
    return [
        Figure(name, _times(costs[ALONE], costs[pair]), "x", goal, True, _each(costs[ALONE], costs[pair]))
        for name, pair, goal in rows
    ]


def _times(alone: list[float], paired: list[float]) -> float:
    """Return what a pair does, of one: the median of ratios of what was measured within seconds of each other."""
    return median(2 * one / each for one, each in zip(alone, paired, strict=True))


def _each(alone: list[float], paired: list[float]) -> str:
    return f"{median(alone):.1f} and {median(paired):.1f} us CPU a request"


@contextmanager
def _services(site: Site) -> Iterator[list[Running]]:
    """Start two services of one process and two of two workers, all on the proxy's core."""
    scenarios.empty(site.redis)
    with ExitStack() as stack:
        started = []
        for count in (1, 1, 2, 2):
            started.append(contenders.oncegate(site, WORKERS=count))
            stack.callback(started[-1].process.stop)
            await_ready(started[-1])
        yield started


def _cost(site: Site, loaded: Sequence[Running], counted: Sequence[int], shared: Sequence[int] = ()) -> float:
    """Put a load on each; return what a request costs in the processes that are counted, in us of CPU time.

    They served the share of the requests that they have of what was read. What is `shared` works for all requests.
    """
    everyone = {pid for running in loaded for pid in family(running.process.pid)}
    before = {pid: _work(pid) for pid in everyone}
    with ThreadPoolExecutor() as threads:
        loads = list(threads.map(lambda running: _load(site, running), loaded))
    did = {pid: Work(*(now - then for now, then in zip(_work(pid), before[pid], strict=True))) for pid in everyone}
    if any(load.refused or load.broken for load in loads):
        raise RuntimeError(f"wrong answers: {loads}")
    requests = sum(load.requests for load in loads)
    serving = everyone - set(shared)
    share = sum(did[pid].read_bytes for pid in counted) / sum(did[pid].read_bytes for pid in serving)
    own_s, shared_s = (sum(did[pid].cpu_s for pid in pids) for pids in (counted, shared))
    return (own_s / (requests * share) + shared_s / requests) * 1e6


def _load(site: Site, running: Running) -> wrk.Load:
    key = scenarios.new_key()
    cores = site.cores.other
    return wrk.run(
        running.port, "/v1/charges", key, mode="unique", seconds=SECONDS, connections=CONNECTIONS, cores=cores
    )


def _work(pid: int) -> Work:
    """Return what it has done. Raises OSError where the process has ended."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return Work(cpu_s(pid), next(int(line.split()[1]) for line in lines if line.startswith("rchar")))
