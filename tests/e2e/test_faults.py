"""Fault points that belong to no other file: what the proxy does when it breaks exactly there."""

import asyncio
import signal

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    answering,
    ask,
    chunk,
    holding,
    request,
    serving,
    until,
)
from tests.probes import RedisProbe

BIG = b"b" * (12 << 20)


# While the request is being sent ...


@pytest.mark.fault(22, 29)
@pytest.mark.parametrize("taken", [True, False], ids=["taken meanwhile", "still free"])
async def test_an_upload_that_was_suspended_beyond_the_retention(fork, upstream, valkey, taken):
    """SIGSTOP in mid-upload until the record is gone: the rest is sent only if the key is still nobody else's."""
    arrived = bytearray()
    reading = asyncio.Event()

    async def slow(_, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.extend(await reader.readexactly(1000))
        writer.transport.pause_reading()
        await reading.wait()
        writer.transport.resume_reading()
        while data := await reader.read(1 << 16):
            arrived.extend(data)
            if arrived.endswith(b"bend"):
                writer.write(OK)

    async with serving(slow) as beyond:
        still = await fork(beyond.url, valkey.url, LEASE_MS=300, RETENTION_S=1.5, UNKNOWN_RETENTION_S=1.5, WAIT_MAX_S=1)
        other = await fork(upstream, valkey.url, LEASE_MS=300)
        raw = request(body=BIG + b"end")
        original = asyncio.ensure_future(ask(still.port, raw))
        await until(lambda: arrived)
        still.signal(signal.SIGSTOP)
        await until(lambda: not valkey.states())
        if taken:
            upstream.script = answering(b"HTTP/1.1 201 Made\r\nContent-Length: 5\r\n\r\ntheir")
            assert (await ask(other.port, raw)).header("oncegate-status") == b"executed"
        reading.set()
        still.signal(signal.SIGCONT)
        answer = await original
        await asyncio.sleep(0.1)
        if taken:
            assert (answer.status, answer.body, answer.header("oncegate-status")) == (201, b"their", b"replayed")
            assert len(arrived) < len(raw)
        else:
            assert (answer.status, answer.body, answer.header("oncegate-status")) == (200, b"ok", b"executed")
            assert arrived.endswith(BIG + b"end")
        assert still.metric("claims_lost_total") == 1
        assert (await ask(other.port, raw)).body == answer.body


# While it is replayed ...


@pytest.mark.fault(54, 55)
@pytest.mark.parametrize("size", [5, 200_000, 600_000], ids=["small", "one chunk", "several"])
async def test_a_complete_record_that_lacks_its_body(fork, upstream, valkey, size):
    """Its first chunk is gone: 500 record-corrupt, not executed, not replayed, and nothing is changed."""
    upstream.script = answering(CHUNKED + chunk(b"a" * size) + LAST_CHUNK)
    gate = await fork(upstream, valkey.url)
    assert (await ask(gate.port, request())).complete
    with valkey.client() as client:
        probe = RedisProbe(client, valkey.url)
        (key,) = probe.keys()
        probe.change(key, b0=None)
        before = probe.fields(key)
        assert "b0" not in before
        answer = await ask(gate.port, request())
        assert (answer.status, answer.slug) == (500, "record-corrupt")
        assert probe.fields(key) == before
    assert gate.metric('requests_total{outcome="record_corrupt"}') == 1
    assert len(upstream.received) == 1


# What keeps the rest alive ...


@pytest.mark.fault(62)
async def test_a_failed_renewal_is_not_the_last(fork, upstream, valkey):
    """An exception in a renewal is logged, and the leases are renewed on: the key stays in flight."""
    done = asyncio.Event()
    upstream.script = holding(done)
    proxy = await fork(upstream, valkey.url, LEASE_MS=900, FAULT="raise@renew:1", TESTING=1)
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: proxy.events("background task failed, restarting it"))
    await asyncio.sleep(1.8)  # two leases
    assert (await ask(proxy.port, request())).slug == "in-flight"
    done.set()
    assert (await original).header("oncegate-status") == b"executed"
