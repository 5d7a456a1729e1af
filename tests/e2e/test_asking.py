"""`GET /.oncegate/keys`: what became of a key, for whoever could have sent its request, and for nobody else."""

import asyncio
import contextlib
import random
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    Answer,
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

RULES = """
[[rule]]
name = "charges"
path = "/v1/**"
ask_keys = true
resumable = true

[[rule]]
name = "by key"
path = "/open/**"
ask_keys = true
resumable = true
resume_by_key = true

[[rule]]
name = "sessions"
path = "/shop/**"
ask_keys = true
scope = ["cookie:session"]
tombstone_s = 60
retention_s = 2
wait_max_s = 1

[[rule]]
name = "retried"
path = "/again/**"
ask_keys = true
on_unknown = "retry"

[[rule]]
name = "events"
path = "/events"
ask_keys = true
key = "body:/id"

[[rule]]
name = "calls"
path = "/calls"
ask_keys = true
when = { "body:/method" = "call" }

[[rule]]
name = "accounts"
path = "/accounts"
ask_keys = true
scope = ["header:X-Account"]

[[rule]]
name = "silent"
path = "/silent"
"""
WHOLE = b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nwhole"
AMBIGUOUS = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"
BODY = b'{"amount": 1}'
MINE, OTHERS = "Authorization: Bearer mine", "Authorization: Bearer another"
SHOWN = f"Oncegate-Body-Digest: sha-256=:{b64encode(sha256(BODY).digest()).decode()}:"


FIXED = {"RULES_FILE": "rules.toml", "LEASE_MS": 1500, "SECRET": "0123456789abcdef"}


@pytest.fixture
def gate(proxies, upstream, valkey, tmp_path: Path) -> Proxy:
    (tmp_path / "rules.toml").write_text(RULES)
    return proxies(upstream, valkey.url, HOSTS="api.test", **FIXED)


@pytest.fixture
def gates_of_each(proxies, upstream, store, tmp_path: Path) -> Callable[..., Proxy]:
    """Replicas on a store of each kind."""
    (tmp_path / "rules.toml").write_text(RULES)
    return lambda **settings: proxies(upstream, store.url, **FIXED | settings)


def sending(key: str, target: str = "/v1/charges", who: str = MINE) -> bytes:
    return request("POST", target, key, BODY, who)


def question(key: str | None, target: str = "/v1/charges", who: str = MINE, *more: str, method: str = "GET") -> bytes:
    return request(method, "/.oncegate/keys", key, b"", who, f"Oncegate-Target: {target}", *more)


async def told(gate: Proxy, *asked: str, **more: str) -> dict:
    """Return the document that answers a question."""
    answer = await ask(gate.port, question(*asked, **more))
    assert answer.status == 200, answer
    assert (answer.header("cache-control") or b"").startswith(b"private, no-store")
    document = check_document(answer.body)
    assert document["key_id"].encode() == answer.header("oncegate-key-id")
    assert (answer.header("retry-after") is not None) is (document["state"] == "in_flight")
    return document


async def test_what_became_of_a_key(gates_of_each, upstream):
    """From the claim to the end, on any replica; nothing is sent, and no key is claimed."""
    one, two = gates_of_each(), gates_of_each()
    tap = Tap()
    upstream.script = tap.script
    running = asyncio.ensure_future(ask(one.port, sending("a-1")))
    await until(lambda: upstream.received)
    begun = await told(two, "a-1")
    assert (begun["state"], begun["on_repeat"], begun["bytes"]) == ("in_flight", "in-flight", 0)
    tap.send(CHUNKED, chunk(bytes(70_000)))
    async with asyncio.timeout(20):
        while (document := await told(two, "a-1"))["bytes"] == 0 or document.get("stage") != "responding":
            await asyncio.sleep(0.1)
    tap.end(chunk(b"end"), LAST_CHUNK)
    assert (await running).complete
    document = await told(two, "a-1")
    assert (document["state"], document["on_repeat"]) == ("complete", "replay")
    assert (document["status"], document["bytes"], document["since"]) == (200, 70_003, begun["since"])
    upstream.script = answering(AMBIGUOUS)
    assert (await ask(one.port, sending("a-2"))).status == 502
    document = await told(one, "a-2")
    assert (document["state"], document["status"], document["on_repeat"]) == ("unknown", 502, "outcome-unknown")
    assert (await ask(one.port, sending("a-3", "/again/x"))).status == 502
    assert (await told(one, "a-3", "/again/y"))["on_repeat"] == "execution"
    sent = len(upstream.received)
    absent = await ask(one.port, question("a-4"))
    assert (absent.status, absent.slug, absent.problem["state"]) == (404, "key-absent", "absent")
    assert absent.problem["on_repeat"] == "execution"
    assert len(upstream.received) == sent
    upstream.script = answering(WHOLE)
    assert (await ask(two.port, sending("a-4"))).header("oncegate-status") == b"executed"


