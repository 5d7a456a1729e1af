"""Values as the settings spell them: addresses, networks, URLs, and the names of HTTP. Pure.

No message repeats what it was given: a URL that is refused may still carry a password.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from urllib.parse import parse_qsl, quote

Network = IPv4Network | IPv6Network

DEFAULT_PORTS = {"http": 80, "https": 443}
WILDCARDS = frozenset(("0.0.0.0", "::"))

_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]+)(?::(?P<port>[0-9]{1,5}))?")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"  # "_": the names that container networks give
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")

GUARDABLE = ("POST", "PATCH", "PUT", "DELETE")
# A key must reach us end to end (RFC 9110, section 7.6.1), and be neither framing nor a tenant's mark.
NO_KEY_HEADERS = frozenset(
    (
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
        *("content-length", "cookie", "expect", "host", "http2-settings"),
        *("proxy-authenticate", "proxy-authorization"),
    )
)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2

# Patterns instead of urlsplit, which drops tabs and line ends unasked and repeats the URL in its errors.
_PATH = r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)*"  # RFC 3986, section 3.3
_ORIGIN = re.compile(rf"(?P<scheme>(?i:https?))://(?P<authority>[^/?#@\\\s]+)(?P<path>{_PATH})")
# What redis-py's own urlsplit takes apart in the same way; anything else is percent-encoded.
_USER = r"(?:[^:@/?#\[\]]*(?::[^/?#\[\]]*)?@)?"
_REDIS = re.compile(rf"rediss?://{_USER}(?P<authority>[^@/?#]+)(?:/[0-9]*|/?\?db=[0-9]+)?")
_SOCKET = re.compile(rf"redis\+unix://{_USER}/[^?#]+(?:\?db=[0-9]+)?")
_SEVERAL = re.compile(
    rf"redis(?P<tls>s?)\+(?P<kind>sentinel|cluster)://(?P<user>{_USER})(?P<places>[^@/?#]+)"
    r"(?:/(?P<service>[A-Za-z0-9._-]*))?(?:\?(?P<query>[^?#]+))?"
)
STORE_PORTS = {"sentinel": 26379, "cluster": 6379}
_PASSWORD = re.compile(r"(://[^:@/]*:)[^/]*@|((?<=[?&])sentinel_password=)[^&]*")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens. An IPv6 host stands without its brackets; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def overlaps(self, other: "Address") -> bool:
        """Return whether a connection to one could reach the other."""
        hosts = {self.host, other.host}
        return self.port == other.port != 0 and (len(hosts) == 1 or not hosts.isdisjoint(WILDCARDS))


@dataclass(frozen=True, slots=True)
class Origin:
    """The upstream. An IPv6 host stands without its brackets, `path_prefix` without its last slash."""

    scheme: str
    host: str
    port: int
    path_prefix: str = ""

    @property
    def authority(self) -> str:
        """The value of a Host field for it: the port only where it is not the scheme's own."""
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return bracketed(self.host) + port

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path_prefix}"


@dataclass(frozen=True, slots=True)
class Several:
    """A store of several servers. `user` and `sentinel_user` are percent-encoded `name:password@`, or empty."""

    kind: str  # sentinel, cluster
    scheme: str
    user: str
    places: tuple[str, ...]  # host:port, of sentinels or of any servers of a cluster
    service: str
    db: int
    sentinel_user: str

    def server_url(self, place: str) -> str:
        """Return the URL of a server at `host:port`."""
        return f"{self.scheme}://{self.user}{place}/{self.db}"

    def sentinel_url(self, place: str) -> str:
        """Return the URL of a sentinel at `host:port`. Sentinels have users of their own."""
        return f"{self.scheme}://{self.sentinel_user}{place}"


