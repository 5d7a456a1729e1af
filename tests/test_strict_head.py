"""Heads that strict parsers refuse: read in the one way they can be read, or refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.messages.strict_head import stated_status, strict_response

LINE = rb"[^\x00-\x08\x0a-\x1f\x7f]*"
STRICT = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2} ?%s\r\n([^\x00-\x20\x7f:]%s: %s\r\n)*\r\n" % (LINE, LINE, LINE))
PARTS = (
    *(b"HTTP/1.1 200 OK", b"HTTP/1.1 103 H", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r", b"\0", b"\x0b", b" ", b"\t"),
    *(
        b"X: a",
        b"X : a",
        b"Content-Length: 2",
        b"Content-Length: 2, 2",
        b"content-length:3",
        b"Transfer-Encoding:",
        b"ok",
    ),
)
parts = st.lists(st.sampled_from(PARTS) | st.binary(max_size=3), max_size=12).map(b"".join)


@given(parts.map(lambda rest: b"HTTP/1.1 200 OK" + rest))
def test_what_is_rewritten_is_strict(data):
    """A rewritten head is one that every parser reads alike, with at most one length; written again, it stays."""
    strict = strict_response(data)
    if isinstance(strict, bytes):
        head = strict[: strict.index(b"\r\n\r\n") + 4]
        assert STRICT.fullmatch(head), head
        assert head.lower().count(b"\r\ncontent-length:") <= 1
        assert strict_response(strict) == strict


@given(parts.map(lambda rest: b"HTTP/1.1 103 H\n\nHTTP/1.1 200 OK" + rest), st.data())
def test_a_part_of_a_response_is_never_read_as_another(data, draw):
    """Before the head is whole, nothing is read; a head that is refused in part stays refused."""
    part = strict_response(data[: draw.draw(st.integers(0, len(data)))])
    whole = strict_response(data)
    if isinstance(part, str):
        assert isinstance(whole, str)
    elif isinstance(part, bytes):
        assert isinstance(whole, bytes)
        assert whole.startswith(part)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nX: \0\r\n\r\n", 200),
        (b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 204\r\n\r\n", 204),
        (b"HTTP/1.1 999\n", 999),
        (b"HTTP/2 200 \r\n", 200),
        (b"HTTP/1.1 101 S\r\n\r\n", 101),
        (b"HTTP/1.1 100 C\r\n\r\n", 0),
        (b"HTTP/1.1 2000 OK\r\n\r\n", 0),
        (b"HTTP/1.1 20", 0),
        (b"X: HTTP/1.1 200 OK\r\n", 0),
        (b"garbage", 0),
        (b"", 0),
    ],
)
def test_the_status_that_came(data, status):
    """The first final status, whatever is wrong with the rest; 0 where there is none."""
    assert stated_status(data) == status
