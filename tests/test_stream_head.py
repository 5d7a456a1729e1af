"""The head of a running response: every one comes back as it was, and a damaged one is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.store.stream_head import MAX_HEAD_BYTES, StreamHead, _check, pack_head, unpack_head
from tests.probes import damaged

HEAD = StreamHead(200, b"OK", b"Content-Type: text/event-stream\r\nX: \xe4\r\n", None, False, True, 7)


@given(
    st.builds(
        StreamHead,
        status=st.integers(100, 999),
        reason=st.binary(max_size=40),
        block=st.binary(max_size=400),
        length=st.none() | st.integers(0, 1 << 60),
        stated_length=st.booleans(),
        close_delimited=st.booleans(),
        age_s=st.integers(0, 1 << 31),
    )
)
def test_a_head_comes_back(head: StreamHead) -> None:
    """All that it says is the same, and a length of 0 is not the same as none."""
    assert unpack_head(pack_head(head)) == head


def test_an_age_that_is_too_large_is_cut() -> None:
    """An upstream may send any number of digits."""
    found = unpack_head(pack_head(HEAD._replace(age_s=1 << 40)))
    assert found is not None
    assert found.age_s == (1 << 32) - 1


def test_a_head_that_is_too_large_is_none() -> None:
    """Its followers wait for the end of the response. One byte less, and it is one."""
    room = MAX_HEAD_BYTES - len(pack_head(HEAD._replace(block=b"")))
    whole = HEAD._replace(block=b"x" * room)
    assert unpack_head(pack_head(whole)) == whole
    assert pack_head(HEAD._replace(block=b"x" * (room + 1))) == b""


def test_a_damaged_head_is_none() -> None:
    """Whichever byte was changed, wherever it was cut, and whatever is behind it."""
    packed = pack_head(HEAD)
    assert [wrong for wrong in damaged(packed) if unpack_head(wrong) is not None] == []
    assert unpack_head(packed + b"x") is None


@pytest.mark.parametrize("version", [0, 2, 255])
def test_a_head_of_another_version_is_none(version: int) -> None:
    """A proxy does not guess what a newer one has written, also where its check is right."""
    whole = bytes([version]) + pack_head(HEAD)[1:-8]
    assert unpack_head(whole + _check(whole)) is None
