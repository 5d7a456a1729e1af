"""What a head decides is decided once for all requests that say the same but for their key: as if each were new."""

import asyncio
import itertools
import random
import signal
from pathlib import Path

import pytest

from tests.parts import OK, RawClient, RawUpstream, Received, answering, holding, request, until

BY_KEY = """
[[rule]]
name = "by-key"
path = "/by-key"
headers = { Idempotency-Key = "first-*" }
namespace = "first"
"""
RULES = """
[[rule]]
name = "other-field"
path = "/other-field"
key = "header:X-Key"

[[rule]]
name = "either"
path = "/either"
key = ["header:Idempotency-Key", "header:X-Key"]

[[rule]]
name = "query"
path = "/query"
key = "query:id"

[[rule]]
name = "waits"
path = "/waits"
on_duplicate = "wait"

[[rule]]
name = "renamed"
path = "/renamed"
forward_key = "X-Request-Id"

[[rule]]
name = "in-parts"
path = "/in-parts"
fingerprint = ["method", "target"]

[[rule]]
name = "tenants"
path = "/tenants/*"
scope = ["path:2"]

[[rule]]
name = "fenced"
path = "/fenced"
on_unknown = "retry"

[[rule]]
name = "host"
path = "/host"
pass_host = true

[[rule]]
name = "small"
path = "/small"
max_request_bytes = 3
"""
PATHS = ("/", "/by-key", "/other-field", "/either", "/renamed", "/in-parts", "/tenants/a", "/fenced", "/host", "/small")
FORMS = ("{}", '"{}"')
EXTRA = (
    (),
    ("Authorization: Bearer a",),
    ("Authorization: Bearer b", "X-Key: fixed"),
    ("Cookie: a=1", "Content-Type: application/json", "Prefer: wait=1"),
    ("Expect: 100-continue", "Connection: X-Gone", "X-Gone: 1", "Via: 1.0 before"),
)


class Ways:
    """Sends requests whole, on connections that said the like before, or in pieces, which the parser has to read."""

    def __init__(self, port: int, upstream: RawUpstream) -> None:
        self._port, self._upstream = port, upstream
        self._kept: list[RawClient] = []

    async def whole(self, raw: bytes) -> tuple[int, bytes | None, list[bytes]]:
        if len(self._kept) < 3:
            self._kept.append(await RawClient.open(self._port))
        client = self._kept[0]
        self._kept.append(self._kept.pop(0))
        return await self._ask(client, raw)

    async def cut(self, raw: bytes) -> tuple[int, bytes | None, list[bytes]]:
        client = await RawClient.open(self._port)
        client.writer.write(raw[:9])
        await client.writer.drain()
        await asyncio.sleep(0.002)
        try:
            return await self._ask(client, raw[9:])
        finally:
            client.close()

    async def _ask(self, client: RawClient, raw: bytes) -> tuple[int, bytes | None, list[bytes]]:
        """Return status, what is said of the key, and the heads that went on."""
        before = len(self._upstream.received)
        answer = await client.ask(raw)
        while answer is not None and answer.status == 100:
            answer = await client.ask(b"")
        if answer is None:
            raise ConnectionError
        if answer.header("connection") == b"close":
            self._kept = [one for one in self._kept if one is not client]
            client.close()
        return answer.status, answer.header("oncegate-status"), [one.head for one in self._upstream.received[before:]]

    def close(self) -> None:
        for client in self._kept:
            client.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("rules", [RULES, BY_KEY + RULES], ids=["rules", "with one by the key"])
