"""The address of a response: who may read there, which part of it, and what nobody is told."""

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from oncegate.keys.digests import Digests
from oncegate.streams.capability import Capabilities
from oncegate.streams.durable_streams import offset_at
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Proxy,
    RawClient,
    RawUpstream,
    Tap,
    answering,
    ask,
    chunk,
    lazy,
    read_answer,
    request,
    until,
)

RULES = """
[[rule]]
name = "llm"
path = "/v1/**"
resumable = true
cors_origins = ["https://shop.test"]

[[rule]]
name = "stoppable"
path = "/stoppable/**"
resumable = true
cancellable = true

[[rule]]
name = "judged"
path = "/judged/**"
resumable = true
release_statuses = ["200+/error/code=busy"]

[[rule]]
name = "other"
path = "/other/**"
"""
SECRET = "a secret of many bytes"
CAPABILITIES = Capabilities(Digests(SECRET.encode()).capability_key)
SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
SAFE = {
    "cache-control": b"private, no-store",
    "x-content-type-options": b"nosniff",
    "referrer-policy": b"no-referrer",
    "content-security-policy": b"sandbox",
    "cross-origin-resource-policy": b"same-origin",
}
Start = Callable[..., list[Proxy]]


@pytest.fixture
def replicas(proxies, upstream, tmp_path: Path) -> Start:
    """Start proxies of one service: `replicas(2, store_url)`."""
    (tmp_path / "rules.toml").write_text(RULES)

    def start(count: int, url: str, **settings: object) -> list[Proxy]:
        settings = {"RULES_FILE": "rules.toml", "SECRET": SECRET, "LEASE_MS": 1000} | settings
        return [proxies(upstream, url, **settings) for _ in range(count)]

    return start


def address_in(head: bytes, rel: str = "resume") -> str:
    """Return where an answer's Link leads."""
    found = re.search(rb'\r\nLink: <([^>]+)>; rel="%s"\r\n' % rel.encode(), head)
    assert found is not None, head
    return found[1].decode()


def address_of(answer: Answer) -> str:
    """Return where the Link of an answer leads."""
    link = answer.header("link")
    assert link is not None
    assert link.endswith(b'>; rel="resume"')
    return link.partition(b">")[0][1:].decode()


def get(path: str, *fields: str, method: str = "GET") -> bytes:
    return request(method, path, None, b"", *fields)


@asynccontextmanager
async def begun(
    proxy: Proxy, upstream: RawUpstream, *pieces: bytes, head: bytes = CHUNKED
) -> AsyncIterator[tuple[Tap, str]]:
    """Begin a response with these pieces, for a client that stays; its tap, and its address."""
    tap = Tap()
    upstream.script = tap.script
    tap.send(head, *map(chunk, pieces))
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    try:
        yield tap, address_in(await client.reader.readuntil(b"\r\n\r\n"))
    finally:
        client.close()


async def complete(
    proxy: Proxy, upstream: RawUpstream, body: bytes, kind: bytes = b"text/plain", key: str = "key-1"
) -> str:
    """Store a response and return its address."""
    upstream.script = answering(
        b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(body), body)
    )
    answer = await ask(proxy.port, request(key=key))
    assert answer.header("oncegate-status") == b"executed"
    return address_of(answer)


async def reading(proxy: Proxy, path: str, begin: bytes) -> RawClient:
    """Return a reader at an address that has got its first bytes."""
    client = await RawClient.open(proxy.port)
    client.writer.write(get(path))
    async with asyncio.timeout(10):
        assert b" 200 " in await client.reader.readuntil(b"\r\n\r\n")
        await client.reader.readuntil(begin)
    return client


async def is_broken_off(client: RawClient) -> bool:
    """Return whether a reader's response ends as no whole one does."""
    rest = b""
    try:
        async with asyncio.timeout(10):
            while data := await client.reader.read(65536):
                rest += data
    except ConnectionError:
        return True
    finally:
        client.close()
    return not rest.endswith(LAST_CHUNK) and b"streamClosed" not in rest


