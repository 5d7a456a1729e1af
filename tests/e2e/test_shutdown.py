"""Shutdown: requests in flight finish or become unknown, and the exit code tells which."""

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Blackhole,
    Proxy,
    RawClient,
    Received,
    Tap,
    answering,
    ask,
    chunk,
    lazy,
    read_answer,
    request,
    signals_of,
    store_process,
    until,
)


async def exit_code(proxy: Proxy, seconds: float = 30) -> int:
    await until(lambda: proxy.process.poll() is not None, seconds)
    return proxy.process.returncode


async def seconds_to_end(proxy: Proxy) -> float:
    """Return how long the process runs, in ticks of this one: starvation of both counts for neither."""
    ticks = 0
    while proxy.process.poll() is None:
        assert ticks < 2000
        await asyncio.sleep(0.01)
        ticks += 1
    return ticks / 100


def refuses(port: int) -> bool:
    with socket.socket() as newcomer:
        return newcomer.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.fault(48, 61)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_is_in_flight_is_finished(proxies, upstream, valkey, number):
    """After SIGTERM or SIGINT new connections are refused; requests in flight are answered and stored: exit 0."""
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
    await until(lambda: (proxy.metric("in_flight"), proxy.metric("reading_bodies")) == (2, 1))

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
    """A pass-through request delays the exit, too, until it is answered."""
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


@pytest.mark.fault(48)
async def test_what_does_not_finish_becomes_unknown(proxies, upstream, valkey):
    """After DRAIN_S each request is cut off; its key is unknown or free, never in flight: exit 1."""
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
    """A request that still waits for a connection after the grace was not sent: its key is free."""
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
    """A client that reads nothing is cut off after the grace, and its key is unknown."""
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
    """A response that the store has not confirmed within the grace is not delivered as stored: exit 1."""
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


# However much stands still ...

END_S = 1.0  # from the end of the grace to the end of the process
BUSY_S = 1.0  # on top of it, for a machine that does other things, too
WHOLE = 12 * (1 << 20)  # more than two kernels' buffers take
HUGE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 30)


class Crowd:
    """Stalled clients of every kind at one proxy: readers, uploaders, replays, waiters, and a silent upstream."""

    def __init__(self, proxy: Proxy, upstream) -> None:
        self.proxy, self.upstream = proxy, upstream
        self.written = 0
        self.clients: list[RawClient] = []

    async def script(self, _, __, writer: asyncio.StreamWriter, received: Received) -> None:
        """Answer by the key: a response that can be stored, responses that never end, or none at all."""
        key = received.header("Idempotency-Key")[0]
        if key == b"stored":
            writer.write(OK.replace(b"Content-Length: 2", b"Content-Length: %d" % WHOLE)[:-2] + bytes(WHOLE))
            return
        if key.startswith(b"reader"):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            writer.write(HUGE)
            while True:
                writer.write(bytes(65536))
                await writer.drain()
                self.written += 1
        await asyncio.Event().wait()

    async def gather(self, readers: int, uploads: int, replays: int, waiters: int) -> None:
        """Start the clients, and wait until nothing moves any more."""
        self.upstream.script = self.script
        assert (await ask(self.proxy.port, request(key="stored"))).complete
        for name, number in (("reader", readers), ("silent", 20), ("stored", replays)):
            for one in range(number):
                client = await lazy(self.proxy.port)
                client.writer.write(request(key=name if name == "stored" else f"{name}-{one}"))
                self.clients.append(client)
        for one in range(uploads):
            client = await RawClient.open(self.proxy.port)
            client.writer.write(request(key=f"upload-{one}", body=bytes(9000))[:-4000])
            self.clients.append(client)
        await until(lambda: len(self.upstream.received) == 1 + readers + 20, 30)
        for _ in range(waiters):
            client = await RawClient.open(self.proxy.port)
            client.writer.write(request("POST", "/v1/charges", "silent-0", b'{"amount": 1}', "Prefer: wait=30"))
            self.clients.append(client)
        await until(lambda: self.proxy.metric("waiting") == waiters, 20)
        seen = -1
        while seen != self.written:
            seen = self.written
            await asyncio.sleep(0.2)

    def close(self) -> None:
        for client in self.clients:
            client.writer.transport.abort()


