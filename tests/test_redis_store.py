"""The store in Redis: lost and late replies, forgotten scripts, memory limits, errors, and ways to connect."""

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from redis import Redis

from oncegate.keys.digests import Digests
from oncegate.store.record import Claim, Corrupt, pack, self_check
from oncegate.store.results import (
    AppendStatus,
    ReadFailure,
    RenewStatus,
    SettleResult,
    SettleStatus,
    StoreFull,
    Unconfirmed,
)
from oncegate.store.store import Store
from tests.conftest import REDIS_KINDS, Valkey
from tests.parts import OK, Tap, ask, request, until
from tests.probes import RedisProbe
from tests.resp import Connection, Relay, RespServer, Words, relaying, resp
from tests.stores import (
    BODY,
    KEY,
    LEASE_MS,
    NAME,
    OTHER,
    PATIENCE_S,
    SAME,
    SCOPE,
    TENANT,
    TEST_LAYOUT,
    Behind,
    act,
    answer,
    at,
    claim,
    claimed,
    connected,
    store_at,
    store_small,
    told,
)
from tests.test_store import CHUNKS, HOUR_MS, ROWS, WINDOW_MS, assert_became

Log = list[tuple[str, dict[str, Any]]]


# What the tests are built with ...


@pytest.fixture(params=[*REDIS_KINDS, f"{REDIS_KINDS[-1]}, packed"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Valkey]:
    """A real server, empty: Valkey, and the Redis of this system if it has one. One of them has packed records, too."""
    kind, _, layout = request.param.partition(", ")
    monkeypatch.setenv(TEST_LAYOUT, layout or "hash")
    server: Valkey = request.getfixturevalue(f"shared_{kind}")
    with server.client() as client:
        client.config_set("maxmemory", 0)
        client.flushall()
        yield server
        client.config_set("maxmemory", 0)


@pytest.fixture
def client(server: Valkey) -> Iterator[Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def probe(server: Valkey, client: Redis) -> RedisProbe:
    """The server, as the tests of every store see it."""
    return RedisProbe(client, server.url, packed=os.environ[TEST_LAYOUT] == "packed")


@pytest.fixture
async def store(server: Valkey) -> AsyncIterator[Store]:
    async with connected(server.url) as store:
        yield store


@pytest.fixture
async def relay(valkey: Valkey) -> AsyncIterator[Relay]:
    """A relay between a store and a real server, which drops replies on demand."""
    async with relaying(valkey.socket) as relay:
        yield relay


async def test_a_running_record_is_small(store, client, probe):
    """No value of a record in flight is so long that the hash leaves the compact encoding."""
    await claimed(store)
    assert client.object("encoding", NAME) == (b"raw" if probe.packed else b"listpack")
    assert client.memory_usage(NAME) < (256 if probe.packed else 512)


@pytest.mark.parametrize("appended", [0, 1], ids=["at once", "after chunks"])
async def test_a_small_complete_record_is_written_anew(store, client, probe, appended):
    """A small complete record has two fields, and the compact encoding where the server allows it for their sizes."""
    client.config_set("hash-max-listpack-value", 512)
    try:
        owner = await claimed(store)
        if appended:
            await store.append(owner, 0, b"x" * 5000, PATIENCE_S)
            assert client.object("encoding", NAME) == b"hashtable"
            assert await store.store(owner, answer(BODY, kept=False), b"", PATIENCE_S) == SettleResult(
                SettleStatus.STORED
            )
        else:
            assert await store_small(store, owner) == SettleResult(SettleStatus.STORED)
        assert probe.fields(KEY).keys() == ({"meta"} if appended else {"meta", "b0"})
        assert client.object("encoding", NAME) == (b"raw" if probe.packed and not appended else b"listpack")
    finally:
        client.config_set("hash-max-listpack-value", 64)


@pytest.mark.fault(11, 21)
@pytest.mark.parametrize("verb", ["store", "release", "mark unknown"])
async def test_a_settle_that_gets_noscript_and_then_loses_its_reply(relay, valkey, verb):
    """A settle that is sent by its body, and loses its reply then, reports no loss."""
    async with connected(relay.url) as store:
        owner = await claimed(store)
        with valkey.client() as client:
            client.script_flush()
        relay.lose_reply(2)  # NOSCRIPT is the first
        result = await act(store, verb, owner, own=True)
        assert relay.lost == 1
        assert result in ("stored", "released", "unknown")


@pytest.mark.fault(57, 58)
@pytest.mark.parametrize("step_ms", [-HOUR_MS, HOUR_MS])
async def test_what_the_store_believes_of_the_servers_clock_may_be_wrong(store, probe, step_ms):
    """An hour off either way, the first reply corrects the clock, and the claim succeeds within its time."""
    store._servers._clock.offset_ms += step_ms
    await claimed(store)
    assert abs(store.now_ms(KEY) - probe.now_ms()) < 5000


# A server that has forgotten the scripts ...


@pytest.mark.fault(11)
@pytest.mark.parametrize(("verb", "state", "own", "result", "became"), [row for row in ROWS if row.values[2]])
async def test_a_server_without_the_scripts_is_given_them(store, client, probe, verb, state, own, result, became):
    """After SCRIPT FLUSH every verb works as before."""
    owner = await at(store, probe, state)
    before = probe.fields(KEY)
    client.script_flush()
    assert await act(store, verb, owner, own) == result
    assert_became(probe, became, before, owner, own)


@pytest.mark.fault(11)
async def test_scripts_that_vanish_at_any_moment(store, client, probe):
    """300 keys are claimed and stored while the scripts are flushed all the time: each has its own response, once."""
    going = True

    async def flush() -> None:
        while going:
            client.script_flush()
            await asyncio.sleep(0.001)

    async def live(number: int) -> None:
        key = b"%024d" % number
        owner = await claimed(store, key=key)
        body = b"of %d" % number
        await store.append(owner, 0, body, PATIENCE_S)
        assert await store.renew(owner) == RenewStatus.RENEWED
        assert await store.store(owner, answer(body, body), body, PATIENCE_S) == SettleResult(SettleStatus.STORED)
        assert await store.read(key, owner.token, 0) == [body, body]

    flushing = asyncio.ensure_future(flush())
    await asyncio.gather(*[live(number) for number in range(300)])
    going = False
    await flushing
    assert len(probe.keys()) == 300


# At the memory limit ...


@pytest.mark.parametrize(
    ("state", "same", "other"),
    [
        ("complete", "replay", "mismatch"),
        ("in flight", "in_flight", "mismatch"),
        ("lapsed", "unknown", "mismatch"),
        ("unknown", "unknown", "mismatch"),
    ],
)
async def test_a_full_server_still_tells_what_it_has(store, client, probe, state, same, other):
    """At the memory limit existing records are replayed and compared, because that writes nothing."""
    await at(store, probe, state)
    client.config_set("maxmemory", 1)
    found = await claim(store)
    assert told(found) == same
    assert told(await claim(store, fingerprint=OTHER), OTHER) == other
    if state == "complete":
        assert (found.response, found.body) == (answer(BODY), BODY)
        assert await store.read(KEY, found.token, 0) == [BODY]


@pytest.mark.fault(13)
@pytest.mark.parametrize("forgotten", [False, True], ids=["", "scripts flushed"])
@pytest.mark.parametrize(
    ("verb", "state", "own", "result", "became"),
    [
        row
        for row in ROWS
        if row.values[0] in ("renew", "store", "store bare", "release", "mark unknown") and row.values[1] != "absent"
    ],
)
async def test_a_full_server_lets_running_work_complete(
    store, client, probe, verb, state, own, result, became, forgotten
):
    """At the memory limit renew and settle work as anywhere."""
    owner = await at(store, probe, state)
    before = probe.fields(KEY)
    client.config_set("maxmemory", 1)
    if forgotten:
        client.script_flush()
    assert await act(store, verb, owner, own) == result
    client.config_set("maxmemory", 0)
    assert_became(probe, became, before, owner, own)


async def test_a_full_server_stores_the_end_of_a_streamed_answer(store, client):
    """Chunks appended before the memory limit, and the last chunk, become a complete record."""
    owner = await claimed(store)
    assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
    client.config_set("maxmemory", 1)
    assert await store.store(owner, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    assert await store.read(KEY, owner.token, 0) == [b"ab", b"cd"]


async def test_a_full_server_takes_no_more_chunks(store, client, probe):
    """At the memory limit an append is refused as a whole; the response can then be stored without its body."""
    owner = await claimed(store)
    assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
    before = probe.fields(KEY)
    client.config_set("maxmemory", 1)
    assert await store.append(owner, 1, b"cd", PATIENCE_S) == AppendStatus.NO_MEMORY
    assert probe.fields(KEY) == before
    assert await store.store(owner, answer(b"ab", b"cd", kept=False), b"", PATIENCE_S) == SettleResult(
        SettleStatus.STORED
    )
    assert told(await claim(store)) == "not_kept"


@pytest.mark.fault(13)
async def test_a_full_server_refuses_new_claims(server, client, probe):
    """A claim's first write is refused at the memory limit: nothing is written, and nothing is to be cleaned up."""
    behind = Behind()
    async with connected(server.url, behind=behind) as store:
        client.config_set("maxmemory", 1)
        began = asyncio.get_running_loop().time()
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert found.reason.startswith("OOM")
        assert not found.maybe_executed
        assert asyncio.get_running_loop().time() - began < 5
        assert behind.works == []
        assert len(probe.keys()) == 0
        client.config_set("maxmemory", 0)
        assert told(await claim(store)) == "claimed"


@pytest.mark.fault(13)
@pytest.mark.parametrize("state", ["lapsed", "unknown", "complete"])
async def test_a_full_server_refuses_takeovers_too(store, client, probe, state):
    """A takeover is refused at the memory limit like a new claim; the record stays as it was, and decides."""
    owner = await at(store, probe, state, b"retry")
    if state == "complete":
        probe.change(KEY, meta=pack(replace(owner, created_ms=1), answer(BODY)))
    before = probe.fields(KEY)
    client.config_set("maxmemory", 1)
    found = await claim(store, window_ms=WINDOW_MS)
    if state == "complete":  # of a window that is over: the request is a new one
        assert isinstance(found, StoreFull)
        assert (found.reason[:3], found.maybe_executed) == ("OOM", False)
    else:
        assert told(found) == "unknown"
    assert probe.fields(KEY) == before
    client.config_set("maxmemory", 0)
    assert told(await claim(store, window_ms=WINDOW_MS)) == "claimed"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect the server's health more often than every two seconds."""
    monkeypatch.setattr("oncegate.store.redis.node.HEALTH_S", 0.05)


@pytest.fixture
async def watched(store: Store, often: None) -> AsyncIterator[Store]:
    task = asyncio.ensure_future(store.watch())
    yield store
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_above_nine_tenths_of_its_memory_the_store_is_full(watched, client):
    """Above 90 % of the memory limit the store is full; below it, and without a limit, it is not."""
    used = client.info("memory")["used_memory"]
    for limit, full in ((0, False), (used * 2, False), (int(used / 0.96), True), (1, True), (used * 2, False)):
        client.config_set("maxmemory", limit)
        await until(lambda full=full: watched.full() is full)
        assert watched.full() is (watched.memory_ratio > 0.9)
        if limit in (0, used * 2):
            await until(lambda expected=used / limit if limit else 0: abs(watched.memory_ratio - expected) < 0.2)


@pytest.mark.fault(14)
async def test_a_server_that_may_forget_keys_is_a_problem(watched, client):
    """Any eviction policy but noeviction is a problem for as long as it is set."""
    await until(lambda: watched.not_ready_reason() is None)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        await until(lambda: watched.not_ready_reason() is not None)
        assert "allkeys-lru" in watched.not_ready_reason()
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    await until(lambda: watched.not_ready_reason() is None)


OTHER_TYPES: dict[str, Callable[[Redis], object]] = {
    "string": lambda client: client.set(NAME, b"x"),
    "list": lambda client: client.rpush(NAME, b"x"),
    "set": lambda client: client.sadd(NAME, b"x"),
    "sorted set": lambda client: client.zadd(NAME, {b"x": 1}),
    "stream": lambda client: client.xadd(NAME, {b"meta": b"x"}),
    "hash of others": lambda client: client.hset(NAME, "x", "y"),
    "chunks alone": lambda client: client.hset(NAME, "b0", "y"),
    "empty meta": lambda client: client.hset(NAME, "meta", ""),
}


@pytest.mark.parametrize("put", OTHER_TYPES.values(), ids=OTHER_TYPES.keys())
async def test_what_is_no_record_is_corrupt(store, client, put):
    """A value of another type under the key's name is neither claimed nor removed."""
    put(client)
    before = client.dump(NAME)
    assert isinstance(await claim(store), Corrupt)
    assert isinstance(await claim(store, mode=b"retry"), Corrupt)
    assert isinstance(await store.peek(KEY, SCOPE, LEASE_MS), Corrupt)
    assert client.dump(NAME) == before


# Error replies ...

ERRORS = (
    b"-LOADING Redis is loading the dataset in memory\r\n",
    b"-READONLY You can't write against a read only replica.\r\n",
    b"-BUSY Redis is busy running a script.\r\n",
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    b"-MOVED 3999 127.0.0.1:6381\r\n",
    b"-ASK 3999 127.0.0.1:6381\r\n",
    b"-CLUSTERDOWN The cluster is down\r\n",
    b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
    b"-NOPERM this user has no permissions to run the 'evalsha' command\r\n",
    b"-ERR what now\r\n",
)


ERROR_NAMES = [error.split()[0].decode() for error in ERRORS]


@pytest.fixture
async def scripted() -> AsyncIterator[RespServer]:
    server = RespServer()
    await server.start()
    yield server
    server.close()


def tokens(scripted: RespServer) -> list[bytes]:
    return [words[5] for words in scripted.calls]


@pytest.mark.fault(12)
@pytest.mark.parametrize("error", ERRORS, ids=ERROR_NAMES)
async def test_a_claim_that_gets_errors_is_repeated_within_its_budget(scripted, error):
    """A claim that gets errors is repeated with one token until its time is over, and leaves nothing behind."""
    behind, demoted = Behind(), error.startswith((b"-READONLY", b"-MASTERDOWN"))
    full = error.startswith(b"-OOM")
    scripted.script = lambda connection, words: error
    async with connected(scripted.url, timeout_ms=150, behind=behind) as store:
        found = await claim(store)
        detail = found.reason if demoted else error[1:-2].decode()
        assert found == (StoreFull if full else Unconfirmed)(detail, maybe_executed=False)
        assert behind.works == []
    # The last call asks what is known of the key, with a token that nobody has.
    assert len(set(tokens(scripted)) - {bytes(16)}) == 1
    # One for the verbs, one for large reads: an error ends neither, unless the address may lead to another server.
    assert demoted == (len(scripted.connections) > 2)
    assert len(scripted.calls) == 2 if full else 2 <= len(scripted.calls) < 10


@pytest.mark.fault(12)
@pytest.mark.parametrize("error", [one for one in ERRORS if not one.startswith(b"-OOM")])
async def test_a_claim_survives_errors_that_pass(scripted, error):
    """A retry that succeeds gets the claim with the token of the first try."""

    def script(connection: Connection, words: Words) -> bytes:
        if len(scripted.calls) < 3:
            return error
        return resp([words[4], b"claimed", 1_763_960_000_000, b"1763960000000000", 1_763_960_000_000])

    scripted.script = script
    async with connected(scripted.url) as store:
        owner = await claimed(store)
        assert tokens(scripted) == [owner.token] * 3


OWNER = Claim(
    KEY, b"t" * 16, b"1", b"hold", SAME, self_check(KEY, TENANT, b"t" * 16, b"hold", SAME), 1, 300, 1000, 2000
)


AFTER_ERRORS = {
    "append": (lambda store: store.append(OWNER, 0, b"x", 0.15), AppendStatus.UNCONFIRMED, True),
    "renew": (lambda store: store.renew(OWNER), RenewStatus.UNCONFIRMED, False),
    "store": (lambda store: store.store(OWNER, answer(BODY), BODY, 0.15), SettleResult(SettleStatus.UNCONFIRMED), True),
    "release": (lambda store: store.release(OWNER, 0.15), SettleResult(SettleStatus.UNCONFIRMED), True),
    "mark unknown": (
        lambda store: store.mark_unknown(OWNER, "why", 0.15),
        SettleResult(SettleStatus.UNCONFIRMED),
        True,
    ),
    "read": (lambda store: store.read(KEY, OWNER.token, 0), ReadFailure.UNCONFIRMED, False),
    "peek": (lambda store: store.peek(KEY, SCOPE, 300), Unconfirmed, False),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize(("call", "result", "repeats"), AFTER_ERRORS.values(), ids=AFTER_ERRORS.keys())
@pytest.mark.parametrize("error", ERRORS, ids=ERROR_NAMES)
async def test_every_other_verb_that_gets_errors_is_unconfirmed(scripted, call, result, repeats, error):
    """Every other verb is unconfirmed, after retries with the same token where it has patience."""
    scripted.script = lambda connection, words: error
    full = error.startswith(b"-OOM")
    async with connected(scripted.url) as store:
        came = await call(store)
        if result is Unconfirmed:
            assert came == (StoreFull if full else Unconfirmed)(error[1:-2].decode(), maybe_executed=False)
        else:
            no_memory = full and result is AppendStatus.UNCONFIRMED
            assert came == (AppendStatus.NO_MEMORY if no_memory else result)
    assert len(set(tokens(scripted))) == 1
    assert (len(scripted.calls) > 1) == (repeats and not full)


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"$-1\r\n", b":1\r\n", b"*0\r\n", b"*-1\r\n", resp([b"0", b"claimed"])])
async def test_a_reply_that_is_no_answer_confirms_nothing(scripted, reply):
    """An unexpected reply leaves open whether the command ran: the claim is withdrawn, other verbs are unconfirmed."""
    behind = Behind()
    scripted.script = lambda connection, words: reply
    async with connected(scripted.url, timeout_ms=200, behind=behind) as store:
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        assert len(behind.works) == 1
        assert await store.append(OWNER, 0, b"x", 0.1) == AppendStatus.UNCONFIRMED
        assert await store.renew(OWNER) == RenewStatus.UNCONFIRMED
        assert await store.release(OWNER, 0.1) == SettleResult(SettleStatus.UNCONFIRMED)
        assert await store.read(KEY, OWNER.token, 0) == ReadFailure.UNCONFIRMED


async def test_a_server_that_refuses_to_tell_its_health_is_not_pestered(scripted, often):
    """After an error on INFO the server is asked again at the usual pace."""
    async with connected(scripted.url) as store:
        scripted.greeting[b"INFO"] = b"-BUSY Redis is busy running a script.\r\n"
        scripted.segments.clear()
        watching = asyncio.ensure_future(store.watch())
        await asyncio.sleep(0.5)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert 1 <= sum(b"INFO" in segment for segment in scripted.segments) < 20


async def test_a_replica_that_takes_no_writes(own_valkey):
    """A claim on a replica is unconfirmed and leaves nothing; once it is promoted, claims succeed."""
    with own_valkey.client() as client:
        async with connected(own_valkey.url, timeout_ms=300) as store:
            client.replicaof("127.0.0.1", 1)
            found = await claim(store)
            assert isinstance(found, Unconfirmed)
            assert found.reason.startswith(("READONLY", "MASTERDOWN", "UNKILLABLE"))
            assert not found.maybe_executed
            client.replicaof("no", "one")
            assert client.dbsize() == 0
            assert told(await claim(store)) == "claimed"


# A server that stands still ...


@pytest.mark.fault(7)
async def test_a_server_that_stands_still_costs_no_more_than_the_budget(own_valkey):
    """Claims on a paused server are unconfirmed within about their timeout, and none takes effect later."""
    behind, clock = Behind(), asyncio.get_running_loop().time
    async with connected(own_valkey.url, timeout_ms=500, behind=behind) as store:
        own_valkey.pause()
        began = clock()
        found = await asyncio.gather(*[claim(store, b"%024d" % number) for number in range(20)])
        assert 0.4 < clock() - began < 5
        assert all(isinstance(one, Unconfirmed) for one in found)
        began = clock()
        assert isinstance(await claim(store, b"x" * 24), Unconfirmed)
        assert clock() - began < 5
        own_valkey.resume()
        assert await store.wait_up(PATIENCE_S)
        await claimed(store)
        assert len(own_valkey.records()) == 1
        await behind.run()
        assert len(own_valkey.records()) == 1


async def test_a_settle_outlasts_a_server_that_is_restarted(own_valkey):
    """A settle is repeated through a restart; where the record was lost, it is stored and the loss reported."""
    async with connected(own_valkey.url, timeout_ms=300) as store:
        owner = await claimed(store)
        own_valkey.kill()
        settling = asyncio.ensure_future(store_small(store, owner))
        await until(lambda: store.not_ready_reason() is not None)
        assert "not reachable" in store.not_ready_reason()
        own_valkey.start()
        assert await settling == SettleResult(SettleStatus.STORED, record_was_gone=True)
        assert told(await claim(store)) == "replay"


@pytest.mark.parametrize("state", ["hangs", "is down"])
async def test_every_call_ends_when_the_store_is_given_up(own_valkey, state):
    """After `end_calls`, calls under way and calls still to come end at once."""
    async with connected(own_valkey.url, timeout_ms=20_000) as store:
        owner = await claimed(store)
        if state == "hangs":
            own_valkey.pause()
        else:
            own_valkey.kill()
            await until(lambda: store.not_ready_reason() is not None)
        calls = [
            asyncio.ensure_future(call)
            for call in (
                store.release(owner, 1000.0),
                claim(store, fingerprint=OTHER),
                store.peek(owner.key, SCOPE, 1000),
            )
        ]
        done, _ = await asyncio.wait(calls, timeout=0.3)
        assert not done
        store.end_calls()
        settled, *asked = await asyncio.wait_for(asyncio.gather(*calls), 5)
        assert settled == SettleResult(SettleStatus.UNCONFIRMED)
        assert all(isinstance(found, Unconfirmed) for found in asked)
        assert await asyncio.wait_for(store.release(owner, 1000.0), 5) == SettleResult(SettleStatus.UNCONFIRMED)
        assert isinstance(await asyncio.wait_for(claim(store, fingerprint=OTHER), 5), Unconfirmed)


@pytest.mark.fault(50)
@pytest.mark.parametrize("patience_s", [0.2, 1.0, 1.4])
async def test_a_settle_waits_for_its_patience_and_no_longer(own_valkey, patience_s):
    """A settle's patience bounds it, its first try included, whatever the timeout of one call is."""
    async with connected(own_valkey.url, timeout_ms=1000) as store:
        owner = await claimed(store)
        own_valkey.pause()
        began = asyncio.get_running_loop().time()
        assert await store.release(owner, patience_s) == SettleResult(SettleStatus.UNCONFIRMED)
        took_s = asyncio.get_running_loop().time() - began
        own_valkey.resume()
        assert patience_s * 0.5 < took_s < patience_s + 0.4


# How it is reached ...

# What the scripts need, and what is asked on a new connection; nothing else.
ACL = (
    "on", "resetkeys", "~once:*", "resetchannels", "-@all",
    "+evalsha", "+eval", "+script|load", "+info", "+time", "+select", "+ping",
    "+hget", "+hmget", "+hlen", "+hstrlen", "+exists", "+hset", "+hgetall", "+set", "+hdel", "+unlink", "+pexpire",
    "+get", "+setrange", "+append", "+zadd", "+zrem",
)  # fmt: skip


async def live(url: str) -> None:
    """Run every verb of one key's life through a connection."""
    async with connected(url) as store:
        owner = await claimed(store)
        assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
        assert await store.renew(owner) == RenewStatus.RENEWED
        assert await store.store(owner, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.STORED)
        assert told(await claim(store)) == "replay"
        assert await store.read(KEY, owner.token, 0) == [b"ab", b"cd"]
        for settle in (store.release, lambda owner, patience_s: store.mark_unknown(owner, "why", patience_s)):
            owner = await claimed(store, key=Digests(b"").key(SCOPE, b"key-3"))
            assert (await settle(owner, PATIENCE_S)).status in (SettleStatus.RELEASED, SettleStatus.MARKED_UNKNOWN)
        reply = await store.nodes[0].link.command("INFO", "memory", deadline=asyncio.get_running_loop().time() + 10)
        assert b"maxmemory_policy" in reply


async def assert_unreachable(url: str, because: str) -> None:
    """Check that a store at this URL stays down with a reason, and that a claim through it is unconfirmed."""
    behind = Behind()
    store = store_at(url, timeout_ms=500, patience_s=1.0, background=behind)
    store.start()
    try:
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert not found.maybe_executed
        await until(lambda: re.search(because, store.not_ready_reason() or ""))
    finally:
        await store.close()
        behind.close()


@pytest.mark.parametrize("url", ["redis+unix://{socket}", "redis+unix://{socket}?db=0"])
async def test_over_a_unix_socket(server, url):
    """Every verb works over a Unix socket."""
    await live(url.format(socket=server.socket))


@pytest.mark.parametrize(
    ("url", "number"),
    [("redis+unix://{socket}?db=3", 3), ("redis://127.0.0.1:{port}/5", 5), ("redis://127.0.0.1:{port}/?db=7", 7)],
)
async def test_in_a_database_of_its_number(relay, valkey, url, number):
    """The records are in the database that the URL names and in no other, also after a reconnect."""
    await live(url.format(socket=valkey.socket, port=relay.port))
    with valkey.client() as client:
        assert list(client.info("keyspace")) == [f"db{number}"]


async def test_over_tcp_with_a_user_of_few_rights(own_valkey):
    """Every verb works with a password and a user that may run scripts on the store's keys alone."""
    password = "p@ss:w/rd%?#"
    async with relaying(own_valkey.socket) as relay:
        with own_valkey.client() as client:
            client.execute_command("ACL", "SETUSER", "gate", "reset", f">{password}", *ACL)
            client.config_set("requirepass", "geheim")
            await live(f"redis://gate:{quote(password, safe='')}@127.0.0.1:{relay.port}/2")
            denied = {entry["object"] for entry in client.acl_log()}
            assert denied <= {"client|setinfo"}  # which redis-py says of itself, and does without
            await live(f"redis://:geheim@127.0.0.1:{relay.port}")
            assert set(client.info("keyspace")) == {"db0", "db2"}
        await assert_unreachable(f"redis://127.0.0.1:{relay.port}", "Authentication required")
        await assert_unreachable(f"redis://gate:wrong@127.0.0.1:{relay.port}", "invalid username-password")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def over_tls(valkey: Valkey, authority: trustme.CA) -> AsyncIterator[Relay]:
    """The real server behind TLS, as `localhost`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with relaying(valkey.socket, context) as relay:
        yield relay


async def test_over_tls(over_tls, authority, monkeypatch, tmp_path):
    """Every verb works over TLS; the certificate is checked against the authorities that SSL_CERT_FILE names."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    await live(f"rediss://localhost:{over_tls.port}/1")
    async with connected(f"rediss://localhost:{over_tls.port}") as store:
        over_tls.lose_reply()
        await claimed(store)
        assert over_tls.lost == 1


async def test_a_certificate_that_is_not_right_is_refused(over_tls, authority, monkeypatch, tmp_path):
    """With another authority, another name or no TLS, nothing is sent, and the reason is reported."""
    await assert_unreachable(f"rediss://localhost:{over_tls.port}", "(?i)certificate verify failed")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    await assert_unreachable(f"rediss://127.0.0.1:{over_tls.port}", "(?i)certificate verify failed|mismatch")
    await assert_unreachable(f"redis://localhost:{over_tls.port}", ".")
    assert over_tls.scripts == 0


# What is in the store ...


async def test_no_key_and_no_credential_is_in_the_store(gate, upstream, valkey):
    """Names and values of records have digests, and neither keys nor credentials."""
    key, credential = "canary-key-41c9", "canary-credential-7d02"
    tap = Tap()
    upstream.script = tap.script
    secret = f"Authorization: Bearer {credential}"

    def seen() -> bytes:
        return b"\n".join(
            b"\n".join((name, *record.keys(), *record.values())) for name, record in valkey.records().items()
        )

    running = asyncio.ensure_future(ask(gate.port, request("POST", "/", key, b"x", secret)))
    await until(lambda: upstream.received)
    assert valkey.states() == [b"in_flight"]
    data = seen()
    tap.end(OK)
    await running
    data += seen()
    assert b"canary" not in data
    assert key.encode() not in data
    assert credential.encode() not in data


async def test_a_connection_that_went_silent_is_replaced_before_a_large_replay_needs_it(relay, client):
    """A firewall that forgets idle connections says nothing. Each connection is used often enough to notice that."""
    async with connected(relay.url, timeout_ms=500) as store:
        (node,) = store.nodes
        owner = await claimed(store)
        for index, chunk in enumerate(CHUNKS[:-1]):
            await store.append(owner, index, chunk, PATIENCE_S)
        await store.store(owner, answer(*CHUNKS), CHUNKS[-1], PATIENCE_S)
        assert await store.read(KEY, owner.token, 0) == [CHUNKS[0]]
        silent, watching = node.reads._transport, asyncio.ensure_future(store.watch())
        relay.silence()
        await until(lambda: node.reads.up and node.reads._transport is not silent, 10)
        assert await store.read(KEY, owner.token, 0) == [CHUNKS[0]]
        watching.cancel()
