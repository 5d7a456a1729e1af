"""Many followers of one response, on many replicas, while messages are lost, connections break and owners die."""

import asyncio
import random
import time
from contextlib import AsyncExitStack

import pytest

from oncegate.streams.cancels import CancelResult, tell_owner
from tests.conftest import Valkey
from tests.e2e.test_join import SSE, answered, begun, closed
from tests.parts import LAST_CHUNK, Answer, Proxy, RawUpstream, Received, Tap, chunk, request, until
from tests.probes import RedisProbe
from tests.resp import Relay, started
from tests.stores import connected

LEASE_MS = 400
# Closes the clients of each test.
__all__ = ["closed"]


class Unframed:
    """A connection of which nothing needs to be known."""

    def note_requests(self, _: bytes) -> None: ...

    def replies_in(self, _: bytes) -> int:
        return 0


class LossyRelay(Relay):
    """Loses every second message to subscribers, which are the wake-ups; everything else passes. Or loses them all."""

    framing = Unframed
    messages, loses_all = 0, False

    async def _replies(self, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter, framing: object) -> None:
        try:
            while data := await from_server.read(1 << 16):
                is_message = data.startswith((b"*3\r\n$7\r\nmessage", b">3\r\n$7\r\nmessage"))
                self.messages += is_message
                if not (is_message and (self.loses_all or self.messages % 2)):
                    writer.write(data)
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class Dribble:
    """An API that answers each request with the same body, in pieces of any size with pauses of any length."""

    def __init__(self, draw: random.Random, pieces: int, pause_s: float, most_bytes: int = 2000) -> None:
        self._pauses = [draw.random() * 2 * pause_s for _ in range(pieces)]
        self._pieces = [draw.randbytes(draw.randint(1, most_bytes)).hex().encode() for _ in range(pieces)]
        self.body, self.seconds = b"".join(self._pieces), sum(self._pauses)

    async def script(self, _: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(SSE)
        for piece, pause_s in zip(self._pieces, self._pauses, strict=True):
            writer.write(chunk(piece))
            await asyncio.sleep(pause_s)
        writer.write(LAST_CHUNK)


async def follow(port: int, raw: bytes, after_s: float, leaves_s: float | None = None) -> Answer:
    """Join after a time, and once more after another one, if it leaves before the end."""
    await asyncio.sleep(after_s)
    client = await begun(port, raw)
    if leaves_s is not None:
        await asyncio.sleep(leaves_s)
        client.reset()
        client = await begun(port, raw)
    return await answered(client, 60)


async def cut_at_random(relays: list[LossyRelay], draw: random.Random, seconds: float) -> None:
    """Break the connections to the store of one replica after the other."""
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s:
        await asyncio.sleep(draw.uniform(0.4, 0.8))
        draw.choice(relays).cut()


@pytest.mark.fault(72)
@pytest.mark.parametrize("seed", [0, *(pytest.param(one, marks=pytest.mark.full) for one in range(1, 20))])
async def test_fifty_followers_on_three_replicas(fork, upstream, valkey, seed):
    """Each gets exactly the original's bytes, once, and its end, whatever is lost between the store and the proxies."""
    draw = random.Random(seed)
    api = Dribble(draw, 80, 0.025)
    upstream.script = api.script
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(started(LossyRelay(valkey.socket))) for _ in range(3)]
        replicas = [await fork(upstream, one.url, ON_DUPLICATE="join", LEASE_MS=3000) for one in relays]
        for replica in replicas:
            await until(lambda: replica.admin("/readyz")[0] == 200)  # noqa: B023
        first = await begun(replicas[0].port, request())
        await until(lambda: upstream.received)
        cutting = asyncio.ensure_future(cut_at_random(relays, draw, api.seconds))
        followers = [
            follow(
                draw.choice(replicas).port,
                request(),
                draw.random() * api.seconds,
                draw.choice([None, None, draw.random() * api.seconds / 2]),
            )
            for _ in range(50)
        ]
        answers = await asyncio.gather(answered(first, 60), *followers)
        await cutting
        for replica in replicas:
            await until(lambda: replica.metric("followers") == 0)  # noqa: B023
            assert (replica.metric("in_flight"), replica.metric("buffered_bytes")) == (0, 0)
            # Before its relay ends, to which it would connect again.
            replica.close()
    assert len(upstream.received) == 1
    assert [len(one.body) for one in answers if one.body != api.body] == []
    assert {(one.status, one.complete) for one in answers} == {(200, True)}
    status = [one.header("oncegate-status") for one in answers]
    assert status[0] == b"executed"
    assert set(status[1:]) <= {b"joined", b"replayed"}
    assert status.count(b"joined") > 20


