"""The URL of a store in PostgreSQL, as libpq spells it: one server, or all members of a cluster. Pure.

Messages never repeat the refused text: a malformed URL may still contain a password.
"""

import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from oncegate.settings.addresses import parse_host_and_port
from oncegate.settings.names import parse_list

SCHEMES = ("postgresql://", "postgres://")
_PORT = 5432
_URL = re.compile(
    r"postgres(?:ql)?://(?P<user>[^:@/?#\[\]]+)(?::[^:@/?#\[\]]*)?@(?P<places>[^@/?#]*)"
    r"/(?P<name>[^/?#]*)(?:\?(?P<query>[^#]*))?"
)
_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_VERIFYING = ("verify-ca", "verify-full")
# Parts of a query that name a file.
_FILES = ("sslrootcert", "sslcert", "sslkey")
# 63 bytes is the longest name of PostgreSQL, and those of pg_ are its own.
_SCHEMA = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,62}")
_QUERY = {"host", "port", "sslmode", *_FILES}


def is_postgres(store_url: str) -> bool:
    """Return whether a store URL names a PostgreSQL."""
    return store_url.startswith(SCHEMES)


def parse_postgres_url(text: str) -> str:
    """Return a URL of PostgreSQL unchanged, if it is well-formed."""
    match = _URL.fullmatch(text)
    if match is None or not (text.isascii() and text.isprintable() and " " not in text):
        raise ValueError(
            "must be postgresql://user:password@host:port/database, with commas between several host:port; special "
            "characters of a user or password are percent-encoded"
        )
    if not match["name"]:
        raise ValueError("must name the database after the hosts, such as postgresql://oncegate@db:5432/oncegate")
    query = _parse_query(match["query"] or "")
    _check_places(match["places"], query)
    _check_tls(query)
    return text


def parse_schema(text: str) -> str:
    """Return the name of a schema, which needs no quotes in SQL."""
    if not _SCHEMA.fullmatch(text):
        raise ValueError("must be a name of lower-case letters, digits and _, at most 63, that does not begin with pg_")
    return text


def user_of(store_url: str) -> str:
    """Return the user of a URL of PostgreSQL, empty for any other URL."""
    match = _URL.fullmatch(store_url)
    return unquote(match["user"]) if match else ""


def files_of(store_url: str) -> dict[str, str]:
    """Return the paths of the files that a well-formed URL of PostgreSQL names, by their names in the query."""
    query = _parse_query(store_url.partition("?")[2])
    return {name: query[name] for name in _FILES if name in query}


def with_files(store_url: str, files: Mapping[str, str]) -> str:
    """Return a URL of PostgreSQL that names these files, by the parts of its query, and checks the server's name.

    What the URL says itself stays.
    """
    parts = [part for part in store_url.partition("?")[2].split("&") if part]
    names = {part.partition("=")[0] for part in parts}
    parts += [f"{name}={quote(path)}" for name, path in files.items() if name not in names]
    if "sslrootcert" in files and "sslmode" not in names:
        parts.append("sslmode=verify-full")
    return store_url.partition("?")[0] + ("?" if parts else "") + "&".join(parts)


def _parse_query(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in text.split("&") if part]
    query = {name: unquote(value) for name, _, value in parts}
    if len(query) < len(parts):
        raise ValueError("has the same name twice after its question mark")
    # A password is not among them: it belongs before the hosts, where logs hide it.
    if not query.keys() <= _QUERY or "+" in text:
        raise ValueError(f"can only have {', '.join(sorted(_QUERY))} after its question mark, and no plus in them")
    return query


def _check_places(places: str, query: dict[str, str]) -> None:
    if places:
        if not query.keys().isdisjoint(("host", "port")):
            raise ValueError("names its hosts twice: before the database, and after the question mark")
        for place in parse_list(places):
            parse_host_and_port(place, _PORT)
    elif not query.get("host", "").startswith("/") or not query.get("port", str(_PORT)).isdecimal():
        raise ValueError("must name a host, or the folder of a Unix socket: postgresql://user@/db?host=/run/postgresql")


def _check_tls(query: dict[str, str]) -> None:
    mode = query.get("sslmode", "prefer")
    if mode not in _MODES:
        raise ValueError(f"has an sslmode that is none of {', '.join(_MODES)}")
    # With another mode the driver would encrypt to whoever answers, and an operator would believe in the file.
    if "sslrootcert" in query and mode not in _VERIFYING:
        raise ValueError("has an sslrootcert, which counts only with sslmode=verify-full (or verify-ca)")
    if mode in _VERIFYING and "sslrootcert" not in query:
        raise ValueError(f"needs an sslrootcert for sslmode={mode}: the file of the certificate authorities to trust")
    if ("sslcert" in query) != ("sslkey" in query):
        raise ValueError("needs both sslcert and sslkey, or neither")