async def has_come(proxy: Proxy, address: str, size: int) -> None:
    """Wait until so many bytes of a response can be read at a replica."""
    async with asyncio.timeout(10):
        while True:
            offset = (await ask(proxy.port, get(f"{address}?offset=now"))).header("stream-next-offset")
            if int(offset.partition(b"_")[0]) >= size:
                return
            await asyncio.sleep(0.05)


# What runs, and what has run ...


async def test_a_response_is_read_on_each_replica_while_it_comes_and_later(replicas, upstream, stored):
    """From its beginning, to the same end."""
    one, two = replicas(2, stored.url)
    async with begun(one, upstream, b"first ") as (tap, address):
        readers = [asyncio.ensure_future(ask(proxy.port, get(address))) for proxy in (one, two, two)]
        # An API that is asked again is told so, and where to read.
        again = await ask(two.port, request())
        assert (again.status, address_of(again)) == (409, address)
        tap.send(chunk(b"second "))
        await asyncio.sleep(0.1)
        tap.end(chunk(b"third"), LAST_CHUNK)
        for reader in readers:
            answer = await reader
            assert (answer.status, answer.complete, answer.body) == (200, True, b"first second third")
            assert answer.header("oncegate-status") == b"resumed"
            assert {name: answer.header(name) for name in SAFE} == SAFE
    for proxy in (one, two):
        answer = await ask(proxy.port, get(address))
        assert (answer.status, answer.complete, answer.body) == (200, True, b"first second third")
        replayed = await ask(proxy.port, request())
        assert (replayed.header("oncegate-status"), address_of(replayed)) == (b"replayed", address)
    assert len(upstream.received) == 1


async def test_a_body_that_may_free_its_key_is_read_once_it_is_stored(replicas, upstream, store):
    """Whoever waits at its address gets all of it, also what the store had long before."""
    one, two = replicas(2, store.url)
    tap, asked = Tap(), request(target="/judged/1")
    upstream.script = tap.script
    tap.send(CHUNKED.replace(b"text/plain", b"application/json"), chunk(b'{"text": "' + b"x" * 200_000))
    original = asyncio.ensure_future(ask(one.port, asked))
    await until(lambda: upstream.received)
    address = address_of(await ask(two.port, asked))
    readers = [asyncio.ensure_future(ask(proxy.port, get(address))) for proxy in (one, two)]
    await asyncio.sleep(0.5)
    tap.end(chunk(b'"}'), LAST_CHUNK)
    body = (await original).body
    for reader in readers:
        answer = await reader
        assert (answer.status, answer.complete, answer.body == body) == (200, True, True)


async def test_a_reader_gets_no_clean_end_of_a_response_that_broke_off(replicas, upstream, store):
    """Its owner is killed: the readers on the other replica are broken off, and later ones are told that it is over."""
    one, two = replicas(2, store.url)
    async with begun(one, upstream, b"first ") as (_, address):
        reader = await reading(two, address, b"first ")
        events = await reading(two, f"{address}?offset=-1&live=sse", b"first ")
        offset = (await ask(two.port, get(f"{address}?offset=now"))).header("stream-next-offset").decode()
        poll = asyncio.ensure_future(ask(two.port, get(f"{address}?offset={offset}&live=long-poll")))
        await asyncio.sleep(0.1)
        one.kill()
        polled = await poll
        assert (polled.status, polled.header("stream-closed")) == (410, None)
        assert await is_broken_off(reader)
        assert await is_broken_off(events)
    for path in (
        address,
        f"{address}?offset=-1",
        f"{address}?offset=-1&live=long-poll",
        f"{address}?offset=-1&live=sse",
    ):
        answer = await ask(two.port, get(path, "Accept: text/event-stream"))
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (410, "stream_gone")
        assert answer.header("stream-closed") is None