def bracketed(host: str) -> str:
    """Return a host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def parse_address(text: str) -> Address:
    """Return the listen address that `host:port` names."""
    host, port = _split(text)
    if port is None:
        raise ValueError("must be host:port, such as 127.0.0.1:8080 or [::1]:8080")
    return Address(_host(host), port)


def parse_host(text: str) -> str:
    """Return a `host` or `host:port` as it is compared with a Host field in lower case."""
    host, port = _split(text)
    return bracketed(_host(host)) + ("" if port is None else f":{port}")


def parse_network(text: str) -> Network:
    """Return the network that an address with an optional prefix length names."""
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError("must be networks, such as 10.0.0.0/8 or 192.0.2.7, without host bits") from None


def parse_origin(text: str) -> Origin:
    """Return the upstream that a base URL names."""
    match = _ORIGIN.fullmatch(text)
    if match is None:
        raise ValueError(
            "must be http:// or https:// with a host and optionally a port and a path, without user, query and fragment"
        )
    scheme = match["scheme"].lower()
    host, port = _split(match["authority"])
    if port == 0:
        raise ValueError("has the port 0")
    return Origin(scheme, _host(host), port or DEFAULT_PORTS[scheme], match["path"].rstrip("/"))


def parse_store_url(text: str) -> str:
    """Return a store URL that is well formed, as it is."""
    visible = text.isascii() and text.isprintable() and " " not in text
    if text == "embedded" or (visible and (_SOCKET.fullmatch(text) or parse_several(text))):
        return text
    match = _REDIS.fullmatch(text)
    if match is None or not visible:
        raise ValueError(
            "must be embedded, redis://host:port/db, rediss://host:port/db, redis+unix:///path?db=0, "
            "redis+sentinel://host:port,host:port/service or redis+cluster://host:port,host:port; "
            "special characters of a user or password are percent-encoded"
        )
    _place(match["authority"], 6379)
    return text


def parse_several(text: str) -> Several | None:
    """Return the servers that a URL names which names several; None for any other URL."""
    match = _SEVERAL.fullmatch(text)
    if match is None:
        return None
    kind, query = match["kind"], dict(parse_qsl(match["query"] or "", keep_blank_values=True))
    sentinel_user = query.pop("sentinel_user", ""), query.pop("sentinel_password", "")
    db = query.pop("db", "0")
    if kind == "sentinel" and not match["service"]:
        raise ValueError("must name the service that the sentinels watch, such as redis+sentinel://h1:26379/mymaster")
    if kind == "cluster" and (match["service"] or match["query"]):
        raise ValueError("must end after the hosts: a cluster has neither a service nor a number of a database")
    if query or not db.isdecimal():
        raise ValueError("can only have db, sentinel_user and sentinel_password after its question mark")
    return Several(
        kind=kind,
        scheme=f"redis{match['tls']}",
        user=match["user"],
        places=tuple(_place(place, STORE_PORTS[kind]) for place in parse_list(match["places"])),
        service=match["service"] or "",
        db=int(db),
        sentinel_user=":".join(quote(word, safe="") for word in sentinel_user) + "@" if any(sentinel_user) else "",
    )


def _place(authority: str, default_port: int) -> str:
    """Return `host:port`."""
    host, port = _split(authority)
    host = _host(host)
    if port == 0:
        raise ValueError("has the port 0")
    return f"{bracketed(host)}:{port or default_port}"


def parse_list(text: str) -> tuple[str, ...]:
    """Return the members of a comma list. Saying a name twice is taken for a slip of the pen."""
    members = tuple(member for member in map(str.strip, text.split(",")) if member)
    if not members:
        raise ValueError("names nothing")
    if len({member.lower() for member in members}) < len(members):
        raise ValueError("names the same twice")
    return members


def parse_method(text: str) -> str:
    """Return a method that can be guarded."""
    if text.upper() not in GUARDABLE:
        raise ValueError(f"can only name {', '.join(GUARDABLE)}")
    return text.upper()


def parse_header(text: str) -> str:
    """Return the name of a header field."""
    if _TOKEN.fullmatch(text) is None:
        raise ValueError("must name header fields in letters, digits and -")
    return text


def parse_key_header(text: str) -> str:
    """Return the name of a header field that can carry a key."""
    if text.lower() in NO_KEY_HEADERS:
        raise ValueError("must be a header field that can carry a key, such as Idempotency-Key")
    return parse_header(text)


def parse_namespace(text: str) -> str:
    """Return a word that can stand in a scope."""
    if re.fullmatch(r"[!-~]{1,64}", text) is None:
        raise ValueError("must be 1 to 64 visible ASCII characters")
    return text


def parse_secret(text: str) -> str:
    """Return a secret that can be encoded; bytes of an environment that are not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    return text


def masked(store_url: str) -> str:
    """Return a well-formed store URL without its passwords."""
    return _PASSWORD.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", store_url)


def _split(authority: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise ValueError("must be a host with an optional port; an IPv6 address stands in brackets")
    port = None if match["port"] is None else int(match["port"])
    if port is not None and port > 65535:
        raise ValueError("has a port over 65535")
    return match["host"], port


def _host(text: str) -> str:
    """Return a host in the one spelling that is compared and looked up: lower case, ASCII, no brackets."""
    try:
        if text.startswith("["):
            return _ipv6(text[1:-1])
        name = _ascii(text.lower())
        # A resolver would take 10.1 or 010.0.0.1 for some address: only the full form is meant as one.
        return str(IPv4Address(name)) if name.rstrip(".").rpartition(".")[2].isdigit() else _named(name)
    except ValueError:
        raise ValueError("has a host that is neither a name nor an address") from None


def _ipv6(text: str) -> str:
    address = IPv6Address(text)
    if address.scope_id is not None:
        raise ValueError("a zone means something on one machine only")
    return str(address)


def _named(name: str) -> str:
    if len(name) > 254 or _NAME.fullmatch(name) is None:
        raise ValueError("not a host name")
    return name


def _ascii(name: str) -> str:
    if name.isascii():
        return name
    encoded = name.encode("idna")
    # Python's codec follows IDNA 2003, which turns some letters into others: those need their xn-- form.
    if encoded.decode("idna") != name:
        raise ValueError("ambiguous in IDNA")
    return encoded.decode("ascii")
