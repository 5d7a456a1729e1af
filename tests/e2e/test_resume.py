"""A stream that goes on behind the event that its reader saw last: on any replica, while it runs and after."""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from oncegate.adaptation.event_ids import EventSearch
from tests.conftest import Valkey
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    ROOT,
    Answer,
    Proxy,
    Raw,
    RawClient,
    Received,
    Tap,
    answering,
    ask,
    chunk,
    read_answer,
    request,
    serving,
    until,
)

RULES = """
[[rule]]
name = "numbered"
path = "/numbered"
resume = true
sse_ids = true
on_unknown = "retry"

[[rule]]
name = "streams"
path = "/streams"
resume = true
on_unknown = "retry"
heartbeat_s = 0.1

[[rule]]
name = "derived"
path = "/derived"
key = "derived:60"
resume = true

[[rule]]
name = "bypassed"
path = "/bypassed"
on_store_down = "bypass"
resume = true
sse_ids = true

[[rule]]
name = "small"
path = "/small"
max_stored_bytes = 500
resume = true
"""
SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
EVENTS = [b"event: step\nid: %02d\ndata: one of many\n\n" % number for number in range(12)]
BODY = b"".join(EVENTS)


@pytest.fixture
def replicas(proxies, upstream, tmp_path: Path) -> Callable[..., list[Proxy]]:
    """Start replicas on a store, under the rules."""
    (tmp_path / "rules.toml").write_text(RULES)

    def start(url: str, count: int = 2, **settings: object) -> list[Proxy]:
        return [proxies(upstream, url, RULES_FILE="rules.toml", **settings) for _ in range(count)]

    return start


def behind(event_id: str | None, path: str = "/streams", body: bytes = b"{}", key: str = "key-1") -> bytes:
    """Return a request for what comes behind an event."""
    return request("POST", path, key, body, *([] if event_id is None else [f"Last-Event-ID: {event_id}"]))


def without_comments(body: bytes) -> bytes:
    return body.replace(b":\n\n", b"")


@pytest.fixture
async def begun() -> AsyncIterator[Callable[[int, bytes], Awaitable[RawClient]]]:
    """Send a request and return its client, which is closed with the test."""
    clients: list[RawClient] = []

    async def begin(port: int, raw: bytes) -> RawClient:
        clients.append(client := await RawClient.open(port))
        client.writer.write(raw)
        return client

    yield begin
    for client in clients:
        client.close()


async def answered(client: RawClient) -> Answer:
    async with asyncio.timeout(20):
        answer = await read_answer(client.reader)
    assert answer is not None
    return answer


async def seen(client: RawClient, last: bytes) -> None:
    """Wait until a client has so much of its answer."""
    async with asyncio.timeout(20):
        await client.reader.readuntil(last)


async def test_behind_every_event(replicas, begun, upstream, stored):
    """A reader gets what comes behind its event: while the stream runs, also behind one that has not come, and after.

    On the replica where it runs, and on another one.
    """
    tap = Tap()
    upstream.script = tap.script
    owner, other = replicas(stored.url)
    first = await begun(owner.port, behind(None))
    tap.send(SSE, *map(chunk, EVENTS[:6]))
    await seen(first, EVENTS[5])
    readers = {
        number: [await begun(one.port, behind(f" {number:02} ")) for one in (owner, other)] for number in range(12)
    }
    await asyncio.gather(*(seen(reader, EVENTS[5]) for number in range(5) for reader in readers[number]))
    tap.end(*map(chunk, EVENTS[6:]), LAST_CHUNK)
    for number in range(12):
        for reader in readers[number]:
            if number >= 5:
                answer = await answered(reader)
                assert (answer.status, answer.header("oncegate-status")) == (200, b"resumed")
                assert answer.header("content-type") == b"text/event-stream"
                assert (without_comments(answer.body), answer.complete) == (b"".join(EVENTS[number + 1 :]), True)
            else:
                await seen(reader, EVENTS[11])
                await seen(reader, LAST_CHUNK)
    for number in range(12):
        for one in (owner, other):
            answer = await ask(one.port, behind(f"{number:02}"))
            assert (answer.status, answer.header("oncegate-status")) == (200, b"resumed")
            assert (answer.body, answer.complete) == (b"".join(EVENTS[number + 1 :]), True)
    assert len(upstream.received) == 1
    assert owner.metric('requests_total{outcome="resumed"}') == 24
    assert other.metric("followers") == 0


