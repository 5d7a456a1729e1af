"""Readers elsewhere while masters fail over and slots move: each byte once, the true end, and nothing else cleanly."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from redis.crc import key_slot

from tests.e2e.test_join import BODY, EVENTS, SSE, answered, begun, closed, has
from tests.e2e.test_stream_addresses import address_in, get
from tests.parts import LAST_CHUNK, Answer, Proxy, RawClient, RawUpstream, Received, Tap, ask, chunk, request, until
from tests.topologies import SERVICE, Clustered, Sentineled, replicated, wait_for

# Closes the clients of each test.
__all__ = ["closed"]

RULES = """
[[rule]]
name = "llm"
path = "/v1/**"
on_duplicate = "join"
resume = true
resumable = true
cancellable = true
ask_keys = true
"""
SETTINGS = {"RULES_FILE": "rules.toml", "SECRET": "a secret of many bytes", "STORE_TIMEOUT_MS": 1000}
MINE = "Authorization: Bearer mine"
# The key of a response that does not begin by itself.
BARE = "bare"


@pytest.fixture
def sentineled() -> Iterator[Sentineled]:
    group = Sentineled()
    yield group
    group.close()


@pytest.fixture
def clustered() -> Iterator[Clustered]:
    cluster = Clustered(replicas=0)
    yield cluster
    cluster.close()


@pytest.fixture
def replicated_cluster() -> Iterator[Clustered]:
    cluster = Clustered()
    yield cluster
    cluster.close()


class Stream:
    """A response that a test sends event by event. It comes through one replica; `other` is where its readers are."""

    def __init__(self, key: str, owner: Proxy, other: Proxy) -> None:
        self.key, self.owner, self.other, self._tap = key, owner, other, Tap()
        self.raw = self.behind()
        self.executions = 0

    async def script(
        self, upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Received
    ) -> None:
        self.executions += 1
        self._api = reader
        await self._tap.script(upstream, reader, writer, received)

    def behind(self, *seen: str) -> bytes:
        """Return the request; `seen` is the field of the event behind which a reader goes on."""
        return request("POST", "/v1/chat", self.key, b"{}", MINE, *seen)

    async def ask_api(self) -> None:
        """Send the request, until the API has it."""
        self.first = await begun(self.owner.port, self.raw)
        await until(lambda: self.executions)

    async def begin(self) -> None:
        """Begin the response, with a reader on each replica that has its first event."""
        self._tap.send(SSE, chunk(EVENTS[0]))
        async with asyncio.timeout(20):
            head = await self.first.reader.readuntil(b"\r\n\r\n")
        self.first.reader._buffer[:0] = head
        self.address, self.stop = address_in(head), address_in(head, "cancel")
        self.follower = await self.reader(self.raw)

    async def reader(self, raw: bytes, begins: bytes = EVENTS[0]) -> RawClient:
        """Return one more reader elsewhere, once it has a text."""
        client = await begun(self.other.port, raw)
        await has(client, begins)
        return client

    def send(self, *numbers: int) -> None:
        self._tap.send(*[chunk(EVENTS[number]) for number in numbers])

    def end(self, *numbers: int) -> None:
        self.send(*numbers)
        self._tap.end(LAST_CHUNK)

    async def both(self) -> list[Answer]:
        """Return what the original's client and the first reader elsewhere got."""
        return [await answered(client, 40) for client in (self.first, self.follower)]

    async def is_whole(self) -> None:
        """Every reader has each byte once, and the end; it may be read again, from any place, and asked for."""
        for answer in await self.both():
            assert (answer.body, answer.complete) == (BODY, True)
        for raw in (get(self.address, "Last-Event-ID: 05"), self.behind("Last-Event-ID: 05")):
            behind = await ask(self.other.port, raw)
            assert (behind.body, behind.complete) == (b"".join(EVENTS[6:]), True)
        part = await ask(self.other.port, get(self.address, "Range: bytes=100-"))
        assert (part.status, part.body) == (206, BODY[100:])
        assert await self.state() == "complete"
        assert (await ask(self.other.port, self.raw)).header("oncegate-status") == b"replayed"
        assert self.executions == 1

    async def state(self) -> str:
        """Return what a question elsewhere is told."""
        asked = request("GET", "/.oncegate/keys", self.key, b"", MINE, "Oncegate-Target: /v1/chat")
        return str(json.loads((await ask(self.other.port, asked)).body)["state"])

    async def is_stopped(self) -> None:
        """Cancel it elsewhere: the API's connection closes, its readers are broken off, and nothing executes again."""
        assert (await ask(self.other.port, get(self.stop, method="DELETE"))).status in (200, 202)
        await until(lambda: self._api.at_eof() or self._api.exception(), 20)
        for answer in await self.both():
            assert not answer.complete
        await self.is_cancelled()

    async def is_cancelled(self) -> None:
        for one in (self.owner, self.other):
            assert (await ask(one.port, self.raw)).problem["reason"] == "cancelled"
        assert await self.state() == "unknown"
        assert self.executions == 1


