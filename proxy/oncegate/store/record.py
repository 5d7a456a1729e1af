"""What a record holds, and its bytes.

In Redis a record is a hash, or one string (store/redis/layouts/packed.py). While a hash is in flight or unknown, its
fields are separate. A complete one has them packed into `meta`, beside the chunks of the body (`b0`, `b1` and so on).

`meta` is a fixed part, the reason phrase, the block of header fields, the id of a JSON-RPC request, any trailers, and a
check of 8 bytes over all of them. The scripts read the first 65 bytes of the fixed part, so their places never change:
version (1 byte), token (16), fence (16 digits), time of creation (16 digits, ms), digest of the response (16).

A complete record with a tombstone has the end of its retention in `until`. After that time it is expired, and its
tombstone is what counts: a shorter `meta` of 75 bytes, whose first 49 are the same, and no body.
"""

import struct
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import blake2b

from oncegate.decision import CANCELLED, State
from oncegate.keys.digests import Scope
from oncegate.messages.response_head import response_digest
from oncegate.values import Value

# The second has trailers behind the header fields. An older oncegate refuses it as an unknown layout.
VERSION, WITH_TRAILERS = b"\x01", b"\x02"
# Of a tombstone.
DROPPED = b"\x03"
TOKEN_BYTES = 16
# The first bytes of a token name the proxy that made it; the others count.
PREFIX_BYTES = 10
_FIXED = struct.Struct(">c16s16s16s16s16s16sBHHIIQQII")
# Version, token, fence, creation, fingerprint, status.
_DROPPED = struct.Struct(">c16s16s16s16sH")
_CHECK_BYTES = 8
# Flags of the fixed part.
BODY_STORED, CLOSE_DELIMITED, STATED_LENGTH, HAS_REQUEST_ID, RECONCILED = 1, 2, 4, 8, 16


# Every request makes some of these. They are never changed once they are made, but for what a new claim gets with the
# store's reply.


class ClaimRequest(Value):
    """What `Store.claim` asks for. Times in milliseconds."""

    # Digest.
    key: bytes
    scope: Scope
    # Digest of the request.
    fingerprint: bytes
    # Of the policy: hold or retry.
    mode: bytes
    lease_ms: int
    # Of a complete response.
    retention_ms: int
    # Of a key that is in flight or unknown. Never shorter than that of a complete one.
    unknown_retention_ms: int
    # Of a derived key: the age from which a complete record no longer counts, or ANY_AGE. 0 for any other key.
    window_ms: int = 0
    # Of a complete record: how long its key is refused after the retention. 0 for a derived key.
    tombstone_ms: int = 0
    # What is kept with the record, packed (store/kept.py). The audit trail has its rule.
    kept: bytes = b""
    # How long after its first claim the API recognizes the key, so that an unknown one may be sent once more. 0: never.
    resend_ms: int = 0


class Claim(Value):
    """The right to execute one key. Only the store makes one, and without it nothing is forwarded or settled."""

    # Digest.
    key: bytes
    # Of this claim alone.
    token: bytes
    # A number in digits that grows with every claim of the key.
    fence: bytes
    # Hold or retry.
    mode: bytes
    fingerprint: bytes
    self_check: bytes
    # By the store's clock.
    created_ms: int
    lease_ms: int
    retention_ms: int
    unknown_retention_ms: int
    tombstone_ms: int = 0
    kept: bytes = b""
    # As in ClaimRequest.
    resend_ms: int = 0
    # What was kept with the record whose place it took; empty for none. It makes no other claim of it.
    kept_before: bytes = b""


class StoredResponse(Value):
    """A complete response."""

    status: int
    reason: bytes
    # The end-to-end header fields, as a replay writes them.
    block: bytes
    # Of status, reason, block, body and trailers.
    digest: bytes
    chunks: int
    # Of the body, in bytes.
    size: int
    body_stored: bool
    # The upstream ended the body by closing the connection (RFC 9112, section 6.3).
    close_delimited: bool
    # `block` has the upstream's own Content-Length.
    stated_length: bool
    # By the store's clock.
    completed_ms: int
    # Until the upstream had responded.
    took_ms: int
    # The Age that the upstream sent (RFC 9111, section 5.1).
    age_s: int
    # Of the JSON-RPC request that was executed, as it was written; empty for any other request.
    request_id: bytes = b""
    # As they are written behind the body, each line ended.
    trailers: bytes = b""
    # What the API said when it was asked what became of the request.
    reconciled: bool = False


