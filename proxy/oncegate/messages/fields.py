"""Every rule about header fields: what is stripped, added and passed on. Pure.

Fields are pairs of bytes in the order and spelling in which they came. A message is always written
anew from its parsed form: framing, hop-by-hop and forwarding fields are ours, never passed through.
"""

from collections.abc import Collection, Iterable, Sequence

Pairs = Sequence[tuple[bytes, bytes]]
Fields = dict[bytes, list[bytes]]

# RFC 9110, section 7.6.1, and what older proxies still send.
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
MAX_HEAD_BYTES = 65536  # of an answer, or of a request that comes in parts

_USUAL = ([b"keep-alive"], [b"close"])

_KNOWN = 4096  # names, or hosts, of at most
_KNOWN_BYTES = 64  # that are remembered


class Labels(dict[bytes, bytes]):
    """A field's name -> how its line begins, `Name: `, empty if it ends at this hop.

    Names repeat from message to message: an answer's block takes 13k instructions so, 20k when each
    line is formatted (measured). Bounded.
    """

    def __init__(self, gone: Collection[bytes], gone_prefix: bytes | None = None) -> None:
        self._gone, self._gone_prefix = gone, gone_prefix

    def __missing__(self, name: bytes) -> bytes:
        lower = name.lower()
        gone = lower in self._gone or (self._gone_prefix is not None and lower.startswith(self._gone_prefix))
        label = b"" if gone else name + b": "
        if len(name) <= _KNOWN_BYTES:
            if len(self) >= _KNOWN:
                self.clear()
            self[name] = label
        return label


def by_name(pairs: Pairs) -> Fields:
    """Return the values by lower-case name, in order."""
    fields: Fields = {name.lower(): [value] for name, value in pairs}
    if len(fields) != len(pairs):
        fields = {}
        for name, value in pairs:
            fields.setdefault(name.lower(), []).append(value)
    return fields


def tokens(values: Iterable[bytes]) -> list[bytes]:
    """Return the members of a comma-separated field, in lower case."""
    return [token for value in values for token in map(bytes.strip, value.lower().split(b",")) if token]


def nominated(fields: Fields) -> Collection[bytes]:
    """Return what Connection names beyond its usual words: RFC 9110, section 7.6.1, strips that as well."""
    values = fields.get(b"connection")
    return () if values is None or values in _USUAL else tokens(values)


def remember(known: set[bytes], more: Iterable[bytes]) -> None:
    """Keep short words that passed a check, so that one look tells next time. Bounded."""
    if len(known) >= _KNOWN:
        known.clear()
    known.update(word for word in more if len(word) <= _KNOWN_BYTES)