async def test_a_request_that_came_before_is_treated_as_if_it_were_new(proxies, upstream, store_url, tmp_path, rules):
    """Under every rule: executed with the head that the parser's way sends, and its key, tenant and fingerprint are
    those that the parser's way finds again."""
    (tmp_path / "rules.toml").write_text(rules)
    gate = proxies(upstream, store_url, RULES_FILE="rules.toml", ACCESS_LOG="off")
    ways, dice, numbers = Ways(gate.port, upstream), random.Random(7), itertools.count(1000)
    cases = list(itertools.product(PATHS, FORMS, EXTRA))
    for path, form, extra in dice.sample(cases, len(cases)):
        for _ in range(4):  # read, remembered, prepared, and as prepared
            keys = [f"{dice.choice(('first', 'other'))}-{next(numbers)}" for _ in range(2)]
            raws = [request("POST", path, form.format(key), b"abc", *extra) for key in keys]
            told, by_parser = await ways.whole(raws[0]), await ways.cut(raws[1])
            expected = [head.replace(keys[1].encode(), keys[0].encode()) for head in by_parser[2]]
            same_rule = path != "/by-key" or keys[0][:5] == keys[1][:5]
            if path in ("/other-field", "/either") and "X-Key: fixed" in extra:
                continue  # one key for all of them, or two of them in one request
            assert told[:2] == by_parser[:2] or not same_rule, (path, form, extra)
            assert [without_fence(head) for head in told[2]] == [without_fence(head) for head in expected], (
                path,
                extra,
            )
            if told[1] == b"executed":
                assert await ways.cut(raws[0]) == (200, b"replayed", []), (path, extra)
                assert await ways.whole(raws[1]) == (200, b"replayed", []), (path, extra)
                other = request("POST", path, form.format(keys[0]), b"xyz", *extra)
                assert (await ways.whole(other))[0] == (200 if path == "/in-parts" else 422), (path, extra)
                stranger = request("POST", path, form.format(keys[0]), b"abc", *extra, "X-Api-Key: another")
                assert (await ways.whole(stranger))[1] == (b"replayed" if path == "/tenants/a" else b"executed")
    ways.close()
    assert gate.metric('requests_total{outcome="failed"}') == 0
    await until(lambda: gate.metric("buffered_bytes") == 0)


def without_fence(head: bytes) -> list[bytes]:
    """Return the lines of a head, those that name the claim, which is always another, without their value."""
    of_the_claim = (b"Idempotency-Fence", b"Oncegate-Execution", b"Oncegate-Key-Id", b"X-Request-Id")
    return [line.split(b": ")[0] if line.startswith(of_the_claim) else line for line in head.split(b"\r\n")]


@pytest.mark.parametrize("path", ["/other-field", "/query?id=1"])
async def test_another_field_than_the_one_that_may_differ_is_the_key(
    proxies, upstream, store_url, tmp_path: Path, path
):
    """Where a rule names the key by something else, requests that differ in the usual field alone are duplicates."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = proxies(upstream, store_url, RULES_FILE="rules.toml")
    ways = Ways(gate.port, upstream)
    told = [(await ways.whole(request("POST", path, f"a{n}", b"x", "X-Key: fixed")))[1] for n in range(6)]
    ways.close()
    assert told == [b"executed"] + [b"replayed"] * 5


@pytest.mark.parametrize(("path", "extra"), [("/", "Prefer: wait=20"), ("/waits", "X: 1")])
async def test_a_duplicate_waits_each_time(proxies, upstream, store_url, tmp_path: Path, path, extra):
    """However often the like was asked for before: what the head says of waiting holds."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = proxies(upstream, store_url, RULES_FILE="rules.toml")
    ways, first = Ways(gate.port, upstream), await RawClient.open(gate.port)
    for number in range(5):
        raw, done = request("POST", path, f"a{number}", b"x", extra), asyncio.Event()
        upstream.script = holding(done)
        original = asyncio.ensure_future(first.ask(raw))
        await until(lambda number=number: len(upstream.received) == number + 1)
        duplicate = asyncio.ensure_future(ways.whole(raw))
        await until(lambda: gate.metric("waiting") == 1)
        done.set()
        assert (await duplicate)[:2] == (200, b"replayed")
        await original
    first.close()
    ways.close()


