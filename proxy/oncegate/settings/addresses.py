"""Network addresses and URLs as settings and rules spell them. Pure.

Messages never repeat the refused text: a malformed URL may still contain a password.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

Network = IPv4Network | IPv6Network

# RFC 9110, sections 4.2.1 and 4.2.2.
DEFAULT_PORTS = {"http": 80, "https": 443}
WILDCARDS = frozenset(("0.0.0.0", "::"))

_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]+)(?::(?P<port>[0-9]{1,5}))?")
# With "_", which DNS names of hosts do not have, but the names that container networks give do.
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")

# Patterns instead of urlsplit, which drops tabs and line ends silently and repeats the URL in its errors.
# RFC 3986, section 3.3.
_PATH = r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)*"
# Without digits, which a known head may have in its gaps: such a head would not be compared with this path.
_OWN_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z._~-]{1,64}){1,4}")
_ORIGIN = re.compile(rf"(?P<scheme>(?i:https?))://(?P<authority>[^/?#@\\\s]+)(?P<path>{_PATH})")
# `moz-extension://…` and `capacitor://localhost` are origins, too.
_PAGE_ORIGIN = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<any>\*\.)?(?P<authority>[^/?#@\\\s*]+)")


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a listener. An IPv6 host has no brackets; with port 0 the system chooses one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def overlaps(self, other: "Address") -> bool:
        """Return whether a connection to one address could reach the listener of the other."""
        hosts = {self.host, other.host}
        # A listener on a wildcard takes the connections to every address of the machine.
        return self.port == other.port != 0 and (len(hosts) == 1 or not hosts.isdisjoint(WILDCARDS))


@dataclass(frozen=True, slots=True)
class Origin:
    """An http(s) URL without user, query and fragment. An IPv6 host has no brackets, `path_prefix` no slash at its
    end."""

    scheme: str
    host: str
    port: int
    path_prefix: str = ""

    @property
    def authority(self) -> str:
        """The value of a Host field for this URL: without the port where it is the scheme's default.

        Also without the dot at the end of an absolute name, which says how to look it up, not whose it is.
        """
        return bracketed(self.host.removesuffix(".")) + self._port

    @property
    def _port(self) -> str:
        return "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"

    def __str__(self) -> str:
        # With the dot: a fingerprint may contain this text.
        return f"{self.scheme}://{bracketed(self.host)}{self._port}{self.path_prefix}"


def bracketed(host: str) -> str:
    """Return a host as it is written before a port: an IPv6 address in brackets."""
    # RFC 3986, section 3.2.2.
    return f"[{host}]" if ":" in host else host


def parse_address(text: str) -> Address:
    """Return the listen address `host:port`."""
    host, port = split_authority(text)
    if port is None:
        raise ValueError("must be host:port, such as 127.0.0.1:8080 or [::1]:8080")
    return Address(normalized_host(host), port)


def parse_host(text: str) -> str:
    """Return a `host` or `host:port` in the form that is compared with a Host field in lower case."""
    host, port = split_authority(text)
    return bracketed(normalized_host(host)) + ("" if port is None else f":{port}")


def parse_host_and_port(authority: str, default_port: int) -> str:
    """Return `host:port`, with `default_port` where there is none."""
    host, port = split_authority(authority)
    host = normalized_host(host)
    if port == 0:
        # With port 0 the system chooses a port, which makes no sense for a server to connect to.
        raise ValueError("has the port 0")
    return f"{bracketed(host)}:{port or default_port}"


def parse_network(text: str) -> Network:
    """Return the network of an address with an optional prefix length."""
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError("must be networks, such as 10.0.0.0/8 or 192.0.2.7, without host bits") from None


def parse_origin(text: str) -> Origin:
    """Return an http(s) base URL."""
    match = _ORIGIN.fullmatch(text)
    if match is None:
        raise ValueError(
            "must be http:// or https:// with a host and optionally a port and a path, without user, query and fragment"
        )
    scheme = match["scheme"].lower()
    host, port = split_authority(match["authority"])
    if port == 0:
        raise ValueError("has the port 0")
    # A target begins with a slash: with another one before it, the upstream would get another path.
    return Origin(scheme, normalized_host(host), port or DEFAULT_PORTS[scheme], match["path"].rstrip("/"))


def parse_own_path(text: str) -> str:
    """Return a path that has one spelling only, without a slash at its end."""
    path = text.rstrip("/")
    if _OWN_PATH.fullmatch(path) is None:
        raise ValueError(
            "must be a path such as /.oncegate, of letters, -, ., _ and ~, in at most four parts of 64 characters"
        )
    return path


def split_authority(authority: str) -> tuple[str, int | None]:
    """Return the host, an IPv6 address with its brackets, and the port if there is one."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise ValueError("must be a host with an optional port; an IPv6 address needs brackets")
    port = None if match["port"] is None else int(match["port"])
    # A TCP port has 16 bits (RFC 9293, section 3.1).
    if port is not None and port > 65535:
        raise ValueError("has a port over 65535")
    return match["host"], port


def normalized_host(text: str) -> str:
    """Return a host in the one spelling that is compared and resolved: lower case, ASCII, without brackets."""
    try:
        if text.startswith("["):
            return _ipv6(text[1:-1])
        name = _ascii(text.lower())
        # A resolver would take 10.1 or 010.0.0.1 for some address: only the four-part form is accepted.
        return str(IPv4Address(name)) if name.rstrip(".").rpartition(".")[2].isdigit() else _host_name(name)
    except ValueError:
        raise ValueError("has a host that is neither a name nor an address") from None


def _ipv6(text: str) -> str:
    address = IPv6Address(text)
    if address.scope_id is not None:
        raise ValueError("a zone means something on one machine only")
    return str(address)


def _host_name(name: str) -> str:
    # 253 characters and a final dot, which make 255 octets in DNS (RFC 1035, section 2.3.4).
    if len(name) > 254 or _NAME.fullmatch(name) is None:
        raise ValueError("not a host name")
    return name


def _ascii(name: str) -> str:
    if name.isascii():
        return name
    encoded = name.encode("idna")
    # Python's codec follows IDNA 2003, which changes some letters (RFC 5895): such names need their xn-- form.
    if encoded.decode("idna") != name:
        raise ValueError("ambiguous in IDNA")
    return encoded.decode("ascii")


def parse_cors_origin(text: str) -> str:
    """Return the origin of pages as browsers send it (RFC 6454, section 6.2), with `*.` for any labels; or `*`."""
    if text == "*":
        return text
    if text.lower() == "null":
        raise ValueError("must not have null: every page without an origin of its own has that one")
    match = _PAGE_ORIGIN.fullmatch(text)
    if match is None:
        raise ValueError(
            "must be origins such as https://shop.example, https://*.shop.example or http://localhost:3000, or *; an "
            "origin has a scheme, a host and maybe a port, and no path, not even a slash"
        )
    scheme = match["scheme"].lower()
    if scheme == "file":
        raise ValueError("must not have file: such pages have the origin null")
    host, port = split_authority(match["authority"])
    if port == 0:
        raise ValueError("has the port 0")
    # Browsers leave the default port out.
    shown = "" if port is None or port == DEFAULT_PORTS.get(scheme) else f":{port}"
    return f"{scheme}://{match['any'] or ''}{bracketed(normalized_host(host))}{shown}"


def parse_cookie_domain(text: str) -> str:
    """Return the Domain of cookies: a host name, or `drop`."""
    if text and (not text.isascii() or _NAME.fullmatch(text.lower().removeprefix(".")) is None):
        raise ValueError("must be a domain such as shop.example, or drop")
    return text.lower()
