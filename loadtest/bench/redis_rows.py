"""What an execution costs the store: CPU of Redis and of Valkey, and memory of Redis for a small record."""

import uuid
from statistics import median

from loadtest.bench import contenders, scenarios, wrk
from loadtest.bench.contenders import Running, Site, in_turns, serving
from loadtest.bench.goals import CONNECTIONS, EARLIER, OURS
from loadtest.bench.redis import command, raw_answer_bytes
from loadtest.bench.table import Figure
from oncegate.server.embedded import find_server

PATH = "/v1/charges"


def redis_cpu(site: Site, quick: bool) -> list[Figure]:
    """The CPU time of an execution in Debian's Redis and in the Valkey of the embedded store; its head repeats."""
    servers = {"Redis": contenders.open_redis(site.cores), "Valkey": contenders.open_redis(site.cores, find_server())}
    names = contenders.paired(site)
    found: dict[tuple[str, str], list[float]] = {}
    try:
        for number in range(1 if quick else 5):
            for server, store in servers.items():
                for name in in_turns(names, number):
                    found.setdefault((server, name), []).append(_execution_us(site, name, store, 1 if quick else 2))
        versions = {server: f"{server} {_version(store)}" for server, store in servers.items()}
    finally:
        for store in servers.values():
            store.process.stop()
    return [
        compared(version, other, found[server, OURS], found[server, other])
        for server, version in versions.items()
        for other in names[1:]
    ]


def compared(server: str, other: str, ours: list[float], theirs: list[float]) -> Figure:
    """Return the ratio of the medians. The goal is that beside the earlier commit."""
    limit, wish = (0.8, 0.65) if other == EARLIER else (None, None)
    note = f"{median(ours):.1f} and {median(theirs):.1f} us"
    name = f"CPU of {server} for an execution, {OURS} of {other}"
    return Figure(name, median(ours) / median(theirs), "x", limit, note=note, wish=wish)


def _execution_us(site: Site, name: str, store: Running, seconds: int) -> float:
    scenarios.empty(store)
    with serving(contenders.start(site, name, store=store)) as running:
        scenarios.warm(site, running)
        cpu_s = store.process.cpu_s()
        load = wrk.run(
            running.port,
            PATH,
            scenarios.new_key(),
            mode="unique",
            seconds=seconds,
            connections=CONNECTIONS,
            cores=site.cores.other,
        )
        return (store.process.cpu_s() - cpu_s) * 1e6 / load.requests


def record(site: Site, quick: bool) -> list[Figure]:
    """Redis's memory for a small record with everything that belongs to it, also beyond the response's own bytes."""
    number = 2_000 if quick else 20_000
    each, made = _record_bytes(site, OURS, number)
    answer = raw_answer_bytes(site.upstream.port)
    note = f"{each:.0f} B for an answer of {answer} B, {made} records"
    figures = [Figure("Redis memory of a small record, beyond its bytes", each - answer, "B", 500, note=note)]
    if site.against:
        before, _ = _record_bytes(site, EARLIER, number)
        note = f"{each:.0f} and {before:.0f} B"
        name = f"Redis memory of a small record, {OURS} of {EARLIER}"
        figures.append(Figure(name, each / before, "x", 0.8, note=note, wish=0.7))
    return figures


def _record_bytes(site: Site, name: str, number: int) -> tuple[float, int]:
    """Return how much memory Redis has taken for each record, and how many it was."""
    scenarios.empty(site.redis)
    with serving(contenders.start(site, name)) as running:
        scenarios.ask(running.port, PATH, "first")
        before, have = (int(_memory(site, fact)) for fact in ("used_memory_dataset", "keys"))
        seconds = 0
        while have + number > int(_memory(site, "keys")) and seconds < 60:
            key = uuid.uuid4().hex
            wrk.run(running.port, PATH, key, mode="unique", seconds=1, connections=32, cores=site.cores.other)
            seconds += 1
        made = int(_memory(site, "keys")) - have
        return (int(_memory(site, "used_memory_dataset")) - before) / made, made


def _memory(site: Site, name: str) -> str:
    if name == "keys":
        return command(site.redis.port, "DBSIZE")
    fields = command(site.redis.port, "INFO", "memory")
    return next(line.partition(":")[2] for line in fields.splitlines() if line.startswith(f"{name}:"))


def _version(store: Running) -> str:
    """Return the server's own version: of Valkey, `redis_version` is that of the Redis that it stands in for."""
    fields = dict(line.partition(":")[::2] for line in command(store.port, "INFO", "server").splitlines())
    return fields.get("valkey_version") or fields["redis_version"]
