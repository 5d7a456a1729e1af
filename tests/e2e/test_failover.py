"""Proxies on stores of several servers, under load, while masters die and slots move."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator
from itertools import count

import pytest
from redis.crc import key_slot

from loadtest.ports import free_ports
from tests.parts import OK, Proxy, RawUpstream, Received, ask, holding, request, until
from tests.topologies import Clustered, Sentineled, Server, wait_for

SETTINGS: dict[str, object] = {"LEASE_MS": 3000, "STORE_TIMEOUT_MS": 1000}


@pytest.fixture
def sentineled() -> Iterator[Sentineled]:
    group = Sentineled()
    yield group
    group.close()


@pytest.fixture
def clustered() -> Iterator[Clustered]:
    cluster = Clustered()
    yield cluster
    cluster.close()


class Load:
    """Clients that send one key after the other, and each until they know what became of it."""

    def __init__(self, proxies: list[Proxy], upstream: RawUpstream) -> None:
        self.proxies, self._upstream = proxies, upstream
        self._dice, self._numbers = random.Random(3), count()
        self._going = True
        self.told: dict[str, bytes] = {}  # what became of each key, as the client heard it
        upstream.script = self._execute

    async def _execute(self, _: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        await asyncio.sleep(self._dice.random() * 0.05)
        writer.write(OK)
        await writer.drain()

    async def __aenter__(self) -> "Load":
        self._clients = [asyncio.ensure_future(self._client()) for _ in range(12)]
        await until(lambda: len(self.told) > 40)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Go on until the store works again, then let every key come to its end."""
        before = len(self.told)
        await until(lambda: len(self.told) > before + 40, 30)
        self._going = False
        await asyncio.gather(*self._clients)

    async def _client(self) -> None:
        while self._going:
            name = f"key-{next(self._numbers)}"
            self.told[name] = await self.outcome(name)
            await asyncio.sleep(0.01)

    async def outcome(self, name: str) -> bytes:
        """Send a key until the answer says what became of it."""
        async with asyncio.timeout(40):
            while True:
                try:
                    answer = await ask(self._dice.choice(self.proxies).port, request(key=name), 10)
                except (OSError, AssertionError):
                    continue
                status = answer.header("oncegate-status")
                if status is not None and status != b"refused" and b"answer-not-stored" not in answer.body:
                    return status
                assert answer.status in (409, 502, 503), answer
                await asyncio.sleep(0.05)

    @property
    def executions(self) -> Counter[str]:
        return executions(self._upstream)

    async def assert_once(self) -> None:
        """No key was executed twice, nor is it by one more try; most are known, and stay what they were."""
        before = self.executions
        assert max(before.values()) == 1
        again = dict(zip(self.told, await gather_some(map(self.outcome, self.told)), strict=True))
        assert max(self.executions.values()) == 1
        for name, was in self.told.items():
            # A stored answer may be lost by a failover, though its claim is not: then it is unknown. A key that was
            # told unknown as its lease was over may get its answer after all. Or it is free: its proxy had given the
            # claim up before anything was sent, and could not withdraw it before the store was back.
            may_be = {b"replayed", b"unknown"} if name in before else {b"executed", b"unknown"}
            assert again[name] in may_be, (name, was, again[name])
        assert Counter(again.values())[b"replayed"] > len(again) * 0.8


async def gather_some(works: Iterable[Awaitable[bytes]]) -> list[bytes]:
    """Gather, twenty at a time."""
    room = asyncio.Semaphore(20)

    async def one(work: Awaitable[bytes]) -> bytes:
        async with room:
            return await work

    return await asyncio.gather(*map(one, works))


def executions(upstream: RawUpstream) -> Counter[str]:
    return Counter((request.header("Idempotency-Key")[0]).decode() for request in upstream.received)


def failovers(proxies: list[Proxy]) -> int:
    return min(len(proxy.events("store failed over")) for proxy in proxies)


# No second execution ...


@pytest.mark.fault(15, 36)
async def test_a_replicated_master_dies_under_load(proxies, upstream, sentineled):
    """Killed, and then its successor hangs and comes back: no key is executed twice, and each failover is logged."""
    both = [proxies(upstream, sentineled.url, DURABILITY="replicated", **SETTINGS) for _ in range(2)]
    async with Load(both, upstream) as load:
        first = sentineled.master
        first.kill()
        second = await asyncio.to_thread(sentineled.wait_failed_over, first)
        await until(lambda: failovers(both) == 1)
        first.start()  # else the second has a replica less, and the third none
        await asyncio.to_thread(wait_for, lambda: first.ask("REPLICAOF", "127.0.0.1", second.port))
        await asyncio.to_thread(sentineled.wait_in_sync)
        second.pause()
        await asyncio.to_thread(sentineled.wait_failed_over, second)
        second.resume()
        await until(lambda: failovers(both) >= 2)
    await load.assert_once()


@pytest.mark.fault(12, 15, 36)
async def test_a_replicated_cluster_changes_under_load(proxies, upstream, clustered):
    """A master dies, another gives way, and slots move: no key is executed twice."""
    both = [proxies(upstream, clustered.url, DURABILITY="replicated", **SETTINGS) for _ in range(2)]
    dying, giving_way, third = clustered.servers[:3]
    async with Load(both, upstream) as load:
        dying.kill()
        for slot in range(16000, 16020):
            await asyncio.to_thread(clustered.move, slot, giving_way)
        await asyncio.to_thread(wait_for, lambda: clustered.owner_of_slot(0) is not dying)
        dying.start()  # else its slots have no replica any more
        await asyncio.to_thread(wait_for, clustered.in_sync)
        successor = clustered.replica_of(third)
        successor.ask("CLUSTER", "FAILOVER")
        await asyncio.to_thread(wait_for, lambda: clustered.owner_of_slot(15000) is successor)
        await until(lambda: failovers(both) == 2)
        # The replicas of new masters have to follow first.
        await until(lambda: [proxy.admin("/readyz")[0] for proxy in both] == [200, 200], 20)
    await load.assert_once()