class Record(Value):
    """The record of a key that another claim has, or had."""

    state: State
    token: bytes
    fingerprint: bytes
    created_ms: int
    # The store's clock when the record was read.
    now_ms: int
    lease_left_ms: int = 0
    response: StoredResponse | None = None
    # The body of a small response, which comes with the record.
    body: bytes | None = None
    # The mode of a claim that is not complete.
    mode: bytes = b""
    # Of the response to an expired one, or of one that came and does not tell the outcome; 0 for none.
    status: int = 0
    # Of its original, packed. Nothing of an expired one.
    kept: bytes = b""


class ViewState(Enum):
    """The state of a record as operators see it: a State, or one of two that no request meets."""

    UNKNOWN = "unknown"
    IN_FLIGHT = "in_flight"
    COMPLETE = "complete"
    EXPIRED = "expired"
    # An operator released the key.
    RELEASED = "released"
    # The record fails its own checks.
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A record that fails its own checks. It is never forwarded and never replayed."""

    reason: str


# A copy of an empty digest costs a fifth less than a new one (Python 3.11, counted).
_empty_digest = blake2b(digest_size=16).copy


def self_check(key: bytes, tenant: bytes, token: bytes, mode: bytes, fingerprint: bytes) -> bytes:
    """Return the self check of a record that is not complete: its tenant, and a digest over what must not change."""
    digest = _empty_digest()
    digest.update(b"".join((key, tenant, token, mode, fingerprint)))
    return tenant + digest.digest()


def cancelled_claim(claim: Claim) -> Claim:
    """Return a claim in the mode `cancelled`, for the record that its cancellation leaves."""
    check = self_check(claim.key, claim.self_check[:16], claim.token, CANCELLED, claim.fingerprint)
    return replace(claim, mode=CANCELLED, self_check=check)


def _check(key: bytes, packed: bytes) -> bytes:
    return blake2b(packed, key=key, digest_size=_CHECK_BYTES).digest()


def pack(claim: Claim, response: StoredResponse) -> bytes:
    """Return `meta` of a complete record."""
    reason, block, trailers = response.reason, response.block, response.trailers
    flags = response.body_stored and BODY_STORED
    flags |= (response.close_delimited and CLOSE_DELIMITED) | (response.stated_length and STATED_LENGTH)
    flags |= response.reconciled and RECONCILED
    if response.request_id:
        flags |= HAS_REQUEST_ID
    fixed = _FIXED.pack(
        WITH_TRAILERS if trailers else VERSION,
        claim.token,
        claim.fence.rjust(16, b"0"),
        b"%016d" % claim.created_ms,
        response.digest,
        claim.fingerprint,
        claim.self_check[:16],
        flags,
        len(reason),
        response.status,
        response.chunks,
        response.took_ms,
        response.size,
        response.completed_ms,
        response.age_s,
        len(block),
    )
    tail = b"%s\r\n%s" % (response.request_id, trailers) if trailers else response.request_id
    packed = b"".join((fixed, reason, block, tail))
    return packed + _check(claim.key, packed)


def unpack(key: bytes, tenant: bytes, meta: bytes, body: bytes | None, now_ms: int) -> Record | Corrupt:
    """Return the complete record in `meta`, checked against the key and tenant that it was read for."""
    packed = meta[:-_CHECK_BYTES]
    version = meta[:1]
    if len(packed) < _FIXED.size or version not in (VERSION, WITH_TRAILERS):
        return Corrupt("unknown layout")
    if _check(key, packed) != meta[-_CHECK_BYTES:]:
        return Corrupt("the record does not match its check")
    (
        _, token, _, created, digest, fingerprint, owner,
        flags, reason_size, status, chunks, took_ms, size, completed_ms, age_s, block_size,
    ) = _FIXED.unpack_from(packed)  # fmt: skip
    reason_end = _FIXED.size + reason_size
    block_end = reason_end + block_size
    request_id, trailers = packed[block_end:], b""
    if version == WITH_TRAILERS:
        # The id is JSON on one line, or empty.
        request_id, _, trailers = request_id.partition(b"\r\n")
    is_whole = block_end <= len(packed) and bool(request_id) == (flags & HAS_REQUEST_ID != 0)
    if owner != tenant or not is_whole or bool(trailers) != (version == WITH_TRAILERS):
        return Corrupt("the record describes another key")
    reason, block = packed[_FIXED.size : reason_end], packed[reason_end:block_end]
    body_stored, close_delimited = flags & BODY_STORED != 0, flags & CLOSE_DELIMITED != 0
    response = StoredResponse(
        # Positions, not names: arguments by name cost twice as much here (Python 3.11, measured).
        status, reason, block, digest, chunks, size, body_stored, close_delimited, flags & STATED_LENGTH != 0,
        completed_ms, took_ms, age_s, request_id, trailers, flags & RECONCILED != 0,
    )  # fmt: skip
    return Record(State.COMPLETE, token, fingerprint, int(created), now_ms, 0, response, body)


def pack_tombstone(key: bytes, meta: bytes) -> bytes:
    """Return `meta` of the tombstone that a complete record with this `meta` leaves: 75 bytes."""
    # Token, fence and creation; fingerprint; status.
    packed = DROPPED + meta[1:49] + meta[65:81] + meta[100:102]
    return packed + _check(key, packed)


def unpack_expired(key: bytes, tenant: bytes, meta: bytes, now_ms: int) -> Record | Corrupt:
    """Return the expired record in `meta`, checked against the key that it was read for.

    It says the same before its response is dropped and after that.
    """
    if meta[:1] != DROPPED:
        found = unpack(key, tenant, meta, None, now_ms)
        if isinstance(found, Record) and found.response is not None:
            return replace(found, state=State.EXPIRED, status=found.response.status, response=None)
        return found
    packed = meta[:-_CHECK_BYTES]
    if len(packed) != _DROPPED.size:
        return Corrupt("unknown layout")
    # The digest of the key is one over the tenant, too.
    if _check(key, packed) != meta[-_CHECK_BYTES:]:
        return Corrupt("the record does not match its check")
    _, token, _, created, fingerprint, status = _DROPPED.unpack(packed)
    return Record(State.EXPIRED, token, fingerprint, int(created), now_ms, status=status)


def tenant_of(meta: bytes) -> bytes:
    """Return the tenant that a complete record names, empty for a tombstone."""
    return b"" if meta[:1] == DROPPED else meta[81:97]


def intact(response: StoredResponse, body: bytes) -> bool:
    """Return whether a complete body is the one that was stored."""
    if len(body) != response.size:
        return False
    digest = response_digest(response.status, response.reason, response.block)
    digest.update(body + response.trailers if response.trailers else body)
    return digest.digest() == response.digest


def read_status(text: bytes) -> int:
    """Return the status in an unknown record, 0 for anything else: no check covers this field."""
    return int(text) if len(text) == 3 and text.isdigit() else 0


def running(key: bytes, tenant: bytes, fields: list[bytes | int | None], now_ms: int) -> Record | Corrupt:
    """Return the record of a key in flight or unknown. `fields`: the reply to `claim`, without the time."""
    state, token, _fence, mode, fingerprint, stored_check, lease_left_ms, created, status, more = fields
    try:
        stored_state = State(bytes(state or b"").decode())
        created_ms = int(created or b"")
    except ValueError:
        return Corrupt("unknown state")
    if stored_state is State.COMPLETE:
        return Corrupt("a complete record without an answer")
    if not (isinstance(token, bytes) and isinstance(mode, bytes) and isinstance(fingerprint, bytes)):
        return Corrupt("the record is not whole")
    if stored_check != self_check(key, tenant, token, mode, fingerprint):
        return Corrupt("the record does not match its check")
    left = lease_left_ms if isinstance(lease_left_ms, int) else 0
    came = read_status(status) if isinstance(status, bytes) else 0
    kept = more if isinstance(more, bytes) else b""
    return Record(stored_state, token, fingerprint, created_ms, now_ms, left, mode=mode, status=came, kept=kept)
