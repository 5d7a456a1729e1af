"""`Prefer: respond-async`: the client gets a 202 and an address, and the exchange goes on without it."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Blackhole,
    Proxy,
    RawClient,
    Tap,
    answering,
    ask,
    chunk,
    holding,
    request,
    until,
)
from tests.test_asking import check_document
from tests.topologies import Clustered

RULES = """
[[rule]]
name = "reports"
path = "/v1/**"
respond_async = true
ask_keys = true
on_client_gone = "cancel"
cancel_grace_s = 0.1

[[rule]]
name = "stopped"
path = "/stop/**"
respond_async = true
resumable = true
cancellable = true

[[rule]]
name = "elsewhere"
"""
MADE = b"HTTP/1.1 201 Created\r\nX-Report: 7\r\nContent-Length: 5\r\n\r\nwhole"
DECLINED = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nbusy"
LATER = "Prefer: respond-async"
LEASE_MS = 1500


FIXED = {"RULES_FILE": "rules.toml", "LEASE_MS": LEASE_MS, "SECRET": "0123456789abcdef", "MAX_STORED_BYTES": 65536}


@pytest.fixture
def gates(proxies, upstream, valkey, tmp_path: Path) -> Callable[..., Proxy]:
    """Replicas on one store."""
    (tmp_path / "rules.toml").write_text(RULES)
    return lambda **settings: proxies(upstream, valkey.url, **FIXED | settings)


@pytest.fixture
def gates_of_each(proxies, upstream, store, tmp_path: Path) -> Callable[..., Proxy]:
    """The same on a store of each kind."""
    (tmp_path / "rules.toml").write_text(RULES)
    return lambda **settings: proxies(upstream, store.url, **FIXED | settings)


async def sent(gate: Proxy, key: str, *fields: str, target: str = "/v1/reports") -> Answer:
    return await ask(gate.port, request("POST", target, key, b'{"amount": 1}', *fields))


async def at(gate: Proxy, location: bytes) -> Answer:
    """Return the answer at a Location: neither key nor credential is shown."""
    return await ask(gate.port, request("GET", location.decode(), None, b""))


async def ended(gate: Proxy, location: bytes) -> Answer:
    """Come again until it is no 202."""
    async with asyncio.timeout(30):
        while (answer := await at(gate, location)).status == 202:
            await asyncio.sleep(0.02)
    return answer


def location_of(answer: Answer) -> bytes:
    """Return the Location of a 202 that is as it should be."""
    assert (answer.status, answer.header("oncegate-status")) == (202, b"accepted"), answer
    assert (answer.header("cache-control") or b"").startswith(b"private, no-store")
    location = answer.header("location")
    assert location is not None
    document = check_document(answer.body)
    assert document["location"] == location.decode()
    assert (document["state"], document["on_repeat"]) == ("in_flight", "in-flight")
    assert document["key_id"].encode() == answer.header("oncegate-key-id")
    assert 1 <= int(answer.header("retry-after") or b"0") <= 60
    return location


async def test_a_client_that_does_not_wait_comes_for_its_response(gates_of_each, upstream):
    """At once a 202, there a 202 while it runs, then the response: on any replica, as often as it likes. The API is
    asked once, and not asked for what oncegate does itself."""
    one, two = gates_of_each(), gates_of_each()
    go_on = asyncio.Event()
    upstream.script = holding(go_on, MADE)
    accepted = await sent(one, "r-1", "Prefer: respond-async, return=minimal")
    location = location_of(accepted)
    assert accepted.header("preference-applied") == b"respond-async"
    await until(lambda: upstream.received)
    assert upstream.received[0].header("prefer") == [b"return=minimal"]
    for gate in (one, two, one):
        assert location_of(await at(gate, location)) == location
    go_on.set()
    for gate in (one, two, one):
        answer = await ended(gate, location)
        assert (answer.status, answer.body, answer.header("x-report")) == (201, b"whole", b"7")
        assert (answer.header("oncegate-status"), answer.complete) == (b"resumed", True)
        assert (answer.header("cache-control") or b"").startswith(b"private, no-store")
    again = await sent(two, "r-1", LATER)
    assert (again.status, again.body, again.header("location")) == (201, b"whole", None)
    assert len(upstream.received) == 1
    assert one.metric('requests_total{outcome="accepted"}') == 1
    assert one.metric('requests_total{outcome="executed"}') == 1
    assert [line["status"] for line in one.events("request") if line["outcome"] in ("accepted", "executed")] == [
        202,
        201,
    ]


async def test_a_client_waits_for_as_long_as_it_likes(gates, upstream):
    """A response that begins within `wait` is passed on as usual; for any other a 202 comes then, and not before."""
    gate, clock = gates(), asyncio.get_running_loop().time
    prompt = await sent(gate, "w-1", "Prefer: respond-async, wait=20")
    assert (prompt.status, prompt.header("oncegate-status")) == (200, b"executed")
    tap = Tap()
    upstream.script = tap.script
    tap.send(CHUNKED, chunk(b"begun "))
    streaming = asyncio.ensure_future(sent(gate, "w-2", "Prefer: wait=1", LATER))
    await until(lambda: len(upstream.received) == 2)
    await asyncio.sleep(1.1)
    tap.end(chunk(b"ended"), LAST_CHUNK)
    assert (await streaming).body == b"begun ended"
    go_on, began_s = asyncio.Event(), clock()
    upstream.script = holding(go_on, MADE)
    late = await sent(gate, "w-3", LATER, "Prefer: wait=1")
    assert clock() - began_s > 0.9
    assert late.header("preference-applied") == b"respond-async, wait=1"
    go_on.set()
    assert (await ended(gate, location_of(late))).status == 201


async def test_whoever_comes_may_wait_there(gates, upstream):
    """`Prefer: wait` holds a GET until the end, on any replica; without an end it gets another 202."""
    one, two = gates(), gates()
    go_on = asyncio.Event()
    upstream.script = holding(go_on, MADE)
    location = location_of(await sent(one, "g-1", LATER)).decode()
    waiting = [
        asyncio.ensure_future(ask(gate.port, request("GET", location, None, b"", "Prefer: wait=20")))
        for gate in (one, two)
    ]
    again = await ask(two.port, request("GET", location, None, b"", "Prefer: wait=1"))
    assert location_of(again).decode() == location
    assert not any(one.done() for one in waiting)
    go_on.set()
    for answer in await asyncio.gather(*waiting):
        assert (answer.status, answer.body) == (201, b"whole")
    assert len(upstream.received) == 1


async def test_whoever_waits_there_takes_nobodys_turn(proxies, valkey, tmp_path):
    """Where nothing was sent, a duplicate that waits as well may execute, and it tries at once."""
    (tmp_path / "rules.toml").write_text(RULES)
    hole = Blackhole()
    settings = {"CONNECT_TIMEOUT_S": 1, "CONNECT_RETRIES": 0, "SECRET": "0123456789abcdef"}
    gate = proxies(hole.url, valkey.url, RULES_FILE="rules.toml", **settings)
    location = location_of(await sent(gate, "t-1", LATER)).decode()
    coming = asyncio.ensure_future(ask(gate.port, request("GET", location, None, b"", "Prefer: wait=20")))
    await until(lambda: gate.metric("waiting") == 1)
    duplicate = asyncio.ensure_future(sent(gate, "t-1", "Prefer: wait=20"))
    assert (await coming).slug == "key-released"
    assert (await duplicate).slug == "upstream-unreachable"
    hole.close()


async def test_a_duplicate_gets_the_same_address(gates, upstream):
    """Also where the original's client waits. Without the preference a duplicate gets what it always got."""
    one, two = gates(), gates()
    go_on = asyncio.Event()
    upstream.script = holding(go_on, MADE)
    location = location_of(await sent(one, "d-1", LATER))
    duplicate = await sent(two, "d-1", "Prefer: respond-async, wait=1")
    assert location_of(duplicate) == location
    assert duplicate.header("preference-applied") == b"respond-async, wait=1"
    assert (await sent(two, "d-1")).slug == "in-flight"
    waiting = asyncio.ensure_future(sent(one, "d-2"))
    await until(lambda: len(upstream.received) == 2)
    other = location_of(await sent(two, "d-2", LATER))
    assert other != location
    reused = await ask(two.port, request("POST", "/v1/reports", "d-1", b"another", LATER))
    assert reused.slug == "key-reused"
    go_on.set()
    assert ((await waiting).status, (await ended(one, other)).status) == (201, 201)
    assert len(upstream.received) == 2


