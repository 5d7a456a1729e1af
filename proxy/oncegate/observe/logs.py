"""Logs: one JSON object a line on standard error, or lines for people; and the access log."""

import asyncio
import functools
import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

import structlog
from structlog.typing import EventDict

from oncegate.keys.digests import key_id
from oncegate.observe.outcome import Outcome, RequestReport

# The fields that every access line has, in their order; `reason` and `rule` follow where they are known.
FIELDS = ("outcome", "method", "status", "key_id", "duration_ms", "upstream_ms", "client_gone")
# Outcomes that `notable` leaves out.
PLAIN = frozenset(outcome.label for outcome in (Outcome.EXECUTED, Outcome.PASSTHROUGH, Outcome.PREFLIGHT))
# Outcomes that deserve a person's attention beyond the request itself; their lines are errors.
ERROR_OUTCOMES = frozenset(
    outcome.label for outcome in (Outcome.RECORD_CORRUPT, Outcome.FAILED, Outcome.FENCED, Outcome.ANSWER_NOT_STORED)
)


LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}
LEVELS["exception"] = logging.ERROR


class Threshold:
    """Drops what is below the least level, which may change."""

    def __init__(self) -> None:
        self.least = logging.INFO

    def __call__(self, _logger: Any, method: str, event: EventDict) -> EventDict:
        if LEVELS[method] < self.least:
            raise structlog.DropEvent
        return event


_threshold = Threshold()


def set_level(level: str) -> None:
    """Write what has this level, or a higher one, from now on."""
    _threshold.least = LEVELS[level]


def configure(level: str, layout: str) -> Any:
    """Set up logging for this process and return its logger. Messages of aiohttp and asyncio take the same format.

    `level` is the least level that is written, `layout` is "json" or "console".
    """
    set_level(level)
    renderer = structlog.processors.JSONRenderer() if layout == "json" else structlog.dev.ConsoleRenderer(colors=False)
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[_threshold, *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    return structlog.get_logger()


class AccessLog:
    """Writes one line for each request: `off`, `notable` (all but PLAIN outcomes) or `all`.

    JSON lines skip the logger's processors, and the lines of one turn of the event loop leave in one write: through
    the processors a line costs a fifth of a replay (measured).
    """

    def __init__(self, logger: Any, selection: str, layout: str, loop: asyncio.AbstractEventLoop) -> None:
        self._logger, self._is_json, self._loop = logger, layout == "json", loop
        self._left_out = PLAIN if selection == "notable" else frozenset[str]()
        self._is_off = selection == "off"
        self._lines: list[str] = []
        # The second that was formatted last, and its text.
        self._second, self._date = 0, ""

    def __call__(self, report: RequestReport, seconds: float, client_gone: bool) -> None:
        """Log one request that took `seconds`, unless its outcome or level is left out."""
        label = report.outcome.label
        level = "error" if label in ERROR_OUTCOMES else "info"
        if label in self._left_out or self._is_off or LEVELS[level] < _threshold.least:
            return
        if self._is_json:
            self._add(_as_json(report, seconds, client_gone, level, self._timestamp()))
        else:
            line = {
                "outcome": label,
                "method": report.method,
                "status": report.status,
                "key_id": key_id(report.key) if report.key else "",
                "duration_ms": round(seconds * 1000, 2),
                "upstream_ms": round(report.upstream_s * 1000, 2),
                "client_gone": client_gone,
            }
            getattr(self._logger, level)("request", **line, **_details(report))

    def _timestamp(self) -> str:
        """Return the time in UTC, as RFC 3339 writes it. The part up to the second is formatted once a second."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._date = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._date}.{int((now - second) * 1e6):06d}Z"

    def _add(self, line: str) -> None:
        if not self._lines:
            self._loop.call_soon(self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        """Write the lines that are waiting."""
        if self._lines:
            sys.stderr.write("\n".join((*self._lines, "")))
            sys.stderr.flush()
            self._lines.clear()


def _details(report: RequestReport) -> dict[str, str]:
    """Return the fields that only some access lines have."""
    details = {"reason": report.reason, "rule": report.rule}
    return {name: value for name, value in details.items() if value}


def _as_json(report: RequestReport, seconds: float, client_gone: bool, level: str, timestamp: str) -> str:
    """Return one access line: FIELDS in their order, and the details.

    Methods and names are quoted once and remembered, only the details can be anything. That costs 5 us less than
    json.dumps of the whole line (measured).
    """
    details = ""
    if report.reason or report.rule:
        details = "".join([f"{_quoted(name)}: {json.dumps(value)}, " for name, value in _details(report).items()])
    return (
        f'{{"outcome": "{report.outcome.label}", "method": {_quoted(report.method)}, "status": {report.status}, '
        f'"key_id": "{key_id(report.key) if report.key else ""}", "duration_ms": {seconds * 1000:.2f}, '
        f'"upstream_ms": {report.upstream_s * 1000:.2f}, "client_gone": {"true" if client_gone else "false"}, '
        f'{details}"event": "request", "level": "{level}", "timestamp": "{timestamp}"}}'
    )


# Methods come from clients: the cache is bounded.
_quoted = functools.lru_cache(256)(json.dumps)
