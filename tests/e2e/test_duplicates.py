"""A request whose key is taken: what it gets while the original runs, and for how long afterwards."""

import asyncio
import signal
import socket
from typing import Any

import pytest

from tests.parts import (
    OK,
    Answer,
    RawClient,
    RawUpstream,
    Received,
    answering,
    ask,
    chunk,
    holding,
    read_answer,
    request,
    until,
)

BUSY = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nslow"


RUNNING = "the first request with this key is still running"


def assert_in_flight(answer: Answer, detail: str = RUNNING) -> None:
    """It is the whole answer of the table, with the advice that client libraries obey."""
    assert (answer.status, answer.slug) == (409, "in-flight")
    assert int(answer.header("retry-after") or 0) >= 1
    assert answer.header("x-should-retry") == answer.header("stripe-should-retry") == b"true"
    assert answer.header("oncegate-status") == b"refused"
    problem = answer.problem
    assert (problem["retryable"], problem["reuse_key"], problem["status"]) == (True, True, 409)
    assert problem["title"] == "The first request with this key is still running"
    assert problem["detail"] == problem["error"]["message"] == detail
    assert (problem["error"]["code"], problem["error"]["type"]) == ("in_flight", "idempotency_error")


def count(answers: list[Answer], status: bytes) -> int:
    return sum(answer.header("oncegate-status") == status for answer in answers)


def waiting(*proxies) -> float:
    return sum(proxy.metric("waiting") for proxy in proxies)


@pytest.mark.fault(16)
async def test_two_hundred_at_once_on_two_proxies_are_one_execution(proxies, upstream, stored):
    """Of 200 concurrent duplicates on two proxies one executes; each other gets 409 in-flight or its bytes."""
    upstream.script = answering(OK, delay_s=0.3)
    two = [proxies(upstream, stored.url) for _ in range(2)]
    answers = await asyncio.gather(*[ask(two[n % 2].port, request()) for n in range(200)])
    answers += [await ask(proxy.port, request()) for proxy in two]
    assert len(upstream.received) == 1
    assert count(answers, b"executed") == 1
    assert [answer.body for answer in answers[-2:]] == [b"ok", b"ok"]
    for answer in answers:
        if answer.status == 409:
            assert_in_flight(answer)
        else:
            assert (answer.status, answer.reason, answer.body) == (200, b"OK", b"ok")


async def test_all_that_wait_get_the_bytes_of_the_one_execution(proxies, upstream, stored):
    """With `wait`, 120 duplicates on two proxies are held and all get the original's answer."""
    done = asyncio.Event()
    upstream.script = holding(done)
    two = [proxies(upstream, stored.url, ON_DUPLICATE="wait") for _ in range(2)]
    asks = [asyncio.ensure_future(ask(two[n % 2].port, request())) for n in range(120)]
    await until(lambda: waiting(*two) == 119, 30)
    done.set()
    answers = await asyncio.gather(*asks)
    assert len(upstream.received) == 1
    assert {(answer.status, answer.reason, answer.body) for answer in answers} == {(200, b"OK", b"ok")}
    assert (count(answers, b"executed"), count(answers, b"replayed")) == (1, 119)
    assert waiting(*two) == 0


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("most", "keys", "duplicates", "held"),
    [(1024, 1, 70, 64), (3, 2, 2, 3)],
    ids=["64 a key", "MAX_WAITERS a worker"],
)
async def test_waiters_over_a_limit_are_told_at_once(proxies, upstream, store_url, most, keys, duplicates, held):
    """Waiters are limited for each key and each worker; one more gets in-flight without waiting."""
    done = asyncio.Event()
    upstream.script = holding(done)
    proxy = proxies(upstream, store_url, ON_DUPLICATE="wait", MAX_WAITERS=most)
    names = [f"key-{n}" for n in range(keys)]
    originals = [asyncio.ensure_future(ask(proxy.port, request(key=name))) for name in names]
    await until(lambda: len(upstream.received) == keys)
    asks = [asyncio.ensure_future(ask(proxy.port, request(key=name))) for name in names for _ in range(duplicates)]
    await until(lambda: sum(one.done() for one in asks) == keys * duplicates - held)
    assert waiting(proxy) == held
    done.set()
    answers = await asyncio.gather(*asks)
    for answer in answers:
        if answer.status != 200:
            assert_in_flight(answer)
    assert count(answers, b"replayed") == held
    assert proxy.metric('waits_total{end="no_room"}') == keys * duplicates - held
    assert {answer.body for answer in await asyncio.gather(*originals)} == {b"ok"}


