"""The head of a response that no API sent: an operator or a rule describes it. Pure."""

import re
from collections.abc import Iterable
from http import HTTPStatus

from oncegate.messages.response_head import ResponseHead, read_response_head

# RFC 9110, section 5.6.2.
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def given_head(status: int, lines: Iterable[str], has_body: bool) -> ResponseHead | str:
    """Return the head of a response with these lines `Name: value`; a text says why there is none."""
    pairs = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or _NAME.fullmatch(name) is None:
            return f"{line!r} is not of the form 'Name: value'"
        pairs.append((name.encode(), value.strip().encode("utf-8", "surrogateescape")))
    head = read_response_head(status, _reason(status), pairs, head_only=False)
    if isinstance(head, str):
        return f"this response is not possible: {head}"
    # A replay has the stored body's length, or the framing of its own connection (RFC 9112, section 6).
    if b"transfer-encoding" in head.fields or b"content-length" in head.fields:
        return "oncegate sets the framing itself: leave Content-Length and Transfer-Encoding out"
    # A client takes bytes behind a 204 or a 304 for the next response (RFC 9112, section 6.3).
    return f"a response with status {status} has no body" if head.bodiless and has_body else head


def _reason(status: int) -> bytes:
    """Return the standard reason phrase (RFC 9110, section 15); empty for an unregistered status."""
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