async def test_wake_ups_that_are_lost_for_good(fork, upstream, valkey):
    """Subscriptions are confirmed, and nothing is ever heard: a follower has each event before the next is sent, and
    the word that stops the request comes through."""
    tap = Tap()
    upstream.script = tap.script
    relay = LossyRelay(valkey.socket)
    relay.loses_all = True
    async with started(relay), connected(valkey.url) as store:
        owner, other = [await fork(upstream, relay.url, ON_DUPLICATE="join", LEASE_MS=60_000) for _ in range(2)]
        first = await begun(owner.port, request())
        tap.send(SSE)
        follower = await begun(other.port, request())
        for number in range(5):
            tap.send(chunk(b"data: %d\n\n" % number))
            for one in (first, follower):
                await asyncio.wait_for(one.reader.readuntil(b"data: %d\n\n" % number), 10)
        assert relay.messages > 0
        with valkey.client() as client:
            probe = RedisProbe(client, valkey.url)
            (key,) = probe.keys()
            token = probe.fields(key)["token"]
        assert await tell_owner(store, key, token, "enough") is CancelResult.ACCEPTED
        for one in (first, follower):
            assert LAST_CHUNK not in await asyncio.wait_for(one.reader.read(), 10)
        owner.close()
        other.close()


async def test_a_thousand_followers(proxies, upstream, valkey):
    """The API is asked once, and the store no more often than once in 50 ms."""
    api = Dribble(random.Random(1), 60, 0.05, 60)
    upstream.script = api.script
    owner, other = (proxies(upstream, valkey.url, ON_DUPLICATE="join", MAX_FOLLOWERS=4000) for _ in range(2))
    first = await begun(owner.port, request())
    await until(valkey.has_body)
    began_s, reads = time.monotonic(), _reads(valkey)
    followers = [follow(other.port, request(), number / 1000) for number in range(1000)]
    answers = await asyncio.gather(*followers)
    assert _reads(valkey) - reads <= (time.monotonic() - began_s) / 0.05 + 2
    answers.append(await answered(first))
    assert len(upstream.received) == 1
    assert {(one.status, one.body, one.complete) for one in answers} == {(200, api.body, True)}
    assert sum(one.header("oncegate-status") == b"joined" for one in answers) > 900


def _reads(valkey: Valkey) -> int:
    """Return how often a response was followed: no other script asks for the number of a record's fields."""
    with valkey.client() as client:
        return int(client.info("commandstats").get("cmdstat_hlen", {"calls": 0})["calls"])


@pytest.mark.fault(68)
@pytest.mark.parametrize("points", [12, pytest.param(200, marks=pytest.mark.full)])
async def test_an_owner_that_is_killed_at_any_time_ends_nothing_cleanly(proxies, upstream, valkey, points):
    """Its followers elsewhere are broken off within a lease and a second, with a beginning of the response."""
    draw = random.Random(points)
    apis = {f"key-{number}": Dribble(draw, 80, 0.03, 500) for number in range(points)}

    async def script(us: RawUpstream, reader: object, writer: asyncio.StreamWriter, received: Received) -> None:
        [key] = received.header("idempotency-key")
        await apis[key.decode()].script(us, reader, writer, received)

    upstream.script = script
    settings = {"ON_DUPLICATE": "join", "LEASE_MS": LEASE_MS}
    other = proxies(upstream, valkey.url, **settings, MAX_FOLLOWERS=4000)
    broken = 0
    for begin in range(0, points, 6):
        keys = list(apis)[begin : begin + 6]
        owner = proxies(upstream, valkey.url, **settings)
        killed = asyncio.get_running_loop().create_future()
        # Each of them is somewhere else when its owner dies.
        followed = [_followed(owner, other, key, draw, killed) for key in keys]
        following = asyncio.ensure_future(asyncio.gather(*followed))
        await asyncio.sleep(draw.uniform(1.2, 2.0))
        owner.kill()
        killed.set_result(time.monotonic())
        for key, answers in zip(keys, await following, strict=True):
            joined = [one for one in answers if one.status == 200]
            assert {one.slug for one in answers if one.status != 200} <= {"outcome-unknown", "in-flight"}
            assert all(apis[key].body.startswith(one.body) for one in joined)
            # What is whole had its end before.
            assert {one.body for one in joined if one.complete} <= {apis[key].body}
            broken += sum(not one.complete for one in joined)
    assert broken > points / 3


async def _followed(
    owner: Proxy, other: Proxy, key: str, draw: random.Random, killed: "asyncio.Future[float]"
) -> list[Answer]:
    """Return what three followers got of a response that its owner was killed in."""
    raw = request(key=key)
    await asyncio.sleep(draw.random() * 0.8)
    await begun(owner.port, raw)
    return await asyncio.gather(*[_outlived(other.port, raw, draw.random(), killed) for _ in range(3)])


async def _outlived(port: int, raw: bytes, after_s: float, killed: "asyncio.Future[float]") -> Answer:
    """Follow, and do not outlive the owner by much: a lease, a second, and what a busy machine takes."""
    answer = await follow(port, raw, after_s)
    ended_s = time.monotonic()
    assert ended_s - (await killed) < LEASE_MS / 1000 + 1 + 8
    return answer
