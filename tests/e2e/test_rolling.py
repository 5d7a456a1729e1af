"""Proxies of an older build and of this one on the same store, under load, replaced one after the other in both ways.

The older build is the last one that cannot read packed records. Each key is executed once, whoever is asked again, and
nobody finds a record that it cannot read.
"""

import asyncio
import os
import random
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.older.build import unpack_older_build
from tests.parts import Answer, Proxy, RawUpstream, Received, ask, request, until
from tests.zygote import Forked, Zygote

# What a client may be told that comes again: nothing was executed for it, or somebody else is at it.
AGAIN = {"in-flight", "store-unavailable", "shutting-down"}


@pytest.fixture(scope="module")
def older_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(unpack_older_build(tmp_path_factory.mktemp("older")))
    yield zygote
    zygote.close()


class Fleet:
    """The proxies on one store. Started ones are in `live` until they are stopped."""

    def __init__(
        self, upstream: RawUpstream, store: Valkey, folder: Path, this_build: Zygote, older_build: Zygote
    ) -> None:
        self.live: list[Proxy] = []
        self._upstream, self._store, self._folder = upstream, store, folder
        self._this_build, self._older_build = this_build, older_build
        self._all: list[Proxy] = []

    async def start(self, *, older: bool = False, **settings: object) -> Proxy:
        """Start a proxy and wait until it serves, though it may not be ready."""
        settings = {"IDENTITY_CHANGE": "refuse", "DRAIN_DELAY_S": 0, "STORE_TIMEOUT_MS": 3000, **settings}
        build = self._older_build if older else self._this_build
        proxy = Forked(build, self._upstream.url, self._store.url, self._folder, settings)
        self._all.append(proxy)
        await proxy.begin()
        return proxy

    async def join(self, *, older: bool = False, **settings: object) -> Proxy:
        """Start a proxy that takes requests once it is ready."""
        proxy = await self.start(older=older, **settings)
        await until(lambda: is_ready(proxy), 20)
        self.live.append(proxy)
        return proxy

    async def leave(self, proxy: Proxy, number: int = signal.SIGTERM) -> None:
        """End a proxy. Clients that use it meanwhile find a closed connection."""
        self.live.remove(proxy)
        proxy.signal(number)
        await until(lambda: proxy.process.poll() is not None, 40)

    def close(self) -> None:
        for proxy in self._all:
            proxy.close()


@pytest.fixture
def fleet(
    upstream: RawUpstream, own_valkey: Valkey, tmp_path: Path, zygote: Zygote, older_build: Zygote
) -> Iterator[Fleet]:
    fleet = Fleet(upstream, own_valkey, tmp_path, zygote, older_build)
    yield fleet
    fleet.close()


def is_ready(proxy: Proxy) -> bool:
    return proxy.admin("/readyz")[0] == 200


# Load ...


@dataclass
class Load:
    """Clients that send each key several times, at once and one after the other, to any live proxy."""

    fleet: Fleet
    # What each key was answered in the end.
    answers: dict[str, set[bytes]] = field(default_factory=dict)
    problems: Counter[str] = field(default_factory=Counter)
    over: bool = False

    async def run(self, clients: int) -> None:
        await asyncio.gather(*[self._client(number) for number in range(clients)])

    async def _client(self, number: int) -> None:
        for sent in range(100_000):
            if self.over:
                return
            key = f"key-{number}-{sent}"
            await asyncio.gather(*[self.send(key) for _ in range(random.choice((1, 1, 2, 3)))])
            if self.answers:
                await self.send(random.choice(list(self.answers)))

    async def send(self, key: str, proxy: Proxy | None = None) -> None:
        """Send a key to a proxy, and again until it is answered."""
        for _ in range(400):
            answer = await ask_once((proxy or random.choice(self.fleet.live)).port, key)
            if answer and self._is_final(key, answer):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{key} was never answered: {self.problems}")

    def _is_final(self, key: str, answer: Answer) -> bool:
        if answer.status == 201:
            self.answers.setdefault(key, set()).add(answer.body)
            return True
        self.problems[answer.slug] += 1
        return answer.slug not in AGAIN

    async def ask_again(self, proxy: Proxy) -> None:
        """Send every key that was answered once more, to this proxy."""
        keys = list(self.answers)
        for at in range(0, len(keys), 20):
            await asyncio.gather(*[self.send(key, proxy) for key in keys[at : at + 20]])


async def ask_once(port: int, key: str) -> Answer | None:
    """Return the answer to a key, None if it did not come whole."""
    raw = request("POST", f"/charges/{key}", key, b'{"amount": 1}', "Connection: close")
    # The last one is an end before an answer.
    with suppress(OSError, AssertionError):
        answer = await ask(port, raw)
        return answer if answer.complete else None
    return None