@pytest.mark.parametrize(("most", "gone", "key"), [(3, 3, "key-2"), (1024, 64, "key-1")], ids=["worker", "key"])
async def test_waiters_that_closed_shut_nobody_out(proxies, upstream, store_url, most, gone, key):
    """A waiter that closed its side gives its place to one that is still there, over either limit."""
    done = asyncio.Event()
    upstream.script = holding(done)
    proxy = proxies(upstream, store_url, ON_DUPLICATE="wait", MAX_WAITERS=most)
    originals = [asyncio.ensure_future(ask(proxy.port, request(key=name))) for name in ("key-1", "key-2")]
    await until(lambda: len(upstream.received) == 2)
    for _ in range(gone):
        client = await RawClient.open(proxy.port)
        client.writer.write(request())
        await client.writer.drain()
        client.close()
    await until(lambda: waiting(proxy) == gone)
    here = asyncio.ensure_future(ask(proxy.port, request(key=key)))
    await asyncio.sleep(0.3)
    assert not here.done()
    done.set()
    assert ((await here).header("oncegate-status"), (await here).body) == (b"replayed", b"ok")
    await asyncio.gather(*originals)
    await until(lambda: waiting(proxy) == 0)


async def test_a_place_at_another_key_is_no_place_at_this_one(proxies, upstream, store_url):
    """Where 64 wait for a key that are all still there, one that closed elsewhere makes no room for a 65th."""
    done = asyncio.Event()
    upstream.script = holding(done)
    proxy = proxies(upstream, store_url, ON_DUPLICATE="wait", MAX_WAITERS=65)
    originals = [asyncio.ensure_future(ask(proxy.port, request(key=name))) for name in ("key-1", "key-2")]
    await until(lambda: len(upstream.received) == 2)
    closed = await RawClient.open(proxy.port)
    closed.writer.write(request(key="key-2"))
    closed.writer.write_eof()
    here = [asyncio.ensure_future(ask(proxy.port, request())) for _ in range(64)]
    await until(lambda: waiting(proxy) == 65)
    assert_in_flight(await ask(proxy.port, request()))
    assert waiting(proxy) == 65
    done.set()
    assert count(await asyncio.gather(*here), b"replayed") == 64
    answer = await read_answer(closed.reader)
    closed.close()
    assert answer is not None
    assert answer.header("oncegate-status") == b"replayed"  # half-closed, and it gets its answer
    await asyncio.gather(*originals)


async def test_a_declined_original_starts_no_storm(proxies, upstream, stored):
    """When the original gets 429, its waiters get in-flight and none executes; the next try does."""
    done = asyncio.Event()
    upstream.script = holding(done, BUSY)
    two = [proxies(upstream, stored.url, ON_DUPLICATE="wait") for _ in range(2)]
    original = asyncio.ensure_future(ask(two[0].port, request()))
    await until(lambda: upstream.received)
    asks = [asyncio.ensure_future(ask(two[n % 2].port, request())) for n in range(40)]
    await until(lambda: waiting(*two) == 40)
    done.set()
    first = await original
    assert (first.status, first.header("oncegate-status")) == (429, b"released")
    for answer in await asyncio.gather(*asks):
        assert_in_flight(answer, "the first request with this key has ended without a response that is stored")
    assert len(upstream.received) == 1
    assert sum(proxy.metric('waits_total{end="declined"}') for proxy in two) == 40
    upstream.script = answering(OK)
    assert (await ask(two[1].port, request())).header("oncegate-status") == b"executed"


