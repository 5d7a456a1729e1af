"""Bodies as they come through a real listener: where they are held, how far they may go, how they break off."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog

from oncegate.buffers.memory import MemoryBudget
from oncegate.downstream.body import MEMORY_BYTES, WAITING_BYTES, Bodies, Body, BrokenOff, NoRoom, TooLarge, stream
from oncegate.downstream.listener import Listener
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.request import Request
from oncegate.known_heads.requests import HeadCache
from oncegate.messages.fields import by_name
from oncegate.messages.framing import COUNTED
from oncegate.service.service import Service
from oncegate.settings.loading import load_settings
from tests.parts import RawClient, ask, chunk, read_answer, request, until

LIMIT = 3 << 20


def bytes_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def by_length(data: bytes) -> bytes:
    return request(body=data, key=None)


def in_chunks(data: bytes) -> bytes:
    blocks = [data[start : start + 50_000] for start in range(0, len(data), 50_000)]
    return request("POST", "/", None, b"", "Transfer-Encoding: chunked") + b"".join(map(chunk, blocks)) + b"0\r\n\r\n"


@dataclass
class Reading:
    """A listener whose handler reads each body whole; `came` has what it got."""

    spool_dir: Path
    pace: MinimumRate = field(default_factory=lambda: MinimumRate(30, 1))
    memory: MemoryBudget = field(default_factory=lambda: MemoryBudget(8 << 20))
    spool: MemoryBudget = field(default_factory=lambda: MemoryBudget(8 << 20))
    begun: int = 0
    came: list[Body | TooLarge | NoRoom | BrokenOff] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.memory, self.spool, str(self.spool_dir), LIMIT, self.pace)

    async def __call__(self, asked: Request) -> None:
        self.begun += 1
        here = self.bodies.take(asked.content, by_name(asked.message.raw_headers))
        read = here or await self.bodies.read(asked.content)
        self.came.append(read)
        asked.response.send(200, b"OK", b"", type(read).__name__.encode(), COUNTED)

    async def one(self, port: int, raw: bytes) -> Body | TooLarge | NoRoom | BrokenOff:
        """Send one request and return what became of its body."""
        await ask(port, raw)
        return self.came.pop()

    @property
    def held(self) -> tuple[int, int]:
        """What is taken of memory and of the spool."""
        return self.memory.used, self.spool.used


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    (tmp_path / "spool").mkdir()
    return Reading(tmp_path / "spool")


@asynccontextmanager
async def listening(handler: object) -> AsyncIterator[int]:
    """Serve with a real listener on a port of its own, and yield it."""
    listener = Listener(
        handler, max_connections=100, minimum_rate=MinimumRate(5, 1), observe=lambda _: None, head_cache=HeadCache()
    )
    server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await listener.shutdown(0.1)


FRAMINGS = pytest.mark.parametrize("framed", [by_length, in_chunks])


@FRAMINGS
@pytest.mark.parametrize("size", [0, 1, 5000, MEMORY_BYTES - 1, MEMORY_BYTES, MEMORY_BYTES + 1, LIMIT - 1, LIMIT])
async def test_a_body_within_the_limit_is_whole(reading, framed, size):
    """Up to 1 MiB it is in memory, beyond in an unlinked file; either way its bytes can be had again and again."""
    data = bytes_of(size)
    async with listening(reading) as port:
        body = await reading.one(port, framed(data))
    assert isinstance(body, Body)
    assert (body.size, body.spooled) == (size, size > MEMORY_BYTES)
    assert reading.held == ((0, size) if body.spooled else (size, 0))
    assert list(reading.spool_dir.iterdir()) == []
    for _ in range(2):
        assert b"".join(body.blocks()) == data
        digest = hashlib.sha256()
        async for block in body.stream():
            assert block or not size
            digest.update(block)
        assert digest.digest() == hashlib.sha256(data).digest()
    body.close()
    body.close()  # once more changes nothing
    assert reading.held == (0, 0)


@FRAMINGS
@pytest.mark.parametrize("size", [LIMIT + 1, 2 * LIMIT])
async def test_a_body_over_the_limit_is_none(reading, framed, size):
    """What is too large is given up with everything that was taken for it."""
    async with listening(reading) as port:
        assert await reading.one(port, framed(bytes_of(size))) == TooLarge()
    assert reading.held == (0, 0)


async def test_a_small_body_over_the_limit_is_none(reading):
    """A limit below what comes with the head holds too."""
    reading.bodies.max_bytes = 10
    async with listening(reading) as port:
        for framed in (by_length, in_chunks):
            assert await reading.one(port, framed(b"x" * 11)) == TooLarge()
            assert isinstance(await reading.one(port, framed(b"")), Body)


@FRAMINGS
@pytest.mark.parametrize(
    ("memory", "spool", "size"), [(99, 50, 100), (5000, 399_999, 400_000), (2 << 20, 999, 2 << 20)]
)
async def test_without_room_there_is_no_body(reading, framed, memory, spool, size):
    """Where memory or spool have no room for a body, it is given up with everything that was taken for it."""
    reading.memory.limit, reading.spool.limit = memory, spool
    async with listening(reading) as port:
        for _ in range(2):
            assert await reading.one(port, framed(bytes_of(size))) == NoRoom()
            assert reading.held == (0, 0)


@FRAMINGS
async def test_bodies_that_are_on_their_way_leave_half_of_the_memory(reading, framed):
    """Above half of the memory a body that comes in parts is spooled, and one that came with its head is not."""
    reading.memory.limit = 1 << 20
    reading.memory.used = (1 << 19) + 1
    async with listening(reading) as port:
        parts, whole = await reading.one(port, framed(bytes_of(400_000))), await reading.one(port, framed(b"x" * 100))
    assert isinstance(parts, Body)
    assert isinstance(whole, Body)
    assert (parts.spooled, whole.spooled) == (True, False)
    assert b"".join(parts.blocks()) == bytes_of(400_000)
    parts.close()


def aside(reading: Reading, size: int) -> tuple[Body, bool]:
    """Return a body in memory, and whether it was set aside."""
    assert reading.memory.take(size)
    body = Body(bytes_of(size), size, reading.memory, reading.spool)
    return body, reading.bodies.set_aside(body)


@pytest.mark.parametrize("size", [0, 1, WAITING_BYTES, WAITING_BYTES + 1, MEMORY_BYTES])
def test_a_body_that_is_set_aside_leaves_the_memory(reading, size):
    """Unless it is small it is in an unlinked file, with the same bytes; once more changes nothing."""
    body, done = aside(reading, size)
    assert done
    assert reading.bodies.set_aside(body)
    assert (body.size, body.spooled) == (size, size > WAITING_BYTES)
    assert reading.held == ((0, size) if body.spooled else (size, 0))
    assert list(reading.spool_dir.iterdir()) == []
    assert b"".join(body.blocks()) == bytes_of(size)
    body.close()
    body.close()
    assert reading.held == (0, 0)


def test_bodies_that_are_set_aside_leave_half_of_the_spool(reading):
    """Above half of the spool a body stays where it is; so it does where the folder is gone."""
    reading.spool.limit = 1_000_000
    bodies = [aside(reading, 200_000) for _ in range(5)]
    assert [done for _, done in bodies] == [True, True, True, False, False]
    assert reading.held == (400_000, 600_000)
    assert {b"".join(body.blocks()) for body, _ in bodies} == {bytes_of(200_000)}
    for body, _ in bodies:
        body.close()
    reading.spool_dir.rmdir()
    body, done = aside(reading, 200_000)
    assert not done
    assert reading.held == (200_000, 0)
    body.close()
    assert reading.held == (0, 0)


async def test_a_spool_folder_that_is_gone_is_no_room(reading):
    """What the file system refuses is no room; bodies in memory do without it."""
    reading.spool_dir.rmdir()
    async with listening(reading) as port:
        assert await reading.one(port, by_length(bytes_of(2 << 20))) == NoRoom()
        assert isinstance(await reading.one(port, by_length(bytes_of(MEMORY_BYTES))), Body)
    assert reading.held == (MEMORY_BYTES, 0)


@pytest.mark.parametrize("size", [0, 10, 400_000, 2 << 20])
@pytest.mark.parametrize("end", ["FIN", "RST", "framing"])
async def test_a_body_that_breaks_off_is_none(reading, size, end):
    """A client that leaves or breaks its framing, in memory or in the spool, leaves nothing."""
    async with listening(reading) as port:
        with closing(await RawClient.open(port)) as client:
            client.writer.write(in_chunks(bytes_of(size))[:-5])
            await until(lambda: reading.begun)
            if end == "FIN":
                client.writer.write_eof()
            elif end == "RST":
                client.reset()
            else:
                client.writer.write(b"no size\r\n")
            await until(lambda: reading.came)
    assert reading.came == [BrokenOff(stalled=False)]
    assert reading.held == (0, 0)


async def test_a_body_may_pause_and_not_stall(tmp_path):
    """A body that keeps up its pace takes as long as it takes; a window with too little of it ends it."""
    reading = Reading(tmp_path, MinimumRate(1, 3))
    async with listening(reading) as port:
        with closing(await RawClient.open(port)) as client:
            client.writer.write(request("POST", "/", None, b"", "Content-Length: 10"))
            for _ in range(10):
                await asyncio.sleep(0.15)
                client.writer.write(b"x")
            assert (await read_answer(client.reader)).body == b"Body"
        with closing(await RawClient.open(port)) as client:
            client.writer.write(request("POST", "/", None, b"", "Content-Length: 10") + b"x")
            assert (await read_answer(client.reader)).body == b"BrokenOff"
        with closing(await RawClient.open(port)) as client:
            client.writer.write(request("POST", "/", None, b"", "Transfer-Encoding: chunked"))
            while len(reading.came) < 3:
                client.writer.write(chunk(b"x"))
                await asyncio.sleep(0.6)
            assert (await read_answer(client.reader)).body == b"BrokenOff"
    assert reading.came[1:] == [BrokenOff(stalled=True)] * 2
    assert reading.memory.used == 10


async def test_a_streamed_body_says_how_it_broke():
    """Pass-through yields the bytes as they come; a pause too long and a break are different errors."""
    came: list[object] = []

    async def handler(asked: Request) -> None:
        client = asked.response
        try:
            async for block in stream(asked.content, MinimumRate(0.5, 1)):
                came.append(block)
        except (TimeoutError, ConnectionError) as error:
            came.append(type(error))
        client.send(200, b"OK", b"Connection: close\r\n", b"", COUNTED)

    async with listening(handler) as port:
        for rest, error in ((b"", TimeoutError), (b"no size\r\n", ConnectionError), (b"0\r\n\r\n", None)):
            with closing(await RawClient.open(port)) as client:
                client.writer.write(in_chunks(b"hello")[:-5])
                await until(lambda: came)
                client.writer.write(rest)
                await read_answer(client.reader)
            assert came == [b"hello", *([error] if error else [])]
            came.clear()


# Through the whole service ...


@pytest.fixture
async def service(upstream, valkey, tmp_path, monkeypatch) -> AsyncIterator[Service]:
    """The service inside this process, with deadlines that a test can wait for."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "UPSTREAM": upstream.url,
        "STORE_URL": valkey.url,
        "LISTEN": "127.0.0.1:0",
        "ADMIN_LISTEN": "127.0.0.1:0",
        "CLIENT_STALL_S": "0.5",
    }.items():
        monkeypatch.setenv(f"ONCEGATE_{name}", value)
    settings = load_settings()
    service = Service(settings, settings.store_url.get_secret_value(), structlog.testing.CapturingLogger())
    await service.start()
    yield service
    await service.drain(asyncio.Event())
    await service.close()


@pytest.mark.parametrize("key", ["stalled", None])
@pytest.mark.parametrize("size", [1, 2 << 20])
async def test_a_stalled_body_is_given_up(service, upstream, valkey, key, size):
    """A body that pauses for too long gets 408 and the end, in memory and spooled, streamed too; nothing is claimed."""
    port = int(service.listens_on["public"].rpartition(":")[2])
    with closing(await RawClient.open(port)) as client:
        client.writer.write(request("POST", "/x", key, b"", f"Content-Length: {size + 1}") + bytes(size))
        answer = await read_answer(client.reader)
        assert (answer.status, answer.header("connection")) == (408, b"close")
        assert (answer.problem["retryable"], answer.header("retry-after")) == (True, b"1")
        assert answer.header("oncegate-status") == (b"refused" if key else None)
        client.writer.write_eof()
        assert await client.reader.read() == b""
    assert valkey.records() == {}
    assert all(len(received.body) == 0 for received in upstream.received)  # what was streamed broke off there too
    assert (await ask(port, request("POST", "/x", "after"))).header("oncegate-status") == b"executed"
