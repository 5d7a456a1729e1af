"""Clients that want all of it: memory, descriptors, slots, the store (T11, without quotas)."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.parts import OK, RawClient, answering, ask, read_answer, request, until

MIB = 1 << 20
# The limits that the memory is held to in here; the rest is what so many connections need to be read from.
BUFFERED, CONNECTIONS = 32 * MIB, 400
ROOM = BUFFERED + CONNECTIONS * 262_144


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024


async def say(port: int, *pieces: bytes) -> int:
    """Send these pieces and return the answer's status, 0 where none came."""
    with suppress(OSError, AssertionError), closing(await RawClient.open(port)) as client:
        for piece in pieces:
            client.writer.write(piece)
            await client.writer.drain()
        answer = await read_answer(client.reader)
        return answer.status if answer else 0
    return 0


async def huge_bodies(port: int) -> list[int]:
    """Bodies that together are far over the memory, all at once."""
    body = bytes(MIB)
    return await asyncio.gather(*(say(port, request("POST", "/x", f"huge-{n}", body)) for n in range(150)))


async def spooled_bodies(port: int) -> list[int]:
    """Bodies that together are far over the spool."""
    body = bytes(4 * MIB)
    return await asyncio.gather(*(say(port, request("POST", "/x", f"spool-{n}", body)) for n in range(40)))


async def liars(port: int) -> list[int]:
    """Lengths that promise more than there is."""
    raws = [request("POST", "/x", f"liar-{n}", b"", f"Content-Length: {10**12 + n}") for n in range(200)]
    return await asyncio.gather(*(say(port, raw) for raw in raws))


async def many_fields(port: int) -> list[int]:
    """Heads of as many and as long fields as are let in, and more."""
    few = [b"X-%d: %s\r\n" % (n, b"v" * 15_000) for n in range(100)]
    many = [b"X-%d: v\r\n" % n for n in range(5000)]
    heads = [b"GET /x HTTP/1.1\r\nHost: a\r\n" + b"".join(fields) + b"\r\n" for fields in (few, many)]
    return await asyncio.gather(*(say(port, head) for head in heads * 20))


async def endless_heads(port: int) -> list[int]:
    """Heads of which no end comes, at full speed."""
    pieces = [b"GET /x HTTP/1.1\r\nHost: a\r\n", *[b"A: " + b"b" * 16_000] * 200]
    return await asyncio.gather(*(say(port, *pieces) for _ in range(40)))


async def tiny_chunks(port: int) -> list[int]:
    """Bodies in chunks of one byte, with extensions that are longer than they are."""
    body = b"1;%s\r\nx\r\n" % (b"e" * 30) * 20_000 + b"0\r\n\r\n"
    raws = [request("POST", "/x", f"tiny-{n}", b"", "Transfer-Encoding: chunked") + body for n in range(8)]
    return await asyncio.gather(*(say(port, raw) for raw in raws))


async def long_trailers(port: int) -> list[int]:
    """Bodies that end in fields without end."""
    body = b"1\r\nx\r\n0\r\n" + b"A: b\r\n" * 100_000
    raws = [request("POST", "/x", f"trail-{n}", b"", "Transfer-Encoding: chunked") + body for n in range(8)]
    return await asyncio.gather(*(say(port, raw) for raw in raws))


async def many_keys(port: int) -> list[int]:
    """Keys of their own for each of very many requests, in pipelines."""

    async def pipeline(number: int) -> int:
        with closing(await RawClient.open(port)) as client:
            for n in range(100):
                client.writer.write(request("POST", "/x", f"many-{number}-{n}", b"1"))
            answers = [await read_answer(client.reader) for _ in range(100)]
            return max(answer.status if answer else 0 for answer in answers)

    return await asyncio.gather(*(pipeline(number) for number in range(20)))


async def too_many_connections(port: int) -> list[int]:
    """More connections than there may be, opened and held."""
    opened = [await RawClient.open(port) for _ in range(2 * CONNECTIONS)]
    await asyncio.sleep(0.3)
    for client in opened:
        client.reset()
    return []


async def a_crowd_for_one_key(port: int) -> list[int]:
    """Duplicates of one request that would all wait."""
    raw = request("POST", "/slow", f"crowd-{random.random()}", b"1", "Prefer: wait=5")
    return await asyncio.gather(*(say(port, raw) for _ in range(300)))


ATTACKS: tuple[Callable[[int], Awaitable[list[int]]], ...] = (
    huge_bodies, spooled_bodies, liars, many_fields, endless_heads, tiny_chunks, long_trailers, many_keys,
    too_many_connections, a_crowd_for_one_key,
)  # fmt: skip


@pytest.fixture(scope="module")
def limits() -> dict[str, object]:
    return {
        "MAX_BUFFERED_BYTES": BUFFERED, "MAX_SPOOL_BYTES": 64 * MIB, "MAX_REQUEST_BYTES": 8 * MIB,
        "MAX_STORED_BYTES": 8 * MIB, "MAX_CONNECTIONS": CONNECTIONS, "MAX_IN_FLIGHT": 200, "MAX_WAITERS": 100,
        "CLIENT_STALL_S": 3, "ACCESS_LOG": "off",
    }  # fmt: skip


async def slowly(upstream, reader, writer, received) -> None:
    await answering(OK, 1.0 if b"/slow" in received.line else 0.0)(upstream, reader, writer, received)


async def test_ten_attacks_leave_the_proxy_within_its_limits(proxies, upstream, valkey, limits, tmp_path):
    """T11: what an attack asks for beyond the limits is refused, the memory stays within what the settings allow,
    a good client is served right after it, and nothing stays held."""
    assert len(ATTACKS) == 10
    spool = tmp_path / "spool"
    spool.mkdir()
    upstream.script = slowly
    gate = proxies(upstream, valkey.url, SPOOL_DIR=spool, **limits)
    await many_keys(gate.port)
    before, descriptors = resident_bytes(gate.process.pid), len(os.listdir(f"/proc/{gate.process.pid}/fd"))
    told: dict[str, set[int]] = {}
    for attack in ATTACKS:
        under = asyncio.ensure_future(attack(gate.port))
        while not under.done():
            await asyncio.sleep(0.05)
            assert resident_bytes(gate.process.pid) - before < ROOM, attack.__name__
        told[attack.__name__] = set(await under)
        await until(lambda: len(os.listdir(f"/proc/{gate.process.pid}/fd")) < descriptors + CONNECTIONS // 2)
        good = request("POST", "/good", f"good-{attack.__name__}", b"1")
        await until(lambda: not any(map(gate.metric, ("in_flight", "reading_bodies", "buffered_bytes"))))
        for status in (b"executed", b"replayed"):
            assert (await ask(gate.port, good)).header("oncegate-status") == status
    assert told["huge_bodies"] <= {200, 503}
    assert 503 in told["spooled_bodies"]
    assert told["liars"] == {413}
    assert told["many_fields"] <= {0, 400, 431}
    assert told["endless_heads"] <= {0, 400, 431}
    assert told["tiny_chunks"] == {200}
    assert told["long_trailers"] <= {0, 400, 431}
    assert told["many_keys"] == {200}
    assert told["a_crowd_for_one_key"] <= {200, 409, 503}
    await until(lambda: len(os.listdir(f"/proc/{gate.process.pid}/fd")) <= descriptors + 20, 15)
    assert list(spool.iterdir()) == []
    assert "Traceback" not in gate.log()
