"""The health of a database in PostgreSQL: losses and the quarantine behind them, other proxies, and room."""

import asyncio
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from oncegate.store import membership
from oncegate.store.membership import LOSSES, RULES_DIFFER, Membership
from oncegate.store.postgres import health, servers
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.servers import Servers
from oncegate.store.record import PREFIX_BYTES
from oncegate.store.results import ClaimsSuspended, StoreEvent, StoreFull
from tests.postgres_database import Database
from tests.postgres_parts import migrate, opened, until
from tests.postgres_server import Cluster, Server

QUARANTINE_MS = 600_000


@pytest.fixture(autouse=True)
def inspect_often(monkeypatch):
    monkeypatch.setattr(servers, "HEALTH_S", 0.02)
    monkeypatch.setattr(health, "ROOM_S", 0.02)
    # The database of tests has partitions for a day.
    monkeypatch.setattr(health, "FEW_DAYS", 0)
    monkeypatch.setattr("oncegate.store.postgres.connections.scout.ASK_S", 0.05)


@dataclass
class Proxy:
    """A proxy that watches its store, and what it has reported."""

    number: int = 1
    settings: str = "namespace=a secret=x"
    quarantine_ms: int = 0
    accept: bool = False
    rules: str = "R1"
    reported: list[StoreEvent] = field(default_factory=list)
    servers: Servers = None

    @asynccontextmanager
    async def watching(self, url: str, schema: str, durability: str = "fsync", **options) -> AsyncIterator[Servers]:
        member = Membership(
            bytes([self.number]) * PREFIX_BYTES, f"proxy {self.number}", self.settings, self.accept, 3_600_000,
            self.quarantine_ms, 60.0, True, lambda event, _: self.reported.append(event), lambda: self.rules,
        )  # fmt: skip
        async with opened(url, schema, durability, member=member, **options) as self.servers:
            watch = asyncio.ensure_future(self.servers.watch())
            try:
                yield self.servers
            finally:
                watch.cancel()

    async def inspections(self, count: int = 3) -> None:
        """Wait until the store was inspected some times more."""
        most = self.servers.health._counter + count
        await until(lambda: self.servers.health._counter >= most, "inspections")


async def reports(proxy: Proxy, *events: StoreEvent) -> None:
    """Check that these were reported, once each."""
    await until(lambda: len(proxy.reported) >= len(events), f"{events} of {proxy.reported}")
    await proxy.inspections()
    assert proxy.reported == [*events]


# Losses ...


async def test_a_new_database(database: Database):
    """The first proxy reports that there was no epoch; nobody else does, also not after a restart."""
    first, second, third = Proxy(1), Proxy(2), Proxy(1)
    async with first.watching(database.url, database.schema):
        await reports(first, StoreEvent.FOUNDED)
        async with second.watching(database.url, database.schema):
            await reports(second)
            assert second.servers.not_ready_reason() is None
    async with third.watching(database.url, database.schema):
        await reports(third)


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        ("UPDATE proxy SET counter = 0", StoreEvent.ROLLED_BACK),
        ("DELETE FROM proxy", StoreEvent.ROLLED_BACK),
        ("UPDATE epoch SET id = 'another'", StoreEvent.FLUSHED),
        ("DELETE FROM epoch; DELETE FROM proxy", StoreEvent.FLUSHED),
    ],
)
async def test_a_loss_and_its_quarantine(database: Database, change: str, loss: StoreEvent):
    """A loss is reported once. All proxies refuse first-time keys for a while, also one that starts then."""
    proxy, other = Proxy(1, quarantine_ms=QUARANTINE_MS), Proxy(2, quarantine_ms=QUARANTINE_MS)
    database.connection.execute("INSERT INTO epoch VALUES (1, 'known', '', 0)")
    async with proxy.watching(database.url, database.schema) as watched:
        await proxy.inspections()
        assert watched.refusal() is None
        database.connection.execute(change)
        await reports(proxy, loss)
        assert watched.health.notice() == LOSSES[loss]
        assert watched.not_ready_reason().startswith(f"{LOSSES[loss]}; first-time keys are refused for ")
        assert isinstance(watched.refusal(), ClaimsSuspended)
        assert QUARANTINE_MS / 1000 - 60 < watched.health.quarantine_left_s <= QUARANTINE_MS / 1000
        async with other.watching(database.url, database.schema) as starting:
            assert isinstance(starting.refusal(), ClaimsSuspended)
            await reports(other)
        database.connection.execute("UPDATE epoch SET until = 0")
        await until(lambda: watched.refusal() is None, "the end of the quarantine")


