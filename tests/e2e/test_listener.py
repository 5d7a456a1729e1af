"""What the public listener lets in: hostile requests, deadlines, and the manners of a connection."""

import asyncio
import itertools
import json
import random
import re
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from tests.parts import (
    LAST_CHUNK,
    OK,
    Answer,
    RawClient,
    Tap,
    answering,
    ask,
    chunk,
    holding,
    read_answer,
    request,
    until,
)

CANARY = b"c4n4ry"  # stands in every hostile request, and nowhere else
HOST = b"Host: api.test"
KEY = b"Idempotency-Key: " + CANARY
CHUNKED = b"Transfer-Encoding: chunked"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"
HIDDEN = b"GET /" + CANARY + b" HTTP/1.1\r\nHost: api.test\r\n\r\n"


def message(line: bytes, *fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([line, *fields, b"X-Note: " + CANARY, b"", body])


def post(*fields: bytes, body: bytes = b"") -> bytes:
    """Return a keyed POST with these fields and whatever stands for its body."""
    return message(b"POST /x HTTP/1.1", HOST, KEY, *fields, body=body)


def put(*fields: bytes, body: bytes = b"") -> bytes:
    """Return the same without a key: it is streamed."""
    return message(b"PUT /x HTTP/1.1", HOST, *fields, body=body)


def get(target: bytes = b"/x", *fields: bytes, host: bytes = HOST, version: bytes = b"HTTP/1.1") -> bytes:
    return message(b"GET %s %s" % (target, version), *([host] if host else []), *fields)


@dataclass(frozen=True)
class Forwarded:
    """The one request that the upstream gets."""

    line: bytes
    body: bytes = b""


POSTED, PUT, GOT = (Forwarded(b"%s /x HTTP/1.1" % method) for method in (b"POST", b"PUT", b"GET"))
POSTED_HELLO, PUT_HELLO = (Forwarded(b"%s /x HTTP/1.1" % method, b"hello") for method in (b"POST", b"PUT"))

Row = tuple[str, bytes, "int | Forwarded"]  # name, what the client sends, what it gets or the upstream sees

VERSIONS: list[Row] = [
    ("HTTP 0.9", b"GET /%s\r\n\r\n" % CANARY, 505),
    ("HTTP 0.9 named", get(version=b"HTTP/0.9"), 505),
    ("HTTP 2.0", get(version=b"HTTP/2.0"), 505),
    ("HTTP 1.2", get(version=b"HTTP/1.2"), 400),
    ("HTTP 3.0", get(version=b"HTTP/3.0"), 400),
    ("HTTP 1", get(version=b"HTTP/1"), 400),
    ("HTTP 11", get(version=b"HTTP/11"), 400),
    ("HTTP 1.10", get(version=b"HTTP/1.10"), 400),
    ("a version in lower case", get(version=b"http/1.1"), 400),
    ("a version with a tail", get(version=b"HTTP/1.1x"), 400),
    ("no version with fields", message(b"GET /x", HOST), 505),
    ("HTTP/2 prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + CANARY, 400),
    ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + CANARY, 400),
    ("HTTP 1.0", get(version=b"HTTP/1.0"), GOT),
]

LINES: list[Row] = [
    ("bare LF everywhere", get().replace(b"\r\n", b"\n"), 400),
    ("bare LF after the line", get().replace(b"\r\n", b"\n", 1), 400),
    ("bare LF between fields", get(b"/x", b"A: b\nC: d"), 400),
    ("bare LF before the end", get()[:-4] + b"\n\r\n", 400),
    ("bare CR between fields", get(b"/x", b"A: b\rC: d"), 400),
    ("bare CR in the end", get()[:-2] + b"\r\r\n", 400),
    ("a folded value", get(b"/x", b"A: b\r\n c"), 400),
    ("a folded value by tab", get(b"/x", b"A: b\r\n\tc"), 400),
    ("a fold before the first field", get().replace(b"\r\n", b"\r\n ", 1), 400),
    ("a folded transfer coding", post(b"Transfer-Encoding:\r\n chunked", body=HELLO), 400),
    ("NUL in a value", get(b"/x", b"A: b\0c"), 400),
    ("NUL in a name", get(b"/x", b"A\0: b"), 400),
    ("NUL in the target", get(b"/\0x"), 400),
    ("NUL in the method", b"G\0ET /x HTTP/1.1\r\n", 400),
    ("a control character in a value", get(b"/x", b"A: \x01"), 400),
    ("DEL in a value", get(b"/x", b"A: \x7f"), 400),
    ("obs-text in a value", get(b"/x", b"A: \xff\xfe"), GOT),
    ("a space before the colon", get(b"/x", b"A : b"), 400),
    ("a tab before the colon", get(b"/x", b"A\t: b"), 400),
    ("a space in a name", get(b"/x", b"A B: c"), 400),
    ("an empty name", get(b"/x", b": b"), 400),
    ("a line without a colon", get(b"/x", b"nothing"), 400),
    ("brackets in a name", get(b"/x", b"A(b): c"), 400),
    ("obs-text in a name", get(b"/x", b"A\xe9: c"), 400),
    ("a quote in a name", get(b"/x", b'A": c'), 400),
    ("a slash in a name", get(b"/x", b"A/b: c"), 400),
    ("a method in lower case", message(b"get /x HTTP/1.1", HOST), 400),
    ("a method with a space before it", b" " + get(), 400),
    ("a method that is no token", message(b"G@T /x HTTP/1.1", HOST), 400),
    ("an unknown method", message(b"%s /x HTTP/1.1" % CANARY.upper(), HOST), 400),
    ("a method of 300 bytes", message(b"G" * 300 + b" /x HTTP/1.1", HOST), 400),
    ("tabs in the line", message(b"GET\t/x\tHTTP/1.1", HOST), 400),
    ("a space after the line", message(b"GET /x HTTP/1.1 ", HOST), 400),
    ("two spaces in the line", message(b"GET  /x  HTTP/1.1", HOST), GOT),
    ("empty lines before the line", b"\r\n\r\n" + get(), GOT),
    ("a target of 20,000 bytes", get(b"/" + b"x" * 20_000), 400),
    ("a value of 20,000 bytes", get(b"/x", b"A: " + b"b" * 20_000), 400),
    ("a name of 20,000 bytes", get(b"/x", b"A" * 20_000 + b": b"), 400),
    ("200 fields", get(b"/x", *[b"A: b"] * 200), 400),
]

FRAMING: list[Row] = [
    ("length, then chunked", post(b"Content-Length: 15", CHUNKED, body=HELLO), 400),
    ("chunked, then length", post(CHUNKED, b"Content-Length: 15", body=HELLO), 400),
    ("chunked, then a length that hides a request", post(CHUNKED, b"Content-Length: 5", body=HELLO + HIDDEN), 400),
    ("chunked with length 0", post(CHUNKED, b"Content-Length: 0", body=HELLO), 400),
    ("a length and a key-less chunked", put(b"Content-Length: 5", CHUNKED, body=HELLO), 400),
    ("two lengths", post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), 400),
    ("two lengths that differ", post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello!"), 400),
    ("a list of lengths", post(b"Content-Length: 5, 5", body=b"hello"), 400),
    ("a length with plus", post(b"Content-Length: +5", body=b"hello"), 400),
    ("a length with minus", post(b"Content-Length: -5", body=b"hello"), 400),
    ("a length in hex", post(b"Content-Length: 0x5", body=b"hello"), 400),
    ("a length with a point", post(b"Content-Length: 5.0", body=b"hello"), 400),
    ("a length with an underscore", post(b"Content-Length: 1_0", body=b"hellohello"), 400),
    ("a length with a space in it", post(b"Content-Length: 1 0", body=b"hellohello"), 400),
    ("an empty length", post(b"Content-Length: ", body=b"hello"), 400),
    ("a length of words", post(b"Content-Length: five", body=b"hello"), 400),
    ("a length over 64 bits", post(b"Content-Length: 18446744073709551621", body=b"hello"), 400),
    ("a length in Arabic digits", post(b"Content-Length: \xd9\xa5", body=b"hello"), 400),
    ("a length with a vertical tab", post(b"Content-Length: \x0b5", body=b"hello"), 400),
    ("a length with zeros", post(b"Content-Length: 0005", body=b"hello"), POSTED_HELLO),
    ("a length in odd spelling", post(b"cONTENT-lENGTH:5", body=b"hello"), POSTED_HELLO),
    ("a request hidden in a body", post(b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
     Forwarded(b"POST /x HTTP/1.1", HIDDEN)),
    ("a request hidden in a streamed body", put(b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
     Forwarded(b"PUT /x HTTP/1.1", HIDDEN)),
    ("a request hidden in a chunk", post(CHUNKED, body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)),
     Forwarded(b"POST /x HTTP/1.1", HIDDEN)),
    ("a request hidden in a GET's body", get(b"/x", b"Content-Length: %d" % len(HIDDEN)) + HIDDEN,
     Forwarded(b"GET /x HTTP/1.1", HIDDEN)),
    ("garbage behind the body", put(b"Content-Length: 5", body=b"hello\0garbage\r\n\r\n"), 400),
    ("a chunked GET", get(b"/x", CHUNKED) + HELLO, Forwarded(b"GET /x HTTP/1.1", b"hello")),
    ("no length at all", post(), POSTED),
    ("no length and no key", put(), PUT),
    ("chunk extensions", post(CHUNKED, body=b"5;a=b;c=\"d\"\r\nhello\r\n0;e\r\n\r\n"), POSTED_HELLO),
    ("chunk extensions, streamed", put(CHUNKED, body=b"5;a=b;c=\"d\"\r\nhello\r\n0;e\r\n\r\n"), PUT_HELLO),
    ("a chunk extension with a bare LF", post(CHUNKED, body=b"5;a\nb\r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk extension with a bare CR", post(CHUNKED, body=b"5;a\rb\r\nhello\r\n0\r\n\r\n"), 400),
    ("trailers", post(CHUNKED, b"Trailer: A", body=HELLO[:-2] + b"A: b\r\nHost: evil.test\r\n\r\n"), POSTED_HELLO),
    ("trailers, streamed", put(CHUNKED, body=HELLO[:-2] + b"A: b\r\nHost: evil.test\r\n\r\n"), PUT_HELLO),
    ("a trailer that is a length", put(CHUNKED, body=HELLO[:-2] + b"Content-Length: 9\r\n\r\n"), 400),
    ("a trailer with a bare LF", post(CHUNKED, body=HELLO[:-2] + b"A: b\nC: d\r\n\r\n"), 400),
    ("chunk sizes in capitals and zeros", post(CHUNKED, body=b"000A\r\nhellohello\r\n00\r\n\r\n"),
     Forwarded(b"POST /x HTTP/1.1", b"hellohello")),
    ("a chunk size with 0x", post(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk size with minus", post(CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk size with plus", post(CHUNKED, body=b"+5\r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk size with an underscore", post(CHUNKED, body=b"0_5\r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk size with a space", post(CHUNKED, body=b"5 \r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk size of no digits", post(CHUNKED, body=b"\r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk size over 64 bits", post(CHUNKED, body=b"10000000000000005\r\nhello\r\n0\r\n\r\n"), 400),
    ("a chunk that is longer than it says", post(CHUNKED, body=b"5\r\nhello!\r\n0\r\n\r\n"), 400),
    ("a chunk that is ended by anything", post(CHUNKED, body=b"5\r\nhelloXX0\r\n\r\n"), 400),
    ("chunks with bare LF", post(CHUNKED, body=HELLO.replace(b"\r\n", b"\n")), 400),
    ("chunks with bare LF, streamed", put(CHUNKED, body=HELLO.replace(b"\r\n", b"\n")), 400),
    ("a broken chunk, streamed", put(CHUNKED, body=b"zz\r\nhello\r\n0\r\n\r\n"), 400),
]  # fmt: skip

# Every way to write Transfer-Encoding so that one parser sees it and another does not.
ONE_CODING = (
    b"transfer-encoding: chunked",
    b"TRANSFER-ENCODING: CHUNKED",
    b"Transfer-Encoding:chunked",
    b"Transfer-Encoding: \tchunked ",
    b"Transfer-Encoding: , chunked",
)
CODINGS: dict[bytes, int | Forwarded] = dict.fromkeys(ONE_CODING, POSTED_HELLO) | {
    b"%s: %s" % (name, value): 400
    for name, value in [
        *[
            (b"Transfer-Encoding", value)
            for value in (
                b"", b"identity", b"cow", b"xchunked", b"chunkedx", b"x chunked", b"chunked x", b"chunke", b"hunked",
                b"chunked, identity", b"identity, chunked", b"gzip, chunked", b"chunked, chunked", b"chunked,",
                b"chunked;q=1", b"chunked; a=b", b'"chunked"', b"'chunked'", b"\x0bchunked", b"\x0cchunked",
                b"\xa0chunked", b"\x00chunked", b"chunked\x00", b"chunked\x0b", b"chunked \t",
                b"chunk\xe9d", b"\xefchunked",
                b"chun ked", b"chunked\rX: y", b"\rchunked", b"\nchunked", b"gzip\r\nTransfer-Encoding: chunked",
                b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-Encoding: identity",
                b"identity\r\ntransfer-encoding: chunked", b"\r\n chunked", b"\r\n\tchunked", b" \r\n chunked",
            )
        ],
        *[
            (name, b"chunked")
            for name in (
                b"Transfer-Encoding ", b"Transfer-Encoding\t", b" Transfer-Encoding", b"\tTransfer-Encoding",
                b"Transfer_Encoding", b"Transfer-Encoding\x00", b"Transfer-Encoding\x0b", b"Transfer Encoding",
                b"Transfer-Encoding:", b"X: y\rTransfer-Encoding", b"X: y\nTransfer-Encoding", b"\x00Transfer-Encoding",
                b"Transfer-Encoding\r", b"\xa0Transfer-Encoding", b"Transfer\xadEncoding",
            )
        ],
    ]
}  # fmt: skip
CODED: list[Row] = [
    *((f"coding {line!r}", post(line, body=HELLO), expected) for line, expected in CODINGS.items()),
    *((f"length and coding {line!r}", post(b"Content-Length: 15", line, body=HELLO), 400) for line in CODINGS),
    ("HTTP/1.0 with chunked", message(b"POST /x HTTP/1.0", HOST, KEY, CHUNKED, body=HELLO), 400),
    ("HTTP/1.0 with chunked, kept alive",
     message(b"PUT /x HTTP/1.0", HOST, b"Connection: keep-alive", CHUNKED, body=HELLO), 400),
]  # fmt: skip

H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")
WEBSOCKET = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
             b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")  # fmt: skip

METHODS_AND_UPGRADES: list[Row] = [
    ("CONNECT", message(b"CONNECT evil.test:443 HTTP/1.1", b"Host: evil.test:443"), 405),
    ("CONNECT of a path", message(b"CONNECT /x HTTP/1.1", HOST), 405),
    ("CONNECT with a tunnel begun", message(b"CONNECT api.test:80 HTTP/1.1", b"Host: api.test:80", body=HIDDEN), 405),
    ("CONNECT of nothing", message(b"CONNECT ", HOST), 505),
    ("TRACE", message(b"TRACE /x HTTP/1.1", HOST), 405),
    ("OPTIONS *", message(b"OPTIONS * HTTP/1.1", HOST), 400),
    ("POST *", message(b"POST * HTTP/1.1", HOST, KEY), 400),
    ("h2c offered to a GET", get(b"/x", *H2C), GOT),
    ("h2c offered to a keyed POST", post(*H2C, b"Content-Length: 5", body=b"hello"), POSTED_HELLO),
    ("h2c with a request behind it", get(b"/x", *H2C) + HIDDEN, GOT),
    ("h2c without Connection", get(b"/x", *H2C[1:]), GOT),
    ("websocket beside h2c", get(b"/x", b"Connection: Upgrade", b"Upgrade: h2c, websocket"), 501),
    ("websocket with a body", post(*WEBSOCKET, b"Content-Length: %d" % len(HIDDEN), body=HIDDEN), 501),
    ("websocket with a chunked body", post(*WEBSOCKET, CHUNKED, body=HELLO + HIDDEN), 501),
    ("another protocol", get(b"/x", b"Connection: Upgrade", b"Upgrade: TLS/1.0"), 501),
    ("an expectation that nobody knows", post(b"Expect: 200-ok", b"Content-Length: 5", body=b"hello"), 417),
    ("two expectations", post(b"Expect: 100-continue, x", b"Content-Length: 5", body=b"hello"), 417),
    ("an expectation with a parameter", post(b"Expect: 100-continue;q=1", b"Content-Length: 5", body=b"hello"), 417),
    ("an expectation without a key", put(b"Expect: nothing", b"Content-Length: 5", body=b"hello"), 417),
    ("an expectation in capitals", post(b"Expect: 100-CONTINUE", b"Content-Length: 5", body=b"hello"), POSTED_HELLO),
    ("an expectation without a body", post(b"Expect: 100-continue"), POSTED),
    *(
        (f"the look-alike {name.decode()}", post(name + b": 1"), 400)
        for name in (
            b"Idempotency_Key", b"IDEMPOTENCY_KEY", b"Content_Length", b"Content_Type", b"Content_Encoding",
            b"Transfer_Encoding", b"X_Api_Key", b"X-Api_Key", b"X_Forwarded_For", b"X-Forwarded_For",
            b"X_Forwarded_Host", b"X_Forwarded_Proto", b"X_Real_IP", b"Proxy_Connection", b"Keep_Alive",
        )
    ),
    ("an underscore in another name", post(b"X_Custom: 1"), POSTED),
]  # fmt: skip


def target(bytes_: bytes) -> Forwarded:
    return Forwarded(b"GET %s HTTP/1.1" % bytes_)


TARGETS: list[Row] = [
    ("a URL of ours", get(b"http://api.test/x?y=1"), target(b"/x?y=1")),
    ("a URL of ours in capitals", get(b"HTTP://API.TEST/x"), GOT),
    ("a URL of ours without a path", get(b"http://api.test"), target(b"/")),
    ("a URL of ours with a query alone", get(b"http://api.test?y"), target(b"/?y")),
    ("a URL with an escaped path", get(b"http://api.test/%7Ea/../b"), target(b"/%7Ea/../b")),
    *(
        (f"the target {url.decode()}", get(url), 400)
        for url in (
            b"http://evil.test/", b"https://evil.test/", b"http://evil.test:80/", b"http://api.test.evil.test/",
            b"http://api.test@evil.test/", b"http://evil.test@api.test/", b"http://api.test:pw@evil.test/",
            b"http://@api.test/", b"http://api.test:80/", b"http://api.test:/", b"http://api.test%40evil.test/",
            b"http://api.test%2eevil.test/", b"http://evil.test\\@api.test/", b"http://api.test\\.evil.test/",
            b"http://evil.test#@api.test/", b"http://evil.test?@api.test/", b"http://[::1]/", b"http://[::1/",
            b"http://[::ffff:127.0.0.1]/", b"http://127.0.0.1:6379/", b"http://2130706433/", b"http://localhost/",
            b"http://169.254.169.254/latest/meta-data/", b"http:///x", b"http:/x", b"http:x", b"http://",
            b"http://api.test:99999/", b"http://api.test:x/", b"http://api.test/x#y", b"https:api.test/",
            b"ftp://api.test/x", b"file:///etc/passwd", b"gopher://api.test:70/_x", b"ws://api.test/x",
            b"unix:/var/run/x.sock", b"javascript:alert(1)", b"://api.test/", b"api.test/x", b"api.test:80", b"x", b".",
            b"?x", b"#x", b"/x#y", b"/#", b"*x", b"\\\\evil.test\\x", b";/x", b"@evil.test/x",
        )
    ),
    ("no target", message(b"GET HTTP/1.1", HOST), 400),
    ("a space in the target", get(b"/a b"), 400),
    ("a tab in the target", get(b"/a\tb"), 400),
    ("obs-text in the target", get(b"/\xff\xfe"), 400),
    *(
        (f"the path {path.decode()}", get(path), target(path))
        for path in (
            b"//evil.test/x", b"///evil.test/x", b"/\\evil.test/x", b"/http://evil.test/", b"/@evil.test/x",
            b"/../../etc/passwd", b"/%2e%2e/%2E%2E/", b"/%7Ea/../b?x=%2F", b"/a;b=c/./d", b"/%00", b"/%zz", b"/%",
            b"/x?http://evil.test/", b"/x??&&==", b"/x?a=\"'<>`{}|^", b"/:80/x", b"/*",
        )
    ),
]  # fmt: skip

HOSTS: list[Row] = [
    ("no Host", get(host=b""), 400),
    ("no Host in HTTP/1.0", get(host=b"", version=b"HTTP/1.0"), GOT),
    ("two Hosts", get(b"/x", b"Host: evil.test"), 400),
    ("two equal Hosts", get(b"/x", HOST), 400),
    ("two Hosts in HTTP/1.0", get(b"/x", b"Host: evil.test", version=b"HTTP/1.0"), 400),
    *(
        (f"the Host {value!r}", get(host=b"Host: " + value), 400)
        for value in (
            b"", b"a b", b"user@api.test", b"api.test/x", b"api.test?x", b"api.test#x", b"api.test\\x", b"http://api.test",
            b"api.test:port", b"api.test:-1", b"api.test:999999", b"api.test:80:80", b"[::1", b"::1", b"[zz]",
            b"[::1]x", b"api.test\x00", b"api.test\xe9", b'"api.test"', b"<api.test>", b"api.test|x", b"a\tb",
        )
    ),
    *(
        (f"the fine Host {value!r}", get(host=b"Host: " + value), GOT)
        for value in (b"API.test", b"api.test:8080", b"[::1]", b"[2001:db8::1]:443", b"127.0.0.1:80", b"x_y.test", b"a")
    ),
    ("a Host with its name in capitals", get(host=b"HOST:api.test"), GOT),
]  # fmt: skip

HOSTILE = [*VERSIONS, *LINES, *FRAMING, *CODED, *METHODS_AND_UPGRADES, *TARGETS, *HOSTS]

HOP_BY_HOP = ("connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "http2-settings", "expect")
LINE = re.compile(rb"[A-Z]+ /[!-~]* HTTP/1\.1")
FIELD = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+: [^\x00-\x08\x0a-\x1f\x7f]*")


def assert_canonical(head: bytes, body: bytes, authority: bytes) -> None:
    """The request is one that every parser reads in the same way, and its framing is the proxy's own."""
    line, *fields = head.removesuffix(b"\r\n").split(b"\r\n")
    assert LINE.fullmatch(line), line
    assert [field for field in fields if not FIELD.fullmatch(field)] == []
    values: dict[str, list[bytes]] = {}
    for field in fields:
        name, _, value = field.partition(b": ")
        values.setdefault(name.decode().lower(), []).append(value)
    framing = values.get("content-length", []) + values.get("transfer-encoding", [])
    assert framing in ([], [b"%d" % len(body)], [b"chunked"])
    assert framing or not body
    assert values["host"] == [authority]
    assert values["x-forwarded-for"] == [b"127.0.0.1"]
    assert [name for name in HOP_BY_HOP if name in values] == []


async def rest(client: RawClient) -> bytes:
    """Return all that comes until the connection is closed, which must not take long."""
    async with asyncio.timeout(20):
        return await client.reader.read()


@pytest.mark.parametrize(("raw", "expected"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
async def test_a_request_is_forwarded_once_in_canonical_form_or_refused(standing, behind, raw, expected):
    """The upstream sees nothing and the client a problem and the end, or it sees one request with our framing."""
    with closing(await RawClient.open(standing.port)) as client:
        answer = await client.ask(raw)
        assert answer is not None
        if isinstance(expected, Forwarded):
            assert (answer.status, answer.body) == (200, b"ok")
            (received,) = behind.received
            assert (received.line, received.body) == (expected.line, expected.body)
            assert_canonical(received.head, received.body, b"127.0.0.1:%d" % behind.port)
        else:
            assert (answer.status, answer.header("connection")) == (expected, b"close")
            assert answer.problem["status"] == expected
            assert await rest(client) == b""
            assert behind.received == []
            assert CANARY not in repr(answer).encode().lower()
    # Nothing of it is left over on either side: the next request arrives as it is.
    assert (await ask(standing.port, request("GET", "/next", None, b""))).status == 200
    assert behind.received[-1].line == b"GET /next HTTP/1.1"
    log = standing.log()
    assert CANARY.decode() not in log.lower()
    assert "Traceback" not in log


class Talk(asyncio.Protocol):
    """What comes back on a connection. A stream reader would forget it where the end is a reset."""

    def __init__(self) -> None:
        self.came = b""
        self.over = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.came += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


async def converse(port: int, *pieces: bytes, pause_s: float = 0.003) -> list[Answer]:
    """Send these pieces in segments of their own, half-close, and return the answers that came before the end."""
    transport, talk = await asyncio.get_running_loop().create_connection(Talk, "127.0.0.1", port)
    for piece in pieces:
        transport.write(piece)
        await asyncio.sleep(pause_s)
    with suppress(OSError):  # it has ended already
        transport.write_eof()
    async with asyncio.timeout(20):
        await talk.over.wait()
    return await answers_in(talk.came)


async def answers_in(raw: bytes) -> list[Answer]:
    """Return the answers that these bytes are, to the last byte."""
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    answers = []
    while not reader.at_eof():
        answer = await read_answer(reader)
        assert answer is not None
        assert answer.complete
        answers.append(answer)
    return answers


@pytest.mark.parametrize("seed", range(4))
async def test_how_a_request_is_cut_into_segments_changes_nothing(standing, behind, seed):
    """Each keyed row of the table gets its one answer, and no other, when its bytes come in four pieces."""
    cuts = random.Random(seed)
    rows = [
        (raw.replace(KEY, KEY + b"-%d" % number, 1), expected)
        for number, (_, raw, expected) in enumerate(HOSTILE)
        if raw.startswith(b"POST")
    ]

    async def in_pieces(raw: bytes) -> list[Answer]:
        ends = [0, *sorted(cuts.sample(range(1, len(raw)), 3)), len(raw)]
        return await converse(standing.port, *[raw[one:two] for one, two in itertools.pairwise(ends)])

    for start in range(0, len(rows), 40):
        batch = rows[start : start + 40]
        for (raw, expected), answers in zip(
            batch, await asyncio.gather(*[in_pieces(row[0]) for row in batch]), strict=True
        ):
            status = 200 if isinstance(expected, Forwarded) else expected
            assert [answer.status for answer in answers] == [status], raw
    bodies = [expected.body for _, expected in rows if isinstance(expected, Forwarded)]
    assert sorted(received.body for received in behind.received) == sorted(bodies)


async def test_a_body_that_turns_out_broken_ends_its_request_at_once(standing, behind):
    """Framing that breaks in the middle of a body gets 400 and the end, keyed or not; nothing counts as whole."""
    for fields, first in ((KEY, b"POST"), (b"X: y", b"PUT")):
        begun = message(b"%s /x HTTP/1.1" % first, HOST, fields, CHUNKED, body=b"5\r\nhello\r\n")
        (answer,) = await converse(standing.port, begun, b"zz\r\n", pause_s=0.05)
        assert (answer.status, answer.header("connection")) == (400, b"close")
        assert CANARY not in answer.body
    assert standing.metric("in_flight") == 0
    assert [received.body for received in behind.received] == [b""]  # the streamed one broke off there as well
    log = standing.log()
    assert CANARY.decode() not in log
    assert "Traceback" not in log


# How a connection lives ...


async def test_a_connection_serves_whatever_its_requests_end_with(proxies, upstream, valkey):
    """One connection goes on after executions, replays, every problem of a key, errors, HEAD, 204 and chunks."""
    gate = proxies(upstream, valkey.url)
    go = asyncio.Event()
    upstream.script = holding(go)
    running = asyncio.ensure_future(ask(gate.port, request(key="busy")))
    await until(lambda: upstream.received)
    nothing = b"HTTP/1.1 204 No Content\r\n\r\n"
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    failed = b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno"
    with closing(await RawClient.open(gate.port)) as client:
        for round_ in range(30):
            dialogue = [
                (OK, request(key=f"k{round_}"), 200, b"executed"),
                (OK, request(key=f"k{round_}"), 200, b"replayed"),
                (OK, request(key=f"k{round_}", body=b"another"), 422, b"refused"),
                (OK, request(key="busy"), 409, b"refused"),
                (OK, request(key="a,b"), 400, b"refused"),
                (OK, request("GET", key=None, body=b""), 200, None),
                (OK, request("HEAD", key=None, body=b""), 200, None),
                (nothing, request("DELETE", key=None, body=b""), 204, None),
                (chunks, request(key=None), 200, None),
                (chunks, request(key=f"c{round_}"), 200, b"executed"),
                (failed, request(key=f"f{round_}"), 500, b"executed"),
            ]
            for answer, raw, status, mark in dialogue:
                upstream.script = answering(answer)
                got = await client.ask(raw, head_only=raw.startswith(b"HEAD"))
                assert got is not None
                assert (got.status, got.header("oncegate-status"), got.header("connection")) == (status, mark, None)
                assert got.complete
        go.set()
        assert (await running).status == 200


async def test_pipelined_requests_are_answered_in_order(standing, behind):
    """A hundred requests in one write get their answers in their order, the refused ones in between too."""

    async def echo(_, __, writer, received):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(received.line), received.line))

    behind.script = echo
    wanted, raw = [], b""
    for number in range(25):
        keyed = request(target=f"/keyed/{number}", key=f"k{number}")
        raw += request("GET", f"/plain/{number}", None, b"") + keyed + keyed + request(key='"')
        wanted += [f"GET /plain/{number} HTTP/1.1"] + [f"POST /keyed/{number} HTTP/1.1"] * 2 + [400]
    answers = await converse(standing.port, raw)
    assert [answer.status if answer.status == 400 else answer.body.decode() for answer in answers] == wanted
    assert len(behind.received) == 50


async def test_a_client_that_half_closes_gets_its_answers(standing, behind):
    """Whoever says that it has said all still gets everything that it asked for, large uploads included."""
    behind.script = answering(OK, delay_s=0.2)
    keyed, plain = request(key="h1"), request("GET", key=None, body=b"")
    body = random.Random(1).randbytes(3 << 20)
    chunks = b"".join(chunk(body[start : start + 70_000]) for start in range(0, len(body), 70_000))
    for raw, number in (
        (keyed, 1),
        (plain + keyed + plain, 3),
        (request(key="h2", body=body), 1),
        (request("PUT", key=None, body=body), 1),
        (request("POST", "/v1/charges", "h3", b"", "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n", 1),
    ):
        answers = await converse(standing.port, raw, pause_s=0)
        assert [answer.status for answer in answers] == [200] * number
        assert answers[-1].header("connection") == b"close"
    assert behind.received[-1].body == behind.received[-2].body == behind.received[-3].body == body


@pytest.mark.parametrize("key", ["cut", None])
async def test_a_client_that_half_closes_within_its_body_is_refused(standing, behind, valkey, key):
    """A body that its own framing calls incomplete when the client ends is no request: 400, and nothing claimed."""
    method = "POST" if key else "PUT"
    (answer,) = await converse(standing.port, request(method, key=key)[:-3])
    assert (answer.status, answer.header("connection")) == (400, b"close")
    assert valkey.records() == {}
    assert [received.body for received in behind.received if received.body] == []


async def test_a_client_that_resets_at_any_moment_is_no_error(proxies, upstream, valkey):
    """Whenever a client resets its connection, the proxy has nothing to complain about and serves the next."""
    gate = proxies(upstream, valkey.url)
    upstream.script = answering(OK, delay_s=0.01)
    raws = (request("GET", key=None, body=b""), request(key="r", body=b"x" * 100_000), request("PUT", key=None))
    for number in range(150):
        client = await RawClient.open(gate.port)
        raw = raws[number % 3]
        client.writer.write(raw[: len(raw) - number % 4])
        if number % 5:
            await asyncio.sleep(0.004 * (number % 5 - 1))
        client.reset()
    await until(lambda: gate.metric("in_flight") == 0)
    assert (await ask(gate.port, request(key="r", body=b"x" * 100_000))).status == 200
    lines = [json.loads(line) for line in gate.log().splitlines()]
    assert {line["level"] for line in lines} == {"info"}
    assert {line["event"] for line in lines} == {"serving", "request"}


async def test_http_1_0_is_answered_in_its_own_terms(standing, behind):
    """HTTP/1.0 gets no chunks; the connection ends after the answer unless keep-alive was asked for and can be."""
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    old = request(key=None, body=b"x").replace(b"HTTP/1.1", b"HTTP/1.0")
    kept = old.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    keyed = kept.replace(b"Host", b"Idempotency-Key: old\r\nHost")
    rows = (
        (old, OK, b"close", True),
        (kept, OK, b"keep-alive", False),
        (keyed, OK, b"keep-alive", False),
        (keyed, OK, b"keep-alive", False),  # the replay
        (old, chunks, b"close", True),
        (kept, chunks, b"keep-alive", False),  # small: its length is known
    )
    for raw, answer, connection, ends in rows:
        behind.script = answering(answer)
        with closing(await RawClient.open(standing.port)) as client:
            got = await client.ask(raw)
            assert (got.status, got.body, got.header("connection")) == (200, b"ok", connection)
            assert got.header("transfer-encoding") is None
            if ends:
                assert await rest(client) == b""
            else:
                assert (await client.ask(raw)).status == 200


async def test_a_stream_to_http_1_0_ends_by_closing(standing, behind):
    """What comes bit by bit, without a length, reaches an HTTP/1.0 client whole and is ended by closing."""
    tap = Tap()
    behind.script = tap.script
    raw = request(key="s").replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host", b"Connection: keep-alive\r\nHost")
    with closing(await RawClient.open(standing.port)) as client:
        tap.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"a")
        )
        client.writer.write(raw)
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"\r\nConnection: close\r\n" in head
        assert b"ransfer-" not in head
        assert await client.reader.readexactly(1) == b"a"
        tap.end(chunk(b"b"), LAST_CHUNK)
        assert await rest(client) == b"b"


# Expect: 100-continue ...


@pytest.mark.fault(28)
@pytest.mark.parametrize("key", ["expected", None])
async def test_the_proxy_itself_asks_for_an_expected_body(standing, behind, key):
    """After its checks the proxy says 100 once; the expectation does not reach the upstream."""
    raw = request("POST", "/x", key, b"", "Expect: 100-continue", "Content-Length: 5")
    with closing(await RawClient.open(standing.port)) as client:
        client.writer.write(raw)
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        answer = await client.ask(b"hello")
        assert (answer.status, answer.interim) == (200, [])
        # A body that is there already needs no invitation.
        assert (await client.ask(request("POST", "/x", key, b"", "Expect: 100-continue"))).interim == []
    assert behind.received[0].body == b"hello"
    assert behind.received[0].header("expect") == []


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("extra", "status"),
    [
        (["Idempotency-Key: a", "Content-Length: 33554433"], 413),
        (['Idempotency-Key: "', "Content-Length: 5"], 400),
        (["Idempotency-Key: a", "Idempotency-Key: a", "Content-Length: 5"], 400),
        (["Idempotency-Key: a", "Authorization: Digest x", "Content-Length: 5"], 400),
        (["Idempotency-Key: a", "Connection: cookie", "Content-Length: 5"], 400),
        (["Host: b", "Content-Length: 5"], 400),
    ],
)
async def test_a_body_that_will_not_be_used_is_not_asked_for(standing, behind, valkey, extra, status):
    """A request that fails its checks is answered at once, without 100, and the connection ends: what the client
    sends next may be the body or another request."""
    asked = request("POST", "/x", None, b"", "Expect: 100-continue", *extra)
    (answer,) = await converse(standing.port, asked, request("GET", "/instead", None, b""), pause_s=0.05)
    assert (answer.status, answer.interim, answer.header("connection")) == (status, [], b"close")
    assert valkey.records() == {}
    assert behind.received == []


# Deadlines and counts ...


@pytest.fixture
def tls_files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A certificate for this host, its key, and the authority that made them."""
    authority = trustme.CA()
    made = authority.issue_cert("localhost", "127.0.0.1")
    cert, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    made.private_key_pem.write_to_path(key)
    cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    authority.cert_pem.write_to_path(ca)
    return cert, key, ca


async def test_a_slow_head_is_cut_off_and_nobody_else(proxies, upstream, valkey, tls_files):
    """A head that is not whole 10 s after its first byte gets 408, a TLS handshake that long the end;
    a long request and good clients are served meanwhile."""

    async def script(_, reader, writer, received):
        await answering(OK, 12 if b"/long" in received.line else 0)(_, reader, writer, received)

    upstream.script = script
    gate = proxies(upstream, valkey.url)
    secure = proxies(upstream, valkey.url, TLS_CERT_FILE=tls_files[0], TLS_KEY_FILE=tls_files[1])
    began = time.monotonic()

    async def stall(*pieces: bytes, drip: bytes = b"") -> None:
        transport, talk = await asyncio.get_running_loop().create_connection(Talk, "127.0.0.1", gate.port)
        for piece in pieces:
            transport.write(piece)
            await asyncio.sleep(0.3)
        while not talk.over.is_set():
            assert time.monotonic() - began < 30
            if drip and not transport.is_closing():
                transport.write(drip)
            await asyncio.sleep(0.3)
        last = (await answers_in(talk.came))[-1]
        assert (last.status, last.header("connection"), last.problem["retryable"]) == (408, b"close", True)
        assert time.monotonic() - began > 9

    async def handshake() -> None:
        with closing(await RawClient.open(secure.port)) as client:
            assert await rest(client) == b""

    async def work() -> None:
        for number in range(50):
            assert (await ask(gate.port, request(key=f"good-{number}"))).status == 200
            await asyncio.sleep(0.2)

    began_head = b"POST /x HTTP/1.1\r\nHost: api.test\r\nA: "
    await asyncio.gather(
        stall(b"G"),
        stall(began_head),
        stall(began_head, drip=b"x"),
        stall(request()[:-20]),
        stall(request("GET", key=None, body=b""), b"GET / HT"),
        *[stall(began_head, drip=b"\r\nA: b") for _ in range(20)],
        handshake(),
        work(),
        ask(gate.port, request(target="/long", key=None)),
        ask(gate.port, request(target="/long", key="long")),
    )
    assert len(upstream.received) == 53
    assert gate.metric('requests_total{outcome="invalid"}') == 25


async def test_over_its_limit_of_connections_the_proxy_says_so_and_closes(proxies, upstream, valkey):
    """The connection over MAX_CONNECTIONS gets 503 and the end; when another has left, there is room again."""
    gate = proxies(upstream, valkey.url, MAX_CONNECTIONS=3)
    plain = request("GET", key=None, body=b"")
    inside = [await RawClient.open(gate.port) for _ in range(3)]
    for client in inside:
        assert (await client.ask(plain)).status == 200
    for _ in range(5):
        with closing(await RawClient.open(gate.port)) as outside:
            answer = await read_answer(outside.reader)
            assert (answer.status, answer.header("connection"), answer.header("retry-after")) == (503, b"close", b"1")
            assert answer.problem["retryable"] is True
            assert await rest(outside) == b""
    assert gate.metric('requests_total{outcome="overloaded"}') == 5
    for client in inside:
        assert (await client.ask(plain)).status == 200
    inside.pop().close()
    with closing(await RawClient.open(gate.port)) as newcomer:
        async with asyncio.timeout(10):
            while (await newcomer.ask(plain)).status == 503:
                newcomer.close()
                newcomer = await RawClient.open(gate.port)
        newcomer.close()
    for client in inside:
        client.close()


# TLS ...


@asynccontextmanager
async def over_tls(port: int, context: ssl.SSLContext) -> AsyncIterator[RawClient]:
    client = await RawClient.open(port, ssl=context, server_hostname="localhost")
    try:
        yield client
    finally:
        client.close()
        with suppress(OSError):
            await client.writer.wait_closed()


async def test_the_public_listener_speaks_tls(proxies, upstream, valkey, tls_files):
    """With a certificate the listener speaks TLS alone, agrees on http/1.1, and tells the upstream https."""
    cert, key, ca = tls_files
    gate = proxies(upstream, valkey.url, TLS_CERT_FILE=cert, TLS_KEY_FILE=key)
    context = ssl.create_default_context(cafile=str(ca))
    for offered, agreed in ((["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)):
        context.set_alpn_protocols(offered)
        async with over_tls(gate.port, context) as client:
            assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() == agreed
            for status in (b"executed", b"replayed"):
                assert (await client.ask(request(key=f"tls-{len(offered)}"))).header("oncegate-status") == status
    assert upstream.received[-1].header("x-forwarded-proto") == [b"https"]
    with closing(await RawClient.open(gate.port)) as client:
        client.writer.write(request())
        assert b"HTTP/1.1 2" not in await rest(client)
    assert len(upstream.received) == 3


async def test_a_client_that_closes_tls_during_its_request_is_one_that_left(proxies, upstream, valkey, tls_files):
    """close_notify in the middle ends the connection, not the execution: the retry gets the replay."""
    cert, key, ca = tls_files
    gate = proxies(upstream, valkey.url, TLS_CERT_FILE=cert, TLS_KEY_FILE=key)
    context = ssl.create_default_context(cafile=str(ca))
    go = asyncio.Event()
    upstream.script = holding(go)
    async with over_tls(gate.port, context) as client:
        client.writer.write(request())
        await until(lambda: upstream.received)
    await until(lambda: gate.metric("in_flight") == 1)
    go.set()
    await until(lambda: gate.metric('requests_total{outcome="executed"}') == 1)
    async with over_tls(gate.port, context) as again:
        assert (await again.ask(request())).header("oncegate-status") == b"replayed"
    assert [line for line in gate.log().splitlines() if '"level": "warning"' in line] == []


# Two listeners, one upstream ...


def admin_paths() -> list[str]:
    """Return the admin paths in every disguise."""
    found = []
    for name in ("metrics", "healthz", "readyz"):
        dotted = [
            f"/{name}",
            f"//{name}",
            f"/./{name}",
            f"/x/../{name}",
            f"/../{name}",
            f"/%2e/{name}",
            f"/x/%2e%2e/{name}",
        ]
        dotted += [
            f"/{name}/",
            f"/{name}//",
            f"/{name}/.",
            f"/{name}/x/..",
            f"/{name};a=b",
            f"/{name}?",
            f"/{name}?a=b",
        ]
        dotted += [
            f"/{name}%20",
            f"/{name}%00",
            f"/{name}%09",
            f"/{name}%0a",
            f"/%20{name}",
            f"/{name}.",
            f"/{name}.json",
        ]
        dotted += [f"/%2f{name}", f"/%5c{name}", f"/\\{name}", f"/x%2f..%2f{name}", f"/..%2f{name}", f"/..;/{name}"]
        dotted += [f"/{name.upper()}", f"/{name.title()}", f"/admin/{name}", f"/-/{name}", f"/_{name}", f"/.{name}"]
        dotted += ["/" + "".join(f"%{ord(letter):02x}" for letter in name)]
        dotted += ["/" + "".join(f"%25{ord(letter):02x}" for letter in name)]
        dotted += [f"/{name[:at]}%{ord(name[at]):02x}{name[at + 1 :]}" for at in range(len(name))]
        dotted += [f"http://api.test/{name}", f"http://api.test//{name}", f"HTTP://api.test/{name}?a"]
        found += dotted
    return found


async def test_no_admin_page_is_on_the_public_port(standing, behind):
    """Whatever looks like an admin path is the upstream's own, for every method and in every disguise."""
    paths = admin_paths()
    assert len(paths) > 130
    with closing(await RawClient.open(standing.port)) as client:
        for method in ("GET", "POST", "OPTIONS"):
            for path in paths:
                answer = await client.ask(request(method, path, None, b""))
                assert (answer.status, answer.body) == (200, b"ok"), path
        for host in (f"127.0.0.1:{standing.admin_port}", "localhost", "oncegate"):
            answer = await client.ask(request("GET", "/metrics", None, b"", host=host))
            assert (answer.status, answer.body) == (200, b"ok")
    assert len(behind.received) == 3 * len(paths) + 3


async def test_no_public_path_is_on_the_admin_port(standing, behind, valkey):
    """The admin listener forwards nothing and claims nothing."""
    for method in ("GET", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS"):
        for path in ("/", "/v1/charges", "//metrics", "/metrics/x", "http://api.test/v1/charges"):
            raw = request(method, path, "admin", b"")
            with closing(await RawClient.open(standing.admin_port)) as client:
                client.writer.write(raw)
                assert re.match(rb"HTTP/1.[01] 4[0-9]{2} ", await client.reader.readline()), (method, path)
    assert behind.received == []
    assert valkey.records() == {}


async def test_only_the_configured_upstream_is_ever_contacted(standing, behind):
    """However a request names another server, nothing connects to it."""
    connected = []
    other = await asyncio.start_server(lambda _, writer: connected.append(writer), "127.0.0.1", 0)
    place = f"127.0.0.1:{other.sockets[0].getsockname()[1]}"
    behind.script = answering(f"HTTP/1.1 307 Go\r\nLocation: http://{place}/\r\nContent-Length: 0\r\n\r\n".encode())
    named = [
        ("GET", f"http://{place}/", place),
        ("POST", f"http://{place}/", place),
        ("GET", f"http://{place}/", "api.test"),
        ("GET", f"http://api.test@{place}/", "api.test"),
        ("GET", f"http://{place}@api.test/", place),
        ("GET", f"http://localhost:{place[10:]}/", f"localhost:{place[10:]}"),
        ("GET", f"http://[::ffff:127.0.0.1]:{place[10:]}/", f"[::ffff:127.0.0.1]:{place[10:]}"),
        ("GET", f"//{place}/", place),
        ("GET", f"/\\{place}/", place),
        ("GET", f"/@{place}/", place),
        ("GET", f"@{place}/", place),
        ("GET", f":@{place}/", place),
        ("GET", f"/?url=http://{place}/", place),
        ("CONNECT", place, place),
        ("CONNECT", f"http://{place}/", place),
        ("OPTIONS", "*", place),
        ("TRACE", f"http://{place}/", place),
        ("GET", f"https://{place}/", place),
        ("GET", f"ftp://{place}/", place),
    ]
    extra = [f"Forwarded: host={place}", f"X-Forwarded-Host: {place}", f"X-Forwarded-Server: {place}"]
    extra += [f"X-Original-URL: http://{place}/", f"X-Rewrite-URL: http://{place}/", f"X-Host: {place}"]
    for number, (method, url, host) in enumerate(named):
        key = f"ssrf{number}" if method == "POST" else None
        answer = await ask(standing.port, request(method, url, key, b"", *extra, host=host))
        assert answer.status in (307, 400, 405)
    other.close()
    assert connected == []
    assert {received.header("host")[0] for received in behind.received} == {b"127.0.0.1:%d" % behind.port}
