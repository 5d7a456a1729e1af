"""Pages of another origin: what they may read, and which requests they may send."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from flask import Flask
from flask_cors import CORS
from werkzeug.serving import make_server

from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Proxy,
    RawClient,
    RawUpstream,
    answering,
    ask,
    chunk,
    holding,
    request,
    standing_upstream,
    until,
)
from tests.zygote import Zygote, standing_proxy

SHOP, PAY, UNLISTED = "https://shop.example", "https://pay.shop.example", "https://evil.test"
RULES = """
[[rule]]
name = "own"
path = "/own/**"
cors_by = "oncegate"
cors_credentials = true
key = "header:X-Order-Key"

[[rule]]
name = "strict"
path = "/strict/**"
cors_by = "api"

[[rule]]
name = "required"
path = "/required"
guard = "required"
max_request_bytes = 20

[[rule]]
name = "slow"
path = "/slow"
upstream_timeout_s = 0.2

[[rule]]
name = "down"
path = "/down/**"
upstream = "{down}"

[[rule]]
name = "down, and the API decides"
path = "/strict-down"
upstream = "{down}"
cors_by = "api"

[[rule]]
name = "internal"
path = "/v1/**"
headers = {{ "X-Internal" = "*" }}
cors_origins = []

[[rule]]
name = "tools"
path = "/mcp"
preset = "mcp"

[[rule]]
name = "closed"
path = "/closed"
cors_origins = []

[[rule]]
name = "calls"
path = "/calls"
when = {{ "body:/method" = "call" }}
cors_origins = ["https://calls.example"]
"""
EXPOSED = (
    b"Oncegate-Status, Oncegate-Key-Id, Oncegate-Request-Id, Idempotent-Replayed, Retry-After, Link, Location, "
    b"Preference-Applied, X-Request-Id"
)


@pytest.fixture(scope="module")
def cross(zygote: Zygote, shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules for all tests of this file."""
    folder = tmp_path_factory.mktemp("cross")
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        rules = RULES.format(down=f"http://127.0.0.1:{unheard.getsockname()[1]}")
        settings = {
            "CORS_ORIGINS": "https://shop.example, https://*.shop.example",
            "MAX_IN_FLIGHT": 2,
            "CONNECT_RETRIES": 0,
        }
        with standing_proxy(zygote, shared_valkey.url, folder, settings, rules=rules) as proxy:
            yield proxy


@pytest.fixture
async def behind(cross: Proxy, valkey) -> AsyncIterator[RawUpstream]:
    async with standing_upstream(cross) as server:
        yield server


def sent(origin: str | None, target: str = "/orders", key: str | None = "key-1", body: bytes = b"{}") -> bytes:
    return request("POST", target, key, body, *([f"Origin: {origin}"] if origin else []))


def preflight(origin: str = SHOP, target: str = "/orders", headers: str = "content-type,idempotency-key") -> bytes:
    lines = [f"Origin: {origin}", "Access-Control-Request-Method: POST"]
    return request("OPTIONS", target, None, b"", *lines, f"Access-Control-Request-Headers: {headers}")


def api(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "Content-Length: 2", "", "ok"]).encode()


def allowed(answer: Answer) -> str | None:
    value = answer.header("access-control-allow-origin")
    return None if value is None else value.decode()


def may_read(answer: Answer, origin: str) -> bool:
    """Return whether a page may read an answer and all that oncegate says in it; it varies by the origin anyway."""
    assert b"Origin" in (answer.header("vary") or b"")
    assert (answer.header("access-control-expose-headers") == EXPOSED) is (allowed(answer) is not None)
    return allowed(answer) == origin


# Who reads what ...


@pytest.mark.parametrize("answer", [OK, CHUNKED + chunk(b"ok") + LAST_CHUNK])
async def test_every_page_gets_its_own_grant(cross, behind, answer):
    """An API without CORS code: executed and replayed, whole and in pieces, on heads that came before."""
    behind.script = answering(answer)
    client = await RawClient.open(cross.port)
    for number in range(3):
        for origin, listed in ((SHOP, True), (PAY, True), (UNLISTED, False), ("null", False), (None, False)):
            got = await client.ask(sent(origin, key=f"key-{number}"))
            assert got is not None
            assert got.header("oncegate-status") == (b"executed" if origin == SHOP else b"replayed")
            assert may_read(got, origin or "") is listed
    client.close()
    assert len(behind.received) == 3
    got = await ask(cross.port, request("GET", "/orders", None, b"", f"Origin: {PAY}"))
    assert may_read(got, PAY)


async def test_the_api_s_own_grant_is_replayed_to_other_listed_pages(cross, behind):
    """The API grants the page that sent the original; a replay is granted to the page that asks."""
    behind.script = answering(api(f"Access-Control-Allow-Origin: {SHOP}", "Vary: Accept-Encoding, Origin"))
    for origin, grant in ((SHOP, SHOP), (PAY, PAY), (UNLISTED, None), ("null", None)):
        got = await ask(cross.port, sent(origin))
        assert (allowed(got), got.header("vary")) == (grant, b"Accept-Encoding, Origin")


