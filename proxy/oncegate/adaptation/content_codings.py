"""A stored body whose content coding the requester does not accept: decoded while it is replayed. Pure.

The client that executed the request accepted the coding. A retry may come from another program of the same user, such
as curl, that said it does not. gzip and deflate are decoded; for br and zstd Python has no decoder.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence

from oncegate.messages.fields import tokens

# The most bytes of a decoded body that are made at a time, whatever the size of the coded ones.
PIECE_BYTES = 65536

_GZIP = frozenset((b"gzip", b"x-gzip"))
_DECODABLE = _GZIP | {b"deflate"}
# About the coded bytes, or about ranges of them.
_OF_THE_CODED = frozenset((b"content-encoding", b"content-length", b"content-md5", b"accept-ranges"))
_DIGESTS = frozenset((b"digest", b"content-digest", b"repr-digest"))
# Says which field a cache may not take for another's (RFC 9110, section 12.5.5).
_VARY = b"Vary: Accept-Encoding\r\n"


class Undecodable(Exception):
    """The body is not in the coding that its head names."""


def may_be_coded(block: bytes) -> bool:
    """Return whether the header fields of a response may name a content coding: a quick look, without parsing."""
    # Not `in`: see `Adaptation.adapts_replay`.
    return block.find(b"ncoding: ") >= 0 or block.find(b"NCODING: ") >= 0


def coding_to_decode(status: int, block: bytes, accepted: Sequence[bytes] | None) -> bytes:
    """Return the coding of a stored body that has to be decoded for its requester; empty where it stays as it is.

    `accepted`: the Accept-Encoding fields of the requester, None for none, which accepts every coding.
    """
    fields = [
        (name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in block.split(b"\r\n"))
    ]
    codings = tokens(value for name, value in fields if name == b"content-encoding")
    # A part of a coded body cannot be decoded, and `no-transform` forbids it (RFC 9110, section 7.7).
    is_part = status == 206 or any(name == b"content-range" for name, _ in fields)
    directives = tokens(value for name, value in fields if name == b"cache-control")
    if (
        accepted is None
        or len(codings) != 1
        or codings[0] not in _DECODABLE
        or is_part
        or b"no-transform" in directives
    ):
        return b""
    return b"" if accepts(accepted, codings[0]) or not accepts(accepted, b"identity") else codings[0]


def accepts(accepted: Iterable[bytes], coding: bytes) -> bool:
    """Return whether Accept-Encoding fields accept a coding (RFC 9110, section 12.5.3)."""
    weights: dict[bytes, bool] = {}
    for member in tokens(accepted):
        name, *parameters = (part.strip() for part in member.split(b";"))
        weights[b"gzip" if name in _GZIP else name] = not any(_is_zero(one) for one in parameters)
    default = weights.get(b"*", coding == b"identity")
    return weights.get(b"gzip" if coding in _GZIP else coding, default)


def _is_zero(parameter: bytes) -> bool:
    name, _, value = parameter.partition(b"=")
    value = value.strip()
    return name.strip() == b"q" and value.startswith(b"0") and not value.strip(b"0.")


class Decoder:
    """Decodes a body that it is fed. What is not in the coding raises Undecodable."""

    def __init__(self, coding: bytes) -> None:
        self._is_gzip = coding in _GZIP
        self._inflate: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what these bytes decode to, in pieces of at most PIECE_BYTES."""
        has_more = False
        while data or has_more:
            if self._inflate is None:
                if self._is_gzip and not data.strip(b"\0"):
                    # Padding behind the end, which gzip ignores.
                    return
                self._inflate = zlib.decompressobj(self._window_bits(data))
            try:
                piece = self._inflate.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise Undecodable(str(error)) from None
            if piece:
                yield piece
            has_more, data = len(piece) == PIECE_BYTES, self._inflate.unconsumed_tail
            if self._inflate.eof:
                # A body in gzip may have several members (RFC 1952, section 2.2).
                has_more, data, self._inflate = False, self._inflate.unused_data, None
                if data and not self._is_gzip:
                    raise Undecodable("bytes behind the end")

    @property
    def is_at_end(self) -> bool:
        """Whether the body may end here."""
        return self._inflate is None

    def _window_bits(self, data: bytes) -> int:
        """Return how zlib reads it: some servers send deflate without the zlib format around it."""
        if self._is_gzip:
            return 16 + zlib.MAX_WBITS
        is_zlib = data[0] & 15 == 8 and (len(data) < 2 or int.from_bytes(data[:2]) % 31 == 0)
        return zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS


def decoded_block(block: bytes) -> bytes:
    """Return the header fields of a response whose body is decoded.

    Another entity has another strong tag: it becomes a weak one (RFC 9110, section 8.8.3).
    """
    lines, varies = [], False
    for line in block.splitlines(keepends=True):
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in _OF_THE_CODED or name in _DIGESTS:
            continue
        if name == b"etag" and not value.strip().startswith(b"W/"):
            line = b"%s: W/%s\r\n" % (line.partition(b":")[0], value.strip())
        varies = varies or (name == b"vary" and not {b"*", b"accept-encoding"}.isdisjoint(tokens((value,))))
        lines.append(line)
    return b"".join(lines) + (b"" if varies else _VARY)