@pytest.mark.fault(48)
@pytest.mark.parametrize(("store", "many"), [("answers", 200), ("hangs", 40), ("is down", 40)])
async def test_the_end_comes_within_a_second_of_the_grace(proxies, upstream, own_valkey, store, many):
    """Slow readers, uploads, replays, waiters and a hanging store do not delay the exit (exit 1).

    Afterwards no key is in flight, if the store could be reached.
    """
    proxy = proxies(upstream, own_valkey.url, DRAIN_S=0.5, CLIENT_STALL_S=60, ACCESS_LOG="off")
    crowd = Crowd(proxy, upstream)
    await crowd.gather(readers=many, uploads=many, replays=20, waiters=40)
    if store == "hangs":
        own_valkey.pause()
    elif store == "is down":
        own_valkey.kill()
    proxy.signal(signal.SIGTERM)
    took_s = await seconds_to_end(proxy)
    crowd.close()
    assert proxy.process.returncode == 1
    assert took_s < 0.5 + END_S + BUSY_S
    assert proxy.events("stopped")[0]["cut_off"] >= 2 * many + 20
    assert "Traceback" not in proxy.log()
    if store == "answers":
        assert own_valkey.states() == [b"complete"] + [b"unknown"] * (many + 20)


@pytest.mark.fault(48)
async def test_a_thousand_in_flight_are_none_afterwards(proxies, upstream, valkey):
    """Of 1,000 requests, half of them mid-body, each ends unknown; no client gets a response that looks complete."""
    taps = []

    async def script(*exchange) -> None:
        taps.append(tap := Tap())
        if len(taps) % 2:
            tap.send(CHUNKED, chunk(b"a" * 1000))
        await tap.script(*exchange)

    upstream.script = script
    proxy = proxies(upstream, valkey.url, DRAIN_S=0.5, MAX_UPSTREAM_CONNECTIONS=1000, ACCESS_LOG="off")
    clients = []
    for number in range(1000):
        clients.append(client := await RawClient.open(proxy.port))
        client.writer.write(request(key=f"key-{number}"))
    await until(lambda: len(taps) == 1000, 30)
    proxy.signal(signal.SIGTERM)
    answers = await asyncio.gather(*[read_answer(client.reader) for client in clients])
    assert await seconds_to_end(proxy) < 0.5 + END_S + BUSY_S
    assert proxy.process.returncode == 1
    for client in clients:
        client.close()
    assert valkey.states() == [b"unknown"] * 1000
    got = [(answer.status, answer.complete) if answer else None for answer in answers]
    assert (got.count((502, True)), got.count((200, False))) == (500, 500)


