"""The URL of the store: one Redis server, a master behind sentinels, a cluster, or a PostgreSQL. Pure.

Messages never repeat the refused text: a malformed URL may still contain a password.
"""

import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import quote, unquote

from oncegate.settings.addresses import parse_host_and_port
from oncegate.settings.names import parse_list
from oncegate.settings.postgres_url import is_postgres, parse_postgres_url

_REDIS_PORT = 6379

# What redis-py's own urlsplit takes apart in the same way; any other character is percent-encoded.
_USER = r"(?:[^:@/?#\[\]]*(?::[^/?#\[\]]*)?@)?"
_REDIS = re.compile(rf"rediss?://{_USER}(?P<authority>[^@/?#]+)(?:/[0-9]*|/?\?db=[0-9]+)?")
_SOCKET = re.compile(rf"redis\+unix://{_USER}/[^?#]+(?:\?db=[0-9]+)?")
_GROUP = re.compile(
    rf"redis(?P<tls>s?)\+(?P<kind>sentinel|cluster)://(?P<user>{_USER})(?P<places>[^@/?#]+)"
    r"(?:/(?P<service>[A-Za-z0-9._-]*))?(?:\?(?P<query>[^?#]+))?"
)
_LOGIN = re.compile(r"://[^:@/?]*(?::(?P<password>[^@/?]*))?@")
_SENTINEL_LOGIN = re.compile(r"(?<=[?&])sentinel_(?:user|password)=[^&]*&?")
_PASSWORD = re.compile(r"(://[^:@/]*:)[^/]*@|((?<=[?&])sentinel_password=)[^&]*")


def socket_url(data_dir: Path) -> str:
    """Return the URL on which the embedded store of a data folder listens while it runs."""
    return f"unix://{quote(os.fspath(data_dir.absolute() / 'store.sock'))}"


class GroupKind(Enum):
    """How the servers of a store find each other. The value is its spelling in the URL."""

    SENTINEL = "sentinel"
    CLUSTER = "cluster"


# The ports that the Redis documentation gives sentinels and servers.
_DEFAULT_PORTS = {GroupKind.SENTINEL: 26379, GroupKind.CLUSTER: _REDIS_PORT}


@dataclass(frozen=True, slots=True)
class ServerGroup:
    """A store of several servers.

    `scheme`: `redis` or `rediss`. `places`: `host:port` of the sentinels, or of any
    servers of the cluster. `user` and `sentinel_user`: percent-encoded `name:password@`, or empty.
    """

    kind: GroupKind
    scheme: str
    user: str
    places: tuple[str, ...]
    service: str
    db: int
    sentinel_user: str

    def server_url(self, place: str) -> str:
        """Return the URL of the server at `host:port`."""
        return f"{self.scheme}://{self.user}{place}/{self.db}"

    def sentinel_url(self, place: str) -> str:
        """Return the URL of the sentinel at `host:port`. Sentinels have users of their own."""
        return f"{self.scheme}://{self.sentinel_user}{place}"


def parse_store_url(text: str) -> str:
    """Return a store URL unchanged, if it is well-formed."""
    visible = text.isascii() and text.isprintable() and " " not in text
    try:
        unquote(text, errors="strict")
    except UnicodeDecodeError:
        # A client would put another character in the place of such an escape: another password.
        raise ValueError("has a percent escape that is not UTF-8") from None
    if is_postgres(text):
        return parse_postgres_url(text)
    if text == "embedded" or (visible and (_SOCKET.fullmatch(text) or parse_server_group(text))):
        return text
    match = _REDIS.fullmatch(text)
    if match is None or not visible:
        raise ValueError(
            "must be embedded, redis://host:port/db, rediss://host:port/db, redis+unix:///path?db=0, "
            "redis+sentinel://host:port,host:port/service, redis+cluster://host:port,host:port or "
            "postgresql://user:password@host:port/database; special characters of a user or password are "
            "percent-encoded"
        )
    parse_host_and_port(match["authority"], _REDIS_PORT)
    return text


def parse_server_group(text: str) -> ServerGroup | None:
    """Return the servers of a URL of sentinels or of a cluster; None for any other URL."""
    match = _GROUP.fullmatch(text)
    if match is None:
        return None
    kind, query = GroupKind(match["kind"]), _parse_query(match["query"] or "")
    sentinel_user = query.pop("sentinel_user", ""), query.pop("sentinel_password", "")
    db = query.pop("db", "0")
    if kind is GroupKind.SENTINEL and not match["service"]:
        raise ValueError("must name the service that the sentinels watch, such as redis+sentinel://h1:26379/mymaster")
    # Redis Cluster has the database 0 alone.
    if kind is GroupKind.CLUSTER and (match["service"] or match["query"]):
        raise ValueError("must end after the hosts: a cluster has neither a service nor a number of a database")
    if query or not db.isdecimal():
        raise ValueError("can only have db, sentinel_user and sentinel_password after its question mark")
    return ServerGroup(
        kind=kind,
        scheme=f"redis{match['tls']}",
        user=match["user"],
        places=tuple(parse_host_and_port(place, _DEFAULT_PORTS[kind]) for place in parse_list(match["places"])),
        service=match["service"] or "",
        db=int(db),
        # In a URL, `@`, `/` or `:` would end a password (RFC 3986, section 3.2.1).
        sentinel_user=":".join(quote(part, safe="") for part in sentinel_user) + "@" if any(sentinel_user) else "",
    )


def _parse_query(text: str) -> dict[str, str]:
    """Return the values of a query by their names.

    A `+` is a plus as in the rest of a URL (RFC 3986); only forms have it for a space. A name is never decoded, because
    `masked` would not know it.
    """
    parts = [part.partition("=") for part in text.split("&") if part]
    if len({name for name, _, _ in parts}) < len(parts):
        raise ValueError("has the same name twice after its question mark")
    return {name: unquote(value) for name, _, value in parts}


def servers_in(store_url: str) -> str:
    """Return a store URL without its credentials, by which URLs of the same servers are equal."""
    return _SENTINEL_LOGIN.sub("", _LOGIN.sub("://", store_url)).rstrip("?&")


def password_in(store_url: str) -> str:
    """Return the password of a well-formed store URL, as it is sent; empty for none."""
    match = _LOGIN.search(store_url)
    return unquote(match["password"] or "") if match else ""


def with_password(store_url: str, password: str) -> str:
    """Return a store URL with a password, unless it has one, or is no URL."""
    if password_in(store_url) or "://" not in store_url:
        return store_url
    scheme, rest = store_url.split("://", 1)
    user, at, servers = rest.rpartition("@")
    return f"{scheme}://{user.removesuffix(':')}:{quote(password, safe='')}@{servers if at else rest}"


def masked(store_url: str) -> str:
    """Return a well-formed store URL with its passwords replaced by ***."""
    return _PASSWORD.sub(lambda match: f"{match[1]}***@" if match[1] else f"{match[2]}***", store_url)
