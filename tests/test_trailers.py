"""Trailers of responses: which pass, and how they are announced."""

import pytest

from oncegate.messages.response_head import ResponseHead, read_response_head
from oncegate.messages.trailers import announced, announcement, takes_trailers, trailer_block
from oncegate.upstream.response import IncomingResponse

DROPPED = [
    "Connection",
    "Content-Encoding",
    "Content-Length",
    "Content-Type",
    "Content-Range",
    "Transfer-Encoding",
    "Trailer",
    "TE",
    "Host",
    "Set-Cookie",
    "WWW-Authenticate",
    "Authorization",
    "Proxy-Authenticate",
    "Cache-Control",
    "Age",
    "Expires",
    "Date",
    "Location",
    "Retry-After",
    "Vary",
    "Refresh",
    "Idempotent-Replayed",
    "Oncegate-Status",
    "Access-Control-Allow-Origin",
    "X-Nominated",
]


def head(*pairs: tuple[bytes, bytes]) -> ResponseHead:
    read = read_response_head(200, b"OK", pairs, head_only=False)
    assert isinstance(read, ResponseHead)
    return read


@pytest.mark.parametrize(
    "name",
    DROPPED,
)
def test_what_a_client_has_to_know_before_the_body_never_trails(name):
    """Framing, routing, controls, formats, credentials, marks of ours and what Connection nominates are dropped."""
    fields = {b"connection": [b"close, X-Nominated"]}
    pairs = [(b"X-Sum", b"1"), (name.encode(), b"x"), (name.lower().encode(), b"x"), (b"Server-Timing", b"db;dur=3")]
    assert trailer_block(pairs, fields) == b"X-Sum: 1\r\nServer-Timing: db;dur=3\r\n"


def test_a_control_character_drops_a_trailer():
    """What could split a message for the next reader is no trailer."""
    assert trailer_block([(b"A", b"1\x00"), (b"B\n", b"2"), (b"C", b"3\t4")], {}) == b"C: 3\t4\r\n"


@pytest.mark.parametrize(
    ("te", "taken"),
    [
        ([b"trailers"], True),
        ([b"gzip;q=0.5", b"Trailers"], True),
        ([b"deflate, trailers"], True),
        ([b"gzip"], False),
        ([b""], False),
        ([b"trailers;q=0"], False),
        ([], False),
    ],
)
def test_who_takes_trailers(te, taken):
    """The member `trailers` of TE says so, and nothing else."""
    assert takes_trailers(te) is taken


def test_announcements():
    """Trailers are announced by their names; those that may not trail, and a body without a place for any, are not."""
    assert announcement(b"X-Sum: 1\r\nX-Sum: 2\r\nX-End: a: b\r\n") == b"Trailer: X-Sum, X-End\r\n"
    chunked = (b"Transfer-Encoding", b"chunked")
    assert announced(head(chunked, (b"Trailer", b"X-Sum, Set-Cookie, X-End"))) == b"Trailer: x-sum, x-end\r\n"
    for fields in (
        [chunked],
        [chunked, (b"Trailer", b"Content-Length")],
        [(b"Content-Length", b"2"), (b"Trailer", b"X-Sum")],
        [(b"Trailer", b"X-Sum")],
    ):
        assert announced(head(*fields)) == b""


def test_trailers_belong_to_one_response():
    """The next response on a connection has none of those before, whole or in pieces."""
    response = IncomingResponse()
    with_trailers = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\nDate: now\r\n\r\n"
    )
    for size in (len(with_trailers), 1):
        response.begin(head_only=False)
        for at in range(0, len(with_trailers), size):
            assert response.feed(with_trailers[at : at + size]) == ""
        assert (response.is_complete, response.trailers) == (True, b"X-Sum: 1\r\n")
        response.begin(head_only=False)
        assert response.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n") == ""
        assert (response.is_complete, response.trailers) == (True, b"")
        assert response.head is not None
        assert b"x-sum" not in response.head.fields
