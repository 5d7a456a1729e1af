"""The end of a process: what is in flight is finished or said to be unknown, and the exit code tells which."""

import asyncio
import signal
import socket

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Blackhole,
    Proxy,
    RawClient,
    Tap,
    ask,
    chunk,
    lazy,
    read_answer,
    request,
    until,
)


async def exit_code(proxy: Proxy, seconds: float = 30) -> int:
    await until(lambda: proxy.process.poll() is not None, seconds)
    return proxy.process.returncode


def refuses(port: int) -> bool:
    with socket.socket() as newcomer:
        return newcomer.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_is_in_flight_is_finished(proxies, upstream, valkey, number):
    """After SIGTERM or SIGINT newcomers are refused, what is in flight is answered and stored: exit 0."""
    small, large, plain = Tap(), Tap(), Tap()
    proxy = proxies(upstream, valkey.url, ON_DUPLICATE="wait")
    running = {}
    for key, tap in (("small", small), ("large", large), (None, plain)):
        upstream.script = tap.script
        running[key] = asyncio.ensure_future(ask(proxy.port, request(key=key)))
        await until(lambda: len(upstream.received) == len(running))
    large.send(CHUNKED, chunk(b"a" * 100_000))
    uploading = await RawClient.open(proxy.port)
    whole = request(key="uploading", body=b"x" * 100_000)
    uploading.writer.write(whole[:50_000])
    waiting = asyncio.ensure_future(ask(proxy.port, request(key="small")))
    await until(lambda: proxy.metric("waiting") == 1)
    await until(lambda: proxy.metric("in_flight") == 3)

    proxy.signal(number)
    await until(lambda: refuses(proxy.port))
    assert proxy.admin("/readyz")[0] == 503
    told = await waiting
    assert (told.status, told.slug) == (409, "in-flight")
    fourth = Tap()
    upstream.script = fourth.script
    uploading.writer.write(whole[50_000:])
    for tap in (small, plain, fourth):
        tap.end(OK)
    large.end(chunk(b"b" * 100_000), LAST_CHUNK)
    uploaded = await asyncio.wait_for(read_answer(uploading.reader), 20)
    uploading.close()
    assert uploaded is not None
    assert (uploaded.status, uploaded.body) == (200, b"ok")
    assert (await running["small"]).body == b"ok"
    assert (await running[None]).body == b"ok"
    answer = await running["large"]
    assert (answer.complete, answer.body) == (True, b"a" * 100_000 + b"b" * 100_000)
    assert await exit_code(proxy) == 0
    assert valkey.states() == [b"complete"] * 3
    assert proxy.events("stopped")[0]["cut_off"] == 0