@pytest.mark.parametrize("target", ["/orders", "/strict/orders"])
async def test_what_the_api_refused_is_not_granted(cross, behind, target):
    """Neither now nor in a replay."""
    behind.script = answering(api("Vary: Origin"))
    for _ in range(2):
        assert allowed(await ask(cross.port, sent(SHOP, target))) is None


async def test_the_api_alone_decides(cross, behind):
    """With `cors_by = "api"` oncegate grants nothing that the API does not, but in its own answers."""
    assert allowed(await ask(cross.port, sent(SHOP, "/strict/orders"))) is None
    assert may_read(await ask(cross.port, sent(SHOP, "/strict/orders", body=b"other")), SHOP)


@pytest.mark.parametrize(
    ("status", "slug", "target", "key", "body"),
    [
        (400, "key-missing", "/required", None, b""),
        (400, "key-invalid", "/orders", ",", b""),
        (413, "body-too-large", "/required", "key", b"x" * 30),
        (422, "key-reused", "/orders", "known", b"other"),
        (502, "upstream-unreachable", "/down/orders", "key", b""),
        (502, "upstream-unreachable", "/down/orders", None, b""),
        (504, "upstream-timeout", "/slow", "key", b""),
        (409, "outcome-unknown", "/slow", "key", b""),
    ],
)
async def test_own_answers_can_be_read(cross, behind, status, slug, target, key, body):
    """Whatever oncegate itself answers, a listed page reads, and no other."""
    await ask(cross.port, sent(None, key="known"))
    if target == "/slow":
        behind.script = holding(asyncio.Event())
        if slug == "outcome-unknown":
            await ask(cross.port, sent(None, target, key, body))
    for origin in (SHOP, UNLISTED):
        if slug == "upstream-timeout":
            key = f"{slug} {origin}".replace(" ", "-").replace(":", "")
        got = await ask(cross.port, sent(origin, target, key, body))
        assert (got.status, got.slug) == (status, slug)
        assert may_read(got, origin) is (origin == SHOP)


async def test_an_answer_in_another_form_can_be_read_too(cross, behind):
    """A JSON-RPC error, and a page that a browser shows, which nobody reads but the person."""
    call = b'{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"%b"}}'
    await ask(cross.port, sent(SHOP, "/mcp", "call", call % (1, b"a")))
    error = await ask(cross.port, sent(SHOP, "/mcp", "call", call % (2, b"b")))
    assert (json.loads(error.body)["id"], may_read(error, SHOP)) == (2, True)
    await ask(cross.port, sent(SHOP))
    navigation = "Sec-Fetch-Mode: navigate", "Origin: null"
    page = await ask(cross.port, request("POST", "/orders", "key-1", b"other", *navigation))
    assert (page.header("content-type"), may_read(page, "null")) == (b"text/html; charset=utf-8", False)


