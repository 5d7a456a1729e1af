"""Processes that die or stand still: what was claimed ends unknown, what was stored stays, nothing runs twice."""

import asyncio
import os
import random
import signal
from typing import Any

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Blackhole,
    RawClient,
    RawUpstream,
    Received,
    Tap,
    answering,
    ask,
    chunk,
    holding,
    read_answer,
    request,
    store_process,
    until,
)

LEASE_S = 0.5
CREATED = b"HTTP/1.1 201 Made\r\nX-Id: 7\r\nContent-Length: 4\r\n\r\nmade"


async def becomes_unknown(port: int, within_s: float) -> None:
    """Ask until the key is unknown: in flight until then, and no longer than it may be."""
    clock = asyncio.get_running_loop().time
    latest = clock() + within_s
    while True:
        asked = clock()
        answer = await ask(port, request())
        assert answer.status == 409
        if answer.slug == "outcome-unknown":
            assert answer.header("retry-after") is None
            assert answer.header("x-should-retry") == b"false"
            assert answer.header("oncegate-status") == b"unknown"
            return
        assert answer.slug == "in-flight"
        assert asked < latest, "in flight for longer than the lease and a second"
        await asyncio.sleep(0.05)


@pytest.mark.fault(19, 32, 43)
@pytest.mark.parametrize("moment", ["connecting", "waiting", "mid-body"])
async def test_a_killed_proxy_leaves_the_key_unknown(proxies, upstream, valkey, moment):
    """SIGKILL before send, after send and mid-body: in flight for the lease + 1 s at most, then unknown for good."""
    hole, tap = Blackhole(), Tap()
    upstream.script = tap.script
    try:
        doomed = proxies(hole.url if moment == "connecting" else upstream, valkey.url, LEASE_MS=500)
        other = proxies(upstream, valkey.url, LEASE_MS=500)
        client = await RawClient.open(doomed.port)
        client.writer.write(request())
        await until(lambda: upstream.received if moment != "connecting" else valkey.states())
        if moment == "mid-body":
            tap.send(CHUNKED, chunk(b"a" * 300_000), chunk(b"b" * 300_000))
            await client.reader.readuntil(b"b" * 1000)
            await until(lambda: any(b"b0" in fields for fields in valkey.records().values()))
        assert (await ask(other.port, request())).slug == "in-flight"
        doomed.kill()
    finally:
        hole.close()
    if moment == "mid-body":
        assert b"0\r\n\r\n" not in (await client.reader.read())[-5:]
    else:
        assert await read_answer(client.reader) is None
    client.close()
    await becomes_unknown(other.port, LEASE_S + 1)
    assert (await ask(other.port, request())).slug == "outcome-unknown"
    doomed.start()
    assert (await ask(doomed.port, request())).slug == "outcome-unknown"
    assert len(upstream.received) == (0 if moment == "connecting" else 1)


@pytest.mark.fault(33)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_a_proxy_that_stood_still_stores_what_came(proxies, upstream, valkey, streamed):
    """SIGSTOP for two leases while the answer comes: unknown meanwhile, then the client is served and it is kept."""
    tap = Tap()
    upstream.script = tap.script
    still, other = (proxies(upstream, valkey.url, LEASE_MS=300) for _ in range(2))
    original = asyncio.ensure_future(ask(still.port, request()))
    await until(lambda: upstream.received)
    if streamed:
        tap.send(CHUNKED, chunk(b"a" * 100_000))
        await until(lambda: any(b"b0" in fields for fields in valkey.records().values()))
    still.signal(signal.SIGSTOP)
    await becomes_unknown(other.port, 0.3 + 1)
    await asyncio.sleep(0.3)  # the second lease
    if streamed:
        tap.end(chunk(b"b" * 100_000), LAST_CHUNK)
    else:
        tap.end(CREATED)
    assert (await ask(other.port, request())).slug == "outcome-unknown"
    still.signal(signal.SIGCONT)
    answer = await original
    assert answer.complete
    assert answer.body == (b"a" * 100_000 + b"b" * 100_000 if streamed else b"made")
    for proxy in (still, other):
        replay = await ask(proxy.port, request())
        assert replay.header("oncegate-status") == b"replayed"
        assert (replay.status, replay.reason, replay.body) == (answer.status, answer.reason, answer.body)
    assert len(upstream.received) == 1
    assert still.metric("claims_lost_total") == 0