async def test_an_upload_that_ends_in_the_grace_does_not_wait_for_its_original(proxies, upstream, valkey):
    """A duplicate whose upload ends after SIGTERM is refused at once, even if it would have waited."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url, DRAIN_S=30, ON_DUPLICATE="wait")
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    late = await RawClient.open(proxy.port)
    late.writer.write(request()[:-4])
    await until(lambda: (proxy.metric("in_flight"), proxy.metric("reading_bodies")) == (1, 1))
    proxy.signal(signal.SIGTERM)
    await until(lambda: refuses(proxy.port))
    late.writer.write(request()[-4:])
    told = await asyncio.wait_for(read_answer(late.reader), 10)
    late.close()
    assert told is not None
    assert (told.status, told.slug) == (409, "in-flight")
    tap.end(OK)
    assert (await original).body == b"ok"
    assert await exit_code(proxy) == 0


async def test_what_was_claimed_at_the_very_end_is_not_sent(proxies, upstream, own_valkey):
    """A claim that is confirmed only after the grace does not contact the upstream."""
    proxy = proxies(upstream, own_valkey.url, DRAIN_S=0.5, STORE_TIMEOUT_MS=20000)
    client = await RawClient.open(proxy.port)
    own_valkey.pause()
    client.writer.write(request())
    await until(lambda: proxy.metric("in_flight") == 1)
    proxy.signal(signal.SIGTERM)
    await asyncio.sleep(0.6)  # the grace is over, the store not yet given up
    own_valkey.resume()
    assert await seconds_to_end(proxy) < 0.5 + END_S + BUSY_S
    client.close()
    assert proxy.process.returncode == 1
    assert upstream.connections == 0
    assert b"unknown" not in own_valkey.states()


@pytest.mark.parametrize("taken", [True, False])
async def test_answers_that_are_not_taken_yet_hold_the_end_up(proxies, upstream, valkey, taken):
    """Pipelined requests are answered within the grace and their responses leave (exit 0); if the client does not read
    them, they are cut off (exit 1)."""
    upstream.script = answering(
        OK.replace(b"Content-Length: 2\r\n\r\nok", b"Content-Length: 60000\r\n\r\n") + bytes(60000)
    )
    proxy = proxies(upstream, valkey.url, DRAIN_S=20 if taken else 1)
    await ask(proxy.port, request())
    client = await lazy(proxy.port)
    client.writer.write(request() * 200)
    seen = -1.0
    while seen != (seen := proxy.metric('requests_total{outcome="replayed"}')):
        await asyncio.sleep(0.3)
    proxy.signal(signal.SIGTERM)
    await until(lambda: refuses(proxy.port))
    whole = 0
    if taken:
        client.writer.transport.resume_reading()
        while (answer := await read_answer(client.reader)) is not None:
            assert answer.complete
            whole += 1
    assert await exit_code(proxy) == (0 if taken else 1)
    client.writer.transport.abort()
    assert whole == (200 if taken else 0)
    assert (proxy.events("stopped")[0]["cut_off"] > 0) is not taken


@pytest.mark.parametrize("lost", ["by the upstream", "by the store"])
async def test_the_exit_code_tells_what_became_of_the_keys(proxies, upstream, own_valkey, lost):
    """A key that becomes unknown during the drain makes the exit code 1, even if nothing was cut off."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_valkey.url, DRAIN_S=20, SETTLE_TIMEOUT_S=1, STORE_TIMEOUT_MS=300)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    proxy.signal(signal.SIGTERM)
    await until(lambda: refuses(proxy.port))
    if lost == "by the upstream":
        await upstream.close()
    else:
        own_valkey.pause()
        tap.end(OK)
    answer = await read_answer(client.reader)
    client.close()
    own_valkey.resume()
    assert await exit_code(proxy) == 1
    assert answer is not None
    assert answer.slug == ("upstream-lost" if lost == "by the upstream" else "answer-not-stored")
    assert proxy.events("stopped")[0]["cut_off"] == 0


# Signals ...


@pytest.mark.fault(61)
@pytest.mark.parametrize(
    ("number", "delay_s"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 60)], ids=["term", "int", "delay"]
)
async def test_told_twice_it_ends_at_once(proxies, upstream, valkey, number, delay_s):
    """A second signal ends the delay and the grace: requests in flight become unknown, exit 1."""
    proxy = proxies(upstream, valkey.url, DRAIN_S=60, DRAIN_DELAY_S=delay_s, CLIENT_STALL_S=60)
    crowd = Crowd(proxy, upstream)
    await crowd.gather(readers=5, uploads=5, replays=2, waiters=3)
    client = await RawClient.open(proxy.port)
    client.writer.write(request(key="silent"))
    await until(lambda: upstream.received[-1].header("Idempotency-Key") == [b"silent"])
    proxy.signal(number)
    await until(lambda: proxy.admin("/readyz")[0] == 503)
    await asyncio.sleep(0.3)
    assert proxy.process.poll() is None
    proxy.signal(number)
    assert await seconds_to_end(proxy) < END_S + BUSY_S
    assert proxy.process.returncode == 1
    answer = await read_answer(client.reader)
    client.close()
    crowd.close()
    assert answer is not None
    assert (answer.status, answer.slug) == (502, "upstream-lost")
    assert valkey.states() == [b"complete"] + [b"unknown"] * 26


