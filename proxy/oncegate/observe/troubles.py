"""Warnings about requests that failed for a reason of the upstream, the store or a limit: whatever the access log has.

Where many of a kind fail, the first one has a line at once, and then the newest of each second, which says how many
others there were. A key whose outcome became unknown always has a line, because somebody has to decide it.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from oncegate.keys.digests import key_id
from oncegate.observe.labels import SettlementLabel, Unguarded
from oncegate.observe.outcome import Outcome, RequestReport

# For so long after a line, the others of its kind are counted only.
PERIOD_S = 1.0
UNKNOWN: Final = "outcome unknown"
# The event of a line, by the outcome of its request. Empty: only if its key is unknown now, or it was not guarded
# because of the store.
EVENTS: Final = {
    Outcome.UPSTREAM_UNREACHABLE.label: "upstream failed",
    Outcome.UPSTREAM_LOST.label: "upstream failed",
    Outcome.UPSTREAM_TIMEOUT.label: "upstream failed",
    Outcome.TRUNCATED.label: "upstream failed",
    Outcome.STORE_UNAVAILABLE.label: "store failed",
    Outcome.ANSWER_NOT_STORED.label: "store failed",
    Outcome.OVERLOADED.label: "overloaded",
    Outcome.UNGUARDED.label: "",
    Outcome.UNKNOWN.label: "",
    Outcome.CANCELLED.label: "",
    Outcome.FAILED.label: "",
    Outcome.CLIENT_GONE.label: "",
}
_UNKNOWN: Final = frozenset((SettlementLabel.UNKNOWN, SettlementLabel.CANCELLED))
# Beside Outcome.UNKNOWN, where no failure says why.
_DOUBTFUL: Final = "the status of the response does not tell the outcome"


@dataclass(slots=True)
class _Kind:
    """Lines of one kind in one period: what the newest one says that is not written yet, and how many there were."""

    newest: dict[str, Any] | None = None
    count: int = 0


class BoundedLog:
    """Writes warnings, of each kind one in a period: the first at once, and then the newest with how many others there
    were. `log` is a logger of structlog."""

    def __init__(self, log: Any, loop: asyncio.AbstractEventLoop, period_s: float) -> None:
        self._log, self._loop, self._period_s = log, loop, period_s
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def write(self, event: str, of: str, fields: dict[str, Any]) -> None:
        """Write a line, or count it. Lines of one kind have the same event, and are `of` the same."""
        name = event, of
        if (kind := self._kinds.get(name)) is not None:
            kind.newest, kind.count = fields, kind.count + 1
            return
        self._kinds[name] = _Kind()
        self._log.warning(event, **fields)
        self._loop.call_later(self._period_s, self._end_period, name)

    def _end_period(self, name: tuple[str, str]) -> None:
        kind = self._kinds.pop(name, None)
        if kind is not None and kind.newest is not None:
            self._kinds[name] = _Kind()
            self._log.warning(name[0], **kind.newest, left_out=kind.count - 1)
            self._loop.call_later(self._period_s, self._end_period, name)

    def flush(self) -> None:
        """Write what waits for the end of its period."""
        for name, kind in self._kinds.items():
            if kind.newest is not None:
                self._log.warning(name[0], **kind.newest, left_out=kind.count - 1)
        self._kinds.clear()


class TroubleLog:
    """Writes the warnings. `log` is a logger of structlog."""

    def __init__(self, log: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._log, self._bounded = log, BoundedLog(log, loop, PERIOD_S)
        self.flush = self._bounded.flush

    def __call__(self, report: RequestReport) -> None:
        """Write a line about one request, if it failed so."""
        event = EVENTS.get(report.outcome.label)
        if event is None:
            return
        if not _UNKNOWN.isdisjoint(report.settlements):
            self._log.warning(UNKNOWN, **_fields(report))
            return
        if report.unguarded is Unguarded.STORE:
            event = "store failed"
        if event:
            self._bounded.write(event, report.upstream, _fields(report))


def _fields(report: RequestReport) -> dict[str, Any]:
    """Return what a line says of a request, but for what is empty."""
    asked = report.asked
    problem = asked.problem if asked is not None else None
    fields = {
        "outcome": report.outcome.label,
        "status": report.status,
        "upstream": report.upstream,
        "rule": report.rule,
        "reason": reason_of(report) or (_DOUBTFUL if report.outcome is Outcome.UNKNOWN else ""),
        "problem": problem.slug if problem is not None else "",
        "key_id": key_id(report.key) if report.key else "",
        "request_id": asked.request_id if asked is not None else "",
        "trace_id": trace_id_of(report),
    }
    return {name: value for name, value in fields.items() if value != ""}


def reason_of(report: RequestReport) -> str:
    """Return why a request ended as it did; empty where its outcome says it all."""
    if report.reason:
        return report.reason
    why = report.unguarded or report.unguarded_key
    if why is not None:
        return why.label
    problem = report.asked.problem if report.asked is not None else None
    return problem.detail if problem is not None else ""


def trace_id_of(report: RequestReport) -> str:
    """Return the id of the trace that a request belongs to; empty for none."""
    if report.trace is not None:
        return report.trace.own.trace_text
    return report.asked.trace_id if report.asked is not None else ""
