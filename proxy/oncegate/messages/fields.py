"""Header fields: their types, and the rules that hold for requests and responses alike. Pure.

Fields are pairs of bytes, in the order and spelling in which they were received. oncegate never copies a head:
it writes each message anew from its parsed form. The fields of framing, of this hop (RFC 9110, section 7.6.1)
and of forwarding are always its own.
"""

from collections.abc import Collection, Iterable, Sequence

# (name, value) in the order and spelling of the message.
Pairs = Sequence[tuple[bytes, bytes]]
# Lower-case name -> its values in order.
Fields = dict[bytes, list[bytes]]

# RFC 9110, section 7.6.1, with `keep-alive`, `proxy-connection` and `http2-settings` of older peers.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"proxy-connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
        b"proxy-authorization",
    )
)
# The limit for the head of a request or a response.
MAX_HEAD_BYTES = 65536

# Values of Connection that nominate no field.
_COMMON_CONNECTION = ([b"keep-alive"], [b"close"])

# The bounds of each table of names or hosts: peers choose them, so that tables must not grow with every request.
_MAX_ENTRIES = 4096
_MAX_ENTRY_BYTES = 64


class LinePrefixes(dict[bytes, bytes]):
    """Field name as received -> the beginning of its line, `Name: `; empty for a field that ends at this hop.

    A bounded cache. Names repeat from message to message: writing a response's fields takes 13k instructions with
    it, and 20k where each line is formatted (measured).
    """

    def __init__(self, dropped: Collection[bytes], dropped_prefix: bytes | None = None) -> None:
        self._dropped, self._dropped_prefix = dropped, dropped_prefix

    def __missing__(self, name: bytes) -> bytes:
        lower = name.lower()
        by_prefix = self._dropped_prefix is not None and lower.startswith(self._dropped_prefix)
        prefix = b"" if by_prefix or lower in self._dropped else name + b": "
        if len(name) <= _MAX_ENTRY_BYTES:
            if len(self) >= _MAX_ENTRIES:
                self.clear()
            self[name] = prefix
        return prefix


def by_name(pairs: Pairs) -> Fields:
    """Return the values by lower-case name, in order."""
    # Most heads have each name once: one comprehension, and the loop only where that lost a value.
    fields: Fields = {name.lower(): [value] for name, value in pairs}
    if len(fields) != len(pairs):
        fields = {}
        for name, value in pairs:
            fields.setdefault(name.lower(), []).append(value)
    return fields


def only_value(fields: Fields, name: bytes) -> bytes:
    """Return the value of a field that comes once; nothing where it comes never or again."""
    values = fields.get(name)
    return values[0] if values is not None and len(values) == 1 else b""


def tokens(values: Iterable[bytes]) -> list[bytes]:
    """Return the members of a comma-separated field in lower case, without empty ones (RFC 9110, section 5.6.1)."""
    return [token for value in values for token in map(bytes.strip, value.lower().split(b",")) if token]


def nominated(fields: Fields) -> Collection[bytes]:
    """Return the lower-case names that Connection nominates: they end at this hop (RFC 9110, section 7.6.1)."""
    values = fields.get(b"connection")
    return () if values is None or values in _COMMON_CONNECTION else tokens(values)


def remember(checked: set[bytes], passed: Iterable[bytes]) -> None:
    """Add names or hosts that passed a check to the bounded set `checked`, so that the next check is a look-up."""
    if len(checked) >= _MAX_ENTRIES:
        checked.clear()
    checked.update(entry for entry in passed if len(entry) <= _MAX_ENTRY_BYTES)