def starts_to(moment: str, proxy: Proxy) -> bool:
    """Return whether a proxy that starts has come as far as that."""
    match moment:
        case "import":
            return signal.SIGTERM in signals_of(proxy.process.pid, "SigCgt")
        case "embedded store":
            return (proxy.folder / "data" / "store.log").exists()
        case _:
            return bool(proxy.events(moment))


def is_free(folder: Path) -> bool:
    """Return whether no process has the data folder any more, neither a proxy nor a store."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


@pytest.mark.fault(61)
@pytest.mark.parametrize(
    ("moment", "count", "number"),
    [
        ("import", 1, signal.SIGTERM),
        ("import", 1, signal.SIGINT),
        ("embedded store", 1, signal.SIGTERM),
        ("worker started", 2, signal.SIGTERM),
    ],
)
async def test_a_stop_in_the_first_half_second_ends_cleanly(upstream, tmp_path, moment, count, number):
    """A stop signal before it serves: exit 0, no traceback, and no process of it is left."""
    proxy = Proxy(upstream.url, "embedded", tmp_path, {"WORKERS": count})
    proxy._begin()
    try:
        await until(lambda: starts_to(moment, proxy), 30)
        for reload in (signal.SIGHUP, signal.SIGUSR2):
            proxy.signal(reload)
        proxy.signal(number)
        assert await exit_code(proxy, 40) == 0, proxy.log()
        assert "Traceback" not in proxy.log()
        assert not proxy.events("worker died")
        for worker in proxy.events("worker started"):
            assert not Path(f"/proc/{worker['pid']}").exists()
        (tmp_path / "data").mkdir(exist_ok=True)
        assert is_free(tmp_path / "data")
    finally:
        proxy.close()


@pytest.mark.fault(61)
@pytest.mark.parametrize("count", [1, 2])
async def test_signals_at_the_very_end_change_nothing(proxies, upstream, count):
    """A signal after the drain, while the embedded store ends, does not kill the process: exit 0."""
    proxy = proxies(upstream, WORKERS=count)
    store = store_process(proxy)
    os.kill(store, signal.SIGSTOP)  # its SHUTDOWN has to wait
    proxy.signal(signal.SIGTERM)
    await until(lambda: proxy.events("stopped"), 30)
    pid = proxy.process.pid
    await until(lambda: signal.SIGTERM in signals_of(pid, "SigBlk") or signal.SIGTERM not in signals_of(pid, "SigCgt"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        proxy.signal(number)
    os.kill(store, signal.SIGCONT)
    assert await exit_code(proxy) == 0
    assert is_free(proxy.folder / "data")


@pytest.mark.fault(61)
async def test_a_hangup_changes_nothing(proxies, upstream, valkey):
    """SIGHUP ends neither the process nor a claim."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url)
    running = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    for _ in range(3):
        proxy.signal(signal.SIGHUP)
        assert (await ask(proxy.port, request())).slug == "in-flight"
    tap.end(OK)
    assert (await running).body == b"ok"
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
    assert await asyncio.to_thread(proxy.stop) == 0


# The delay ...


async def test_it_serves_on_for_the_delay(proxies, upstream, valkey):
    """During DRAIN_DELAY_S it is not ready but serves, and each answer says that it is the last of its connection; a
    second signal ends the delay (exit 0)."""
    tap = Tap()
    proxy = proxies(upstream, valkey.url, DRAIN_DELAY_S=60)
    assert proxy.admin("/readyz")[0] == 200
    kept = await RawClient.open(proxy.port)
    proxy.signal(signal.SIGTERM)
    await until(lambda: proxy.admin("/readyz")[0] == 503)
    assert "shutting down" in proxy.admin("/readyz")[1]
    assert proxy.admin("/healthz")[0] == 200
    first = await ask(proxy.port, request())
    assert (first.header("oncegate-status"), first.header("connection")) == (b"executed", b"close")
    answer = await kept.ask(request())
    assert answer is not None
    assert (answer.header("oncegate-status"), answer.header("connection")) == (b"replayed", b"close")
    upstream.script = tap.script
    original = asyncio.ensure_future(ask(proxy.port, request(key="waited-for")))
    await until(lambda: len(upstream.received) == 2)
    waiter = asyncio.ensure_future(
        ask(proxy.port, request("POST", "/v1/charges", "waited-for", b'{"amount": 1}', "Prefer: wait=20"))
    )
    await until(lambda: proxy.metric("waiting") == 1)
    assert not refuses(proxy.port)
    tap.end(OK)
    assert ((await waiter).body, (await original).body) == (b"ok", b"ok")
    proxy.signal(signal.SIGTERM)
    assert await asyncio.wait_for(kept.reader.read(), 20) == b""
    kept.close()
    assert await exit_code(proxy) == 0


