"""Which origins may read responses: origins and wildcards, as `settings.addresses.parse_cors_origin` has them."""

import re
from dataclasses import dataclass, field

from oncegate.messages.fields import Fields

ANY = "*"
# A serialized origin (RFC 6454, section 6.2), as browsers send it: in lower case, without a default port.
_ORIGIN = re.compile(rb"([a-z][a-z0-9+.-]*)://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_LABELS = re.compile(rb"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


@dataclass(frozen=True, slots=True)
class Origins:
    """A list of origins. `*.example.com` stands for one label or more before example.com, never for a part of one."""

    texts: tuple[str, ...]
    any: bool = field(init=False)
    _exact: frozenset[bytes] = field(init=False, repr=False, compare=False)
    # The scheme with ://, and the rest from the dot on, with the port.
    _wild: tuple[tuple[bytes, bytes], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = (text.encode().partition(b"*") for text in self.texts if ANY in text and text != ANY)
        object.__setattr__(self, "any", ANY in self.texts)
        object.__setattr__(self, "_exact", frozenset(self.named))
        object.__setattr__(self, "_wild", tuple((scheme, rest) for scheme, _, rest in parts))

    @property
    def named(self) -> tuple[bytes, ...]:
        """Those without a wildcard, in order."""
        return tuple(text.encode() for text in self.texts if ANY not in text)

    def __contains__(self, origin: bytes) -> bool:
        """Return whether an origin is listed. `null` stands for every page without an origin, so that it never is."""
        if _ORIGIN.fullmatch(origin) is None:
            return False
        return self.any or origin in self._exact or any(_matches(origin, *wild) for wild in self._wild)


def _matches(origin: bytes, scheme: bytes, rest: bytes) -> bool:
    if not (origin.startswith(scheme) and origin.endswith(rest)):
        return False
    return _LABELS.fullmatch(origin, len(scheme), len(origin) - len(rest)) is not None


def origin_of(fields: Fields) -> bytes:
    """Return the origin of the page that sent a request, empty where there is none or more than one."""
    lines = fields.get(b"origin", ())
    return lines[0].strip(b" \t") if len(lines) == 1 else b""
