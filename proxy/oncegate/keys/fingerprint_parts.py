"""Reads the parts of a fingerprint that a rule names: header fields, and values of a JSON document. Pure.

A document counts by its values: members in any order, and each number as it is written. Where it cannot be read without
a guess, the body counts as it came: then a difference that the rule leaves out is a difference, and none is overlooked.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from oncegate.keys.digests import length_prefixed
from oncegate.keys.documents import Missing, follow_pointer, parse_document, parse_pointer
from oncegate.keys.sources import Header, Member, Source
from oncegate.keys.syntax import BadKey
from oncegate.messages.fields import Fields

# The whole document.
BODY_JSON = "body-json"
# Of one document. Each value costs time: 1 MiB of short members would take a second.
MAX_COMMAS = 10_000


def fingerprint_source(text: str) -> Source | None:
    """Return the source of a part that names one, else None. Raises ValueError for a malformed one."""
    kind, _, rest = text.partition(":")
    if text == BODY_JSON:
        return Source(text, Member(()))
    if kind == "body" and rest:
        return Source(text, Member(parse_pointer(rest)))
    return Source(text, Header(rest.encode())) if kind == "header" and rest else None


def has_content(parts: frozenset[str] | None) -> bool:
    """Return whether requests with one fingerprint ask for the same: with one method, of one target, with one body.

    `parts`: those of the fingerprint, None for all.
    """
    return parts is None or ({"method", "target"} <= parts and not parts.isdisjoint({"body", BODY_JSON}))


class NamedParts(NamedTuple):
    """The parts of a fingerprint that a rule names. `with_body`: the body enters the fingerprint beside them."""

    joined: bytes
    with_body: bool


def named_parts(sources: Sequence[Source], fields: Fields, body: bytes | None) -> NamedParts:
    """Return what these sources read. `body` None: it cannot be read, because it is too long or encoded."""
    words: list[bytes] = []
    members = [source for source in sources if isinstance(source.kind, Member)]
    for source in sources:
        if isinstance(source.kind, Header):
            lines = fields.get(source.kind.name)
            # A header that was not sent is not an empty one.
            words += [source.name, b"" if lines is None else b"=" + b",".join(lines)]
    values = _values(members, body) if members and body is not None else None
    if values is not None:
        words += [word for source, value in zip(members, values, strict=True) for word in (source.name, value)]
    return NamedParts(length_prefixed(words), bool(members) and values is None)


def _values(members: Sequence[Source], body: bytes) -> list[bytes] | None:
    """Return the values of members of a document; None where one cannot be read without a guess."""
    document = parse_document(body) if body.count(b",") <= MAX_COMMAS else None
    if not isinstance(document, tuple):
        return None
    values = []
    for source in members:
        value = follow_pointer(document[0], source.kind.pointer) if isinstance(source.kind, Member) else None
        words: list[bytes] = []
        if isinstance(value, BadKey) or not (isinstance(value, Missing) or _add_value(value, words)):
            return None
        values.append(b"".join(words))
    return values


def _add_value(value: Any, words: list[bytes]) -> bool:
    """Add a value in one form for all its spellings. Returns False where an object has two members of one name."""
    match value:
        case bytes():
            words.append(b"n%d:%b" % (len(value), value))
        case str():
            # JSON can spell half a surrogate pair, which UTF-8 cannot.
            text = value.encode("utf-8", "surrogatepass")
            words.append(b"s%d:%b" % (len(text), text))
        case list():
            words.append(b"a%d:" % len(value))
            return all(_add_value(item, words) for item in value)
        case tuple():
            words.append(b"o%d:" % len(value))
            members = dict(value)
            return len(members) == len(value) and all(
                _add_value(name, words) and _add_value(members[name], words) for name in sorted(members)
            )
        case _:
            words.append(b"%r;" % value)
    return True
