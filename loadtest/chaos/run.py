"""One run: it starts the parts, loads and breaks them, lets them calm down, and has the logs judged."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from loadtest.chaos.faults import KINDS, Kind, Scheduler, World
from loadtest.chaos.parts import ClientProcess, Part, Replica, Upstream
from loadtest.chaos.plan import STORED_BYTES
from loadtest.chaos.postgres_stores import PostgresStores
from loadtest.chaos.redis_stores import RedisStores
from loadtest.chaos.watch import Watch

LEASE_S = 1.0
UPSTREAM_TIMEOUT_S = 4.0
SETTLE_TIMEOUT_S = 15.0
WARM, WARM_S = 200, 10.0  # requests before the first fault, or so many seconds
# The replicas differ in what they may differ in.
VARIETY: tuple[dict[str, object], ...] = (
    {},
    {"ON_DUPLICATE": "wait", "WAIT_MAX_S": 3},
    {"UPSTREAM_REUSE_IDLE_S": 0, "SETTLE_TIMEOUT_S": 1.5},
)


class Stores(Protocol):
    """The servers of a store, and what may happen to them."""

    url: str  # with a place for the hosts
    ports: list[int]
    durability: str

    @property
    def parts(self) -> list[Part]:
        """Return the processes that the watch looks at."""

    @property
    def kinds(self) -> tuple[Kind, ...]: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...


STORES: dict[str, Callable[[Path, int, bool, str, tuple[str, ...]], Stores]] = {
    "redis": RedisStores,
    "postgres": PostgresStores,
}


@dataclass
class Plan:
    """The parameters of a run. It ends after `seconds` or `requests`, whichever comes first.

    `sample`: how many known keys each client asks for again at the end. `durability`: ONCEGATE_DURABILITY, empty for
    what suits the store; with `replicated` a failover must lose no claim. `kinds`: the names of the faults, empty for
    all. `settings`: those of single replicas. `store_options`: the server's, to break it.
    """

    folder: Path
    seed: int = 1
    seconds: float = 600.0
    requests: int = 1_000_000
    replicas: int = 2
    clients: int = 2
    workers: int = 64
    sample: int = 2000
    retention_s: float = 900.0
    store: str = "redis"
    kinds: tuple[str, ...] = ()
    failover: bool = False
    durability: str = ""
    settings: tuple[dict[str, object], ...] = VARIETY
    store_options: tuple[str, ...] = ()

    def settings_of(self, number: int) -> dict[str, object]:
        own = self.settings[number % len(self.settings)]
        return {
            "LEASE_MS": int(LEASE_S * 1000),
            "RETENTION_S": self.retention_s,
            "UPSTREAM_TIMEOUT_S": UPSTREAM_TIMEOUT_S,
            "SETTLE_TIMEOUT_S": SETTLE_TIMEOUT_S,
            "CONNECT_TIMEOUT_S": 2,
            "DRAIN_S": 4,
            "MAX_STORED_BYTES": STORED_BYTES,
            "ACCESS_LOG": "off",
            **own,
        }


class Run:
    """The parts of one run, from their start to their end."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        folder, seed = plan.folder, plan.seed
        self.stores = STORES[plan.store](folder, seed, plan.failover, plan.durability, plan.store_options)
        self.upstream = Upstream(folder, seed, plan.replicas)
        self.replicas = [
            Replica(number, folder, seed, self.upstream.ports[number], self.stores.url, self.stores.ports)
            for number in range(plan.replicas)
        ]
        self.clients = [ClientProcess(f"client-{number}", folder) for number in range(plan.clients)]
        self.world = World(self.replicas, self.upstream, LEASE_S)
        kinds = [one for one in (*KINDS, *self.stores.kinds) if not plan.kinds or one.name in plan.kinds]
        self.scheduler = Scheduler(self.world, seed, folder / "faults.jsonl", kinds)
        watched = [*self.replicas, *self.stores.parts, self.upstream, *self.clients]
        self.watch = Watch(watched, folder / "stalls.jsonl")
        self.facts: dict[str, Any] = {
            "seed": seed,
            "lease_s": LEASE_S,
            "upstream_timeout_s": UPSTREAM_TIMEOUT_S,
            "retention_s": plan.retention_s,
            "replicas": plan.replicas,
        }

    async def start(self) -> None:
        await self.stores.start()
        self.upstream.start()
        for replica in self.replicas:
            await replica.open()
            replica.start({"DURABILITY": self.stores.durability} | self.plan.settings_of(replica.number))
        await self.upstream.serving()
        for replica in self.replicas:
            await replica.serving()

    async def load_and_break(self) -> None:
        """Load and break everything until the time or the requests are used up; then let the clients finish."""
        plan, facts = self.plan, self.facts
        facts["begun"] = time.monotonic()
        for number, client in enumerate(self.clients):
            ports = [(replica.port, replica.client_link.port) for replica in self.replicas]
            log = str(plan.folder / f"client-{number}.tsv")
            client.start(
                {
                    "name": number, "seed": plan.seed, "ports": ports, "log": log,
                    "workers": plan.workers, "sample": plan.sample, "retention_s": plan.retention_s,
                }
            )  # fmt: skip
        while self.attempts < WARM and time.monotonic() < facts["begun"] + WARM_S:
            await asyncio.sleep(0.1)
        watching = asyncio.ensure_future(self.watch.run())
        breaking = asyncio.ensure_future(self.scheduler.run())
        await self._until_enough()
        breaking.cancel()
        await self.scheduler.mend()
        facts["calm"] = time.monotonic()
        for client in self.clients:
            client.calm()
        for client in self.clients:
            facts["finished"] = await client.ended(120) == 0 and facts.get("finished", True)
        facts["ended"] = time.monotonic()
        watching.cancel()

    async def _until_enough(self) -> None:
        until = time.monotonic() + self.plan.seconds
        said = time.monotonic()
        while time.monotonic() < until and self.attempts < self.plan.requests:
            await asyncio.sleep(0.2)
            if not all(client.alive for client in self.clients):
                raise RuntimeError("a client ended too early")
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"  {self.attempts} requests, {self.scheduler.counts.total()} faults", flush=True)

    @property
    def attempts(self) -> int:
        return sum(client.attempts for client in self.clients)

    async def close(self) -> None:
        await self.scheduler.close()
        for client in self.clients:
            client.close()
        for replica in self.replicas:
            await replica.close()
        self.upstream.kill()
        await self.stores.close()

    def write_facts(self) -> None:
        """Write the facts that the judge needs beside the logs."""
        self.facts["failed_faults"] = self.scheduler.failed
        self.watch.write()
        (self.plan.folder / "run.json").write_text(json.dumps(self.facts, indent=1))
        with (self.plan.folder / "reports.jsonl").open("w") as file:
            for report in lost_claims(self.plan.folder):
                file.write(json.dumps(report) + "\n")


