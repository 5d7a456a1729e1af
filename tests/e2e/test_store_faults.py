"""A store that is down, stalls, forgets or is full: nothing executes twice, and what is not sure is said."""

import asyncio

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    RawClient,
    Tap,
    answering,
    ask,
    chunk,
    holding,
    read_answer,
    request,
    until,
)

ONE, TWO = b"a" * 100_000, b"b" * 100_000  # each more than a small answer has


def assert_unavailable(answer) -> None:
    assert (answer.status, answer.slug) == (503, "store-unavailable")
    assert int(answer.header("retry-after") or 0) >= 1
    assert answer.header("x-should-retry") == b"true"
    assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (True, True)


# Before the claim ...


@pytest.mark.fault(6)
async def test_a_start_without_the_store(proxies, upstream, own_store):
    """It listens and is not ready; keyed requests get 503 and send nothing, others pass; it recovers by itself."""
    own_store.kill()
    proxy = proxies(upstream, own_store.url, STORE_TIMEOUT_MS=300)
    status, reasons = proxy.admin("/readyz")
    assert (status, "store" in reasons) == (503, True)
    assert proxy.admin("/healthz")[0] == 200
    for answer in await asyncio.gather(*[ask(proxy.port, request(key=f"{n}"), seconds=5) for n in range(10)]):
        assert_unavailable(answer)
        assert answer.header("oncegate-status") == b"refused"
    assert upstream.connections == 0
    assert (await ask(proxy.port, request(key=None))).body == b"ok"
    assert (await ask(proxy.port, request("GET", body=b""))).body == b"ok"
    own_store.start()
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"executed"
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
    assert len(upstream.received) == 3


@pytest.mark.fault(6, 7)
@pytest.mark.parametrize("how", ["paused", "killed"])
async def test_a_store_that_goes_away_before_the_claim(proxies, upstream, own_store, how):
    """The claim gets 503 within about a second, and once the store is back the keys are free: executed once."""
    proxy = proxies(upstream, own_store.url)
    assert (await ask(proxy.port, request(key="before"))).status == 200
    clock = asyncio.get_running_loop().time
    own_store.pause() if how == "paused" else own_store.kill()
    began = clock()
    keys = [f"key-{n}" for n in range(20)]
    for answer in await asyncio.gather(*[ask(proxy.port, request(key=key)) for key in keys]):
        assert_unavailable(answer)
    assert clock() - began < 5
    await until(lambda: proxy.admin("/readyz")[0] == 503)
    assert len(upstream.received) == 1
    own_store.resume() if how == "paused" else own_store.start()
    tries = 0
    waiting = set(keys)
    while waiting:
        for key in sorted(waiting):
            answer = await ask(proxy.port, request(key=key))
            if answer.status == 200:
                assert answer.header("oncegate-status") == b"executed"
                waiting.discard(key)
            else:
                assert answer.slug in ("store-unavailable", "in-flight")
        tries += 1
        assert tries < 100
        await asyncio.sleep(0.05)
    assert len(upstream.received) == 21
    assert sorted(own_store.states()) == [b"complete"] * (21 if how == "paused" or own_store.survives_a_kill else 20)


