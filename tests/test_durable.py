"""Claims that take effect only once a replica or a disk has them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from loadtest.ports import free_ports
from oncegate.keys.digests import Digests
from oncegate.store.record import Claim
from oncegate.store.record_name import store_key
from oncegate.store.redis.arguments import CLAIM_COUNT
from oncegate.store.redis.durable import DurabilityLevel, level, unsafe_policy
from oncegate.store.redis.wire import ErrorReply
from oncegate.store.results import NotAttempted, SettleResult, SettleStatus, Unconfirmed, UnderReplicated
from oncegate.store.store import Store
from tests.parts import until
from tests.resp import GREETING, Connection, RespServer, Words, resp
from tests.stores import SCOPE, Behind, claim, claimed, connected, store_at, store_small, told
from tests.topologies import Server, replicated, wait_for

REPLICATED, ON_DISK, ON_BOTH_DISKS = (
    DurabilityLevel(1, fsync=False),
    DurabilityLevel(0, fsync=True),
    DurabilityLevel(1, fsync=True),
)


def key(number: int) -> bytes:
    return Digests(b"").key(SCOPE, b"key-%d" % number)


@pytest.mark.parametrize(
    ("durability", "several", "asked"),
    [
        ("memory", True, None),
        ("replicated", False, REPLICATED),
        ("replicated", True, REPLICATED),
        ("fsync", False, ON_DISK),
        ("fsync", True, ON_BOTH_DISKS),
    ],
)
def test_levels(durability, several, asked):
    """The level of each setting; `fsync` includes one replica where the store has replicas."""
    assert level(durability, several) == asked


@pytest.mark.parametrize(
    ("asked", "reply", "lacking"),
    [
        (REPLICATED, 0, "the claim reached 0 of 1 replicas in time"),
        (REPLICATED, 1, None),
        (REPLICATED, 2, None),
        (REPLICATED, [1, 1], "[1, 1]"),
        (REPLICATED, b"OK", "b'OK'"),
        (ON_DISK, [0, 0], "the claim did not reach the disk in time"),
        (ON_DISK, [1, 0], None),
        (ON_DISK, 1, "1"),
        (ON_BOTH_DISKS, [1, 0], "the claim reached 0 of 1 replicas in time"),
        (ON_BOTH_DISKS, [0, 1], "the claim did not reach the disk in time"),
        (ON_BOTH_DISKS, [1, 2], None),
    ],
)
def test_the_count_is_checked(asked, reply, lacking):
    """WAIT returns a count also when its time is over, so the count decides."""
    assert asked.lacking(reply) == lacking


# One WAIT for all ...


@pytest.fixture
async def scripted() -> AsyncIterator[RespServer]:
    server = RespServer()
    await server.start()
    yield server
    server.close()


class Counting:
    """A server that answers claims at once, and each WAIT when the test says so."""

    def __init__(self) -> None:
        self.waits: list[tuple[Connection, Words]] = []

    def __call__(self, connection: Connection, words: Words) -> bytes | None:
        if words[0] in (b"WAIT", b"WAITAOF"):
            self.waits.append((connection, words))
            connection.behind = []
            return None
        if len(words) == 5 + CLAIM_COUNT:  # behind the script, the key and the tag
            return resp([words[4], b"claimed", 1_763_960_000_000, b"1763960000000000", 1_763_960_000_000])
        return resp([words[4], b"released", b"found"])

    def answer(self, reply: bytes) -> None:
        connection, _ = self.waits.pop(0)
        behind, connection.behind = connection.behind, None
        connection.transport.write(b"".join([reply, *(behind or ())]))


async def test_all_claims_of_a_write_share_one_wait(scripted):
    """Claims that come during a WAIT leave together after it, with one WAIT for all of them."""
    scripted.script = counting = Counting()
    async with connected(scripted.url, durability="replicated") as store:
        first = [asyncio.ensure_future(claimed(store, key=key(number))) for number in range(20)]
        await until(lambda: counting.waits)
        second = [asyncio.ensure_future(claimed(store, key=key(number))) for number in range(20, 50)]
        await asyncio.sleep(0.05)
        assert len(counting.waits) == 1
        assert len(scripted.calls) == 21
        assert not any(task.done() for task in first)
        counting.answer(b":1\r\n")
        await asyncio.gather(*first)
        await until(lambda: counting.waits)
        assert not any(task.done() for task in second)
        counting.answer(b":2\r\n")
        await asyncio.gather(*second)
        assert [words[0] for words in scripted.calls].count(b"WAIT") == 2
        assert len({words[4] for words in scripted.calls if words[0] == b"EVALSHA"}) == 50


async def test_other_commands_do_not_wait(scripted):
    """Renewals, settles and peeks use the other connection, and get their replies while a WAIT runs."""
    scripted.script = counting = Counting()
    async with connected(scripted.url, durability="replicated") as store:
        owner = asyncio.ensure_future(claimed(store))
        await until(lambda: counting.waits)
        scripted.script = lambda connection, words: resp([words[4], b"released", b"found"])
        other = Claim(key(2), b"t" * 16, b"1", b"hold", b"", b"", 1, 300, 1000, 1000)
        assert await store.release(other, 1.0) == SettleResult(SettleStatus.RELEASED)
        assert not owner.done()
        counting.answer(b":1\r\n")
        await owner


@pytest.mark.parametrize("reply", [b":0\r\n", b"-UNBLOCKED force unblock from blocking operation\r\n", b"$-1\r\n"])
@pytest.mark.fault(15)
async def test_a_claim_below_its_level_is_given_back(scripted, reply):
    """A claim that too few replicas have is repeated with its token, then released, and not held."""
    counting, behind = Counting(), Behind()

    def script(connection: Connection, words: Words) -> bytes | None:
        return reply if words[0] == b"WAIT" else counting(connection, words)

    scripted.script = script
    async with connected(scripted.url, durability="replicated", timeout_ms=300, behind=behind) as store:
        found = await claim(store)
        assert (type(found), found.maybe_executed) == (UnderReplicated, False)
        tokens = {words[5] for words in scripted.calls if words[0] == b"EVALSHA"}
        assert len(tokens) == 1
        assert len([words for words in scripted.calls if words[0] == b"WAIT"]) > 1
        assert scripted.calls[-1][6] == b"release"
        assert behind.works == []


async def test_a_replica_that_left_may_have_been_promoted(scripted, monkeypatch):
    """After a replica left, claims do not count until the sentinels would have named a new master."""
    monkeypatch.setattr("oncegate.store.redis.durable.LEFT_S", 0.8)
    counting = Counting()
    scripted.script = lambda connection, words: b":1\r\n" if words[0] == b"WAIT" else counting(connection, words)

    def connected_replicas(number: int) -> None:
        scripted.greeting[b"INFO"] = resp(b"redis_version:7.2.0\r\nrole:master\r\nconnected_slaves:%d\r\n" % number)

    connected_replicas(2)
    async with connected(scripted.url, durability="replicated", timeout_ms=300) as store:
        await claimed(store, key=key(1))
        connected_replicas(1)
        found = await claim(store, key(2))
        assert (type(found), found.maybe_executed) == (UnderReplicated, False)
        assert "a replica has left the master" in found.reason
        assert scripted.calls[-1][6] == b"release"
        await asyncio.sleep(0.8)
        await claimed(store, key=key(3))
        connected_replicas(2)
        await claimed(store, key=key(4))


async def test_a_claim_that_nobody_confirms_is_withdrawn(scripted):
    """A claim whose connection is lost during its WAIT may exist, and is released in the background."""
    counting, behind = Counting(), Behind()
    scripted.script = counting
    async with connected(scripted.url, durability="replicated", timeout_ms=300, behind=behind) as store:
        asking = asyncio.ensure_future(claim(store))
        await until(lambda: counting.waits)
        counting.waits[0][0].transport.abort()
        found = await asking
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        assert len(behind.works) == 1


# Real servers ...


@asynccontextmanager
async def running(*servers: Server) -> AsyncIterator[None]:
    try:
        for server in servers:
            await asyncio.to_thread(wait_for, lambda server=server: server.ask("PING"))
        yield
    finally:
        for server in servers:
            server.close()


def pair(*options: str) -> tuple[Server, Server]:
    """A master and its replica."""
    ports = free_ports(2)
    fast = ("--save", "", "--repl-diskless-sync-delay", "0", "--repl-timeout", "3", *options)
    return Server(ports[0], *fast), Server(ports[1], *fast, "--replicaof", f"127.0.0.1 {ports[0]}")


@asynccontextmanager
async def watched(url: str, durability: str, **options: Any) -> AsyncIterator[Store]:
    async with connected(url, durability=durability, **{"timeout_ms": 1000, **options}) as store:
        watch = asyncio.ensure_future(store.watch())
        yield store
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def claimed_at_last(store: Store, of: bytes) -> Claim:
    """Claim a free key as often as it takes until a replica follows."""
    async with asyncio.timeout(15):
        while not isinstance(found := await claim(store, of), Claim):
            assert isinstance(found, Unconfirmed), found
        return found


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncegate.store.redis.node.HEALTH_S", 0.05)


@pytest.mark.fault(15)
async def test_a_replica_that_hangs(often):
    """Without a replica no claim counts, each key is free afterwards, and stored responses are replayed."""
    master, replica = pair()
    behind = Behind()
    async with running(master, replica):
        await asyncio.to_thread(wait_for, lambda: replicated(master, 1))
        async with watched(f"redis://127.0.0.1:{master.port}", "replicated", behind=behind) as store:
            await until(lambda: store.not_ready_reason() is None)
            stored = await claimed_at_last(store, key(1))
            assert await store_small(store, stored) == SettleResult(SettleStatus.STORED)
            assert store_key(stored.key) in replica.records()
            replica.pause()
            began = asyncio.get_running_loop().time()
            found = await asyncio.gather(*[claim(store, key(number)) for number in range(100, 150)])
            assert asyncio.get_running_loop().time() - began < 1.5
            assert {type(one) for one in found} == {UnderReplicated}
            assert {one.reason for one in found} == {"the claim reached 0 of 1 replicas in time"}
            assert behind.works == []
            assert master.records().keys() == {store_key(stored.key)}
            assert told(await claim(store, stored.key)) == "replay"
            replica.resume()
            await claimed_at_last(store, key(100))
            replica.kill()
            await until(lambda: "has 0 replicas, and the durability needs 1" in (store.not_ready_reason() or ""))


async def test_no_replica_at_all(own_valkey, often):
    """A store without the replicas that it needs is not ready, and says why."""
    async with watched(own_valkey.url, "replicated") as store:
        await until(lambda: store.not_ready_reason() == "the store has 0 replicas, and the durability needs 1")


@asynccontextmanager
async def on_disk(appendfsync: str) -> AsyncIterator[tuple[Server, str]]:
    """A server with an append-only file, and its URL."""
    (port,) = free_ports(1)
    server = Server(port, "--save", "", "--appendonly", "yes", "--appendfsync", appendfsync)
    async with running(server):
        yield server, f"redis://127.0.0.1:{port}"


async def test_on_disk(often):
    """With an append-only file a claim is on disk once it counts; without one the store is not ready."""
    async with on_disk("always") as (server, url), watched(url, "fsync") as store:
        await asyncio.gather(*[claimed(store, key=key(number)) for number in range(50)])
        assert store.not_ready_reason() is None
        server.ask("CONFIG", "SET", "appendonly", "no")
        await until(
            lambda: "has no append-only file, which the durability fsync needs" in (store.not_ready_reason() or "")
        )
        found = await claim(store, key(99))
        assert isinstance(found, Unconfirmed)
        assert "WAITAOF" in found.reason
        assert len(server.records()) == 50


@pytest.mark.parametrize(
    ("reply", "unsafe"),
    [
        ([b"appendfsync", b"always", b"no-appendfsync-on-rewrite", b"no"], None),
        ([b"no-appendfsync-on-rewrite", b"no", b"appendfsync", b"always"], None),
        ([b"appendfsync", b"everysec", b"no-appendfsync-on-rewrite", b"no"], "has appendfsync everysec"),
        ([b"appendfsync", b"no", b"no-appendfsync-on-rewrite", b"no"], "has appendfsync no,"),
        ([b"appendfsync", b"always", b"no-appendfsync-on-rewrite", b"yes"], "has no-appendfsync-on-rewrite yes"),
        ([b"appendfsync", b"always"], "has no-appendfsync-on-rewrite unknown"),
        ([], "has appendfsync unknown"),
        (ErrorReply("NOPERM no permissions to run the 'config|get' command"), "the user needs +config|get"),
        (ErrorReply("ERR unknown command 'CONFIG'"), "the user needs +config|get"),
        (Unconfirmed("no reply in time"), "no reply in time"),
    ],
)
def test_when_a_disk_is_believed(reply, unsafe):
    """Only a server that says that it writes to its disk before each reply, also while it rewrites its file."""
    found = unsafe_policy(reply)
    assert (found is None) == (unsafe is None)
    assert (unsafe or "") in (found or "")


@pytest.mark.parametrize("unsafe", [("appendfsync", "everysec"), ("no-appendfsync-on-rewrite", "yes")])
async def test_a_server_that_replies_before_its_disk_has_the_claim(often, unsafe):
    """WAITAOF confirms on such a server, and is not believed: no claim is sent, until the setting is in force."""
    async with on_disk("always") as (server, url):
        server.ask("CONFIG", "SET", *unsafe)
        async with watched(url, "fsync") as store:
            needs = f"has {' '.join(unsafe)}, and the durability fsync needs"
            await until(lambda: needs in (store.not_ready_reason() or ""))
            found = await claim(store, key(1))
            assert isinstance(found, NotAttempted)
            assert needs in found.reason
            assert server.records() == {}
            server.ask("CONFIG", "SET", unsafe[0], "always" if unsafe[1] == "everysec" else "no")
            await until(lambda: store.not_ready_reason() is None)
            await claimed(store, key=key(1))


async def test_a_disk_is_checked_with_each_claim_and_each_connection():
    """A setting that changes is noticed by the next claim, which is given back, and by the next connection."""
    async with on_disk("always") as (server, url), connected(url, durability="fsync", timeout_ms=1000) as store:
        await claimed(store, key=key(1))
        server.ask("CONFIG", "SET", "appendfsync", "everysec")
        found = await claim(store, key(2))
        assert isinstance(found, UnderReplicated)
        assert "has appendfsync everysec" in found.reason
        assert server.records().keys() == {store_key(key(1))}
        assert store.not_ready_reason() is None  # nobody inspects this one
        lost = store.nodes[0].claims.at
        server.ask("CLIENT", "KILL", "TYPE", "normal")
        await until(lambda: "has appendfsync everysec" in (store.not_ready_reason() or ""))
        assert store.nodes[0].claims.at == lost


async def test_a_server_that_hides_its_disk(often):
    """Where the user may not read the setting, the store is not ready and says what the user needs."""
    async with on_disk("always") as (server, url):
        server.ask("ACL", "SETUSER", "plain", "on", ">pw", "~once:*", "+@all", "-config")
        async with watched(url.replace("//", "//plain:pw@"), "fsync") as store:
            await until(lambda: "the user needs +config|get" in (store.not_ready_reason() or ""))
            assert isinstance(await claim(store), NotAttempted)
            server.ask("ACL", "SETUSER", "plain", "+config|get")
            await until(lambda: store.not_ready_reason() is None)
            await claimed(store)


@pytest.mark.parametrize(("durability", "denied"), [("replicated", "wait"), ("fsync", "waitaof")])
async def test_a_user_who_may_not_wait(often, durability, denied):
    """The store is not ready where the user may not wait for replicas or disks."""
    async with on_disk("always") as (server, url):
        server.ask("ACL", "SETUSER", "plain", "on", ">pw", "~once:*", "+@all", f"-{denied}")
        async with watched(url.replace("//", "//plain:pw@"), durability) as store:
            await until(lambda: "cannot be waited for" in (store.not_ready_reason() or ""))
            assert isinstance(found := await claim(store), NotAttempted)
            assert f"'{denied}'" in found.reason


async def test_a_server_without_waitaof(scripted):
    """With fsync a server older than 7.2 is refused with its reason."""
    scripted.greeting[b"INFO"] = GREETING[b"INFO"].replace(b"7.2.0", b"7.0.9")
    await assert_unreachable_for(scripted.url, "fsync", "has no WAITAOF, which the durability fsync needs")


async def assert_unreachable_for(url: str, durability: str, because: str) -> None:
    behind = Behind()
    store = store_at(url, timeout_ms=300, patience_s=1, background=behind, durability=durability)
    store.start()
    try:
        await until(lambda: because in (store.not_ready_reason() or ""))
        assert isinstance(await claim(store), Unconfirmed)
    finally:
        await store.close()
