"""The credentials of a rule's probes: header fields from a file, one `Name: value` a line.

No message repeats anything of the file but a field's name that is refused.
"""

import os
import re

from oncegate.messages.fields import HOP_BY_HOP
from oncegate.settings.files import MAX_SECRET_BYTES, read_text

_LINE = re.compile(r"(?P<name>[A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*(?P<value>[!-~](?:[ -~\t]*[!-~])?)[ \t]*", re.ASCII)
# What oncegate writes itself: framing, the connection, the host, and how an answer is to be coded.
_OWN = frozenset(name.decode() for name in HOP_BY_HOP - {b"proxy-authorization"}) | {
    *("content-length", "content-type", "host", "accept-encoding", "expect"),
    *("cache-control", "range", "if-none-match", "if-modified-since"),
}


def read_credentials(path: str | os.PathLike[str]) -> tuple[tuple[str, str], ...]:
    """Return the fields in a file. Raises ValueError with the reason, which has nothing secret."""
    # Only these: `splitlines` would take other characters for line ends, too.
    lines = read_text(path, MAX_SECRET_BYTES).replace("\r\n", "\n").split("\n")
    fields: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip(" \t"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not `Name: value` in visible ASCII characters")
        name = match["name"].lower()
        if name in _OWN:
            raise ValueError(f"line {number} has {match['name']}, which oncegate writes itself")
        if name in fields:
            raise ValueError(f"line {number} has {match['name']} a second time")
        fields[name] = match["name"], match["value"]
    # A mount may have failed.
    if not fields:
        raise ValueError("has no header field")
    return tuple(fields.values())
