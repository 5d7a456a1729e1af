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

    `name`: of the header, in lower case.
    """

    def __init__(self, header: str) -> None:
        self.name = header.lower().encode()
        self._line_start = b"\r\n%b:" % self.name
        self._label = header.encode() + b": "
        # A random one for each request costs more than all else that is done for its id (`uuid4`: 12k instructions).
        self._prefix, self._numbers = secrets.token_hex(8).encode() + b"-", count(1)

    def of(self, value: bytes) -> tuple[bytes, bytes]:
        """Return the id of a request whose header has this value, and the line that says it.

        It is a new one, which no other request has, in the place of a value that is malformed or empty. Both are empty
        where there are no ids.
        """
        if not value or not _taken(value):
            if not self.name:
                return b"", b""
            value = b"%b%x" % (self._prefix, next(self._numbers))
        return value, b"%b%b\r\n" % (self._label, value)

    def of_replay(self, own_id: bytes, original_id: bytes, stored_block: bytes) -> bytes:
        """Return the fields that a replay has of ids: its request's under our name, the original's under the usual.

        `stored_block`: the API's fields, among which its own word for the id counts. `original_id` may be empty.
        """
        if not own_id:
            return b""
        lowered = stored_block.lower()
        # Not `in`: see `Adaptation.adapts_replay`.
        is_in = lowered.find(self._line_start) >= 0 or lowered.startswith(self._line_start[2:])
        if not original_id or is_in:
            return b"Oncegate-Request-Id: %b\r\n" % own_id
        return b"Oncegate-Request-Id: %b\r\n%b%b\r\n" % (own_id, self._label, original_id)