async def test_an_owner_that_died_and_a_response_that_expired(gates_of_each, upstream):
    """The lease decides as for a duplicate, and the tombstone tells."""
    one, two = gates_of_each(), gates_of_each()
    session = "Cookie: session=1"
    upstream.script = answering(WHOLE)
    assert (await ask(one.port, sending("b-1", "/shop/cart", session))).status == 201
    upstream.script = holding(asyncio.Event())
    running = asyncio.ensure_future(ask(one.port, sending("b-2")))
    await until(lambda: len(upstream.received) == 2)
    assert (await told(two, "b-2"))["state"] == "in_flight"
    one.kill()
    async with asyncio.timeout(20):
        while (document := await told(two, "b-2"))["state"] != "unknown":
            await asyncio.sleep(0.1)
    assert document["on_repeat"] == "outcome-unknown"
    running.cancel()
    async with asyncio.timeout(20):
        while (document := await told(two, "b-1", "/shop/cart", session))["state"] == "complete":
            await asyncio.sleep(0.1)
    assert (document["state"], document["status"], document["on_repeat"]) == ("expired", 201, "key-expired")


REFUSED = {
    "no such setting": (question("k", "/silent"), 403, "ask-refused"),
    "a rule of no key": (question("k", "/v1/charges", MINE, "Oncegate-Method: GET"), 403, "ask-refused"),
    "a key in the body": (question("k", "/events"), 403, "ask-refused"),
    "a rule by the body": (question("k", "/calls"), 403, "ask-refused"),
    "no credential": (question("k", "/v1/charges", "X-Nothing: 1"), 403, "ask-refused"),
    "an empty credential": (question("k", "/v1/charges", "Authorization: "), 403, "ask-refused"),
    "a cookie that anybody has": (question("k", "/v1/charges", "Cookie: language=en"), 403, "ask-refused"),
    "an account alone": (question("k", "/accounts", "X-Account: 7"), 403, "ask-refused"),
    "another cookie": (question("k", "/shop/cart", "Cookie: language=en"), 403, "ask-refused"),
    "a credential that changes": (question("k", "/v1/charges", "Authorization: Digest x"), 400, "scope-unstable"),
    "no key": (question(None), 400, "key-missing"),
    "no usable key": (question(","), 400, "key-invalid"),
    "no target": (request("GET", "/.oncegate/keys", "k", b"", MINE), 400, "blank"),
    "two targets": (question("k", "/v1/a", MINE, "Oncegate-Target: /v1/b"), 400, "blank"),
    "no path": (question("k", "v1/a"), 400, "blank"),
    "a host that is none": (question("k", "/v1/a", MINE, "Oncegate-Host: a b"), 400, "blank"),
    "another host": (question("k", "/v1/a", MINE, "Oncegate-Host: elsewhere.test"), 421, "blank"),
    "a method that is none": (question("k", "/v1/a", MINE, "Oncegate-Method: TRACE"), 405, "blank"),
    "a query": (question("k").replace(b"/keys ", b"/keys?key=k "), 400, "blank"),
    "a path behind": (question("k").replace(b"/keys ", b"/keys/k "), 400, "blank"),
    "another method": (question("k", method="POST"), 405, "blank"),
    "to remove it": (question("k", method="DELETE"), 405, "blank"),
}