async def test_parts_of_a_complete_response(replicas, upstream, valkey):
    """At every byte; with conditions; and out of bounds."""
    [proxy] = replicas(1, valkey.url)
    body = bytes(range(48, 90))
    address = await complete(proxy, upstream, body)
    client = await RawClient.open(proxy.port)
    for first in range(len(body)):
        answer = await client.ask(get(address, f"Range: bytes={first}-"))
        assert answer is not None
        assert (answer.status, answer.body) == (206, body[first:])
        assert answer.header("content-range") == b"bytes %d-%d/%d" % (first, len(body) - 1, len(body))
    etag = (await ask(proxy.port, get(address))).header("etag")
    assert etag.startswith(b'"')
    for fields, status, wanted in (
        (("Range: bytes=3-5",), 206, body[3:6]),
        (("Range: bytes=-4",), 206, body[-4:]),
        (("Range: bytes=3-5", f"If-Range: {etag.decode()}"), 206, body[3:6]),
        (("Range: bytes=3-5", 'If-Range: "other"'), 200, body),
        (("Range: bytes=3-5,7-9",), 200, body),
        ((f"If-None-Match: {etag.decode()}",), 304, b""),
        (('If-None-Match: "other"',), 200, body),
        (('If-Match: "other"',), 412, None),
        ((f"Range: bytes={len(body)}-",), 416, None),
        (("Range: bytes=-0",), 416, None),
    ):
        answer = await ask(proxy.port, get(address, *fields))
        assert (answer.status, answer.body if wanted is not None else None) == (status, wanted), fields
        assert answer.header("x-content-type-options") == b"nosniff"
        if status == 416:
            assert answer.header("content-range") == b"bytes */%d" % len(body)
    head = await client.ask(get(address, method="HEAD"), head_only=True)
    assert head is not None
    assert (head.status, head.body, head.header("content-length")) == (200, b"", b"%d" % len(body))
    client.close()


async def test_a_range_of_what_still_comes_is_answered_with_all_of_it(replicas, upstream, valkey):
    """A part without a last position would look complete."""
    [proxy] = replicas(1, valkey.url)
    async with begun(proxy, upstream, b"first ") as (tap, address):
        reader = asyncio.ensure_future(ask(proxy.port, get(address, "Range: bytes=3-")))
        await asyncio.sleep(0.1)
        tap.end(chunk(b"second"), LAST_CHUNK)
        answer = await reader
        assert (answer.status, answer.body, answer.header("content-range")) == (200, b"first second", None)


async def test_an_address_never_leads_to_another_execution(replicas, upstream, store):
    """The owner dies and a retry executes anew: the old address is over, and the new one is another."""
    one, two = replicas(2, store.url, ON_UNKNOWN="retry", LEASE_MS=500)
    async with begun(one, upstream, b"old ") as (_, address):
        one.kill()
    upstream.script = answering(OK)
    async with asyncio.timeout(10):
        while (executed := await ask(two.port, request())).status != 200:
            await asyncio.sleep(0.1)
    assert (executed.header("oncegate-status"), address_of(executed) != address) == (b"executed", True)
    for path in (address, f"{address}?offset=-1"):
        answer = await ask(two.port, get(path))
        assert (answer.status, json.loads(answer.body)["reason"]) == (410, "gone")
    assert (await ask(two.port, get(address_of(executed)))).body == b"ok"


async def test_what_is_not_kept_breaks_its_readers_off(replicas, upstream, valkey):
    """On both replicas, as soon as it is too large to store; its own client goes on."""
    one, two = replicas(2, valkey.url, MAX_STORED_BYTES=1000)
    async with begun(one, upstream, b"x" * 500) as (tap, address):
        readers = [await reading(proxy, address, b"x" * 500) for proxy in (one, two)]
        tap.send(chunk(b"x" * 600))
        for reader in readers:
            assert await is_broken_off(reader)
        tap.end(LAST_CHUNK)
        await until(lambda: one.metric('requests_total{outcome="executed"}') == 1)
    for proxy in (one, two):
        answer = await ask(proxy.port, get(address))
        assert (answer.status, json.loads(answer.body)["reason"]) == (410, "not-kept")


