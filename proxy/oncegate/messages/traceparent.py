"""The field `traceparent` of W3C Trace Context: which trace a request belongs to. Pure."""

import re
from typing import NamedTuple

# Section 3.2: version, trace id, parent id and flags; ff is no version, zeros are no id. More may follow in versions
# after 00.
_TRACEPARENT = re.compile(
    rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
# A client's `traceparent` in an open head for the upstream, and what belongs to it.
_LINE = re.compile(rb"\r\ntraceparent:[^\r\n]*", re.IGNORECASE)
_LINES = re.compile(rb"\r\ntrace(?:parent|state):[^\r\n]*", re.IGNORECASE)
SAMPLED = 1
# The flags that are passed on: sampled, and that the trace's id is random (level 2). Others must be zero.
PASSED_ON = 3


class TraceContext(NamedTuple):
    """A span's place: the ids of its trace and its own, and the trace's flags."""

    trace_id: int
    span_id: int
    flags: int

    @property
    def is_sampled(self) -> bool:
        """Whether the one before recorded its span."""
        return bool(self.flags & SAMPLED)

    @property
    def trace_text(self) -> str:
        """The trace's id in 32 hexadecimal digits."""
        return f"{self.trace_id:032x}"

    def packed(self) -> bytes:
        """Return the 25 bytes that a record keeps."""
        return self.trace_id.to_bytes(16) + self.span_id.to_bytes(8) + bytes((self.flags,))


def parse_traceparent(value: bytes) -> TraceContext | None:
    """Return what a field's value says; None where it is none, so that a new trace begins."""
    found = _TRACEPARENT.fullmatch(value)
    return TraceContext(*(int(one, 16) for one in found.groups())) if found else None


def unpacked(kept: bytes) -> TraceContext | None:
    """Return the context that a record keeps; None for other bytes than 25."""
    if len(kept) != 25:
        return None
    return TraceContext(int.from_bytes(kept[:16]), int.from_bytes(kept[16:24]), kept[24])


def with_traceparent(open_head: bytes, context: TraceContext, *, continues: bool) -> bytes:
    """Return an open head of a request (its lines, each ended) that names this span.

    `continues`: the trace is the client's. Of a new one, the client's `tracestate` would say nothing true.
    """
    head = (_LINE if continues else _LINES).sub(b"", open_head)
    return b"%btraceparent: 00-%032x-%016x-%02x\r\n" % (head, *context)
