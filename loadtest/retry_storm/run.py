"""All sides at once: clients directly at one API, and clients at others of the same kind through oncegate.

One oncegate asks its API what became of an operation that nobody knows.
"""

import asyncio
import os
import sys
import time
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

from config.clients.sending import Outcome
from loadtest.chaos.parts import Part, Store, until_open
from loadtest.ports import free_port
from loadtest.retry_storm.client import Ended, learn, storm
from loadtest.retry_storm.plan import Operation, Plan, operations

RULES, ASKING = (Path(__file__).with_name(name) for name in ("rules.toml", "rules_asking.toml"))


class Api(Part):
    """The API's process and its log."""

    def __init__(self, name: str, folder: Path, plan: Plan) -> None:
        super().__init__(name, folder)
        self.port, self._plan, self._calls = free_port(), plan, folder / f"{name}.tsv"

    async def start(self) -> None:
        words = [self._calls, self.port, *astuple(self._plan)]
        self._spawn([sys.executable, "-m", "loadtest.retry_storm.upstream", *map(str, words)])
        await until_open(self, self.port)

    def calls(self) -> list[tuple[float, int, str]]:
        """Return each call that arrived: its time, its operation, and its fate."""
        lines = [line.split("\t") for line in self._calls.read_text().splitlines()] if self._calls.exists() else []
        return [(float(at), int(number), how) for at, number, how in lines]


class Gateway(Part):
    """oncegate in front of an API."""

    async def start(self, api: Api, store: Store, rules: Path) -> int:
        port = free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
        env |= {
            "ONCEGATE_UPSTREAM": f"http://127.0.0.1:{api.port}",
            "ONCEGATE_STORE_URL": f"redis://127.0.0.1:{store.port}",
            "ONCEGATE_LISTEN": f"127.0.0.1:{port}",
            "ONCEGATE_ADMIN_LISTEN": f"127.0.0.1:{free_port()}",
            "ONCEGATE_RULES_FILE": str(rules),
            # The API itself answers, and a 503 of it is "not done".
            "ONCEGATE_RELEASE_STATUSES": "default,503+retry-after",
            "ONCEGATE_ACCESS_LOG": "off",
        }
        self._spawn([sys.executable, "-m", "oncegate", "serve"], env)
        await until_open(self, port)
        return port


@dataclass(frozen=True)
class Side:
    """The result of one side of the run; times are CLOCK_MONOTONIC, in seconds.

    `learnt`: of the operations whose outcome was unknown, how many have an answer when their clients ask once more.
    """

    begun: float
    operations: list[Operation]
    ended: list[Ended]
    calls: list[tuple[float, int, str]]
    learnt: int = 0

    @property
    def executions(self) -> Counter[int]:
        """Return how often each operation was executed."""
        return Counter(number for _, number, how in self.calls if how != "busy")

    @property
    def duplicates(self) -> list[float]:
        """Return the times of repeated executions."""
        seen: set[int] = set()
        again = []
        for at, number, how in sorted(self.calls):
            if how != "busy" and number in seen:
                again.append(at)
            elif how != "busy":
                seen.add(number)
        return again

    def paid(self, kind: str) -> tuple[int, int]:
        """Return what was paid for operations of a kind, and what was due: each executed operation once."""
        done = [(self.operations[number], times) for number, times in self.executions.items()]
        return (
            sum(operation.price * times for operation, times in done if operation.kind == kind),
            sum(operation.price for operation, _ in done if operation.kind == kind),
        )

    def count(self, outcome: Outcome) -> int:
        return sum(one.outcome is outcome for one in self.ended)

    def answered_s(self) -> list[float]:
        """Return the time from the start to the response of each answered operation, sorted."""
        return sorted(one.took_s for one in self.ended if one.outcome is Outcome.ANSWERED)


async def run(plan: Plan, folder: Path) -> tuple[Side, Side, Side]:
    """Run all sides with logs in an empty folder: without oncegate, with it, and with it while it asks."""
    names = "with", "asking"
    stores = [Store(f"store-{name}", folder) for name in names]
    gateways = [Gateway(f"oncegate-{name}", folder) for name in names]
    apis = [Api(f"api-{name}", folder, plan) for name in ("without", *names)]
    try:
        for store in stores:
            store.start()
            await store.serving()
        await asyncio.gather(*[api.start() for api in apis])
        behind = zip(gateways, apis[1:], stores, (RULES, ASKING), strict=True)
        ports = [apis[0].port, *[await gateway.start(api, store, rules) for gateway, api, store, rules in behind]]
        begun = time.monotonic() + 0.2
        ended = await asyncio.gather(*[storm(plan, port, begun) for port in ports])
        # Without oncegate, asking once more would be doing it once more.
        later = await asyncio.gather(*[learn(plan, *one) for one in zip(ports[1:], ended[1:], strict=True)])
        sides = zip(ended, apis, (0, *later), strict=True)
        without, with_it, asking = (Side(begun, operations(plan), one, api.calls(), many) for one, api, many in sides)
        return without, with_it, asking
    finally:
        for part in (*gateways, *apis, *stores):
            part.kill()
