"""A duplicate that joins its running original: every byte once, an end only if it was one, and nothing at its cost."""

import asyncio
import gzip
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from oncegate.streams.feed import FeedEnd
from tests.e2e.test_operate import Desk
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Proxy,
    RawClient,
    Tap,
    ask,
    chunk,
    holding,
    lazy,
    read_answer,
    request,
    rest,
    until,
)

SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
EVENTS = [b"event: step\nid: %02d\ndata: one of many\n\n" % number for number in range(12)]
BODY = b"".join(EVENTS)
LEASE_MS = 1000
ORIGINAL = request()
PLACES = ["same worker", "other replica"]


CLIENTS: list[RawClient] = []


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Close the clients of a test."""
    yield
    while CLIENTS:
        client = CLIENTS.pop()
        client.close()
        client.writer.transport.abort()


async def begun(port: int, raw: bytes) -> RawClient:
    """Send a request, and return its client."""
    client = await RawClient.open(port)
    CLIENTS.append(client)
    client.writer.write(raw)
    return client


async def answered(client: RawClient, seconds: float = 20) -> Answer:
    """Return the answer of a client that has asked."""
    async with asyncio.timeout(seconds):
        answer = await read_answer(client.reader)
    assert answer is not None
    return answer


async def has(client: RawClient, text: bytes) -> None:
    """Wait until a client has got a text, and leave what it got where it is."""
    async with asyncio.timeout(20):
        client.reader._buffer[:0] = await client.reader.readuntil(text)


class Stream:
    """An answer that a test sends event by event to one request, on `owner`; others join on `other`."""

    def __init__(self, owner: Proxy, other: Proxy, tap: Tap, first: RawClient, begins: bytes) -> None:
        self.owner, self.other, self.tap, self.first, self._begins = owner, other, tap, first, begins

    async def joined(self, raw: bytes = ORIGINAL, begins: bytes = b"") -> RawClient:
        """Return one more client, once it has got the beginning of the body."""
        client = await begun(self.other.port, raw)
        await has(client, begins or self._begins)
        return client


Streams = Callable[..., Awaitable[Stream]]


@pytest.fixture(params=PLACES)
def stream(request: pytest.FixtureRequest, proxies, upstream, valkey) -> Streams:
    """Return a function that begins an answer on proxies with these settings."""

    async def start(
        head: bytes = SSE, begins: bytes = EVENTS[0], framed: Callable[[bytes], bytes] = chunk, **settings: object
    ) -> Stream:
        settings = {"ON_DUPLICATE": "join", "LEASE_MS": LEASE_MS} | settings
        store_url, tap = str(settings.pop("STORE_URL", valkey.url)), Tap()
        upstream.script = tap.script
        owner = proxies(upstream, store_url, **settings)
        other = owner if request.param == PLACES[0] else proxies(upstream, store_url, **settings)
        first = await begun(owner.port, ORIGINAL)
        tap.send(head, framed(begins))
        await has(first, begins)
        return Stream(owner, other, tap, first, begins)

    return start


elsewhere = pytest.mark.parametrize("stream", PLACES[1:], indirect=True)


@pytest.mark.parametrize("place", PLACES)
async def test_a_duplicate_gets_every_byte_so_far_and_the_rest_as_it_comes(proxies, upstream, stored, place):
    """Whenever it joins, it gets the original's head and bytes, and its end."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, stored.url, ON_DUPLICATE="join")
    other = proxy if place == "same worker" else proxies(upstream, stored.url, ON_DUPLICATE="join")
    first = await begun(proxy.port, request())
    await until(lambda: upstream.received)
    readers = [await begun(other.port, request())]
    tap.send(SSE)
    for event in EVENTS:
        tap.send(chunk(event))
        readers.append(await begun(other.port, request()))
        await has(readers[-1], b"\r\n\r\n")
    tap.end(LAST_CHUNK)
    answers = await asyncio.gather(*map(answered, readers))
    original = await answered(first)
    assert len(upstream.received) == 1
    assert {(one.status, one.body, one.complete) for one in (original, *answers)} == {(200, BODY, True)}
    assert {one.header("oncegate-status") for one in answers} == {b"joined"}
    assert {one.header("content-type") for one in answers} == {b"text/event-stream"}
    assert (await ask(other.port, request())).header("oncegate-status") == b"replayed"
    assert other.metric('duplicates_suppressed_total{outcome="joined"}') == len(answers)
    assert other.metric("upstream_seconds_saved_total") > 0
    assert (other.metric("followers"), other.metric("in_flight"), other.metric("buffered_bytes")) == (0, 0, 0)


