"""What names a request beside its key: its request id, and the trace that it belongs to. Pure."""

import re

TRACEPARENT = b"traceparent"
# W3C Trace Context, section 3.2: version, trace id, parent id and flags, and more in later versions. Zeros are no id.
_TRACEPARENT = re.compile(
    rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)


def trace_id(traceparent: bytes) -> str:
    """Return the trace id in the value of `traceparent`, 32 hexadecimal digits; empty where it is malformed."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return found[1].decode() if found else ""
