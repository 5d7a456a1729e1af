"""What one tenant can get, learn or change of another's, and what a replay hands on (T5, T7, T8, T9)."""

import asyncio
import random
import re
from typing import Any

import pytest

from tests.hostile.parts import echoing, pipelined
from tests.parts import OK, RawClient, answering, ask, request, until

TENANTS = KEYS = 120


def of(tenant: int, key: int) -> bytes:
    return b"POST /pay HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer t%d\r\nIdempotency-Key: k%d\r\n\r\n" % (tenant, key)


@pytest.mark.timeout(300)
async def test_no_tenant_gets_a_byte_of_another(proxies, valkey):
    """T5: 120 tenants with the same 120 keys in random order, clients leaving in mid-flight: each answer is the
    tenant's own, and each of the 14,400 keys executes once."""
    dice = random.Random(5)
    wanted = [(tenant, key) for tenant in range(TENANTS) for key in range(KEYS)]
    dice.shuffle(wanted)
    pieces = [wanted[start : start + 100] for start in range(0, len(wanted), 100)]
    foreign: list[Any] = []

    async def talk(port: int, piece: list[tuple[int, int]]) -> None:
        if dice.random() < 0.3:  # leave while some of it is under way, then come again
            await pipelined(port, [of(*one) for one in piece], leave_after=dice.randrange(60))
        while piece:
            answers = await pipelined(port, [of(*one) for one in piece])
            own = [b"Bearer t%d|k%d|" % one for one in piece]
            foreign.extend(
                pair for pair in zip(own, answers, strict=True) if pair[1] != (200, pair[0]) and pair[1][0] != 409
            )
            piece = [one for one, (status, _) in zip(piece, answers, strict=True) if status == 409]  # still in flight

    async def client(port: int) -> None:
        while pieces:
            await talk(port, pieces.pop())

    async with echoing() as (url, executed):
        gate = proxies(url, valkey.url, ACCESS_LOG="off")
        await asyncio.gather(*(client(gate.port) for _ in range(16)))
        assert foreign == []
        assert len(executed) == TENANTS * KEYS
        assert set(executed.values()) == {1}
        assert len(list(valkey.client().scan_iter("once:{*", count=10_000))) == TENANTS * KEYS


# Pairs of requests that an undelimited digest would confuse.
CONFUSABLE = [
    [("X-Auth-Token: a", "X-Api-Key: bc"), ("X-Auth-Token: ab", "X-Api-Key: c")],
    [("X-Auth-Token: abc",), ("X-Api-Key: abc",)],
    [("X-Auth-Token: a", "X-Auth-Token: b"), ("X-Auth-Token: a,b",), ("X-Auth-Token: ab",)],
    [("X-Auth-Token: 1:a", "X-Api-Key: b"), ("X-Auth-Token: 1", "X-Api-Key: :ab")],
    [("X-Auth-Token: ",), ("X-Api-Key: ",), ()],
    [("X-Auth-Token: a", "X-Api-Key: "), ("X-Auth-Token: a",)],
    [("Cookie: a",), ("X-Auth-Token: a",), ("X-Api-Key: a",)],
    [("Authorization: Bearer x",), ("Authorization: Bearer  x",), ("Authorization: bearer x",)],
    [("X-Auth-Token: x\xe9",), ("X-Auth-Token: x\xc3\xa9",), ("X-Auth-Token: x",)],
]


@pytest.mark.parametrize("number", range(len(CONFUSABLE)))
async def test_credentials_that_look_alike_run_together_are_other_tenants(standing, behind, number):
    """T5: however fields are cut, joined, spelled or left empty, another credential is another tenant."""
    for extra in CONFUSABLE[number]:
        answer = await ask(standing.port, request("POST", "/x", "confused", b"", *extra))
        assert answer.header("oncegate-status") == b"executed", extra
    assert len(behind.received) == len(CONFUSABLE[number])


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n"])
async def test_no_head_of_one_tenant_is_taken_for_that_of_another(standing, behind, before):
    """T5: a request whose Content-Length is its own head's size lies in wait for another's of that size, in vain."""
    behind.script = answering(OK)
    victim = before + request("POST", "/victim", "k-victim", b"x", "Authorization: Bearer victim")
    head = request(
        "POST", "/thief", None, b"", "Authorization: Bearer thief", f"Content-Length: {len(victim) - len(before)}"
    )
    padded = head[:-2] + b"X: " + b"x" * (len(victim) - len(before) - len(head) - 5) + b"\r\n\r\n"
    assert len(padded) == len(victim) - len(before)
    thief = await RawClient.open(standing.port)  # its request goes on to the upstream, and waits for its body
    thief.writer.write(before + padded)
    await until(lambda: [received for received in behind.received if b"/thief" in received.line])
    assert (await ask(standing.port, victim)).header("oncegate-status") == b"executed"
    assert (await ask(standing.port, victim)).header("oncegate-status") == b"replayed"
    assert [received.line for received in behind.received].count(b"POST /victim HTTP/1.1") == 1
    thief.close()
    await thief.writer.wait_closed()