async def test_what_was_not_executed_says_so_at_its_address(gates_of_each, upstream):
    """The API declined it, or could not be reached: the key is free, and the next claim has another address."""
    one, two = gates_of_each(), gates_of_each()
    upstream.script = answering(DECLINED)
    location = location_of(await sent(one, "f-1", LATER))
    answer = await ended(two, location)
    assert (answer.status, answer.slug, answer.problem["original_status"]) == (409, "key-released", 429)
    assert (answer.header("retry-after"), answer.header("oncegate-status")) == (b"7", b"released")
    assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (False, True)
    upstream.script = answering(MADE)
    again = location_of(await sent(two, "f-1", LATER))
    assert (await ended(one, again)).status == 201
    # The first claim is over, whatever became of the second.
    assert (await at(one, location)).slug == "key-released"
    await upstream.close()
    unsent = await ended(one, location_of(await sent(one, "f-2", LATER)))
    assert (unsent.slug, unsent.problem.get("original_status")) == ("key-released", None)
    assert "nothing was sent" in unsent.problem["detail"]


@pytest.mark.fault(32)
async def test_the_owner_dies_between_the_202_and_the_end(gates_of_each, upstream):
    """Within a lease the address says that nobody knows the outcome, and nothing executes the key again."""
    one, two = gates_of_each(), gates_of_each()
    upstream.script = holding(asyncio.Event())
    location = location_of(await sent(one, "k-1", LATER))
    await until(lambda: upstream.received)
    one.kill()
    clock = asyncio.get_running_loop().time
    died_s = clock()
    answer = await ended(two, location)
    assert clock() - died_s < LEASE_MS / 1000 + 5
    assert (answer.status, answer.slug, answer.header("oncegate-status")) == (409, "outcome-unknown", b"unknown")
    assert (await sent(two, "k-1", LATER)).slug == "outcome-unknown"
    assert len(upstream.received) == 1


