"""With the head cache off nothing changes but the time: responses, forwarded requests and records are the same."""

import itertools
import random
import re
from pathlib import Path

import pytest

from oncegate.store.record import _FIXED
from tests.e2e.test_again import EXTRA, FORMS, PATHS, RULES
from tests.parts import RawClient, RawUpstream, Received, answering, request

# Different in each run, and not by the cache: times, fences, ports.
MASKED = (
    (re.compile(rb"(?i)^(date: )[^\r]*", re.MULTILINE), rb"\1MASKED"),
    (re.compile(rb"(?i)^(idempotency-fence: |oncegate-execution: .{32}; fence=)\d+", re.MULTILINE), rb"\1MASKED"),
    (re.compile(rb"(?i)^(host: 127\.0\.0\.1):\d+", re.MULTILINE), rb"\1:PORT"),
    (re.compile(rb"(?i)^((?:x|oncegate)-request-id: )[0-9a-f]{16}-[0-9a-f]+", re.MULTILINE), rb"\1MASKED"),
    (re.compile(rb"(?i)^(age: )\d+", re.MULTILINE), rb"\1MASKED"),
)
RESPONSES = (
    b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nX-Id: %d\r\n\r\nok",
    b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 3\r\n\r\nbad",
)
# The id of a request without one.
MADE_ID = re.compile(rb"[0-9a-f]{16}-[0-9a-f]+")
# In a record: its token, its fence and all times of the store.
VOLATILE = (b"token", b"fence", b"lease", b"created", b"self", b"why")


def masked(data: bytes) -> bytes:
    for pattern, instead in MASKED:
        data = pattern.sub(instead, data)
    return data


def asked() -> list[bytes]:
    """Return requests of which each head comes three times, and one key of each twice."""
    numbers = itertools.count()
    requests = []
    for path, form, extra in itertools.product((*PATHS, "/100%25/%b%d%s?a=%%"), FORMS, EXTRA):
        for _ in range(3):
            raw = request("POST", path, form.format(f"key-{next(numbers)}"), b"abc", *extra)
            requests.append(raw)
        requests.append(requests[-1])  # a duplicate
        requests.append(request("GET", path, None, b"", *extra))
    return requests


BY_FIELDS = """
[[rule]]
name = "by-route"
path = "/by-field"
headers = { X-Route = "a*" }
namespace = "a"

[[rule]]
name = "one-order"
path = "/orders/7/*"
namespace = "seven"

[[rule]]
name = "shops"
path = "/shops"
scope = ["header:X-Shop"]

[[rule]]
name = "counted"
path = "/counted"
fingerprint = ["method", "target", "body", "header:X-Count"]

[[rule]]
name = "agents"
path = "/agents"
heartbeat_s = 5
heartbeat_agents = ["app/1*"]

[[rule]]
name = "origins"
path = "/origins"
cors_origins = ["https://a.example"]

[[rule]]
name = "noted"
path = "/noted"
note = "header:X-Request-Id"
"""
# Path -> a field that is acted on there, with some values.
ACTED_ON = {
    "/by-field": ("X-Route: a1", "X-Route: a2", "X-Route: b1"),
    "/shops": ("X-Shop: 1", "X-Shop: 2"),
    "/counted": ("X-Count: 1", "X-Count: 2"),
    "/agents": ("User-Agent: app/1", "User-Agent: app/2"),
    "/origins": ("Origin: https://a.example", "Origin: https://b.example"),
    "/noted": ("X-Order: 1", "X-Order: 2", "X-Order: 3"),
    "/accounts": ("Stripe-Account: a1", "Stripe-Account: a2", "Stripe-Account: a3"),
}
WITH_IDS = ("/orders/{}/pay", "/orders/{}/pay?a={}", "/tenants/t{}", "/v{}/orders", "/o/{}/{}", "/o/a.{}", "/o/%3{}")
CLIENTS = ("Bearer attacker", "Bearer victim-1", "Bearer victim-2", "Digest attacker")
ODD = ("X_Request_Id: 1", "X-Empty:", "Prefer: wait=1", "X-Api_Key: look-alike", "X-Twice: 1\r\nx-twice: 2")


