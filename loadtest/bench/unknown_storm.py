"""`python -m loadtest.bench.unknown_storm`: 5,000 unknown keys at once, and what that costs those who claim others.

Two proxies with one rule each, on stores of their own that are filled alike; one rule says how the API is asked. They
get the same load at the same moments, so that whatever else the machine does slows both. The rate is counted where the
questions arrive.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import uvloop
from aiohttp import ClientSession, TCPConnector, web

from loadtest.bench.postgres_rows import migrate
from loadtest.chaos.parts import Part, Store, until_open
from loadtest.ports import free_port
from loadtest.postgres_server import Server
from oncegate.keys.digests import Digests, Scope
from oncegate.store.kept import Kept, pack_kept
from oncegate.store.opening import open_store
from oncegate.store.record import Claim, ClaimRequest
from oncegate.store.store import Store as OpenStore
from oncegate.store.store import StoreConfig

DAY_MS = 86_400_000
RULE = """
[[rule]]
name = "orders"
path = "/orders"
"""
PLAN = """
[rule.reconcile]
url = "/known?reference={{key}}"
keep = ["key"]
reference = {{ "/reference" = "{{key}}" }}
succeeded = [{{ status = "200" }}]
absent = [{{ status = "404" }}]
absent_after_s = 3600
absent_before_s = 86400
rate_per_s = {rate:g}
"""


class Api:
    """Answers every order at once, and every question with "not found", so that all keys stay unknown."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []

    async def start(self) -> int:
        app = web.Application()
        app.router.add_post("/orders", self._order)
        app.router.add_get("/known", self._known)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return port

    async def _order(self, request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=201, text="made")

    async def _known(self, _request: web.Request) -> web.Response:
        self.asked_s.append(time.monotonic())
        return web.json_response({"error": "not found"}, status=404)


class Gateway(Part):
    async def start(self, api: int, store_url: str, rules: Path) -> int:
        port = free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
        env |= {
            "ONCEGATE_UPSTREAM": f"http://127.0.0.1:{api}",
            "ONCEGATE_STORE_URL": store_url,
            "ONCEGATE_LISTEN": f"127.0.0.1:{port}",
            "ONCEGATE_ADMIN_LISTEN": f"127.0.0.1:{free_port()}",
            "ONCEGATE_RULES_FILE": str(rules),
            "ONCEGATE_ACCESS_LOG": "off",
        }
        self._spawn([sys.executable, "-m", "oncegate", "serve"], env)
        await until_open(self, port)
        return port


async def fill(url: str, count: int) -> None:
    """Leave so many unknown keys of the rule in a store, and its index complete."""
    store = open_store(StoreConfig(url=url, timeout_ms=5000, patience_s=5.0, background=lambda work: work.close()))
    store.start()
    assert await store.wait_up(20)
    for server in store.records.servers:
        await server.index.begin()
        await server.index.note_complete()
    digests, scope = Digests(b""), Scope(b"default", b"n" * 16)
    for first in range(0, count, 50):
        numbers = range(first, min(first + 50, count))
        await asyncio.gather(*[_unknown(store, scope, digests.key(scope, b"%d" % one), one) for one in numbers])
    await store.close()


async def _unknown(store: OpenStore, scope: Scope, key: bytes, number: int) -> None:
    kept = pack_kept(Kept(rule="orders", values=(("key", f"lost-{number}"),)))
    claim = await store.claim(ClaimRequest(key, scope, b"f" * 16, b"hold", 60_000, DAY_MS, 90 * DAY_MS, kept=kept))
    assert isinstance(claim, Claim)
    await store.mark_unknown(claim, "no response came", 5.0)


async def measure(session: ClientSession, port: int, name: str, seconds: float, per_s: float) -> list[float]:
    """Send orders with new keys at a steady rate; return how long each took, in ms."""
    took: list[float] = []
    loop = asyncio.get_running_loop()

    async def one(number: int) -> None:
        began = time.perf_counter()
        headers = {"Idempotency-Key": f"{name}-{number}"}
        async with session.post(f"http://127.0.0.1:{port}/orders", headers=headers, data=b"{}") as answer:
            await answer.read()
            assert answer.status == 201, answer.status
        took.append((time.perf_counter() - began) * 1000)

    began, tasks = loop.time(), set[asyncio.Task[None]]()
    for number in range(int(seconds * per_s)):
        await asyncio.sleep(max(0.0, began + number / per_s - loop.time()))
        tasks.add(loop.create_task(one(number)))
    await asyncio.gather(*tasks)
    return took


async def run(asked: argparse.Namespace, folder: Path) -> None:
    api, gateways = Api(), [Gateway(name, folder) for name in ("asks", "plain")]
    stores = [Store(f"store-{number}", folder) for number in range(2)] if asked.store == "redis" else []
    servers = [Server.started() for _ in range(2)] if asked.store == "postgres" else []
    try:
        for store in stores:
            store.start()
            await store.serving()
        urls = [f"redis://127.0.0.1:{store.port}" for store in stores] + [server.url for server in servers]
        for server in servers:
            migrate(server.url)
        await asyncio.gather(*[fill(url, asked.keys) for url in urls])
        print(f"{asked.keys} unknown keys in each of two stores ({asked.store})", flush=True)
        port, ports = await api.start(), list[int]()
        for gateway, url, rules in zip(gateways, urls, (RULE + PLAN.format(rate=asked.rate), RULE), strict=True):
            file = folder / f"{gateway.name}.toml"
            file.write_text(rules)
            ports.append(await gateway.start(port, url, file))
        await at_once(asked, api, ports)
    finally:
        for part in (*gateways, *stores):
            part.kill()
        for server in servers:
            server.close()


async def at_once(asked: argparse.Namespace, api: Api, ports: list[int]) -> None:
    """Measure both at the same moments, and print what came of it."""
    ratios: dict[str, list[float]] = {"median": [], "99 %": []}
    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        await asyncio.gather(*[measure(session, port, "warm", 5.0, asked.per_s) for port in ports])
        began = time.monotonic()
        for turn in range(asked.turns):
            both = [measure(session, port, f"{turn}", asked.seconds, asked.per_s) for port in ports]
            found = await asyncio.gather(*both)
            for label, share in (("median", 50), ("99 %", 99)):
                asks, plain = (statistics.quantiles(took, n=100)[share - 1] for took in found)
                ratios[label].append(asks / plain)
        took_s = time.monotonic() - began
    questions = [at for at in api.asked_s if began <= at <= began + took_s]
    print(
        f"{len(questions)} questions in {took_s:.1f} s: {len(questions) / took_s:.2f} a second, {asked.rate:g} allowed"
    )
    for seconds in (1.0, 10.0):
        most = max((sum(at <= one < at + seconds for one in questions) for at in questions), default=0)
        print(f"the most in any {seconds:g} s: {most}; the rate allows {asked.rate * seconds + 1:g}")
    for label, ones in ratios.items():
        print(
            f"time of a claim and its response, asking : not asking, {label}: {statistics.median(ones):.3f} "
            f"(median of {len(ones)} pairs, {min(ones):.2f} to {max(ones):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.unknown_storm", description=__doc__)
    parser.add_argument("--keys", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=10.0, help="questions a second, as the rule has it")
    parser.add_argument("--per-s", type=float, default=50.0, help="orders a second")
    parser.add_argument("--turns", type=int, default=20, help="pairs of measurements")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--store", choices=("redis", "postgres"), default="redis")
    parser.add_argument("--folder", type=Path, default=Path("build/unknown_storm"), help="is emptied first")
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    uvloop.run(run(asked, folder))


if __name__ == "__main__":
    main()
