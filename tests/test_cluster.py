"""A cluster: every key reaches its master while slots move, masters fail and replicas take over."""

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import pytest
import trustme
from redis.crc import key_slot
from redis.exceptions import ResponseError

from oncegate.store import membership
from oncegate.store.membership import Membership
from oncegate.store.record import PREFIX_BYTES, Claim, ViewState
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding, StoreError
from oncegate.store.redis.signals import wakes
from oncegate.store.redis.signals.mailboxes import mailbox_of
from oncegate.store.redis.signals.wakes import channel_of
from oncegate.store.redis.topologies.cluster_map import tag_within, view_of
from oncegate.store.results import (
    AppendStatus,
    Followed,
    NotAttempted,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    Unconfirmed,
)
from oncegate.store.store import Store
from tests.parts import until
from tests.resp import relaying
from tests.stores import PATIENCE_S, SCOPE, Behind, answer, claim, claimed, connected, key, store_small, told
from tests.test_redis_store import Log, assert_unreachable, live
from tests.topologies import ACL, Clustered, replicated, wait_for


def keys_on(first: int, last: int, number: int) -> list[bytes]:
    """Return keys whose slots lie within a range."""
    found = (key(n) for n in count() if first <= key_slot(store_key(key(n))) <= last)
    return [next(found) for _ in range(number)]


@pytest.fixture(scope="module")
def standing() -> Iterator[Clustered]:
    """Three masters with a replica each, for tests that leave them as they are."""
    cluster = Clustered()
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(standing: Clustered) -> Clustered:
    for server in standing.servers:
        if server.info()["role"] == "master":
            server.ask("FLUSHALL")
    return standing


@pytest.fixture
def fragile() -> Iterator[Clustered]:
    """Three masters with a replica each, for tests that break them."""
    cluster = Clustered()
    yield cluster
    cluster.close()