def varying() -> list[bytes]:
    """Return requests of a few clients, whose heads differ in all that may differ, and in what rules act on.

    All use the same keys, and some requests come twice. Credentials are of one length, and one scheme is not stable.
    """
    dice, requests = random.Random(15), []
    for path in (*PATHS, *ACTED_ON, *WITH_IDS):
        for number in range(24):
            # Where one client is alone, ids are all that tells where its requests go.
            who = "Bearer attacker" if path in WITH_IDS[:3] else dice.choice(CLIENTS)
            fields = [f"Authorization: {who}", f"traceparent: 00-{dice.getrandbits(64):x}", f"X-Request-Id: {number}"]
            fields += [dice.choice(ACTED_ON[path])] if path in ACTED_ON else []
            fields += [dice.choice(ODD)] if number % 8 == 7 else []
            where, key = path.replace("{}", str(dice.randint(6, 8))), f"{path}-{dice.randint(0, number)}"
            requests.append(request("POST", where, key, b"x" * dice.choice((2, 2, 3, 4)), *fields))
            if number % 4 == 3:
                requests.append(dice.choice(requests[-8:]))
    return requests


def stored(fields: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Return what a record holds; of a complete one, the response."""
    meta = fields.get(b"meta", b"")
    kept = {name: MADE_ID.sub(b"", value) for name, value in fields.items() if name not in VOLATILE} | {
        b"meta": meta[_FIXED.size : -8]
    }
    return sorted(kept.items())


async def run(proxies, valkey, requests: list[bytes], head_cache: str) -> tuple[list[bytes], list[bytes], list[object]]:
    """Return what the clients got, what the upstream got and what the store has, masked."""
    with valkey.client() as client:
        client.flushall()
    upstream = RawUpstream()
    await upstream.start()
    numbers = itertools.count()

    async def script(server, reader, writer, received: Received) -> None:
        number = next(numbers)
        answer = RESPONSES[number % len(RESPONSES)]
        await answering(answer % number if b"%d" in answer else answer)(server, reader, writer, received)

    upstream.script = script
    proxy = proxies(
        upstream,
        valkey.url,
        RULES_FILE="rules.toml",
        HEAD_CACHE=head_cache,
        UPSTREAM_REUSE_IDLE_S=60,
        UPSTREAM_REST_S=0,
    )
    responses, connection = [], await RawClient.open(proxy.port)
    for raw in requests:
        answer = await connection.ask(raw)
        while answer is not None and answer.status == 100:
            answer = await connection.ask(b"")
        assert answer is not None
        fields = b"".join(b"%s: %s\r\n" % field for field in answer.headers)
        responses.append(masked(b"%d %s\r\n%s\r\n%s" % (answer.status, answer.reason, fields, answer.body)))
        if answer.header("connection") == b"close":
            connection.close()
            connection = await RawClient.open(proxy.port)
    connection.close()
    received = [masked(one.head + b"\r\n" + one.body) for one in upstream.received]
    records = [(name, stored(fields)) for name, fields in sorted(valkey.records().items())]
    proxy.close()
    await upstream.close()
    return responses, received, records


@pytest.mark.timeout(120)
async def test_without_the_head_cache_every_byte_is_the_same(proxies, own_valkey, tmp_path: Path):
    """For clients, the upstream and the store, under every rule; Date, Age, fences, tokens and times are masked."""
    (tmp_path / "rules.toml").write_text(RULES)
    with_cache = await run(proxies, own_valkey, asked(), "true")
    without = await run(proxies, own_valkey, asked(), "false")
    assert with_cache[0] == without[0]
    assert with_cache[1] == without[1]
    assert with_cache[2] == without[2]
    assert len(with_cache[0]) > 200


@pytest.mark.timeout(120)
async def test_heads_that_vary_are_treated_as_if_each_were_new(proxies, own_valkey, tmp_path: Path):
    """T26: what one client taught the proxy is in no request, answer or record of another, whatever the rules read."""
    (tmp_path / "rules.toml").write_text(BY_FIELDS + RULES)
    with_cache = await run(proxies, own_valkey, varying(), "true")
    without = await run(proxies, own_valkey, varying(), "false")
    assert with_cache[0] == without[0]
    assert with_cache[1] == without[1]
    assert with_cache[2] == without[2]
    assert len(with_cache[1]) > 100
    for head in with_cache[1]:
        assert sum(who in head for who in (b"attacker", b"victim-1", b"victim-2")) == 1