async def test_each_event_reaches_a_follower_before_the_next_is_sent(stream):
    """Also those of an original whose client has left."""
    one = await stream()
    client = await one.joined()
    one.first.reset()
    for event in EVENTS[1:]:
        one.tap.send(chunk(event))
        await has(client, event)
    one.tap.end(LAST_CHUNK)
    answer = await answered(client)
    assert (answer.body, answer.complete, answer.header("oncegate-status")) == (BODY, True, b"joined")


async def test_a_client_asks_for_it(stream, upstream, valkey):
    """`Prefer: join` joins where the settings refuse, and the answer says so. `wait` is for the head alone."""
    raw = request("POST", "/v1/charges", "key-1", b'{"amount": 1}', "Prefer: wait=0, join")
    one = await stream(ON_DUPLICATE="reject")
    assert (await ask(one.other.port, request())).status == 409
    await until(valkey.has_body)
    client = await one.joined(raw)
    one.tap.end(LAST_CHUNK)
    answer = await answered(client)
    assert (answer.body, answer.complete, answer.header("oncegate-status")) == (EVENTS[0], True, b"joined")
    applied = [value for name, value in answer.headers if name == b"Preference-Applied"]
    assert sorted(applied) == [b"join", b"wait=0"]
    upstream.script = holding(asyncio.Event())
    first = await begun(one.owner.port, request(key="key-2"))
    await until(lambda: len(upstream.received) == 2)
    again = await ask(one.other.port, request("POST", "/v1/charges", "key-2", b'{"amount": 1}', "Prefer: wait=0, join"))
    assert (again.status, again.slug) == (409, "in-flight")
    first.reset()


@elsewhere
async def test_another_request_never_learns_that_it_runs(stream):
    """A duplicate with another body gets 422, and not a byte."""
    one = await stream()
    answer = await ask(one.other.port, request(body=b'{"amount": 2}'))
    assert (answer.status, answer.slug) == (422, "key-reused")
    one.tap.end(LAST_CHUNK)


async def test_what_breaks_at_the_api_breaks_for_all(stream, upstream):
    """A follower of a response that is cut at its source gets no clean end, and a retry learns what became of it."""
    one = await stream()
    client = await one.joined()
    for writer in upstream.writers:
        writer.transport.abort()
    for reader in (client, one.first):
        answer = await answered(reader)
        assert (answer.body, answer.complete) == (EVENTS[0], False)
    assert (await ask(one.other.port, request())).slug == "outcome-unknown"
    # Its line says why, and is no warning about the API: the original's is one.
    [line] = [line for line in one.other.events("request") if line["outcome"] == "broken_off"]
    assert (line["client_gone"], line["reason"]) == (False, FeedEnd.BROKEN.label)
    assert one.other.events("upstream failed") == []


@pytest.mark.fault(71)
async def test_what_grows_too_large_breaks_its_followers_alone(stream):
    """From the moment a response is no longer stored its followers are cut off; its own client gets all of it."""
    one = await stream(MAX_STORED_BYTES=3000, LEASE_MS=60_000)
    client = await one.joined()
    one.tap.send(chunk(b"x" * 4000))
    async with asyncio.timeout(5):
        answer = await answered(client)
    assert (answer.complete, answer.body) == (False, EVENTS[0])
    late = await ask(one.owner.port, request())
    assert (late.status, late.slug) == (409, "response-not-kept")
    assert "still running" in late.problem["detail"]
    one.tap.end(LAST_CHUNK)
    whole = await answered(one.first)
    assert (whole.body, whole.complete) == (EVENTS[0] + b"x" * 4000, True)
    assert (await ask(one.other.port, request())).slug == "response-not-kept"


