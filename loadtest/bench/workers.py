"""The throughput of two workers, relative to one.

Two saturated workers, their load, store and upstream want four cores. On two cores, each worker gets a fifth of a
core and no more (a control group's quota). That share is always free for it, and the rest is plenty for the load. But
a request costs more on the core that carries the load, so one worker counts as the mean of one on each core. For
comparison there are pairs of workers, and of proxies that do not know each other, that take turns on one core.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle
from statistics import median

from loadtest.bench import contenders, scenarios, wrk
from loadtest.bench.contenders import Running, Site
from loadtest.bench.machine import family, share
from loadtest.bench.table import Figure

CONNECTIONS = 32  # for each process


def workers(site: Site, quick: bool) -> list[Figure]:
    """Requests per second of two workers against one, and CPU time where they take turns on one core.

    All are started anew several times: the place of code and data in memory changes the figures, too.
    """
    starts, takes = (1, 2) if quick else (3, 4)
    return [_with_cores(site, starts, takes), *_taking_turns(site, starts, takes)]


def _with_cores(site: Site, starts: int, takes: int) -> Figure:
    """Two workers, one on each core, against one worker. It is measured on each core: the cores are not alike."""
    name, alone, paired = "2 workers against 1, a fifth of a core for each", list[float](), list[int]()
    try:
        for _ in range(starts):
            with ExitStack() as lasting:
                here, there, pair = lasting.enter_context(_started(site, 1, 1, 2))
                serving = [*_serving(here), *_serving(there), *_serving(pair)]
                for pid, cores in zip(serving, cycle(site.cores), strict=False):
                    lasting.enter_context(share(pid, cores))
                for _ in range(1 + takes):
                    alone.append(sum(_load(site, one, CONNECTIONS).requests for one in (here, there)) / 2)
                    paired.append(_load(site, pair, CONNECTIONS * 2).requests)
                del alone[-1 - takes], paired[-1 - takes]  # the first ones warmed them up
    except OSError as why:
        return Figure(name, float("nan"), "x", 1.8, True, f"no control group: {why}")
    times = [many / few for few, many in zip(alone, paired, strict=True)]
    spread = f"{min(times):.2f} to {max(times):.2f}; {median(alone):.0f} and {median(paired):.0f} a second"
    return Figure(name, median(paired) / median(alone), "x", 1.8, True, spread)


def _taking_turns(site: Site, starts: int, takes: int) -> list[Figure]:
    costs: dict[str, list[float]] = {"alone": [], "2 workers": [], "2 unrelated proxies": []}
    for _ in range(starts):
        with _started(site, 1, 1, 2) as (one, other, pair):
            for loaded in ([one], [pair, pair], [one, other]):
                _cost(site, loaded)  # warms them up
            for _ in range(takes):
                for name, loaded in zip(costs, ([one], [pair, pair], [one, other]), strict=True):
                    costs[name].append(_cost(site, loaded))
    alone, *paired = (median(found) for found in costs.values())
    return [
        Figure(f"{name} against 1, by CPU time, taking turns on a core", 2 * alone / cost, "x", None,
               note=f"{alone:.1f} and {cost:.1f} us CPU a request")
        for name, cost in zip([*costs][1:], paired, strict=True)
    ]  # fmt: skip


@contextmanager
def _started(site: Site, *counts: int) -> Iterator[list[Running]]:
    """Start a proxy of so many workers for each count, each on a store of its own."""
    with ExitStack() as until_the_end:
        found = []
        for count in counts:
            store = contenders.open_redis(site.cores)
            until_the_end.callback(store.process.stop)
            found.append(contenders.oncegate(replace(site, redis=store), WORKERS=count))
        for running in found:
            until_the_end.enter_context(contenders.serving(running))
        yield found


def _serving(running: Running) -> list[int]:
    """Return the serving processes: the workers, or the only process."""
    first, *others = family(running.process.pid)
    return others or [first]


def _cost(site: Site, loaded: Sequence[Running]) -> float:
    """Put a load on each; return the CPU time per request, in us."""
    different = list(dict.fromkeys(loaded))
    before = sum(running.process.cpu_s() for running in different)
    with ThreadPoolExecutor() as threads:
        loads = list(threads.map(lambda running: _load(site, running, CONNECTIONS), loaded))
    return (sum(running.process.cpu_s() for running in different) - before) * 1e6 / sum(load.requests for load in loads)


def _load(site: Site, running: Running, connections: int) -> wrk.Load:
    key, cores = scenarios.new_key(), site.cores.other
    load = wrk.run(running.port, "/v1/charges", key, mode="unique", seconds=1, connections=connections, cores=cores)
    if load.refused or load.broken:
        raise RuntimeError(f"wrong answers: {load}")
    return load
