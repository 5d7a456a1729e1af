"""What is kept with a record for those who look for it later: which request it was, and where it came from.

Two things are decided by it: who else may read the response (`body_digest`), and whether the request may be sent once
more under its key (`first_ms`). It lies in numbered fields. Each is a number (1 byte), its length (2 bytes) and its
value. A number that this version does not know is skipped: a later one may add some. No number is ever used for
anything else; 1 to 5 are in store/redis/layouts/packed.py.

The fields of an open key, 13 and 14, come before all others but 12. A complete record has them no more (`of_complete`).

On the way of a request these fields stay packed: each request brings some, and hardly any is ever read again. Whoever
looks for something unpacks them.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from oncegate.decision import api_recognizes, effective_state, may_resend
from oncegate.store.record import Claim, Record

_NOTE, _TRACE, _REQUEST_ID, _RULE, _UPSTREAM, _BODY, _REPLACED, _VALUES, _FIRST = 6, 7, 8, 9, 10, 11, 12, 13, 14
# That field, which is empty, and always the first: store/redis/lua/claim.lua writes it, too.
_IS_REPLACED = b"\x0c\x00\x00"
# What fields of an open key, and those behind that one, begin with at least. Others begin with less.
LEADING = b"\x0c"
NOTE_BYTES, REQUEST_ID_BYTES, _NAME_BYTES = 128, 128, 255
# Of all values together, as JSON. More are not kept at all: half of them would ask for another thing.
VALUES_BYTES = 1024
# Trace id, span id and flags of a traceparent (W3C Trace Context), without their hexadecimal digits.
TRACE_BYTES = 25
_FIELD = struct.Struct(">BH")
_TIME = struct.Struct(">Q")


# It is never changed once it is made: `frozen=True`, which would say so, doubles the price of making one.
@dataclass(slots=True, unsafe_hash=True)
class Kept:
    """What is kept with a record. Each part may be empty, and then takes no place.

    `note`: what the rule's `note` named in the request. `trace`: 25 bytes. `request_id`: of the original. `rule`: the
    name of the rule that it came under. `upstream`: where it went. `replaced`: its claim took the place of another
    record of the key. The store alone sets that. `body_digest`: of its body. `values`: what the rule's `reconcile` may
    ask with, by the names in its `keep`. `first_ms`: when the key was first claimed by a request that an API recognizes
    by its key, 0 for when the record was created; None for any other key.
    """

    note: str = ""
    trace: bytes = b""
    request_id: bytes = b""
    rule: str = ""
    upstream: str = ""
    # Not of what a request brings, so that it makes no difference between two.
    replaced: bool = field(default=False, compare=False)
    body_digest: bytes = b""
    values: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    first_ms: int | None = None


NOTHING = Kept()


def pack_fields(fields: Iterable[tuple[int, bytes]]) -> bytes:
    """Return numbered fields one behind the other."""
    return b"".join([_FIELD.pack(number, len(value)) + value for number, value in fields])


def unpack_fields(packed: bytes) -> dict[int, bytes]:
    """Return the fields by their numbers. Raises ValueError for bytes that are no fields."""
    fields: dict[int, bytes] = {}
    at, end = 0, len(packed)
    while at < end:
        if at + 3 > end:
            raise ValueError
        number, size = _FIELD.unpack_from(packed, at)
        at += 3 + size
        fields[number] = packed[at - size : at]
    if at != end:
        raise ValueError
    return fields


def pack_kept(kept: Kept) -> bytes:
    """Return the numbered fields. What is too long is cut."""
    texts = (_RULE, kept.rule, _NAME_BYTES), (_UPSTREAM, kept.upstream, _NAME_BYTES), (_NOTE, kept.note, NOTE_BYTES)
    fields = [(_REQUEST_ID, kept.request_id[:REQUEST_ID_BYTES]), (_TRACE, kept.trace), (_BODY, kept.body_digest)]
    fields += [(number, cut(text, most_bytes)) for number, text, most_bytes in texts]
    packed = pack_first(kept.first_ms) + pack_values(kept.values) + pack_fields([one for one in fields if one[1]])
    return as_replaced(packed) if kept.replaced else packed


def pack_request_id(request_id: bytes) -> bytes:
    """Return the field with the id of a request, of at most REQUEST_ID_BYTES; nothing for none."""
    return b"\x08\x00%c%b" % (len(request_id), request_id) if request_id else b""


def pack_note(note: str) -> bytes:
    """Return the field with a note, cut where it is too long; nothing for none."""
    return pack_fields([(_NOTE, cut(note, NOTE_BYTES))]) if note else b""


def pack_body_digest(digest: bytes) -> bytes:
    """Return the field with the digest of a body."""
    return pack_fields([(_BODY, digest)])


def pack_trace(trace: bytes) -> bytes:
    """Return the field with a trace."""
    return pack_fields([(_TRACE, trace)])


def pack_values(values: Sequence[tuple[str, str]]) -> bytes:
    """Return the field with what a probe may need; nothing for none, and for more than VALUES_BYTES. It comes first."""
    if not values:
        return b""
    # A value may have bytes that are no UTF-8, as a header field may.
    text = json.dumps(dict(values), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return pack_fields([(_VALUES, text)]) if len(text) <= VALUES_BYTES else b""


def pack_first(first_ms: int | None) -> bytes:
    """Return the field with the time of a key's first claim, as `Kept` has it; nothing for None. It comes first."""
    if first_ms is None:
        return b""
    return pack_fields([(_FIRST, _TIME.pack(first_ms) if first_ms else b"")])


