"""Clients that leave, half-close, stall or vanish: the exchange runs to its end, and the retry gets everything."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    RawClient,
    Received,
    Tap,
    ask,
    chunk,
    holding,
    lazy,
    open_files,
    read_answer,
    request,
    until,
)

LEAVING = {"FIN": RawClient.close, "RST": RawClient.reset}
MIB = bytes(range(256)) * 4096
SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
EVENTS = [b"id: %d\ndata: {}\n\n" % n for n in range(20)]


async def patient(port: int, key: str):
    """Return the retry's answer, which is waited for while the original still runs."""
    return await ask(port, request("POST", "/v1/charges", key, b'{"amount": 1}', "Prefer: wait=20"))


@pytest.mark.fault(23, 34, 45)
async def test_nobody_stays_for_the_answer(proxies, upstream, valkey):
    """A client leaves (FIN, RST) before the head, after it, mid-body, mid-SSE: one execution, the retry gets all."""
    proxy = proxies(upstream, valkey.url, WAIT_MAX_S=20)
    table = {
        "before the head": ([], [b"HTTP/1.1 201 Made\r\nContent-Length: 5\r\n\r\nwhole"], b"whole"),
        "after the head": ([CHUNKED], [chunk(b"wh"), chunk(b"ole"), LAST_CHUNK], b"whole"),
        "mid-body": ([CHUNKED, *[chunk(MIB)] * 2], [chunk(MIB), chunk(MIB), LAST_CHUNK], MIB * 4),
        "mid-body, sized": (
            [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (4 * len(MIB)), MIB, MIB],
            [MIB, MIB],
            MIB * 4,
        ),
        "mid-SSE": ([SSE, *map(chunk, EVENTS[:3])], [*map(chunk, EVENTS[3:]), LAST_CHUNK], b"".join(EVENTS)),
    }
    for moment, (before, after, whole) in table.items():
        for how, leave in LEAVING.items():
            tap, name, executions = Tap(), f"{moment}, {how}", len(upstream.received)
            upstream.script = tap.script
            client = await RawClient.open(proxy.port)
            client.writer.write(request(key=name.replace(" ", "-").replace(",", "")))
            await until(lambda seen=executions: len(upstream.received) > seen)
            tap.send(*before)
            if before:
                await client.reader.readuntil(b"\r\n\r\n")
            if len(before) > 1:
                await client.reader.readexactly(len(before[1]) // 2)
            leave(client)
            retry = asyncio.ensure_future(patient(proxy.port, name.replace(" ", "-").replace(",", "")))
            await until(lambda: proxy.metric("waiting") == 1)
            tap.end(*after)
            answer = await retry
            assert answer.header("oncegate-status") == b"replayed", name
            assert answer.complete, name
            assert answer.body == whole, name
            assert len(upstream.received) == executions + 1, name


@pytest.mark.fault(23, 34, 45)
async def test_clients_leave_at_any_moment(proxies, upstream, valkey):
    """100 clients leave at random moments and offsets: as many executions, and each retry gets the whole answer."""

    async def script(_, __, writer: asyncio.StreamWriter, received: Received) -> None:
        writer.write(CHUNKED)
        for _ in range(10):
            writer.write(chunk(received.header("idempotency-key")[0] * 2000))
            await asyncio.sleep(random.uniform(0, 0.03))
        writer.write(LAST_CHUNK)

    async def leave_somewhere(key: str) -> None:
        client = await RawClient.open(proxy.port)
        client.writer.write(request(key=key))
        await until(lambda: any(one.header("idempotency-key") == [key.encode()] for one in upstream.received))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0, 0.3)):
                await client.reader.readexactly(random.randrange(1, 60_000))
        random.choice(list(LEAVING.values()))(client)

    upstream.script = script
    proxy = proxies(upstream, valkey.url, WAIT_MAX_S=20)
    keys = [f"k{n:03}" for n in range(100)]
    await asyncio.gather(*map(leave_somewhere, keys))
    for key, answer in zip(keys, await asyncio.gather(*[patient(proxy.port, key) for key in keys]), strict=True):
        assert (answer.header("oncegate-status"), answer.complete) == (b"replayed", True)
        assert answer.body == key.encode() * 20_000
    assert len(upstream.received) == 100