async def test_what_is_too_large_from_its_head_on_says_so(proxies, upstream, valkey):
    """A duplicate of a response whose length is over the limit learns at once that it gets none."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url, ON_DUPLICATE="join", MAX_STORED_BYTES=3000)
    first = await begun(proxy.port, request())
    await until(lambda: upstream.received)
    waiting = await begun(proxy.port, request())
    await until(lambda: proxy.metric("waiting") == 1)
    tap.send(b"HTTP/1.1 201 Created\r\nContent-Length: 80000\r\n\r\n", b"x" * 70000)
    for answer in (await answered(waiting), await ask(proxy.port, request())):
        assert (answer.status, answer.slug, answer.problem["original_status"]) == (409, "response-not-kept", 201)
    tap.end(b"x" * 10000)
    assert (await answered(first)).complete


@pytest.mark.fault(73)
async def test_a_drain_breaks_followers_off(stream):
    """It does not wait for them, and counts none as cut off; the original's own client gets the end."""
    one = await stream()
    client = await one.joined()
    stuck = await one.joined()
    stuck.writer.transport.pause_reading()
    one.other.signal(signal.SIGTERM)
    answer = await answered(client)
    assert (answer.body, answer.complete) == (EVENTS[0], False)
    one.tap.end(LAST_CHUNK)
    assert (await answered(one.first)).complete
    stuck.close()
    assert one.other.process.wait(20) == 0
    assert [line["cut_off"] for line in one.other.events("stopped") if "cut_off" in line] in ([], [0])


async def test_a_worker_that_is_replaced_breaks_followers_off(proxies, upstream, valkey):
    """They join again at its successor; the original's client gets the end from the old worker."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url, ON_DUPLICATE="join", WORKERS=2)
    first = await begun(proxy.port, ORIGINAL)
    tap.send(SSE, chunk(EVENTS[0]))
    await has(first, EVENTS[0])
    followers = [await begun(proxy.port, ORIGINAL) for _ in range(4)]
    for one in followers:
        await has(one, EVENTS[0])
    proxy.signal(signal.SIGUSR2)
    answers = await asyncio.gather(*map(answered, followers))
    assert {(one.body, one.complete) for one in answers} == {(EVENTS[0], False)}
    await until(lambda: proxy.events("workers replaced"), 30)
    again = await begun(proxy.port, ORIGINAL)
    await has(again, EVENTS[0])
    tap.end(*map(chunk, EVENTS[1:]), LAST_CHUNK)
    for answer in (await answered(again), await answered(first)):
        assert (answer.body, answer.complete) == (BODY, True)
    assert len(upstream.received) == 1


@elsewhere
@pytest.mark.fault(68)
async def test_a_killed_owner_breaks_followers_off(stream):
    """Within a lease and a second, and never cleanly; the key is unknown."""
    one = await stream()
    client = await one.joined()
    one.owner.kill()
    killed_s = time.monotonic()
    answer = await answered(client)
    assert (answer.body, answer.complete) == (EVENTS[0], False)
    assert time.monotonic() - killed_s < LEASE_MS / 1000 + 3
    assert (await ask(one.other.port, request())).slug == "outcome-unknown"


async def test_a_release_by_an_operator_breaks_followers_off(stream, valkey, upstream, tmp_path: Path):
    """What runs under the key next is another execution: nobody gets bytes of both."""
    one = await stream(ON_UNKNOWN="retry")
    client = await one.joined()
    keys = Desk(valkey.url, tmp_path)
    [key] = await keys.listed("--state", "in_flight")
    await keys("release", "--id", key["id"], "--yes")
    one.tap.send(chunk(EVENTS[1]))
    answer = await answered(client)
    assert not answer.complete
    assert BODY.startswith(answer.body)
    upstream.script = holding(asyncio.Event(), OK)


@elsewhere
@pytest.mark.fault(69)
async def test_a_takeover_breaks_followers_off(stream, upstream):
    """A second execution under the key gives its bytes to none of the first one's readers."""
    one = await stream(ON_UNKNOWN="retry")
    client = await one.joined()
    one.owner.signal(signal.SIGSTOP)
    try:
        answer = await answered(client)
        assert (answer.body, answer.complete) == (EVENTS[0], False)
        second = Tap()
        upstream.script = second.script
        taking = await begun(one.other.port, request())
        second.send(SSE, chunk(b"another execution\n\n"))
        await has(taking, b"another execution\n\n")
        joined = await one.joined(begins=b"another execution\n\n")
        second.end(LAST_CHUNK)
        for reader in (taking, joined):
            answer = await answered(reader)
            assert (answer.body, answer.complete) == (b"another execution\n\n", True)
    finally:
        one.owner.signal(signal.SIGCONT)


