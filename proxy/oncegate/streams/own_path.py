"""The paths at which oncegate itself answers on the public listener. Pure."""

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from oncegate.messages.target import normalized_path


class Place(NamedTuple):
    """What a target below the own path names: its first segment, what follows that, and the query."""

    name: bytes
    rest: bytes
    query: bytes


# Of a target that only another reader would take for one below the own path.
NOWHERE = Place(b"", b"", b"")
# In which spellings of a path differ: escapes, other slashes, dot segments, parameters of a segment.
_SPELLINGS = (b"%", b"\\", b"//", b"/.", b";")
# Servers of Java take them off before they look for a path.
_PARAMETERS = re.compile(rb";[^/]*")


class OwnPath:
    """The path below which nothing reaches an API, such as `/.oncegate`."""

    def __init__(self, path: str) -> None:
        self.path = path.encode()
        self._start, self._folded = self.path + b"/", self.path.lower()

    def place(self, target: bytes) -> Place | None:
        """Return what a target in origin form names here, None for one that is not ours.

        Ours are compared byte for byte. What only normalizes to one of them is NOWHERE: an API that takes it for the
        same path would get an address that is not meant for it.
        """
        path, _, query = target.partition(b"?")
        if path.startswith(self._start):
            name, _, rest = path[len(self._start) :].partition(b"/")
            return Place(name, rest, query)
        return NOWHERE if self._is_spelling_of(path) else None

    def _is_spelling_of(self, path: bytes) -> bool:
        folded = path.lower()
        if any(mark in folded for mark in _SPELLINGS):
            plain = _PARAMETERS.sub(b"", unquote_to_bytes(folded).replace(b"\\", b"/"))
            folded = normalized_path(plain).lower()
        return folded == self._folded or folded.startswith(self._folded + b"/")

    def shown(self, place: Place) -> str:
        """Return the path of a request for logs and traces, without what only its client may know."""
        return (self._start + place.name + b"/...").decode() if place.name == STREAMS else self.path.decode() + "/..."

    def address(self, capability: bytes) -> bytes:
        """Return the path of a capability."""
        return b"%s%s/%s" % (self._start, STREAMS, capability)


STREAMS = b"streams"
KEYS = b"keys"