class Api:
    """Executes what comes, and counts it by key. Every third response comes in chunks."""

    def __init__(self, upstream: RawUpstream) -> None:
        self.executed: Counter[str] = Counter()
        upstream.script = self._execute

    async def _execute(
        self, _server: RawUpstream, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Received
    ) -> None:
        key = received.line.split(b" ")[1].decode().rpartition("/")[2]
        self.executed[key] += 1
        body = f"{key} was charged {self.executed[key]} times".encode()
        await asyncio.sleep(random.random() / 20)
        if len(self.executed) % 3:
            writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            return
        writer.write(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in (body[:10], body[10:]):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await asyncio.sleep(0.08)
        writer.write(b"0\r\n\r\n")


def assert_once(api: Api, load: Load, but: Collection[str] = ()) -> None:
    """No key was executed twice, every answer to one is the same, and each is one of these problems at most."""
    assert len(load.answers) > 50
    assert max(api.executed.values()) == 1
    assert {len(bodies) for bodies in load.answers.values()} == {1}
    assert set(load.problems) <= {*AGAIN, *but}


@asynccontextmanager
async def under_load(fleet: Fleet, clients: int = 4) -> AsyncIterator[Load]:
    load = Load(fleet)
    running = asyncio.ensure_future(load.run(clients))
    yield load
    load.over = True
    await running


async def test_a_roll_and_its_rollback(fleet: Fleet, upstream: RawUpstream, own_valkey: Valkey) -> None:
    """From two proxies of the older build to two of this one, and back: what was answered is answered alike."""
    api = Api(upstream)
    older = [await fleet.join(older=True), await fleet.join(older=True)]
    async with under_load(fleet) as load:
        newer = []
        for proxy in older:
            newer.append(await fleet.join())
            await asyncio.sleep(0.5)
            await fleet.leave(proxy)
        await asyncio.sleep(0.5)
        for proxy in newer:
            back = await fleet.join(older=True)
            await asyncio.sleep(0.5)
            await fleet.leave(proxy)
    await load.ask_again(back)
    assert_once(api, load)
    with own_valkey.client() as client:
        # What only the older build writes.
        assert client.type("once:rules") == b"hash"


@pytest.mark.full
async def test_rolls_in_both_ways_with_kills(fleet: Fleet, upstream: RawUpstream) -> None:
    """Builds come and go in any order for a minute, and half of the proxies are killed. Some keys become unknown."""
    api, options = Api(upstream), {"LEASE_MS": 1500}
    await fleet.join(**options)
    async with under_load(fleet, 3) as load:
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            older = random.random() < 0.5
            await fleet.join(older=older, **options, **({} if older else {"RECORD_LAYOUT": "hash"}))
            await asyncio.sleep(random.random())
            if len(fleet.live) > 2:
                await fleet.leave(random.choice(fleet.live), random.choice((signal.SIGTERM, signal.SIGKILL)))
    for proxy in fleet.live:
        await load.ask_again(proxy)
    assert_once(api, load, but={"outcome-unknown"})


async def is_packed(proxy: Proxy) -> None:
    await until(lambda: [line["layout"] for line in proxy.events("record layout")][-1:] == ["packed"], 30)


async def unpack(store: Valkey) -> str:
    """Run the command for the way back, and return what it prints."""
    command = [sys.executable, "-m", "oncegate", "keys", "unpack"]
    env = {**os.environ, "ONCEGATE_STORE_URL": store.url, "ONCEGATE_UPSTREAM": "http://127.0.0.1:1"}
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=PIPE, stderr=PIPE)
    said, complaint = await process.communicate()
    assert process.returncode == 0, complaint
    return said.decode()


def packed_records(store: Valkey) -> int:
    with store.client() as client:
        return sum(1 for _ in client.scan_iter("once:{*}", _type="string"))


async def test_the_way_back_from_packed_records(fleet: Fleet, upstream: RawUpstream, own_valkey: Valkey) -> None:
    """Records are packed once it is chosen and no older build is left. One that comes has to wait for the way back."""
    api = Api(upstream)
    await fleet.join(older=True)
    async with under_load(fleet, 2) as load:
        newer = [await fleet.join(RECORD_LAYOUT="packed"), await fleet.join()]
        await asyncio.sleep(1)
        assert packed_records(own_valkey) == 0
        await fleet.leave(fleet.live[0])
        for proxy in newer:
            await is_packed(proxy)
        await until(lambda: packed_records(own_valkey) > 20)
        older = await fleet.start(older=True)
        reason = older.admin("/readyz")[1]
        assert "WRONGTYPE" in reason
        refused = await asyncio.gather(*[ask_once(older.port, f"refused-{number}") for number in range(10)])
        assert {answer.slug for answer in refused if answer} == {"store-unavailable"}
        back = [await fleet.join(RECORD_LAYOUT="hash") for _ in newer]
        for proxy in newer:
            await fleet.leave(proxy)
        assert "records unpacked" in await unpack(own_valkey)
        assert packed_records(own_valkey) == 0
        await until(lambda: is_ready(older))
        fleet.live.append(older)
        for proxy in back:
            await fleet.leave(proxy)
    await load.ask_again(older)
    assert_once(api, load)
    assert not any("refused" in key for key in api.executed)


@pytest.mark.full
async def test_an_older_build_that_wakes_up_beside_packed_records(
    fleet: Fleet, upstream: RawUpstream, own_valkey: Valkey
) -> None:
    """It was suspended when records were packed first. It executes nothing again, and refuses what it cannot read."""
    api = Api(upstream)
    older = await fleet.start(older=True)
    older.signal(signal.SIGSTOP)
    newer = await fleet.join(RECORD_LAYOUT="packed")
    await is_packed(newer)
    load = Load(fleet)
    keys = [f"key-{number}" for number in range(60)]
    await asyncio.gather(*[load.send(key) for key in keys])
    asked = [asyncio.ensure_future(ask_once(older.port, key)) for key in keys]
    await asyncio.sleep(0.2)
    older.signal(signal.SIGCONT)
    told = [answer for answer in await asyncio.gather(*asked) if answer]
    # A response that came in several chunks is a hash in either layout.
    assert {answer.slug for answer in told if answer.status != 201} <= {"record-corrupt", "store-unavailable"}
    await until(lambda: not is_ready(older))
    await load.ask_again(newer)
    assert_once(api, load)