Streams = Callable[..., Awaitable[list[Stream]]]


@pytest.fixture
def streams(fork, upstream, tmp_path: Path) -> Streams:
    """Begin responses under these keys, on two replicas, which start with the first call."""
    (tmp_path / "rules.toml").write_text(RULES)
    replicas: list[Proxy] = []
    running: dict[str, Stream] = {}

    async def script(
        us: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, got: Received
    ) -> None:
        await running[got.header("idempotency-key")[0].decode()].script(us, reader, writer, got)

    async def begin(url: str, *keys: str, **settings: object) -> list[Stream]:
        if not replicas:
            replicas.extend([await fork(upstream, url, **SETTINGS | settings) for _ in range(2)])
        begun_now = [Stream(key, *replicas) for key in keys]
        running.update({stream.key: stream for stream in begun_now})
        for stream in begun_now:
            await stream.ask_api()
        await asyncio.gather(*[stream.begin() for stream in begun_now if stream.key != BARE])
        return begun_now

    upstream.script = script
    return begin


async def survives(streams: Streams, url: str, fails: Callable[[], None], is_over: Callable[[], None]) -> None:
    """A master fails in the middle. Readers elsewhere wait, and get the rest; who stopped one has stopped it."""
    whole, stopped, later = await streams(url, "whole", "stopped", "later", LEASE_MS=20_000)
    await stopped.is_stopped()
    whole.send(1, 2)
    await has(whole.follower, EVENTS[2])
    resumed = await whole.reader(whole.behind("Last-Event-ID: 01"), EVENTS[2])
    await asyncio.to_thread(fails)
    whole.send(3, 4)
    await has(whole.first, EVENTS[4])
    whole.send(5)
    await asyncio.to_thread(is_over)
    await has(whole.follower, EVENTS[5])
    whole.send(6)
    await has(whole.follower, EVENTS[6])
    assert await whole.state() == "in_flight"
    during = await whole.reader(get(whole.address, "Last-Event-ID: 03"), EVENTS[6])
    whole.end(*range(7, 12))
    await whole.is_whole()
    for client, seen in ((resumed, 1), (during, 3)):
        answer = await answered(client)
        assert (answer.body, answer.complete) == (b"".join(EVENTS[seen + 1 :]), True)
    await stopped.is_cancelled()
    await later.is_stopped()


@pytest.mark.fault(36, 46)
@pytest.mark.parametrize(
    "how", ["killed", *(pytest.param(how, marks=pytest.mark.full) for how in ("paused", "told to"))]
)
async def test_streams_survive_a_failover(streams, sentineled, how):
    """The master dies, or hangs and comes back, or an operator switches it as the page on failovers says."""
    before = sentineled.master

    def fails() -> None:
        sentineled.wait_replicated()
        match how:
            case "killed":
                before.kill()
            case "paused":
                before.pause()
            case _:
                before.ask("CONFIG", "SET", "min-replicas-to-write", 2)
                wait_for(lambda: sentineled.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE))

    def is_over() -> None:
        sentineled.wait_failed_over(before)
        if how == "paused":
            before.resume()

    await survives(streams, sentineled.url, fails, is_over)


@pytest.mark.full
@pytest.mark.fault(12, 36, 46)
@pytest.mark.parametrize("master", range(3))
async def test_streams_survive_a_failover_in_a_cluster(streams, replicated_cluster, master):
    """Each of the masters dies; a key lies on any of them."""
    dying, slot = replicated_cluster.servers[master], 6000 * master

    def fails() -> None:
        for server in replicated_cluster.servers[:3]:
            wait_for(partial(replicated, server, 1))
        dying.kill()

    def is_over() -> None:
        wait_for(lambda: replicated_cluster.owner_of_slot(slot) is not dying)

    await survives(streams, replicated_cluster.url, fails, is_over)