async def test_a_request_without_a_key_is_finished_too(proxies, upstream, valkey):
    """A pass-through request alone holds the end up as well, until it is answered."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url)
    running = asyncio.ensure_future(ask(proxy.port, request("GET", key=None, body=b"")))
    await until(lambda: upstream.received)
    proxy.signal(signal.SIGTERM)
    await until(lambda: refuses(proxy.port))
    await asyncio.wait([running], timeout=0.7)
    assert not running.done()
    tap.end(OK)
    assert (await running).body == b"ok"
    assert await exit_code(proxy) == 0


async def test_what_does_not_finish_becomes_unknown(proxies, upstream, valkey):
    """When DRAIN_S is over, each request is cut off and its key unknown or free, none in flight: exit 1."""
    proxy = proxies(upstream, valkey.url, DRAIN_S=1)
    other = proxies(upstream, valkey.url)
    hanging, streaming = Tap(), Tap()
    clients = {}
    for key, tap in (("hanging", hanging), ("streaming", streaming)):
        upstream.script = tap.script
        clients[key] = await RawClient.open(proxy.port)
        clients[key].writer.write(request(key=key))
        await until(lambda: len(upstream.received) == len(clients))
    streaming.send(CHUNKED, chunk(b"a" * 100_000))
    answers = {key: asyncio.ensure_future(read_answer(client.reader)) for key, client in clients.items()}
    await until(lambda: valkey.states() == [b"in_flight"] * 2)
    proxy.signal(signal.SIGTERM)
    assert await exit_code(proxy) == 1
    hung, broken = await answers["hanging"], await answers["streaming"]
    for client in clients.values():
        client.close()
    assert hung is not None
    assert (hung.status, hung.slug) == (502, "upstream-lost")
    assert hung.header("oncegate-status") == b"unknown"
    assert hung.header("x-should-retry") == b"false"
    assert broken is not None
    assert (broken.status, broken.complete) == (200, False)
    assert valkey.states() == [b"unknown"] * 2
    assert proxy.events("stopped")[0]["cut_off"] == 2
    for key in clients:
        assert (await ask(other.port, request(key=key))).slug == "outcome-unknown"
    assert len(upstream.received) == 2


async def test_what_was_not_sent_is_free(proxies, valkey):
    """A request that still waits for its connection when the grace is over: not sent, so its key is free."""
    hole = Blackhole()
    try:
        proxy = proxies(hole.url, valkey.url, DRAIN_S=0.5, CONNECT_TIMEOUT_S=60)
        client = await RawClient.open(proxy.port)
        client.writer.write(request())
        await until(lambda: valkey.states() == [b"in_flight"])
        proxy.signal(signal.SIGTERM)
        assert await exit_code(proxy) == 1
    finally:
        hole.close()
    answer = await read_answer(client.reader)
    client.close()
    assert answer is not None
    assert (answer.status, answer.slug) == (502, "upstream-unreachable")
    assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (True, True)
    assert valkey.states() == []


async def test_a_client_that_stalls_does_not_hold_the_end_up(proxies, upstream, valkey):
    """A client that takes nothing when the grace is over is cut off, and its key is unknown, not in flight."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url, DRAIN_S=0.5, CLIENT_STALL_S=60)
    client = await lazy(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    tap.send(CHUNKED, *[chunk(bytes(1 << 20))] * 64)
    await until(lambda: valkey.states() == [b"in_flight"])
    proxy.signal(signal.SIGTERM)
    assert await exit_code(proxy) == 1
    assert valkey.states() == [b"unknown"]
    client.writer.transport.resume_reading()
    answer = await read_answer(client.reader)
    client.close()
    assert answer is None or not answer.complete


async def test_a_store_that_stands_still_does_not_hold_the_end_up(proxies, upstream, own_valkey):
    """An answer that the store does not take before the grace is over is not delivered as stored: exit 1."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_valkey.url, DRAIN_S=0.5, LEASE_MS=300)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    own_valkey.pause()
    tap.end(OK)
    proxy.signal(signal.SIGTERM)
    assert await exit_code(proxy) == 1
    answer = await read_answer(client.reader)
    client.close()
    assert answer is None or answer.slug == "answer-not-stored"
    own_valkey.resume()
    other = proxies(upstream, own_valkey.url, LEASE_MS=300)
    tries = 0
    while (again := await ask(other.port, request())).header("oncegate-status") == b"refused":
        assert again.slug == "in-flight"
        tries += 1
        assert tries < 60
        await asyncio.sleep(0.05)
    assert again.header("oncegate-status") in (b"replayed", b"unknown")
    assert len(upstream.received) == 1


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
async def test_told_twice_it_ends_at_once(proxies, upstream, valkey, first, second):
    """A second signal ends the grace: what is in flight becomes unknown, exit 1."""
    upstream.script = Tap().script
    proxy = proxies(upstream, valkey.url, DRAIN_S=60, DRAIN_DELAY_S=60 if first is signal.SIGINT else 0)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    proxy.signal(first)
    await until(lambda: proxy.admin("/readyz")[0] == 503)
    proxy.signal(second)
    assert await exit_code(proxy, 20) == 1
    answer = await read_answer(client.reader)
    client.close()
    assert answer is not None
    assert (answer.status, answer.slug) == (502, "upstream-lost")
    assert valkey.states() == [b"unknown"]


async def test_it_serves_on_for_the_delay(proxies, upstream, valkey):
    """With DRAIN_DELAY_S it is not ready after SIGTERM and yet serves newcomers, until the delay is over."""
    proxy = proxies(upstream, valkey.url, DRAIN_DELAY_S=1.5)
    assert proxy.admin("/readyz")[0] == 200
    proxy.signal(signal.SIGTERM)
    await until(lambda: proxy.admin("/readyz")[0] == 503)
    assert "shutting down" in proxy.admin("/readyz")[1]
    assert proxy.admin("/healthz")[0] == 200
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"executed"
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
    await until(lambda: refuses(proxy.port))
    assert await exit_code(proxy) == 0


async def test_idle_connections_are_closed(proxies, upstream, valkey):
    """Kept-alive connections without a request, and ones that never sent any, do not hold the end up."""
    proxy = proxies(upstream, valkey.url)
    clients = [await RawClient.open(proxy.port) for _ in range(3)]
    for client in clients[:2]:
        answer = await client.ask(request())
        assert answer is not None
        assert answer.header("connection") is None
    clients[1].writer.write(request()[:20])
    proxy.signal(signal.SIGTERM)
    for client in clients:
        assert await asyncio.wait_for(client.reader.read(), 20) == b""
        client.close()
    assert await exit_code(proxy, 10) == 0


async def test_the_embedded_store_outlives_the_drain(proxies, upstream):
    """With the embedded store, SIGINT to the whole group still stores what is in flight; a new start replays it."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream)
    running = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    proxy.signal(signal.SIGINT)
    await until(lambda: refuses(proxy.port))
    tap.end(OK)
    assert (await running).body == b"ok"
    assert await exit_code(proxy) == 0
    proxy.start()
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