@pytest.mark.fault(34)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_a_client_that_half_closes_gets_its_answer(gate, upstream, streamed):
    """A client that closes only its sending side said all it had to say: it is answered, then closed."""
    tap = Tap()
    upstream.script = tap.script
    client = await RawClient.open(gate.port)
    client.writer.write(request())
    client.writer.write_eof()
    await until(lambda: upstream.received)
    if streamed:
        tap.send(CHUNKED, chunk(b"first"))
        assert (await client.reader.readuntil(b"first")).startswith(b"HTTP/1.1 200 OK\r\n")
        tap.end(chunk(b"second"), LAST_CHUNK)
        assert (await client.reader.read()).endswith(b"6\r\nsecond\r\n0\r\n\r\n")
    else:
        tap.end(OK)
        answer = await read_answer(client.reader)
        assert answer is not None
        assert (answer.status, answer.body, answer.header("connection")) == (200, b"ok", b"close")
        assert await client.reader.read() == b""
    client.close()
    assert (await ask(gate.port, request())).header("oncegate-status") == b"replayed"


async def test_a_duplicate_that_half_closes_gets_its_answer(gate, upstream):
    """A duplicate that waits, and one that is replayed, may half-close too."""
    done = asyncio.Event()
    upstream.script = holding(done)
    original = asyncio.ensure_future(ask(gate.port, request()))
    await until(lambda: upstream.received)
    raw = request("POST", "/v1/charges", "key-1", b'{"amount": 1}', "Prefer: wait=20")
    for finish in (done.set, lambda: None):
        client = await RawClient.open(gate.port)
        client.writer.write(raw)
        client.writer.write_eof()
        if not done.is_set():
            await until(lambda: gate.metric("waiting") == 1)
        finish()
        answer = await read_answer(client.reader)
        client.close()
        assert answer is not None
        assert (answer.body, answer.header("oncegate-status")) == (b"ok", b"replayed")
    assert (await original).body == b"ok"


@pytest.mark.fault(1)
async def test_a_request_that_does_not_arrive_whole_leaves_nothing(gate, upstream, valkey):
    """A client vanishes at any offset of a 2 KiB request: nothing is claimed, executed or kept waiting."""
    raw = request(body=b"x" * 1900)
    raw = raw.replace(b"Host:", b"X-Pad: %s\r\nHost:" % (b"y" * (2048 - len(raw) - 9)))
    assert len(raw) == 2048
    for offset in range(0, 2048, 7):
        client = await RawClient.open(gate.port)
        client.writer.write(raw[:offset])
        LEAVING["RST" if offset % 2 else "FIN"](client)
    await until(lambda: gate.metric("in_flight") == gate.metric("reading_bodies") == 0)
    assert (await ask(gate.port, raw)).header("oncegate-status") == b"executed"
    assert len(upstream.received) == upstream.connections == 1
    assert valkey.states() == [b"complete"]


@pytest.mark.fault(1)
async def test_a_request_broken_off_after_a_pause_leaves_nothing(gate, upstream, valkey):
    """The same where the first part was read before the client vanished, and on a connection used before."""
    raw = request(body=b"x" * 1000)
    for leave in LEAVING.values():
        for offset in (20, len(raw) - 1000, len(raw) - 1):
            client = await RawClient.open(gate.port)
            answer = await client.ask(request(key=None, body=b""))
            assert answer is not None
            assert answer.body == b"ok"
            client.writer.write(raw[:offset])
            if offset > 20:
                await until(lambda: gate.metric("reading_bodies") == 1)
            leave(client)
            await until(lambda: gate.metric("in_flight") == gate.metric("reading_bodies") == 0)
    assert valkey.states() == []
    assert all(not received.header("idempotency-key") for received in upstream.received)


def spooled(pid: int, folder: Path) -> list[str]:
    """Return the open files of a process in a folder, deleted ones too."""
    return [name for name in open_files(pid) if name.startswith(str(folder))]


