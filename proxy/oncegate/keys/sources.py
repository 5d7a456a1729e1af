"""Key sources: the places of a request that a rule reads its key from, such as `header:X-Id` or `body:/id`. Pure.

`keys/extraction.py` reads them from a request.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from oncegate.keys.documents import parse_pointer
from oncegate.settings.names import parse_key_header, parse_scope_header

# Of derived keys: a day.
MAX_WINDOW_S = 86_400
RECEIVER = "receiver"


# An identity that a rule names, such as `id` in `id=header:X-Id`. No kind of source has `=` in its own name.
_IDENTITY = re.compile(r"([a-z][a-z0-9_-]{0,31})=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Header:
    """`header:NAME`, a header field that was sent once. `name` is in lower case.

    `cloudevent`: `cloudevent:NAME`, an attribute of a CloudEvent in binary mode: the header ce-NAME, decoded as the
    HTTP binding says.
    """

    name: bytes
    cloudevent: bool = False


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
class Cookie:
    """`cookie:NAME`, all values of one cookie. Only of scopes: a cookie is the same for all requests of a session."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """`path:NUMBER`, a segment of the path. The first is 1."""

    number: int


@dataclass(frozen=True, slots=True)
class Derived:
    """`derived:SECONDS`, a digest of the whole request. Equal requests are one within the window of the first claim."""

    window_ms: int


@dataclass(frozen=True, slots=True)
class Receiver:
    """`receiver`, where the request goes: the upstream, the Host if it is set or passed on, and the path.

    A sender's id names an event, and several receivers may get it. Every request has a receiver.
    """


SourceKind = Header | Member | FormField | Parameter | Cookie | Segment | Derived | Receiver


@dataclass(frozen=True, slots=True)
class Source:
    """One source. `text`: its spelling in the rule.

    `identity`: the name of what it reads, where the rule says one (`id=header:X-Id`). Sources of one identity yield one
    key for one text; all others are told apart by their spelling.
    """

    text: str
    kind: SourceKind
    identity: str = ""

    @property
    def name(self) -> bytes:
        """What names the source in joined keys."""
        return (f"{self.identity}=" if self.identity else self.text).encode()

    @property
    def plain_header(self) -> bytes | None:
        """The name of a header that is read as the header of a key is without any rule."""
        kind = self.kind
        return kind.name if isinstance(kind, Header) and not (kind.cloudevent or self.identity) else None

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
    its retries of one request, from 0. With it, derived keys follow that count: a new request executes, a retry gets
    its response. A request without the header has no derived key, unless `unmarked_is_new`: then it is a new request,
    and a response counts for its retries within the window of the derived key.
    """

    alternatives: tuple[tuple[Source, ...], ...]
    retry_count_header: bytes | None = None
    unmarked_is_new: bool = False

    @property
    def headers_only(self) -> bool:
        """Whether only header fields decide if a request has a key, so that a client without keys sends none."""
        kinds = (Header, Receiver) if self.retry_count_header is None else (Header, Receiver, Derived)
        return all(isinstance(kind, kinds) for kind in self._kinds)

    @property
    def reads_destination(self) -> bool:
        """Whether the key depends on where the request goes."""
        return any(isinstance(kind, Receiver | Derived) for kind in self._kinds)

    @property
    def all(self) -> list[Source]:
        """The sources of all alternatives."""
        return [source for sources in self.alternatives for source in sources]

    @property
    def _kinds(self) -> list[SourceKind]:
        return [source.kind for source in self.all]

    @property
    def only_header(self) -> bytes | None:
        """The lower-case name of the header, where the key is one header alone."""
        sources = self.all
        return sources[0].plain_header if len(sources) == 1 else None

    @property
    def leading_headers(self) -> tuple[bytes, ...]:
        """The lower-case names of the headers that are a key alone, up to the first alternative that is anything else.

        The first of them that is present is the key, so that it can be shown to the client as the client wrote it.
        """
        alone = (sources[0].plain_header if len(sources) == 1 else None for sources in self.alternatives)
        return tuple(name for name in takewhile(lambda name: name is not None, alone) if name is not None)

    @property
    def headers(self) -> tuple[bytes, ...]:
        """The lower-case names of all header fields that are read."""
        counts = () if self.retry_count_header is None else (self.retry_count_header,)
        return (*(kind.name for kind in self._kinds if isinstance(kind, Header)), *counts)

    @property
    def window_ms(self) -> int:
        """The longest window of derived keys, 0 without any."""
        return longest_window_ms(self._kinds)

    @property
    def retry_window_ms(self) -> int:
        """For how long a response counts for a retry that says that it is one; 0 for as long as it is kept."""
        return self.window_ms if self.unmarked_is_new else 0


