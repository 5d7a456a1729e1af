"""An answer that an operator gives by hand."""

import argparse
from http import HTTPStatus
from pathlib import Path

from oncegate.commands.find_record import ALPHABET
from oncegate.commands.refusal import WRONG, Refusal
from oncegate.messages.response_head import read_response_head
from oncegate.store.record import StoredResponse

MAX_BODY_BYTES = 262144  # one chunk
_TOKEN = set(ALPHABET + "!#$%&'*+.^`|~")  # RFC 9110, 5.6.2


def given(options: argparse.Namespace) -> tuple[StoredResponse, bytes]:
    """Return the answer that is given by hand, its digest still to come, and its body."""
    body = _body(options.body_file)
    pairs = [_header(line) for line in options.header]
    try:
        reason = HTTPStatus(options.status).phrase.encode()
    except ValueError:
        reason = b""
    head = read_response_head(options.status, reason, pairs, head_only=False)
    if isinstance(head, str):
        raise Refusal(f"no such answer is possible: {head}", WRONG)
    if b"transfer-encoding" in head.fields or b"content-length" in head.fields:
        raise Refusal("the framing is not yours to give: leave Content-Length and Transfer-Encoding out", WRONG)
    if head.bodiless and body:
        raise Refusal(f"an answer of status {options.status} has no body", WRONG)
    block = head.replayed_block
    chunks = 1 if body else 0
    return StoredResponse(
        options.status, reason, block, b"", chunks, len(body), True, False, head.bodiless, 0, 0, 0
    ), body  # fmt: skip


def _body(name: str | None) -> bytes:
    if name is None:
        return b""
    try:
        body = Path(name).read_bytes()
    except OSError as error:
        raise Refusal(f"{name}: {error.strerror}", WRONG) from None
    if len(body) > MAX_BODY_BYTES:
        raise Refusal(f"{name}: an answer given by hand has at most {MAX_BODY_BYTES} bytes", WRONG)
    return body


def _header(line: str) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(":")
    if not colon or not name or not set(name) <= _TOKEN:
        raise Refusal(f"{line!r} is not of the form 'Name: value'", WRONG)
    return name.encode(), value.strip().encode("utf-8")