@pytest.mark.fault(69)
async def test_a_record_that_vanishes_breaks_followers_off(stream, valkey):
    """A store that has forgotten the key confirms no end of it."""
    one = await stream()
    client = await one.joined()
    valkey.forget()
    one.tap.send(chunk(EVENTS[1]))
    answer = await answered(client)
    assert not answer.complete
    assert BODY.startswith(answer.body)
    one.tap.end(LAST_CHUNK)


@elsewhere
@pytest.mark.fault(70)
async def test_a_silent_store_breaks_followers_off(stream, own_valkey):
    """After a lease and a second: cleanly refused before the first byte, cut off behind it."""
    one = await stream(STORE_URL=own_valkey.url, STORE_TIMEOUT_MS=200, WAIT_MAX_S=60, LEASE_MS=400)
    client = await one.joined()
    own_valkey.pause()
    try:
        answer = await answered(client)
        assert (answer.body, answer.complete) == (EVENTS[0], False)
    finally:
        own_valkey.resume()
        one.tap.end(LAST_CHUNK)


@pytest.mark.parametrize("stream", PLACES[:1], indirect=True)
@pytest.mark.parametrize("comes_back", [True, False], ids=["for a while", "for good"])
async def test_a_silent_store_is_no_matter_beside_the_original(stream, own_valkey, comes_back):
    """A follower in its worker reads on from memory for as long as the original's client does, and ends like it."""
    one = await stream(STORE_URL=own_valkey.url, STORE_TIMEOUT_MS=200, LEASE_MS=400, SETTLE_TIMEOUT_S=3)
    client = await one.joined()
    own_valkey.pause()
    try:
        # For longer than a follower elsewhere would wait, which is a lease and a second.
        for number in range(6):
            one.tap.send(chunk(b"data: %d\n\n" % number))
            await has(one.first, b"data: %d\n\n" % number)
            await has(client, b"data: %d\n\n" % number)
            await asyncio.sleep(0.25)
        if comes_back:
            own_valkey.resume()
            one.tap.end(LAST_CHUNK)
        answers = await asyncio.gather(answered(client), answered(one.first))
    finally:
        own_valkey.resume()
    assert [answer.complete for answer in answers] == [comes_back] * 2
    assert answers[0].body == answers[1].body
    if not comes_back:
        [line] = [line for line in one.owner.events("request") if line["outcome"] == "broken_off"]
        assert line["reason"] == FeedEnd.UNSTORED.label


@elsewhere
async def test_a_silent_store_refuses_who_waits_for_the_head(stream, own_valkey, upstream):
    """It cannot say any more whether the original runs: 503, also of one that may wait for long."""
    one = await stream(STORE_URL=own_valkey.url, STORE_TIMEOUT_MS=200, WAIT_MAX_S=60, LEASE_MS=400)
    upstream.script = holding(asyncio.Event())
    await begun(one.owner.port, request(key="key-2"))
    await until(lambda: len(upstream.received) == 2)
    waiting = await begun(one.other.port, request(key="key-2"))
    await until(lambda: one.other.metric("waiting") == 1)
    own_valkey.pause()
    try:
        answer = await answered(waiting)
        assert (answer.status, answer.slug) == (503, "store-unavailable")
    finally:
        own_valkey.resume()


@elsewhere
async def test_a_follower_gets_signs_of_life(stream, tmp_path: Path):
    """In silence, as its original's client does, and never within an event."""
    rule = '[[rule]]\nname = "llm"\npath = "/v1/**"\non_duplicate = "join"\nheartbeat_s = 0.1\n'
    (tmp_path / "rules.toml").write_text(rule)
    one = await stream(RULES_FILE="rules.toml")
    client = await one.joined()
    await has(client, b":\n\n")
    one.tap.send(chunk(b"data: ha"))
    await has(client, b"data: ha")
    late = await one.joined(begins=b"data: ha")
    await asyncio.sleep(0.5)
    one.tap.end(chunk(b"lf\n\n"), LAST_CHUNK)
    for reader in (client, late):
        answer = await answered(reader)
        assert b"data: half\n\n" in answer.body
        assert (answer.complete, answer.body.replace(b":\n\n", b"")) == (True, EVENTS[0] + b"data: half\n\n")