async def test_one_waiter_executes_when_nothing_was_sent(proxies, stored):
    """When the upstream could not be reached, one waiter claims the key and all others get its answer."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))  # refuses until it listens
        port = place.getsockname()[1]
        proxy = proxies(
            f"http://127.0.0.1:{port}", stored.url, ON_DUPLICATE="wait", CONNECT_TIMEOUT_S=1.5, CONNECT_RETRIES=20
        )
        original = asyncio.ensure_future(ask(proxy.port, request()))
        await until(stored.states)
        asks = [asyncio.ensure_future(ask(proxy.port, request())) for _ in range(20)]
        await until(lambda: waiting(proxy) == 20)
        first = await original
        assert (first.status, first.slug) == (502, "upstream-unreachable")
        upstream = RawUpstream()
        await upstream.start(place)
        try:
            answers = await asyncio.gather(*asks)
        finally:
            await upstream.close()
    assert len(upstream.received) == 1
    assert {(answer.status, answer.body) for answer in answers} == {(200, b"ok")}
    assert (count(answers, b"executed"), count(answers, b"replayed")) == (1, 19)


async def test_a_client_may_ask_to_wait(proxies, upstream, store_url):
    """`Prefer: wait=N` holds a duplicate, for WAIT_MAX_S at most, and Preference-Applied says for how long."""
    done = asyncio.Event()
    upstream.script = holding(done)
    proxy = proxies(upstream, store_url, WAIT_MAX_S=1)
    original = asyncio.ensure_future(ask(proxy.port, request("POST", "/", "k", b"1", "Prefer: wait=9")))
    await until(lambda: upstream.received)
    assert_in_flight(await ask(proxy.port, request("POST", "/", "k", b"1")))
    began = asyncio.get_running_loop().time()
    over = await ask(proxy.port, request("POST", "/", "k", b"1", "Prefer: respond-async, wait=600"))
    assert asyncio.get_running_loop().time() - began >= 0.9
    assert_in_flight(over)
    assert over.header("preference-applied") == b"wait=1"
    held = asyncio.ensure_future(ask(proxy.port, request("POST", "/", "k", b"1", "Prefer: wait=1")))
    await until(lambda: waiting(proxy) == 1)
    done.set()
    answer = await held
    assert (answer.status, answer.body, answer.header("preference-applied")) == (200, b"ok", b"wait=1")
    assert (await original).header("preference-applied") is None
    assert len(upstream.received) == 1


SHOWN_RULES = """
[[rule]]
name = "carts"
path = "/carts"
key = "body:/id"
[[rule]]
name = "either"
path = "/either"
key = [["header:X-First"], ["header:X-Second"], ["body:/cart"], ["header:X-Third"]]
[[rule]]
name = "events"
path = "/events"
preset = "github-webhook"
wait_max_s = 0.1
[[rule]]
name = "prompts"
path = "/prompts"
preset = "openai"
wait_max_s = 0.1
"""
CART = b'{"cart": "secret", "id": "secret 2"}'
# Each: the target, the header lines, and the key that the problem shows.
SHOWN = {
    "bare": ("/", ["Idempotency-Key: order-42"], "order-42"),
    "quoted": ("/", ['Idempotency-Key: "<b>&\\\\ \\"x\\""'], '<b>&\\ "x"'),
    "longest": ("/", [f"Idempotency-Key: {'k' * 255}"], "k" * 255),
    "in the body": ("/carts", [], None),
    "first of several": ("/either", ["X-First: one", "X-Second: two"], "one"),
    "second of several": ("/either", ["X-Second: two"], "two"),
    "behind a body": ("/either", ["X-Third: three"], None),
    "joined": ("/events", ["X-GitHub-Delivery: d-1"], None),
    "sent for a prompt": ("/prompts", ["Idempotency-Key: p-1"], "p-1"),
    "derived": ("/prompts", ["x-stainless-retry-count: 1"], None),
}


async def test_the_problem_names_the_key_that_the_client_wrote(proxies, upstream, store_url, tmp_path):
    """The caller's own key is in each problem about it, if it came alone in a header; one from a body never is."""
    done = asyncio.Event()
    upstream.script = holding(done)
    file = tmp_path / "rules.toml"
    file.write_text(SHOWN_RULES)
    proxy = proxies(upstream, store_url, RULES_FILE=file)
    sent = {name: request("POST", target, None, CART, *lines) for name, (target, lines, _) in SHOWN.items()}
    originals = [asyncio.ensure_future(ask(proxy.port, raw)) for raw in sent.values()]
    await until(lambda: len(upstream.received) == len(SHOWN))
    answers = await asyncio.gather(*[ask(proxy.port, raw) for raw in sent.values()])
    shown = {name: answer.problem.get("key") for name, answer in zip(SHOWN, answers, strict=True)}
    assert shown == {name: key for name, (_, _, key) in SHOWN.items()}
    assert not [answer for answer in answers if b"secret" in answer.body]
    reused = await ask(proxy.port, request("POST", "/", None, b"other", "Idempotency-Key: order-42"))
    assert (reused.slug, reused.problem["key"]) == ("key-reused", "order-42")
    done.set()
    await asyncio.gather(*originals)