async def test_the_owner_is_killed(replicas, begun, upstream, store):
    """A reader that comes at once to another replica gets what was stored behind its event, and no clean end."""
    tap = Tap()
    upstream.script = tap.script
    owner, other = replicas(store.url, LEASE_MS=900)
    first = await begun(owner.port, behind(None))
    tap.send(SSE, *map(chunk, EVENTS[:6]))
    await seen(first, EVENTS[5])
    # What somebody reads elsewhere is stored: so this much is.
    reader = await begun(other.port, behind("00"))
    await seen(reader, EVENTS[5])
    owner.kill()
    again = await begun(other.port, behind("03"))
    beyond = await begun(other.port, behind("07"))
    rest, nothing = await answered(again), await answered(beyond)
    assert (rest.status, without_comments(rest.body), rest.complete) == (200, EVENTS[4] + EVENTS[5], False)
    assert (nothing.status, nothing.slug) == (409, "outcome-unknown")
    assert LAST_CHUNK not in await reader.reader.read()
    assert len(upstream.received) == 1


async def test_a_response_that_grows_too_large(replicas, begun, upstream, valkey):
    """Whoever reads it elsewhere or here is broken off, and who waits is told; the original's client gets all of it."""
    tap = Tap()
    upstream.script = tap.script
    gates = replicas(valkey.url)
    first = await begun(gates[0].port, behind(None, "/small"))
    tap.send(SSE, *map(chunk, EVENTS[:2]))
    await seen(first, EVENTS[1])
    readers = [await begun(gate.port, behind("00", "/small")) for gate in gates]
    waiting = [await begun(gate.port, behind("11", "/small")) for gate in gates]
    await asyncio.gather(*(seen(reader, EVENTS[1]) for reader in readers))
    await until(lambda: all(gate.metric("followers") == 2 for gate in gates))
    tap.end(chunk(b"data: " + b"x" * 500 + b"\n\n"), LAST_CHUNK)
    await seen(first, LAST_CHUNK)
    for reader in readers:
        assert LAST_CHUNK not in await reader.reader.read()
    told = [await answered(one) for one in waiting]
    assert [(one.status, one.slug) for one in told] == [(409, "response-not-kept")] * 2
    assert (await ask(gates[1].port, behind("00", "/small"))).slug == "response-not-kept"


async def test_looking_is_no_claim(replicas, upstream, stored):
    """A key that is free stays free, also for its very bytes that came before, on one connection."""
    (gate,) = replicas(stored.url, 1)
    upstream.script = answering(SSE + chunk(BODY) + LAST_CHUNK)
    client = await RawClient.open(gate.port)
    for number in range(3):
        assert (await client.ask(behind(None, key=f"plain-{number}"))).header("oncegate-status") == b"executed"
    for _ in range(4):
        refused = await client.ask(behind("03"))
        assert (refused.status, refused.slug) == (410, "stream-gone")
        assert refused.problem["reason"] == "gone"
        assert refused.header("x-should-retry") == b"false"
    assert len(upstream.received) == 3
    # An empty id is that of no event.
    assert (await client.ask(behind(""))).header("oncegate-status") == b"executed"
    assert (await client.ask(behind("03"))).body == b"".join(EVENTS[4:])
    assert (await client.ask(behind("03", body=b"{ }"))).slug == "key-reused"
    client.close()
    assert len(upstream.received) == 4


