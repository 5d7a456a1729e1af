"""Reads the key of a request from the sources that its rule names. Pure.

A source yields a value, Missing, or BadKey where its value cannot be a key. The alternatives of a rule are tried
in its order; there is no other fallback.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, assert_never

from oncegate.keys.digests import length_prefixed
from oncegate.keys.documents import MAX_VALUE_BYTES, Missing, form_value, json_value
from oncegate.keys.multipart import multipart_value
from oncegate.keys.sources import (
    Derived,
    FormField,
    Header,
    KeySources,
    Member,
    Parameter,
    Segment,
    Source,
    SourceKind,
    longest_window_ms,
)
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.fields import Fields
from oncegate.messages.request_head import RequestHead
from oncegate.messages.target import normalized_path


class ExtractedKey(NamedTuple):
    """A key that sources yielded. A complete record older than `window_ms` (0: none is) does not count for it.

    `fresh`: the client says that this is a new request, though it equals an earlier one.
    """

    key: bytes
    window_ms: int = 0
    fresh: bool = False


class SourceInput(NamedTuple):
    """What sources read. `derived`: the digest of the whole request. While `body` is None, it has not arrived yet.

    `spooled`: the body is too long to be read, and empty here.
    """

    head: RequestHead
    body: bytes | None = None
    spooled: bool = False
    derived: bytes = b""


def extract_key(sources: KeySources, given: SourceInput) -> ExtractedKey | Missing | BadKey | None:
    """Return the key of a request, or why it has none; None where that depends on a body that is still to come."""
    key: ExtractedKey | Missing | BadKey | None = Missing("no key was sent")
    for alternative in sources.alternatives:
        retries = _retry_count(sources, alternative, given)
        key = retries if isinstance(retries, Missing) else _join(alternative, given)
        if isinstance(key, ExtractedKey) and isinstance(retries, int):
            # A new request (no retries yet) takes over any complete record; a retry gets its response, however old.
            key = key._replace(window_ms=0 if retries else 1, fresh=retries == 0)
        if not isinstance(key, Missing):
            return key
    return key


def _retry_count(sources: KeySources, alternative: Sequence[Source], given: SourceInput) -> int | Missing | None:
    """Return how often the client retried this request before; None where the alternative does not depend on it."""
    if sources.retry_count_header is None or not any(isinstance(source.kind, Derived) for source in alternative):
        return None
    lines = given.head.fields.get(sources.retry_count_header, ())
    # SDKs retry a few times: a larger number is no count of retries.
    if len(lines) != 1 or not re.fullmatch(rb"[0-9]{1,4}", lines[0].strip(b" \t")):
        return Missing("neither a key nor a retry count was sent")
    return int(lines[0])


def _join(alternative: Sequence[Source], given: SourceInput) -> ExtractedKey | Missing | BadKey | None:
    """Return the key that the sources of one alternative make together; BadKey where only some have a value."""
    if given.body is None and any(source.needs_body for source in alternative):
        return None
    if len(alternative) == 1 and isinstance(alternative[0].kind, Header):
        return _header_key(alternative[0].kind, given.head)
    values = [_read(source.kind, given) for source in alternative]
    bad = [value for value in values if isinstance(value, BadKey)]
    missing = [value for value in values if isinstance(value, Missing)]
    if bad:
        return bad[0]
    if missing:
        return missing[0] if len(missing) == len(values) else BadKey("a part of the key is missing")
    pairs = zip(alternative, values, strict=True)
    # No key in a header has a zero byte, so that none can be made to equal a joined key.
    joined = b"\0" + length_prefixed(
        part for source, value in pairs for part in (source.text.encode(), value) if isinstance(part, bytes)
    )
    return ExtractedKey(joined, longest_window_ms([source.kind for source in alternative]))


def _header_key(header: Header, head: RequestHead) -> ExtractedKey | Missing | BadKey:
    """Return the key of one header alone: the same key as without any rule."""
    lines = head.fields.get(header.name)
    if lines is None:
        return Missing("no idempotency key was sent")
    key = parse_key(lines)
    return key if isinstance(key, BadKey) else ExtractedKey(key)


def _read(kind: SourceKind, given: SourceInput) -> bytes | Missing | BadKey:
    head = given.head
    match kind:
        case Header():
            return _field(head.fields, kind.name)
        case Parameter():
            return form_value(head.target.partition(b"?")[2], kind.name, "query")
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
    lines = fields.get(name, ())
    # With two values, the proxy and the upstream could act on different ones.
    if len(lines) > 1:
        return BadKey("a header with a part of the key was sent more than once")
    value = lines[0].strip(b" \t") if lines else b""
    if not value:
        return Missing("a header with a part of the key was not sent")
    if len(value) > MAX_VALUE_BYTES:
        return BadKey(f"a header with a part of the key is over {MAX_VALUE_BYTES} bytes")
    key = parse_key(lines)
    return value if isinstance(key, BadKey) else key


def _in_body(kind: Member | FormField, given: SourceInput) -> bytes | Missing | BadKey:
    fields = given.head.fields
    if given.spooled:
        return BadKey("the body is too long to read a key from")
    # A small body can decompress to an enormous one.
    if fields.get(b"content-encoding", [b"identity"]) != [b"identity"]:
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
        value = _read(source.kind, SourceInput(head))
        if isinstance(value, BadKey):
            return value
        if isinstance(value, bytes):
            fields[source.text.encode()] = [value]
    return fields