async def test_questions_that_are_not_answered(gate, upstream, valkey):
    """Each with a problem; the API and the records see nothing of them."""
    for what, (raw, status, slug) in REFUSED.items():
        answer = await ask(gate.port, raw)
        assert (answer.status, answer.slug) == (status, slug), what
        assert answer.problem["retryable"] is False, what
        assert (answer.header("cache-control") or b"").endswith(b"no-store"), what
    assert upstream.received == []
    assert valkey.states() == []


async def test_no_question_makes_the_proxy_fail(gate, upstream):
    """Whatever stands in its fields: it is refused, or the key is absent."""
    values = random.Random(17)
    odd = [
        b"",
        b"\xff" * 9,
        b"/" * 5000,
        b"*",
        b"http://[::1",
        b"//a/..%2f",
        b"/v1/\xc3\xa4?\x80",
        b'"',
        b"A" * 300,
        b"CONNECT",
    ]
    names = [
        b"Oncegate-Target",
        b"Oncegate-Method",
        b"Oncegate-Host",
        b"Oncegate-Body-Digest",
        b"Idempotency-Key",
        b"Cookie",
    ]
    for _ in range(150):
        lines = [b"%b: %b" % (values.choice(names), values.choice([*odd, b"/v1/a", b"POST"])) for _ in range(4)]
        raw = question("z-1").replace(b"\r\n\r\n", b"\r\n" + b"\r\n".join(lines) + b"\r\n\r\n")
        answer = await ask(gate.port, raw)
        assert answer.status in (400, 403, 404, 405, 421), (answer, raw)
    assert gate.events("request failed") == []
    assert upstream.received == []


async def test_the_path_is_the_apis_where_nobody_asks(proxies, upstream, valkey):
    """Without the setting nothing is reserved."""
    gate = proxies(upstream, valkey.url)
    assert (await ask(gate.port, question("k"))).status == 200
    assert upstream.received[0].line == b"GET /.oncegate/keys HTTP/1.1"


async def test_the_setting_is_for_every_rule(proxies, upstream, valkey):
    """And the host, the method and the target of the request decide as they do for the request."""
    gate = proxies(upstream, valkey.url, ASK_KEYS="true")
    assert (await ask(gate.port, request("PATCH", "/a?b=1", "k", BODY, MINE, host="one.test"))).status == 200
    shown = ("Oncegate-Method: patch", "Oncegate-Host: one.test")
    assert (await told(gate, "k", "/a?b=1", MINE, *shown))["state"] == "complete"
    assert upstream.received[-1].line.startswith(b"PATCH")


async def test_who_gets_the_address_of_the_response(gates_of_each, upstream):
    """Who shows what was sent, or under a rule that says so who has key and credential."""
    gate = gates_of_each()
    upstream.script = answering(WHOLE)
    for key, target in (("l-1", "/v1/charges"), ("l-2", "/open/charges")):
        assert (await ask(gate.port, sending(key, target))).status == 201

    async def link(*asked: str) -> bytes | None:
        answer = await ask(gate.port, question(*asked))
        assert answer.status == 200
        return answer.header("link")

    wrong = f"Oncegate-Body-Digest: sha-256=:{b64encode(bytes(32)).decode()}:"
    assert await link("l-1") is None
    assert await link("l-1", "/v1/charges", MINE, wrong) is None
    shown = await link("l-1", "/v1/charges", MINE, SHOWN)
    assert shown is not None
    assert await link("l-2", "/open/charges") is not None
    address = shown.partition(b"<")[2].partition(b">")[0].decode()
    assert (await ask(gate.port, request("GET", address, None, b""))).body == b"whole"