REPEATED = b"id: 1\ndata: a\n\nid: 2\ndata: b\n\nid: 1\ndata: c\n\n"
NO_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
CODED = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + chunk(gzip.compress(BODY)) + LAST_CHUNK


@pytest.mark.parametrize(
    ("response", "event_id", "reason"),
    [
        (SSE + chunk(BODY) + LAST_CHUNK, "12", "unknown-id"),
        (SSE + chunk(BODY[:-1]) + LAST_CHUNK, "11", "unknown-id"),
        (SSE + chunk(REPEATED) + LAST_CHUNK, "1", "repeated-id"),
        (NO_STREAM, "1", "no-events"),
        (CODED, "03", "coded"),
        (SSE + chunk(BODY) + LAST_CHUNK, "og-0123456789ab-3", "replaced"),
    ],
    ids=["no such id", "event without end", "twice", "no stream", "coded", "another execution's"],
)
async def test_what_cannot_be_continued(replicas, upstream, valkey, response, event_id, reason):
    """It is said with its reason, and never begun anew."""
    upstream.script = answering(response)
    (gate,) = replicas(valkey.url, 1)
    await ask(gate.port, behind(None))
    answer = await ask(gate.port, behind(event_id))
    assert (answer.status, answer.slug, answer.problem["reason"]) == (410, "stream-gone", reason)
    assert len(upstream.received) == 1


@pytest.mark.parametrize("path", ["/derived", "/bypassed"])
async def test_only_numbers_tell_equal_requests_apart(replicas, upstream, valkey, path):
    """Where a client may have read a response that no record has, an id of the API's own names no event for certain."""
    upstream.script = answering(SSE + chunk(BODY) + LAST_CHUNK)
    (gate,) = replicas(valkey.url, 1)
    first = await ask(gate.port, behind(None, path))
    assert first.header("oncegate-status") == b"executed"
    assert (await ask(gate.port, behind("03", path))).problem["reason"] == "replaced"
    assert len(upstream.received) == 1


STREAMS = {
    "CR": b"id: 1\rdata: a\r\rid: 2\rdata: b\r\rdata: c\r\rid: 3\rdata: d\r\r",
    "CRLF": b": hi\r\n\r\nid: 1\r\ndata: a\r\n\r\nid: 2\r\ndata: b\r\n\r\nid: 3\r\ndata\r\n\r\n",
    "all of them": b"id: 1\r\ndata: a\n\rid: 2\rdata: b\r\r\n\n\nid: 3\n\ndata: c\n\r\n: bye\n\n",
    "a mark": b"\xef\xbb\xbfid: 1\ndata: a\n\nid: 2\ndata: \xef\xbb\xbf\n\n",
    "odd ids": 'id:a b\ndata:x\n\nid:  \u00e9\u2603 \ndata:y\n\nid: ;,:"=\ndata:z\n\nid:\ndata\n\nid: id\n\n'.encode(),
    "no UTF-8": b"id: \xff\xfe1\ndata: \xe2\x98\n\nid: 2\ndata: \x83\n\n",
    "a megabyte": b"".join(b"id: %d\ndata: %s\n\n" % (number, b"x" * 1_000_000) for number in (1, 2, 3)),
}


def boundaries(stream: bytes) -> dict[bytes, int]:
    """Return for each id how much an EventSource has read when it first has it, line by line."""
    ends: dict[bytes, int] = {}
    last = ""
    read = len(b"\xef\xbb\xbf") if stream.startswith(b"\xef\xbb\xbf") else 0
    lines = re.split(rb"(\r\n|\r|\n)", stream[read:])
    for line, end in zip(lines[::2], lines[1::2], strict=False):
        read += len(line) + len(end)
        if line.startswith(b"id"):
            last = line[3:].decode("utf-8", "replace").strip(" ")
        elif not line and last and last.encode() not in ends:
            ends[last.encode()] = read
    return ends


