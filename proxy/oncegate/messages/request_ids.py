"""What names a request beside its key: its request id, and the trace that it belongs to. Pure."""

import re
import secrets
from itertools import count

from oncegate.messages.traceparent import parse_traceparent

# What is taken from a client: visible ASCII, which no log, header or shell breaks at.
_taken = re.compile(rb"[!-~]{1,128}").fullmatch

TRACEPARENT = b"traceparent"


def trace_id(traceparent: bytes) -> str:
    """Return the trace id in the value of `traceparent`, 32 hexadecimal digits; empty where it is malformed."""
    context = parse_traceparent(traceparent) if traceparent else None
    return "" if context is None else context.trace_text


class RequestIds:
    """The ids of requests: what a client sent in `header`, or one that is made. An empty `header`: there are none.

    `name`: of the header, in lower case; `label`: how its line begins.
    """

    def __init__(self, header: str) -> None:
        self.name = header.lower().encode()
        self._line_start = b"\r\n%b:" % self.name
        self.label = header.encode() + b": "
        # A random one for each request costs more than all else that is done for its id (`uuid4`: 12k instructions).
        self._prefix, self._numbers = secrets.token_hex(8).encode() + b"-", count(1)

    def given(self, value: bytes) -> bytes:
        """Return the id of a request whose header has this value: a new one in the place of one that is malformed."""
        if value and _taken(value):
            return value
        # As `new`, in one call: every request comes here.
        return b"%b%x" % (self._prefix, next(self._numbers)) if self.name else b""

    def new(self) -> bytes:
        """Return an id that no other request has; nothing where there are none."""
        return b"%b%x" % (self._prefix, next(self._numbers)) if self.name else b""

    def is_in(self, block: bytes) -> bool:
        """Return whether a block of fields, each line ended, has the header."""
        # Not `in`: see `adaptation._depends`.
        lowered = block.lower()
        return lowered.find(self._line_start) >= 0 or lowered.startswith(self._line_start[2:])

    def line(self, request_id: bytes) -> bytes:
        """Return the header's line, ended; nothing for no id."""
        return b"%b%b\r\n" % (self.label, request_id) if request_id else b""