def _header(text: str) -> Header:
    return Header(parse_key_header(text).lower().encode())


def _attribute(text: str) -> Header:
    # CloudEvents 1.0.2, "Naming Conventions".
    if not re.fullmatch(r"[a-z0-9]{1,64}", text):
        raise ValueError("must be followed by an attribute, in lower-case letters and digits")
    return Header(b"ce-" + text.encode(), cloudevent=True)


def _scope_header(text: str) -> Header:
    return Header(parse_scope_header(text).lower().encode())


def _cookie(text: str) -> Cookie:
    # RFC 6265, section 4.1.1: a token.
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", text):
        raise ValueError("must be followed by the name of a cookie")
    return Cookie(text.encode())


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
    "cloudevent": _attribute,
    "body": lambda text: Member(parse_pointer(text)),
    "form": lambda text: FormField(_name(text)),
    "query": lambda text: Parameter(_name(text)),
    "path": _segment,
    "derived": _derived,
}
# The tenant has to be known before the body arrives, so that no source in the body can name it.
SCOPE_KINDS: dict[str, Callable[[str], SourceKind]] = {
    "header": _scope_header,
    "cookie": _cookie,
    "query": SOURCE_KINDS["query"],
    "path": _segment,
}


def parse_source(text: str) -> Source:
    """Return the source of a key with this spelling. Raises ValueError for an unknown or malformed one."""
    if named := _IDENTITY.fullmatch(text):
        source = parse_source(named[2])
        if source.identity or isinstance(source.kind, Receiver | Derived):
            raise ValueError(f"{text!r} names the identity of what is none")
        return Source(f"{named[1]}={source.text}", source.kind, named[1])
    if text == RECEIVER:
        return Source(text, Receiver())
    return _parsed(text, SOURCE_KINDS, f"are {RECEIVER}, and those that begin with")


def parse_retry_mark(text: str) -> bytes:
    """Return the lower-case name of the header that marks a retry. Raises ValueError for another spelling."""
    kind, _, name = text.partition(":")
    if kind != "header":
        raise ValueError("must be header: and a name, such as header:Svix-Retry-Count")
    return _header(name).name


def parse_scope_source(text: str) -> Source:
    """Return the source of a scope with this spelling. Raises ValueError for an unknown or malformed one."""
    if text.partition(":")[0] in SOURCE_KINDS.keys() - SCOPE_KINDS:
        raise ValueError(f"{text!r} cannot identify a tenant; {', '.join(f'{kind}:' for kind in SCOPE_KINDS)} can")
    return _parsed(text, SCOPE_KINDS, "begin with")


def _parsed(text: str, kinds: Mapping[str, Callable[[str], SourceKind]], which: str) -> Source:
    kind, colon, rest = text.partition(":")
    if not colon or kind not in kinds:
        beginnings = ", ".join(f"{kind}:" for kind in kinds)
        raise ValueError(f"{text!r} is not a source; sources {which} {beginnings}")
    try:
        # Header names are case-insensitive, and the spelling enters joined keys.
        return Source(text.lower() if kind == "header" else text, kinds[kind](rest))
    except ValueError as error:
        raise ValueError(f"{text!r} {error}") from None