async def test_a_loss_without_a_quarantine(database: Database):
    proxy = Proxy()
    async with proxy.watching(database.url, database.schema) as watched:
        await proxy.inspections()
        database.connection.execute("UPDATE proxy SET counter = 0")
        await reports(proxy, StoreEvent.FOUNDED, StoreEvent.ROLLED_BACK)
        assert watched.refusal() is None


@pytest.mark.parametrize("shows", ["UPDATE proxy SET counter = 0", "UPDATE epoch SET run = 'another'"])
async def test_a_fence_behind_a_loss(database: Database, shows: str):
    """A sequence that went back with the data gives no fence again that an owner from before the loss may have."""
    proxy = Proxy()
    async with proxy.watching(database.url, database.schema):
        await proxy.inspections()
        before = database.connection.value("SELECT nextval('fence')")
        database.connection.execute(f"SELECT setval('fence', {before - 1000}); {shows}")
        await until(lambda: len(proxy.reported) == 2, "the loss")
        assert database.connection.value("SELECT nextval('fence')") > before


async def test_a_clock_that_steps_back(database: Database):
    """The end of a quarantine that is further off than a whole one does not count."""
    proxy = Proxy(quarantine_ms=5000)
    database.connection.execute("INSERT INTO epoch VALUES (1, 'known', '', 9e15::bigint)")
    async with proxy.watching(database.url, database.schema) as watched:
        assert 0 < watched.health.quarantine_left_s <= 5


async def test_no_claim_before_an_inspection(database: Database):
    """Claims wait until it is known what a database has; reads do not."""
    loop, proxy = asyncio.get_running_loop(), Proxy()
    database.connection.execute("BEGIN")
    try:
        database.connection.execute("LOCK TABLE epoch")
        async with proxy.watching(database.url, database.schema, is_up=False) as watched:
            assert await watched.free_session(Level.OFF, loop.time() + 20)
            claims = asyncio.ensure_future(watched.free_session(Level.CLAIM, loop.time() + 20))
            await asyncio.wait([claims], timeout=0.2)
            assert not claims.done()
            database.connection.execute("COMMIT")
            assert await claims
    finally:
        database.connection.execute("ROLLBACK")


