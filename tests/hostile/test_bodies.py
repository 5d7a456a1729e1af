"""Bodies made to cost more than they weigh, or to be another when it counts (T23, T24)."""

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.parts import Proxy, RawUpstream, ask, chunk, request, standing_upstream
from tests.zygote import Zygote, standing_proxy

MIB = 1 << 20
BUDGET_S = 0.5  # of the processor, for the worst body that is looked into


def framed(key: str | None, body: bytes, dice: random.Random) -> bytes:
    """Return a request with this body, by its length or in chunks of random sizes."""
    if dice.random() < 0.4:
        return request("POST", "/x", key, body, f"Content-Length: {len(body)}")
    pieces, at = [], 0
    while at < len(body):
        size = dice.choice((1, 7, 1000, 65_536, 300_000)) if len(body) > 5000 else dice.randint(1, 700)
        pieces.append(chunk(body[at : at + size]))
        at += size
    return request("POST", "/x", key, b"", "Transfer-Encoding: chunked") + b"".join(pieces) + b"0\r\n\r\n"


async def test_the_bytes_that_are_digested_are_those_that_are_sent(standing, behind):
    """T24: over random bodies, framings and sizes around the spool's, what the upstream gets is what was sent, the
    same bytes replay however framed, and a single bit of difference is a mismatch."""
    dice = random.Random(24)
    sizes = [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB] + [dice.choice((10, 300, 5000, 70_000)) for _ in range(60)]
    for number, size in enumerate(sizes):
        body = dice.randbytes(size)
        answer = await ask(standing.port, framed(f"same-{number}", body, dice))
        assert answer.header("oncegate-status") == b"executed"
        assert hashlib.sha256(behind.received[-1].body).digest() == hashlib.sha256(body).digest()
        again = await ask(standing.port, framed(f"same-{number}", body, dice))
        assert again.header("oncegate-status") == b"replayed"
        if size:
            at = dice.randrange(size)
            flipped = body[:at] + bytes((body[at] ^ 1 << dice.randrange(8),)) + body[at + 1 :]
            assert (await ask(standing.port, framed(f"same-{number}", flipped, dice))).slug == "key-reused"
        for other in (body + b"\0", body[:-1]):
            if other != body:
                assert (await ask(standing.port, framed(f"same-{number}", other, dice))).slug == "key-reused"
    assert len(behind.received) == len(sizes)


async def test_a_body_cannot_change_while_it_is_read(standing, behind):
    """T24: two clients that send different halves under one key at the same time: what executes is one of them."""
    for round_ in range(20):
        bodies = [b"a" * 200_000, b"b" * 200_000]
        asked = [ask(standing.port, request("POST", "/x", f"race-{round_}", body)) for body in bodies]
        answers = await asyncio.gather(*asked)
        (received,) = behind.received
        assert received.body in bodies
        assert sorted(answer.status for answer in answers) == [200, 422]
        behind.received.clear()


def hostile_documents() -> list[bytes]:
    """Return JSON that costs a parser dearly: deep, repeated, colliding, huge."""
    return [
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"{" + b",".join(b'"k":%d' % number for number in range(20_000)) + b"}",
        b"[" + b"9" * 400_000 + b"]",
        b"[1e" + b"9" * 200_000 + b"]",
        json.dumps({f"{number:032x}": number for number in range(20_000)}).encode(),
        b'"' + b"\\u0000" * 100_000 + b'"',
        b"[" * 500_000,
        b"\xff\xfe" + "{}".encode("utf-16-le") * 10_000,
        b"<!DOCTYPE a [<!ENTITY b 'c'>" + b"<!ENTITY d '&b;&b;'>" * 10_000 + b"]><a>&d;</a>",
    ]


async def test_a_document_is_bytes(standing, behind):
    """T23: a fingerprint is of bytes: nothing parses a body, however deep, repetitive or broken, and none takes long;
    the same document written otherwise is another."""
    for number, body in enumerate(hostile_documents()):
        began = time.monotonic()
        raw = request("POST", "/x", f"json-{number}", body, "Content-Type: application/json")
        assert (await ask(standing.port, raw)).header("oncegate-status") == b"executed"
        assert (await ask(standing.port, raw)).header("oncegate-status") == b"replayed"
        assert time.monotonic() - began < 3
        spaced = request("POST", "/x", f"json-{number}", body + b" ", "Content-Type: application/json")
        assert (await ask(standing.port, spaced)).slug == "key-reused"
        assert behind.received[-1].body == body


# Under rules that look for a key in the body ...