@pytest.mark.fault(22)
@pytest.mark.parametrize("taken", [False, True], ids=["still ours", "released and taken"])
async def test_a_claim_grown_old_before_sending_is_claimed_again(proxies, upstream, valkey, taken):
    """SIGSTOP between claim and connect: afterwards it is claimed again, and if it is another's, nothing is sent."""
    hole, beyond = Blackhole(), RawUpstream()
    try:
        still = proxies(hole.url, valkey.url, LEASE_MS=300, CONNECT_TIMEOUT_S=20)
        other = proxies(upstream, valkey.url, LEASE_MS=300)
        original = asyncio.ensure_future(ask(still.port, request()))
        await until(valkey.states)
        still.signal(signal.SIGSTOP)
        await becomes_unknown(other.port, 0.3 + 1)
        if taken:
            upstream.script = answering(CREATED)
            with valkey.client() as client:
                client.delete(*client.keys("once:{*"))  # as one might free a key by hand
            assert (await ask(other.port, request())).header("oncegate-status") == b"executed"
        await beyond.start(hole.place)
        still.signal(signal.SIGCONT)
        answer = await original
        replay = await ask(other.port, request())
    finally:
        await beyond.close()
        hole.close()
    if taken:
        assert (answer.status, answer.body, answer.header("oncegate-status")) == (201, b"made", b"replayed")
        assert still.metric("claims_lost_total") == 1
        assert not beyond.received
    else:
        assert (answer.status, answer.body, answer.header("oncegate-status")) == (200, b"ok", b"executed")
        assert len(beyond.received) == 1
    assert (replay.header("oncegate-status"), replay.body) == (b"replayed", answer.body)


UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"


@pytest.mark.fault(43, 52)
@pytest.mark.parametrize("key", ["key-1", None], ids=["guarded", "passed through"])
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("framing", ["eof", "chunked"])
async def test_a_killed_proxy_ends_no_answer_cleanly(proxies, upstream, valkey, key, version, framing):
    """SIGKILL in the middle of an answer, also of one whose end is the closing: the client sees that it broke off."""
    tap = Tap()
    upstream.script = tap.script
    doomed = proxies(upstream, valkey.url)
    client = await RawClient.open(doomed.port)
    client.writer.write(request(key=key).replace(b"HTTP/1.1", version.encode()))
    answering = asyncio.ensure_future(read_answer(client.reader))
    tap.send(*((UNTIL_CLOSED, b"begun") if framing == "eof" else (CHUNKED, chunk(b"begun"))))
    await until(lambda: upstream.received)
    await asyncio.sleep(0.3)  # beyond the window in which a small answer is held back
    doomed.kill()
    answer = await asyncio.wait_for(answering, 10)
    assert answer is not None
    assert not answer.complete
    client.close()


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("size", [10, 60_000, 8_000_000])
async def test_an_answer_ended_by_closing_arrives_whole_at_a_slow_client(proxies, upstream, valkey, version, size):
    """Its clean end comes after its last byte, also where the client takes its time."""
    text = os.urandom(size)

    async def script(_, __, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.write(UNTIL_CLOSED + text)
        await writer.drain()
        writer.close()

    upstream.script = script
    proxy = proxies(upstream, valkey.url)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=2**16)
    writer.write(request().replace(b"HTTP/1.1", version.encode()))
    await asyncio.sleep(1)
    answer = await asyncio.wait_for(read_answer(reader), 30)
    writer.close()
    assert answer is not None
    assert (answer.complete, answer.body) == (True, text)
    again = await ask(proxy.port, request())
    assert (again.header("oncegate-status"), again.body) == (b"replayed", text)


def text_of(key: bytes) -> bytes:
    """Return the body that belongs to a key: small for one half of them, streamed for the other."""
    return key * (3 if int(key[1:]) % 2 else 30_000)


async def answer_in_bits(_, __, writer: asyncio.StreamWriter, received: Received) -> None:
    """Answer after a while, in pieces, with the text that belongs to the key."""
    (key,) = received.header("idempotency-key")
    text = text_of(key)
    await asyncio.sleep(random.uniform(0, 0.2))
    writer.write(CHUNKED)
    for start in range(0, len(text), 8000):
        writer.write(chunk(text[start : start + 8000]))
        await writer.drain()
        await asyncio.sleep(random.uniform(0, 0.02))
    writer.write(LAST_CHUNK)