async def test_what_is_complete_is_read_without_its_owner(replicas, upstream, valkey):
    """At every byte, once the owner is killed; until its retention is over."""
    one, two = replicas(2, valkey.url, RETENTION_S=3, WAIT_MAX_S=1)
    body = bytes(range(48, 64))
    address = await complete(one, upstream, body)
    one.kill()
    token = CAPABILITIES.read(address.rpartition("/")[2].encode()).token
    for at in range(len(body)):
        assert (await ask(two.port, get(address, f"Range: bytes={at}-"))).body == body[at:]
        assert (await ask(two.port, get(f"{address}?offset={offset_at(at, token)}"))).body == body[at:]
    async with asyncio.timeout(10):
        while (answer := await ask(two.port, get(address))).status == 200:
            await asyncio.sleep(0.1)
    assert (answer.status, json.loads(answer.body)["reason"] in ("expired", "gone")) == (410, True)


async def test_where_no_place_is_free_readers_come_again(replicas, upstream, valkey):
    """The places of a tenant are taken: 503, which an EventSource gets as it needs it. They are free again at once."""
    [proxy] = replicas(1, valkey.url, MAX_FOLLOWERS=4)
    async with begun(proxy, upstream, b"first ") as (tap, address):
        reader = await reading(proxy, address, b"first ")
        for fields, method in (((), "GET"), (("Range: bytes=0-3",), "GET"), ((), "HEAD")):
            client = await RawClient.open(proxy.port)
            answer = await client.ask(get(address, *fields, method=method), head_only=method == "HEAD")
            assert answer is not None
            assert (answer.status, answer.header("retry-after") is not None) == (503, True)
            client.close()
        events = await ask(proxy.port, get(address, "Accept: text/event-stream"))
        assert (events.status, events.complete, events.body.startswith(b"retry: ")) == (200, False, True)
        assert proxy.metric("followers") == 1
        reader.reset()
        await until(lambda: proxy.metric("followers") == 0)
        again = await reading(proxy, address, b"first ")
        tap.end(LAST_CHUNK)
        await asyncio.wait_for(again.reader.readuntil(LAST_CHUNK), 10)
        again.close()
    assert len(upstream.received) == 1


async def test_a_damaged_record_is_named_so(replicas, upstream, valkey):
    """As for a duplicate, whatever way it is read: the operator has to look at it, and nobody gets a byte of it."""
    [proxy] = replicas(1, valkey.url, RECORD_LAYOUT="hash")
    address = await complete(proxy, upstream, b"x" * 100)
    with valkey.client() as client:
        (name,) = client.scan_iter("once:{*")
        client.hset(name, "b0", b"y" * 100)
    for fields in ((), ("Range: bytes=3-",), ("Accept: text/event-stream",)):
        answer = await ask(proxy.port, get(address, *fields))
        assert (answer.status, answer.slug) == (500, "record-corrupt"), fields
        assert answer.header("content-security-policy") == b"sandbox"
    assert proxy.metric('requests_total{outcome="record_corrupt"}') == 3


async def test_a_complete_response_is_read_through_a_drain(replicas, upstream, valkey):
    """On a connection that is open, until the worker ends; what still comes is for another replica."""
    one, two = replicas(2, valkey.url, DRAIN_DELAY_S=0)
    address = await complete(one, upstream, b"x" * 3_000_000, key="key-2")
    async with begun(two, upstream, b"first ") as (_, coming):
        slow, clients = await lazy(one.port), [await RawClient.open(one.port) for _ in range(2)]
        slow.writer.write(get(address))
        await until(lambda: one.metric("followers") == 1)
        one.signal(signal.SIGTERM)
        await until(lambda: one.admin("/readyz")[0] == 503)
        whole, refused = [await client.ask(get(path)) for client, path in zip(clients, (address, coming), strict=True)]
        assert (whole.status, whole.body, whole.complete) == (200, b"x" * 3_000_000, True)
        assert (refused.status, refused.slug) == (503, "overloaded")
        slow.writer.transport.resume_reading()
        answer = await read_answer(slow.reader)
        assert (answer.body == whole.body, answer.complete) == (True, True)
        for client in (slow, *clients):
            client.close()
        assert one.process.wait(20) == 0