def of_complete(packed: bytes) -> bytes:
    """Return the fields of a record that is complete: what was kept for its open key alone is no more.

    Nearly all records have nothing of that, and are told from the others by one byte.
    """
    if packed < LEADING:
        return packed
    at = begin = len(_IS_REPLACED) if was_replaced(packed) else 0
    while at + 3 <= len(packed) and packed[at] in (_VALUES, _FIRST):
        at += 3 + int.from_bytes(packed[at + 1 : at + 3], "big")
    return packed[:begin] + packed[at:]


def kept_of(fields: Mapping[int, bytes]) -> Kept:
    """Return what is kept in these numbered fields. What cannot stand in a header or in a traceparent is left out."""
    texts = [fields.get(number, b"").decode("utf-8", "replace") for number in (_NOTE, _RULE, _UPSTREAM)]
    trace, request_id = fields.get(_TRACE, b""), fields.get(_REQUEST_ID, b"")
    note, rule, upstream = texts
    trace = trace if len(trace) == TRACE_BYTES else b""
    replaced, body_digest = _REPLACED in fields, fields.get(_BODY, b"")
    open_key = _values_of(fields.get(_VALUES)), _first_of(fields.get(_FIRST))
    return Kept(note, trace, _fit(request_id), rule, upstream, replaced, body_digest, *open_key)


def _values_of(text: bytes | None) -> tuple[tuple[str, str], ...]:
    """Return the values in a field, none where it is damaged."""
    if text is None:
        return ()
    try:
        found = json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return ()
    is_whole = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return tuple(found.items()) if is_whole else ()


def _first_of(time: bytes | None) -> int | None:
    """Return the time in a field. A damaged one is long ago: then no API is relied on."""
    if not time:
        return None if time is None else 0
    return int(_TIME.unpack(time)[0]) if len(time) == _TIME.size else 1


def as_resent(packed: bytes, first_ms: int) -> bytes:
    """Return the fields of a claim whose request may have been sent before, under a claim of that time."""
    return pack_first(first_ms) + pack_fields([one for one in unpack_fields(packed).items() if one[0] != _FIRST])


def resending(claim: Claim, record: Record) -> Claim | None:
    """Return the claim by which a request is sent once more under the key of a record, None where it must not be.

    Its fields carry the time of the key's first claim along.
    """
    if not claim.resend_ms:
        return None
    kept = unpack_kept(record.kept)
    if kept.first_ms is None:
        return None
    first_ms = kept.first_ms or record.created_ms
    state = effective_state(record.state, record.lease_left_ms)
    recognized = api_recognizes(record.now_ms - first_ms, claim.resend_ms, claim.lease_ms)
    if not may_resend(state, record.fingerprint == claim.fingerprint, record.mode, recognized):
        return None
    return replace(claim, kept=as_resent(claim.kept, first_ms))


def first_claim_ms(claim: Claim) -> int:
    """Return when the key of a claim was first claimed, as far as is known (ms, the store's clock)."""
    return unpack_kept(claim.kept).first_ms or claim.created_ms


def is_resent(packed: bytes) -> bool:
    """Return whether fields say that the request may have been sent before, under another claim."""
    return _value(packed, _FIRST) != b""


def _fit(request_id: bytes) -> bytes:
    """Return a request id if it can stand in a header; else nothing."""
    return request_id if request_id.isascii() and request_id.decode().isprintable() else b""


def as_replaced(packed: bytes) -> bytes:
    """Return the fields of a claim that took the place of another record."""
    return packed if was_replaced(packed) else _IS_REPLACED + packed


def was_replaced(packed: bytes) -> bool:
    """Return whether fields say that their claim took the place of another record."""
    return packed.startswith(_IS_REPLACED)


def unpack_kept(packed: bytes | None) -> Kept:
    """Return what is kept in packed fields, nothing where these are damaged."""
    if not packed:
        return NOTHING
    try:
        return kept_of(unpack_fields(packed))
    except ValueError:
        return NOTHING


def original_id(packed: bytes) -> bytes:
    """Return the request id in packed fields, nothing where there is none that can stand in a header."""
    request_id = _value(packed, _REQUEST_ID)
    return request_id if request_id.isascii() and request_id.decode().isprintable() else b""


def rule_in(packed: bytes) -> bytes:
    """Return the name of the rule in packed fields."""
    return _value(packed, _RULE)


def _value(packed: bytes, number: int) -> bytes:
    """Return the value of one field, without a look at those behind it; nothing where it is not found."""
    at, end = 0, len(packed)
    while at + 3 <= end:
        found, size = _FIELD.unpack_from(packed, at)
        at += 3 + size
        if found == number:
            return packed[at - size : at] if at <= end else b""
    return b""


def cut(text: str, most_bytes: int) -> bytes:
    """Return the text in UTF-8, cut behind its last whole character within so many bytes."""
    encoded = text.encode("utf-8", "replace")
    return encoded if len(encoded) <= most_bytes else encoded[:most_bytes].decode("utf-8", "ignore").encode()
