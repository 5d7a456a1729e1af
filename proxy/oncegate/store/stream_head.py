"""The head of a response that is still running, as it lies in the store for those who follow the response.

A record gets it with the first chunk, and loses it when it is complete: `meta` has the same then. Version (1 byte),
flags, status, length of the reason, age, length of the body, length of the block; reason; block; a check of 8 bytes
over all of them. Numbers are big-endian.
"""

import struct
from hashlib import blake2b
from typing import NamedTuple

_VERSION = 1
_FIXED = struct.Struct(">BBHHIQI")
_CHECK_BYTES = 8
# Flags of the fixed part.
_STATED_LENGTH, _CLOSE_DELIMITED, _HAS_LENGTH = 1, 2, 4
_LARGEST_NUMBER = 0xFFFFFFFF
# Of a packed head. Whoever follows a response with a larger one waits for its end.
MAX_HEAD_BYTES = 65536


class StreamHead(NamedTuple):
    """What a follower needs to begin its response. `reason` and `block` as in StoredResponse.

    `length`: of the body in bytes, None where it is not known yet.
    """

    status: int
    reason: bytes
    block: bytes
    length: int | None
    stated_length: bool
    close_delimited: bool
    age_s: int


def pack_head(head: StreamHead) -> bytes:
    """Return the bytes of a head, empty for one that is too large."""
    reason, block, length = head.reason, head.block, head.length
    if _FIXED.size + len(reason) + len(block) + _CHECK_BYTES > MAX_HEAD_BYTES:
        return b""
    flags = (head.stated_length and _STATED_LENGTH) | (head.close_delimited and _CLOSE_DELIMITED)
    flags |= _HAS_LENGTH if length is not None else 0
    age_s = min(head.age_s, _LARGEST_NUMBER)
    fixed = _FIXED.pack(_VERSION, flags, head.status, len(reason), age_s, length or 0, len(block))
    packed = b"".join((fixed, reason, block))
    return packed + _check(packed)


def unpack_head(packed: bytes) -> StreamHead | None:
    """Return the head in these bytes, None if they are damaged or of a layout that is not known."""
    whole = packed[:-_CHECK_BYTES]
    if len(whole) < _FIXED.size or whole[0] != _VERSION or _check(whole) != packed[-_CHECK_BYTES:]:
        return None
    _, flags, status, reason_size, age_s, length, block_size = _FIXED.unpack_from(whole)
    reason_end = _FIXED.size + reason_size
    if len(whole) != reason_end + block_size:
        return None
    return StreamHead(
        status,
        whole[_FIXED.size : reason_end],
        whole[reason_end:],
        length if flags & _HAS_LENGTH else None,
        flags & _STATED_LENGTH != 0,
        flags & _CLOSE_DELIMITED != 0,
        age_s,
    )


def _check(packed: bytes) -> bytes:
    return blake2b(packed, digest_size=_CHECK_BYTES).digest()