@pytest.mark.fault(10)
async def test_a_claim_that_was_given_up_never_lands(proxies, upstream, own_valkey):
    """The store reads a claim after its proxy answered 503 and was killed: the key is free all the same."""
    doomed, other = (proxies(upstream, own_valkey.url) for _ in range(2))
    own_valkey.pause()
    assert_unavailable(await ask(doomed.port, request()))
    doomed.kill()
    own_valkey.resume()
    with own_valkey.client() as client:
        await until(lambda: client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"] > 0)
    assert own_valkey.states() == []
    await until(lambda: other.admin("/readyz")[0] == 200)
    assert (await ask(other.port, request())).header("oncegate-status") == b"executed"
    assert len(upstream.received) == 1


# While the upstream works ...


@pytest.mark.fault(35)
async def test_a_pause_of_the_store_holds_the_answer_back(proxies, upstream, own_store):
    """The store stands still for many leases when the answer comes: it is delivered afterwards, and replayed."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_store.url, LEASE_MS=300)
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    own_store.pause()
    tap.end(OK)
    await asyncio.wait([original], timeout=2)
    assert not original.done()
    own_store.resume()
    answer = await original
    assert (answer.status, answer.body, answer.header("oncegate-status")) == (200, b"ok", b"executed")
    assert (await ask(proxy.port, request())).header("oncegate-status") == b"replayed"
    assert len(upstream.received) == 1
    assert proxy.metric("store_retries_total") > 0
    assert proxy.metric("claims_lost_total") == 0


@pytest.mark.fault(35, 36, 59)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_a_store_that_comes_back_empty(proxies, upstream, own_valkey, streamed):
    """The store is restarted without its data: the settle writes the record, the loss is reported once."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_valkey.url, LEASE_MS=300)
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    own_valkey.kill()
    own_valkey.start()
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    tap.end(*([CHUNKED, chunk(ONE), LAST_CHUNK] if streamed else [OK]))
    answer = await original
    whole = ONE if streamed else b"ok"
    assert (answer.status, answer.body, answer.complete) == (200, whole, True)
    assert proxy.metric("claims_lost_total") == 2  # the store's loss, and the claim that is known by name
    assert len(proxy.events("claim lost")) == 1
    again = await ask(proxy.port, request())
    if streamed and again.status == 409:
        assert (again.slug, again.problem["original_status"]) == ("response-not-kept", 200)
    else:
        assert (again.header("oncegate-status"), again.body) == (b"replayed", whole)
    assert len(upstream.received) == 1


@pytest.mark.fault(50)
@pytest.mark.parametrize(
    ("last", "outcome"),
    # What is less than a batch goes with the settle, a whole one before it.
    [(b"", "answer_not_stored"), (TWO[:1000], "answer_not_stored"), (TWO, "truncated")],
    ids=["small", "streamed", "streamed, a whole batch at the end"],
)
async def test_an_answer_that_could_not_be_stored(proxies, upstream, own_store, last, outcome):
    """After SETTLE_TIMEOUT_S without the store: 502 or an abort, no clean end; and never a second execution."""
    streamed = bool(last)
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_store.url, LEASE_MS=300, SETTLE_TIMEOUT_S=1)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    if streamed:
        tap.send(CHUNKED, chunk(ONE))
        await until(lambda: own_store.has_body())
    own_store.pause()
    tap.end(*([chunk(last), LAST_CHUNK] if streamed else [OK]))
    answer = await asyncio.wait_for(read_answer(client.reader), 20)
    client.close()
    own_store.resume()
    assert answer is not None
    if streamed:
        assert not answer.complete
    else:
        assert (answer.status, answer.slug) == (502, "answer-not-stored")
        assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (True, True)
        assert answer.header("x-should-retry") == b"true"
        await until(lambda: [line["status"] for line in proxy.events("request")] == [502])
    assert proxy.metric(f'requests_total{{outcome="{outcome}"}}') == 1
    assert proxy.metric('settled_total{settlement="unconfirmed"}') == 1
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    tries = 0
    while (again := await ask(proxy.port, request())).status == 409 and again.slug == "in-flight":
        tries += 1
        assert tries < 60
        await asyncio.sleep(0.05)
    if again.status == 409:
        assert again.slug == "outcome-unknown"
    else:
        assert again.header("oncegate-status") == b"replayed"
    assert len(upstream.received) == 1


# While the answer streams ...