async def test_what_is_too_large_stays_too_large(proxies, upstream, store_url, tmp_path: Path):
    """The limit of a rule holds each time, and the known head of one that fits is no way round it."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = proxies(upstream, store_url, RULES_FILE="rules.toml")
    ways = Ways(gate.port, upstream)
    for number in range(4):
        assert (await ways.whole(request("POST", "/small", f"a{number}", b"abc")))[0] == 200
        assert (await ways.whole(request("POST", "/small", f"b{number}", b"abcd")))[0] == 413
    ways.close()
    assert len(upstream.received) == 4


async def test_new_rules_hold_for_what_was_prepared_under_the_old_ones(proxies, upstream, store_url, tmp_path: Path):
    """After a reload the same bytes on the same connections follow the new rules."""
    (tmp_path / "rules.toml").write_text("# none\n")
    gate = proxies(upstream, store_url, RULES_FILE="rules.toml")
    ways = Ways(gate.port, upstream)
    for number in range(6):
        assert (await ways.whole(request("POST", "/a", f"a{number}", b"x", f"X-Shop: {number % 3}")))[1] == b"executed"
    (tmp_path / "rules.toml").write_text(
        '[[rule]]\nname = "a"\npath = "/a"\nforward_key = ""\nscope = ["header:X-Shop"]'
    )
    gate.signal(signal.SIGHUP)
    await until(lambda: gate.events("reloaded"))
    for number in range(18):
        # What differed under the old rules now says whose the key is.
        raw = request("POST", "/a", f"a{number // 3}", b"x", f"X-Shop: {number % 3}")
        status, said, heads = await ways.whole(raw)
        assert (status, said, len(heads)) == (200, b"executed", 1)  # of another tenant now
        assert b"Idempotency-Key" not in heads[0]
    ways.close()


async def test_there_is_no_room_for_more_than_are_let_in(proxies, upstream, store_url):
    """The limit on requests in flight holds for those that came before, and the memory of their bodies comes back."""
    gate = proxies(upstream, store_url, MAX_IN_FLIGHT=2)
    ways = Ways(gate.port, upstream)
    for number in range(4):
        await ways.whole(request("POST", "/a", f"a{number}", b"x"))
    done = asyncio.Event()
    upstream.script = holding(done)
    clients = [await RawClient.open(gate.port) for _ in range(2)]
    held = [
        asyncio.ensure_future(client.ask(request("POST", "/a", f"b{number}", b"x")))
        for number, client in enumerate(clients)
    ]
    await until(lambda: len(upstream.received) == 6)
    assert (await ways.whole(request("POST", "/a", "c0", b"x")))[0] == 503
    done.set()
    assert [answer.status for answer in await asyncio.gather(*held) if answer] == [200, 200]
    assert (await ways.whole(request("POST", "/a", "c0", b"x")))[0] == 200
    for client in clients:
        client.close()
    ways.close()
    await until(lambda: gate.metric("buffered_bytes") == gate.metric("in_flight") == 0)


async def test_answers_of_one_turn_are_each_their_own(proxies, store_url):
    """Many requests whose replies come together, on kept and on closing connections, some behind each other: each
    client gets its own answers, whole and in order."""
    upstream = RawUpstream()
    await upstream.start()

    async def echo(_: RawUpstream, __: object, writer: asyncio.StreamWriter, received: Received) -> None:
        key = received.header("Idempotency-Key")[0]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(key), key))

    upstream.script = echo
    gate = proxies(upstream, store_url, ACCESS_LOG="off")

    async def talk(number: int) -> None:
        client = await RawClient.open(gate.port)
        keys = [f"k{number}-{turn}" for turn in range(30)]
        for first, second in itertools.pairwise(keys):
            for key in (first, second):  # the first of which was executed before, the second is new
                client.writer.write(request("POST", "/a", key, b"x"))
            for key in (first, second):
                answer = await client.ask(b"")
                assert answer is not None
                assert answer.body == key.encode()
        client.writer.write(request("POST", "/a", "last", b"x", f"Authorization: Bearer {number}", "Connection: close"))
        assert (await client.reader.read()).endswith(b"\r\n\r\nlast")
        client.close()

    upstream.script = echo
    await asyncio.gather(*[talk(number) for number in range(40)])
    assert len(upstream.received) == 40 * 31
    await upstream.close()


async def test_an_answer_waits_for_nobody(proxies, upstream, store_url):
    """One request at a time is answered as well where others wait for theirs."""
    gate = proxies(upstream, store_url)
    done = asyncio.Event()
    upstream.script = holding(done)
    slow = [await RawClient.open(gate.port) for _ in range(5)]
    held = [asyncio.ensure_future(one.ask(request("POST", "/s", f"s{n}", b"x"))) for n, one in enumerate(slow)]
    await until(lambda: len(upstream.received) == 5)
    upstream.script = answering(OK)
    ways = Ways(gate.port, upstream)
    for number in range(5):
        assert (await ways.whole(request("POST", "/a", f"a{number}", b"x")))[1] == b"executed"
    done.set()
    await asyncio.gather(*held)
    for one in slow:
        one.close()
    ways.close()