# What can be measured ...


def commands(valkey) -> dict[str, int]:
    """Return how often each command of the store was called, those of the watch left out."""
    with valkey.client() as store:
        stats = store.info("commandstats")
    return {name: row["calls"] for name, row in stats.items() if not name.startswith(("cmdstat_info", "cmdstat_ping"))}


async def spent(valkey, port: int, raw: bytes) -> tuple[dict[str, int], Any]:
    """Return the store's commands that a request takes, and its answer."""
    with valkey.client() as store:
        store.config_resetstat()
    before = commands(valkey)
    answer = await ask(port, raw)
    after = commands(valkey)
    return {name: calls - before.get(name, 0) for name, calls in after.items() if calls != before.get(name, 0)}, answer


def stable(answer: Any) -> list[tuple[bytes, bytes]]:
    """Return the fields without those that differ by time and by the key and the id of the request itself."""
    own = (b"date", b"retry-after", b"oncegate-key-id", b"x-request-id")
    return [pair for pair in answer.headers if pair[0].lower() not in own]


async def test_whether_another_tenant_has_a_key_takes_the_same_work(proxies, upstream, valkey):
    """T7: a key that another tenant has complete, in flight or unknown costs the same store commands and gets the
    same answer as one that nobody has."""
    gate = proxies(upstream, valkey.url, LEASE_MS=60_000)  # no renewal falls in between
    mallory, alice = "Authorization: Bearer mallory", "Authorization: Bearer alice"
    await ask(gate.port, request("POST", "/x", "warm", b"1", mallory))
    await ask(gate.port, request("POST", "/x", "complete", b"1", alice))
    upstream.script = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 700000\r\n\r\n" + bytes(700_000))
    await ask(gate.port, request("POST", "/x", "large", b"1", alice))
    upstream.script = answering(b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n")
    await ask(gate.port, request("POST", "/x", "unknown", b"1", alice))
    upstream.script = answering(OK, delay_s=30)
    running = asyncio.ensure_future(ask(gate.port, request("POST", "/x", "running", b"1", alice)))
    while len(upstream.received) < 5:
        await asyncio.sleep(0.01)
    upstream.script = answering(OK)
    seen = {}
    for key in ("nobody", "complete", "large", "unknown", "running"):
        work, answer = await spent(valkey, gate.port, request("POST", "/x", key, b"2", mallory))
        assert answer.header("oncegate-status") == b"executed"
        seen[key] = (work, stable(answer), answer.body)
    assert len({repr(one) for one in seen.values()}) == 1, seen
    running.cancel()


async def test_a_mismatch_tells_nothing_of_what_is_stored(proxies, upstream, valkey):
    """T7: under one's own key another request takes the same store commands and gets the same 422, without an Age,
    whatever stands there, small, large, failed or unknown."""
    gate = proxies(upstream, valkey.url, LEASE_MS=60_000)
    answers = {
        "a-small": OK,
        "a-large": b"HTTP/1.1 200 OK\r\nContent-Length: 700000\r\n\r\n" + bytes(700_000),
        "failing": b"HTTP/1.1 500 Oops\r\nSecret: x\r\nContent-Length: 1\r\n\r\nx",
        "unknown": b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n",
    }
    seen = {}
    for key, answer in answers.items():
        upstream.script = answering(answer)
        await ask(gate.port, request("POST", "/x", key, b"1"))
        work, refused = await spent(valkey, gate.port, request("POST", "/x", key, b"2"))
        assert (refused.slug, refused.header("age")) == ("key-reused", None)
        names = re.compile(rb"%b|urn:oncegate:key:[\w-]{32}" % key.encode())
        seen[key] = (work, stable(refused), names.sub(b"its key", refused.body))
    assert len({repr(one[1:]) for one in seen.values()}) == 1, seen
    assert all(one[0]["cmdstat_evalsha"] == 1 for one in seen.values())
    assert all("cmdstat_hgetall" not in one[0] for one in seen.values())


# What a replay depends on ...

REPLAYS, MISMATCH, ANOTHER = b"replayed", b"refused", b"executed"
UNKEYED = (
    "Accept", "Accept-Charset", "Accept-Encoding", "Accept-Language", "Access-Control-Request-Method", "Baggage",
    "Cache-Control", "CDN-Loop", "Content-Language", "Content-Disposition", "Content-Location", "Content-MD5",
    "Content-Range", "Date", "Digest", "DNT", "Early-Data", "Forwarded", "From", "If-Match", "If-Modified-Since",
    "If-None-Match", "If-Range", "If-Unmodified-Since", "Max-Forwards", "Origin", "Pragma", "Priority", "Range",
    "Referer", "Repr-Digest", "Sec-Fetch-Mode", "Sec-CH-UA", "Signature-Input", "Stripe-Signature", "Stripe-Version",
    "Tracestate", "Traceparent", "Upgrade-Insecure-Requests", "User-Agent", "Via", "Want-Digest", "X-Amzn-Trace-Id",
    "X-B3-TraceId", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Prefix",
    "X-Forwarded-Proto", "X-HTTP-Method-Override", "X-Method-Override", "X-Original-URL", "X-Rewrite-URL",
    "X-Request-Id", "X-Correlation-Id", "X-Requested-With", "X-User",
)  # fmt: skip
KEYED = {
    "Content-Type": MISMATCH, "Content-Encoding": MISMATCH, "Authorization": ANOTHER, "X-Api-Key": ANOTHER,
    "Cookie": ANOTHER, "X-Tenant": ANOTHER, "Api-Key": ANOTHER, "Stripe-Account": ANOTHER, "Host": REPLAYS,
}  # fmt: skip


def varied(name: str, value: str) -> bytes:
    key = f"vary-{name}"
    if name == "Host":
        return request("POST", "/x", key, b"1", host=f"{value}.test")
    scheme = "Bearer " if name == "Authorization" else ""
    return request("POST", "/x", key, b"1", f"{name}: {scheme}{value}")


async def test_what_a_changed_field_does_to_a_retry(standing, behind):
    """T8: a retry with another value of a field is a replay, a mismatch or another tenant's, as documented; a
    replay is never another tenant's."""
    outcomes = dict.fromkeys(UNKEYED, REPLAYS) | KEYED
    assert len(outcomes) >= 60
    for name, outcome in outcomes.items():
        assert (await ask(standing.port, varied(name, "one"))).header("oncegate-status") == b"executed"
        answer = await ask(standing.port, varied(name, "two"))
        assert answer.header("oncegate-status") == outcome, name
        assert answer.status == (422 if outcome is MISMATCH else 200)
        assert (await ask(standing.port, varied(name, "one"))).header("oncegate-status") == b"replayed", name
    for changed in (request("POST", "/x?", "vary-Accept", b"1"), request("PATCH", "/x", "vary-Accept", b"1")):
        assert (await ask(standing.port, changed)).slug == "key-reused"


PERSONAL = {
    "Set-Cookie": "sid=s3cret; HttpOnly", "set-cookie": "other=s3cret", "WWW-Authenticate": "Basic realm=s3cret",
    "Authentication-Info": 'nextnonce="s3cret"', "Proxy-Authenticate": "Basic realm=s3cret",
    "Proxy-Authentication-Info": "s3cret", "Proxy-Status": "s3cret",
}  # fmt: skip
SCOPES = ("Authorization: Bearer a", "X-Api-Key: b", "Cookie: c", "X-None: d")


async def test_what_is_given_to_one_person_is_not_replayed(standing, behind, valkey):
    """T9: cookies, challenges and Proxy-* reach the one who caused them alone, in every scope; they are not stored."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in PERSONAL.items())
    for status in (200, 303, 403, 500):
        head = f"HTTP/1.1 {status} X\r\n{fields}X-Kept: yes\r\nContent-Length: 2\r\n\r\nok"
        behind.script = answering(head.encode())
        for scope in SCOPES:
            raw = request("POST", "/x", f"given-{status}", b"", scope)
            first, again = await ask(standing.port, raw), await ask(standing.port, raw)
            assert repr(first.headers).count("s3cret") >= 4
            assert again.header("oncegate-status") == b"replayed"
            assert b"s3cret" not in repr(again).encode()
            assert again.header("x-kept") == b"yes"
    assert "s3cret" not in repr(valkey.records())