@pytest.mark.fault(46)
async def test_a_pause_of_the_store_holds_the_end_of_a_stream_back(proxies, upstream, own_store):
    """Bytes go on while the store stands still; the end comes when it is back, and the replay has all of them."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_store.url, LEASE_MS=300)
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    tap.send(CHUNKED, chunk(ONE))
    await until(lambda: own_store.has_body())
    own_store.pause()
    tap.end(chunk(TWO), chunk(b"the last"), LAST_CHUNK)
    seen = await client.reader.readuntil(b"the last\r\n")
    ending = asyncio.ensure_future(client.reader.readexactly(len(LAST_CHUNK)))
    await asyncio.wait([ending], timeout=1.5)
    assert not ending.done()
    own_store.resume()
    assert await asyncio.wait_for(ending, 20) == LAST_CHUNK
    client.close()
    assert (seen.count(b"a"), seen.count(b"b")) >= (len(ONE), len(TWO))
    again = await ask(proxy.port, request())
    assert (again.header("oncegate-status"), again.complete) == (b"replayed", True)
    assert again.body == ONE + TWO + b"the last"
    assert len(upstream.received) == 1


@pytest.mark.fault(36, 59)
async def test_a_store_that_forgets_in_mid_stream(proxies, upstream, own_store):
    """All records are lost while an answer streams: it is delivered and reported; its key never executes again."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_store.url, LEASE_MS=300)
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    tap.send(CHUNKED, chunk(ONE))
    await until(lambda: own_store.has_body())
    own_store.forget()
    tap.end(chunk(TWO), LAST_CHUNK)
    answer = await original
    assert (answer.complete, answer.body) == (True, ONE + TWO)
    again = await ask(proxy.port, request())
    assert (again.status, again.slug, again.problem["original_status"]) == (409, "response-not-kept", 200)
    assert len(upstream.received) == 1
    assert proxy.metric("claims_lost_total") == 1
    assert len(proxy.events("claim lost")) == 1


# When the record becomes another's ...


@pytest.mark.fault(36, 47)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_a_foreign_token_fences_the_owner(proxies, upstream, own_valkey, streamed):
    """A token that is not ours appears in the record: our answer is never delivered as complete; it is reported."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, own_valkey.url, LEASE_MS=300)
    original = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    if streamed:
        tap.send(CHUNKED, chunk(ONE))
        await until(lambda: own_valkey.has_body())
    with own_valkey.client() as client:
        client.hset(next(client.scan_iter("once:{*")), "token", b"f" * 16)
    tap.end(*([chunk(TWO), LAST_CHUNK] if streamed else [OK]))
    answer = await original
    if streamed:
        assert not answer.complete
    else:  # a token alone makes a record that does not match its own check
        assert (answer.status, answer.slug) == (500, "record-corrupt")
    assert proxy.metric("claims_lost_total") == 1
    assert len(proxy.events("claim fenced")) == 1
    assert proxy.metric('requests_total{outcome="fenced"}') == 1
    assert proxy.metric('settled_total{settlement="fenced"}') == 1
    assert (await ask(proxy.port, request())).slug == "record-corrupt"
    assert len(upstream.received) == 1


@pytest.mark.fault(36, 47)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_a_fenced_owner_answers_what_the_record_says(proxies, upstream, own_store, streamed):
    """The key was freed by hand and executed elsewhere: the first owner's client gets that answer, or an abort."""
    tap = Tap()
    upstream.script = tap.script
    first, second = (proxies(upstream, own_store.url, LEASE_MS=10_000) for _ in range(2))
    original = asyncio.ensure_future(ask(first.port, request()))
    await until(lambda: upstream.received)
    if streamed:
        tap.send(CHUNKED, chunk(ONE))
        await until(lambda: own_store.has_body())
    own_store.forget()
    upstream.script = answering(b"HTTP/1.1 201 Made\r\nContent-Length: 5\r\n\r\ntheir")
    assert (await ask(second.port, request())).body == b"their"
    tap.end(*([chunk(TWO), LAST_CHUNK] if streamed else [OK]))
    answer = await original
    if streamed:
        assert not answer.complete
    else:
        assert (answer.status, answer.body, answer.header("oncegate-status")) == (201, b"their", b"replayed")
    assert (await ask(first.port, request())).body == b"their"
    assert len(first.events("claim fenced")) == 1
    assert first.metric("claims_lost_total") in (1, 2)  # the claim that is known by name, and the store's loss
    assert second.metric("claims_lost_total") in (0, 1)  # the store's loss
    assert second.events("claim fenced") == []