async def test_a_lost_request_names_its_key(gate, upstream):
    """The problem that the first request itself gets has its key, too: it is what a person gives to the operator."""
    upstream.script = answering(b"HTTP/9.9 200 OK\r\n\r\n")
    lost = await ask(gate.port, request(key="order-43"))
    assert (lost.slug, lost.problem["key"]) == ("upstream-lost", "order-43")


async def test_retry_after_follows_what_such_requests_usually_take(proxies, upstream, store_url, tmp_path):
    """Once a rule's request took 2.1 s, a duplicate of the next one is told to come after what is left of that.

    Each rule has its own times, also where it answers 503 or 429, and they outlive a reload of the rules.
    """
    file = tmp_path / "rules.toml"
    file.write_text(
        "".join(
            f'[[rule]]\nname = "{name}"\npath = "/{name}"\nin_flight_status = {status}\n'
            for name, status in (("slow", 503), ("quick", 429))
        )
    )
    proxy = proxies(upstream, store_url, RULES_FILE=file)
    upstream.script = answering(OK, delay_s=2.1)
    assert (await ask(proxy.port, request(target="/slow", key="slow-1"))).status == 200
    upstream.script = answering(OK)
    assert (await ask(proxy.port, request(target="/quick", key="quick-1"))).status == 200
    proxy.signal(signal.SIGHUP)
    await until(lambda: proxy.events("reloaded"))
    done = asyncio.Event()
    upstream.script = holding(done)
    sent = [request(target=f"/{name}", key=f"{name}-2") for name in ("slow", "quick", "other")]
    originals = [asyncio.ensure_future(ask(proxy.port, raw)) for raw in sent]
    await until(lambda: len(upstream.received) == 5)
    slow, quick, other = [await ask(proxy.port, raw) for raw in sent]
    assert (slow.status, quick.status, other.status) == (503, 429, 409)
    assert slow.header("retry-after") in (b"2", b"3")
    assert quick.header("retry-after") == other.header("retry-after") == b"1"
    done.set()
    await asyncio.gather(*originals)


async def test_one_rule_lets_the_clients_wait_that_it_names(proxies, upstream, store_url, tmp_path):
    """A rule by User-Agent makes one client wait, others get 409 at once, and `Prefer: wait=0` asks for that."""
    done = asyncio.Event()
    upstream.script = holding(done)
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[rule]]\nname = "curl waits"\nheaders = { "User-Agent" = "curl/*" }\non_duplicate = "wait"\n', "utf-8"
    )
    proxy = proxies(upstream, store_url, RULES_FILE=file)
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    assert_in_flight(await ask(proxy.port, request(), seconds=5))
    curl = "User-Agent: curl/7.88.1"
    for _ in range(2):  # the second time the head is known
        at_once = await ask(
            proxy.port, request("POST", "/v1/charges", "key-1", b'{"amount": 1}', curl, "Prefer: wait=0"), seconds=5
        )
        assert_in_flight(at_once)
        assert at_once.header("preference-applied") == b"wait=0"
    held = asyncio.ensure_future(ask(proxy.port, request("POST", "/v1/charges", "key-1", b'{"amount": 1}', curl)))
    await until(lambda: waiting(proxy) == 1)
    done.set()
    assert ((await held).header("oncegate-status"), (await original).status) == (b"replayed", 200)
    assert len(upstream.received) == 1


