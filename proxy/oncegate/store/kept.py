"""What is kept with a record for those who look for it later: which request it was, and where it came from.

Nothing is decided by it. It lies in numbered fields. Each is a number (1 byte), its length (2 bytes) and its value. A
number that this version does not know is skipped: a later one may add some. No number is ever used for anything else; 1
to 5 are in store/redis/layouts/packed.py.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

_NOTE, _TRACE, _REQUEST_ID, _RULE, _UPSTREAM, _REPLACED = 6, 7, 8, 9, 10, 12
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
    record of the key. The store alone sets that.
    """

    note: str = ""
    trace: bytes = b""
    request_id: bytes = b""
    rule: str = ""
    upstream: str = ""
    # Not of what a request brings, so that it makes no difference between two.
    replaced: bool = field(default=False, compare=False)


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
    packed = _pack_names(kept.rule, kept.upstream)
    if request_id := kept.request_id[:REQUEST_ID_BYTES]:
        packed += b"\x08\x00%c%b" % (len(request_id), request_id)
    if kept.trace or kept.note:
        packed += pack_fields([(_TRACE, kept.trace)] if kept.trace else [])
        packed += pack_fields([(_NOTE, cut(kept.note, NOTE_BYTES))] if kept.note else [])
    return _IS_REPLACED + packed if kept.replaced else packed


# There is one entry for each route.
@lru_cache(1024)
def _pack_names(rule: str, upstream: str) -> bytes:
    names = (_RULE, rule), (_UPSTREAM, upstream)
    return pack_fields([(number, cut(name, _NAME_BYTES)) for number, name in names if name])


def kept_of(fields: Mapping[int, bytes]) -> Kept:
    """Return what is kept in these numbered fields. What cannot stand in a header or in a traceparent is left out."""
    find = fields.get
    trace, request_id, note = find(_TRACE, b""), find(_REQUEST_ID, b""), find(_NOTE, b"")
    if not (request_id.isascii() and request_id.decode().isprintable()):
        request_id = b""
    rule, upstream = _unpack_names(find(_RULE, b""), find(_UPSTREAM, b""))
    trace = trace if len(trace) == TRACE_BYTES else b""
    return Kept(_text(note) if note else "", trace, request_id, rule, upstream, _REPLACED in fields)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


# Records have the names of a few routes.
@lru_cache(1024)
def _unpack_names(rule: bytes, upstream: bytes) -> tuple[str, str]:
    return _text(rule), _text(upstream)


def unpack_kept(packed: bytes | None) -> Kept:
    """Return what is kept in packed fields, nothing where these are damaged."""
    if not packed:
        return NOTHING
    try:
        return kept_of(unpack_fields(packed))
    except ValueError:
        return NOTHING


def cut(text: str, most_bytes: int) -> bytes:
    """Return the text in UTF-8, cut behind its last whole character within so many bytes."""
    encoded = text.encode("utf-8", "replace")
    return encoded if len(encoded) <= most_bytes else encoded[:most_bytes].decode("utf-8", "ignore").encode()
