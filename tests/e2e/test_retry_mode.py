"""ONCEGATE_ON_UNKNOWN=retry: at least once. The next retry takes an unknown key over, with a higher fence."""

import asyncio
import signal

import pytest

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Blackhole,
    RawUpstream,
    Received,
    Tap,
    answering,
    ask,
    chunk,
    holding,
    request,
    until,
)

CREATED = b"HTTP/1.1 201 Made\r\nContent-Length: 4\r\n\r\nmade"


def fences(upstream: RawUpstream) -> list[int]:
    return [int(value) for received in upstream.received for value in received.header("idempotency-fence")]


async def cut(_, __, writer: asyncio.StreamWriter, ___: Received) -> None:
    """Close the connection without an answer."""
    writer.close()


@pytest.mark.fault(22, 32)
@pytest.mark.parametrize("how", ["lost", "timeout", "ambiguous", "killed"])
async def test_the_next_retry_executes_what_nobody_knows(fork, upstream, valkey, how):
    """Whatever made it unknown: executed again under a higher fence, stored, and replayed from then on."""
    upstream.script = {"lost": cut, "ambiguous": answering(b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n")}.get(
        how, holding(asyncio.Event())
    )
    silence_s = 0.5 if how == "timeout" else 300
    first = await fork(upstream, valkey.url, ON_UNKNOWN="retry", LEASE_MS=600, UPSTREAM_TIMEOUT_S=silence_s)
    other = await fork(upstream, valkey.url, ON_UNKNOWN="retry", LEASE_MS=600)
    original = asyncio.ensure_future(ask(first.port, request()))
    await until(lambda: upstream.received)
    if how == "killed":
        first.kill()
        await asyncio.wait([original])
        assert original.exception() is not None
        while (again := await ask(other.port, request())).status == 409:
            assert again.slug == "in-flight"
            upstream.script = answering(CREATED)
    else:
        answer = await original
        assert answer.status == {"timeout": 504}.get(how, 502)
        assert answer.header("oncegate-status") == b"unknown"
        if how != "ambiguous":
            assert answer.header("x-should-retry") == b"true"
            assert (answer.problem["retryable"], answer.problem["reuse_key"]) == (True, True)
        upstream.script = answering(CREATED)
        again = await ask(other.port, request())
    assert (again.status, again.body, again.header("oncegate-status")) == (201, b"made", b"executed")
    assert (await ask(other.port, request())).header("oncegate-status") == b"replayed"
    assert (await ask(other.port, request(body=b"other"))).slug == "key-reused"
    old, new = fences(upstream)
    assert old < new


async def test_the_mode_is_that_of_the_record(fork, upstream, valkey):
    """What was claimed under hold is never executed again, and what was under retry is, whoever asks."""
    upstream.script = cut
    hold, retry = [await fork(upstream, valkey.url, ON_UNKNOWN=mode) for mode in ("hold", "retry")]
    assert (await ask(hold.port, request(key="held"))).header("x-should-retry") == b"false"
    assert (await ask(retry.port, request(key="open"))).header("x-should-retry") == b"true"
    upstream.script = answering(OK)
    assert (await ask(retry.port, request(key="held"))).slug == "outcome-unknown"
    assert (await ask(hold.port, request(key="open"))).header("oncegate-status") == b"executed"
    assert [len(received.header("idempotency-fence")) for received in upstream.received] == [0, 1, 0]


@pytest.mark.parametrize("mode", ["hold", "retry"])
@pytest.mark.parametrize("key", ["key-1", None], ids=["guarded", "passed through"])
async def test_the_fence_is_never_a_clients(fork, upstream, valkey, mode, key):
    """A client's field of that name is dropped in every mode, and its look-alike refused."""
    proxy = await fork(upstream, valkey.url, ON_UNKNOWN=mode)
    extra = ("Idempotency-Fence: 99999999999999999", "idempotency-fence: 99999999999999998")
    answer = await ask(proxy.port, request("POST", "/", key, b"body", *extra))
    assert answer.status == 200
    assert [fence < 9e16 for fence in fences(upstream)] == ([True] if key and mode == "retry" else [])
    assert (await ask(proxy.port, request("POST", "/", key, b"body", "Idempotency_Fence: 9"))).status == 400
    assert len(upstream.received) == 1


@pytest.mark.fault(33, 37, 47)
@pytest.mark.parametrize("streamed", [False, True], ids=["small", "streamed"])
async def test_an_owner_that_was_overtaken_delivers_the_others_answer_or_none(fork, upstream, valkey, streamed):
    """SIGSTOP beyond the lease, taken over meanwhile: afterwards it is fenced, reported, and its answer dropped."""
    tap = Tap()
    upstream.script = tap.script
    still, other = [await fork(upstream, valkey.url, ON_UNKNOWN="retry", LEASE_MS=600) for _ in range(2)]
    original = asyncio.ensure_future(ask(still.port, request()))
    await until(lambda: upstream.received)
    if streamed:
        tap.send(CHUNKED, chunk(b"a" * 100_000))
        await until(lambda: any(b"b0" in fields for fields in valkey.records().values()))
    still.signal(signal.SIGSTOP)
    upstream.script = answering(CREATED)
    while (again := await ask(other.port, request())).status == 409:
        assert again.slug == "in-flight"
    assert again.header("oncegate-status") == b"executed"
    tap.end(*((chunk(b"b" * 100_000), LAST_CHUNK) if streamed else (OK,)))
    still.signal(signal.SIGCONT)
    answer = await original
    if streamed:
        assert not answer.complete
    else:
        assert (answer.status, answer.body, answer.header("oncegate-status")) == (201, b"made", b"replayed")
    old, new = fences(upstream)
    assert old < new
    assert still.metric("claims_lost_total") == 1
    assert len(still.events("claim fenced")) == 1
    for proxy in (still, other):
        assert (await ask(proxy.port, request())).body == b"made"


@pytest.mark.fault(22)
async def test_a_takeover_before_anything_was_sent(fork, upstream, valkey):
    """SIGSTOP between claim and connect beyond the lease, taken over meanwhile: the first owner sends nothing."""
    hole, beyond = Blackhole(), RawUpstream()
    try:
        still = await fork(hole.url, valkey.url, ON_UNKNOWN="retry", LEASE_MS=600, CONNECT_TIMEOUT_S=20)
        other = await fork(upstream, valkey.url, ON_UNKNOWN="retry", LEASE_MS=600)
        original = asyncio.ensure_future(ask(still.port, request()))
        await until(valkey.states)
        still.signal(signal.SIGSTOP)
        upstream.script = answering(CREATED)
        while (again := await ask(other.port, request())).status == 409:
            assert again.slug == "in-flight"
        await beyond.start(hole.place)
        still.signal(signal.SIGCONT)
        answer = await original
        assert (answer.body, answer.header("oncegate-status")) == (b"made", b"replayed")
        assert (again.header("oncegate-status"), len(upstream.received), len(beyond.received)) == (b"executed", 1, 0)
    finally:
        await beyond.close()
        hole.close()