async def test_a_wait_that_is_over_ends_in_flight(proxies, upstream, stored):
    """A duplicate that waited WAIT_MAX_S gets in-flight, on the proxy of the original and on another."""
    done = asyncio.Event()
    upstream.script = holding(done)
    two = [proxies(upstream, stored.url, ON_DUPLICATE="wait", WAIT_MAX_S=1.1) for _ in range(2)]
    original = asyncio.ensure_future(ask(two[0].port, request()))
    await until(lambda: upstream.received)
    for answer in await asyncio.gather(*[ask(proxy.port, request()) for proxy in two]):
        assert_in_flight(answer)
        assert answer.header("preference-applied") is None
        # As long as the original has been running by now, which is longer than when the wait began.
        assert answer.header("retry-after") in (b"2", b"3")
    assert [proxy.metric('waits_total{end="timed_out"}') for proxy in two] == [1, 1]
    # The original's worker has no need to poll.
    assert two[0].metric("wait_polls_total") == 0 < two[1].metric("wait_polls_total") < 10
    done.set()
    assert (await original).status == 200


async def test_a_waiter_whose_client_left_stops_waiting(proxies, upstream, store_url):
    """A client that resets its connection gives its place among the waiters back, and nothing else changes."""
    done = asyncio.Event()
    upstream.script = holding(done)
    proxy = proxies(upstream, store_url, ON_DUPLICATE="wait")
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    clients = [await RawClient.open(proxy.port) for _ in range(5)]
    for client in clients:
        client.writer.write(request())
    await until(lambda: waiting(proxy) == 5)
    for client in clients[1:]:
        client.reset()
    await until(lambda: waiting(proxy) == 1)
    assert proxy.metric("in_flight") == 1
    done.set()
    stayed = await read_answer(clients[0].reader)
    clients[0].close()
    assert stayed is not None
    assert (stayed.status, stayed.header("oncegate-status")) == (200, b"replayed")
    assert (await original).header("oncegate-status") == b"executed"
    assert proxy.metric('requests_total{outcome="client_gone"}') == 4


@pytest.mark.fault(17)
async def test_mismatch_is_seen_before_in_flight(proxies, upstream, stored):
    """Another request under a running key gets 422 at once, even where duplicates wait."""
    done = asyncio.Event()
    upstream.script = holding(done)
    two = [proxies(upstream, stored.url, ON_DUPLICATE=mode) for mode in ("wait", "reject")]
    original = asyncio.ensure_future(ask(two[0].port, request()))
    await until(lambda: upstream.received)
    for proxy in two:
        for other in (request(body=b"2"), request(target="/v1/other"), request("PATCH")):
            answer = await ask(proxy.port, other, seconds=10)
            assert (answer.status, answer.slug) == (422, "key-reused")
            assert answer.header("retry-after") is None
            assert answer.header("x-should-retry") == b"false"
    assert not original.done()
    done.set()
    assert (await original).status == 200
    assert len(upstream.received) == 1