@pytest.mark.fault(61)
async def test_a_drain_waits_for_it_and_what_it_cuts_off_is_unknown(gates, upstream):
    """Its client has its answer, and the exchange is in flight all the same."""
    one, two, three = gates(), gates(DRAIN_S=0.2), gates()
    go_on = asyncio.Event()
    upstream.script = holding(go_on, MADE)
    whole, cut = [location_of(await sent(gate, key, LATER)) for gate, key in ((one, "s-1"), (two, "s-2"))]
    await until(lambda: len(upstream.received) == 2)
    stopping = [asyncio.ensure_future(asyncio.to_thread(gate.stop)) for gate in (one, two)]
    assert await stopping[1] != 0
    assert (await ended(three, cut)).slug == "outcome-unknown"
    assert one.process.poll() is None
    go_on.set()
    assert await stopping[0] == 0
    assert (await ended(three, whole)).body == b"whole"


# Six servers start.
@pytest.mark.full
async def test_keys_on_every_server_of_a_cluster(proxies, upstream, tmp_path):
    """Records, notes about releases, questions and addresses, on the servers that have them."""
    (tmp_path / "rules.toml").write_text(RULES)
    cluster, mine = Clustered(), "Authorization: Bearer mine"
    try:
        one, two = [proxies(upstream, cluster.url, **FIXED | {"LEASE_MS": 5000}) for _ in range(2)]
        for script, shown in ((answering(MADE), 201), (answering(DECLINED), 409)):
            upstream.script = script
            keys = [f"u-{shown}-{number}" for number in range(12)]
            locations = [location_of(await sent(one, key, LATER, mine)) for key in keys]
            answers = [await ended(two, location) for location in locations]
            assert {answer.status for answer in answers} == {shown}
            asked = [request("GET", "/.oncegate/keys", key, b"", mine, "Oncegate-Target: /v1/x") for key in keys]
            assert {(await ask(two.port, raw)).status for raw in asked} == {200 if shown == 201 else 404}
            assert {answer.problem["original_status"] for answer in answers if shown == 409} <= {429}
        assert len(upstream.received) == 24
    finally:
        cluster.close()


