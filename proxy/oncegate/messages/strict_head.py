"""Response heads that strict parsers refuse though they can mean only one thing: written as RFC 9112 wants them. Pure.

The API has executed the request when such a head comes, and refusing it loses its response. What two readers could
read differently stays refused. docs/reference/answers.md lists both.
"""

import re

MAX_INTERIM = 16
# The end of a head, wherever it is: an empty line.
HEAD_END = re.compile(rb"\n\r?\n")
_BEGINNING = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})[ \r\n]")
# Completes a status line of which only the first bytes have come, so that `_BEGINNING` can check these.
_ANY_BEGINNING = b"HTTP/1.1 200 "
_FINAL_STATUS = re.compile(rb"^HTTP/[0-9](?:\.[0-9])? (101|[2-9][0-9]{2})(?=[ \r\n])", re.MULTILINE)

# Control characters as the space that a proxy may put in their place (RFC 9110, section 5.5), all but the tab.
_CONTROLS = bytes(code for code in (*range(32), 127) if code != 9)
_AS_SPACES = bytes.maketrans(_CONTROLS, b" " * len(_CONTROLS))
_FRAMING = (b"content-length", b"transfer-encoding")
_BLANKS = b" \t"


def stated_status(data: bytes) -> int:
    """Return the status of the first final response in these bytes, whatever is wrong with the rest; 0 for none."""
    status = _FINAL_STATUS.search(data)
    return int(status[1]) if status else 0


def names_http(data: bytes, heads_before: int) -> bool:
    """Return whether the head that follows so many others in these bytes is one of HTTP."""
    at = 0
    for _ in range(heads_before):
        end = HEAD_END.search(data, at)
        at = end.end() if end else at
    return data[at : at + 16].lstrip(b"\r\n").startswith(b"HTTP/")


def strict_response(data: bytes) -> bytes | str | None:
    """Return a response with the same meaning and strict heads, interim ones and its body included.

    None: its final head has not come whole. A string says why the head cannot be read in one way alone.
    """
    at, heads = len(data) - len(data.lstrip(b"\r\n")), b""
    for _ in range(MAX_INTERIM + 1):
        came = data[at : at + len(_ANY_BEGINNING)]
        beginning = _BEGINNING.match(came + _ANY_BEGINNING[len(came) :])
        if beginning is None:
            return "no status line of HTTP/1.1"
        end = HEAD_END.search(data, at)
        head = _strict_head(data[at : end.end() if end else data.rfind(b"\n", at) + 1])
        if isinstance(head, str) or end is None:
            return head if isinstance(head, str) else None
        heads, at = heads + head, end.end()
        status = beginning[1]
        if status >= b"200" or status == b"101":
            return heads + data[at:]
    return "too many interim answers"


def _strict_head(head: bytes) -> bytes | str:
    """Return the lines of a head as strict ones with an empty line, or why they cannot be read in one way alone."""
    text = head.replace(b"\r\n", b"\n")
    if b"\r" in text or len(head) - len(text) not in (0, text.count(b"\n")):
        return "line ends of several kinds in the head"
    if b"\0" in text:
        return "a NUL in the head"
    first, *fields = text.rstrip(b"\n").split(b"\n")
    lines = [first.translate(_AS_SPACES)]
    length: bytes | None = None
    for field in fields:
        name, colon, value = field.partition(b":")
        # A proxy removes the space before the colon of a response's field (RFC 9112, section 5.1).
        name, value = name.rstrip(_BLANKS), value.strip(_BLANKS)
        lower = name.lower()
        if not colon or lower.startswith((b" ", b"\t")):
            return "a line that is no field in the head"
        if lower in _FRAMING and value.translate(None, _CONTROLS) != value:
            return "a control character in the framing"
        if lower == b"content-length":
            stated = {part.strip(_BLANKS) for part in value.split(b",")}
            value = stated.pop()
            if stated or length not in (None, value):
                return "several Content-Lengths that differ"
            if length is not None:
                continue
            length = value
        lines.append(name + b": " + value.translate(_AS_SPACES))
    return b"\r\n".join((*lines, b"", b""))
