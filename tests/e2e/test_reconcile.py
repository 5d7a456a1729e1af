"""Unknown keys settle themselves: an API executes, cuts the connection, and is asked later what became of it."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from oncegate.messages.response_head import response_digest
from oncegate.reconcile.answers import given_response
from oncegate.store.open_keys.listing import open_keys
from oncegate.store.record import pack
from oncegate.store.record_view import Deciding, claim_of
from oncegate.store.results import ResolveStatus
from oncegate.store.store import Store
from tests.ledger import HEAD, VARIANTS, Api, is_true, judge, lose, order, rules, settled
from tests.parts import Proxy, Raw, RawUpstream, Received, ask, request, serving, until
from tests.stores import connected, with_index

SCALE = 20
# Each rule has an API of its own.
URL, WAITS = "http://127.0.0.1:1", "Prefer: wait=10"
# What takes long runs in PostgreSQL, too, under `make faults`.
in_redis_first = pytest.mark.parametrize(
    "store", ["redis", pytest.param("postgres", marks=pytest.mark.full)], indirect=True
)


@pytest.fixture
async def indexed(store):
    await with_index(store.url)
    return store


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    api = Api(tmp_path, SCALE)
    await api.start()
    yield api
    await api.close()


async def until_left(proxy: Proxy, why: str = "time_over") -> None:
    """Wait until a key of the plain rule is left to a person. The API, which is here, has most of the time."""
    while not proxy.metric(f'left_to_a_person_total{{reason="{why}",rule="plain"}}'):
        await asyncio.sleep(0.2)


async def until_settled(count: int, *proxies: Proxy, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while settled(*proxies).total() < count:
        assert time.monotonic() < deadline, (settled(*proxies), [proxy.log()[-3000:] for proxy in proxies])
        await asyncio.sleep(0.1)


@pytest.mark.fault(80)
async def test_each_key_ends_by_what_really_happened(api, proxies, indexed):
    """Whatever an index does for a while: what was executed is told, and what was not is executed once."""
    names, numbers = [variant.name for variant in VARIANTS if variant.name != "forgets"], range(10)
    proxy = proxies(URL, indexed.url, RULES_FILE=api.rules(*names))
    await asyncio.gather(*[lose(proxy.port, name, numbers) for name in names])
    await until_settled(len(names) * len(numbers), proxy)
    for name in names:
        found = await judge(api.ledger, proxy.port, name, numbers)
        assert found == {"reconciled": 8, "freed": 2, "second executions": 0}, name
    reconciled = await order(proxy.port, "plain", 0)
    assert reconciled.header("idempotent-replayed") == b"true"
    assert proxy.metric('requests_total{outcome="reconciled"}') == len(names) * 8 + 1


@pytest.mark.fault(80)
async def test_not_found_is_no_evidence_once_the_api_may_have_forgotten(api, proxies, indexed):
    """Who asks too late frees nothing: the key is left to a person, and nobody waits for it any more."""
    terms = {"absent_after_s": 0.1, "absent_before_s": 0.3, "first_after_s": 0.4, "most_s": 0.4}
    file = api.rules("plain", reconcile_for_s=2, **terms)
    proxy = proxies(URL, indexed.url, RULES_FILE=file)
    await lose(proxy.port, "plain", range(3, 4))
    await until_left(proxy)
    assert api.ledger.asked, "the API was asked, and said not found"
    began = time.monotonic()
    answer = await order(proxy.port, "plain", 3, WAITS)
    assert (answer.slug, answer.header("retry-after"), answer.problem["retryable"]) == ("outcome-unknown", None, False)
    assert time.monotonic() - began < 10
    assert not api.ledger.executed


@in_redis_first
@pytest.mark.parametrize("before", ["an upstream of its own", "that of the settings"])
async def test_another_api_than_the_one_that_was_asked_first_says_nothing(api, proxies, indexed, before):
    """After a reload the rule leads elsewhere, where nobody knows the order: that frees nothing, and nobody asks."""
    terms = {"absent_after_s": 0.1, "first_after_s": 3, "most_s": 3}
    file, url = Path(api.rules("plain", **terms)), api.upstreams["plain"].url
    if before == "that of the settings":
        file.write_text(file.read_text().replace(f'upstream = "{url}"', ""))
    proxy = proxies(url, indexed.url, RULES_FILE=file)
    await lose(proxy.port, "plain", range(3, 4))
    apis = api.upstreams
    apis["plain"], apis["late"] = apis["late"], apis["plain"]
    api.rules("plain", **terms)
    proxy.signal(signal.SIGHUP)
    await until_left(proxy, "cannot_ask")
    assert not api.ledger.asked
    # The destination is part of what a request is.
    assert (await order(proxy.port, "plain", 3)).slug == "key-reused"
    assert not api.ledger.executed


# Those who wait ...


async def test_a_duplicate_that_waits_gets_what_the_api_says(api, proxies, indexed):
    """It takes the step itself as soon as that is due; one without a wait hears when to come back."""
    file = api.rules("plain", first_after_s=0.4)
    two = [proxies(URL, indexed.url, RULES_FILE=file) for _ in range(2)]
    await lose(two[0].port, "plain", range(4))
    hurried = await order(two[0].port, "plain", 0)
    assert (hurried.status, hurried.slug, hurried.header("oncegate-status")) == (409, "outcome-unknown", b"unknown")
    assert (hurried.header("retry-after"), hurried.problem["retryable"]) == (b"1", True)
    waiting = [order(two[number % 2].port, "plain", number // 4, WAITS) for number in range(12)]
    for answer in await asyncio.gather(*waiting):
        assert (answer.status, answer.header("oncegate-status")) == (200, b"reconciled")
    asked = Counter(reference for _, reference in api.ledger.asked if reference != "plain-3")
    assert set(asked.values()) == {1}, "each key is asked about once, whoever waits where"
    freed = await asyncio.gather(*[order(proxy.port, "plain", 3, WAITS) for proxy in two for _ in range(3)])
    found = Counter(answer.header("oncegate-status") for answer in freed)
    assert (found[b"executed"], found[b"replayed"]) == (1, 5), "one of them executes what never was"
    assert max(api.ledger.executed.values()) == 1


@pytest.mark.parametrize("store", ["redis"], indirect=True)
async def test_a_duplicate_by_another_rule_asks_nobody_else(api, proxies, indexed):
    """What its own rule would ask is another resource: "not found" there says nothing of the original."""
    file = Path(api.rules("plain", first_after_s=60, most_s=60))
    first = file.read_text().replace("upstream = ", 'fingerprint = ["body"]\nupstream = ')
    second = first.replace('"plain"', '"second"').replace('"/plain/**"', '"/plain/second/**"')
    second = second.replace("orders?reference=", "orders?reference=no-").replace("60", "0.1")
    file.write_text(second + first)
    proxy = proxies(URL, indexed.url, RULES_FILE=file)
    await lose(proxy.port, "plain", range(1))
    sent = request("POST", "/plain/second/orders", "plain-0", b'{"amount": 1}', "Prefer: wait=2")
    assert (await ask(proxy.port, sent)).slug == "outcome-unknown"
    assert not api.ledger.asked


# Several at one key ...


async def decide_all(store: Store) -> int:
    """Resolve the open keys of a store as an operator does, each second one; return how many that were."""
    done, page = 0, await open_keys(store.records, 500)
    for record in page.records[::2]:
        response, body = given_response(299, (), b"by hand")
        digest = response_digest(299, response.reason, response.block)
        digest.update(body)
        claim = replace(claim_of(record, 3_600_000), token=store.token())
        meta = pack(claim, replace(response, digest=digest.digest()))
        status = await store.resolve_by_operator(claim, Deciding(record.token), meta, body)
        done += status is ResolveStatus.RESOLVED
    return done


@pytest.mark.fault(79)
async def test_two_replicas_and_an_operator_at_the_same_keys(api, proxies, indexed):
    """Each key has one truth: the operator's where that was faster, else the API's. Nobody asks twice for a step."""
    file = api.rules("plain", rate_per_s=10)
    two = [proxies(URL, indexed.url, RULES_FILE=file) for _ in range(2)]
    numbers = range(30)
    async with connected(indexed.url) as store:
        await asyncio.gather(*[lose(two[half].port, "plain", numbers[half::2]) for half in (0, 1)])
        by_operator = await decide_all(store)
    await until_settled(len(numbers) - by_operator, *two)
    answers = await asyncio.gather(*[order(two[0].port, "plain", number) for number in numbers])
    told = [answer for answer in answers if answer.header("oncegate-status") == b"replayed"]
    assert len(told) == by_operator > 0
    assert {(answer.status, answer.body) for answer in told} == {(299, b"by hand")}
    for number, answer in enumerate(answers):
        if answer.header("oncegate-status") == b"reconciled":
            assert is_true(answer, api.ledger, f"plain-{number}")
    assert max(api.ledger.executed.values()) == 1
    assert settled(*two).total() == len(numbers) - by_operator


# Whoever asks or owns may be gone, or come back ...

# Of a body: more than kernels hold for a reader that pauses.
SIZE = 16 << 20


def hold_questions(api: Api, until_set: asyncio.Event) -> asyncio.Event:
    """Let the API answer no question before an event; return one that says that a question came."""
    came, script = asyncio.Event(), api.upstreams["plain"].script

    async def held(upstream: RawUpstream, reader: object, writer: asyncio.StreamWriter, request: Received) -> None:
        if request.line.startswith(b"GET "):
            came.set()
            await until_set.wait()
        await script(upstream, reader, writer, request)

    api.upstreams["plain"].script = held
    return came


def hold_orders(api: Api, until_set: asyncio.Event) -> None:
    """Let the API execute an order at once, and answer it after an event."""
    script = api.ledger.script

    async def held(upstream: RawUpstream, reader: object, writer: asyncio.StreamWriter, request: Received) -> None:
        if request.line.startswith(b"GET "):
            return await script(upstream, reader, writer, request)
        body = api.ledger.execute("plain-0")
        await until_set.wait()
        writer.write(HEAD % (201, len(body)) + body)
        await writer.drain()
        return None

    api.upstreams["plain"].script = held


@pytest.mark.fault(77)
@in_redis_first
@pytest.mark.parametrize("ends", ["drain", "kill"])
async def test_a_question_under_way_when_its_worker_ends_is_asked_again(api, proxies, indexed, ends):
    """A drain gives it up, and kill -9 does not even do that: its lease lapses, and another replica settles the key."""
    file = api.rules("plain", timeout_s=1)
    first = proxies(URL, indexed.url, RULES_FILE=file, DRAIN_S=1)
    answers = asyncio.Event()
    came = hold_questions(api, answers)
    await lose(first.port, "plain", range(1))
    await came.wait()
    second = proxies(URL, indexed.url, RULES_FILE=file)
    if ends == "drain":
        first.signal(signal.SIGTERM)
        await until(lambda: first.process.poll() is not None, 20)
        assert first.process.poll() == 0
    else:
        first.kill()
    answers.set()
    await until_settled(1, second)
    answer = await order(second.port, "plain", 0)
    assert answer.header("oncegate-status") == b"reconciled"
    assert is_true(answer, api.ledger, "plain-0")
    assert api.ledger.executed == {"plain-0": 1}


@pytest.mark.fault(78)
@in_redis_first
async def test_an_owner_that_wakes_up_before_the_verdict_wins(api, proxies, indexed):
    """Suspended for two leases, its key counts as lapsed and is asked about; then its own response is the truth."""
    file, answers, executes = api.rules("plain", timeout_s=5), asyncio.Event(), asyncio.Event()
    owner = proxies(URL, indexed.url, RULES_FILE=file, LEASE_MS=500)
    other = proxies(URL, indexed.url, RULES_FILE=file, LEASE_MS=500)
    hold_orders(api, executes)
    asking = asyncio.ensure_future(order(owner.port, "plain", 0))
    await until(lambda: api.ledger.executed)
    owner.signal(signal.SIGSTOP)
    came = hold_questions(api, answers)
    await asyncio.wait_for(came.wait(), 20)
    owner.signal(signal.SIGCONT)
    executes.set()
    told = await asking
    answers.set()
    assert (told.status, told.header("oncegate-status")) == (201, b"executed")
    again = await order(other.port, "plain", 0, WAITS)
    assert (again.status, again.body, again.header("oncegate-status")) == (201, told.body, b"replayed")
    assert api.ledger.executed == {"plain-0": 1}


@pytest.mark.fault(78)
async def test_an_owner_that_wakes_up_behind_the_verdict_is_fenced(api, proxies, indexed):
    """Its own response reaches nobody: the one that the API gave when it was asked is the truth by then."""
    file, executes = api.rules("plain"), asyncio.Event()
    owner = proxies(URL, indexed.url, RULES_FILE=file, LEASE_MS=500)
    other = proxies(URL, indexed.url, RULES_FILE=file, LEASE_MS=500)
    hold_orders(api, executes)
    asking = asyncio.ensure_future(order(owner.port, "plain", 0))
    await until(lambda: api.ledger.executed)
    owner.signal(signal.SIGSTOP)
    await until_settled(1, other)
    owner.signal(signal.SIGCONT)
    executes.set()
    told = await asking
    again = await order(other.port, "plain", 0)
    for answer in (told, again):
        assert (answer.status, answer.header("oncegate-status")) == (200, b"reconciled")
        assert is_true(answer, api.ledger, "plain-0")
    assert api.ledger.executed == {"plain-0": 1}


@pytest.mark.parametrize("store", ["redis"], indirect=True)
async def test_an_owner_without_its_store_sends_no_more_behind_its_lease(proxies, indexed, tmp_path):
    """Elsewhere its key was freed by then, and executed: the rest of its body would execute it once more."""
    executed, asked, reads = Counter[int](), asyncio.Event(), asyncio.Event()

    async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, head = raw.accepted, await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET "):
            writer.write(HEAD % (404, 2) + b"{}")
            return
        if not asked.is_set():
            writer.transport.pause_reading()
            asked.set()
            await reads.wait()
            writer.transport.resume_reading()
        await reader.readexactly(SIZE)
        executed[number] += 1
        writer.write(HEAD % (201, 2) + b"{}")

    async with serving(talk) as raw, indexed.relaying() as relay:
        (file := tmp_path / "rules.toml").write_text(rules({"plain": raw.url}, SCALE, 200))
        settings = {"RULES_FILE": file, "LEASE_MS": 900, "MAX_REQUEST_BYTES": SIZE}
        owner, other = (proxies(URL, url, **settings) for url in (relay.url, indexed.url))
        sent = request("POST", "/plain/orders", "plain-0", b"a" * SIZE)
        first = asyncio.ensure_future(ask(owner.port, sent, 60))
        await asked.wait()
        relay.silence()
        relay.unreachable = True
        await until_settled(1, other)
        second = await ask(other.port, sent, 60)
        assert (second.status, second.header("oncegate-status")) == (201, b"executed")
        reads.set()
        assert (await first).status == 502
        assert executed.total() == 1


@in_redis_first
async def test_a_roll_gives_up_no_key(api, proxies, indexed):
    """Workers are replaced one after the other while keys are asked about; each key ends, and nobody asks too often."""
    file = api.rules("plain", rate_per_s=20)
    proxy, numbers = proxies(URL, indexed.url, RULES_FILE=file, WORKERS=2), range(30)
    await lose(proxy.port, "plain", numbers)
    await until(lambda: api.ledger.asked, 20)
    proxy.signal(signal.SIGUSR2)
    await until(lambda: proxy.events("workers replaced"), 60)
    async with connected(indexed.url) as store:
        while (await open_keys(store.records, 1)).records:
            await asyncio.sleep(0.1)
    found = await judge(api.ledger, proxy.port, "plain", numbers)
    assert found == {"reconciled": 24, "freed": 6, "second executions": 0}
