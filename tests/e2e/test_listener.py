"""What the public listener lets in: hostile requests, deadlines, and the manners of a connection."""

import asyncio
import random
import re
import socket
import ssl
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from tests.parts import OK, Answer, Proxy, RawClient, RawUpstream, answering, ask, holding, read_answer, request, until

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
    ("a length in Arabic digits", post("Content-Length: ٥".encode(), body=b"hello"), 400),
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
    ("garbage behind the body", post(b"Content-Length: 5", body=b"hello\0garbage\r\n\r\n"), 400),
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
CODINGS: dict[bytes, int | Forwarded] = {
    line: POSTED_HELLO
    for line in (
        b"transfer-encoding: chunked",
        b"TRANSFER-ENCODING: CHUNKED",
        b"Transfer-Encoding:chunked",
        b"Transfer-Encoding: \tchunked ",
        b"Transfer-Encoding: , chunked",
    )
} | {
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
    ("TRACE", message(b"TRACE /x HTTP/1.1", HOST), 405),
    ("OPTIONS *", message(b"OPTIONS * HTTP/1.1", HOST), 400),
    ("POST *", message(b"POST * HTTP/1.1", HOST, KEY), 400),
    ("h2c offered to a GET", get(b"/x", *H2C), GOT),
    ("h2c offered to a keyed POST", post(*H2C, b"Content-Length: 5", body=b"hello"), POSTED_HELLO),
    ("h2c with a request behind it", get(b"/x", *H2C) + HIDDEN, GOT),
    ("h2c without Connection", get(b"/x", *H2C[1:]), GOT),
    ("websocket", get(b"/x", *WEBSOCKET), 501),
    ("websocket in capitals", get(b"/x", b"Connection: UPGRADE", b"Upgrade: WebSocket"), 501),
    ("websocket beside h2c", get(b"/x", b"Connection: Upgrade", b"Upgrade: h2c, websocket"), 501),
    ("websocket with a request behind it", get(b"/x", *WEBSOCKET) + HIDDEN, 501),
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
            b"api.test:port", b"api.test:-1", b"api.test:999999", b"api.test:80:80", b"[::1", b"::1", b"[zz]", b"[::1]x",
            b"api.test%0d%0aX", b"api.test\x00", b"api.test\xe9", b'"api.test"', b"<api.test>", b"api.test|x", b"a\tb",
        )
        if value != b"api.test%0d%0aX"  # an escape is allowed in a name, and goes nowhere: the upstream gets its own
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


@pytest.mark.parametrize("seed", range(4))
async def test_how_a_request_is_cut_into_segments_changes_nothing(standing, behind, seed):
    """Each keyed row of the table gets the same answer when its bytes come in four pieces."""
    rows = [row for row in HOSTILE if row[1].startswith(b"POST")]
    cuts = random.Random(seed)

    async def in_pieces(raw: bytes) -> bytes:
        first, second, third = sorted(cuts.sample(range(1, len(raw)), 3))
        return await converse(standing.port, raw[:first], raw[first:second], raw[second:third], raw[third:])

    for batch in itertools.batched(rows, 40) if hasattr(itertools, "batched") else _batches(rows, 40):
        answers = await asyncio.gather(*[in_pieces(raw) for _, raw, _ in batch])
        for (name, _, expected), answer in zip(batch, answers, strict=True):
            status = 200 if isinstance(expected, Forwarded) else expected
            assert answer.startswith(b"HTTP/1.1 %d " % status), (name, answer)
            assert answer.count(b"HTTP/1.1 ") == 1, name
    forwarded = sorted(row[2].body for row in rows if isinstance(row[2], Forwarded))
    assert len(behind.received) <= len(forwarded)
