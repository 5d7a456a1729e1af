"""The links that fail on demand: what passes is unchanged, and what breaks breaks as it was told to."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loadtest.chaos.link import Link

BYTES = bytes(range(256)) * 400


class Echo:
    """A server that sends everything back, and ends when its peer does."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.ends: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.received += data
                writer.write(data)
                await writer.drain()
            self.ends.append("end")
        except ConnectionError:
            self.ends.append("reset")
        writer.close()


@asynccontextmanager
async def linked(seed: int = 1) -> AsyncIterator[tuple[Link, Echo]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    link = Link(("127.0.0.1", server.sockets[0].getsockname()[1]), seed)
    await link.start()
    try:
        yield link, echo
    finally:
        for writer in WRITERS:
            writer.close()
        WRITERS.clear()
        await link.close()
        server.close()
        await asyncio.sleep(0.01)  # for the transports to be closed


WRITERS: list[asyncio.StreamWriter] = []


async def connect(link: Link) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    WRITERS.append(writer)
    return reader, writer


async def read(reader: asyncio.StreamReader, size: int) -> bytes:
    return await asyncio.wait_for(reader.readexactly(size), 5)


async def seen(ends: list[str]) -> list[str]:
    until = time.monotonic() + 5
    while not ends and time.monotonic() < until:
        await asyncio.sleep(0.01)
    return ends


@pytest.mark.parametrize(("latency_s", "slice_bytes"), [(0, 0), (0.001, 0), (0, 1), (0.001, 700)])
async def test_bytes_pass_unchanged(latency_s: float, slice_bytes: int) -> None:
    """Late or in slices, the bytes are the same, and an end comes behind the last of them."""
    async with linked() as (link, echo):
        reader, writer = await connect(link)
        size = 2000 if slice_bytes == 1 else len(BYTES)
        for way in (link.up, link.down):
            way.slow(latency_s, latency_s, slice_bytes)
        writer.write(BYTES[:size])
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(-1), 20) == BYTES[:size]
        assert await seen(echo.ends) == ["end"]


async def test_what_is_sent_at_once_is_not_lost() -> None:
    """Bytes that come before the other side is connected wait for it."""
    async with linked() as (link, _):
        clients = [await connect(link) for _ in range(50)]
        for number, (_, writer) in enumerate(clients):
            writer.write(b"%04d" % number)
        assert [await read(reader, 4) for reader, _ in clients] == [b"%04d" % number for number in range(50)]


async def test_latency_is_waited_for() -> None:
    async with linked() as (link, _):
        reader, writer = await connect(link)
        writer.write(b"a")
        await read(reader, 1)
        link.up.slow(0.15)
        began = time.monotonic()
        writer.write(b"b")
        await read(reader, 1)
        assert time.monotonic() - began >= 0.148  # a timer may be a millisecond early


@pytest.mark.parametrize("from_client", [True, False])
async def test_a_reset_passes_as_a_reset(from_client: bool) -> None:
    """The other side must not take it for a clean end."""
    async with linked() as (link, echo):
        reader, writer = await connect(link)
        writer.write(b"a")
        await read(reader, 1)
        if from_client:
            writer.transport.get_extra_info("socket").setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.transport.abort()
            assert await seen(echo.ends) == ["reset"]
        else:
            assert link.cut() == 2
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(1), 5)


@pytest.mark.parametrize("with_reset", [True, False])
@pytest.mark.parametrize("after", [1, 100, 5000])
async def test_cut_after_so_many_bytes(after: int, with_reset: bool) -> None:
    """Exactly so many bytes pass, then the connection ends as told; the next one is whole again."""
    async with linked() as (link, echo):
        reader, writer = await connect(link)
        link.up.cut_after(after, with_reset)
        writer.write(BYTES)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await read(reader, len(BYTES))
        await seen(echo.ends)
        assert echo.received == BYTES[:after]
        reader, writer = await connect(link)
        writer.write(b"again")
        assert await read(reader, 5) == b"again"


async def test_a_reply_is_dropped() -> None:
    """The replies before it arrive; it is lost, with its connection."""
    async with linked() as (link, echo):
        reader, writer = await connect(link)
        link.down.drop(3)
        for number in range(2):
            writer.write(b"%d" % number)
            assert await read(reader, 1) == b"%d" % number
        writer.write(b"2")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 5)
        assert echo.received == b"012"


@pytest.mark.parametrize("lost", [True, False])
async def test_a_black_hole_keeps_everything(lost: bool) -> None:
    """Nothing passes, nobody hears of it; afterwards it arrives late, or goes with its connection."""
    async with linked() as (link, echo):
        reader, writer = await connect(link)
        writer.write(b"a")
        await read(reader, 1)
        link.hole()
        writer.write(b"b")
        _, newcomer = await connect(link)
        newcomer.write(b"c")
        await asyncio.sleep(0.1)
        assert echo.received == b"a"
        if lost:
            link.cut()
        link.heal()
        if lost:
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(1), 5)
            assert echo.received == b"a"
        else:
            assert await read(reader, 1) == b"b"


async def test_one_way_alone() -> None:
    """A direction fails without the other: the request arrives, its answer does not."""
    async with linked() as (link, echo):
        reader, writer = await connect(link)
        link.down.hole()
        writer.write(b"asked")
        while echo.received != b"asked":
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        link.heal()
        assert await read(reader, 5) == b"asked"


async def test_refused_until_started_again() -> None:
    """Newcomers are refused; who is connected stays; the port is the same afterwards."""
    async with linked() as (link, _):
        reader, writer = await connect(link)
        writer.write(b"a")
        await read(reader, 1)
        link.refuse()
        with pytest.raises(ConnectionRefusedError):
            await connect(link)
        writer.write(b"b")
        assert await read(reader, 1) == b"b"
        await link.start()
        await connect(link)


async def test_a_target_may_move() -> None:
    async with linked() as (link, first), linked() as (other, second):
        reader, writer = await connect(link)
        writer.write(b"1")
        await read(reader, 1)
        link.target = other.target
        reader, writer = await connect(link)
        writer.write(b"2")
        await read(reader, 1)
        assert (first.received, second.received) == (b"1", b"2")


async def test_the_seed_decides() -> None:
    """The same seed slices in the same way."""
    sliced = []
    for seed in (7, 7, 8):
        async with linked(seed) as (link, _):
            link.up.slow(0, slice_bytes=50)
            sliced.append([len(piece) for piece in link.up.slices(BYTES[:5000])])
    assert sliced[0] == sliced[1] != sliced[2]
