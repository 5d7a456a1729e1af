"""Trailers of responses: which may follow the body, and how they are announced. Pure.

A block has the trailers as they are written, each line ended.
"""

from collections.abc import Collection, Iterable

from oncegate.messages.fields import HOP_BY_HOP, Fields, Pairs, nominated, tokens
from oncegate.messages.framing import COUNTED
from oncegate.messages.response_head import NOT_REPLAYED, OWN_FIELD_PREFIX, ResponseHead, has_controls

# What a recipient has to know before the body: framing, routing, controls and format (RFC 9110, section 6.5.1), with
# what browsers act on.
_FORBIDDEN = (
    HOP_BY_HOP
    | NOT_REPLAYED
    | frozenset(
        (
            b"authorization",
            b"cache-control",
            b"clear-site-data",
            b"content-encoding",
            b"content-length",
            b"content-location",
            b"content-range",
            b"content-security-policy",
            b"content-type",
            b"date",
            b"expires",
            b"host",
            b"idempotent-replayed",
            b"location",
            b"pragma",
            b"refresh",
            b"retry-after",
            b"strict-transport-security",
            b"vary",
            b"warning",
        )
    )
)
_FORBIDDEN_PREFIXES = (OWN_FIELD_PREFIX, b"access-control-", b"proxy-", b"sec-")


def takes_trailers(te: Iterable[bytes]) -> bool:
    """Return whether a client wants trailers, by its TE fields (RFC 9110, section 10.1.4)."""
    return b"trailers" in tokens(te)


def trailer_block(pairs: Pairs, head: Fields) -> bytes:
    """Return the block of those trailers that may be passed on; `head`: the fields of the response's head."""
    dropped = nominated(head)
    return b"".join(
        b"%s: %s\r\n" % (name, value)
        for name, value in pairs
        if _may_trail(name.lower()) and name.lower() not in dropped and not has_controls(name + value)
    )


def without(block: bytes, names: Collection[bytes]) -> bytes:
    """Return a block without some trailers; `names` are lower-case."""
    lines = block.splitlines(keepends=True)
    return b"".join(line for line in lines if line.partition(b":")[0].lower() not in names)


def announcement(block: bytes) -> bytes:
    """Return the Trailer field for a block."""
    names = dict.fromkeys(line.partition(b":")[0] for line in block.split(b"\r\n") if line)
    return b"Trailer: %s\r\n" % b", ".join(names)


def announced(head: ResponseHead) -> bytes:
    """Return the Trailer field that passes the announcement of the upstream on; empty where there is nothing in it."""
    if b"trailer" not in head.fields or head.framing is not COUNTED:
        return b""
    names = [name for name in tokens(head.fields[b"trailer"]) if _may_trail(name)]
    return b"Trailer: %s\r\n" % b", ".join(names) if names else b""


def _may_trail(name: bytes) -> bool:
    return name not in _FORBIDDEN and not name.startswith(_FORBIDDEN_PREFIXES)
