"""Bodies made to cost more than they weigh, or to be another when it counts (T23, T24)."""

import asyncio
import hashlib
import json
import random
import time

from tests.parts import ask, chunk, request

MIB = 1 << 20


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
