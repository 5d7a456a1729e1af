"""The master that sentinels name: found, left and found anew, while claims and settles go on."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any

import pytest
import trustme

from loadtest.ports import free_ports
from oncegate.store.record import Claim
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding
from oncegate.store.redis.topologies.sentinel import FOLLOW_S
from oncegate.store.results import (
    AppendStatus,
    NotAttempted,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    Unconfirmed,
    UnderReplicated,
)
from oncegate.store.store import Store
from tests.parts import until
from tests.resp import Connection, RespServer, Words, relaying, resp
from tests.stores import PATIENCE_S, answer, claim, claimed, connected, key, store_small, told
from tests.test_redis_store import Log, assert_unreachable, live
from tests.topologies import ACL, SERVICE, Sentineled, Server, wait_for


@pytest.fixture
def group() -> Iterator[Sentineled]:
    """A master, two replicas and three sentinels."""
    group = Sentineled()
    yield group
    group.close()


@asynccontextmanager
async def watching(url: str, log: Log, **options: Any) -> AsyncIterator[Store]:
    """Yield a store that is up and watches its servers."""
    options = {"timeout_ms": 1000, **options}
    async with connected(url, log=lambda event, **fields: log.append((event, fields)), **options) as store:
        watch = asyncio.ensure_future(store.watch())
        yield store
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def claimed_at_last(store: Store, of: bytes, seconds: float = 30) -> Claim:
    """Claim a free key as often as it takes."""
    async with asyncio.timeout(seconds):
        while not isinstance(found := await claim(store, of), Claim):
            assert isinstance(found, Unconfirmed), found
            await asyncio.sleep(0.05)
        return found


# Real servers ...


async def test_every_verb(group):
    """Every verb of a key's life works on the master that the sentinels name."""
    await live(group.url)


@pytest.mark.parametrize("how", ["killed", "paused", "switched"])
@pytest.mark.fault(46, 50)
async def test_the_master_changes_while_a_key_is_claimed(group, how):
    """The claim stands on the new master, its settle outlasts the change, and new keys are claimed there.

    A master that is killed, one that hangs and comes back, and one that the operator switches.
    """
    log: Log = []
    async with watching(group.url, log) as store:
        news = asyncio.Event()
        store.wakes.watch(key(2), news.set)
        await until(lambda: store.wakes.is_live(key(2)))
        before, owner, stored = group.master, await claimed(store), await claimed(store, key=key(3))
        assert await store.append(stored, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
        assert await store.store(stored, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.STORED)
        await asyncio.to_thread(group.wait_replicated)
        match how:
            case "killed":
                before.kill()
            case "paused":
                before.pause()
            case "switched":
                group.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE)
        assert await store_small(store, owner) == SettleResult(SettleStatus.STORED)
        now = await asyncio.to_thread(group.wait_failed_over, before)
        if how == "paused":
            before.resume()
        # What the old master takes until the store has left it is lost with it.
        await until(lambda: log and {link.at for link in store.nodes[0].links} == {("127.0.0.1", now.port)})
        other = await claimed_at_last(store, key(2))
        await store.append(other, 0, b"0", PATIENCE_S, b"head")
        await store.follow(other.key, other.token, 0, 60_000)
        await until(lambda: store.wakes.is_live(key(2)))
        news.clear()
        assert await store.append(other, 1, b"1", PATIENCE_S) is AppendStatus.APPENDED_READ
        await asyncio.wait_for(news.wait(), 20)
        (subscriber,) = store.wakes._subscribers.values()
        await until(lambda: subscriber.at == ("127.0.0.1", now.port))
        assert {store_key(owner.key), store_key(key(2))} <= now.records().keys()
        assert told(await claim(store)) == "replay"
        assert await store.read(stored.key, stored.token, 0) == [b"ab", b"cd"]
        await until(lambda: store.not_ready_reason() is None)
        place = f"127.0.0.1:{before.port}", f"127.0.0.1:{now.port}"
        assert ("store failed over", {"service": SERVICE, "was": place[0], "now": place[1]}) in log


