"""The first line of a request: what is refused, and what the parser is shown."""

import pytest

from oncegate.messages.request_line import HeadLimits, Malformed, begun_line, usual_line_bytes, whole_line

LIMITS = HeadLimits(line_bytes=100)
LONG = b"/" + b"a" * 99


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"GET /x HTTP/1.1", b"GET /x HTTP/1.1"),
        (b"GET  /x  HTTP/1.0", b"GET /x HTTP/1.0"),
        (b"GET /caf\xc3\xa9 HTTP/1.1", b"GET /cafxx HTTP/1.1"),
        (b"BREW /x HTTP/1.1", b"LINK /x HTTP/1.1"),
        (b"VERSION-CONTROL /\xff HTTP/1.1", b"LINK /x HTTP/1.1"),
        (b"M" * 64 + b" /x HTTP/1.1", b"LINK /x HTTP/1.1"),
        (b"PUT " + LONG + b" HTTP/1.1", b"PUT " + LONG + b" HTTP/1.1"),
    ],
)
def test_a_line_is_shown_as_one_that_the_parser_reads(line, shown):
    """Unknown methods and bytes beyond ASCII are replaced for the parser, which gives nothing else away."""
    read = whole_line(line + b"\r\n", LIMITS)
    assert not isinstance(read, Malformed)
    assert (read.method, read.target, read.shown) == (*line.split()[:2], shown + b"\r\n")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        *[(b"", 400), (b" GET /x HTTP/1.1", 400), (b"G@T /x HTTP/1.1", 400), (b"GET /a b HTTP/1.1", 400)],
        *[(b"GET\t/x HTTP/1.1", 400), (b"GET HTTP/1.1", 400), (b"GET /x HTTP/1.1 ", 400), (b"GET /\0 HTTP/1.1", 400)],
        (b"\x16\x03\x01 /x HTTP/1.1", 400),
        *[(b"GET /x " + version, 400) for version in (b"RTSP/1.0", b"ICE/1.1", b"http/1.1", b"HTTP/1", b"HTTP/1.10")],
        *[(b"GET /x " + version, 505) for version in (b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/3.0")],
        (b"GET /x", 505),
        (b"PRI * HTTP/2.0", 505),
        *[(method + b" /x HTTP/1.1", 501) for method in (b"get", b"Post", b"brew", b"1GET", b"!", b"M" * 65)],
        (b"GET " + LONG + b"a HTTP/1.1", 414),
        (b"GET " + LONG * 50, 414),
    ],
)  # fmt: skip
def test_any_other_line_is_refused(line, status):
    """400 for what is no line of HTTP, 501 for odd methods, 505 for versions, 414 for targets, wherever it is cut."""
    whole = whole_line(line + b"\r\n", LIMITS)
    assert isinstance(whole, Malformed)
    assert whole.status == status
    early = [begun for size in range(1, len(line)) if (begun := begun_line(line[:size], LIMITS))]
    assert {one.status for one in early} <= {status}
    assert not usual_line_bytes(line + b"\r\n", 0) or status == 414


@pytest.mark.parametrize("line", [b"GET /x HTTP/1.1\n", b"GET /x HTTP/1.1\r\r\n"])
def test_a_line_ends_with_crlf(line):
    assert whole_line(line, LIMITS) == Malformed(400, "the request is not well-formed HTTP")