# What was lost is said ...


@pytest.mark.fault(13)
async def test_a_flush_is_noticed_also_while_a_slot_moves(proxies, upstream, clustered):
    """The slot by which a proxy looks at a master may be on its way elsewhere as that master loses everything."""
    proxy = proxies(upstream, clustered.url, **SETTINGS)
    places = {name.split(b"epoch")[1] for server in clustered.servers[:3] for name in server.ask("KEYS", "once:epoch*")}
    slot = min(key_slot(place) for place in places)
    source = clustered.owner_of_slot(slot)
    target = next(server for server in clustered.servers[:3] if server is not source)
    before = proxy.metric('store_losses_total{kind="flushed"}')
    clustered.begin_move(slot, source, target)
    try:
        await asyncio.sleep(1.5)  # it looks once a second
        source.ask("FLUSHALL")
        await until(lambda: proxy.metric('store_losses_total{kind="flushed"}') > before)
        assert proxy.metric("claims_lost_total") >= 1
    finally:
        clustered.end_move(slot, source, target)


@pytest.mark.fault(36, 59)
async def test_claims_that_a_failover_lost_are_named(proxies, upstream, sentineled):
    """With `memory` a failover may lose claims: it is logged, and each key that was running is named and counted."""
    proxy = proxies(upstream, sentineled.url, **SETTINGS)
    going = asyncio.Event()
    upstream.script = holding(going)
    master, replicas = sentineled.master, sentineled.replicas
    for replica in replicas:
        replica.pause()
    master.forget_replicas()
    running = [asyncio.ensure_future(ask(proxy.port, request(key=f"key-{n}"))) for n in range(5)]
    await until(lambda: len(upstream.received) == 5)
    master.kill()
    for replica in replicas:
        replica.resume()
    await asyncio.to_thread(sentineled.wait_failed_over, master)
    await until(lambda: len(proxy.events("claim lost")) == 5)  # by the renewals, before anything is settled
    going.set()
    answers = await asyncio.gather(*running)
    assert {answer.header("oncegate-status") for answer in answers} == {b"executed"}
    assert len(proxy.events("store failed over")) == 1
    assert len({line["key_id"] for line in proxy.events("claim lost")}) == 5
    # The loss of the store's epoch counts too, where the replica had not even that.
    assert proxy.metric("claims_lost_total") == 5 + len(
        [one for one in proxy.events("store problem") if one["level"] == "error"]
    )
    again = await asyncio.gather(*[ask(proxy.port, request(key=f"key-{n}")) for n in range(5)])
    assert {answer.header("oncegate-status") for answer in again} == {b"replayed"}
    assert max(executions(upstream).values()) == 1


@pytest.mark.fault(53)
async def test_an_answer_that_a_failover_lost_is_unknown(proxies, upstream, sentineled):
    """Its claim was replicated: the key is in flight again, then unknown, and never executed again."""
    proxy = proxies(upstream, sentineled.url, DURABILITY="replicated", STORE_TIMEOUT_MS=2000, LEASE_MS=1500)
    going = asyncio.Event()
    upstream.script = holding(going)
    running = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    master, replicas = sentineled.master, sentineled.replicas
    await asyncio.to_thread(sentineled.wait_replicated)
    for replica in replicas:
        replica.pause()
    master.forget_replicas()
    going.set()
    assert (await running).header("oncegate-status") == b"executed"
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
    master.kill()
    for replica in replicas:
        replica.resume()
    told = await Load([proxy], upstream).outcome("key-1")
    assert told == b"unknown"
    assert len(upstream.received) == 1


# A level that is not reached ...


@pytest.mark.fault(15)
async def test_a_store_without_the_replica_it_needs(proxies, upstream, own_valkey):
    """Not ready, and nothing is sent; once a replica follows, the same keys are executed."""
    proxy = proxies(upstream, own_valkey.url, DURABILITY="replicated", STORE_TIMEOUT_MS=600)
    await until(lambda: "the durability needs 1" in proxy.admin("/readyz")[1])
    answers = await asyncio.gather(*[ask(proxy.port, request(key=f"key-{n}")) for n in range(10)])
    assert {(answer.status, answer.slug) for answer in answers} == {(503, "store-unavailable")}
    assert upstream.connections == 0
    await until(lambda: own_valkey.records() == {})
    (port,) = free_ports(1)
    with own_valkey.client() as client:
        client.config_set("port", port)
        client.config_set("repl-diskless-sync-delay", 0)
        replica = Server(free_ports(1)[0], "--save", "", "--replicaof", f"127.0.0.1 {port}")
        try:
            await asyncio.to_thread(wait_for, lambda: client.wait(1, 1000) == 1)
            await until(lambda: proxy.admin("/readyz")[0] == 200)
            assert [await Load([proxy], upstream).outcome(f"key-{n}") for n in range(10)] == [b"executed"] * 10
        finally:
            replica.close()