@pytest.mark.fault(36, 59)
async def test_a_claim_that_a_failover_lost(group):
    """A claim that no replica had: its renewal is absent, its settle stores the response and reports the loss.

    Its mark is lost as well: whoever swaps from its value does not win, and begins anew.
    """
    async with watching(group.url, []) as store:
        before = group.master
        for replica in group.replicas:
            replica.pause()
        before.forget_replicas()
        owner, taken = await claimed(store), await claimed(store, key=key(2))
        mark = store_key(taken.key) + b":test"
        assert await store.marks.swap(mark, b"", b"one", 600_000) is True
        before.kill()
        assert await store.marks.swap(mark, b"one", b"two", 600_000) is None
        for server in group.servers:
            if server.runs:
                server.resume()
        await asyncio.to_thread(group.wait_failed_over, before)
        other = await claimed_at_last(store, taken.key)
        assert await store.renew(owner) == RenewStatus.ABSENT
        assert await store_small(store, owner) == SettleResult(SettleStatus.STORED, record_was_gone=True)
        assert await store.renew(taken) == RenewStatus.FENCED
        assert await store_small(store, taken) == SettleResult(SettleStatus.FENCED)
        assert await store.renew(other) == RenewStatus.RENEWED
        assert [await store.marks.swap(mark, seen, b"new", 600_000) for seen in (b"one", b"")] == [False, True]
        seen = Deciding(taken.token, seen_lease=0)
        assert await store.release_by_operator(taken.key, seen, store.token(), b"1") is ResolveStatus.FENCED


@pytest.mark.fault(36)
async def test_no_claim_is_lost_beside_a_master_that_lives(group):
    """A manual failover promotes one replica while the other still confirms to the old master: no claim is lost."""
    before, numbers, confirmed, taking = group.master, count(1), [], True
    async with watching(group.url, [], durability="replicated") as store:

        async def take() -> None:
            while taking:
                if isinstance(await claim(store, of := key(next(numbers))), Claim):
                    confirmed.append(store_key(of))

        takers = [asyncio.ensure_future(take()) for _ in range(4)]
        await until(lambda: len(confirmed) > 100)
        await asyncio.to_thread(wait_for, lambda: group.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE))
        now = await asyncio.to_thread(group.wait_failed_over, before)
        await until(lambda: {link.at for link in store.nodes[0].links} == {("127.0.0.1", now.port)})
        then = len(confirmed)
        await until(lambda: len(confirmed) > then, 20)
        taking = False
        await asyncio.gather(*takers)
    assert set(confirmed) <= now.records().keys()


async def test_on_the_disks():
    """With fsync a claim counts once a replica has it on disk; a replica without a file does not count."""
    group = Sentineled("--appendonly", "yes", "--appendfsync", "always", replicas=1)
    try:
        async with connected(group.url, timeout_ms=1000, durability="fsync") as store:
            await claimed_at_last(store, key(1))
            group.replicas[0].ask("CONFIG", "SET", "appendonly", "no")
            found = await claim(store, key(2))
            assert found == UnderReplicated("the claim reached 0 of 1 replicas in time", maybe_executed=False)
            assert store_key(key(2)) not in group.master.records()
    finally:
        group.close()


async def test_a_new_master_that_does_not_sync():
    """A replica with another `appendfsync` takes no claims once it is the master; known keys are told."""
    group = Sentineled("--appendonly", "yes", "--appendfsync", "always", replicas=1)
    try:
        async with watching(group.url, [], durability="fsync") as store:
            await store_small(store, await claimed_at_last(store, key(1)))
            await asyncio.to_thread(group.wait_replicated)
            former = group.master
            group.replicas[0].ask("CONFIG", "SET", "appendfsync", "everysec")
            group.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE)
            await asyncio.to_thread(group.wait_failed_over, former)
            await until(lambda: "has appendfsync everysec" in (store.not_ready_reason() or ""))
            assert isinstance(await claim(store, key(2)), NotAttempted)
            for _ in range(20):
                assert told(await claim(store, key(1))) == "replay"
    finally:
        group.close()