@pytest.mark.fault(36, 53, 59)
async def test_what_a_failover_lost_is_broken_off(streams, sentineled):
    """The replicas lack the beginning of a response, a later part, the end of another, and a claim.

    Nobody who reads these elsewhere gets a clean end, or waits for what will not come.
    """
    [ended] = await streams(sentineled.url, "ended", LEASE_MS=20_000)
    before, replicas = sentineled.master, sentineled.replicas
    [record] = before.records()
    torn, holed, bare = await streams(sentineled.url, "torn", "holed", BARE)
    await asyncio.to_thread(sentineled.wait_replicated)
    for replica in replicas:
        replica.pause()
    before.forget_replicas()
    [lost] = await streams(sentineled.url, "lost")
    await bare.begin()
    for stream in (torn, holed):
        stream.send(1)
        await has(stream.follower, EVENTS[1])
    ended.end(*range(1, 12))
    assert [(one.body, one.complete) for one in await ended.both()] == [(BODY, True)] * 2
    before.kill()
    for replica in replicas:
        replica.resume()
    now = await asyncio.to_thread(sentineled.wait_failed_over, before)
    for stream in (torn, holed):
        stream.send(2)
        await has(stream.follower, EVENTS[2])
    assert not (await answered(lost.follower)).complete
    bare.send(1)
    await has(bare.follower, EVENTS[1])
    # Who comes now finds what the store has.
    holed.follower.reset()
    bare.follower.reset()
    await until(lambda: holed.other.metric("followers") == 1)
    assert (await ask(bare.other.port, bare.behind("Prefer: wait=0"))).slug == "in-flight"
    assert (await ask(bare.other.port, get(bare.address))).status == 410
    found = [await holed.reader(holed.raw), await holed.reader(get(holed.address))]
    found.append(await ended.reader(get(ended.address)))
    # Its owner renews it no more.
    now.ask("HSET", record, "lease", 1)
    for reader in found:
        answer = await answered(reader)
        assert (answer.body, answer.complete) == (EVENTS[0], False)
    for stream in (torn, holed, lost, bare):
        stream.end(*range({lost: 1, bare: 2}.get(stream, 3), 12))
        original = await answered(stream.first)
        assert (original.body, original.complete) == (BODY, True)
        again = await ask(stream.other.port, stream.raw)
        assert (again.slug, await stream.state()) == ("response-not-kept", "complete")
    assert not (await answered(torn.follower)).complete
    for stream in (torn, holed, lost, bare):
        assert (await ask(stream.other.port, get(stream.address))).status == 410
    assert (await ask(ended.other.port, ended.raw)).slug == "outcome-unknown"
    assert [one.executions for one in (torn, holed, ended, lost, bare)] == [1] * 5


@pytest.mark.fault(12)
async def test_streams_survive_a_slot_that_moves(streams, clustered):
    """Readers elsewhere get the rest from wherever the record is; it may be stopped there, before the move is over."""
    whole, stopped, later = await streams(clustered.url, "whole", "stopped", "later", LEASE_MS=20_000)
    masters = clustered.servers
    slots = {key_slot(name): server for server in masters for name in server.records()}
    assert len(slots) == 3
    moves = [(slot, source, masters[masters.index(source) - 1]) for slot, source in slots.items()]
    whole.send(1)
    for move in moves:
        clustered.begin_move(*move)
    whole.send(2)
    await has(whole.follower, EVENTS[2])
    for move in moves:
        clustered.carry(*move)
    whole.send(3)
    await has(whole.follower, EVENTS[3])
    assert await whole.state() == "in_flight"
    during = await whole.reader(get(whole.address, "Last-Event-ID: 01"), EVENTS[3])
    await stopped.is_stopped()
    for move in moves:
        clustered.end_move(*move)
    for number in range(4, 8):
        whole.send(number)
        await has(whole.follower, EVENTS[number])
    whole.end(*range(8, 12))
    await whole.is_whole()
    answer = await answered(during)
    assert (answer.body, answer.complete) == (b"".join(EVENTS[2:]), True)
    await stopped.is_cancelled()
    await later.is_stopped()