async def test_the_answers_of_a_busy_proxy_can_be_read(cross, behind):
    """409 while the original runs, 503 at the limit, and 502 for a response that breaks off."""
    begun = asyncio.Event()
    behind.script = holding(begun, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")
    running = asyncio.create_task(ask(cross.port, sent(SHOP)))
    await until(lambda: behind.received)
    found = await ask(cross.port, sent(PAY))
    assert (found.slug, may_read(found, PAY)) == ("in-flight", True)
    other = asyncio.create_task(ask(cross.port, sent(SHOP, key="key-2")))
    await until(lambda: len(behind.received) == 2)
    found = await ask(cross.port, sent(PAY, key="key-3"))
    assert (found.slug, may_read(found, PAY)) == ("overloaded", True)
    for writer in behind.writers:
        writer.close()
    for found in await asyncio.gather(running, other):
        assert (found.slug, may_read(found, SHOP)) == ("upstream-lost", True)


async def test_what_is_refused_before_a_rule_is_chosen_is_nobody_s(cross, behind):
    """A request that is not understood has no origin that could be believed."""
    got = await ask(cross.port, request("POST", "/orders", "k", b"", f"Origin: {SHOP}", "Connection: origin"))
    assert (got.status, allowed(got)) == (400, None)


# Which requests a page may send ...


async def test_a_preflight_is_answered_for_an_api_without_cors_code(cross, behind):
    """The API is asked, and oncegate speaks for one that says 405."""
    behind.script = answering(api(status="405 Method Not Allowed"))
    got = await ask(cross.port, preflight())
    assert (got.status, allowed(got), got.body) == (204, SHOP, b"")
    assert got.header("access-control-allow-headers") == (
        b"content-type, idempotency-key, Prefer, Last-Event-ID, Range"
    )
    assert got.header("access-control-allow-credentials") is None
    # The page of another listed origin would get no other answer.
    assert [one.line for one in behind.received] == [b"OPTIONS /orders HTTP/1.1"]
    client = await RawClient.open(cross.port)
    again = [await client.ask(preflight()) for _ in range(3)]
    assert [one and (one.status, allowed(one)) for one in again] == [(204, SHOP)] * 3
    client.close()
    behind.script = answering(api(status="503 Service Unavailable"))
    failing = await ask(cross.port, preflight())
    assert (failing.status, failing.header("access-control-max-age")) == (204, b"0")
    behind.script = answering(api(status="405 Method Not Allowed"))
    for origin in (UNLISTED, "null"):
        refused = await ask(cross.port, preflight(origin))
        assert (refused.status, allowed(refused)) == (405, None)


async def test_a_preflight_that_the_api_grants_gets_what_oncegate_needs(cross, behind):
    """The rest of the API's answer stays."""
    lines = f"Access-Control-Allow-Origin: {SHOP}", "access-control-allow-headers: content-type", "X-From: api"
    behind.script = answering(api(*lines))
    got = await ask(cross.port, preflight())
    assert (got.status, allowed(got), got.header("x-from"), got.body) == (200, SHOP, b"api", b"ok")
    assert got.header("access-control-allow-headers") == (
        b"content-type, Idempotency-Key, Prefer, Last-Event-ID, Range"
    )


@pytest.mark.parametrize(
    "refusal",
    [
        api("Access-Control-Allow-Origin: https://only.test"),
        api("Vary: Origin", status="400 Bad Request"),
        api(status="403 Forbidden"),
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
async def test_a_preflight_that_the_api_refuses_is_refused(cross, behind, refusal):
    """Also where the API refuses without a word of CORS."""
    behind.script = answering(refusal)
    assert allowed(await ask(cross.port, preflight())) in (None, "https://only.test")


async def test_silence_is_a_refusal_where_the_api_grants_another_page(cross, behind):
    """Some CORS code refuses without a sign. What it grants to another listed origin shows that it is there."""

    async def only_shop(upstream, reader, writer, received) -> None:
        grant = (
            [f"Access-Control-Allow-Origin: {SHOP}"]
            if received.header("origin") == [SHOP.encode()]
            else ["Allow: POST"]
        )
        writer.write(api(*grant))

    behind.script = only_shop
    refused = await ask(cross.port, preflight(PAY))
    assert (refused.status, allowed(refused)) == (204, None)
    assert [one.header("origin") for one in behind.received] == [[PAY.encode()], [SHOP.encode()]]
    assert [one.header("access-control-request-method") for one in behind.received] == [[b"POST"]] * 2
    assert allowed(await ask(cross.port, preflight(SHOP))) == SHOP


async def test_flask_cors_refuses_in_silence(cross, valkey):
    """A real API with CORS code of its own: what it grants works, with the key; what it refuses is not granted."""
    app = Flask("api")
    app.post("/orders")(lambda: ("ok", 201))
    CORS(app, origins=[SHOP])
    server = make_server("127.0.0.1", 0, app, fd=cross.upstream_socket.fileno())
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        for origin, granted in ((PAY, None), (SHOP, SHOP)):
            assert allowed(await ask(cross.port, preflight(origin))) == granted
        for status in (b"executed", b"replayed"):
            got = await ask(cross.port, sent(SHOP))
            assert (got.status, got.header("oncegate-status"), may_read(got, SHOP)) == (201, status, True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_a_preflight_need_not_reach_the_api(cross, behind):
    """With `cors_by = "oncegate"`, and where the API is down: the page reads the 502 that follows."""
    got = await ask(cross.port, preflight(target="/own/orders", headers="x-order-key"))
    assert (got.status, allowed(got), got.header("access-control-allow-credentials")) == (204, SHOP, b"true")
    assert got.header("access-control-allow-headers") == b"x-order-key, Prefer, Last-Event-ID, Range"
    assert got.header("access-control-max-age") == b"600"
    down = await ask(cross.port, preflight(target="/down/orders"))
    assert (down.status, allowed(down), down.header("access-control-max-age")) == (204, SHOP, b"0")
    assert (await ask(cross.port, preflight(target="/strict-down"))).status == 502
    assert behind.received == []


async def test_a_preflight_is_granted_if_every_possible_rule_grants_it(cross, behind):
    """A header that the page may send, or the body, could choose a rule that does not list the origin."""
    behind.script = answering(api(status="405 Method Not Allowed"))
    assert allowed(await ask(cross.port, preflight(target="/v1/orders"))) == SHOP
    assert allowed(await ask(cross.port, preflight(target="/v1/orders", headers="x-internal"))) is None
    assert allowed(await ask(cross.port, preflight(target="/closed"))) is None
    assert allowed(await ask(cross.port, preflight(target="/calls"))) is None
    assert allowed(await ask(cross.port, preflight("https://calls.example", target="/calls"))) is None


async def test_an_options_that_is_no_preflight_passes(cross, behind):
    """It is a request like any other."""
    got = await ask(cross.port, request("OPTIONS", "/own/orders", None, b"", f"Origin: {SHOP}"))
    assert (got.status, allowed(got), len(behind.received)) == (200, SHOP, 1)
