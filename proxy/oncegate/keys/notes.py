"""The note of a request: what its rule names of it, such as the number of an order, so that people find it again. Pure.

No key and no fingerprint has it, and a request without it is as good as any other.
"""

from collections.abc import Callable
from typing import Protocol

from oncegate.keys.documents import follow_pointer, parse_document
from oncegate.keys.sources import Header, Member, Source, parse_source

# In characters, of what is read. In UTF-8 the store takes as many bytes at most.
MAX_CHARACTERS = 128
CONTENT_ENCODING = b"content-encoding"


class NotedBody(Protocol):
    """A body as far as a note is read from it. `spooled`: it is too long to be read."""

    @property
    def data(self) -> bytes: ...

    @property
    def spooled(self) -> bool: ...


def parse_note(text: str) -> Source:
    """Return the source of a note: `header:NAME`, `body:/pointer`, or the pointer alone. Raises ValueError."""
    if not text.startswith(("/", "body:", "header:")):
        raise ValueError("must be a header or a JSON pointer, such as header:X-Order-Id or /order_id")
    return parse_source(f"body:{text}" if text.startswith("/") else text)


def read_note(source: Source, field: Callable[[bytes], bytes], body: NotedBody) -> str:
    """Return the note of a request, empty for none. `field(name)`: the value of a header that came once."""
    kind = source.kind
    if isinstance(kind, Header):
        return field(kind.name).decode("utf-8", "replace").strip()[:MAX_CHARACTERS]
    if not isinstance(kind, Member) or body.spooled or field(CONTENT_ENCODING) not in (b"", b"identity"):
        return ""
    document = parse_document(body.data)
    value = follow_pointer(document[0], kind.pointer) if isinstance(document, tuple) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    # Numbers are bytes, as they are written.
    text = value.decode() if isinstance(value, bytes) else value
    return text.strip()[:MAX_CHARACTERS] if isinstance(text, str) else ""


def escaped(text: str) -> str:
    """Return a text with escapes for what is not printable: it can neither forge a line nor turn one around."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
