"""The packed layout: a record as one string, with less work and memory for the server than a hash.

A record is packed while it is in flight or unknown and has no chunks, and complete if its body is one small piece.
Every other record is a hash (see store/record.py), and so is each one while a proxy on the store cannot read strings.

The first byte is the version, which also says what the record is. The token follows, then by version:

- OPEN, in flight or unknown: fence (16 digits), created (13 digits, ms), leased (13 digits, ms: when the lease began),
  the length of the lease (10 digits, ms), stage, state, mode (a letter each), self check (32 bytes), fingerprint (16),
  numbered fields. `claim.lua` writes what is before the length of the lease, and `renew.lua` from `leased` to `stage`.
- COMPLETE: `_COMPLETE`, the reason phrase, the block of header fields, numbered fields, a check of 8 bytes, the body.
  `length` is where the body begins. The check is over `_COMPLETE` and the numbered fields. Reason, block and body are
  under the digest of the response, which `_COMPLETE` has and each replay compares. UNTIL is the same with the end of
  the retention behind the body (13 digits, ms), of a record with a tombstone. `settle.lua` writes that.
- DROPPED: the tombstone, as in a hash.

Numbered fields are optional, and written as in store/kept.py, which has those from 6 on; 2 bytes before them, or in the
fixed part, have the length of all. `append.lua`, which makes a claim a hash with its first chunk, keeps them in the
field `more`. Any hash has there what is kept with its record.
"""

import struct
from dataclasses import replace
from hashlib import blake2b
from typing import Final

from oncegate.decision import CANCELLED, HOLD, RETRY, State
from oncegate.store.kept import LEADING, of_complete, pack_fields, unpack_fields
from oncegate.store.record import (
    BODY_STORED,
    CLOSE_DELIMITED,
    DROPPED,
    RECONCILED,
    STATED_LENGTH,
    Claim,
    Corrupt,
    Record,
    StoredResponse,
    pack,
    running,
    unpack_expired,
)
from oncegate.store.stages import CLAIMED, RESPONSE_BEGUN, SENT
from oncegate.store.stages import DROPPED as DROPPED_STAGE

OPEN, COMPLETE, UNTIL = b"\x04", b"\x05", b"\x06"
# The largest body that is packed. It comes with the reply to a claim, among the replies to other requests.
LARGEST_BODY = 65536

# Numbers of optional fields. They are never used for anything else.
WHY, STATUS, AGE, REQUEST_ID, TRAILERS = 1, 2, 3, 4, 5
_AGE_BEGINS = bytes((AGE, 0))

# Version, token, fence, created, leased, length of the lease, stage, state, mode, self check, fingerprint.
_OPEN = struct.Struct(">c16s16s13s13s10sccc32s16s")
# Version, token, digest of the response, fence, created; fingerprint, tenant; length of all before the body, flags,
# status, length of the reason, ms until the upstream had responded, ms from created to completed, length of the fields.
_COMPLETE = struct.Struct(">c16s16sQQ16s16sIBHHIiH")
_SIZE = struct.Struct(">H")
_CHECK_BYTES, UNTIL_BYTES, _LARGEST_FIELDS = 8, 13, 0xFFFF
# As in store/record.py.
_empty_digest = blake2b(digest_size=_CHECK_BYTES).copy
_NO_FIELDS = _SIZE.pack(0)

# Bound once for the request path, as in `decision`.
_IS_COMPLETE: Final = State.COMPLETE
_MODES = {HOLD: b"h", RETRY: b"r", CANCELLED: b"c"}
_MODE_OF = {letter: mode for mode, letter in _MODES.items()}
_STATES = {b"i": State.IN_FLIGHT.value.encode(), b"u": State.UNKNOWN.value.encode()}
_STAGES = {stage.wire[:1]: stage.wire for stage in (CLAIMED, SENT, RESPONSE_BEGUN, DROPPED_STAGE)}
# The stage of a claim that was never renewed, and the mode of a claim that has none.
_NONE = b"-"

# Of a claim's terms: all of its record from the length of the lease on.
TERMS_BYTES = 63


def terms_begin(mode: bytes, lease_ms: int) -> bytes:
    """Return the first 13 bytes of a claim's terms. `terms_end` has the others."""
    return b"%010d-i%s" % (lease_ms, _MODES.get(mode, _NONE))


# Records to bytes ...


