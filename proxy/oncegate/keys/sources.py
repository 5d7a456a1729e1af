"""Where a rule finds the key of a request: sources, alone, joined or one in place of another. Pure.

A source says what it found, that nothing stands there, or that what stands there cannot be a key. It
never falls back on something else by itself: only the rule's own alternatives are tried, in their order.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

from oncegate.keys.digests import length_prefixed
from oncegate.keys.documents import MAX_VALUE_BYTES, Missing, form_value, json_value, parse_pointer
from oncegate.keys.multipart import multipart_value
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.fields import Fields
from oncegate.messages.request_head import RequestHead
from oncegate.messages.target import normalized_path
from oncegate.settings.addresses import parse_key_header

MOST_WINDOW_S = 86_400


@dataclass(frozen=True, slots=True)
class Header:
    """A header field that came once; `name` in lower case."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """What a JSON pointer names in the body."""

    pointer: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FormField:
    """A field of a form in the body."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the query."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of the path, the first is 1."""

    number: int


@dataclass(frozen=True, slots=True)
class Derived:
    """The request itself; equal ones are one if the second comes within the window of the first's claim."""

    window_ms: int


Kind = Header | Member | FormField | Parameter | Segment | Derived


@dataclass(frozen=True, slots=True)
class Source:
    """One source. `text` is how the rule writes it, and part of what it yields: kinds never meet by chance."""

    text: str
    kind: Kind

    @property
    def needs_body(self) -> bool:
        return isinstance(self.kind, Member | FormField | Derived)


@dataclass(frozen=True, slots=True)
class KeySources:
    """The key of a rule: lists of sources, each joined to one key; the first that is there is taken.

    `retry_count_header`: a header in which the client counts its retries of one request, from 0. Derived keys
    then follow the mark instead of the window, and a request without it has none.
    """

    alternatives: tuple[tuple[Source, ...], ...]
    retry_count_header: bytes | None = None

    @property
    def headers_only(self) -> bool:
        """Whether a request that lacks the key just does not use keys; what names it is no part of a body."""
        kinds = [source.kind for sources in self.alternatives for source in sources]
        marked = self.retry_count_header is not None
        return all(isinstance(kind, Header) or (marked and isinstance(kind, Derived)) for kind in kinds)

    @property
    def only_header(self) -> bytes | None:
        """The header, where the key is one header alone."""
        kinds = [source.kind for sources in self.alternatives for source in sources]
        return kinds[0].name if len(kinds) == 1 and isinstance(kinds[0], Header) else None

    @property
    def headers(self) -> tuple[bytes, ...]:
        """All header fields that are read, in lower case."""
        kinds = [source.kind for sources in self.alternatives for source in sources]
        marks = () if self.retry_count_header is None else (self.retry_count_header,)
        return (*(kind.name for kind in kinds if isinstance(kind, Header)), *marks)

    @property
    def window_ms(self) -> int:
        """The window of derived keys, 0 where there are none."""
        kinds = [source.kind for sources in self.alternatives for source in sources]
        return max((kind.window_ms for kind in kinds if isinstance(kind, Derived)), default=0)


class ExtractedKey(NamedTuple):
    """A key that was found. A complete record older than `window_ms` (0: none is) no longer answers for it.

    `fresh`: the client says that this is a new request, however equal it is to another.
    """

    key: bytes
    window_ms: int = 0
    fresh: bool = False


class SourceInput(NamedTuple):
    """What sources look at. `derived` is the digest of the request, empty while `body` (None) is still to come.

    A body that is too long to be looked into is empty here, and `spooled`.
    """

    head: RequestHead
    body: bytes | None = None
    spooled: bool = False
    derived: bytes = b""


def _header(text: str) -> Header:
    return Header(parse_key_header(text).lower().encode())


def _name(text: str) -> bytes:
    if not text:
        raise ValueError("must be followed by a name")
    return text.encode()


def _segment(text: str) -> Segment:
    if not re.fullmatch(r"[1-9][0-9]?", text):
        raise ValueError("must be followed by the number of a path segment, from 1")
    return Segment(int(text))


def _derived(text: str) -> Derived:
    if not re.fullmatch(r"[0-9]{1,6}(?:\.[0-9]{1,3})?", text):
        raise ValueError("must be followed by its window in seconds")
    if not 0 < float(text) <= MOST_WINDOW_S:
        raise ValueError(f"has a window that is not over 0 and up to {MOST_WINDOW_S} seconds")
    return Derived(round(float(text) * 1000))


KINDS: dict[str, Callable[[str], Kind]] = {
    "header": _header,
    "body": lambda text: Member(parse_pointer(text)),
    "form": lambda text: FormField(_name(text)),
    "query": lambda text: Parameter(_name(text)),
    "path": _segment,
    "derived": _derived,
}


def parse_source(text: str) -> Source:
    """Return the source that a rule names. ValueError where there is no such source."""
    word, colon, rest = text.partition(":")
    if not colon or word not in KINDS:
        raise ValueError(f"{text!r} is no source; there are {', '.join(f'{word}:' for word in KINDS)}")
    try:
        return Source(text.lower() if word == "header" else text, KINDS[word](rest))
    except ValueError as error:
        raise ValueError(f"{text!r} {error}") from None


