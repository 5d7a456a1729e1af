"""Key sources: the places of a request that a rule reads its key from, such as `header:X-Id` or `body:/id`. Pure.

`keys/extraction.py` reads them from a request.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from oncegate.keys.documents import parse_pointer
from oncegate.settings.names import parse_key_header

# Of derived keys: a day.
MAX_WINDOW_S = 86_400


@dataclass(frozen=True, slots=True)
class Header:
    """`header:NAME`, a header field that was sent once. `name` is in lower case."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """`body:POINTER`, the value at a JSON pointer (RFC 6901) in the body."""

    pointer: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FormField:
    """`form:NAME`, a field of a form in the body."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Parameter:
    """`query:NAME`, a parameter of the query."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """`path:NUMBER`, a segment of the path. The first is 1."""

    number: int


@dataclass(frozen=True, slots=True)
class Derived:
    """`derived:SECONDS`, a digest of the whole request. Equal requests are one within the window of the first claim."""

    window_ms: int


SourceKind = Header | Member | FormField | Parameter | Segment | Derived


@dataclass(frozen=True, slots=True)
class Source:
    """One source. `text`: its spelling in the rule, which enters joined keys: two kinds never yield the same key."""

    text: str
    kind: SourceKind

    @property
    def needs_body(self) -> bool:
        return isinstance(self.kind, Member | FormField | Derived)


def longest_window_ms(kinds: Iterable[SourceKind]) -> int:
    """Return the longest window of the derived keys among these sources, 0 without any."""
    return max((kind.window_ms for kind in kinds if isinstance(kind, Derived)), default=0)


@dataclass(frozen=True, slots=True)
class KeySources:
    """The sources of a rule's key: alternatives, of which the first that yields a key counts.

    The sources of one alternative are joined to one key. `retry_count_header`: a header in which the client counts
    its retries of one request, from 0. With it, derived keys follow that count instead of their window, and a
    request without the header has no derived key.
    """

    alternatives: tuple[tuple[Source, ...], ...]
    retry_count_header: bytes | None = None

    @property
    def headers_only(self) -> bool:
        """Whether only header fields decide if a request has a key, so that a client without keys sends none."""
        counts_retries = self.retry_count_header is not None
        return all(isinstance(kind, Header) or (counts_retries and isinstance(kind, Derived)) for kind in self._kinds)

    @property
    def _kinds(self) -> list[SourceKind]:
        return [source.kind for sources in self.alternatives for source in sources]

    @property
    def only_header(self) -> bytes | None:
        """The lower-case name of the header, where the key is one header alone."""
        kinds = self._kinds
        return kinds[0].name if len(kinds) == 1 and isinstance(kinds[0], Header) else None

    @property
    def headers(self) -> tuple[bytes, ...]:
        """The lower-case names of all header fields that are read."""
        counts = () if self.retry_count_header is None else (self.retry_count_header,)
        return (*(kind.name for kind in self._kinds if isinstance(kind, Header)), *counts)

    @property
    def window_ms(self) -> int:
        """The longest window of derived keys, 0 without any."""
        return longest_window_ms(self._kinds)


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
    if not 0 < float(text) <= MAX_WINDOW_S:
        raise ValueError(f"has a window that is not over 0 and up to {MAX_WINDOW_S} seconds")
    # Rounded: 1.001 * 1000 is 1000.9999999999999 in floating point.
    return Derived(round(float(text) * 1000))


SOURCE_KINDS: dict[str, Callable[[str], SourceKind]] = {
    "header": _header,
    "body": lambda text: Member(parse_pointer(text)),
    "form": lambda text: FormField(_name(text)),
    "query": lambda text: Parameter(_name(text)),
    "path": _segment,
    "derived": _derived,
}


def parse_source(text: str) -> Source:
    """Return the source with this spelling in a rule. Raises ValueError for an unknown or malformed one."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in SOURCE_KINDS:
        raise ValueError(
            f"{text!r} is not a source; sources begin with {', '.join(f'{kind}:' for kind in SOURCE_KINDS)}"
        )
    try:
        # Header names are case-insensitive, and the spelling enters joined keys.
        return Source(text.lower() if kind == "header" else text, SOURCE_KINDS[kind](rest))
    except ValueError as error:
        raise ValueError(f"{text!r} {error}") from None