async def test_kept_connections_lose_no_request(proxies, upstream, valkey):
    """A request that comes on a kept connection just after SIGTERM is answered, and told that it is the last one."""
    proxy = proxies(upstream, valkey.url)
    idle = [await RawClient.open(proxy.port) for _ in range(12)]
    for client in idle:
        answer = await client.ask(request("GET", "/x", None, b""))
        assert answer is not None
        assert answer.header("connection") is None
    tap = Tap()
    upstream.script = tap.script
    streaming = await RawClient.open(proxy.port)
    streaming.writer.write(request("GET", "/stream", None, b""))
    await until(lambda: len(upstream.received) == 13)
    tap.send(CHUNKED, chunk(b"begun"))
    head = await streaming.reader.readuntil(b"begun")
    assert b"Connection: close" not in head
    upstream.script = answering(OK)
    proxy.signal(signal.SIGTERM)
    await until(lambda: refuses(proxy.port))
    # The second of two that came together is answered as well.
    twice = request("GET", "/y", None, b"") * 2
    for client in idle:
        client.writer.write(twice)
    for client in idle:
        answers = [await read_answer(client.reader) for _ in range(2)]
        got = [(answer.status, answer.header("connection")) for answer in answers if answer]
        assert got == [(200, None), (200, b"close")]
        client.close()
    tap.end(LAST_CHUNK)
    await streaming.reader.readuntil(LAST_CHUNK)
    answer = await streaming.ask(request("GET", "/z", None, b""))
    assert answer is not None
    assert (answer.status, answer.header("connection")) == (200, b"close")
    streaming.close()
    assert await exit_code(proxy) == 0


async def test_the_grace_counts_from_the_end_of_the_delay(proxies, upstream, valkey):
    """Requests in flight have DRAIN_DELAY_S, then DRAIN_S, and at most a second more."""
    upstream.script = Tap().script
    proxy = proxies(upstream, valkey.url, DRAIN_DELAY_S=1, DRAIN_S=1)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    began = time.monotonic()
    proxy.signal(signal.SIGTERM)
    ticks_s = await seconds_to_end(proxy)
    assert time.monotonic() - began > 2
    assert ticks_s < 2 + END_S + BUSY_S
    assert proxy.process.returncode == 1
    client.close()
    assert valkey.states() == [b"unknown"]


async def test_idle_connections_are_closed(proxies, upstream, valkey):
    """Idle connections, used or never used, do not delay the exit."""
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
    assert await exit_code(proxy) == 0


async def test_the_embedded_store_outlives_the_drain(proxies, upstream):
    """With the embedded store, SIGINT to the process group still stores requests in flight; a restart replays them."""
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


class Detached(Proxy):
    """A proxy that starts with some of its standard files closed."""

    closed = ""

    def _spawn(self) -> None:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", f'exec {self.closed}; exec "$@"', "sh", sys.executable, "-m", "oncegate", "serve"],
                env=self._env, stderr=log, stdout=log, cwd=self.folder,
            )  # fmt: skip


@pytest.mark.parametrize("closed", ["0<&-", "0<&- 1>&-"])
@pytest.mark.parametrize("count", [1, 2])
async def test_closed_standard_files_change_nothing(upstream, valkey, tmp_path, closed, count):
    """It serves and exits normally: no socket gets the number of a standard file."""
    gate = Detached(upstream.url, valkey.url, tmp_path, {"WORKERS": count})
    gate.closed = closed
    try:
        gate.start()
        assert (await ask(gate.port, request())).status == 200
        assert gate.stop() == 0
        assert "Assertion" not in gate.log()
    finally:
        gate.close()