# Events ...


async def test_events_go_on_behind_each_id(replicas, upstream, store):
    """On the same and on another replica, while they come and later; and behind the last there is nothing."""
    one, two = replicas(2, store.url)
    words = b"one", b"zw\xc3\xb6lf", b"three"
    events = [b"id: %d\ndata: %s\n\n" % (number, word) for number, word in enumerate(words)]
    clients = [await RawClient.open(proxy.port) for proxy in (one, two)]
    async with begun(one, upstream, *events[:2], head=SSE) as (tap, address):
        readers = [
            asyncio.ensure_future(ask(proxy.port, get(address, f"Last-Event-ID: {number}")))
            for proxy in (one, two)
            for number in range(3)
        ]
        await asyncio.sleep(0.3)
        tap.end(chunk(events[2]), LAST_CHUNK)
        for at, reader in enumerate(readers):
            answer = await reader
            if at % 3 == 2:  # it came while the reader waited for this very event
                assert (answer.status, answer.body) in ((204, b""), (200, b""))
            else:
                assert (answer.status, answer.complete, answer.body) == (200, True, b"".join(events[at % 3 + 1 :]))
        for client in clients:
            for number in range(3):
                answer = await client.ask(get(address, f"Last-Event-ID: {number}"))
                assert answer is not None
                rest = b"".join(events[number + 1 :])
                assert (answer.status, answer.body) == (200 if rest else 204, rest)
                assert {name: answer.header(name) for name in SAFE} == SAFE
                assert answer.header("etag") is None
            answer = await client.ask(get(address, "Last-Event-ID: 9"))
            assert answer is not None
            assert (answer.status, json.loads(answer.body)["reason"]) == (410, "unknown-id")
            client.close()
    assert upstream.received[0].header("accept-encoding") == [b"identity"]


# Durable Streams ...


async def test_a_stream_is_resumed_at_every_byte(replicas, upstream, store):
    """By offset, on the same and on another replica, while it comes and later."""
    one, two = replicas(2, store.url)
    body = b"data: one\n\ndata: zw\xc3\xb6lf\n\n"
    async with begun(one, upstream, body, head=SSE) as (tap, address):
        token = CAPABILITIES.read(address.rpartition("/")[2].encode()).token
        clients = [await RawClient.open(proxy.port) for proxy in (one, two)]
        await has_come(two, address, len(body))
        for is_closed in (False, True):
            for at in range(len(body) + 1):
                for client in clients:
                    answer = await client.ask(get(f"{address}?offset={offset_at(at, token)}"))
                    assert answer is not None
                    assert (answer.status, answer.body, answer.header("content-type")) == (
                        200,
                        body[at:],
                        b"text/plain; charset=utf-8",
                    )
                    assert answer.header("stream-next-offset") == offset_at(len(body), token).encode()
                    assert answer.header("stream-up-to-date") == b"true"
                    assert (answer.header("stream-closed") == b"true") == is_closed
            tap.end(LAST_CHUNK)
            await until(lambda: one.metric('requests_total{outcome="executed"}') == 1)
        for client in clients:
            client.close()


async def test_a_long_poll_waits_for_more(replicas, upstream, store):
    """And answers at once where the stream has ended."""
    one, two = replicas(2, store.url)
    async with begun(one, upstream, b"first ") as (tap, address):
        for proxy, size, more in ((one, 6, b"second "), (two, 13, b"third ")):
            await has_come(proxy, address, size)
            now = await ask(proxy.port, get(f"{address}?offset=now"))
            assert (now.status, now.body) == (200, b"")
            offset = now.header("stream-next-offset").decode()
            poll = asyncio.ensure_future(ask(proxy.port, get(f"{address}?offset={offset}&live=long-poll")))
            await asyncio.sleep(0.2)
            assert not poll.done()
            tap.send(chunk(more))
            answer = await poll
            assert (answer.status, answer.body) == (200, more)
            assert int(answer.header("stream-cursor")) > 0
        offset = answer.header("stream-next-offset").decode()
        tap.end(LAST_CHUNK)
        for proxy in (one, two):
            answer = await ask(proxy.port, get(f"{address}?offset={offset}&live=long-poll"))
            assert (answer.status, answer.header("stream-closed"), answer.header("stream-up-to-date")) == (
                204,
                b"true",
                b"true",
            )