async def test_a_page_of_a_listed_origin_may_ask(proxies, upstream, valkey):
    """Its preflight is granted, and it may read the answer, also one that refuses."""
    gate = proxies(upstream, valkey.url, ASK_KEYS="true", CORS_ORIGINS="https://shop.test")
    for origin, is_granted in (("https://shop.test", True), ("https://other.test", False)):
        wish = ("Access-Control-Request-Method: GET", "Access-Control-Request-Headers: Oncegate-Target")
        preflight = await ask(gate.port, request("OPTIONS", "/.oncegate/keys", None, b"", f"Origin: {origin}", *wish))
        assert (preflight.status, preflight.header("allow")) == (204, b"OPTIONS, GET, HEAD")
        headers = preflight.header("access-control-allow-headers") or b""
        assert (b"Oncegate-Target" in headers) is is_granted
        for who in (MINE, "X-Nothing: 1"):
            answer = await ask(gate.port, question("p-1", "/a", who, f"Origin: {origin}"))
            assert answer.status in (403, 404)
            granted = answer.header("access-control-allow-origin")
            assert granted == (origin.encode() if is_granted else None)
    assert upstream.received == []


async def test_one_connection_asks_no_more_than_some(gate, upstream):
    """Beyond that 429, and the connection goes on."""
    with contextlib.closing(await RawClient.open(gate.port)) as client:
        answers = [await client.ask(question("m-1")) for _ in range(40)]
        statuses = [answer.status for answer in answers if answer is not None]
        assert len(statuses) == 40
        assert statuses[:20] == [404] * 20
        assert statuses.count(429) > 5
        limited = next(answer for answer in answers if answer is not None and answer.status == 429)
        assert (limited.slug, limited.header("retry-after")) == ("overloaded", b"1")
        again = await client.ask(sending("m-1"))
        assert again is not None
        assert again.status == 200


async def asked_of(valkey: Valkey, client: RawClient, raw: bytes) -> tuple[Answer, list[str]]:
    """Return the answer to a question, and the commands that clients sent to the store meanwhile."""
    with valkey.client() as watching, watching.monitor() as monitor:
        answer = await client.ask(raw)
        assert answer is not None
        seen = []
        while monitor.connection.can_read(timeout=0.05):
            if (command := monitor.next_command())["client_type"] != "lua":
                seen.append(command["command"].split(" ")[0].upper())
    return answer, seen


def told_apart(answer: Answer) -> tuple[object, ...]:
    """Return what a client sees of an answer, but for the date and the ids of request and key."""
    own = ("date", "x-request-id", "oncegate-key-id", "instance", "key")
    headers = sorted((name, value) for name, value in answer.headers if name.lower().decode() not in own)
    return answer.status, answer.reason, headers, len(answer.body)


@pytest.mark.parametrize("state", ["in flight", "complete", "unknown"])
async def test_a_key_of_another_tenant_is_as_one_of_nobody(proxies, upstream, valkey, tmp_path, state):
    """The same answer, and the same commands to the store: nothing tells that somebody else has used it."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", SECRET="0123456789abcdef", LEASE_MS=2000)
    upstream.script = {
        "in flight": holding(asyncio.Event()), "complete": answering(WHOLE), "unknown": answering(AMBIGUOUS)
    }[state]  # fmt: skip
    used = asyncio.ensure_future(ask(gate.port, sending("t-1")))
    await until(lambda: upstream.received)
    if state != "in flight":
        await used
    assert (await told(gate, "t-1"))["state"] == state.replace(" ", "_")
    with contextlib.closing(await RawClient.open(gate.port)) as client:
        # Renewals of a lease, and looks at the store's health, may fall in between.
        for _ in range(10):
            foreign, foreign_cost = await asked_of(valkey, client, question("t-1", "/v1/charges", OTHERS, SHOWN))
            absent, absent_cost = await asked_of(valkey, client, question("t-2", "/v1/charges", OTHERS, SHOWN))
            assert (foreign.slug, told_apart(foreign)) == ("key-absent", told_apart(absent))
            if foreign_cost == absent_cost == ["EVALSHA"]:
                break
        assert foreign_cost == absent_cost == ["EVALSHA"]
    used.cancel()
