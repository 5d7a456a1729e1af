"""A request's target, reduced to the path that rules compare. Pure."""

import re
from urllib.parse import unquote_to_bytes

_UNRESERVED = re.compile(rb"%(?:2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9AaEe]|5[Ff])")
_SLASHES = re.compile(rb"/{2,}")


def normalized_path(target: bytes) -> bytes:
    """Return the path of a target as rules see it: what means the same is the same (RFC 3986, section 6.2.2).

    Escapes of unreserved characters are undone, dot segments and doubled slashes removed, as upstreams may do;
    `%2F` stays what it is. What goes upstream is always the target as it came.
    """
    path = target.partition(b"?")[0]
    if b"%" in path:
        path = _UNRESERVED.sub(lambda escape: unquote_to_bytes(escape[0]), path)
    if b"//" in path:
        path = _SLASHES.sub(b"/", path)
    return _without_dots(path) if b"/." in path else path


def _without_dots(path: bytes) -> bytes:
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        if segment == b"..":
            del kept[-1:]
        elif segment != b".":
            kept.append(segment)
    if segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)