async def attempt(port: int, key: str, after_s: float) -> Answer | None:
    """Return what a client saw that started after a while; None where it saw no head."""
    await asyncio.sleep(after_s)
    try:
        client = await RawClient.open(port)
    except ConnectionError:
        return None
    try:
        return await asyncio.wait_for(client.ask(request(key=key)), 30)
    except ConnectionError:
        return None
    finally:
        client.close()


@pytest.mark.fault(4, 19, 29, 32, 39, 43, 51, 52)
@pytest.mark.parametrize("embedded", [False, True], ids=["shared store", "embedded store"])
async def test_a_kill_under_load_breaks_no_promise(proxies, upstream, valkey, embedded):
    """SIGKILL with 100 requests at every stage: none executes twice, what a client saw whole is replayed."""
    upstream.script = answer_in_bits
    doomed = proxies(upstream, *([] if embedded else [valkey.url]), LEASE_MS=500)
    keys = [f"k{n:04}" for n in range(100)]
    attempts = [asyncio.ensure_future(attempt(doomed.port, key, random.uniform(0, 0.6))) for key in keys]
    await asyncio.sleep(random.uniform(0.3, 0.5))
    doomed.kill()
    seen = dict(zip(keys, await asyncio.gather(*attempts), strict=True))
    if embedded:
        doomed.start()
    heir = doomed if embedded else proxies(upstream, valkey.url, LEASE_MS=500)

    async def settled(key: str) -> Answer:
        for _ in range(100):
            answer = await ask(heir.port, request(key=key))
            if answer.status != 409 or answer.slug != "in-flight":
                return answer
            await asyncio.sleep(0.05)
        raise AssertionError("in flight for too long")

    found = dict(zip(keys, await asyncio.gather(*map(settled, keys)), strict=True))
    executions = [received.header("idempotency-key")[0] for received in upstream.received]
    assert len(executions) == len(set(executions))
    for key, answer in found.items():
        before = seen[key]
        if answer.status == 200:
            assert (answer.complete, answer.body) == (True, text_of(key.encode()))
        else:
            assert (answer.status, answer.slug) == (409, "outcome-unknown")
            assert before is None or not before.complete
        if before is not None and before.complete:
            assert answer.header("oncegate-status") == b"replayed"
            assert answer.body == before.body


@pytest.mark.fault(51)
async def test_an_execution_outlives_a_kill_of_the_proxy(proxies, upstream):
    """With the embedded store, SIGKILL right after an answer and a start on the same folder: it is replayed."""
    upstream.script = answering(CREATED)
    proxy = proxies(upstream)
    first = await ask(proxy.port, request())
    proxy.kill()
    proxy.start()
    again = await ask(proxy.port, request())
    assert (again.status, again.reason, again.body) == (first.status, first.reason, first.body)
    assert again.header("oncegate-status") == b"replayed"
    assert len(upstream.received) == 1


async def test_a_request_under_way_outlives_no_kill_of_the_proxy(proxies, upstream):
    """With the embedded store, SIGKILL in mid-flight: after the start it is unknown, and never run."""
    upstream.script = holding(asyncio.Event())
    proxy = proxies(upstream, LEASE_MS=500)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    proxy.kill()
    assert await read_answer(client.reader) is None
    client.close()
    proxy.start()
    await becomes_unknown(proxy.port, LEASE_S + 1)
    assert len(upstream.received) == 1


FOUND = "keys of a killed proxy are unknown"


@pytest.mark.fault(19, 32)
@pytest.mark.parametrize("on_unknown", ["hold", "retry"])
async def test_a_successor_on_an_embedded_store_marks_the_keys_of_a_killed_proxy(proxies, upstream, on_unknown):
    """SIGKILL of the only proxy of an embedded store: its keys are unknown from the next start on."""
    upstream.script = holding(asyncio.Event())
    proxy = proxies(upstream, LEASE_MS=60_000, ON_UNKNOWN=on_unknown)
    clients = [await RawClient.open(proxy.port) for _ in range(3)]
    for number, client in enumerate(clients):
        client.writer.write(request(key=f"k{number}"))
    await until(lambda: len(upstream.received) == 3)
    proxy.kill()
    for client in clients:
        client.close()
    upstream.script = answering(OK)
    proxy.start()
    (line,) = proxy.events(FOUND)
    assert line["keys"] == 3
    answer = await ask(proxy.port, request(key="k0"))
    assert answer.status == (409 if on_unknown == "hold" else 200)
    assert answer.header("oncegate-status") == (b"unknown" if on_unknown == "hold" else b"executed")
    assert await asyncio.to_thread(proxy.stop) == 0
    proxy.start()
    assert not proxy.events(FOUND)


