"""What names a request beside its key: its request id, and the trace that it belongs to. Pure."""

from oncegate.messages.traceparent import parse_traceparent

TRACEPARENT = b"traceparent"


def trace_id(traceparent: bytes) -> str:
    """Return the trace id in the value of `traceparent`, 32 hexadecimal digits; empty where it is malformed."""
    context = parse_traceparent(traceparent) if traceparent else None
    return "" if context is None else context.trace_text
