"""Range, If-Range and the tags of conditions."""

import pytest

from oncegate.streams.ranges import ByteRange, Unsatisfiable, is_same, requested_range

TAG = b'"abc"'


def fields(**values: bytes):
    return {name.replace("_", "-").encode(): [value] for name, value in values.items()}


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        (b"bytes=0-", ByteRange(0, 10)),
        (b"bytes=0-0", ByteRange(0, 1)),
        (b"bytes=3-", ByteRange(3, 10)),
        (b"bytes=9-", ByteRange(9, 10)),
        (b"bytes=2-4", ByteRange(2, 5)),
        (b"bytes=2-99999999999", ByteRange(2, 10)),
        (b"Bytes = 2-4 ", ByteRange(2, 5)),
        (b"bytes=-1", ByteRange(9, 10)),
        (b"bytes=-10", ByteRange(0, 10)),
        (b"bytes=-11", ByteRange(0, 10)),
        (b"bytes=10-", Unsatisfiable()),
        (b"bytes=10-20", Unsatisfiable()),
        (b"bytes=-0", Unsatisfiable()),
        # Ignored.
        (b"bytes=4-2", None),
        (b"bytes=-", None),
        (b"bytes=a-b", None),
        (b"bytes=0-1,3-4", None),
        (b"lines=0-1", None),
        (b"bytes=0-1234567890123456789", None),
        (b"", None),
    ],
)
def test_ranges_of_ten_bytes(wanted, part):
    assert requested_range(fields(range=wanted), 10, TAG) == part


def test_an_empty_response_has_no_parts():
    assert requested_range(fields(range=b"bytes=-5"), 0, TAG) is None
    assert requested_range(fields(range=b"bytes=0-"), 0, TAG) == Unsatisfiable()


def test_two_ranges_in_two_lines_are_ignored():
    assert requested_range({b"range": [b"bytes=0-1", b"bytes=2-3"]}, 10, TAG) is None


@pytest.mark.parametrize(
    ("if_range", "counts"),
    [(TAG, True), (b'W/"abc"', False), (b'"abcd"', False), (b"Tue, 01 Dec 2026 00:00:00 GMT", False), (b"", False)],
)
def test_if_range_compares_strongly(if_range, counts):
    found = requested_range(fields(range=b"bytes=1-", if_range=if_range), 10, TAG)
    assert (found is not None) == counts


def test_what_a_part_is_called():
    assert ByteRange(2, 5).content_range(10) == b"bytes 2-4/10"


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("if_none_match", TAG, True),
        ("if_none_match", b'"x", "abc"', True),
        ("if_none_match", b'W/"abc"', True),
        ("if_none_match", b"*", True),
        ("if_none_match", b'"x"', False),
        ("if_match", TAG, True),
        ("if_match", b'W/"abc"', False),
        ("if_match", b"", False),
    ],
)
def test_conditions(name, value, same):
    assert is_same(fields(**{name: value}), name.replace("_", "-").encode(), TAG) is same


def test_no_condition():
    assert is_same({}, b"if-match", TAG) is None