async def test_followers_have_places_of_their_own(stream):
    """Over the limit a duplicate waits for the end; one tenant has a quarter of the places."""
    one = await stream(MAX_FOLLOWERS=4, MAX_IN_FLIGHT=3)
    client = await one.joined()
    assert (one.other.metric("followers"), one.other.metric("waiting")) == (1, 0)
    waiting = await begun(one.other.port, request())
    await until(lambda: one.other.metric("waiting") == 1)
    one.tap.end(LAST_CHUNK)
    assert (await answered(client)).header("oncegate-status") == b"joined"
    assert (await answered(waiting)).header("oncegate-status") == b"replayed"


async def test_a_slow_follower_costs_the_owner_nothing(stream, valkey):
    """The original's client gets all of a large response while a follower reads nothing; then that gets it, too."""
    body = b"".join(b"%08d" % number for number in range(1_000_000))
    one = await stream(CHUNKED, body[:8000])
    await until(valkey.has_body)
    slow = await lazy(one.other.port)
    CLIENTS.append(slow)
    slow.writer.write(request())
    await until(lambda: one.other.metric("followers") == 1)
    for begin in range(8000, len(body), 64_000):
        one.tap.send(chunk(body[begin : begin + 64_000]))
    one.tap.end(LAST_CHUNK)
    original = await answered(one.first)
    assert (original.body == body, original.complete) == (True, True)
    # Its window, what is on its way to it, and as much again in the connection.
    assert one.other.metric("buffered_bytes") <= 3 * 262_144
    slow.writer.transport.resume_reading()
    answer = await answered(slow)
    assert (answer.body == body, answer.complete, answer.header("oncegate-status")) == (True, True, b"joined")


SIZED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(BODY)
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@elsewhere
async def test_a_stated_length_is_stated(stream):
    """The last byte, which makes the response whole, comes once the store has it."""
    one = await stream(SIZED, framed=bytes)
    client = await one.joined()
    one.tap.end(b"".join(EVENTS[1:]))
    answer = await answered(client)
    assert (answer.header("content-length"), answer.body, answer.complete) == (b"%d" % len(BODY), BODY, True)


@elsewhere
async def test_a_response_that_ends_by_closing_is_chunked(stream, upstream):
    """For a follower the end is one that can be told from a break."""
    one = await stream(UNTIL_CLOSED, framed=bytes)
    client = await one.joined()
    one.tap.end(b"".join(EVENTS[1:]))
    await has(client, EVENTS[-1])
    for writer in upstream.writers:
        writer.write_eof()
    answer = await answered(client)
    assert (answer.header("transfer-encoding"), answer.body, answer.complete) == (b"chunked", BODY, True)


@elsewhere
async def test_a_client_of_http_1_0_gets_the_end_by_closing(stream):
    """A FIN where the response is whole, a reset where it is not."""
    old = ORIGINAL.replace(b"HTTP/1.1", b"HTTP/1.0")
    one = await stream()
    client, other = await one.joined(old), await one.joined(old)
    one.tap.end(*map(chunk, EVENTS[1:]), LAST_CHUNK)
    for reader in (client, other):
        async with asyncio.timeout(20):
            head, _, body = (await reader.reader.read()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert body == BODY


async def test_a_client_of_http_1_0_sees_a_break(stream):
    """It is a reset, not the end."""
    one = await stream()
    client = await one.joined(ORIGINAL.replace(b"HTTP/1.1", b"HTTP/1.0"))
    one.owner.kill()
    with pytest.raises(ConnectionResetError):
        await rest(client)


@elsewhere
async def test_trailers_follow_for_those_who_take_them(stream):
    """As they follow the original, and a replay."""
    one = await stream(SSE.replace(b"\r\n\r\n", b"\r\nTrailer: X-Sum\r\n\r\n"))
    client = await begun(one.other.port, ORIGINAL.replace(b"Host:", b"TE: trailers\r\nConnection: TE\r\nHost:"))
    await has(client, EVENTS[0])
    one.tap.end(b"0\r\nX-Sum: 7\r\n\r\n")
    async with asyncio.timeout(20):
        came = await client.reader.readuntil(b"0\r\nX-Sum: 7\r\n\r\n")
    assert b"Oncegate-Status: joined\r\n" in came
    assert (await answered(await one.joined())).complete


@elsewhere
async def test_a_coded_body_goes_to_those_who_take_it(stream):
    """Any other client waits for the end, and gets it decoded."""
    packed = gzip.compress(BODY)
    one = await stream(SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), packed[:20])
    client = await one.joined(_with("Accept-Encoding: gzip"))
    plain = await begun(one.other.port, _with("Accept-Encoding: identity"))
    await until(lambda: one.other.metric("waiting") == 1)
    one.tap.end(chunk(packed[20:]), LAST_CHUNK)
    joined, replayed = await answered(client), await answered(plain)
    assert (joined.body, joined.header("oncegate-status")) == (packed, b"joined")
    assert (replayed.body, replayed.header("oncegate-status")) == (BODY, b"replayed")