async def ends_after_a_kill_of(proxy: Any, running: "asyncio.Future[Answer]", tap: Tap) -> None:
    """Kill and start a proxy while another process executes: its successor leaves the key to that one."""
    proxy.kill()
    proxy.start()
    assert (await ask(proxy.port, request())).slug == "in-flight"
    tap.end(OK)
    assert (await running).body == b"ok"
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
    assert not proxy.events(FOUND)


async def test_a_key_of_a_proxy_that_lives_is_not_marked(proxies, upstream):
    """The keys of another proxy on the same embedded store stay in flight when the store's own proxy is killed."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, LEASE_MS=60_000)
    other = proxies(upstream, f"redis+unix://{proxy.folder}/data/store.sock?db=0", LEASE_MS=60_000)
    running = asyncio.ensure_future(ask(other.port, request()))
    await until(lambda: upstream.received)
    await ends_after_a_kill_of(proxy, running, tap)


async def test_a_key_of_a_worker_that_outlives_its_supervisor_is_not_marked(proxies, upstream):
    """SIGKILL of a supervisor: its worker still drains, and the key that it finishes is in flight for a successor."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, WORKERS=2, LEASE_MS=60_000)
    running = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    await ends_after_a_kill_of(proxy, running, tap)


async def test_the_keys_of_a_killed_worker_are_marked(proxies, upstream):
    """SIGKILL of one worker of several on an embedded store: its keys are unknown at once, those of others go on."""
    upstream.script = holding(asyncio.Event())
    proxy = proxies(upstream, WORKERS=2, LEASE_MS=60_000)
    clients = [await RawClient.open(proxy.port) for _ in range(20)]
    for number, client in enumerate(clients):
        client.writer.write(request(key=f"k{number}"))
    await until(lambda: len(upstream.received) == 20)
    os.kill(proxy.events("worker started")[0]["pid"], signal.SIGKILL)
    await until(lambda: proxy.events(FOUND), 30)
    slugs = [(await ask(proxy.port, request(key=f"k{number}"))).slug for number in range(20)]
    assert slugs.count("outcome-unknown") == proxy.events(FOUND)[0]["keys"]
    assert set(slugs) == {"outcome-unknown", "in-flight"}, "each worker has some of twenty, but for once in 500,000"
    for client in clients:
        client.close()


@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_a_killed_embedded_store_loses_nothing(proxies, upstream, streamed):
    """SIGKILL of the embedded store: ready again, what it had is replayed, and what runs is stored afterwards."""
    upstream.script = answering(CREATED)
    proxy = proxies(upstream, LEASE_MS=300)
    await ask(proxy.port, request(key="before"))
    tap = Tap()
    upstream.script = tap.script
    original = asyncio.ensure_future(ask(proxy.port, request(key="during")))
    await until(lambda: len(upstream.received) == 2)
    if streamed:
        tap.send(CHUNKED, chunk(b"a" * 100_000))
        await until(lambda: proxy.metric('store_seconds_count{verb="append"}') >= 1)
    killed = store_process(proxy)
    os.kill(killed, signal.SIGKILL)
    if streamed:
        tap.end(chunk(b"b" * 100_000), LAST_CHUNK)
    else:
        tap.end(OK)
    answer = await original
    whole = b"a" * 100_000 + b"b" * 100_000 if streamed else b"ok"
    assert (answer.status, answer.body, answer.complete) == (200, whole, True)
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    assert store_process(proxy) != killed
    for key, body in (("before", b"made"), ("during", whole)):
        replay = await ask(proxy.port, request(key=key))
        assert (replay.header("oncegate-status"), replay.body) == (b"replayed", body)
    assert len(upstream.received) == 2
    assert proxy.metric("claims_lost_total") == 0
