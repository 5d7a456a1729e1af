"""Reads what an operator pastes to find a record: an id, a key, or a whole request."""

import re
from dataclasses import dataclass

from oncegate.operating.errors import usage_error
from oncegate.operating.find_record import MIN_ID_CHARACTERS
from oncegate.operating.request_identity import AskedRequest
from oncegate.store.record_name import RECORD_ID

# RFC 9112, section 3; the version is often left out.
_REQUEST_LINE = re.compile(r"(?P<method>[A-Za-z]+) (?P<url>\S+)(?: HTTP/[0-9.]+)?")
# As logs and lists may shorten an id.
_ID_PREFIX = re.compile(rf"[A-Za-z0-9_-]{{{MIN_ID_CHARACTERS},32}}")


@dataclass(frozen=True, slots=True)
class Pasted:
    """What a text may be: a request, or a word. A word may be a key, and also the beginning of an id."""

    word: str = ""
    request: AskedRequest | None = None

    @property
    def is_id(self) -> bool:
        """Whether the word is a whole id."""
        return RECORD_ID.fullmatch(self.word) is not None

    @property
    def may_begin_id(self) -> bool:
        return _ID_PREFIX.fullmatch(self.word) is not None


def read_pasted(text: str) -> Pasted:
    """Return what the text is. Raises OperatorError, whose text repeats nothing of it: it may have a credential."""
    head, _, body = text.strip("\r\n").replace("\r\n", "\n").partition("\n\n")
    first, *lines = head.split("\n")
    match = _REQUEST_LINE.fullmatch(first.strip())
    if match is None:
        if lines or body:
            raise usage_error("a request begins with a line such as: POST /v1/charges")
        # Its name in the store has the id in a frame.
        return Pasted(first.strip().removeprefix("once:{").removesuffix("}"))
    headers = header_lines("\n".join(lines))
    return Pasted(request=AskedRequest(match["method"], match["url"], headers, body.encode("utf-8", "surrogateescape")))


def header_lines(text: str) -> list[str]:
    """Return header fields, one a line. Raises OperatorError, whose text repeats nothing of them."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        name, colon, _ = line.partition(":")
        if not colon or not name.strip():
            raise usage_error(f"line {number} of the header is no field: write Idempotency-Key: abc")
    return lines