def _with(*lines: str) -> bytes:
    return request("POST", "/v1/charges", "key-1", b'{"amount": 1}', *lines)


@elsewhere
async def test_each_follower_gets_its_own_head(stream):
    """Ids, grants to pages and cookies are those of its own request, as in a replay."""
    head = SSE.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b\r\nX-Api: 1\r\nAge: 7\r\n\r\n")
    one = await stream(head, CORS_ORIGINS="https://a.test,https://b.test")
    client = await one.joined(_with("Origin: https://b.test", "X-Request-Id: mine"))
    one.tap.end(LAST_CHUNK)
    answer, original = await answered(client), await answered(one.first)
    assert answer.header("access-control-allow-origin") == b"https://b.test"
    assert answer.header("oncegate-request-id") == b"mine"
    assert answer.header("x-request-id") == original.header("x-request-id")
    assert answer.header("oncegate-key-id") == original.header("oncegate-key-id")
    assert (answer.header("set-cookie"), answer.header("x-api"), answer.header("age")) == (None, b"1", b"7")
    assert (answer.header("idempotent-replayed"), answer.header("preference-applied")) == (None, None)


LLM = """
[[rule]]
name = "llm"
path = "/v1/**"
preset = "openai"
key = "header:Idempotency-Key"
on_duplicate = "join"
on_client_gone = "cancel"
cancel_grace_s = 0.3
"""
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}}\n\n'


async def test_a_follower_keeps_its_original_alive(stream, tmp_path: Path):
    """Under a rule that ends a request without readers; and the tokens that it saved are counted."""
    (tmp_path / "rules.toml").write_text(LLM)
    one = await stream(RULES_FILE="rules.toml")
    client = await one.joined()
    one.first.reset()
    await asyncio.sleep(1.2)
    one.tap.end(chunk(USAGE), chunk(b"data: [DONE]\n\n"), LAST_CHUNK)
    answer = await answered(client)
    assert (answer.complete, answer.header("oncegate-status")) == (True, b"joined")
    await until(lambda: 'llm_tokens_saved_total{kind="output",rule="llm"} 7.0' in one.other.admin("/metrics")[1])


RPC = """
[[rule]]
name = "rpc"
path = "/rpc"
protocol = "json-rpc"
key = "header:Idempotency-Key"
fingerprint = ["method", "body:/method"]
on_duplicate = "join"
"""


@elsewhere
async def test_a_call_of_json_rpc_waits_for_its_end(stream, upstream, tmp_path: Path):
    """Its messages decide what becomes of its key, so that its bytes are nobody else's before their end."""
    (tmp_path / "rules.toml").write_text(RPC)

    def call(number: int) -> bytes:
        return request("POST", "/rpc", "key-2", b'{"jsonrpc": "2.0", "id": %d, "method": "run"}' % number)

    def message(number: int) -> bytes:
        return b'data: {"jsonrpc": "2.0", "id": %d, "result": 1}\n\n' % number

    proxy = await stream(RULES_FILE="rules.toml")
    first = await begun(proxy.owner.port, call(1))
    await until(lambda: len(upstream.received) == 2)
    again = await begun(proxy.other.port, call(2))
    await until(lambda: proxy.other.metric("waiting") == 1)
    proxy.tap.end(LAST_CHUNK)
    proxy.tap.send(SSE, chunk(message(1)))
    proxy.tap.end(LAST_CHUNK)
    assert (await answered(first)).body == message(1)
    assert (await answered(again)).body == message(2)