async def test_one_sentinel_is_enough(group):
    """With one sentinel paused and one gone, no claim fails, and the third still reports a failover."""
    group.sentinels[0].pause()
    async with watching(group.url, []) as store:
        await claimed(store)
    group.sentinels[0].resume()


async def test_with_passwords():
    """Servers and sentinels have passwords of their own, the servers' user the rights that the page on settings
    names; what is wrong is said."""
    config = f"requirepass secret\nmasterauth secret\n{ACL}\n"
    group = Sentineled(replicas=1, config=config, password="secret", sentinel_password="watch")
    try:
        where, watch = f"{group.places}/{SERVICE}", "?sentinel_password=watch"
        await live(f"redis+sentinel://oncegate:PASSWORD@{where}{watch}")
        await live(f"redis+sentinel://:secret@{where}{watch}&db=1")
        await assert_unreachable(f"redis+sentinel://:secret@{where}", "Authentication required")
        await assert_unreachable(f"redis+sentinel://oncegate:no@{where}{watch}", "invalid username-password")
        await assert_unreachable(f"redis+sentinel://{where}{watch}", "Authentication required")
    finally:
        group.close()


# Sentinels that say what they are told to ...


class Saying:
    """A sentinel that names a given master; `promoted` is the port of a server that takes the master's place."""

    def __init__(self, host: str, port: int, epoch: int = 1, flags: str = "master") -> None:
        self.host, self.port, self.epoch, self.flags = host, port, epoch, flags
        self.promoted: int | None = None
        self.server = RespServer(self._say)

    def _say(self, _: Connection, words: Words) -> bytes:
        if words == [b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", SERVICE.encode()]:
            return resp([self.host.encode(), str(self.promoted or self.port).encode()])
        assert words == [b"SENTINEL", b"MASTER", SERVICE.encode()]
        said = {"name": SERVICE, "ip": self.host, "port": self.port, "flags": self.flags, "config-epoch": self.epoch}
        return resp([str(word).encode() for pair in said.items() for word in pair])

    @property
    def place(self) -> str:
        return f"localhost:{self.server.port}"


@asynccontextmanager
async def saying(*sentinels: Saying, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Return the URL of these sentinels."""
    async with AsyncExitStack() as stack:
        for sentinel in sentinels:
            await sentinel.server.start(tls)
            stack.callback(sentinel.server.close)
        yield f"redis+sentinel://{','.join(sentinel.place for sentinel in sentinels)}/{SERVICE}"


@pytest.fixture
def two() -> Iterator[tuple[Server, Server]]:
    """Two servers that both believe to be the master."""
    servers = [Server(port, "--save", "") for port in free_ports(2)]
    for server in servers:
        wait_for(lambda server=server: server.ask("PING"))
    yield servers[0], servers[1]
    for server in servers:
        server.close()


async def test_a_master_that_was_cut_off_is_left(two):
    """A master that still replies is left for the one that the sentinels name, without a new connection."""
    old, new = two
    sentinel = Saying("127.0.0.1", old.port)
    log: Log = []
    async with saying(sentinel) as url, watching(url, log) as store:
        await claimed(store)
        sentinel.port, sentinel.epoch = new.port, 2
        await until(lambda: log)
        await claimed_at_last(store, key(2))
        assert store_key(key(2)) in new.records()
        assert store_key(key(2)) not in old.records()
        await until(lambda: {link.at for link in store.nodes[0].links} == {("127.0.0.1", new.port)})


async def test_a_master_that_stood_still_while_it_was_replaced_is_not_used(two):
    """A proxy that was connecting to a paused master does not claim keys there after its replacement."""
    old, new = two
    sentinel = Saying("127.0.0.1", old.port)
    log: Log = []
    old.pause()
    try:
        async with saying(sentinel) as url:
            opening = asyncio.ensure_future(_log_of(url, log))
            await until(lambda: sentinel.server.calls)
            await asyncio.sleep(0.3)  # all of its connections wait for the one that stands still
            sentinel.port, sentinel.epoch = new.port, 2
            old.resume()
            assert await opening == {("127.0.0.1", new.port)}
    finally:
        old.resume()
    assert old.records() == {}
    assert [event for event, _ in log if event == "store failed over"] == []


async def _log_of(url: str, log: Log) -> set[tuple[str, int] | None]:
    """Claim a key and return where the connections lead once all of them are up."""
    async with watching(url, log) as store:
        await claimed_at_last(store, key(1))
        links = store.nodes[0].links
        await until(lambda: all(link.up for link in links))
        return {link.at for link in links}


async def test_the_newest_word_wins(two):
    """The sentinel with the higher epoch is believed; one that was cut off names the old master."""
    old, new = two
    sentinels = Saying("127.0.0.1", old.port, 3), Saying("127.0.0.1", new.port, 10), Saying("127.0.0.1", old.port, 9)
    async with saying(*sentinels) as url, connected(url) as store:
        await claimed(store)
        assert len(new.records()) == 1


@pytest.mark.parametrize("flags", ["master,failover_in_progress", "s_down,o_down,master,failover_in_progress"])
async def test_a_sentinel_in_the_middle_of_its_failover(two, flags):
    """The old master is left while the sentinel waits for the other replicas, dead or alive."""
    old, new = two
    leader, other = Saying("127.0.0.1", old.port, 2, flags), Saying("127.0.0.1", new.port, 2)
    leader.promoted = new.port
    async with saying(leader) as url, connected(url) as store:
        await claimed(store)
    log: Log = []
    async with saying(leader, other) as url, watching(url, log) as store:
        await claimed(store, key=key(2))
        await asyncio.sleep(2 * FOLLOW_S)
    assert len(new.records()) == 2
    assert old.records() == {}
    assert [event for event, _ in log if event == "store failed over"] == []


async def test_a_replica_is_not_used(two):
    """A replica that is named as the master is refused, and used once it is promoted."""
    old, new = two
    new.ask("REPLICAOF", "127.0.0.1", old.port)
    async with saying(Saying("127.0.0.1", new.port)) as url:
        await assert_unreachable(url, "is named as the master, and is a replica")
        async with asyncio.timeout(20):
            opening = connected(url)
            promote = asyncio.get_running_loop().call_later(0.3, lambda: new.ask("REPLICAOF", "NO", "ONE"))
            async with opening as store:
                await claimed(store)
            promote.cancel()


@pytest.mark.parametrize(
    ("said", "because"),
    [
        (lambda sentinel: setattr(sentinel, "flags", "s_down,o_down,master"), "is down, as the sentinels agree"),
        (lambda sentinel: setattr(sentinel.server, "script", lambda *_: b"-ERR No such master\r\n"), "No such master"),
        (lambda sentinel: setattr(sentinel.server, "script", lambda *_: b"-IDONTKNOW\r\n"), "IDONTKNOW"),
        (lambda sentinel: setattr(sentinel.server, "script", lambda *_: None), "Timeout reading from"),
        (lambda sentinel: sentinel.server.close(), "no sentinel names the master of orders"),
    ],
)
async def test_no_master(two, said: Callable[[Saying], None], because):
    """Sentinels that name no master make the store unreachable with a reason, and no call hangs."""
    sentinel = Saying("127.0.0.1", two[0].port)
    async with saying(sentinel) as url:
        said(sentinel)
        await assert_unreachable(url, because)


async def test_over_tls(valkey, monkeypatch, tmp_path):
    """Sentinels and servers are reached over TLS, and their certificates are checked."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with relaying(valkey.socket, context) as relay, saying(Saying("localhost", relay.port), tls=context) as url:
        secure = url.replace("redis+", "rediss+")
        await assert_unreachable(secure, "(?i)certificate verify failed")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        await live(secure)
        await assert_unreachable(url, ".")


async def test_a_sentinel_is_not_a_store(group):
    """A URL that names a sentinel as the store is refused with the right form of URL."""
    await assert_unreachable(
        f"redis://127.0.0.1:{group.sentinel_ports[0]}", "this is a sentinel: name it as redis.sentinel"
    )
