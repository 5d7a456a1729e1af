"""Requests that two parsers could read in two ways (T1)."""

import asyncio
import itertools
import random
from contextlib import closing

import pytest

from tests.hostile.parts import (
    CANARY,
    CHUNKED,
    GOT,
    HELLO,
    HIDDEN,
    HOST,
    KEY,
    POSTED,
    POSTED_HELLO,
    PUT,
    PUT_HELLO,
    Forwarded,
    Row,
    assert_canonical,
    get,
    message,
    post,
    put,
)
from tests.parts import OK, Answer, RawClient, Received, ask, converse, request, rest

VERSIONS: list[Row] = [
    ("HTTP 0.9", b"GET /%s\r\n\r\n" % CANARY, 505),
    ("HTTP 0.9 named", get(version=b"HTTP/0.9"), 505),
    ("HTTP 2.0", get(version=b"HTTP/2.0"), 505),
    ("HTTP 1.2", get(version=b"HTTP/1.2"), 505),
    ("HTTP 3.0", get(version=b"HTTP/3.0"), 505),
    ("HTTP 1", get(version=b"HTTP/1"), 400),
    ("HTTP 11", get(version=b"HTTP/11"), 400),
    ("HTTP 1.10", get(version=b"HTTP/1.10"), 400),
    ("a version in lower case", get(version=b"http/1.1"), 400),
    ("RTSP", get(version=b"RTSP/1.0"), 400),
    ("ICE", message(b"SOURCE /x ICE/1.1", HOST), 400),
    ("a method of RTSP in its protocol", message(b"DESCRIBE /x RTSP/1.0", HOST), 400),
    ("a version with a tail", get(version=b"HTTP/1.1x"), 400),
    ("no version with fields", message(b"GET /x", HOST), 505),
    ("HTTP/2 prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + CANARY, 505),
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
    ("a method in lower case", message(b"get /x HTTP/1.1", HOST), 501),
    ("a method with a space before it", b" " + get(), 400),
    ("a method that is no token", message(b"G@T /x HTTP/1.1", HOST), 400),
    ("an unknown method", message(b"BREW-2 /x HTTP/1.1", HOST), Forwarded(b"BREW-2 /x HTTP/1.1")),
    (
        "an unknown method with a body",
        message(b"BREW /x HTTP/1.1", HOST, b"Content-Length: 5", body=b"hello"),
        Forwarded(b"BREW /x HTTP/1.1", b"hello"),
    ),
    (
        "an unknown method with a target beyond ASCII",
        message(b"BREW /\xc3\xa9 HTTP/1.1", HOST),
        Forwarded(b"BREW /\xc3\xa9 HTTP/1.1"),
    ),
    ("a method of RTSP", message(b"DESCRIBE /x HTTP/1.1", HOST), Forwarded(b"DESCRIBE /x HTTP/1.1")),
    ("an unknown method in small letters", message(b"brew /x HTTP/1.1", HOST), 501),
    ("a method of 300 bytes", message(b"G" * 300 + b" /x HTTP/1.1", HOST), 501),
    ("tabs in the line", message(b"GET\t/x\tHTTP/1.1", HOST), 400),
    ("a space after the line", message(b"GET /x HTTP/1.1 ", HOST), 400),
    ("two spaces in the line", message(b"GET  /x  HTTP/1.1", HOST), GOT),
    ("empty lines before the line", b"\r\n\r\n" + get(), GOT),
    ("a target of 20,000 bytes", get(b"/" + b"x" * 20_000), 414),
    ("a target of 70,000 bytes", get(b"/" + b"x" * 70_000), 414),
    ("a value of 20,000 bytes", get(b"/x", b"A: " + b"b" * 20_000), 431),
    ("a name of 20,000 bytes", get(b"/x", b"A" * 20_000 + b": b"), 431),
    ("200 fields", get(b"/x", *[b"A: b"] * 200), 431),
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
    ("garbage behind the body", put(b"Content-Length: 5", body=b"hello\0garbage\r\n\r\n"), PUT_HELLO),
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
# Well-formed, and unknown.
OTHER_CODINGS = (
    *(b"identity", b"cow", b"xchunked", b"chunkedx", b"chunke", b"hunked", b"gzip;q=1, chunked"),
    *(b"identity, chunked", b"gzip, chunked", b"gzip, cow", b"'chunked'"),
)
CODINGS: dict[bytes, int | Forwarded] = dict.fromkeys(ONE_CODING, POSTED_HELLO) | {
    b"%s: %s" % (name, value): 400
    for name, value in [
        *[
            (b"Transfer-Encoding", value)
            for value in (
                b"", b"x chunked", b"chunked x", b"chunked, identity", b"chunked, chunked", b"chunked,",
                b"chunked;q=1", b"chunked; a=b", b'"chunked"', b"\x0bchunked", b"\x0cchunked",
                b"\xa0chunked", b"\x00chunked", b"chunked\x00", b"chunked\x0b", b"chunked \t",
                b"chunk\xe9d", b"\xefchunked",
                b"chun ked", b"chunked\rX: y", b"\rchunked", b"\nchunked", b"gzip\r\nTransfer-Encoding: chunked",
                b"identity\r\ntransfer-encoding: chunked",
                b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-Encoding: identity",
                b"\r\n chunked", b"\r\n\tchunked", b" \r\n chunked",
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
} | {b"Transfer-Encoding: " + coding: 501 for coding in OTHER_CODINGS}  # fmt: skip
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
    ("CONNECT of nothing", message(b"CONNECT ", HOST), 400),
    ("TRACE", message(b"TRACE /x HTTP/1.1", HOST), 405),
    ("OPTIONS *", message(b"OPTIONS * HTTP/1.1", HOST), 400),
    ("POST *", message(b"POST * HTTP/1.1", HOST, KEY), 400),
    ("h2c offered to a GET", get(b"/x", *H2C), GOT),
    ("h2c offered to a keyed POST", post(*H2C, b"Content-Length: 5", body=b"hello"), POSTED_HELLO),
    ("h2c without Connection", get(b"/x", *H2C[1:]), GOT),
    ("websocket beside h2c", get(b"/x", b"Connection: Upgrade", b"Upgrade: h2c, websocket"), GOT),
    ("websocket without a key", get(b"/x", *WEBSOCKET[:3]), GOT),
    ("websocket in HTTP/1.0", get(b"/x", *WEBSOCKET, version=b"HTTP/1.0"), GOT),
    ("websocket with a body", post(*WEBSOCKET, b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
     Forwarded(b"POST /x HTTP/1.1", HIDDEN)),
    ("websocket with a chunked body", post(*WEBSOCKET, CHUNKED, body=HELLO + HIDDEN), POSTED_HELLO),
    ("websocket with a streamed body", put(*WEBSOCKET, b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
     Forwarded(b"PUT /x HTTP/1.1", HIDDEN)),
    ("another protocol", get(b"/x", b"Connection: Upgrade", b"Upgrade: TLS/1.0"), GOT),
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
    ("a URL of another host, which wins over Host", get(b"http://evil.test:80/x"), GOT),
    ("a URL of an address", get(b"http://[::1]/x"), GOT),
    ("a URL of ours without a path", get(b"http://api.test"), target(b"/")),
    ("a URL of ours with a query alone", get(b"http://api.test?y"), target(b"/?y")),
    ("a URL with an escaped path", get(b"http://api.test/%7Ea/../b"), target(b"/%7Ea/../b")),
    *(
        (f"the target {url.decode()}", get(url), 400)
        for url in (
            b"http://api.test@evil.test/", b"http://evil.test@api.test/", b"http://api.test:pw@evil.test/",
            b"http://@api.test/", b"http://api.test:/", b"http://api.test:999999/",
            b"http://evil.test\\@api.test/", b"http://api.test\\.evil.test/",
            b"http://evil.test#@api.test/", b"http://[::1/", b"http://[zz]/",
            b"http:///x", b"http:/x", b"http:x", b"http://",
            b"http://api.test:x/", b"http://api.test/x#y", b"https:api.test/",
            b"ftp://api.test/x", b"file:///etc/passwd", b"gopher://api.test:70/_x", b"ws://api.test/x",
            b"unix:/var/run/x.sock", b"javascript:alert(1)", b"://api.test/", b"api.test/x", b"api.test:80", b"x", b".",
            b"?x", b"#x", b"/x#y", b"/#", b"*x", b"\\\\evil.test\\x", b";/x", b"@evil.test/x",
        )
    ),
    ("no target", message(b"GET HTTP/1.1", HOST), 400),
    ("a space in the target", get(b"/a b"), 400),
    ("a tab in the target", get(b"/a\tb"), 400),
    ("obs-text in the method", message(b"GE\xd4 /x HTTP/1.1", HOST), 400),
    ("obs-text in the version", get(version=b"HTTP/1.\xb1"), 400),
    ("obs-text in the scheme", get(b"htt\xf0://api.test/"), 400),
    ("obs-text in the authority", get(b"http://api\xa0.test/"), 400),
    ("obs-text alone", b"\xff\xfe\r\n\r\n" + CANARY, 400),
    ("obs-text in the target and two Hosts", get(b"/\xff", b"Host: evil.test"), 400),
    ("a second target behind obs-text", message(b"GET /\xff /y HTTP/1.1", HOST), 400),
    ("a keyed target beyond ASCII", message(b"POST /caf\xc3\xa9 HTTP/1.1", HOST, KEY),
     Forwarded(b"POST /caf\xc3\xa9 HTTP/1.1")),
    ("a URL of ours beyond ASCII", get(b"http://api.test/\xe9?\xff"), target(b"/\xe9?\xff")),
    *(
        (f"the path {path!r}", get(path), target(path))
        for path in (
            b"//evil.test/x", b"///evil.test/x", b"/\\evil.test/x", b"/http://evil.test/", b"/@evil.test/x",
            b"/../../etc/passwd", b"/%2e%2e/%2E%2E/", b"/%7Ea/../b?x=%2F", b"/a;b=c/./d", b"/%00", b"/%zz", b"/%",
            b"/x?http://evil.test/", b"/x??&&==", b"/x?a=\"'<>`{}|^", b"/:80/x", b"/*",
            b"/\xff\xfe", b"/caf\xc3\xa9?q=\xc3\xa9",
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


@pytest.mark.parametrize(("raw", "expected"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
async def test_a_request_is_forwarded_once_in_canonical_form_or_refused(standing, behind, raw, expected):
    """T1: the upstream sees nothing and the client a problem and the end, or it sees one request with our framing."""
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
    """T1: each keyed row of the table gets its one answer, and no other, when its bytes come in four pieces."""
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
    """T1: framing that breaks in the middle of a body gets 400 and the end, keyed or not; nothing counts as whole."""
    for fields, first in ((KEY, b"POST"), (b"X: y", b"PUT")):
        begun = message(b"%s /x HTTP/1.1" % first, HOST, fields, CHUNKED, body=b"5\r\nhello\r\n")
        (answer,) = await converse(standing.port, begun, b"zz\r\n", pause_s=0.05)
        assert (answer.status, answer.header("connection")) == (400, b"close")
        assert CANARY not in answer.body
    assert standing.metric("in_flight") == standing.metric("reading_bodies") == 0
    assert [received.body for received in behind.received] == [b""]  # the streamed one broke off there as well
    log = standing.log()
    assert CANARY.decode() not in log
    assert "Traceback" not in log


async def test_a_request_that_is_answered_here_is_not_remembered_as_the_one_behind_it(standing, behind):
    """T1: Max-Forwards: 0 is not for the upstream. What came behind it in one segment is no body of a later one."""
    here = message(b"OPTIONS /here HTTP/1.1", HOST, b"Max-Forwards: 0")
    other = message(b"GET /other HTTP/1.1", HOST, b"X: " + b"x" * 200)
    begun = message(b"OPTIONS /x HTTP/1.1", HOST, b"Content-Length: %d" % len(other))
    body = b"y" * len(other)
    at = len(other) - len(begun)
    await converse(standing.port, here + begun + body[:at], body[at:], pause_s=0.05)
    answers = await converse(standing.port, here + other)
    assert [answer.status for answer in answers] == [200, 200]
    assert behind.received[-1].head.startswith(b"GET /other ")


# Streams that nobody thought of ...

SEEDS = (
    post(b"Content-Length: 5", body=b"hello"),
    post(CHUNKED, body=b"5\r\nhello\r\n3;a=b\r\nyou\r\n0\r\nA: b\r\n\r\n"),
    put(b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
    put(CHUNKED, body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)),
    get(b"/x?y", b"Content-Length: 0", b"Connection: keep-alive"),
    get(b"http://api.test/x", b"Accept: a, b", version=b"HTTP/1.0"),
)
SPECIAL = (
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b"\x0b", b":", b";", b",", b"0", b"-", b"+", b"0x", b"\xff",
    b"\r\nContent-Length: 5", b"\r\nTransfer-Encoding: chunked", b"\r\nTransfer-Encoding: identity", b"\r\nHost: evil",
    b"0\r\n\r\n", b"1\r\na\r\n", b"\r\nExpect: 100-continue", b" HTTP/1.1", b"\r\nConnection: close, content-length",
)  # fmt: skip


def mutated(dice: random.Random, raw: bytes) -> bytes:
    """Return a stream with one to three changes: bytes put in, taken out, doubled, swapped, replaced, recased."""
    for _ in range(dice.randint(1, 3)):
        one, two = sorted(dice.choices(range(len(raw) + 1), k=2))
        two = min(two, one + dice.choice((1, 2, 8, 60)))
        part = raw[one:two]
        change = dice.randrange(9)
        if change == 0:
            part = dice.choice(SPECIAL) + part
        elif change == 1:
            part = b""
        elif change == 2:
            part += part
        elif change == 3:
            part = dice.choice(SPECIAL)
        elif change == 4:
            part = part.swapcase()
        elif change == 5:
            part = part.replace(b"\r\n", dice.choice((b"\n", b"\r", b"\n\r", b"\r\r\n", b"\r\n ")))
        elif change == 6:
            part = bytes(byte ^ (1 << dice.randrange(8)) for byte in part)
        elif change == 7:
            part = part[::-1]
        else:
            part = part.replace(b"5", b"%d" % dice.randrange(12)).replace(b": ", b":\t")
        raw = raw[:one] + part + raw[two:]
    return raw


async def test_a_mutated_stream_is_forwarded_as_often_as_it_is_answered(standing, behind):
    """T1: of 1,500 mutated streams, what is forwarded is canonical, once for each answer of the upstream's, and the
    same however the stream is cut into segments."""
    dice = random.Random(20261124)
    sound = (b"".join(dice.choices(SEEDS, k=dice.randint(1, 3))) for _ in range(1500))
    streams = [mutated(dice, raw.replace(KEY, KEY + b"-%d" % number)) for number, raw in enumerate(sound)]
    whole: list[Received] = []  # the requests that the upstream has got to their end

    async def count(upstream, _, writer, received) -> None:
        whole.append(received)
        writer.write(OK)

    async def answers(raw: bytes, *cuts: int) -> list[Answer]:
        ends = [0, *sorted(cuts), len(raw)]
        return await converse(standing.port, *[raw[one:two] for one, two in itertools.pairwise(ends)])

    behind.script = count
    for start in range(0, len(streams), 50):
        batch = streams[start : start + 50]
        firsts = await asyncio.gather(*map(answers, batch))
        told = [one.header("oncegate-status") for answers in firsts for one in answers if one.status == 200]
        assert len(whole) == len(told) - told.count(b"replayed")
        for received in behind.received:
            assert_canonical(received.head, received.body, b"127.0.0.1:%d" % behind.port, whole=received in whole)
        if start % 250 == 0:  # one batch of five again, in pieces
            cuts = [dice.sample(range(1, len(raw)), min(2, len(raw) - 1)) for raw in batch]
            parts = await asyncio.gather(*(answers(raw, *cut) for raw, cut in zip(batch, cuts, strict=True)))
            for raw, first, again in zip(batch, firsts, parts, strict=True):
                assert [one.status for one in first] == [one.status for one in again], raw
        whole.clear()
        behind.received.clear()
    assert "Traceback" not in standing.log()


async def test_what_one_client_sends_changes_nothing_for_another(proxies, upstream, valkey):
    """T1, T5: a whole request in the midst of another one, by segments, is known to nobody: neither is it answered
    as one, nor are another client's equal bytes read as anything else."""
    gate = proxies(upstream, valkey.url)
    victims = request("POST", "/pay", "victims", b"1", "Authorization: Bearer v")
    for begins in (
        b"GET /attack HTTP/1.1\r\nX: ",
        b"PUT /attack HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n",
    ):
        for before in ([], [request("GET", "/ok", None, b"")], [victims.replace(b"victims", b"another")]):
            attacker = await RawClient.open(gate.port)
            with closing(attacker):
                for whole in before:
                    assert (await attacker.ask(whole)).complete
                for segment in (begins, victims):
                    attacker.writer.write(segment)
                    await asyncio.sleep(0.02)
    assert not [one for one in upstream.received if b"/pay" in one.line and b"victims" in one.head]
    told = [(await ask(gate.port, victims)).header("oncegate-status") for _ in range(3)]
    assert told == [b"executed", b"replayed", b"replayed"]
    (paid,) = [one for one in upstream.received if b"/pay" in one.line and b"victims" in one.head]
    assert paid.line == b"POST /pay HTTP/1.1"
