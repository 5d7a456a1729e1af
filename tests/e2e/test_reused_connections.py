"""What a connection to the upstream still has from the request before: a late second answer, an end, a user."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial

import pytest

from tests.parts import OK, RawClient, RawUpstream, Received, abort, answering, ask, request, until

CLIENTS, EXCHANGES = 8, 400
LATEST_S = 0.05
KINDS = ("keyed", "POST", "GET", "upgrade")
OPENING = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==",
)


def answering_twice(dice: random.Random, share: float, latest_s: float) -> object:
    """Return a script that answers with the request's target. A share of the answers is written a second time, late."""

    async def script(_: RawUpstream, __: object, writer: asyncio.StreamWriter, got: Received) -> None:
        await asyncio.sleep(dice.choice((0, 0, 0.003)))
        target = got.line.split(b" ")[1]
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(target), target)
        writer.write(answer)
        if dice.random() < share:
            asyncio.get_running_loop().call_later(dice.uniform(0, latest_s), late, writer, answer)

    def late(writer: asyncio.StreamWriter, answer: bytes) -> None:
        if not writer.is_closing():
            writer.write(answer)

    return script


def sending(kind: str, target: str, tenant: str) -> bytes:
    """Return a request of a kind."""
    whose = f"Authorization: Bearer {tenant}"
    match kind:
        case "keyed":
            return request("POST", target, f"key{target}", b"{}", whose)
        case "POST":
            return request("POST", target, None, b"{}", whose)
        case "upgrade":
            return request("GET", target, None, b"", whose, *OPENING)
    return request("GET", target, None, b"", whose)


async def wrong_answers(port: int, targets: Iterator[int], tenant: str) -> list[str]:
    """Ask one after the other, and return what was answered with another request's answer."""
    wrong = []
    with closing(await RawClient.open(port)) as client:
        for number in targets:
            kind, target = KINDS[number % len(KINDS)], f"/{number}"
            sent = sending(kind, target, tenant)
            # A client's connection ends with a request for another protocol that was declined.
            answer = await (ask(port, sent) if kind == "upgrade" else client.ask(sent))
            assert answer is not None
            if answer.status == 200 and answer.body != target.encode():
                wrong.append(f"{kind} {target}: {answer.body!r}")
    return wrong


@pytest.mark.parametrize("tenants", [1, CLIENTS])
async def test_nobody_gets_a_late_second_answer(gate, upstream, tenants):
    """However late within 50 ms a second answer comes, no other request gets it: with a key, without one, or one that
    asks for a WebSocket, of the same tenant or another."""
    upstream.script = answering_twice(random.Random(12), 0.1, LATEST_S * 0.9)
    targets = iter(range(EXCHANGES))
    asking = [wrong_answers(gate.port, targets, f"tenant-{n % tenants}") for n in range(CLIENTS)]
    assert [one for wrong in await asyncio.gather(*asking) for one in wrong] == []
    assert len(upstream.received) == EXCHANGES


async def test_a_shifted_answer_shifts_no_further(gate, upstream):
    """A second answer that comes after the rest is taken for the next one. The connection is closed by the answer that
    follows, though the next request comes before it."""
    first = True

    async def script(_: RawUpstream, __: object, writer: asyncio.StreamWriter, got: Received) -> None:
        nonlocal first
        target = got.line.split(b" ")[1]
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(target), target)
        if first:
            first = False
            await asyncio.sleep(0.25)
            writer.write(answer)
            surplus.append((writer, answer))
            return
        if surplus:
            late, again = surplus.pop()
            late.write(again)
        await asyncio.sleep(0.15)
        with suppress(ConnectionError):
            writer.write(answer)

    surplus: list[tuple[asyncio.StreamWriter, bytes]] = []
    upstream.script = script
    with closing(await RawClient.open(gate.port)) as client:
        bodies = []
        for number in range(4):
            answer = await client.ask(request("POST", f"/{number}", f"k{number}"))
            assert answer is not None
            bodies.append(answer.body)
            await asyncio.sleep(0.4 if number == 0 else 0)
    assert bodies[2:] == [b"/2", b"/3"]