async def test_offsets_of_another_stream_are_refused(replicas, upstream, valkey):
    [proxy] = replicas(1, valkey.url)
    address = await complete(proxy, upstream, b"one")
    other = await complete(proxy, upstream, b"two", key="key-2")
    theirs = (await ask(proxy.port, get(f"{other}?offset=-1"))).header("stream-next-offset").decode()
    beyond = offset_at(99, CAPABILITIES.read(address.rpartition("/")[2].encode()).token)
    for query in (
        f"offset={theirs}",
        f"offset={beyond}",
        "offset=0",
        "offset=",
        "live=sse",
        "offset=-1&live=x",
        "offset=0,1",
    ):
        answer = await ask(proxy.port, get(f"{address}?{query}"))
        assert (answer.status, answer.header("stream-next-offset")) == (400, None), query


# Who may, and who is told nothing ...


async def test_nobody_is_told_anything_about_an_address_that_was_not_given(replicas, upstream, valkey, tmp_path):
    """Forged, cut, of another secret or another purpose: the same answer. The API never sees one."""
    [proxy] = replicas(1, valkey.url)
    address = await complete(proxy, upstream, b"private")
    text = address.rpartition("/")[2].encode()
    mine = CAPABILITIES.read(text)
    other = Capabilities(Digests(b"another secret of many").capability_key)
    texts = [
        text[:-1], text[:-1] + b"_", text + b"A", b"%%%02x" % text[0] + text[1:], b"", text[:40], other.write(mine),
        CAPABILITIES.write(mine._replace(purpose=b"x")), CAPABILITIES.write(mine._replace(purpose=b"c")),
        CAPABILITIES.write(mine._replace(rule=b"none")),
        text + b"/", b"./" + text, b"x/../" + text,
    ]  # fmt: skip
    answers = [await ask(proxy.port, get(f"/.oncegate/streams/{one.decode()}")) for one in texts]
    bodies = {(answer.status, answer.body) for answer in answers}
    assert {status for status, _ in bodies} == {404}
    assert len(bodies) == 1
    for path in (
        "/.oncegate",
        "/.oncegate/",
        "/.oncegate/x",
        "/%2Eoncegate/streams/" + text.decode(),
        "//.oncegate/streams/" + text.decode(),
        "/x/../.oncegate/streams/" + text.decode(),
        "/.ONCEGATE/streams/" + text.decode(),
        "http://api.test/.oncegate/nothing",
    ):
        for method in ("GET", "POST", "OPTIONS"):
            answer = await ask(proxy.port, get(path, method=method))
            assert (answer.status, b"private" in answer.body) == (404, False)
    for gone in (
        mine._replace(token=b"x" * 16),
        mine._replace(key=b"x" * 24),
        mine._replace(expires_s=int(time.time())),
    ):
        answer = await ask(proxy.port, get(f"/.oncegate/streams/{CAPABILITIES.write(gone).decode()}"))
        assert (answer.status, b"private" in answer.body) == (410, False)
    for method in ("POST", "PUT", "DELETE", "PATCH", "PURGE"):
        answer = await ask(proxy.port, get(address, method=method))
        assert (answer.status, answer.header("allow")) == (405, b"OPTIONS, GET, HEAD")
    assert (await ask(proxy.port, get(f"http://api.test{address}"))).body == b"private"
    assert (await ask(proxy.port, get(address, "Host: other.test"))).status == 400
    client = await RawClient.open(proxy.port)
    expecting = await client.ask(get(address, "Expect: 100-continue", "Content-Length: 5", method="POST"))
    assert expecting is not None
    assert (expecting.status, expecting.header("connection")) == (405, b"close")
    client.reset()
    await until(lambda: proxy.metric("client_open_connections") == 0)
    assert len(upstream.received) == 1
    proxy.stop()
    assert text.decode()[:20] not in proxy.log()
    assert text.decode()[20:60] not in proxy.log()
    paths = {line.get("path") for line in proxy.events("request")}
    assert "/.oncegate/streams/..." in paths


