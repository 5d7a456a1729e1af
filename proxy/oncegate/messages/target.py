"""The path of a request's target and its host, in the normal forms that rules compare. Pure."""

import re
from urllib.parse import unquote_to_bytes

# Escapes of unreserved characters: letters, digits, "-", ".", "_" and "~" (RFC 3986, section 2.3).
_UNRESERVED = re.compile(rb"%(?:2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9AaEe]|5[Ff])")
_FINAL_DOT = re.compile(rb"\.(?=(?::[0-9]*)?\Z)")
# Of a path in a log: a client can send 60,000.
MAX_LOGGED_CHARACTERS = 1024
_SLASHES = re.compile(rb"/{2,}")


def normalized_host(host: bytes) -> bytes:
    """Return a host, with or without a port, in small letters and without the dot that ends a full name.

    `api.test.` and `api.test` are the same host (RFC 3986, section 3.2.2).
    """
    return _FINAL_DOT.sub(b"", host.lower())


def logged_path(target: bytes | str) -> str:
    """Return the path of a target, also of one that was refused: without its query, its host and who asks there."""
    text = target if isinstance(target, str) else target.decode("utf-8", "backslashreplace")
    path = text.partition("?")[0].partition("#")[0]
    if "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    return path if len(path) <= MAX_LOGGED_CHARACTERS else path[:MAX_LOGGED_CHARACTERS] + "..."


def normalized_path(target: bytes) -> bytes:
    """Return the path of a target in normal form, so that equivalent paths are equal (RFC 3986, section 6.2.2).

    Escapes of unreserved characters are decoded, dot segments and doubled slashes removed, because upstreams may
    do the same; `%2F` stays as it is. This is for matching alone: the upstream gets the target as received.
    """
    path = target.partition(b"?")[0]
    if b"%" in path:
        path = _UNRESERVED.sub(lambda escape: unquote_to_bytes(escape[0]), path)
    if b"//" in path:
        path = _SLASHES.sub(b"/", path)
    return _without_dots(path) if b"/." in path else path


def _without_dots(path: bytes) -> bytes:
    # RFC 3986, section 5.2.4: ".." removes the segment before it, and a dot segment at the end leaves a slash.
    result: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        if segment == b"..":
            del result[-1:]
        elif segment != b".":
            result.append(segment)
    if segments[-1] in (b".", b".."):
        result.append(b"")
    return b"/" + b"/".join(result)
