"""The address that a client is shown: the upstream's own would lead it past oncegate, where a retry is paid twice."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from oncegate.messages.fields import Fields
from oncegate.messages.target import normalized_path
from oncegate.settings.addresses import DEFAULT_PORTS, parse_host_and_port

# A URL with an authority, or a reference that takes its scheme from the page. No blanks and controls: browsers drop
# some of them, and would read another URL than this.
_URL = re.compile(rb"(?:(https?):)?//([^/?#\\@\x00-\x20\x7f]+)([^\x00-\x20\x7f]*)", re.IGNORECASE)
_REFRESH = re.compile(rb"([0-9.]+[ \t]*[;,][ \t]*url[ \t]*=[ \t]*)(['\"]?)([^'\"]*)\2", re.IGNORECASE)
_LINE = re.compile(rb"^((?:content-)?location|refresh):[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_PREFIX = re.compile(rb"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")


@dataclass(frozen=True, slots=True)
class Addresses:
    """The upstream's own addresses: its scheme, each `host:port` by which it may call itself, its path prefix."""

    scheme: str
    authorities: frozenset[str]
    prefix: bytes = b""

    def adapted(self, block: bytes, outer: bytes) -> bytes:
        """Return a response's fields with the addresses that the client needs."""

        def line(match: re.Match[bytes]) -> bytes:
            name, value = match[1], match[2].rstrip(b" \t")
            shown = self.refreshed(value, outer) if name.lower() == b"refresh" else self.shown(value, outer)
            return b"%s: %s" % (name, shown)

        return _LINE.sub(line, block)

    def shown(self, url: bytes, outer: bytes) -> bytes:
        """Return a URL as the client needs it: an absolute path where it names the upstream, else as it is.

        `outer` is the path prefix that proxies in front took off. A path is right whatever the client calls oncegate
        (RFC 9110, section 10.2.2): its Host and its scheme are only its word.
        """
        match = _URL.fullmatch(url)
        if match is None or not self._is_own(match[1], match[2]):
            return url
        rest = match[3] if match[3].startswith(b"/") else b"/" + match[3]
        inner = self._below_prefix(rest)
        return url if inner is None else _safe(with_outer(inner, outer))

    def _is_own(self, scheme: bytes | None, authority: bytes) -> bool:
        if scheme is not None and scheme.lower().decode() != self.scheme:
            return False
        try:
            return without_dot(parse_host_and_port(authority.decode(), DEFAULT_PORTS[self.scheme])) in self.authorities
        except ValueError:
            return False

    def _below_prefix(self, path: bytes) -> bytes | None:
        """Return a path without the upstream's prefix, None for one that oncegate does not serve."""
        if not self.prefix:
            return path
        rest = path.removeprefix(self.prefix)
        # `/api/../x` is not below /api.
        is_below = normalized_path(path).startswith(self.prefix + b"/") or normalized_path(path) == self.prefix
        if rest is path or not is_below or rest[:1] not in b"/?#":
            return None
        return rest if rest.startswith(b"/") else b"/" + rest

    def refreshed(self, value: bytes, outer: bytes) -> bytes:
        """Return the value of a Refresh as the client needs it."""
        match = _REFRESH.fullmatch(value)
        return value if match is None else match[1] + match[2] + self.shown(match[3], outer) + match[2]


def own_authorities(names: Iterable[str], scheme: str) -> frozenset[str]:
    """Return the `host:port` of each name by which an upstream may call itself, a host with or without a port."""
    return frozenset(without_dot(parse_host_and_port(name, DEFAULT_PORTS[scheme])) for name in names)


def without_dot(authority: str) -> str:
    """Return `host:port` without the final dot of the host."""
    host, _, port = authority.rpartition(":")
    return f"{host.rstrip('.')}:{port}"


def outer_prefix(fields: Fields) -> bytes:
    """Return the path prefix that proxies in front took off, by X-Forwarded-Prefix: the outermost first.

    Empty where it is absent or no path.
    """
    members = b",".join(fields.get(b"x-forwarded-prefix", ())).split(b",")
    prefix = b"".join(member.strip(b" \t").rstrip(b"/") for member in members)
    return prefix if _PREFIX.fullmatch(prefix) and normalized_path(prefix) == prefix else b""


def with_outer(path: bytes, outer: bytes) -> bytes:
    """Return a path with the outer prefix before it, unless it has that already: some APIs put it there."""
    has_it = path == outer or path.startswith((outer + b"/", outer + b"?", outer + b"#"))
    return path if has_it else outer + path


def _safe(path: bytes) -> bytes:
    """Return a path that no reader takes for the beginning of another host (`//host`, and in browsers `/\\host`)."""
    return b"/." + path if path[1:2] in (b"/", b"\\") else path