async def test_an_address_of_a_former_rule_does_not_reach_the_api(proxies, upstream, valkey, tmp_path):
    """A reload may leave no rule with addresses: those that were given away are nobody else's, and in no log."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "a"\nresumable = true\n')
    proxy = proxies(upstream, valkey.url, RULES_FILE=rules, SECRET=SECRET, ACCESS_LOG="all")
    answer = await ask(proxy.port, request(key="former"))
    address = re.search(rb"<([^>]+)>", answer.header("link") or b"")[1].decode()
    assert (await ask(proxy.port, get(address))).status == 200
    rules.write_text('[[rule]]\nname = "a"\n')
    proxy.signal(signal.SIGHUP)
    await until(lambda: proxy.events("reloaded"))
    assert (await ask(proxy.port, get(address))).status == 404
    assert len(upstream.received) == 1
    proxy.stop()
    assert address.rpartition("/")[2] not in proxy.log()


async def test_only_what_is_stored_has_an_address(replicas, upstream, valkey):
    """Not what passes through, and not what another rule guards. The path is the API's where no rule uses it."""
    [proxy] = replicas(1, valkey.url)
    for raw in (get("/v1/x"), request(key=None), request(target="/other/x", key="a"), request(target="/x", key="b")):
        answer = await ask(proxy.port, raw)
        assert (answer.status, answer.header("link")) == (200, None)
    [plain] = replicas(1, valkey.url, RULES_FILE="")
    assert (await ask(plain.port, get("/.oncegate/streams/x"))).body == b"ok"


async def test_addresses_lead_through_the_proxies_in_front(replicas, upstream, valkey):
    [near, far] = replicas(1, valkey.url, TRUSTED_PROXIES="127.0.0.1") + replicas(
        1, valkey.url, PUBLIC_BASE="https://api.test/base/", OWN_PATH="/a/own-path/"
    )
    answer = await ask(near.port, request(key="a", target="/v1/x", body=b"1"))
    assert address_of(answer).startswith("/.oncegate/streams/")
    prefixed = await ask(near.port, request("POST", "/v1/x", "b", b"1", "X-Forwarded-Prefix: /outer"))
    assert address_of(prefixed).startswith("/outer/.oncegate/streams/")
    answer = await ask(far.port, request("POST", "/v1/x", "c", b"1", "X-Forwarded-Prefix: /outer"))
    address = address_of(answer)
    assert address.startswith("https://api.test/base/a/own-path/streams/")
    assert (await ask(far.port, get(address.removeprefix("https://api.test/base")))).body == b"ok"


async def test_pages_of_listed_origins_may_read(replicas, upstream, valkey):
    [proxy] = replicas(1, valkey.url)
    address = await complete(proxy, upstream, b"text")
    for origin, granted in (("https://shop.test", b"https://shop.test"), ("https://evil.test", None)):
        answer = await ask(proxy.port, get(address, f"Origin: {origin}"))
        assert (answer.status, answer.header("access-control-allow-origin")) == (200, granted)
        assert b"Origin" in answer.header("vary")
        preflight = await ask(
            proxy.port,
            get(
                address,
                f"Origin: {origin}",
                "Access-Control-Request-Method: GET",
                "Access-Control-Request-Headers: if-none-match,range",
                method="OPTIONS",
            ),
        )
        assert (preflight.status, preflight.header("access-control-allow-origin")) == (204, granted)
    plain = await ask(proxy.port, get(address, method="OPTIONS"))
    assert (plain.status, plain.header("allow")) == (204, b"OPTIONS, GET, HEAD")
    assert len(upstream.received) == 1


