"""Upstreams that attack: answers that split, never end, swell, or are no HTTP (T2, T16, T22)."""

import asyncio
import gzip
import random
import re
import struct
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.parts import OK, RawClient, answering, ask, request
from tests.test_upstream import MALFORMED

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]")
IN_A_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]")
# A line end would be another line, and a NUL an end of the text for some clients.
NEVER_IN_A_VALUE = (b"\0", b"\n", b"\r")


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024


async def raw_head(port: int, raw: bytes) -> bytes:
    """Return the head of an answer as it is on the wire."""
    with closing(await RawClient.open(port)) as client:
        client.writer.write(raw)
        return await client.reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize("position", ["name", "value", "reason"])
async def test_no_byte_of_an_answer_splits_it(standing, behind, position):
    """T2: each of the 256 bytes in a name, value or reason is passed on as it is, now and in the replay, a control
    character in a value or reason as a space, or the answer is refused as a whole: there is never a field that the
    upstream did not send."""
    line = {"name": b"Na%sX-Split: v", "value": b"Name: va%sX-Split: v", "reason": b""}[position]
    for byte in (bytes((code,)) for code in range(256)):
        if position == "name" and byte == b":":
            continue  # it is the end of a shorter name
        field = line.replace(b"%s", byte)
        reason = b"O" + byte + b"K" if position == "reason" else b"OK"
        head = b"HTTP/1.1 200 %s\r\n%s%sContent-Length: 2\r\n\r\n" % (reason, field, b"\r\n" if field else b"")
        behind.script = answering(head + b"ok")
        raw = request("POST", "/x", f"split-{position}-{byte.hex()}", b"")
        heads = [await raw_head(standing.port, raw) for _ in range(2)]
        sound = TOKEN.match(byte) if position == "name" else byte not in NEVER_IN_A_VALUE
        if heads[0].startswith(b"HTTP/1.1 200 "):
            assert sound, byte
            if position != "name" and not IN_A_VALUE.match(byte):
                reason, field = reason.replace(byte, b" "), field.replace(byte, b" ")
            first, *lines = heads[0].split(b"\r\n")
            assert position != "reason" or first == b"HTTP/1.1 200 " + reason
            assert not field or field in lines
            assert [one for one in lines if one.startswith(b"X-Split")] == []
            again, *more = heads[1].split(b"\r\n")
            assert (again, set(lines) - set(more)) == (first, {b"Oncegate-Status: executed"})
        else:
            assert heads[0].startswith(b"HTTP/1.1 502 "), byte
            assert heads[1].startswith(b"HTTP/1.1 409 ")
            assert b"X-Split" not in heads[0] + heads[1]
            assert not sound, byte


async def test_a_malformed_answer_costs_its_own_request_alone(standing, behind):
    """T22: each malformed answer makes its key unknown or its client's answer break off, with nothing of it stored;
    the next request is served as if nothing had been, and the connection is not used again."""
    assert len(MALFORMED) >= 30
    for number, answer in enumerate(MALFORMED.values()):
        behind.script = answering(answer)
        for key in (f"malformed-{number}", None):
            with closing(await RawClient.open(standing.port)) as client:
                got = await client.ask(request("POST", "/x", key, b""))
                assert got is None or got.status == 502 or not got.complete, answer
        behind.script = answering(OK)
        retry = await ask(standing.port, request("POST", "/x", f"malformed-{number}", b""))
        assert (retry.status, retry.slug) == (409, "outcome-unknown")
        assert (await ask(standing.port, request("PUT", "/x", None, b""))).body == b"ok"
    connections = [received.connection for received in behind.received]
    assert len(set(connections)) >= 2 * len(MALFORMED)
    assert "Traceback" not in standing.log()


def endless(start: bytes, more: bytes) -> object:
    """Return a script that sends `more` without end."""

    async def script(_, __, writer: asyncio.StreamWriter, ___) -> None:
        writer.write(start)
        while not writer.is_closing():
            writer.write(more * 50)
            await writer.drain()

    return script


ENDLESS = {
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim answers with fields": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"),
    "fields": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "a field": (b"HTTP/1.1 200 OK\r\nA: ", b"bbbbbb"),
    "a name": (b"HTTP/1.1 200 OK\r\n", b"AAAAAA"),
    "a reason": (b"HTTP/1.1 200 ", b"OK OK "),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
    "a chunk extension": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;", b"a=b;a="),
    "a chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"000000"),
}


async def test_an_endless_answer_ends(standing, behind):
    """T22: 1xx answers, fields, trailers or extensions without end are cut off at once, long before they fill the
    memory; 10,000 interim answers before a sound one are as well."""
    before = resident_bytes(standing.process.pid)
    rows = [endless(*parts) for parts in ENDLESS.values()]
    for number, script in enumerate([*rows, answering(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000 + OK)]):
        behind.script = script
        for key in (f"endless-{number}", None):
            began = time.monotonic()
            with closing(await RawClient.open(standing.port)) as client:
                got = await client.ask(request("POST", "/x", key, b""))
            assert got is None or got.status == 502 or not got.complete
            assert time.monotonic() - began < 5
    behind.script = answering(OK)
    assert (await ask(standing.port, request("PUT", "/x", None, b""))).body == b"ok"
    assert resident_bytes(standing.process.pid) - before < 32 << 20


# Bombs ...

ZEROS = 10 << 20  # of each member
MEMBER = gzip.compress(bytes(ZEROS), 9)
# One Zstandard frame whose single block repeats one byte: 14 bytes that swell to 128 KiB.
RLE_FRAME = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 131_072) + struct.pack("<I", 131_072 << 3 | 0b011)[:3] + b"\0"
BOMBS = {
    "gzip": MEMBER * 100,  # a gigabyte
    "deflate": MEMBER[10:-8] * 100,
    "zstd": RLE_FRAME * 70_000,  # nine gigabytes
    "br": random.Random(16).randbytes(1 << 20),  # what it is called is enough
    "gzip, gzip": gzip.compress(MEMBER * 100),
    "identity": bytes(1 << 20),
}


@pytest.mark.parametrize("coding", BOMBS)
async def test_a_bomb_passes_untouched(standing, behind, coding):
    """T16: a compressed body that swells is never opened, in a request, an answer or a replay: bytes out are bytes in,
    and the memory stays where it was, whatever the client accepts."""
    bomb = BOMBS[coding]
    before = resident_bytes(standing.process.pid)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    behind.script = answering(head + bomb)
    keys = (f"bomb-{coding[:4]}-{len(coding)}",) * 3
    for key, accepted in zip((*keys, None), ("gzip, br, zstd",) * 2 + ("identity", "gzip, br, zstd"), strict=True):
        sent = request("POST", "/x", key, bomb, f"Content-Encoding: {coding}", f"Accept-Encoding: {accepted}")
        answer = await ask(standing.port, sent)
        assert answer.body == bomb
        assert answer.header("content-encoding") == coding.encode()
    assert [received.body == bomb for received in behind.received] == [True, True]
    assert {received.header("accept-encoding")[0] for received in behind.received} == {b"gzip, br, zstd"}
    assert resident_bytes(standing.process.pid) - before < 48 << 20
