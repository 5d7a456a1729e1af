"""What a record holds, and its bytes: a complete one is packed into one value and checks itself.

The first 65 bytes of `meta` have a fixed place because the scripts read them:
version (1), token (16), fence (16 digits), created (16 digits, ms), digest of the answer (16).
"""

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from oncegate.decision import State
from oncegate.keys.digests import Scope
from oncegate.messages.response_head import response_digest

VERSION = b"\x01"
TOKEN_BYTES = 16
PREFIX_BYTES = 10  # of a token: whose it is; the rest counts
_FIXED = struct.Struct(">c16s16s16s16s16s16sBHHIIQQII")
_CHECK_BYTES = 8
KEPT, CLOSE_DELIMITED, STATED_LENGTH = 1, 2, 4
_COMPLETE = State.COMPLETE


class ClaimRequest(NamedTuple):
    """What `Store.claim` asks for."""

    key: bytes  # digest
    scope: Scope
    fingerprint: bytes
    mode: bytes  # of the policy: hold or retry
    lease_ms: int
    retention_ms: int
    window_ms: int = 0  # of a derived key: the age past which a complete record no longer counts; 0 for any other key


class Claim(NamedTuple):
    """The right to execute one key. Only the store makes one; without it nothing is forwarded or settled."""

    key: bytes  # digest
    token: bytes
    fence: bytes
    mode: bytes
    fingerprint: bytes
    self_check: bytes
    created_ms: int  # the store's clock
    lease_ms: int
    retention_ms: int


class StoredResponse(NamedTuple):
    """A complete answer. `block` holds its end-to-end fields as they are written on a replay."""

    status: int
    reason: bytes
    block: bytes
    digest: bytes
    chunks: int
    size: int  # bytes of the body
    kept: bool
    close_delimited: bool
    stated_length: bool  # `block` has the upstream's own Content-Length
    completed_ms: int  # the store's clock
    took_ms: int  # of the upstream
    age_s: int  # that it had when it came


class Record(NamedTuple):
    """What stands in the store for a key that is not ours; `now_ms` is the store's clock when it was read."""

    state: State
    token: bytes
    fingerprint: bytes
    created_ms: int
    now_ms: int
    lease_left_ms: int = 0
    answer: StoredResponse | None = None
    body: bytes | None = None  # of a small answer
    mode: bytes = b""  # under which a running one was claimed


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A record that fails its own checks: never forwarded, never replayed."""

    detail: str


def self_check(key: bytes, tenant: bytes, token: bytes, mode: bytes, fingerprint: bytes) -> bytes:
    """Return what a running record says of itself: its tenant, and a digest over what must not change."""
    return tenant + blake2b(b"".join((key, tenant, token, mode, fingerprint)), digest_size=16).digest()


def _check(key: bytes, packed: bytes) -> bytes:
    return blake2b(packed, key=key, digest_size=_CHECK_BYTES).digest()


def pack(claim: Claim, answer: StoredResponse) -> bytes:
    """Return `meta` of a complete record."""
    key, token, fence, _, fingerprint, described, created_ms, _, _ = claim
    status, reason, block, digest, chunks, size, kept, close_delimited, stated_length, completed_ms, took_ms, age_s = (
        answer
    )
    flags = (kept and KEPT) | (close_delimited and CLOSE_DELIMITED) | (stated_length and STATED_LENGTH)
    fixed = _FIXED.pack(
        VERSION,
        token,
        fence.rjust(16, b"0"),
        b"%016d" % created_ms,
        digest,
        fingerprint,
        described[:16],
        flags,
        len(reason),
        status,
        chunks,
        took_ms,
        size,
        completed_ms,
        age_s,
        len(block),
    )
    packed = b"".join((fixed, reason, block))
    return packed + _check(key, packed)


def unpack(key: bytes, tenant: bytes, meta: bytes, body: bytes | None, now_ms: int) -> Record | Corrupt:
    """Return the complete record in `meta`, checked against the key and tenant it was asked for."""
    packed = meta[:-_CHECK_BYTES]
    if len(packed) < _FIXED.size or meta[:1] != VERSION:
        return Corrupt("unknown layout")
    if _check(key, packed) != meta[-_CHECK_BYTES:]:
        return Corrupt("the record does not match its check")
    (
        _, token, _, created, digest, fingerprint, owner,
        flags, reason_size, status, chunks, took_ms, size, completed_ms, age_s, block_size,
    ) = _FIXED.unpack_from(packed)  # fmt: skip
    reason_end = _FIXED.size + reason_size
    if owner != tenant or reason_end + block_size != len(packed):
        return Corrupt("the record describes another key")
    reason, block = packed[_FIXED.size : reason_end], packed[reason_end:]
    kept, close_delimited, stated = flags & KEPT != 0, flags & CLOSE_DELIMITED != 0, flags & STATED_LENGTH != 0
    answer = StoredResponse(
        status=status,
        reason=reason,
        block=block,
        digest=digest,
        chunks=chunks,
        size=size,
        kept=kept,
        close_delimited=close_delimited,
        stated_length=stated,
        completed_ms=completed_ms,
        took_ms=took_ms,
        age_s=age_s,
    )
    return Record(_COMPLETE, token, fingerprint, int(created), now_ms, answer=answer, body=body)


def tenant_of(meta: bytes) -> bytes:
    """Return whose complete record this is, by its own word."""
    return meta[81:97]


def intact(answer: StoredResponse, body: bytes) -> bool:
    """Return whether a whole body is the one that was stored."""
    if len(body) != answer.size:
        return False
    status, reason, block, expected, *_ = answer
    digest = response_digest(status, reason, block)
    digest.update(body)
    return digest.digest() == expected


def running(key: bytes, tenant: bytes, fields: list[bytes | int | None], now_ms: int) -> Record | Corrupt:
    """Return the record of a key in flight or unknown, from claim's reply after the time."""
    state, token, _fence, mode, fingerprint, self_described, lease_left_ms, created = fields
    try:
        found = State(bytes(state or b"").decode())
        created_ms = int(created or b"")
    except ValueError:
        return Corrupt("unknown state")
    if found is State.COMPLETE:
        return Corrupt("a complete record without an answer")
    if not (isinstance(token, bytes) and isinstance(mode, bytes) and isinstance(fingerprint, bytes)):
        return Corrupt("the record is not whole")
    if self_described != self_check(key, tenant, token, mode, fingerprint):
        return Corrupt("the record does not match its check")
    left = lease_left_ms if isinstance(lease_left_ms, int) else 0
    return Record(found, token, fingerprint, created_ms, now_ms, lease_left_ms=left, mode=mode)
