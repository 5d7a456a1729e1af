"""No acknowledged claim is lost: not by a server that is killed, and with a synchronous standby not by a failover.

Claims are made all the time. A claim counts as acknowledged if the store said so; afterwards its row has to be there.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from loadtest.postgres_server import Cluster, Server
from oncegate.store.membership import LOSSES, Membership
from oncegate.store.record import Claim
from oncegate.store.results import StoreEvent
from oncegate.store.store import Store
from tests.own_postgres import OwnPostgres
from tests.postgres_database import migrated
from tests.stores import claim, key, store_at

CALLERS = 24
BACK_S = 30.0
Result = TypeVar("Result")


def some_or(full: int, some: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [some, pytest.param(full, marks=pytest.mark.full)])


class Claims:
    """Callers that claim one new key after the other. `fresh`: those acknowledged since the last look, with tokens."""

    def __init__(self, store: Store) -> None:
        self._store, self._next = store, 0
        self.fresh: dict[bytes, bytes] = {}
        self.acknowledged = self.refused = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._claim() for _ in range(CALLERS)))

    async def _claim(self) -> None:
        while True:
            self._next += 1
            name = key(self._next)
            found = await claim(self._store, name)
            if isinstance(found, Claim):
                self.fresh[name] = found.token
                self.acknowledged += 1
            else:
                self.refused += 1
                await asyncio.sleep(0.01)

    async def again(self, count: int = 50) -> None:
        """Wait until claims are acknowledged again."""
        wanted = self.acknowledged + count
        async with asyncio.timeout(BACK_S):
            while self.acknowledged < wanted:
                await asyncio.sleep(0.01)

    def lost(self, server: Server) -> int:
        """Return how many of the fresh claims a server does not have, and take the rest as old."""
        fresh, self.fresh = self.fresh, {}
        rows = server.sql("SET search_path = oncegate; SELECT encode(key, 'hex'), encode(token, 'hex') FROM record")
        there = dict(row.split("|") for row in rows.splitlines())
        return sum(there.get(name.hex()) != token.hex() for name, token in fresh.items())


@asynccontextmanager
async def claiming(url: str, durability: str, reports: list[StoreEvent]) -> AsyncIterator[Claims]:
    member = Membership(
        b"", "tests", "a=1", accept=True, retention_ms=3_600_000, quarantine_ms=0, notice_s=60.0, durable=True,
        report=lambda event, _: reports.append(event),
    )  # fmt: skip
    store = store_at(url, timeout_ms=1000, durability=durability, member=member)
    store.start()
    claims = Claims(store)
    running = [asyncio.ensure_future(work()) for work in (claims.run, store.watch, store.probe)]
    try:
        await claims.again()
        yield claims
    finally:
        for one in running:
            one.cancel()
        await asyncio.wait(running)
        await store.close()


async def aside(work: Callable[[], Result]) -> Result:
    """Do what blocks, while claims go on."""
    return await asyncio.to_thread(work)


def tell(what: str, faults: int, claims: Claims, lost: int, reports: list[StoreEvent]) -> None:
    told = sorted({event.kind for event in reports if event in LOSSES and event is not StoreEvent.FOUNDED})
    print(f"| {what} | {faults} | {claims.acknowledged:,} | {claims.refused:,} | {lost} | {', '.join(told) or '-'} |")


@pytest.mark.fault(6, 8)
@pytest.mark.timeout(1200)
@some_or(200, 2)
async def test_a_server_that_is_killed_loses_no_claim(postgres_template: Server, count: int) -> None:
    """At `fsync`: kill -9 of the whole server in mid-load, and a start on the same files."""
    server, rng, lost, reports = OwnPostgres(postgres_template), random.Random(7), 0, list[StoreEvent]()
    try:
        async with claiming(server.url, "fsync", reports) as claims:
            for _ in range(count):
                await asyncio.sleep(rng.uniform(0, 0.3))
                await aside(server.kill)
                await asyncio.sleep(rng.choice((0, 0.1)))
                await aside(server.start)
                await claims.again()
                lost += await aside(lambda: claims.lost(server))
        tell("kill -9", count, claims, lost, reports)
        assert lost == 0
        assert not {*reports} & {StoreEvent.ROLLED_BACK, StoreEvent.FLUSHED}
    finally:
        server.close()


@asynccontextmanager
async def a_cluster(names: str | None) -> AsyncIterator[Cluster]:
    cluster = await aside(lambda: Cluster(names=names))
    try:
        await migrated(cluster.primary.url, "oncegate")
        yield cluster
    finally:
        await aside(cluster.close)


async def fail_over(cluster: Cluster, how: str) -> None:
    """Promote the standby; the old primary is dead, alive, or was told before not to wait for the standby any more."""
    old, new = cluster.primary, cluster.standbys[0]
    if how == "behind":
        await aside(new.kill)
        if await aside(lambda: old.sql("SHOW synchronous_standby_names")):
            await aside(lambda: cluster.wait_for_standbys(""))
        await asyncio.sleep(0.2)
    if how != "alive":
        await aside(old.kill)
    if how == "behind":
        await aside(lambda: new.start(primary_conninfo=""))
    await aside(lambda: cluster.promote(new))
    await asyncio.sleep(0.3 * (how == "alive"))


@pytest.mark.fault(15)
@pytest.mark.timeout(1200)
@some_or(50, 1)
async def test_a_failover_to_a_synchronous_standby_loses_no_claim(count: int) -> None:
    """At `replicated`: whether the old primary is dead, lives on, or confirmed claims that nobody else has."""
    rng, lost, reports = random.Random(7), 0, list[StoreEvent]()
    async with a_cluster(None) as cluster, claiming(cluster.url, "replicated", reports) as claims:
        for number in range(count):
            await asyncio.sleep(rng.uniform(0, 0.3))
            old = cluster.primary
            await fail_over(cluster, ("behind", "alive", "dead")[number % 3])
            await aside(lambda old=old: cluster.rejoin(old))
            await aside(lambda: cluster.wait_for_standbys("FIRST 1 (s0, s1)"))
            await claims.again()
            lost += await aside(lambda: claims.lost(cluster.primary))
    tell("failover, synchronous standby", count, claims, lost, reports)
    assert lost == 0
    assert not {*reports} & {StoreEvent.ROLLED_BACK, StoreEvent.FLUSHED}


@pytest.mark.fault(36)
@pytest.mark.full
@pytest.mark.timeout(1200)
async def test_a_failover_that_loses_claims_is_reported() -> None:
    """At `fsync` with a standby that lags behind: each failover that loses claims is reported."""
    count, lost, silent, reports = 25, 0, 0, list[StoreEvent]()
    async with a_cluster("") as cluster, claiming(cluster.url, "fsync", reports) as claims:
        for _ in range(count):
            old, before = cluster.primary, len(reports)
            await fail_over(cluster, "behind")
            await aside(lambda old=old: cluster.rejoin(old))
            await claims.again()
            here = await aside(lambda: claims.lost(cluster.primary))
            lost += here
            told = {*reports[before:]} & {StoreEvent.MOVED, StoreEvent.ROLLED_BACK, StoreEvent.FLUSHED}
            silent += bool(here and not told)
    tell("failover, standby behind", count, claims, lost, reports)
    assert lost > 0, "nothing was lost, so that nothing was tested"
    assert silent == 0