@pytest.mark.parametrize("rest_s", [0.1, 0])
async def test_without_reuse_no_connection_is_used_twice(proxies, upstream, valkey, rest_s):
    """With REUSE_IDLE_S=0 each request has a connection of its own, and it is closed after the response: whether it has
    a key, has none, or asks for a WebSocket."""
    gate = proxies(upstream, valkey.url, UPSTREAM_REUSE_IDLE_S=0, UPSTREAM_REST_S=rest_s)
    upstream.script = answering_twice(random.Random(1), 0, 0)
    assert await wrong_answers(gate.port, iter(range(12)), "one") == []
    assert [one.connection for one in upstream.received] == [*range(1, 13)]
    await until(lambda: not upstream.writers)


# A 408 on a connection that was used before ...

TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
OF_OLD = b"HTTP/1.0 408 Request Time-out\r\nCache-Control: no-cache\r\n\r\n"
RULE = """
[[upstream]]
name = "api"
url = "%s"
rest_s = 0

[[rule]]
name = "all"
upstream = "api"
"""
# What a rule says of a 408 -> the status that the client gets, and what becomes of the key.
STORED, RELEASED = "ambiguous_statuses = []", 'release_statuses = ["408"]'


async def timed_out(_: RawUpstream, __: object, writer: asyncio.StreamWriter, got: Received, end: bytes) -> None:
    """Answer the first request of a connection, and end it with these bytes at the second."""
    is_first = got.connection not in SERVED
    SERVED.add(got.connection)
    writer.write(OK if is_first else end)
    if not is_first:
        writer.close()


SERVED: set[int] = set()


@pytest.mark.parametrize(
    ("says", "end", "status", "state"),
    [
        ("", TIMED_OUT, 502, b"unknown"),
        ("", OF_OLD, 502, b"unknown"),
        (STORED, TIMED_OUT, 502, b"unknown"),
        (STORED, OF_OLD, 502, b"unknown"),
        (STORED, TIMED_OUT.replace(b"close", b"keep-alive"), 408, b"complete"),
        (RELEASED, TIMED_OUT, 408, None),
    ],
)
async def test_a_408_that_ends_a_used_connection_answers_nobody(
    proxies, upstream, valkey, tmp_path, says, end, status, state
):
    """It may be about the connection's idleness: it is never stored, and the key is unknown, or free where the rule
    says that nothing ran. One that leaves the connection open is the request's."""
    SERVED.clear()
    upstream.script = partial(timed_out, end=end)
    (tmp_path / "rules.toml").write_text(RULE % upstream.url + says)
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", UPSTREAM_REST_S=0, UPSTREAM_REUSE_IDLE_S=60)
    assert (await ask(gate.port, request(key="first"))).status == 200
    second = await ask(gate.port, request(key="second"))
    assert [one.connection for one in upstream.received] == [1, 1]
    assert second.status == status
    assert valkey.states() == sorted([b"complete"] + ([state] if state else []))
    if status == 502:
        assert second.slug == "upstream-lost"


async def test_a_408_on_a_new_connection_is_this_requests(proxies, upstream, valkey, tmp_path):
    """Nothing was idle: it means what the rule says of its status."""
    upstream.script = answering(TIMED_OUT)
    (tmp_path / "rules.toml").write_text(RULE % upstream.url + STORED)
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml")
    assert (await ask(gate.port, request())).status == 408
    assert valkey.states() == [b"complete"]


async def test_after_a_408_an_idempotent_upstream_gets_the_request_again(proxies, upstream, valkey, tmp_path):
    """An upstream that executes a key once by itself is asked once more, as after any lost response."""
    SERVED.clear()
    upstream.script = partial(timed_out, end=TIMED_OUT)
    (tmp_path / "rules.toml").write_text(RULE % upstream.url + "upstream_idempotent = true")
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", UPSTREAM_REUSE_IDLE_S=60)
    for key in ("first", "second"):
        assert (await ask(gate.port, request(key=key))).status == 200
    assert [one.connection for one in upstream.received] == [1, 1, 2]


# Authentication that holds for a connection ...


