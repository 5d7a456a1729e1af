"""Patterns of rules: globs for paths, hosts and header values, and whether one includes another. Pure.

Matching takes time linear in the text, whatever the pattern: within a segment, and between two `**`, the leftmost
place is always as good as any other. So the expressions use atomic groups, which never try a second place.
"""

import re
from functools import cache

from oncegate.messages.target import normalized_path

# A whole segment that matches any number of segments, or none.
MANY = "**"

_PATH = re.compile(r"(?:/[!-~]*)+")
_HOST = re.compile(r"(?:\*\.)?(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def parse_path(text: str) -> str:
    """Return a well-formed path pattern: `*` within a segment is any text, `**` as a segment any number of segments."""
    if _PATH.fullmatch(text) is None or "?" in text or "#" in text:
        raise ValueError("must be a path that begins with /, in visible ASCII, without ? and #")
    if any(MANY in segment and segment != MANY for segment in text.split("/")):
        raise ValueError("has ** beside other characters; ** is a whole segment, as in /v1/**")
    # Requests are matched by their normalized path, to which such a pattern would never be equal.
    if normalized_path(text.encode()) != text.encode():
        raise ValueError("has dot segments, doubled slashes or escapes of unreserved characters; write the plain path")
    return text


def parse_host_pattern(text: str) -> str:
    """Return a host pattern in lower case: a host with or without a port, `*.` before it for any subdomain."""
    if _HOST.fullmatch(text.lower()) is None:
        raise ValueError("must be a host such as api.example.com, *.example.com or localhost:8080")
    return text.lower()


def path_matcher(pattern: str) -> re.Pattern[bytes]:
    """Return an expression that matches, with `fullmatch`, the normalized paths of a pattern."""
    parts = re.split(r"/\*\*(?=/|\Z)", pattern)
    first, rest = parts[0], parts[1:]
    if not rest:
        return re.compile(_segments(first))
    # Between two `**`, the shortest run of segments that leads to the next literal part is as good as any longer one.
    middle = [rb"(?>(?:/[^/]*)*?" + _segments(part) + rb")" for part in rest[:-1]]
    return re.compile(_segments(first) + b"".join(middle) + rb"(?:/[^/]*)*" + _segments(rest[-1]))


def _segments(text: str) -> bytes:
    # `*` stays within its segment.
    return b"/".join(_glob(segment, rb"[^/]", rb"(?=/|\Z)") for segment in text.split("/"))


def text_matcher(pattern: str) -> re.Pattern[bytes]:
    """Return an expression that matches, with `fullmatch`, the values of a glob, in which `*` is any text."""
    return re.compile(_glob(pattern, rb".", rb"\Z"), re.DOTALL)


def _glob(pattern: str, any_: bytes, end: bytes) -> bytes:
    """Return the expression of a glob: `any_` matches a character of `*`, `end` where the glob has to end."""
    first, *rest = (re.escape(part.encode()) for part in re.split(r"\*+", pattern))
    if not rest:
        return first + end
    leftmost = [b"(?>" + any_ + b"*?" + part + b")" for part in rest[:-1]]
    return first + b"".join(leftmost) + any_ + b"*" + rest[-1] + end


def path_includes(outer: str | None, inner: str | None) -> bool:
    """Return whether every path that `inner` matches is surely matched by `outer`; None matches any."""
    if outer is None or outer in ("/**", inner):
        return True
    return inner is not None and _includes(tuple(outer.split("/")[1:]), tuple(inner.split("/")[1:]))


# A path with many `**` reaches the same pair of rests in many ways.
@cache
def _includes(outer: tuple[str, ...], inner: tuple[str, ...]) -> bool:
    if not outer:
        return not inner
    if outer[0] == MANY:
        return _includes(outer[1:], inner) or (bool(inner) and _includes(outer, inner[1:]))
    if not inner or inner[0] == MANY:
        return False
    return text_includes(outer[0], inner[0]) and _includes(outer[1:], inner[1:])


def text_includes(outer: str, inner: str) -> bool:
    """Return whether every text that the glob `inner` matches is surely matched by the glob `outer`.

    A `*` in `inner` can only meet a wildcard of `outer`, which takes any text in its place. So the glob itself is
    matched like a text.
    """
    return text_matcher(outer).fullmatch(inner.encode()) is not None


def host_matches(pattern: str, host: str) -> bool:
    """Return whether a pattern matches a lower-case Host field. A pattern without a port matches any port."""
    # The colons of an IPv6 address are within its brackets.
    if ":" not in pattern.rpartition("]")[2]:
        host = host[: host.index("]") + 1] if host.startswith("[") else host.partition(":")[0]
    # `*.example.com` needs a subdomain: it does not match example.com itself.
    return host.endswith(pattern[1:]) and len(host) >= len(pattern) if pattern.startswith("*.") else host == pattern


def host_includes(outer: str | None, inner: str | None) -> bool:
    """Return whether every host that `inner` matches is surely matched by `outer`; None matches any."""
    if outer is None or outer == inner:
        return True
    return inner is not None and host_matches(outer, inner)