def pack_unknown(claim: Claim, reason: str, status: int) -> bytes:
    """Return the record of a claim whose outcome is unknown. `status`: of a response that came, 0 for none."""
    fields = {WHY: reason.encode("utf-8", "replace")[: _LARGEST_FIELDS // 2]}
    if status:
        fields[STATUS] = b"%d" % status
    packed = claim.kept + pack_fields(fields.items())
    begin = b"%s%s%s%013d%013d" % (OPEN, claim.token, claim.fence.rjust(16, b"0"), claim.created_ms, 0)
    end = (b"%010d-u" % claim.lease_ms, _MODES.get(claim.mode, _NONE), claim.self_check, claim.fingerprint)
    return b"".join((begin, *end, _SIZE.pack(len(packed)), packed))


def pack_complete(claim: Claim, response: StoredResponse, body: bytes) -> bytes | None:
    """Return a complete record up to the end of its body, None for one that has to be a hash."""
    reason, block = response.reason, response.block
    packed = claim.kept
    if packed >= LEADING:
        packed = of_complete(packed)
    if response.age_s or response.request_id or response.trailers:
        more = {AGE: b"%d" % response.age_s, REQUEST_ID: response.request_id, TRAILERS: response.trailers}
        if len(response.request_id) + len(response.trailers) > _LARGEST_FIELDS // 2:
            return None
        packed += pack_fields(more.items())
    flags = BODY_STORED | (response.close_delimited and CLOSE_DELIMITED)
    flags |= response.stated_length and STATED_LENGTH
    if response.reconciled:
        flags |= RECONCILED
    lasted_ms = response.completed_ms - claim.created_ms
    if len(body) > LARGEST_BODY or not -(1 << 31) <= lasted_ms < 1 << 31:
        return None
    fixed = _COMPLETE.pack(
        UNTIL if claim.tombstone_ms else COMPLETE,
        claim.token,
        response.digest,
        int(claim.fence),
        claim.created_ms,
        claim.fingerprint,
        claim.self_check[:16],
        _COMPLETE.size + len(reason) + len(block) + len(packed) + _CHECK_BYTES,
        flags,
        response.status,
        len(reason),
        response.took_ms,
        lasted_ms,
        len(packed),
    )
    return b"".join((fixed, reason, block, packed, _check(claim.key, fixed, packed), body))


def _check(key: bytes, fixed: bytes, packed: bytes) -> bytes:
    """Return the check of a complete record. The key is hashed before the rest: as blake2b's key it would cost more."""
    digest = _empty_digest()
    digest.update(key + fixed + packed)
    return digest.digest()


# ... and back ...


def unpack_packed(key: bytes, tenant: bytes, value: bytes, now_ms: int) -> Record | Corrupt:
    """Return the record in `value`, checked against the key and tenant that it was read for."""
    version = value[:1]
    if version in (COMPLETE, UNTIL):
        found = _unpack_complete(key, value)
        if isinstance(found, Corrupt):
            return found
        _fence, owner, until_ms, record = found
        if owner != tenant:
            return Corrupt("the record describes another key")
        record.now_ms = now_ms
        if until_ms and until_ms <= now_ms and record.response is not None:
            return replace(
                record, state=State.EXPIRED, status=record.response.status, response=None, body=None, kept=b""
            )
        return record
    if version == DROPPED:
        return unpack_expired(key, tenant, value, now_ms)
    try:
        fields = _open_fields(value)
        left_ms = int(fields["lease"]) - now_ms
    except (KeyError, ValueError, struct.error):
        return Corrupt("unknown layout")
    names = ("state", "token", "fence", "mode", "fingerprint", "self")
    described = [
        *(fields[name] for name in names),
        left_ms,
        fields["created"],
        fields.get("status"),
        fields.get("more"),
    ]
    return running(key, tenant, described, now_ms)


def hash_fields(key: bytes, value: bytes) -> dict[str, bytes] | Corrupt:
    """Return the fields that the same record has as a hash."""
    version = value[:1]
    if version == DROPPED:
        return {"meta": value}
    if version in (COMPLETE, UNTIL):
        found = _unpack_complete(key, value)
        return found if isinstance(found, Corrupt) else _complete_fields(key, *found)
    try:
        return _open_fields(value)
    except (KeyError, ValueError, struct.error):
        return Corrupt("unknown layout")


def _unpack_complete(key: bytes, value: bytes) -> tuple[int, bytes, int, Record] | Corrupt:
    """Return fence, tenant, the end of the retention (0 for none) and the record, without the time."""
    if len(value) < _COMPLETE.size + _CHECK_BYTES + UNTIL_BYTES * (value[:1] == UNTIL):
        return Corrupt("unknown layout")
    (
        version, token, digest, fence, created_ms, fingerprint, tenant,
        length, flags, status, reason_size, took_ms, lasted_ms, fields_size,
    ) = _COMPLETE.unpack_from(value)  # fmt: skip
    reason_end, fields_end = _COMPLETE.size + reason_size, length - _CHECK_BYTES
    block_end = fields_end - fields_size
    packed, body, until_ms = value[block_end:fields_end], value[length:], 0
    if _check(key, value[: _COMPLETE.size], packed) != value[fields_end:length]:
        return Corrupt("the record does not match its check")
    if version == UNTIL:
        body, digits = body[:-UNTIL_BYTES], body[-UNTIL_BYTES:]
        until_ms = int(digits) if digits.isdigit() else 0
    age_s, request_id, trailers, kept = 0, b"", b"", packed
    # Nearly all have none of these: then nobody has to look through the fields. With each of them there is AGE.
    if packed.find(_AGE_BEGINS) >= 0:
        try:
            fields = unpack_fields(packed)
            if AGE in fields or REQUEST_ID in fields or TRAILERS in fields:
                age_s, request_id, trailers = (
                    int(fields.pop(AGE, 0)),
                    fields.pop(REQUEST_ID, b""),
                    fields.pop(TRAILERS, b""),
                )
                kept = pack_fields(fields.items())
        except ValueError:
            return Corrupt("unknown layout")
    size = len(body)
    response = StoredResponse(
        # Positions, not names: arguments by name cost twice as much here (Python 3.11, measured).
        status, value[_COMPLETE.size : reason_end], value[reason_end:block_end], digest, 1 if size else 0, size,
        flags & BODY_STORED != 0, flags & CLOSE_DELIMITED != 0, flags & STATED_LENGTH != 0,
        created_ms + lasted_ms, took_ms, age_s, request_id, trailers, flags & RECONCILED != 0,
    )  # fmt: skip
    record = Record(_IS_COMPLETE, token, fingerprint, created_ms, 0, 0, response, body, b"", 0, kept)
    return fence, tenant, until_ms, record


def _complete_fields(key: bytes, fence: int, tenant: bytes, until_ms: int, record: Record) -> dict[str, bytes]:
    assert record.response is not None
    claim = Claim(
        key, record.token, b"%016d" % fence, b"", record.fingerprint, tenant + bytes(16), record.created_ms, 0, 0, 0
    )
    fields = {"meta": pack(claim, record.response)}
    if record.body:
        fields["b0"] = record.body
    if until_ms:
        fields["until"] = b"%d" % until_ms
    if record.kept:
        fields["more"] = record.kept
    return fields


def _open_fields(value: bytes) -> dict[str, bytes]:
    """Return the fields of an open record. Raises KeyError, ValueError or struct.error for anything else."""
    version, token, fence, created, leased, lease_ms, stage, state, mode, check, fingerprint = _OPEN.unpack_from(value)
    (fields_size,) = _SIZE.unpack_from(value, _OPEN.size)
    at = _OPEN.size + _SIZE.size
    if version != OPEN or len(value) != at + fields_size:
        raise ValueError
    unknown = state == b"u"
    fields = {
        "state": _STATES[state],
        "token": token,
        "fence": fence,
        "mode": _MODE_OF.get(mode, b""),
        "fingerprint": fingerprint,
        "self": check,
        "lease": b"0" if unknown else b"%d" % (_number(leased) + _number(lease_ms)),
        "created": b"%d" % _number(created),
    }
    if not unknown:
        fields["lease_ms"] = b"%d" % _number(lease_ms)
    if stage in _STAGES:
        fields["stage"] = _STAGES[stage]
    return fields | numbered(value[at:])


def numbered(packed: bytes) -> dict[str, bytes]:
    """Return the numbered fields of an open record, by the names that they have in a hash. Raises ValueError.

    A hash that was packed before its first chunk came has all of them in `more`.
    """
    fields = unpack_fields(packed)
    named = {"why": fields.pop(WHY, None), "status": fields.pop(STATUS, None), "more": pack_fields(fields.items())}
    return {name: value for name, value in named.items() if value}


def _number(digits: bytes) -> int:
    if not digits.isdigit():
        raise ValueError
    return int(digits)