def extract_key(sources: KeySources, parts: SourceInput) -> ExtractedKey | Missing | BadKey | None:
    """Return the key, or why there is none; None where only the body can tell."""
    found: ExtractedKey | Missing | BadKey | None = Missing("no key was sent")
    for alternative in sources.alternatives:
        mark = _mark(sources, alternative, parts)
        found = mark if isinstance(mark, Missing) else _join(alternative, parts)
        if isinstance(found, ExtractedKey) and isinstance(mark, int):
            # A new request takes over whatever is complete; a retry is answered by it, however old.
            found = found._replace(window_ms=0 if mark else 1, fresh=mark == 0)
        if not isinstance(found, Missing):
            return found
    return found


def _mark(sources: KeySources, alternative: Sequence[Source], parts: SourceInput) -> int | Missing | None:
    """Return how many tries came before this one, None where this alternative does not ask."""
    if sources.retry_count_header is None or not any(isinstance(source.kind, Derived) for source in alternative):
        return None
    lines = parts.head.fields.get(sources.retry_count_header, ())
    if len(lines) != 1 or not re.fullmatch(rb"[0-9]{1,4}", lines[0].strip(b" \t")):
        return Missing("neither a key was sent nor which try this is")
    return int(lines[0])


def _join(alternative: Sequence[Source], parts: SourceInput) -> ExtractedKey | Missing | BadKey | None:
    """Return the key that the sources make together. With a part of them missing it is no key."""
    if parts.body is None and any(source.needs_body for source in alternative):
        return None
    if len(alternative) == 1 and isinstance(alternative[0].kind, Header):
        return _plain(alternative[0].kind, parts.head)
    values = [_read(source.kind, parts) for source in alternative]
    bad = [value for value in values if isinstance(value, BadKey)]
    missing = [value for value in values if isinstance(value, Missing)]
    if bad:
        return bad[0]
    if missing:
        return missing[0] if len(missing) == len(values) else BadKey("a part of the key is missing")
    pairs = zip(alternative, values, strict=True)
    # The zero byte: no header's key can be made to equal a joined one.
    joined = b"\0" + length_prefixed(
        part for source, value in pairs for part in (source.text.encode(), value) if isinstance(part, bytes)
    )
    window_ms = max((source.kind.window_ms for source in alternative if isinstance(source.kind, Derived)), default=0)
    return ExtractedKey(joined, window_ms)


def _plain(header: Header, head: RequestHead) -> ExtractedKey | Missing | BadKey:
    """Return the key of one header alone: the same as without any rule."""
    lines = head.fields.get(header.name)
    if lines is None:
        return Missing("no idempotency key was sent")
    key = parse_key(lines)
    return key if isinstance(key, BadKey) else ExtractedKey(key)


def _read(kind: Kind, parts: SourceInput) -> bytes | Missing | BadKey:
    head = parts.head
    match kind:
        case Header():
            return _field(head.fields, kind.name)
        case Parameter():
            return form_value(head.target.partition(b"?")[2], kind.name, "query")
        case Segment():
            segments = normalized_path(head.target).split(b"/")
            value = segments[kind.number] if kind.number < len(segments) else b""
            return value or Missing("the path has no key where it is looked for")
        case Derived():
            return parts.derived
        case Member() | FormField():
            return _in_body(kind, parts)
        case _:
            assert_never(kind)


def _field(fields: Fields, name: bytes) -> bytes | Missing | BadKey:
    """Return the value of a header that is a part of a key: as a key where it is well-formed as one, else whole."""
    lines = fields.get(name, ())
    if len(lines) > 1:
        return BadKey("a header with a part of the key was sent more than once")
    value = lines[0].strip(b" \t") if lines else b""
    if not value:
        return Missing("a header with a part of the key was not sent")
    if len(value) > MAX_VALUE_BYTES:
        return BadKey(f"a header with a part of the key is over {MAX_VALUE_BYTES} bytes")
    key = parse_key(lines)
    return value if isinstance(key, BadKey) else key


def _in_body(kind: Member | FormField, parts: SourceInput) -> bytes | Missing | BadKey:
    fields = parts.head.fields
    if parts.spooled:
        return BadKey("the body is too long to look for a key in")
    if fields.get(b"content-encoding", [b"identity"]) != [b"identity"]:
        return BadKey("the body is encoded, so no key can be read from it")
    body = parts.body or b""
    if isinstance(kind, Member):
        return json_value(body, kind.pointer)
    types = fields.get(b"content-type", [])
    match types[0].partition(b";")[0].strip().lower() if len(types) == 1 else b"":
        case b"application/x-www-form-urlencoded":
            return form_value(body, kind.name, "form")
        case b"multipart/form-data":
            return multipart_value(types[0], body, kind.name)
        case _:
            return BadKey("the body is no form: its type is none of a form's")


def scope_fields(sources: Sequence[Source], head: RequestHead) -> Fields | BadKey:
    """Return the header fields together with what else tells tenants apart, under the sources' own names."""
    fields = dict(head.fields)
    for source in sources:
        value = _read(source.kind, SourceInput(head))
        if isinstance(value, BadKey):
            return value
        if isinstance(value, bytes):
            fields[source.text.encode()] = [value]
    return fields
