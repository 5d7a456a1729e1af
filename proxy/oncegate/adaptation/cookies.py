"""The cookies of a response: where they are valid for the client, and when a replay may repeat them."""

import re
from dataclasses import dataclass

from oncegate.adaptation.addresses import with_outer
from oncegate.messages.fields import Fields
from oncegate.settings.credentials import CREDENTIALS

_LINE = re.compile(rb"^(set-cookie):[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_LINE_AND_END = re.compile(rb"^set-cookie:[^\n]*\n", re.IGNORECASE | re.MULTILINE)
# A double click's second request comes within that. Later, a cookie may have been replaced by a newer one.
REPLAYED_MS = 60_000
# As a choice for `domain`: cookies then belong to the host that the client asked.
DROP = "drop"

# The fields that say who a client is: a person's browser, or the holder of a credential.
_PERSONAL = (b"cookie", *(name.lower().encode() for name in CREDENTIALS))


def without_cookies(block: bytes) -> bytes:
    """Return a response's fields without its cookies."""
    return _LINE_AND_END.sub(b"", block)


def names_a_person(fields: Fields) -> bool:
    """Return whether a request says whose it is. Else all such requests are one tenant, and share no cookies."""
    return any(any(fields.get(name, ())) for name in _PERSONAL)


@dataclass(frozen=True, slots=True)
class Cookies:
    """What is rewritten of cookies (RFC 6265, section 4.1.2).

    `domain`: the Domain of those that have one; DROP leaves it out, an empty text as it is. `rewrites_path`: a Path
    below `prefix`, the upstream's path prefix, is what the client needs.
    """

    domain: str = ""
    rewrites_path: bool = False
    prefix: bytes = b""

    def adapted(self, block: bytes, outer: bytes) -> bytes:
        """Return a response's fields with the cookies that the client needs."""
        return _LINE.sub(lambda line: b"%s: %s" % (line[1], self.shown(line[2], outer)), block)

    def shown(self, value: bytes, outer: bytes) -> bytes:
        """Return the value of a Set-Cookie; `outer` is the path prefix that proxies in front took off."""
        pair, *attributes = value.split(b";")
        # Browsers refuse such a cookie with any other Path than / (RFC 6265bis).
        rewrites_path = self.rewrites_path and not pair.lstrip().lower().startswith(b"__host-")
        kept = [pair]
        for attribute in attributes:
            name, _, text = attribute.partition(b"=")
            if name.strip().lower() == b"domain" and self.domain:
                kept += [] if self.domain == DROP else [b" Domain=" + self.domain.encode()]
            # Any other Path stands for that of the request, which is right already (RFC 6265, section 5.2.4).
            elif name.strip().lower() == b"path" and rewrites_path and text.strip().startswith(b"/"):
                kept.append(b" Path=" + self._path(text.strip(), outer))
            else:
                kept.append(attribute)
        return b";".join(kept)

    def _path(self, path: bytes, outer: bytes) -> bytes:
        if self.prefix and (path == self.prefix or path.startswith(self.prefix + b"/")):
            path = path[len(self.prefix) :] or b"/"
        # Without its slash: /shop/ would not be sent to /shop.
        return outer if outer and path == b"/" else with_outer(path, outer)