LOOKED_INTO = """
[[rule]]
name = "refused"
path = "/refused"
key = "body:/id"

[[rule]]
name = "passed"
path = "/passed"
key = "body:/id"
on_bad_key = "pass"

[[rule]]
name = "form"
path = "/form"
key = "form:id"
"""
# Bodies out of which no key may come; each opens as one that has a key would.
UNUSABLE = {
    "deep arrays": b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b',"id":"k"}',
    "deep objects": b'{"id":"k","a":' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"}",
    "never closed": b'{"id":"k","a":' + b"[" * 900_000,
    "wide": b'{"id":"k","a":[' + b"[]," * 300_000 + b"[]]}",
    "the member twice": b'{"id":"k","id":"k"}',
    "the member twice, once in escapes": b'{"id":"k","\\u0069d":"k"}',
    "the member 60,000 times": b"{" + b",".join([b'"id":"k"'] * 60_000) + b"}",
    "10 MB of digits": b'{"id":' + b"9" * 10_000_000 + b"}",
    "a MB of digits": b'{"id":' + b"9" * 1_000_000 + b"}",
    "a MB of digits elsewhere": b'{"id":"k","n":' + b"9" * 1_048_576 + b"}",
    "an exponent": b'{"id":1e' + b"9" * 900_000 + b"}",
    "no UTF-8": b'{"id":"\xff\xfe"}',
    "no UTF-8 elsewhere": b'{"id":"k","n":"\xc0\xaf"}',
    "UTF-16": '{"id":"k"}'.encode("utf-16"),
    "half a pair": b'{"id":"\\ud800"}',
    "a long key": b'{"id":"' + b"k" * 900_000 + b'"}',
    "escapes without end": b'{"id":"' + b"\\u0041" * 150_000,
    "quotes without end": b'{"id":' + b'"\\"' * 300_000,
}


@pytest.fixture(scope="module")
def looking(zygote: Zygote, shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules for all that follows; its upstream is `beyond`."""
    folder = tmp_path_factory.mktemp("looking")
    with standing_proxy(zygote, shared_valkey.url, folder, rules=LOOKED_INTO) as proxy:
        yield proxy


@pytest.fixture
async def beyond(looking: Proxy, valkey) -> AsyncIterator[RawUpstream]:
    async with standing_upstream(looking) as server:
        yield server


@pytest.mark.parametrize("case", UNUSABLE)
async def test_a_hostile_body_is_no_key(looking, beyond, case):
    """T23: by rule it is refused, or goes on byte for byte and says that it was unguarded; either takes bounded time of
    the processor and of those beside it, and nothing is stored."""
    body = UNUSABLE[case]
    spent = processor_s(looking)
    beside = asyncio.ensure_future(ask(looking.port, request("GET", "/beside", None, b"")))
    refused = await ask(looking.port, request("POST", "/refused", None, body))
    assert (refused.status, refused.slug) == (400, "key-invalid")
    passed = await ask(looking.port, request("POST", "/passed", None, body))
    assert (passed.status, passed.header("oncegate-status")) == (200, b"unguarded")
    assert processor_s(looking) - spent < 2 * BUDGET_S
    assert (await beside).status == 200
    assert [got.body for got in beyond.received if got.line.startswith(b"POST")] == [body]


def processor_s(proxy: Proxy) -> float:
    """Return how long a proxy has had the processor for itself, which a busy machine does not change."""
    fields = Path(f"/proc/{proxy.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_what_is_beside_a_key_does_not_matter(looking, beyond, valkey):
    """A document within the limits names its key, whatever else is in it: digits that nobody computes, depth, names
    that come twice elsewhere."""
    digits, depth = b"9" * 900_000, b"[" * 60 + b"]" * 60
    bodies = [b'{"n":%b,"id":"k"}' % digits, b'{"n":%b,"id":"l"}' % depth, b'{"n":1,"n":2,"id":"m"}']
    for body in bodies:
        for word in (b"executed", b"replayed"):
            answer = await ask(looking.port, request("POST", "/refused", None, body))
            assert answer.header("oncegate-status") == word
    assert [got.body for got in beyond.received] == bodies


FORMS = {
    "the field 200,000 times": b"id=k&" * 200_000,
    "the field twice, once in escapes": b"a=1&" * 900 + b"id=k&%69d=k",
    "nothing but separators": b"&" * 1_000_000,
    "a value without end": b"id=" + b"%41" * 300_000,
}


@pytest.mark.parametrize("case", FORMS)
async def test_a_hostile_form_is_no_key(looking, beyond, case):
    """T23: a form with too many fields, the field twice (once in escapes), or a value without end is refused."""
    spent = processor_s(looking)
    kind = "Content-Type: application/x-www-form-urlencoded"
    answer = await ask(looking.port, request("POST", "/form", None, FORMS[case], kind))
    assert (answer.status, answer.slug) == (400, "key-invalid")
    assert processor_s(looking) - spent < BUDGET_S
    assert beyond.received == []
