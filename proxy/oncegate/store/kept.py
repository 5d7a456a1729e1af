"""What is kept with a record for those who look for it later: which request it was, and where it came from.

Nothing is decided by it but who else may read the response (`body_digest`). It lies in numbered fields. Each is a
number (1 byte), its length (2 bytes) and its value. A number that this version does not know is skipped: a later one
may add some. No number is ever used for anything else; 1 to 5 are in store/redis/layouts/packed.py.

On the way of a request these fields stay packed: each request brings some, and hardly any is ever read again. Whoever
looks for something unpacks them.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_NOTE, _TRACE, _REQUEST_ID, _RULE, _UPSTREAM, _BODY, _REPLACED = 6, 7, 8, 9, 10, 11, 12
# That field, which is empty, and always the first: store/redis/lua/claim.lua writes it, too.
_IS_REPLACED = b"\x0c\x00\x00"
NOTE_BYTES, REQUEST_ID_BYTES, _NAME_BYTES = 128, 128, 255
# Trace id, span id and flags of a traceparent (W3C Trace Context), without their hexadecimal digits.
TRACE_BYTES = 25
_FIELD = struct.Struct(">BH")


# It is never changed once it is made: see store/record.py for why it is not frozen.
@dataclass(slots=True, unsafe_hash=True)
class Kept:
    """What is kept with a record. Each part may be empty, and then takes no place.

    `note`: what the rule's `note` named in the request. `trace`: 25 bytes. `request_id`: of the original. `rule`: the
    name of the rule that it came under. `upstream`: where it went. `replaced`: its claim took the place of another
    record of the key. The store alone sets that. `body_digest`: of its body.
    """

    note: str = ""
    trace: bytes = b""
    request_id: bytes = b""
    rule: str = ""
    upstream: str = ""
    # Not of what a request brings, so that it makes no difference between two.
    replaced: bool = field(default=False, compare=False)
    body_digest: bytes = b""


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
    packed = pack_fields([one for one in fields if one[1]])
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


def kept_of(fields: Mapping[int, bytes]) -> Kept:
    """Return what is kept in these numbered fields. What cannot stand in a header or in a traceparent is left out."""
    texts = [fields.get(number, b"").decode("utf-8", "replace") for number in (_NOTE, _RULE, _UPSTREAM)]
    trace, request_id = fields.get(_TRACE, b""), fields.get(_REQUEST_ID, b"")
    note, rule, upstream = texts
    trace = trace if len(trace) == TRACE_BYTES else b""
    replaced, body_digest = _REPLACED in fields, fields.get(_BODY, b"")
    return Kept(note, trace, _fit(request_id), rule, upstream, replaced, body_digest)


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