@asynccontextmanager
async def watching(url: str, log: Log, **options: Any) -> AsyncIterator[Store]:
    options = {"timeout_ms": 1000, **options}
    async with connected(url, log=lambda event, **fields: log.append((event, fields)), **options) as store:
        watch = asyncio.ensure_future(store.watch())
        yield store
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def life(store: Store, of: bytes) -> None:
    """Run every verb of one key's life."""
    owner = await claimed(store, key=of)
    assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
    assert await store.renew(owner) == RenewStatus.RENEWED
    assert await store.store(owner, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    assert told(await claim(store, of)) == "replay"
    assert told(await store.peek(of, SCOPE, 300)) == "replay"
    assert await store.read(of, owner.token, 0) == [b"ab", b"cd"]


# Each key on its master ...


async def test_every_verb_on_every_master(cluster):
    """Keys on all masters are claimed and stored at once; each record is where its slot is."""
    async with watching(cluster.url, []) as store:
        assert len(store.nodes) == 3
        await asyncio.gather(*[life(store, key(number)) for number in range(60)])
        masters = cluster.servers[:3]
        for master in masters:
            assert {cluster.master_of(name).port for name in master.records()} == {master.port}
        assert sum(len(master.records()) for master in masters) == 60
        assert store.not_ready_reason() is None


async def test_one_write_a_master(cluster):
    """Thirty renewals at once go to each master as one batch on one connection."""
    async with watching(cluster.url, []) as store:
        owners = [await claimed(store, key=key(number)) for number in range(30)]
        masters = cluster.servers[:3]
        before = [master.info("clients")["connected_clients"] for master in masters]
        assert set(await asyncio.gather(*[store.renew(owner) for owner in owners])) == {RenewStatus.RENEWED}
        assert [master.info("clients")["connected_clients"] for master in masters] == before


async def test_a_claims_deadline_is_in_its_masters_time(cluster):
    """A wrong idea of one master's clock does not affect another's claims."""
    async with watching(cluster.url, []) as store:
        nodes = store.nodes
        for node, hours in zip(nodes, (-1, 0, 1), strict=True):
            node._clock.offset_ms += hours * 3_600_000
        await asyncio.gather(*[claimed(store, key=key(number)) for number in range(30)])
        assert max(abs(node.now_ms() - nodes[0].now_ms()) for node in nodes) < 5000


async def test_tags_lie_on_their_masters(cluster):
    """Each master has a hash tag whose keys lie on it."""
    async with watching(cluster.url, []) as store:
        for node in store.nodes:
            assert node.name == f"127.0.0.1:{cluster.master_of(b'once:epoch' + node.tag).port}"


# While slots move ...


@pytest.mark.fault(12)
async def test_the_masters_agree_on_the_layout_of_records(cluster, monkeypatch):
    """An older version that shows on one of them holds all to hashes. Once it is gone, it gets in on none of them."""
    monkeypatch.setattr("oncegate.store.redis.node.HEALTH_S", 0.05)
    monkeypatch.setattr(membership, "LIVE_S", 0.5)
    member = Membership(
        bytes(PREFIX_BYTES), "one", "namespace=a", False, 60_000, 0, 60.0, True, lambda *_: None, str, "packed"
    )
    async with watching(cluster.url, [], member=member) as store:
        notes = [b"once:rules" + node.tag for node in store.nodes]
        assert len(notes) == 3
        older = cluster.master_of(notes[1])
        for _ in range(20):
            older.ask("HSET", notes[1], "R1", "1")
            older.ask("PEXPIRE", notes[1], "500")
            assert not store.layout.packed
            await asyncio.sleep(0.05)
        await until(lambda: store.layout.packed)
        for note in notes:
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                cluster.master_of(note).ask("HSET", note, "R1", "1")


async def test_a_slot_that_moves(cluster):
    """Keys are claimed, read and settled before, during and after a move: ASK and MOVED fail no call."""
    source, target = cluster.servers[0], cluster.servers[1]
    first, second, third = keys_on(0, 5000, 3)
    slot = key_slot(store_key(first))
    slots = {slot, *(key_slot(store_key(other)) for other in (second, third))}
    async with watching(cluster.url, []) as store:
        owner = await claimed(store, key=first)
        try:
            for moving in slots:
                cluster.begin_move(moving, source, target)
            fresh = await claimed(store, key=second)  # absent: ASK leads to the new master
            assert target.ask("CLUSTER", "COUNTKEYSINSLOT", key_slot(store_key(second))) == 1
            assert await store.renew(owner) == RenewStatus.RENEWED  # still on the old one
            cluster.carry(slot, source, target)
            assert await store.append(owner, 0, b"ab", PATIENCE_S, b"head") == AppendStatus.APPENDED  # now there
            followed = await store.follow(first, owner.token, 0, 5000)
            assert isinstance(followed, Followed)
            assert (followed.head, followed.chunks) == (b"head", [b"ab"])
            for server in (source, target):
                server.ask("SCRIPT", "FLUSH")
            assert await store.renew(fresh) == RenewStatus.RENEWED
            followed = await store.follow(second, fresh.token, 0, 5000)  # not there before
            assert isinstance(followed, Followed)
            assert followed.count == 0
            await life(store, third)
        finally:
            for moving in slots:
                cluster.carry(moving, source, target)
                cluster.end_move(moving, source, target)
        assert await store.append(owner, 1, b"c", PATIENCE_S) == AppendStatus.APPENDED_READ
        whole = answer(b"ab", b"c", b"d")
        assert await store.store(owner, whole, b"d", PATIENCE_S) == SettleResult(SettleStatus.STORED)
        assert told(await claim(store, first)) == "replay"
        assert await store_small(store, fresh) == SettleResult(SettleStatus.STORED)
        for moving in slots:
            cluster.move(moving, source)


@pytest.mark.fault(12)
async def test_decisions_and_marks_whose_slot_moves(cluster):
    """Before, during and after a move, also of a slot that has none yet: each is made once, at the server it is at."""
    of = keys_on(0, 5000, 1)[0]
    name, mark = store_key(of), store_key(of) + b":test"
    slot, source = key_slot(name), cluster.master_of(name)
    target = next(one for one in cluster.servers if one is not source and one.info()["role"] == "master")
    async with watching(cluster.url, []) as store:
        steps = [b"", b"one", b"two", b"three", b"four", b"five"]

        async def step() -> None:
            """Change the mark, and fail to from what it was before."""
            before, after = steps[0], steps[1]
            del steps[0]
            assert await store.marks.swap(mark, before, after, 60_000) is True
            assert await store.marks.swap(mark, before, b"not", 60_000) is False
            assert await store.marks.get_all([mark, store_key(key(9)) + b":test"]) == [after, b""]

        owner = await claimed(store, key=of)
        careful = Deciding(owner.token, seen_lease=0)

        async def free() -> ResolveStatus:
            return await store.release_by_operator(of, careful, b"O" * 16, owner.fence)

        await step()
        cluster.begin_move(slot, source, target)
        await step()
        assert await free() is ResolveStatus.RUNNING
        cluster.carry(slot, source, target)
        for server in (source, target):
            server.ask("SCRIPT", "FLUSH")
        await step()
        assert await free() is ResolveStatus.RUNNING
        cluster.end_move(slot, source, target)
        await step()
        assert await free() is ResolveStatus.RUNNING
        await store.mark_unknown(owner, "no answer came", PATIENCE_S)
        assert await free() is await free() is ResolveStatus.RELEASED
        cluster.move(slot, source)
        await step()
        assert await free() is ResolveStatus.RELEASED


@pytest.mark.fault(12)
async def test_a_mailbox_whose_slot_moves(cluster):
    """Notes come before, during and after a move, also of slots that have none yet: no post and no collection fails."""
    behind = Behind()
    async with connected(cluster.url, behind=behind) as store, connected(cluster.url) as elsewhere:
        name = mailbox_of(store.token())
        slot, source = key_slot(name), cluster.master_of(name)
        target = next(one for one in cluster.servers if one is not source and one.info()["role"] == "master")

        async def comes(note: bytes) -> None:
            assert await elsewhere.post(store.token(), note) is True
            assert note in await store.collect(store.token_prefix)

        await comes(b"before")
        cluster.begin_move(slot, source, target)
        await comes(b"while it is there")
        await behind.run()
        await comes(b"while none is there")
        cluster.carry(slot, source, target)
        await comes(b"carried")
        cluster.end_move(slot, source, target)
        await comes(b"after")
        await behind.run()
        assert await store.collect(store.token_prefix) == []
        cluster.move(slot, source)


async def test_readers_are_woken_wherever_the_slot_is(cluster, monkeypatch):
    """On each master, and while a slot moves: its new server tells, and the one before is not listened to."""
    monkeypatch.setattr(wakes, "CHECK_S", 0.05)
    keys = [keys_on(*ends, 1)[0] for ends in ((200, 5000), (6000, 10000), (11000, 16000))]
    woken: Counter[bytes] = Counter()
    async with watching(cluster.url, []) as store, connected(cluster.url) as elsewhere:
        owners = [await claimed(store, key=of) for of in keys]
        for owner in owners:
            await store.append(owner, 0, b"0", PATIENCE_S, b"head")
            await elsewhere.follow(owner.key, owner.token, 0, 60_000)
            elsewhere.wakes.watch(owner.key, partial(woken.update, [owner.key]))
            await until(lambda of=owner.key: elsewhere.wakes.is_live(of))

        async def wakes_its_reader(owner: Claim, index: int) -> None:
            before = woken[owner.key]
            assert await store.append(owner, index, b"x", PATIENCE_S) is AppendStatus.APPENDED_READ
            await until(lambda: woken[owner.key] > before)

        for owner in owners:
            await wakes_its_reader(owner, 1)
        moved = owners[0]
        slot = key_slot(store_key(moved.key))
        source = cluster.owner_of_slot(slot)
        target = cluster.owner_of_slot(key_slot(store_key(keys[1])))
        cluster.move(slot, target)
        channel = channel_of(moved.key)
        await until(lambda: not elsewhere.wakes.is_live(moved.key))
        await elsewhere.follow(moved.key, moved.token, 0)  # so it polls, and learns where the slot is
        await until(lambda: target.ask("PUBSUB", "SHARDNUMSUB", channel) == [channel, 1])
        assert source.ask("PUBSUB", "SHARDNUMSUB", channel) == [channel, 0]
        await store.renew(moved)  # its own map is corrected
        await wakes_its_reader(moved, 2)
        cluster.move(slot, source)


@pytest.mark.fault(12)
async def test_resharding_under_load(cluster):
    """While 40 slots move between masters, 16 clients at once see no call fail."""
    dice, moved = random.Random(7), 0
    masters = cluster.servers[:3]
    slots = {slot for part in range(3) for slot in range(part * 5500, part * 5500 + 40)}
    keys = (of for of in map(key, count()) if key_slot(store_key(of)) in slots)
    lived = 0

    def reshard() -> None:
        nonlocal moved
        while moved < 40:
            cluster.move(dice.choice(sorted(slots)), dice.choice(masters))
            moved += 1

    async def worker(store: Store) -> None:
        nonlocal lived
        while moved < 40:
            await life(store, next(keys))
            lived += 1

    async with watching(cluster.url, []) as store:
        await asyncio.gather(asyncio.to_thread(reshard), *[worker(store) for _ in range(16)])
    assert lived > 40
    assert sum(len(master.records()) for master in masters) == lived


async def test_what_operators_see_of_a_slot_that_moves():
    """Keys that are being moved are listed and shown; a cluster that does not reply is not shown as empty."""
    cluster = Clustered(replicas=0)
    try:
        source, target = cluster.servers[:2]
        carried, staying = keys_on(0, 5000, 2)
        slot = key_slot(store_key(carried))
        async with watching(cluster.url, []) as store:
            await claimed(store, key=carried)
            cluster.begin_move(slot, source, target)
            cluster.carry(slot, source, target)
            await claimed(store, key=staying)
            assert {seen.key async for seen in store.records.scan()} == {carried, staying}
            assert [(await store.records.read(of)).state for of in (carried, staying)] == [ViewState.IN_FLIGHT] * 2

            def out_of_service() -> bool:
                """Take a slot from all servers: one that has let go of it learns of it again from one that has not."""
                for server in cluster.servers:
                    with suppress(ResponseError):  # it knows already
                        server.ask("CLUSTER", "DELSLOTS", 16000)
                return b"cluster_state:fail" in source.ask("CLUSTER", "INFO")

            await asyncio.to_thread(wait_for, out_of_service)
            with pytest.raises(StoreError, match="CLUSTERDOWN"):
                [seen async for seen in store.records.scan()]
    finally:
        cluster.close()


# While masters die ...


async def claimed_at_last(store: Store, of: bytes, seconds: float = 20) -> Claim:
    async with asyncio.timeout(seconds):
        while not isinstance(found := await claim(store, of), Claim):
            assert isinstance(found, Unconfirmed), found
            await asyncio.sleep(0.05)
        return found


@pytest.mark.fault(12, 46, 50)
async def test_masters_that_change_while_keys_are_claimed(fragile):
    """Killed, paused or told to: claims stand on the new master, their settles outlast the change, and the keys
    of the other masters never notice."""
    log: Log = []
    ranges = [(0, 5000), (6000, 10000), (11000, 16000)]
    killed, paused, told_to = fragile.servers[:3]
    async with watching(fragile.url, log) as store:
        owners = [[await claimed(store, key=of) for of in keys_on(*ends, 2)] for ends in ranges]
        for master in fragile.servers[:3]:
            await asyncio.to_thread(wait_for, lambda master=master: replicated(master, 1))
        fragile.replica_of(told_to).ask("CLUSTER", "FAILOVER")
        await until(lambda: fragile.owner_of_slot(16000) is not told_to)
        killed.kill()
        settling = [asyncio.ensure_future(store_small(store, owner)) for owner, _ in owners]
        unaffected = [asyncio.ensure_future(life(store, of)) for of in keys_on(6000, 10000, 12)[2:]]
        async with asyncio.timeout(1):
            await asyncio.gather(*unaffected)
        assert store.not_ready_reason() is None
        assert await asyncio.gather(*settling) == [SettleResult(SettleStatus.STORED)] * 3
        await asyncio.to_thread(wait_for, lambda: fragile.owner_of_slot(0) is not killed)
        paused.pause()
        assert await store_small(store, owners[1][1]) == SettleResult(SettleStatus.STORED)
        await claimed_at_last(store, keys_on(6000, 10000, 13)[12])
        paused.resume()
        for _, owner in (owners[0], owners[2]):
            assert await store.renew(owner) == RenewStatus.RENEWED
        was = {fields["was"] for event, fields in log if event == "store failed over"}
        assert was == {f"127.0.0.1:{server.port}" for server in (killed, paused, told_to)}
        await until(lambda: store.not_ready_reason() is None)


async def test_a_cluster_with_a_hole(cluster, monkeypatch):
    """Keys without a master are unconfirmed within their time; the others are served."""
    async with watching(cluster.url, [], timeout_ms=400) as store:
        lost = store.nodes[0]
        monkeypatch.setattr(store._servers, "_refresh", lambda: asyncio.sleep(0, True))
        await lost.close()
        store._servers._slots = [None if node is lost else node for node in store._servers._slots]
        first = next(of for of in (key(n) for n in count()) if store._servers._slots[key_slot(store_key(of))] is None)
        began = asyncio.get_running_loop().time()
        found = await claim(store, first)
        assert found == Unconfirmed(found.reason, maybe_executed=False)
        assert asyncio.get_running_loop().time() - began < 1
        assert store.not_ready_reason() is None


# How it is reached ...


async def test_any_server_is_enough(cluster):
    """A URL with a dead place and one replica is enough to find all masters."""
    replica = cluster.servers[5]
    await live(f"redis+cluster://127.0.0.1:1,127.0.0.1:{replica.port}")


async def test_over_tls_with_a_password(monkeypatch, tmp_path):
    """Named and announced servers are reached over TLS, and their certificates are checked; so is the user, who
    has the rights that the page on settings names."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    announced = ("--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname")
    config = f"requirepass secret\n{ACL}\n"
    cluster = Clustered("--unixsocket", "s", *announced, masters=1, replicas=0, config=config, password="secret")
    try:
        (server,) = cluster.servers
        async with relaying(str(server.dir / "s"), context) as relay:
            server.ask("CONFIG", "SET", "cluster-announce-port", relay.port)
            await until(lambda: str(relay.port).encode() in server.ask("CLUSTER", "NODES"))
            place = f"localhost:{relay.port}"
            await assert_unreachable(f"rediss+cluster://oncegate:PASSWORD@{place}", "(?i)certificate verify failed")
            authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            await live(f"rediss+cluster://oncegate:PASSWORD@{place}")
            server.ask("FLUSHALL")
            await live(f"rediss+cluster://:secret@{place}")
            await assert_unreachable(f"rediss+cluster://oncegate:no@{place}", "invalid username-password")
            await assert_unreachable(f"rediss+cluster://{place}", "Authentication required")
    finally:
        cluster.close()


async def test_the_wrong_kind_of_url(cluster, valkey):
    """A cluster named as a server, or a server as a cluster, is refused with the right form of URL."""
    await assert_unreachable(
        f"redis://127.0.0.1:{cluster.servers[0].port}", "this is a cluster: name it as redis.cluster"
    )
    async with relaying(valkey.socket) as relay:
        await assert_unreachable(f"redis+cluster://127.0.0.1:{relay.port}", "this is no cluster: name it as redis://")


# What a server says of its cluster ...


def test_a_view():
    """A missing host is the one that was asked; IPv6 addresses get brackets; replicas are part of the view."""
    slots = [
        [0, 99, [b"", 7000, b"id"], [b"10.0.0.2", 7001, b"id"]],
        [100, 199, [None, 7000, b"id"]],
        [200, 16383, [b"::1", 7002, b"id"]],
    ]
    view = view_of(b"cluster_state:ok\r\ncluster_current_epoch:9\r\n", slots, "10.0.0.1")
    assert view.masters == {"10.0.0.1:7000": [(0, 99), (100, 199)], "[::1]:7002": [(200, 16383)]}
    assert (view.works, view.epoch, view.replicas) == (True, 9, {"10.0.0.2:7001"})


@pytest.mark.parametrize("slot", [0, 1, 8191, 16383])
def test_a_tag_of_any_slot(slot):
    """Every slot has a hash tag, which stays the same while the slot does not move."""
    tag = tag_within([(slot, slot)], b"")
    assert key_slot(b"once:epoch" + tag) == slot
    assert tag_within([(0, 16383)], tag) == tag


async def test_each_master_has_to_sync(cluster):
    """With fsync every master is asked for its `appendfsync`; one that does not sync takes no claims."""
    masters = [server for server in cluster.servers if server.info()["role"] == "master"]
    for server in masters:
        server.ask("CONFIG", "SET", "appendonly", "yes", "appendfsync", "always")
    unsafe = masters[1]
    unsafe.ask("CONFIG", "SET", "appendfsync", "everysec")
    try:
        async with watching(cluster.url, [], durability="fsync") as store:
            await until(lambda: "has appendfsync everysec" in (store.not_ready_reason() or ""))
            assert f":{unsafe.port}" in store.not_ready_reason()
            refused = next(one for one in map(key, range(1000)) if cluster.master_of(store_key(one)) is unsafe)
            assert isinstance(found := await claim(store, refused), NotAttempted)
            assert "everysec" in found.reason
            # A claim that was refused is no open key.
            await until(lambda: unsafe.ask("KEYS", "once:open{*") == [])
            unsafe.ask("CONFIG", "SET", "appendfsync", "always")
            await until(lambda: "appendfsync" not in (store.not_ready_reason() or ""))
    finally:
        for server in masters:
            server.ask("CONFIG", "SET", "appendonly", "no")