@pytest.mark.parametrize(
    ("credentials", "challenge"),
    [
        (b"Authorization: NTLM TlRMTVNTUAAB", b""),
        (b"authorization:negotiate YIIZ", b""),
        (b"X-Any: 1", b"WWW-Authenticate: Negotiate oYG3\r\n"),
        (b"X-Any: 1", b'www-authenticate: Basic realm="a", NTLM\r\n'),
    ],
)
async def test_a_connection_with_a_user_of_its_own_is_nobody_elses(proxies, upstream, valkey, credentials, challenge):
    """A connection on which NTLM or Negotiate was spoken is closed after the response: the next request on it, with
    whatever credentials, would be that user's."""
    gate = proxies(upstream, valkey.url, UPSTREAM_REST_S=0, STABLE_SCHEMES="NTLM,Negotiate")
    for kind in KINDS:
        upstream.script = answering(OK.replace(b"Content-Type", challenge + b"Content-Type"))
        asked = sending(kind, f"/{kind}", "x").replace(b"Authorization: Bearer x", credentials)
        assert (await ask(gate.port, asked)).status == 200
        upstream.script = answering(OK)
        for _ in range(2):
            await ask(gate.port, sending("GET", "/other", "eve"))
    used = [one.connection for one in upstream.received]
    bound = [at for at, one in enumerate(upstream.received) if b"/other" not in one.line]
    assert len(bound) == len(KINDS)
    assert [at for at in bound if used[at] in used[at + 1 :]] == []
    # The others share one.
    assert all(used[at + 1] == used[at + 2] for at in bound)


# A kept connection that the upstream closes ...


def closing_used_ones(*, after: bytes = b"", reset: bool = False) -> object:
    """Return a script that answers the first request of a connection. At the next it writes `after`, then closes."""
    used = set[asyncio.StreamWriter]()

    async def script(_: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        if writer not in used:
            used.add(writer)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(after)
        await writer.drain()
        if reset:
            abort(writer)
        writer.close()

    return script


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_read_that_meets_the_close_of_a_kept_connection_is_sent_once_more(
    proxies, upstream, valkey, method, reset
):
    """Without a byte of a response, a GET or HEAD without a key is sent again on a new connection, once."""
    gate = proxies(upstream, valkey.url, UPSTREAM_REST_S=0)
    upstream.script = closing_used_ones(reset=reset)
    asked = request(method, "/read", None, b"")
    with closing(await RawClient.open(gate.port)) as client:
        for count in (1, 3, 5):
            answer = await client.ask(asked, method == "HEAD")
            assert answer is not None
            assert (answer.status, len(upstream.received)) == (200, count)
    assert [one.connection for one in upstream.received] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("asked", "after", "sent"),
    [
        (request("POST", "/", None, b""), b"", 2),
        (request("DELETE", "/", None, b""), b"", 2),
        (request("OPTIONS", "/", None, b""), b"", 2),
        (request("GET", "/", None, b"with a body"), b"", 2),
        (request("POST", "/", "a-key-*", b"{}"), b"", 2),
        (request("GET", "/", None, b""), b"HTTP/1.1 2", 2),
        (request("GET", "/", None, b""), b"HTTP/1.1 100 Continue\r\n\r\n", 2),
    ],
    ids=["POST", "DELETE", "OPTIONS", "a body", "a key", "a byte came", "an interim response came"],
)
async def test_nothing_else_is_sent_twice(proxies, upstream, valkey, asked, after, sent):
    """A request that may change something, one with a body or a key, and one whose response has begun are lost."""
    gate = proxies(upstream, valkey.url, UPSTREAM_REST_S=0)
    upstream.script = closing_used_ones(after=after)
    assert (await ask(gate.port, asked.replace(b"*", b"1"))).status == 200
    assert (await ask(gate.port, asked.replace(b"*", b"2"))).slug == "upstream-lost"
    assert len(upstream.received) == sent


async def test_a_new_connection_that_closes_is_no_reason_to_send_again(proxies, upstream, valkey):
    """A GET on a connection that was not used before is sent once."""
    gate = proxies(upstream, valkey.url)

    async def script(_: RawUpstream, __: object, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.close()

    upstream.script = script
    assert (await ask(gate.port, request("GET", "/", None, b""))).slug == "upstream-lost"
    assert len(upstream.received) == 1