@pytest.mark.fault(1)
async def test_a_spooled_request_that_breaks_off_leaves_no_file(proxies, upstream, valkey, tmp_path):
    """A body that was spooled and broke off leaves no file and no room taken; one that is whole neither."""
    spool = tmp_path / "spool"
    spool.mkdir()
    proxy = proxies(upstream, valkey.url, SPOOL_DIR=spool, MAX_REQUEST_BYTES=4 << 20, MAX_SPOOL_BYTES=4 << 20)
    raw = request(body=MIB * 3)
    for leave in (*LEAVING.values(), *LEAVING.values()):
        client = await RawClient.open(proxy.port)
        client.writer.write(raw[: 5 << 19])
        await until(lambda: spooled(proxy.process.pid, spool))
        leave(client)
        await until(lambda: not spooled(proxy.process.pid, spool))
        await until(lambda: proxy.metric("in_flight") == proxy.metric("reading_bodies") == 0)
    assert valkey.states() == []
    assert upstream.connections == 0
    assert (await ask(proxy.port, raw)).status == 200
    assert upstream.received[0].body == MIB * 3
    await until(lambda: not spooled(proxy.process.pid, spool))
    assert list(spool.iterdir()) == []
    assert proxy.metric("buffered_bytes") == 0


@pytest.mark.fault(44)
async def test_a_client_that_takes_nothing_is_cut_off(proxies, upstream, valkey):
    """After CLIENT_STALL_S the client is cut off; the recording goes on, and the retry gets the whole answer."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url, CLIENT_STALL_S=1, LEASE_MS=300)
    client = await lazy(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    tap.end(CHUNKED, *[chunk(MIB)] * 12, LAST_CHUNK)
    await until(lambda: valkey.states() == [b"complete"], 30)
    client.writer.transport.resume_reading()
    answer = await read_answer(client.reader)
    client.close()
    assert answer is None or not answer.complete
    retry = await ask(proxy.port, request())
    assert (retry.header("oncegate-status"), retry.complete) == (b"replayed", True)
    assert retry.body == MIB * 12
    assert len(upstream.received) == 1
    assert proxy.events("request")[0]["client_gone"]


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024


@pytest.mark.fault(44)
async def test_a_slow_client_slows_its_exchange(proxies, upstream, valkey):
    """While a client takes nothing the upstream is not drained: buffers stay bounded; then it gets everything."""
    sent = 0

    async def script(_, __, writer, ___):
        nonlocal sent
        writer.write(CHUNKED)
        for _ in range(64):
            writer.write(chunk(MIB))
            await writer.drain()
            sent += len(MIB)
        writer.write(LAST_CHUNK)

    upstream.script = script
    proxy = proxies(upstream, valkey.url)
    before = resident_bytes(proxy.process.pid)
    client = await lazy(proxy.port)
    client.writer.write(request())
    await until(lambda: sent)
    steady, last = 0, 0
    while steady < 10:  # nothing moved for a second
        await asyncio.sleep(0.1)
        steady, last = (steady + 1 if sent == last else 0), sent
        assert sent < 48 << 20
    assert resident_bytes(proxy.process.pid) - before < 32 << 20
    assert proxy.metric("buffered_bytes") < 2 << 20
    client.writer.transport.resume_reading()
    answer = await read_answer(client.reader)
    client.close()
    assert answer is not None
    assert (answer.complete, len(answer.body)) == (True, 64 << 20)
    assert resident_bytes(proxy.process.pid) - before < 32 << 20
    late = await ask(proxy.port, request())
    assert (late.status, late.slug, late.problem["original_status"]) == (409, "response-not-kept", 200)


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING)
async def test_the_rest_of_a_refused_body_is_not_waited_for(gate, leave):
    """A client whose body is refused leaves before it has sent that: its connection is over at once."""
    client = await RawClient.open(gate.port)
    answer = await client.ask(request("POST", "/v1/charges", "x" * 300, b"", "Content-Length: 5"))
    assert (answer.status, answer.header("connection")) == (400, None)
    leave(client)
    # Its rest is read for 10 s otherwise.
    await until(lambda: gate.metric("client_open_connections") == 0, 6)
