"""The reading side of followers: originals at one proxy, and duplicates that join them at the same or another one.

python -m loadtest.bench.joining follow OWNER_PORT PORT STREAMS EACH EVENTS EVERY_MS BYTES KEY, or ... first OWNER_PORT
PORT STREAMS REDIS_PORT KEY, or ... again OWNER_PORT PORT STREAMS KEY. Prints JSON lines: `follow` one once everybody
reads, and all of them one at the end.
"""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import hiredis
import uvloop

from loadtest.bench.scenarios import request_bytes
from loadtest.bench.streams import RAMP_S, Live, Stream, at_share

# By then the store has the beginning of a stream, also where its owner sends it once a second.
STORED_S = 1.5
# Events that were sent later than this after the first join of their stream have the goal.
SETTLED_S = 0.2
DEADLINE_S = 30
FIRST_EVENTS, FIRST_EVERY_MS, FIRST_BYTES = 20, 500, 100


class Reader(Stream):
    """One stream; `begun` is its first event, in seconds after the request."""

    def __init__(self, request: bytes, live: Live) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[float] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.joined, self.ended_s = False, 0.0
        super().__init__(request, live, self.over)

    @property
    def asked_s(self) -> float:
        return self._asked

    def data_received(self, data: bytes) -> None:
        if not self.first_byte_s:
            self.joined = b"oncegate-status: joined\r\n" in data.lower()
        super().data_received(data)
        if self.delays_s and not self.begun.done():
            self.begun.set_result(time.monotonic() - self._asked)

    def connection_lost(self, why: Exception | None) -> None:
        self.ended_s = time.monotonic()
        super().connection_lost(why)

    def leave(self) -> None:
        self._transport.abort()


async def opened(port: int, request: bytes, live: Live) -> Reader:
    reader = Reader(request, live)
    await asyncio.get_running_loop().create_connection(lambda: reader, "127.0.0.1", port)
    return reader


async def begun(readers: list[Reader]) -> None:
    """Wait for the first event of each. Raises TimeoutError."""
    await asyncio.wait_for(asyncio.gather(*(one.begun for one in readers)), DEADLINE_S)


async def originals(port: int, requests: list[bytes]) -> list[Reader]:
    """Start a stream for each request, and return when the store has the beginning of each."""
    found = []
    for request in requests:
        found.append(await opened(port, request, Live()))
        await asyncio.sleep(RAMP_S)
    await begun(found)
    await asyncio.sleep(STORED_S)
    return found


async def follow(
    owner_port: int, port: int, streams: int, each: int, number: int, every_ms: int, size: int, key: str
) -> dict[str, Any]:
    """Read `streams` streams of `number` events of `size` bytes, each with so many followers."""
    path, live = f"/events?n={number}&ms={every_ms}&bytes={size}", Live()
    requests = [request_bytes(path, f"{key}-{at}") for at in range(streams)]
    owners, groups = await originals(owner_port, requests), list[list[Reader]]()
    for request in requests:
        groups.append([])
        for _ in range(each):
            groups[-1].append(await opened(port, request, live))
            await asyncio.sleep(RAMP_S)
    readers = [one for group in groups for one in group]
    await begun(readers)
    print(json.dumps({"reading": len(readers)}), flush=True)
    everybody = [*owners, *readers]
    await asyncio.wait([one.over for one in everybody], timeout=number * every_ms / 1000 + DEADLINE_S)
    delays = sorted(delay for group in groups for delay in settled(group))
    own = sorted(delay for one in owners for delay in one.delays_s)
    return {
        "not_joined": sum(not one.joined for one in readers),
        "lost": sum(number - len(one.delays_s) + one.disorder for one in everybody),
        "first_end_s": min(one.ended_s for one in everybody),
        "events": len(delays),
        "event_p50": at_share(delays, 0.5),
        "event_p99": at_share(delays, 0.99),
        "owner_p99": at_share(own, 0.99),
    }


def settled(group: list[Reader]) -> list[float]:
    """Return the delays of what was sent to the followers of one stream once its first join was SETTLED_S ago."""
    since_s = min((one.asked_s for one in group), default=0.0) + SETTLED_S
    return [
        delay
        for one in group
        for delay, sent_s in zip(one.delays_s, one.sent_s, strict=True)
        if sent_s >= max(since_s, one.asked_s)
    ]


async def first(owner_port: int, port: int, streams: int, redis_port: int, key: str) -> dict[str, Any]:
    """Join so many streams one after the other, each for the first time there, in turns with reads of a record."""
    path = f"/events?n={FIRST_EVENTS}&ms={FIRST_EVERY_MS}&bytes={FIRST_BYTES}"
    requests = [request_bytes(path, f"{key}-{at}") for at in range(streams)]
    owners = await originals(owner_port, requests)
    read_record, joins, reads, not_joined = reading(redis_port), list[float](), list[float](), 0
    for request in requests:
        reads.append(read_record())
        reader = await opened(port, request, Live())
        joins.append(await asyncio.wait_for(reader.begun, DEADLINE_S))
        not_joined += not reader.joined
        reader.leave()
        await reader.over
    running = sum(not one.over.done() for one in owners)
    for one in owners:
        one.leave()
    behind = sorted(join - read for join, read in zip(joins, reads, strict=True))
    return {
        "not_joined": not_joined,
        "ended": streams - running,
        "read_p50": at_share(sorted(reads), 0.5),
        "behind_p50": at_share(behind, 0.5),
        "behind_p99": at_share(behind, 0.99),
    }


async def again(owner_port: int, port: int, streams: int, key: str) -> dict[str, Any]:
    """Cut the reader of each stream off at its first event, and join at once; one stream after the other."""
    path = f"/events?n={FIRST_EVENTS}&ms={FIRST_EVERY_MS}&bytes={FIRST_BYTES}"
    found, not_joined = list[float](), 0
    for at in range(streams):
        request = request_bytes(path, f"{key}-{at}")
        own = await opened(owner_port, request, Live())
        await begun([own])
        own.leave()
        reader = await opened(port, request, Live())
        found.append(await asyncio.wait_for(reader.begun, DEADLINE_S))
        not_joined += not reader.joined
        reader.leave()
    found.sort()
    return {"not_joined": not_joined, "p50": at_share(found, 0.5), "p99": at_share(found, 0.99)}


def reading(port: int) -> Callable[[], float]:
    """Return what reads the record of a running stream in one command, and returns the seconds of its round trip."""
    connection, replies = socket.create_connection(("127.0.0.1", port), DEADLINE_S), hiredis.Reader()

    def ask(*words: bytes) -> Any:
        connection.sendall(hiredis.pack_command(words))
        while (reply := replies.gets()) is False:
            replies.feed(connection.recv(65536))
        return reply

    _, keys = ask(b"SCAN", b"0", b"MATCH", b"once:*", b"COUNT", b"1000000", b"TYPE", b"hash")
    name = next(one for one in keys if b"head" in ask(b"HKEYS", one))

    def read_record() -> float:
        began = time.monotonic()
        ask(b"HGETALL", name)
        return time.monotonic() - began

    return read_record


if __name__ == "__main__":
    what, *numbers, key = sys.argv[1:]
    measure: Callable[..., Any] = {"follow": follow, "first": first, "again": again}[what]
    print(json.dumps(uvloop.run(measure(*map(int, numbers), key))))