async def test_an_event_source_comes_again_where_the_answer_is_not_final(replicas, upstream, own_valkey):
    """One status that is no success would end it for good."""
    [proxy] = replicas(1, own_valkey.url, LEASE_MS=300, STORE_TIMEOUT_MS=200)
    address = await complete(proxy, upstream, b"data: x\n\n", b"text/event-stream")
    own_valkey.kill()
    answer = await ask(proxy.port, get(address, "Accept: text/event-stream"))
    assert (answer.status, answer.complete, answer.body) == (200, False, b"retry: 1000\n\n")
    answer = await ask(proxy.port, get(address))
    assert (answer.status, answer.header("retry-after")) == (503, b"1")


async def test_the_stored_response_of_an_address_has_no_cookies_and_its_own_status(replicas, upstream, valkey):
    [proxy] = replicas(1, valkey.url)
    upstream.script = answering(
        b"HTTP/1.1 201 Created\r\nSet-Cookie: a=b\r\nCache-Control: max-age=9\r\n"
        b'ETag: "x"\r\nContent-Length: 2\r\n\r\nok'
    )
    executed = await ask(proxy.port, request())
    answer = await ask(proxy.port, get(address_of(executed)))
    assert (answer.status, answer.body, answer.header("set-cookie")) == (201, b"ok", None)
    assert (answer.header("cache-control"), answer.header("etag") != b'"x"') == (b"private, no-store", True)


# Stopping ...


async def test_an_execution_is_stopped_at_its_other_address(replicas, upstream, store):
    """From another replica: the upstream's connection is closed, the readers are broken off, and no retry executes."""
    one, two = replicas(2, store.url)
    is_closed = asyncio.Event()

    async def script(_, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, __) -> None:
        writer.write(CHUNKED + chunk(b"first "))
        await reader.read()
        is_closed.set()

    upstream.script = script
    raw = request(target="/stoppable/x")
    client = await RawClient.open(one.port)
    client.writer.write(raw)
    head = await client.reader.readuntil(b"\r\n\r\n")
    address, stop = address_in(head), address_in(head, "cancel")
    reader = await reading(two, address, b"first ")
    assert (await ask(two.port, get(address, method="DELETE"))).status == 405
    assert (await ask(two.port, get(stop))).status == 405
    stopped = await ask(two.port, get(stop, method="DELETE"))
    assert (stopped.status, json.loads(stopped.body)) == (202, {"outcome": "in_flight"})
    assert await is_broken_off(reader)
    await asyncio.wait_for(is_closed.wait(), 5)
    client.close()

    async def is_unknown() -> bool:
        said = await ask(two.port, get(stop, method="DELETE"))
        return (said.status, json.loads(said.body)) == (200, {"outcome": "unknown", "reason": "cancelled"})

    async with asyncio.timeout(5):
        while not await is_unknown():
            await asyncio.sleep(0.05)
    retried = await ask(two.port, raw)
    assert (retried.status, json.loads(retried.body)["reason"]) == (409, "cancelled")
    assert len(upstream.received) == 1


async def test_what_is_complete_cannot_be_stopped(replicas, upstream, valkey):
    [proxy] = replicas(1, valkey.url)
    raw = request(target="/stoppable/x")
    links = [value for name, value in (await ask(proxy.port, raw)).headers if name.lower() == b"link"]
    stop = links[1].partition(b">")[0][1:].decode()
    assert (await ask(proxy.port, get(stop, method="DELETE"))).status == 409
    assert (await ask(proxy.port, raw)).header("oncegate-status") == b"replayed"
    gone = CAPABILITIES.read(stop.rpartition("/")[2].encode())._replace(token=b"x" * 16)
    address = f"/.oncegate/streams/{CAPABILITIES.write(gone).decode()}"
    assert (await ask(proxy.port, get(address, method="DELETE"))).status == 410
