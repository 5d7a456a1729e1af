"""Which requests are traced, and what is noted of one on its way. Nothing here calls OpenTelemetry.

The spans of a request are made at its end, from its `Trace` and its report (`observe/spans.py`). So a request that is
not traced costs one decision.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from oncegate.messages.traceparent import (
    PASSED_ON,
    SAMPLED,
    TraceContext,
    parse_traceparent,
    unpacked,
    with_traceparent,
)

# How a `traceparent` of version 00 ends whose sender does not record the trace, and its length.
_UNSAMPLED, _LENGTH = b"-00", 55


@dataclass(slots=True)
class Attempt:
    """One sending of the request to the upstream. `error`: why no whole response came, empty where one did."""

    context: TraceContext
    began_s: float
    ended_s: float = 0.0
    status: int = 0
    error: str = ""


@dataclass(slots=True)
class Trace:
    """A request that is traced. Times in seconds of `time.perf_counter`.

    `own` is its server span, `parent` the client's span: None where the trace begins here. `epoch_ns`: when the clock
    was 0, in nanoseconds since 1970. `upstream`: the API's URL. `links`: the spans of the requests whose key it met.
    `spent_s`: how long its steps with the store took, and its waits, by name. `fence`: of its claim, 0 for none.
    """

    own: TraceContext
    parent: TraceContext | None
    began_s: float
    epoch_ns: int
    upstream: str
    attempts: list[Attempt] = field(default_factory=list)
    links: list[TraceContext] = field(default_factory=list)
    spent_s: dict[str, float] = field(default_factory=dict)
    fence: int = 0
    # What the last attempt but one failed with.
    lost: Exception | None = None
    _step_began_s: float = field(default_factory=time.perf_counter)

    def spent(self, step: str) -> None:
        """Note that the time since the step before was spent on this one."""
        now_s = time.perf_counter()
        self.spent_s[step] = self.spent_s.get(step, 0.0) + now_s - self._step_began_s
        self._step_began_s = now_s

    def claimed(self, fence: bytes, kept_before: bytes) -> None:
        """Note that the store gave the key to this request, and the span of the request that had it before."""
        self.met(kept_before)
        self.fence = int(fence)

    def met(self, kept: bytes) -> None:
        """Note a reply about the key, and the span that another request's record keeps; nothing for one untraced."""
        self.spent("claim")
        context = unpacked(kept)
        if context is not None and context not in self.links:
            self.links.append(context)

    def begin_attempt(self, open_head: bytes) -> bytes:
        """Begin to send the request to the upstream. Return its open head, which names this attempt's span."""
        context = self.own._replace(span_id=_span_id())
        self.attempts.append(Attempt(context, time.perf_counter()))
        return with_traceparent(open_head, context, continues=self.parent is not None)

    def end_attempt(self, status: int, error: str) -> None:
        """Note how an attempt ended: the status that came, 0 for none, and what broke it. With neither it was none."""
        self._step_began_s = time.perf_counter()
        if not status and not error:
            self.attempts.pop()
            return
        attempt = self.attempts[-1]
        attempt.ended_s, attempt.status, attempt.error = self._step_began_s, status, error


class Tracing:
    """Decides which requests are traced: those whose client traces them, and a share of the others.

    No more than `rate_per_s` in a second, whoever asks: a client may say what it likes. `limited` is called for the
    requests beyond that.
    """

    def __init__(
        self,
        rate_per_s: float,
        ratio: float,
        limited: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate_per_s, self.ratio, self._clock = rate_per_s, ratio, clock
        self._most = self._left = max(1.0, rate_per_s)
        self._filled_s = clock()
        self._limited = limited

    def sample(self, traceparent: bytes, drawn: float) -> tuple[TraceContext, TraceContext | None] | None:
        """Return the span of a request and the span of its client; None where it is not traced.

        `traceparent`: the value of the field, empty for none or several. `drawn`: a random number from 0 to 1. A
        request without a trace whose number is not below `ratio` is not traced.
        """
        parent = None
        if traceparent:
            # Most end like this.
            if traceparent[-3:] == _UNSAMPLED and len(traceparent) == _LENGTH:
                return None
            parent = parse_traceparent(traceparent)
        if parent is None:
            if drawn >= self.ratio:
                return None
        elif not parent.is_sampled:
            return None
        if not self._take():
            self._limited()
            return None
        if parent is None:
            return TraceContext(random.getrandbits(128) or 1, _span_id(), SAMPLED), None
        return TraceContext(parent.trace_id, _span_id(), parent.flags & PASSED_ON), parent

    def _take(self) -> bool:
        """Take one from the bucket, which fills at the rate up to one second's."""
        now_s = self._clock()
        self._left = min(self._most, self._left + (now_s - self._filled_s) * self._rate_per_s)
        self._filled_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


def new_trace(contexts: tuple[TraceContext, TraceContext | None], began_s: float, upstream: str) -> Trace:
    """Return the trace of a request whose head came at `began_s`; `upstream` is the URL of its API."""
    epoch_ns = time.time_ns() - int(time.perf_counter() * 1e9)
    return Trace(*contexts, began_s, epoch_ns, upstream)


def _span_id() -> int:
    return random.getrandbits(64) or 1