# Two workers and their successors start.
@pytest.mark.full
async def test_a_worker_that_is_replaced_ends_what_it_has_begun(proxies, upstream, valkey, tmp_path):
    """Its successor answers at the address meanwhile, though the client and all connections are long gone."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", SECRET="0123456789abcdef", WORKERS=2, DRAIN_S=1)
    go_on = asyncio.Event()
    upstream.script = holding(go_on, MADE)
    location = location_of(await sent(gate, "v-1", LATER))
    await until(lambda: upstream.received)
    gate.signal(signal.SIGUSR2)
    await until(lambda: gate.events("workers replaced"), 30)
    # Longer than a worker that drains would wait.
    await asyncio.sleep(1.5)
    assert location_of(await at(gate, location)) == location
    go_on.set()
    assert (await ended(gate, location)).body == b"whole"
    assert len(upstream.received) == 1


async def test_whoever_sent_it_may_stop_it(gates, upstream):
    """The 202 names the addresses of its response as any answer does, and its own address says what became of it."""
    one, two = gates(), gates()
    upstream.script = holding(asyncio.Event())
    accepted = await sent(one, "q-1", LATER, target="/stop/it")
    links = dict(value.split(b"; rel=")[::-1] for name, value in accepted.headers if name == b"Link")
    assert links.keys() == {b'"resume"', b'"cancel"'}
    await until(lambda: upstream.received)
    stopped = await ask(two.port, request("DELETE", links[b'"cancel"'].strip(b"<>").decode(), None, b""))
    assert stopped.status == 202
    answer = await ended(two, location_of(accepted))
    assert (answer.status, answer.slug, answer.problem["reason"]) == (409, "outcome-unknown", "cancelled")


@pytest.mark.fault(34)
async def test_nobody_waits_and_nobody_cancels(gates, upstream):
    """Under a rule that ends requests without readers it goes on after its client left, with or without its 202."""
    gate, gone = gates(), asyncio.Event()
    go_on = asyncio.Event()

    async def script(_, reader, writer, __) -> None:
        leaving = asyncio.ensure_future(reader.read(1))
        waiting = asyncio.ensure_future(go_on.wait())
        await asyncio.wait((leaving, waiting), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            gone.set()
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        writer.write(MADE)

    upstream.script = script
    client = await RawClient.open(gate.port)
    answer = await client.ask(request("POST", "/v1/reports", "c-1", b"{}", LATER))
    assert answer is not None
    hasty = await RawClient.open(gate.port)
    hasty.writer.write(request("POST", "/v1/reports", "c-2", b"{}", LATER, "Prefer: wait=20"))
    await until(lambda: len(upstream.received) == 2)
    client.reset()
    hasty.reset()
    await asyncio.sleep(0.5)
    assert not gone.is_set()
    go_on.set()
    assert (await ended(gate, location_of(answer))).status == 201
    await until(lambda: gate.metric('requests_total{outcome="executed"}') == 2)


async def test_one_connection_goes_on_while_its_exchanges_do(gates, upstream):
    """The next request on it is another one, and what comes of the first is nowhere in its answers."""
    gate, go_on = gates(), asyncio.Event()
    upstream.script = holding(go_on, MADE)
    with contextlib.closing(await RawClient.open(gate.port)) as client:
        answers = [await client.ask(request("POST", "/v1/reports", f"p-{n}", b"{}", LATER)) for n in range(4)]
        locations = {location_of(answer) for answer in answers if answer is not None}
        assert len(locations) == 4
        await until(lambda: len(upstream.received) == 4)
        go_on.set()
        upstream.script = answering(OK)
        last = await client.ask(request("POST", "/v1/reports", "p-last", b"{}"))
        assert last is not None
        assert (last.status, last.body) == (200, b"ok")
    for location in locations:
        assert (await ended(gate, location)).body == b"whole"


@pytest.mark.fault(6)
async def test_without_a_claim_there_is_no_202(proxies, own_valkey, upstream, tmp_path):
    """While the store is away nothing is accepted and nothing is sent, and an address says that nobody can tell now."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = proxies(upstream, own_valkey.url, STORE_TIMEOUT_MS=300, **FIXED)
    go_on = asyncio.Event()
    upstream.script = holding(go_on, MADE)
    location = location_of(await sent(gate, "n-1", LATER))
    await until(lambda: upstream.received)
    own_valkey.pause()
    for answer in (await sent(gate, "n-2", LATER), await at(gate, location)):
        assert (answer.status, answer.slug) == (503, "store-unavailable")
        assert answer.header("retry-after") is not None
    own_valkey.resume()
    go_on.set()
    assert (await ended(gate, location)).status == 201
    assert len(upstream.received) == 1


async def test_elsewhere_the_preference_is_the_apis_own(gates, upstream):
    """Without the field in the rule, and without a key."""
    gate = gates()
    own = b"HTTP/1.1 202 Accepted\r\nLocation: /jobs/1\r\nContent-Length: 0\r\n\r\n"
    upstream.script = answering(own)
    for key, target in (("e-1", "/other"), (None, "/v1/reports")):
        answer = await sent(gate, key, "Prefer: respond-async, wait=5", target=target)
        assert (answer.status, answer.header("location")) == (202, b"/jobs/1")
        assert answer.header("oncegate-status") in (b"executed", None)
        assert upstream.received[-1].header("prefer") == [b"respond-async, wait=5"]


async def test_a_response_that_was_not_kept(gates, upstream):
    """The address says that it was executed."""
    gate = gates()
    go_on, large = asyncio.Event(), bytes(70_000)
    upstream.script = holding(go_on, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(large), large))
    location = location_of(await sent(gate, "l-1", LATER))
    go_on.set()
    answer = await ended(gate, location)
    assert (answer.slug, answer.problem["original_status"]) == ("response-not-kept", 200)
