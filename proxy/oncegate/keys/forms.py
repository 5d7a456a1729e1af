"""Digests a multipart body by its parts (RFC 2046, section 5.1), so that its boundary does not count. Pure.

Clients make a new boundary each time they send a form. Two bodies are known as one where they have the same parts, byte
for byte, in the same order, and neither boundary occurs in them. Then every parser finds the same parts in both. Any
other body counts as it came.
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from oncegate.keys.digests import length_prefixed
from oncegate.keys.documents import MAX_FIELDS, is_encoded
from oncegate.keys.multipart import boundary_of, parameters_of
from oncegate.messages.fields import Fields

# What stands behind a boundary: the end of its line, or of the form.
_LINE_END, _FORM_END, _LAST_LINE = b"\r\n", b"--", b"--\r\n"
_PART_BYTES = 32


class Form(NamedTuple):
    """A multipart body without its boundary. `kind`: its type, which no field equals. `digest`: of all parts."""

    kind: bytes
    digest: bytes


def is_multipart(fields: Fields) -> bool:
    """Return whether a request says that its body has parts."""
    types = fields.get(b"content-type", ())
    return len(types) == 1 and types[0][:10].lower() == b"multipart/"


def form_of(fields: Fields, blocks: Iterable[bytes]) -> Form | None:
    """Return a body as a form; None where it has to count as it came. `fields`: those of its request."""
    if not is_multipart(fields) or is_encoded(fields):
        return None
    kind = fields[b"content-type"][0]
    boundary = boundary_of(kind)
    digest = None if boundary is None else _Parts(boundary).digest_of(blocks)
    if digest is None:
        return None
    others = parameters_of(kind.partition(b";")) or {}
    del others[b"boundary"]
    names = [word for parameter in sorted(others.items()) for word in parameter]
    return Form(b"\0" + length_prefixed([kind.partition(b";")[0].strip().lower(), *names]), digest)


class _Parts:
    """Cuts one body at its boundary, in whatever blocks it comes. Takes one pass, and holds less than two blocks."""

    def __init__(self, boundary: bytes) -> None:
        self._dashes = b"--" + boundary
        self._digests: list[bytes] = []
        self._part = blake2b(digest_size=_PART_BYTES)
        # Nothing of the part was added yet: its first bytes say what it is. The text before the first boundary may
        # begin in any way.
        self._begins = self._ended = False

    def digest_of(self, blocks: Iterable[bytes]) -> bytes | None:
        """Return the digest of all parts, or None for a body that is not plainly cut by its boundary."""
        delimiter = b"\r\n" + self._dashes
        # The end of a block may be the beginning of a boundary.
        kept = len(delimiter) - 1
        # The first boundary may stand at the very beginning.
        rest = b"\r\n"
        for block in blocks:
            *whole, rest = (rest + block).split(delimiter, MAX_FIELDS + 1)
            for text in whole:
                # Behind the end of the form stands no other boundary.
                if not self._add_end(text) or self._ended:
                    return None
            if (cut := len(rest) - kept) >= len(_LAST_LINE):
                # A boundary that begins before the cut ends before this place.
                if self._dashes in rest[: cut + len(self._dashes) - 1] or not self._add(rest[:cut]):
                    return None
                rest = rest[cut:]
        if not self._add_end(rest) or not self._ended:
            return None
        return b"".join(self._digests)

    def _add(self, text: bytes) -> bool:
        """Add some bytes of a part. Returns False where they cannot be those of a plain form."""
        if self._begins:
            self._begins = False
            # Some parsers take a line that goes on behind the end for content, with the boundary in it.
            self._ended = text == _FORM_END or text.startswith(_LAST_LINE)
            if not self._ended and not text.startswith(_LINE_END):
                return False
        self._part.update(text)
        return True

    def _add_end(self, text: bytes) -> bool:
        """Add the last bytes of a part. Returns False where they cannot be those of a plain form."""
        # Parsers differ about a boundary within a line, or behind half a line end.
        if self._dashes in text or not self._add(text) or len(self._digests) > MAX_FIELDS:
            return False
        self._digests.append(self._part.digest())
        self._part, self._begins = blake2b(digest_size=_PART_BYTES), True
        return True