# A store that is not fit ...


@pytest.mark.fault(14)
async def test_a_change_of_the_eviction_policy_is_noticed(proxies, upstream, own_valkey):
    """A live change to a policy that evicts makes it not ready within seconds, and back."""
    proxy = proxies(upstream, own_valkey.url)
    with own_valkey.client() as client:
        for policy, status in (("allkeys-lru", 503), ("noeviction", 200)):
            client.config_set("maxmemory-policy", policy)
            await until(lambda status=status: proxy.admin("/readyz")[0] == status, 5)
            assert (policy in proxy.admin("/readyz")[1]) == (status == 503)


async def test_a_store_that_became_a_replica_is_noticed(proxies, upstream, own_valkey):
    """A store that takes no writes any more makes it not ready, and a promotion ready again."""
    proxy = proxies(upstream, own_valkey.url)
    with own_valkey.client() as client:
        for primary, status in ((("127.0.0.1", 1), 503), (("no", "one"), 200)):
            client.replicaof(*primary)
            await until(lambda status=status: proxy.admin("/readyz")[0] == status, 5)
            assert ("replica" in proxy.admin("/readyz")[1]) == (status == 503)


@pytest.mark.fault(13)
async def test_a_full_store_refuses_the_new_and_completes_the_running(proxies, upstream, own_valkey):
    """At the memory limit: a new key gets 503; replay, 409 and 422 are answered; what runs completes."""
    proxy = proxies(upstream, own_valkey.url, LEASE_MS=1500)
    port = proxy.port
    assert (await ask(port, request(key="stored"))).status == 200
    small, large, done = Tap(), Tap(), asyncio.Event()
    running = {}
    for key, script in (("small", small.script), ("large", large.script), ("busy", holding(done))):
        upstream.script = script
        running[key] = asyncio.ensure_future(ask(port, request(key=key)))
        await until(lambda: len(upstream.received) == 1 + len(running))
    large.send(CHUNKED, chunk(ONE))
    await until(lambda: own_valkey.has_body())
    with own_valkey.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] // 2)
    executions = len(upstream.received)

    began = asyncio.get_running_loop().time()
    assert_unavailable(await ask(port, request(key="new")))
    assert asyncio.get_running_loop().time() - began < 3
    replay = await ask(port, request(key="stored"))
    assert (replay.header("oncegate-status"), replay.body) == (b"replayed", b"ok")
    assert (await ask(port, request(key="busy"))).slug == "in-flight"
    assert (await ask(port, request(key="stored", body=b"other"))).slug == "key-reused"
    assert (await ask(port, request(key="busy", body=b"other"))).slug == "key-reused"
    await until(lambda: proxy.metric("store_memory_ratio") > 0.9)
    await asyncio.sleep(3)  # two leases: they are renewed at the limit too
    assert (await ask(port, request(key="busy"))).slug == "in-flight"

    small.end(OK)
    answer = await running["small"]
    assert (answer.status, answer.body, answer.complete) == (200, b"ok", True)
    large.end(chunk(TWO), LAST_CHUNK)
    answer = await running["large"]
    assert (answer.status, answer.body, answer.complete) == (200, ONE + TWO, True)
    for key in ("small", "large"):
        again = await ask(port, request(key=key))
        assert (again.status, again.slug, again.problem["original_status"]) == (409, "response-not-kept", 200)

    with own_valkey.client() as client:
        client.config_set("maxmemory", 0)
    await until(lambda: proxy.metric("store_memory_ratio") < 0.9)
    done.set()
    assert (await running["busy"]).body == b"ok"
    assert (await ask(port, request(key="busy"))).header("oncegate-status") == b"replayed"
    upstream.script = answering(OK)
    assert (await ask(port, request(key="new"))).header("oncegate-status") == b"executed"
    assert len(upstream.received) == executions + 1
