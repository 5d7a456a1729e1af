"""The values of a request that its rule keeps with the record, so that the API can be asked about it later. Pure."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

from oncegate.keys.documents import follow_pointer, parse_document
from oncegate.keys.notes import CONTENT_ENCODING, NotedBody
from oncegate.keys.sources import Header, Member, Segment, Source
from oncegate.keys.syntax import parse_key
from oncegate.messages.target import normalized_path
from oncegate.probing.plan import Plan
from oncegate.probing.templates import unusable

# A whole number that every reader writes in this way alone (RFC 8259, section 6: up to 2^53). An API that was sent
# 7.50 or 1e3 may search for 7.5 or 1000, and finds nothing.
_NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,14}")

# The value of a header that came once, by its lower-case name; nothing for any other.
Field = Callable[[bytes], bytes]


def read_values(
    plan: Plan, key_headers: Iterable[bytes], field: Field, target: Callable[[], bytes], body: NotedBody
) -> list[tuple[str, str]]:
    """Return the values of a request that its plan keeps, without those that no template can have.

    `key_headers`: the first of them that is there has the key. `target`: of the request, where that is needed.
    """
    documents = [_document(field, body)] if any(_is_member(source) for _, source in plan.keep) else []
    found = []
    for name, source in plan.keep:
        value = _value(source, documents, field, target) if source else _key(key_headers, field)
        if not unusable(value):
            found.append((name, value))
    return found


def _is_member(source: Source | None) -> bool:
    return source is not None and isinstance(source.kind, Member)


def _key(names: Iterable[bytes], field: Field) -> str:
    """Return the key as a client wrote it in a header."""
    sent: Iterator[bytes] = (value for name in names if (value := field(name)))
    key = parse_key([next(sent, b"")])
    return key.decode("ascii") if isinstance(key, bytes) else ""


def _document(field: Field, body: NotedBody) -> Any:
    if body.spooled or field(CONTENT_ENCODING) not in (b"", b"identity"):
        return None
    document = parse_document(body.data)
    return document[0] if isinstance(document, tuple) else None


def _value(source: Source, documents: list[Any], field: Field, target: Callable[[], bytes]) -> str:
    """Return a value as it was written; empty for none."""
    match source.kind:
        case Header(name):
            return _decoded(field(name).strip(b" \t"))
        case Segment(number):
            segments = normalized_path(target()).split(b"/")
            return _decoded(unquote_to_bytes(segments[number])) if number < len(segments) else ""
        case Member(pointer):
            value = follow_pointer(documents[0], pointer)
            if isinstance(value, bool):
                return "true" if value else "false"
            if isinstance(value, bytes):
                return value.decode() if _NUMBER.fullmatch(value) else ""
            return value if isinstance(value, str) else ""
        case _:
            return ""


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return ""