async def test_a_running_key_outlives_its_retention(proxies, upstream, stored):
    """With 2 s of retention and an upstream that takes 6 s there is one execution; the answer is kept for 2 s."""
    upstream.script = answering(OK, delay_s=6)
    two = [proxies(upstream, stored.url, RETENTION_S=2, TOMBSTONE_S=0, LEASE_MS=500, WAIT_MAX_S=1) for _ in range(2)]
    clock = asyncio.get_running_loop().time
    original = asyncio.ensure_future(ask(two[0].port, request()))
    await until(lambda: upstream.received)
    duplicates = 0
    while not original.done() and duplicates < 100:
        answer = await ask(two[duplicates % 2].port, request())
        if answer.status != 200:
            assert_in_flight(answer)
        duplicates += 1
        await asyncio.wait([original], timeout=0.5)
    completed = clock()
    assert duplicates >= 8
    replays = 0
    while stored.states():
        if clock() - completed < 1:  # far enough from the end that the key cannot come free in between
            assert (await ask(two[replays % 2].port, request())).header("oncegate-status") == b"replayed"
            replays += 1
        await asyncio.sleep(0.05)
        assert clock() - completed < 10
    assert clock() - completed > 1.5
    assert replays > 2
    assert len(upstream.received) == 1
    upstream.script = answering(OK)
    assert (await ask(two[0].port, request())).header("oncegate-status") == b"executed"


BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("ends", ["ambiguous", "killed"])
async def test_an_unknown_key_outlives_its_retention(fork, upstream, stored, ends):
    """With 1 s of retention the key is still refused after it: an outcome that nobody knows is not forgotten."""
    settings = {"LEASE_MS": 300, "RETENTION_S": 1, "WAIT_MAX_S": 1}
    first, second = [await fork(upstream, stored.url, **settings) for _ in range(2)]
    upstream.script = answering(BAD_GATEWAY) if ends == "ambiguous" else answering(OK, delay_s=60)
    original = asyncio.ensure_future(ask(first.port, request()))
    await until(lambda: upstream.received)
    if ends == "killed":
        first.kill()
    await asyncio.wait([original])
    await until(lambda: stored.states() == [b"unknown"] or ends == "killed")
    await asyncio.sleep(1.5)
    upstream.script = answering(OK)
    answer = await ask(second.port, request())
    assert (answer.status, answer.slug) == (409, "outcome-unknown")
    assert len(upstream.received) == 1


async def test_an_unknown_key_is_kept_for_ever(fork, upstream, stored):
    gate = await fork(upstream, stored.url, UNKNOWN_RETENTION_S=0)
    upstream.script = answering(BAD_GATEWAY)
    await ask(gate.port, request())
    await until(lambda: stored.states() == [b"unknown"])
    (key,) = stored.keys()
    assert stored.left_ms(key) > 99 * 365 * 86_400_000


@pytest.mark.timeout(60)
async def test_however_long_the_wait_for_a_connection_it_is_in_flight(upstream, store_url, proxies):
    """A request may wait for a free connection as long as the connect timeout says; meanwhile its lease is kept, and
    once it is sent, the upstream has all of its time."""
    gate = proxies(
        upstream,
        store_url,
        MAX_UPSTREAM_CONNECTIONS=1,
        CONNECT_TIMEOUT_S=40,
        UPSTREAM_TIMEOUT_S=1,
        LEASE_MS=600,
        CLIENT_STALL_S=0.1,
        SETTLE_TIMEOUT_S=0.1,
        CLIENT_MIN_BYTES_PER_S=0,
    )
    done = asyncio.Event()

    async def drip(_: Any, __: Any, writer: asyncio.StreamWriter, received: Received) -> None:
        if received.line.startswith(b"POST"):
            writer.write(OK)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not done.is_set():
            writer.write(chunk(b"x"))
            await asyncio.sleep(0.2)
        writer.write(chunk(b""))

    upstream.script = drip
    busy = asyncio.create_task(ask(gate.port, request("GET", "/", None, b"")))
    await until(lambda: upstream.received)
    waiting = asyncio.create_task(ask(gate.port, request()))
    await asyncio.sleep(13)  # ten seconds more than its parts is what may pass without a word; then the lease
    told = await ask(gate.port, request())
    done.set()
    assert (await waiting).header("oncegate-status") == b"executed"
    assert_in_flight(told)
    await busy