@pytest.mark.parametrize("kind", STREAMS)
async def test_streams_of_every_kind(replicas, upstream, valkey, kind):
    """Whatever ends the lines, and however the bytes came: behind each id is the very rest of the stream."""
    stream = STREAMS[kind]

    async def script(_, __, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(SSE)
        step = 1 if len(stream) < 200 else 70_001
        for at in range(0, len(stream), step):
            writer.write(chunk(stream[at : at + step]))
            await asyncio.sleep(0)
        writer.write(LAST_CHUNK)

    upstream.script = script
    (gate,) = replicas(valkey.url, 1)
    assert (await ask(gate.port, behind(None))).body == stream
    found = boundaries(stream)
    assert len(found) > 1
    for event_id, end in found.items():
        rest = await ask(gate.port, behind(event_id.decode("latin-1")))
        assert (rest.status, rest.complete, rest.body == stream[end:]) == (200, True, True), event_id
    assert len(upstream.received) == 1


async def test_no_splice_of_two_executions(replicas, begun, upstream, stored):
    """After a takeover, no id of the API's own names an event for certain; numbers of the first execution are known."""
    broken_off = asyncio.Event()
    plain = b"data: a\n\ndata: b\n\n"

    async def breaking(_, __, writer: asyncio.StreamWriter, received: Received) -> None:
        data = plain if b"/numbered" in received.line else b"".join(EVENTS[:2])
        writer.write(SSE + chunk(data))
        await writer.drain()
        await broken_off.wait()
        writer.close()

    upstream.script = breaking
    (gate,) = replicas(stored.url, 1)
    firsts = [await begun(gate.port, behind(None, path, key=path)) for path in ("/streams", "/numbered")]
    await until(lambda: len(upstream.received) == 2)
    await seen(firsts[0], EVENTS[1])
    await seen(firsts[1], b"id: og-")
    old = (await firsts[1].reader.readuntil(b"\n"))[:-1].decode()
    broken_off.set()
    await asyncio.gather(*(first.reader.read() for first in firsts))
    upstream.script = answering(SSE + chunk(BODY) + LAST_CHUNK)
    assert (await ask(gate.port, behind(None, key="/streams"))).header("oncegate-status") == b"executed"
    upstream.script = answering(SSE + chunk(plain) + LAST_CHUNK)
    second = await ask(gate.port, behind(None, "/numbered", key="/numbered"))
    refused = [
        await ask(gate.port, behind("01", key="/streams")),
        await ask(gate.port, behind(f"og-{old}", "/numbered", key="/numbered")),
    ]
    assert [(one.status, one.problem["reason"]) for one in refused] == [(410, "replaced")] * 2
    new = second.body.partition(b"id: ")[2].partition(b"\n")[0].decode()
    assert new != f"og-{old}"
    rest = await ask(gate.port, behind(new, "/numbered", key="/numbered"))
    assert (rest.status, second.body.endswith(rest.body), b"data: b" in rest.body) == (200, True, True)
    assert len(upstream.received) == 4


async def test_events_without_ids_get_some(replicas, upstream, store):
    """Each event is sent, stored and found under its number; the API is asked for bytes without a coding."""
    end = b"\r\n"
    events = [b"\xef\xbb\xbfdata: 0" + end * 2, *[b"data: %d%b: c%b%b" % (n, end, end, end) for n in range(1, 5)]]
    data = b"".join(events)
    head = b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nETag: "x"\r\nContent-Length: %d\r\n\r\n' % len(data)

    async def script(_, __, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(head)
        for at in range(0, len(data), 3):
            writer.write(data[at : at + 3])
            await asyncio.sleep(0)

    upstream.script = script
    owner, other = replicas(store.url)
    first = await ask(owner.port, behind(None, "/numbered"))
    assert (first.status, first.complete, first.header("content-length"), first.header("etag")) == (
        200,
        True,
        None,
        None,
    )
    assert upstream.received[0].header("accept-encoding") == [b"identity"]
    ids = [
        line[4:]
        for line in first.body.replace(b"\xef\xbb\xbf", b"").replace(b"\r", b"\n").split(b"\n")
        if line[:4] == b"id: "
    ]
    assert [one.rpartition(b"-")[2] for one in ids] == [b"1", b"2", b"3", b"4", b"5"]
    assert b"".join(first.body.partition(b"id: %b%b" % (ids[0], end))[::2]).startswith(events[0])
    replayed = await ask(other.port, behind(None, "/numbered"))
    assert (replayed.body, replayed.header("oncegate-status")) == (first.body, b"replayed")
    for one in ids:
        rest = await ask(other.port, behind(one.decode(), "/numbered"))
        search = EventSearch(one)
        search.feed(first.body)
        search.end()
        assert (rest.status, rest.complete, rest.body) == (200, True, first.body[search.offset :])
    assert len(upstream.received) == 1


async def test_coded_events_pass_unnumbered(replicas, upstream, valkey):
    """An API that codes its answer though it was asked not to: its bytes stay, and the head says so."""
    upstream.script = answering(CODED)
    (gate,) = replicas(valkey.url, 1)
    for _ in range(2):
        answer = await ask(gate.port, behind(None, "/numbered"))
        assert gzip.decompress(answer.body) == BODY
        assert answer.header("oncegate-event-ids") == b"none; reason=coded"
    assert len(upstream.received) == 1


async def test_elsewhere_the_field_is_the_apis(replicas, upstream, valkey):
    """Under any other rule, and without a key, such a request is as it always was."""
    (gate,) = replicas(valkey.url, 1)
    upstream.script = answering(OK)
    answer = await ask(gate.port, behind("03", "/other"))
    unkeyed = await ask(gate.port, request("POST", "/streams", None, b"{}", "Last-Event-ID: 03"))
    assert [one.status for one in (answer, unkeyed)] == [200, 200]
    assert answer.header("oncegate-status") == b"executed"
    assert [one.header("last-event-id") for one in upstream.received] == [[b"03"], [b"03"]]


async def test_heartbeats_stand_between_events(replicas, begun, upstream, valkey):
    """A silent stream that was continued has comments between its events; none is stored, and no id counts them."""
    tap = Tap()
    upstream.script = tap.script
    owner, other = replicas(valkey.url)
    first = await begun(owner.port, behind(None))
    tap.send(SSE, chunk(EVENTS[0] + EVENTS[1] + EVENTS[2][:9]))
    await seen(first, EVENTS[2][:9])
    reader = await begun(other.port, behind("00"))
    await seen(reader, EVENTS[2][:9])
    tap.send(chunk(EVENTS[2][9:]))
    await seen(reader, EVENTS[2][9:])
    async with asyncio.timeout(20):
        assert (await reader.reader.readuntil(b":\n\n\r\n"))[:3] == b"\r\n3"
    tap.end(LAST_CHUNK)
    await seen(reader, LAST_CHUNK)
    await seen(first, LAST_CHUNK)
    assert (await ask(other.port, behind("01"))).body == EVENTS[2]


@pytest.mark.parametrize("owner_is", ["alive", "killed"])
async def test_another_replica_goes_on_at_once(replicas, begun, upstream, valkey, owner_is):
    """A reader that is cut off, in the first moment of its stream, and comes back in the same moment: it has its next
    byte after a few calls to the store. It waits for no batch of the owner, which would come after a second."""
    owner, other = replicas(valkey.url, LEASE_MS=1000)
    for turn in range(3 if owner_is == "alive" else 1):
        tap, key = Tap(), f"turn-{turn}"
        upstream.script = tap.script
        first = await begun(owner.port, behind(None, key=key))
        tap.send(SSE, *map(chunk, EVENTS[:3]))
        await seen(first, EVENTS[2])
        if owner_is == "killed":
            # What only a process had that is killed, nobody can have.
            await until(valkey.has_body)
            owner.kill()
        before = _calls(valkey)
        first.reset()
        reader = await begun(other.port, behind("01", key=key))
        await seen(reader, EVENTS[2])
        # Looks at the key and at the response, the note to the owner, its append, and another look at the response.
        assert _calls(valkey) - before <= (8 if owner_is == "alive" else 5)
        if owner_is == "alive":
            tap.end(*map(chunk, EVENTS[3:]), LAST_CHUNK)
            await seen(reader, EVENTS[11])
            await seen(reader, LAST_CHUNK)
        else:
            assert LAST_CHUNK not in await reader.reader.read()


def _calls(valkey: Valkey) -> int:
    """Return how many scripts of requests a store has run."""
    with valkey.client() as client:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


async def test_a_silent_store(replicas, begun, upstream, own_valkey):
    """After a lease and a second without it, who waits for an event is told so, and who has one is broken off."""
    tap = Tap()
    upstream.script = tap.script
    owner, other = replicas(own_valkey.url, LEASE_MS=500)
    first = await begun(owner.port, behind(None))
    tap.send(SSE, chunk(EVENTS[0] + EVENTS[1]))
    await seen(first, EVENTS[1])
    reader, waiting = await begun(other.port, behind("00")), await begun(other.port, behind("05"))
    await seen(reader, EVENTS[1])
    await until(lambda: other.metric("followers") == 2)
    own_valkey.pause()
    told = await answered(waiting)
    assert (told.status, told.slug) == (503, "store-unavailable")
    assert LAST_CHUNK not in await reader.reader.read()
    assert (await ask(other.port, behind("00"))).slug == "store-unavailable"
    own_valkey.resume()
    assert len(upstream.received) == 1


async def test_a_drain_breaks_readers_off(replicas, begun, upstream, valkey):
    """One that has got something is broken off, one that waits is told to come again; no clean end."""
    tap = Tap()
    upstream.script = tap.script
    owner, other = replicas(valkey.url, DRAIN_S=5)
    first = await begun(owner.port, behind(None))
    tap.send(SSE, chunk(EVENTS[0] + EVENTS[1]))
    await seen(first, EVENTS[1])
    reader, waiting = await begun(other.port, behind("00")), await begun(other.port, behind("05"))
    await seen(reader, EVENTS[1])
    await until(lambda: other.metric("followers") == 2)
    stopping = asyncio.get_running_loop().run_in_executor(None, other.stop)
    told = await answered(waiting)
    assert (told.status, told.header("retry-after")) == (503, b"1")
    assert LAST_CHUNK not in await reader.reader.read()
    tap.end(LAST_CHUNK)
    await seen(first, LAST_CHUNK)
    assert await stopping == 0


async def test_the_client_of_the_page(replicas, upstream, valkey):
    """The code in docs/how-to/streams.md gets each event once through connections that break in any place."""
    upstream.script = answering(SSE + b"".join(chunk(b"data: %d\n\n" % number) for number in range(40)) + LAST_CHUNK)
    gates = replicas(valkey.url)

    async def cut(between: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"{}")
        whole = await RawClient.open(gates[between.accepted % 2].port)
        whole.writer.write(asked.replace(b"keep-alive", b"close"))
        head = await whole.reader.readuntil(b"\r\n\r\n")
        try:
            passed = await whole.reader.readexactly(300 + 7 * between.accepted)
        except asyncio.IncompleteReadError as end:
            passed = end.partial
        writer.write(head + passed)
        whole.close()

    text = (ROOT / "docs/how-to/streams.md").read_text()
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)

    def read(url: str) -> list[list[str]]:
        with httpx.Client() as client:
            return list(names["events"](client, url, "key-1", {}))

    async with serving(cut) as between:
        url = f"http://127.0.0.1:{between.port}/numbered"
        events = await asyncio.get_running_loop().run_in_executor(None, read, url)
    assert [event[1] for event in events] == [f"data: {number}" for number in range(40)]
    assert len(upstream.received) == 1
    assert between.accepted > 2
