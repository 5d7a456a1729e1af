"""The response that an operator gives for a key with an unknown outcome."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import NamedTuple

from oncegate.messages.response_head import ResponseHead, read_response_head
from oncegate.operating.errors import usage_error
from oncegate.store.record import StoredResponse

# One chunk in the store: the decision is one command.
MAX_BODY_BYTES = 262144
# RFC 9110, section 5.6.2: the characters of a token, of which a field name consists.
_TOKEN = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~")


class OperatorResponse(NamedTuple):
    """`stored` has no digest and no time of completion yet; `body` is its whole body."""

    stored: StoredResponse
    body: bytes


def operator_response(status: int, headers: Sequence[str], body: bytes) -> OperatorResponse:
    """Return the response that an operator describes. `headers`: lines `Name: value`. Raises OperatorError."""
    if len(body) > MAX_BODY_BYTES:
        raise usage_error(f"the body of an operator's response has at most {MAX_BODY_BYTES} bytes")
    head = _head(status, headers)
    if head.bodiless and body:
        # A client takes bytes behind a 204 or a 304 for the next response (RFC 9112, section 6.3).
        raise usage_error(f"a response with status {status} has no body")
    stored = StoredResponse(
        status=status,
        reason=_reason(status),
        block=head.replayed_block,
        digest=b"",
        chunks=1 if body else 0,
        size=len(body),
        body_stored=True,
        close_delimited=False,
        stated_length=head.bodiless,
        completed_ms=0,
        took_ms=0,
        age_s=0,
    )
    return OperatorResponse(stored, body)


def _head(status: int, headers: Sequence[str]) -> ResponseHead:
    pairs = [_header(line) for line in headers]
    head = read_response_head(status, _reason(status), pairs, head_only=False)
    if isinstance(head, str):
        raise usage_error(f"this response is not possible: {head}")
    # A replay has the stored body's length, or the framing of its own connection (RFC 9112, section 6).
    if b"transfer-encoding" in head.fields or b"content-length" in head.fields:
        raise usage_error("oncegate sets the framing itself: leave Content-Length and Transfer-Encoding out")
    return head


def _reason(status: int) -> bytes:
    """Return the standard reason phrase (RFC 9110, section 15); empty for an unregistered status."""
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


def _header(line: str) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(":")
    if not colon or not name or not set(name) <= _TOKEN:
        raise usage_error(f"{line!r} is not of the form 'Name: value'")
    return name.encode(), value.strip().encode("utf-8")