@pytest.mark.parametrize(
    ("code", "reason", "is_refused"),
    [
        ("42501", "the store's tables for losses and other proxies cannot be used: as told", True),
        ("53100", "the store is full: first-time keys are refused", False),
        ("55P03", None, False),
    ],
)
async def test_an_inspection_that_is_refused(database: Database, code: str, reason: str | None, is_refused: bool):
    """Nothing is claimed from a store that cannot be watched. A full disk and a lock pass."""
    body = f"$$ BEGIN RAISE 'as told' USING ERRCODE = '{code}'; END $$"
    database.connection.execute(f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS {body}")
    proxy = Proxy()
    try:
        async with proxy.watching(database.url, database.schema) as watched:
            await proxy.inspections()
            trigger = "CREATE TRIGGER refuse BEFORE UPDATE ON proxy FOR EACH ROW EXECUTE FUNCTION refuse()"
            database.connection.execute(trigger)
            await asyncio.sleep(0.1)
            await until(lambda: watched.not_ready_reason() == reason, f"{reason}")
            assert (watched.refusal() is not None) == is_refused
            database.connection.execute("DROP TRIGGER refuse ON proxy")
            await proxy.inspections()
            assert watched.refusal() is None
            assert proxy.reported == [StoreEvent.FOUNDED]
    finally:
        database.connection.execute("DROP FUNCTION refuse CASCADE")


@pytest.fixture(scope="module")
def own() -> AsyncIterator[Server]:
    server = Server.started()
    asyncio.run(migrate(server.url, "store"))
    yield server
    server.close()


@pytest.mark.full
@pytest.mark.parametrize(("durability", "loses"), [("memory", True), ("fsync", False)])
async def test_a_restart(own: Server, durability: str, loses: bool):
    """In a crash, a server loses the last commits that did not wait for its disk. Others are there."""
    proxy = Proxy()
    async with proxy.watching(own.url, "store", durability) as watched:
        await proxy.inspections()
        proxy.reported.clear()
        own.kill()
        await until(lambda: watched.not_ready_reason() is not None, "the server is gone")
        own.start()
        await until(lambda: watched.not_ready_reason() is None, "it is back")
        await proxy.inspections()
        if loses:
            # Whether the counter was among what is lost is up to the disk.
            assert proxy.reported in ([StoreEvent.MOVED], [StoreEvent.ROLLED_BACK])
        else:
            assert proxy.reported == []


@pytest.mark.full
async def test_a_restore_from_an_older_copy(own: Server, tmp_path):
    """A database from a base backup is a loss, which is reported once."""
    proxy = Proxy(quarantine_ms=QUARANTINE_MS)
    copy = Server()
    async with proxy.watching(own.url, "store") as watched:
        await proxy.inspections()
        copy.copy(own)
        await proxy.inspections()
        proxy.reported.clear()
        own.stop(signal.SIGQUIT)
        shutil.rmtree(own.data)
        shutil.move(copy.data, own.data)
        own.start()
        await reports(proxy, StoreEvent.ROLLED_BACK)
        assert isinstance(watched.refusal(), ClaimsSuspended)
    copy.close()


@pytest.mark.full
@pytest.mark.parametrize(("durability", "events"), [("replicated", []), ("fsync", [StoreEvent.MOVED])])
async def test_a_failover(durability: str, events: list[StoreEvent]):
    """A promotion by itself loses nothing where claims wait for the standby. Elsewhere the last ones may be lost."""
    cluster = Cluster()
    try:
        await migrate(cluster.primary.url, "store")
        proxy = Proxy()
        async with proxy.watching(cluster.url, "store", durability) as watched:
            await proxy.inspections()
            proxy.reported.clear()
            old = cluster.primary
            old.kill()
            cluster.promote()
            # Without a standby the new primary confirms nothing.
            cluster.rejoin(old)
            cluster.wait_for_standbys("FIRST 1 (s0, s1)")
            await until(lambda: watched.primary_timeline == 2, "the new primary")
            await proxy.inspections()
            # What the old primary wrote last may have been on the way to a standby that nobody waited for.
            assert [event for event in proxy.reported if event is not StoreEvent.ROLLED_BACK] == events
            assert durability == "fsync" or proxy.reported == []
    finally:
        cluster.close()


# Other proxies ...


async def test_a_proxy_with_other_settings(database: Database):
    """It claims nothing, and the others go on. Once the operator accepts it, it claims."""
    first = Proxy(1)
    async with first.watching(database.url, database.schema):
        await first.inspections()
        second, accepted = Proxy(2, "namespace=b secret=x"), Proxy(3, "namespace=b secret=x", accept=True)
        async with second.watching(database.url, database.schema) as watched:
            await reports(second, StoreEvent.IDENTITY)
            differs = "this proxy names keys in another way than others"
            assert watched.not_ready_reason() == f"{differs} on this store (namespace)"
            assert watched.refusal() == ClaimsSuspended(differs)
        assert first.servers.refusal() is None
        async with accepted.watching(database.url, database.schema) as watched:
            await until(lambda: StoreEvent.IDENTITY_ACCEPTED in accepted.reported, "the acceptance")
            assert watched.refusal() is None
        identities = database.connection.fetch("SELECT settings FROM proxy WHERE identity IS NOT NULL ORDER BY prefix")
        assert [row["settings"] for row in identities] == [b"namespace=a secret=x", b"namespace=b secret=x"]


async def test_many_proxies_that_start_at_once_with_two_settings(database: Database):
    """Those with one of the two settings claim, and no others."""
    proxies = [Proxy(number, f"namespace={number % 2}") for number in range(1, 9)]

    async def start(proxy: Proxy, ends: asyncio.Event) -> None:
        async with proxy.watching(database.url, database.schema):
            await proxy.inspections()
            await ends.wait()

    ends = asyncio.Event()
    tasks = [asyncio.ensure_future(start(proxy, ends)) for proxy in proxies]
    await until(lambda: all(proxy.servers and proxy.servers.health._counter >= 3 for proxy in proxies), "all of them")
    refused = [proxy.servers.refusal() is not None for proxy in proxies]
    ends.set()
    await asyncio.gather(*tasks)
    assert len({(proxy.settings, is_refused) for proxy, is_refused in zip(proxies, refused, strict=True)}) == 2


async def test_rules_that_differ(database: Database, monkeypatch):
    """Different rules of live proxies are reported after DIFFER_S, once by each, until they agree."""
    monkeypatch.setattr(membership, "DIFFER_S", 0.2)
    one, two = Proxy(1), Proxy(2)
    async with one.watching(database.url, database.schema), two.watching(database.url, database.schema):
        await one.inspections()
        assert one.servers.health.notice() is None
        one.rules = "R2"
        for proxy in (one, two):
            await until(lambda proxy=proxy: proxy.servers.health.notice() == RULES_DIFFER, "the notice")
        await one.inspections()
        assert one.reported.count(StoreEvent.RULES) == 1
        two.rules = "R2"
        for proxy in (one, two):
            await until(lambda proxy=proxy: proxy.servers.health.notice() is None, "the end of the notice")


# Room ...


async def test_room(database: Database):
    """Above the limit first-time keys are refused; what the operator allows later counts soon."""
    size = database.connection.value(
        "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class WHERE relnamespace = 'oncegate'::regnamespace"
        " AND relkind = 'r'"
    )
    ratios: list[tuple[int, Callable[[float], bool]]] = [
        (0, lambda ratio: ratio == 0),
        (int(size * 1.05), lambda ratio: 0.9 < ratio < 1),
        (int(size / 2), lambda ratio: ratio > 1.5),
    ]
    for max_bytes, is_right in ratios:
        proxy = Proxy()
        async with proxy.watching(database.url, database.schema, max_bytes=max_bytes) as watched:
            await until(lambda: watched.health._days is not None, "a measurement")
            assert is_right(watched.health.memory_ratio)
            assert watched.health.is_full == (watched.health.memory_ratio > 1)
            assert isinstance(watched.refusal(), StoreFull) == watched.health.is_full
            if watched.health.is_full:
                assert watched.not_ready_reason() == "the store is full: first-time keys are refused"


async def test_a_disk_that_is_full(database: Database):
    async with Proxy().watching(database.url, database.schema) as watched:
        watched.note_refusal(StoreFull("could not extend file"))
        assert watched.health.is_full
        assert watched.not_ready_reason() == "the store is full: first-time keys are refused"
        # Claims are tried all the same: one of them finds out that there is room again.
        assert watched.refusal() is None


async def test_partitions_for_few_days(database: Database, monkeypatch):
    """An operator hears of it before the last one is over."""
    monkeypatch.setattr(health, "FEW_DAYS", 14)
    async with Proxy().watching(database.url, database.schema) as watched:
        # One more day, or none if midnight has passed since the database was made.
        text = r"the audit trail has partitions for [01] more days: run `oncegate migrate --maintain`"
        await until(lambda: re.fullmatch(text, watched.health.notice() or ""), "the notice")
        assert watched.not_ready_reason() is None
        monkeypatch.setattr(health, "FEW_DAYS", 0)
        assert watched.health.notice() is None
