"""Reads the key of a request from the sources that its rule names. Pure.

A source yields a value, Missing, or BadKey where its value cannot be a key. The alternatives of a rule are tried
in its order, until one has all its parts or a part that cannot be a key; there is no other fallback. A key that the
browser made by itself is tried last.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, assert_never
from urllib.parse import unquote_to_bytes

from oncegate.decision import ANY_AGE
from oncegate.keys import automatic
from oncegate.keys.digests import length_prefixed
from oncegate.keys.documents import MAX_VALUE_BYTES, Missing, form_value, is_encoded, json_value
from oncegate.keys.multipart import multipart_value
from oncegate.keys.sources import (
    Cookie,
    Derived,
    FormField,
    Header,
    KeySources,
    Member,
    Parameter,
    Receiver,
    Segment,
    Source,
    SourceKind,
    longest_window_ms,
)
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.fields import Fields
from oncegate.messages.request_head import RequestHead
from oncegate.messages.target import normalized_path

_NOT_SENT = Missing("a header with a part of the key was not sent")
_PART_MISSING = BadKey("a part of the key is missing")
# A quoted string (RFC 9110, section 5.6.4).
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*+)"')
_ESCAPED = re.compile(rb"\\(.)")


class ExtractedKey(NamedTuple):
    """A key that sources yielded. A complete record older than `window_ms` does not count for it.

    0: none is older. ANY_AGE: each one is. `fresh`: the client says that this is a new request, though it equals an
    earlier one.
    """

    key: bytes
    window_ms: int = 0
    fresh: bool = False


class SourceInput(NamedTuple):
    """What sources read. `derived`: the digest of the whole request. While `body` is None, it has not arrived yet.

    `spooled`: the body is too long to be read, and empty here. `destination`: where the request goes, without its path.
    """

    head: RequestHead
    body: bytes | None = None
    spooled: bool = False
    derived: bytes = b""
    destination: bytes = b""


def extract_key(sources: KeySources, given: SourceInput) -> ExtractedKey | Missing | BadKey | None:
    """Return the key of a request, or why it has none; None where that depends on a body that is still to come."""
    key: ExtractedKey | Missing | BadKey | None = Missing("no key was sent")
    incomplete: BadKey | None = None
    for number, alternative in _in_order(sources, given.head):
        retries = _retry_count(sources, alternative, given)
        if isinstance(retries, Missing):
            key = retries
        elif number == 0 and len(alternative) == 1 and (header := alternative[0].plain_header) is not None:
            key = _header_key(header, given.head)
        else:
            key = _join(alternative, given)
        if isinstance(key, ExtractedKey) and isinstance(retries, int):
            # A new request (no retries yet) takes over any complete record. A retry gets its response: however old
            # under a preset, whose SDKs always count.
            key = key._replace(window_ms=sources.retry_window_ms if retries else ANY_AGE, fresh=retries == 0)
        if key is _PART_MISSING:
            incomplete = _PART_MISSING
        elif not isinstance(key, Missing):
            return key
    return incomplete or key


def _in_order(sources: KeySources, head: RequestHead) -> Iterable[tuple[int, Sequence[Source]]]:
    """Return the alternatives with their numbers, in the order in which they count for a request."""
    numbered = tuple(enumerate(sources.alternatives))
    if len(numbered) > 1 and automatic.HEADER in sources.headers and automatic.is_automatic(head.fields):
        # Any other alternative says more about what the user means: two clicks have two such keys.
        return sorted(numbered, key=lambda one: _reads(one[1], automatic.HEADER))
    return numbered


def _reads(alternative: Sequence[Source], header: bytes) -> bool:
    return any(isinstance(source.kind, Header) and source.kind.name == header for source in alternative)


def _retry_count(sources: KeySources, alternative: Sequence[Source], given: SourceInput) -> int | Missing | None:
    """Return how often the client retried this request before; None where the alternative does not depend on it."""
    if sources.retry_count_header is None or not any(isinstance(source.kind, Derived) for source in alternative):
        return None
    lines = given.head.fields.get(sources.retry_count_header, ())
    if not lines and sources.unmarked_is_new:
        return 0
    # SDKs retry a few times: a larger number is no count of retries.
    if len(lines) != 1 or not re.fullmatch(rb"[0-9]{1,4}", lines[0].strip(b" \t")):
        return Missing("neither a key nor a retry count was sent")
    return int(lines[0])


def _join(alternative: Sequence[Source], given: SourceInput) -> ExtractedKey | Missing | BadKey | None:
    """Return the key that the sources of one alternative make together; _PART_MISSING where only some have a value."""
    if given.body is None and any(source.needs_body for source in alternative):
        return None
    parts: list[tuple[bytes, bytes]] = []
    missing: list[Missing] = []
    for source in alternative:
        value = _part(source, given)
        if isinstance(value, BadKey):
            return value
        if isinstance(value, Missing):
            missing.append(value)
        else:
            parts.append((source.name, value))
    if missing:
        # Every request has a receiver.
        is_absent = len(missing) + sum(isinstance(source.kind, Receiver) for source in alternative) == len(alternative)
        return missing[0] if is_absent else _PART_MISSING
    return ExtractedKey(joined_key(alternative, parts), longest_window_ms([source.kind for source in alternative]))


def joined_key(alternative: Sequence[Source], parts: list[tuple[bytes, bytes]]) -> bytes:
    """Return the key that the values of one alternative's sources make together, each with its source's name."""
    # Alternatives may name the same identities in any order.
    if any(source.identity for source in alternative):
        parts.sort()
    # No key in a header has a zero byte, so that none can be made to equal a joined key.
    return b"\0" + length_prefixed(word for part in parts for word in part)


def _part(source: Source, given: SourceInput) -> bytes | Missing | BadKey:
    """Return the value of a source as it enters a joined key."""
    value = read_source(source.kind, given)
    # Beside a text in a body, which has this tag, any other value is a text (`json_value`).
    if source.identity and isinstance(value, bytes) and not isinstance(source.kind, Member):
        return b"s" + value
    return value


def _header_key(name: bytes, head: RequestHead) -> ExtractedKey | Missing | BadKey:
    """Return the key of one header alone: the same key as without any rule."""
    lines = head.fields.get(name)
    if lines is None:
        return Missing("no idempotency key was sent")
    key = parse_key(lines)
    return key if isinstance(key, BadKey) else ExtractedKey(key)


def read_source(kind: SourceKind, given: SourceInput) -> bytes | Missing | BadKey:
    """Return what a source reads from a request."""
    head = given.head
    match kind:
        case Header():
            return (_attribute if kind.cloudevent else _field)(head.fields, kind.name)
        case Receiver():
            return length_prefixed((given.destination, normalized_path(head.target)))
        case Parameter():
            return form_value(head.target.partition(b"?")[2], kind.name, "query")
        case Cookie():
            return _cookie(head.fields, kind.name)
        case Segment():
            segments = normalized_path(head.target).split(b"/")
            value = segments[kind.number] if kind.number < len(segments) else b""
            return value or Missing("the path does not have the segment that holds the key")
        case Derived():
            return given.derived
        case Member() | FormField():
            return _in_body(kind, given)
        case _:
            assert_never(kind)


def _field(fields: Fields, name: bytes) -> bytes | Missing | BadKey:
    """Return the value of a header that is a part of a key: without its quotes where it is well-formed as a key."""
    value = _only_line(fields, name)
    if isinstance(value, bytes):
        key = parse_key([value])
        return _checked_length(value if isinstance(key, BadKey) else key)
    return value


def _attribute(fields: Fields, name: bytes) -> bytes | Missing | BadKey:
    """Return an attribute of a CloudEvent from its header (HTTP binding 1.0.2, section 3.1.3.2).

    Escapes that are malformed, or yield no UTF-8, stay as they came: some senders do not encode at all.
    """
    value = _only_line(fields, name)
    if not isinstance(value, bytes):
        return value
    if quoted := _QUOTED.fullmatch(value):
        value = _ESCAPED.sub(rb"\1", quoted[1])
    decoded = unquote_to_bytes(value)
    try:
        decoded.decode()
    except UnicodeDecodeError:
        decoded = value
    return _checked_length(decoded)


def _only_line(fields: Fields, name: bytes) -> bytes | Missing | BadKey:
    lines = fields.get(name, ())
    # With two values, the proxy and the upstream could act on different ones.
    if len(lines) > 1:
        return BadKey("a header with a part of the key was sent more than once")
    return (lines[0].strip(b" \t") if lines else b"") or _NOT_SENT


def _checked_length(value: bytes) -> bytes | Missing | BadKey:
    if len(value) > MAX_VALUE_BYTES:
        return BadKey(f"a header with a part of the key is over {MAX_VALUE_BYTES} bytes")
    return value or _NOT_SENT


def _cookie(fields: Fields, name: bytes) -> bytes | Missing:
    """Return all values of a cookie, joined by `; `, which no value contains."""
    # Several lines are one list (RFC 9113, section 8.2.3). Servers differ in which of two values they take, so that
    # each pair of values is a tenant of its own.
    pairs = [one.partition(b"=") for line in fields.get(b"cookie", ()) for one in line.split(b";")]
    values = [value.strip(b" \t") for field, _, value in pairs if field.strip(b" \t") == name]
    return b"; ".join(values) if any(values) else Missing("the cookie that names the tenant was not sent")


def _in_body(kind: Member | FormField, given: SourceInput) -> bytes | Missing | BadKey:
    fields = given.head.fields
    if given.spooled:
        return BadKey("the body is too long to read a key from")
    if is_encoded(fields):
        return BadKey("the body is encoded, so no key can be read from it")
    body = given.body or b""
    if isinstance(kind, Member):
        return json_value(body, kind.pointer)
    types = fields.get(b"content-type", [])
    match types[0].partition(b";")[0].strip().lower() if len(types) == 1 else b"":
        case b"application/x-www-form-urlencoded":
            return form_value(body, kind.name, "form")
        case b"multipart/form-data":
            return multipart_value(types[0], body, kind.name)
        case _:
            return BadKey("the body is not a form: its Content-Type is not that of one")


def scope_fields(sources: Sequence[Source], head: RequestHead) -> Fields | BadKey:
    """Return the header fields, with the values of scope sources beside them under the sources' own spelling.

    BadKey where a source cannot be read; a missing value is left out.
    """
    fields = dict(head.fields)
    for source in sources:
        value = read_source(source.kind, SourceInput(head))
        if isinstance(value, BadKey):
            return value
        if isinstance(value, bytes):
            fields[source.text.encode()] = [value]
    return fields