# Of one claim, or of the store's data as a whole.
LOSS = re.compile(r'"event": ?"claim (?:lost|fenced)"|"kind": ?"(?:flushed|rolled_back|evicted)"')


# The end of a key by what its API said. An owner whose lease had passed is fenced by it.
VERDICT = re.compile(r'"action": ?"reconcile".*"key_id": ?"([^"]+)"')


def lost_claims(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the proxies' reports of what the store lost, with their times of CLOCK_MONOTONIC."""
    offset = time.monotonic() - time.time()
    logs = {path: path.read_text(errors="replace") for path in sorted(folder.glob("proxy-*.log"))}
    settled = {key_id for log in logs.values() for key_id in VERDICT.findall(log)}
    for path, log in logs.items():
        for line in log.splitlines():
            if LOSS.search(line):
                told = json.loads(line)
                if told.get("key_id") in settled:
                    continue
                at = datetime.fromisoformat(told["timestamp"]).timestamp() + offset
                yield {"at": at, "from": path.name, "event": told["event"], "told": told}


async def run(plan: Plan) -> Run:
    """Do one run and leave its logs in the folder."""
    plan.folder.mkdir(parents=True)
    one = Run(plan)
    try:
        await one.start()
        await one.load_and_break()
    finally:
        await one.close()
        one.write_facts()
    return one
