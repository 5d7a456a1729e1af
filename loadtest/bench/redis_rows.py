"""What an execution costs the store: CPU of Redis and of Valkey, and memory of Redis for a small record."""

from pathlib import Path
from statistics import median

from loadtest.bench import contenders, scenarios, wrk
from loadtest.bench.contenders import Running, Site, in_turns, side_by_side
from loadtest.bench.goals import CONNECTIONS, EARLIER, LUA, OURS
from loadtest.bench.redis import command, raw_answer_bytes
from loadtest.bench.table import Figure
from oncegate.server.embedded import find_server

PATH = "/v1/charges"


def redis_cpu(site: Site, quick: bool) -> list[Figure]:
    """The CPU time of an execution in Debian's Redis and in the Valkey of the embedded store; its head repeats."""
    return [
        figure
        for server, program in (("Redis", None), ("Valkey", find_server()))
        for figure in _one_server(site, server, program, quick)
    ]


def _one_server(site: Site, server: str, program: Path | None, quick: bool) -> list[Figure]:
    names = contenders.paired(site)
    found: dict[str, list[float]] = {name: [] for name in names}
    starts, takes = (1, 1) if quick else (2, 4)
    for _ in range(starts):
        with side_by_side(site, names, program=program) as pairs:
            for running, store in pairs.values():
                scenarios.warm(site, running)
                version = f"{server} {_version(store)}"
            for take in range(takes):
                for name in in_turns(names, take):
                    found[name].append(_execution_us(site, *pairs[name]))
    return [compared(version, other, found[OURS], found[other]) for other in names[1:]]


def compared(server: str, other: str, ours: list[float], theirs: list[float]) -> Figure:
    """Return the ratio of the medians. The goal is that beside the earlier commit."""
    limit, wish = (0.8, 0.65) if other == EARLIER else (None, None)
    note = f"{median(ours):.1f} and {median(theirs):.1f} us"
    name = f"CPU of {server} for an execution, {OURS} of {other}"
    return Figure(name, median(ours) / median(theirs), "x", limit, note=note, wish=wish)


def _execution_us(site: Site, running: Running, store: Running) -> float:
    key, cores, cpu_s = scenarios.new_key(), site.cores.other, store.process.cpu_s()
    load = wrk.run(running.port, PATH, key, mode="unique", seconds=1, connections=CONNECTIONS, cores=cores)
    return (store.process.cpu_s() - cpu_s) * 1e6 / load.requests


def record(site: Site, quick: bool) -> list[Figure]:
    """Redis's memory for a small record with everything that belongs to it, also beyond the response's own bytes."""
    number = 2_000 if quick else 20_000
    names = [name for name in contenders.paired(site) if name != LUA]
    with side_by_side(site, names) as pairs:
        found = {name: _record_bytes(site, *pair, number) for name, pair in pairs.items()}
    (each, made), answer = found[OURS], raw_answer_bytes(site.upstream.port)
    note = f"{each:.0f} B for an answer of {answer} B, {made} records"
    figures = [Figure("Redis memory of a small record, beyond its bytes", each - answer, "B", 500, note=note)]
    for name, (other, _) in [*found.items()][1:]:
        note, what = f"{each:.0f} and {other:.0f} B", f"Redis memory of a small record, {OURS} of {name}"
        figures.append(Figure(what, each / other, "x", 0.8, note=note, wish=0.7))
    return figures


def _record_bytes(site: Site, running: Running, store: Running, number: int) -> tuple[float, int]:
    """Return how much memory Redis has taken for each record, and how many it was."""
    scenarios.ask(running.port, PATH, "first")
    before, have = _memory(store), _keys(store)
    for _ in range(60):
        if _keys(store) >= have + number:
            break
        key, cores = scenarios.new_key(), site.cores.other
        wrk.run(running.port, PATH, key, mode="unique", seconds=1, connections=CONNECTIONS, cores=cores)
    made = _keys(store) - have
    return (_memory(store) - before) / made, made


def _keys(store: Running) -> int:
    return int(command(store.port, "DBSIZE"))


def _memory(store: Running) -> int:
    fields = command(store.port, "INFO", "memory").splitlines()
    return next(int(line.partition(":")[2]) for line in fields if line.startswith("used_memory_dataset:"))


def _version(store: Running) -> str:
    """Return the server's own version: of Valkey, `redis_version` is that of the Redis that it stands in for."""
    fields = dict(line.partition(":")[::2] for line in command(store.port, "INFO", "server").splitlines())
    return fields.get("valkey_version") or fields["redis_version"]
