"""An API that executes each key once: a retry of an unknown key is sent on with the same key, and settles it."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.parts import Answer, RawUpstream, Received, ask, request, until
from tests.probes import Probe
from tests.zygote import Forked

RULES = """
[[rule]]
name = "charges"
path = "/charges"
upstream_idempotent = true
on_duplicate = "wait"
upstream_key_retention_s = {kept_s}
on_client_gone = "cancel"
cancel_grace_s = 0

[[rule]]
name = "narrow"
path = "/narrow"
upstream_idempotent = true
fingerprint = ["target"]
"""
LEASE_MS = 400
EXECUTED, REPLAYED = (201, "executed"), (201, "replayed")

Start = Callable[..., Awaitable[Forked]]


class Ledger:
    """An API that executes each key once, and answers it with what came of that.

    `losing`: what comes in place of the next answers, nothing for a connection that is closed. `working`: a first
    request with a key is executed once this is set; meanwhile others with its key get a 409.
    """

    def __init__(self) -> None:
        self.executed: Counter[bytes] = Counter()
        self.bodies: dict[bytes, bytes] = {}
        self.losing: list[bytes] = []
        self.working = asyncio.Event()
        self.working.set()
        self.at_once: Counter[bytes] = Counter()
        self.most_at_once = 0

    async def __call__(self, _: RawUpstream, __: object, writer: asyncio.StreamWriter, got: Received) -> None:
        (key,) = got.header("idempotency-key")
        self.at_once[key] += 1
        self.most_at_once = max(self.most_at_once, self.at_once[key])
        try:
            answer = await self._execute(key, got.body)
        finally:
            self.at_once[key] -= 1
        if self.losing:
            answer = self.losing.pop(0)
        if answer:
            writer.write(answer)
        else:
            writer.close()

    async def _execute(self, key: bytes, body: bytes) -> bytes:
        if key not in self.bodies:
            self.bodies[key] = body
            await self.working.wait()
            self.executed[key] += 1
        elif not self.executed[key]:
            return answering(409, b"busy")
        if self.bodies[key] != body:
            return answering(400, b"another body")
        return answering(201, json.dumps({"number": list(self.bodies).index(key)}).encode())


def answering(status: int, body: bytes = b"", *fields: bytes) -> bytes:
    head = (b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *fields)
    return b"\r\n".join((*head, b"", body))


BAD_GATEWAY = answering(502)


def charge(key: str = "k", body: bytes = b"x", path: str = "/charges") -> bytes:
    return request("POST", path, key, body)


def told(answer: Answer) -> tuple[int, str]:
    return answer.status, (answer.header("oncegate-status") or b"").decode()


# What the store has no part in: tests/test_same_key.py has its verbs.
in_one_store = pytest.mark.parametrize("stored", ["valkey, packed"], indirect=True)


@pytest.fixture
def ledger(upstream: RawUpstream) -> Ledger:
    ledger = upstream.script = Ledger()
    return ledger


@pytest.fixture
def start(fork: Start, upstream: RawUpstream, stored: Probe, tmp_path: Path) -> Start:
    """Start a proxy on the store, with these values in its rules."""

    async def start(kept_s: float = 3600, **settings: object) -> Forked:
        rules = tmp_path / f"rules-{kept_s}.toml"
        rules.write_text(RULES.format(kept_s=kept_s))
        return await fork(upstream, stored.url, RULES_FILE=rules, LEASE_MS=LEASE_MS, **settings)

    return start


@pytest.mark.parametrize("how", ["every answer is lost", "the owner is killed"])
async def test_a_retry_settles_an_unknown_key(start, ledger, upstream, how):
    """Through another proxy; the API has executed it once, and every duplicate gets that response from then on."""
    first, other = await start(), await start()
    if how == "the owner is killed":
        ledger.working.clear()
        original = asyncio.ensure_future(ask(first.port, charge()))
        await until(lambda: upstream.received)
        first.kill()
        await asyncio.wait([original])
        assert original.exception() is not None
        ledger.working.set()
    else:
        ledger.losing = [b""] * 4
        answer = await ask(first.port, charge())
        assert (told(answer), answer.header("x-should-retry")) == ((502, "unknown"), b"true")
    assert (await ask(other.port, charge(body=b"other"))).slug == "key-reused"
    again = await ask(other.port, charge())
    assert (told(again), again.body) == (EXECUTED, b'{"number": 0}')
    assert told(await ask(other.port, charge())) == REPLAYED
    assert (await ask(other.port, charge(body=b"other"))).slug == "key-reused"
    assert other.metric('reconciled_total{by="resend"}') == 1
    assert ledger.executed == {b"k": 1}
    assert {one.body for one in upstream.received} == {b"x"}


@in_one_store
async def test_many_retries_at_once_are_sent_one_at_a_time(start, ledger, upstream):
    """Through two proxies: the API sees one, and all get its response."""
    proxies = [await start(), await start()]
    ledger.losing = [BAD_GATEWAY]
    assert told(await ask(proxies[0].port, charge())) == (502, "unknown")
    answers = await asyncio.gather(*[ask(proxies[number % 2].port, charge()) for number in range(12)])
    assert Counter(map(told, answers)) == {EXECUTED: 1, REPLAYED: 11}
    assert len(upstream.received) == 2
    assert (ledger.most_at_once, ledger.executed) == (1, {b"k": 1})


@in_one_store
async def test_after_the_time_of_the_api_nothing_is_sent(start, ledger, upstream):
    """It counts from the first claim, also where a retry was sent meanwhile: the API may have forgotten the key."""
    proxy = await start(kept_s=2)
    ledger.losing = [BAD_GATEWAY] * 2
    began = asyncio.get_running_loop().time()
    assert told(await ask(proxy.port, charge())) == (502, "unknown")
    await asyncio.sleep(1)
    assert told(await ask(proxy.port, charge())) == (502, "unknown")
    await asyncio.sleep(max(0.0, began + 2 - asyncio.get_running_loop().time()))
    assert (await ask(proxy.port, charge())).slug == "outcome-unknown"
    assert len(upstream.received) == 2


@in_one_store
async def test_nothing_is_sent_once_a_connection_came_too_late(start, ledger, upstream):
    """A retry in time that waits for a connection renews its lease meanwhile, and the API forgets the key."""
    proxy = await start(kept_s=2, MAX_UPSTREAM_CONNECTIONS=1, CONNECT_TIMEOUT_S=20)
    ledger.losing = [BAD_GATEWAY]
    began = asyncio.get_running_loop().time()
    assert told(await ask(proxy.port, charge())) == (502, "unknown")
    ledger.working.clear()
    busy = asyncio.ensure_future(ask(proxy.port, charge("busy")))
    await until(lambda: len(upstream.received) == 2)
    late = asyncio.ensure_future(ask(proxy.port, charge()))
    await asyncio.sleep(max(0.0, began + 2 - asyncio.get_running_loop().time()))
    ledger.working.set()
    assert (told(await busy), (await late).header("oncegate-status")) == (EXECUTED, b"unknown")
    assert len(upstream.received) == 2


@pytest.mark.fault(75)
@in_one_store
async def test_a_response_that_would_free_the_key(start, ledger):
    """To a first request it does; to a resend it says nothing of the first one: no other body comes under its key."""
    proxy = await start()
    said = answering(429, b"later", b"Retry-After: 1")
    ledger.losing = [said, BAD_GATEWAY, said]
    assert told(await ask(proxy.port, charge("free"))) == (429, "released")
    assert told(await ask(proxy.port, charge())) == (502, "unknown")
    again = await ask(proxy.port, charge())
    assert (told(again), again.body, again.header("retry-after")) == ((429, "unknown"), b"later", b"1")
    assert (await ask(proxy.port, charge(body=b"other"))).slug == "key-reused"
    assert told(await ask(proxy.port, charge())) == EXECUTED
    assert ledger.executed[b"k"] == 1


@pytest.mark.fault(75)
@in_one_store
async def test_a_retry_that_reaches_nobody(start, ledger, upstream):
    """Nothing was sent this time, which says nothing of the first one."""
    proxy = await start(CONNECT_RETRIES=0, CONNECT_TIMEOUT_S=1)
    ledger.losing = [BAD_GATEWAY]
    assert told(await ask(proxy.port, charge())) == (502, "unknown")
    port = upstream.port
    await upstream.close()
    assert told(await ask(proxy.port, charge())) == (502, "unknown")
    assert (await ask(proxy.port, charge(body=b"other"))).slug == "key-reused"
    assert (await ask(proxy.port, charge("free"))).slug == "upstream-unreachable"
    assert upstream.port == port


@in_one_store
async def test_what_somebody_stopped_is_not_sent_on(start, ledger, upstream):
    """Whatever the API recognizes."""
    proxy = await start()
    ledger.working.clear()
    with pytest.raises(TimeoutError):
        await ask(proxy.port, charge(), seconds=0.3)
    await until(lambda: proxy.metric('settled_total{settlement="cancelled"}'))
    ledger.working.set()
    answer = await ask(proxy.port, charge())
    assert (answer.slug, answer.problem["reason"]) == ("outcome-unknown", "cancelled")
    assert len(upstream.received) == 1


@in_one_store
async def test_a_narrow_fingerprint_sends_nothing_on(start, ledger, upstream):
    """What it takes for a retry may be another request for the API."""
    proxy = await start()
    ledger.losing = [BAD_GATEWAY]
    assert told(await ask(proxy.port, charge(path="/narrow"))) == (502, "unknown")
    assert (await ask(proxy.port, charge(path="/narrow", body=b"other"))).slug == "outcome-unknown"
    assert len(upstream.received) == 1


@pytest.mark.fault(76)
async def test_an_owner_that_stood_still(start, ledger, upstream):
    """It comes back after a retry was sent on: it is fenced, and its client gets what the retry has stored."""
    first, other = await start(), await start()
    ledger.working.clear()
    original = asyncio.ensure_future(ask(first.port, charge()))
    await until(lambda: upstream.received)
    first.signal(signal.SIGSTOP)
    await asyncio.sleep(2 * LEASE_MS / 1000)
    retry = asyncio.ensure_future(ask(other.port, charge()))
    # The API is busy with the first one.
    await until(lambda: len(upstream.received) > 1)
    ledger.working.set()
    again = await retry
    assert (told(again), again.body) == (EXECUTED, b'{"number": 0}')
    first.signal(signal.SIGCONT)
    late = await original
    assert (told(late), late.body) == (REPLAYED, b'{"number": 0}')
    assert ledger.executed == {b"k": 1}
