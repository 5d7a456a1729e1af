"""Logs: one JSON object a line on standard error, or lines for people; and the access log."""

import asyncio
import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Final

import structlog
from structlog.typing import EventDict

from oncegate.keys.digests import key_id
from oncegate.observe.outcome import BY_LABEL, Outcome, RequestReport
from oncegate.observe.troubles import EVENTS, TroubleLog, reason_of, trace_id_of

# The fields that every access line has, in their order.
FIELDS = ("outcome", "method", "status", "key_id", "request_id", "client", "duration_ms", "upstream_ms", "client_gone")
# Those that follow where there is something to say.
DETAILS = ("path", "rule", "upstream", "trace_id", "problem", "reason")
# Bound once, as in `outcome`.
_REPLAYED: Final = Outcome.REPLAYED
# Outcomes that `notable` leaves out.
PLAIN = frozenset(outcome.label for outcome in (Outcome.EXECUTED, Outcome.PASSTHROUGH, Outcome.PREFLIGHT))
# Outcomes that deserve a person's attention beyond the request itself; their lines are errors.
ERROR_OUTCOMES = frozenset(
    outcome.label for outcome in (Outcome.RECORD_CORRUPT, Outcome.FAILED, Outcome.FENCED, Outcome.ANSWER_NOT_STORED)
)


LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}
LEVELS["exception"] = logging.ERROR


AUDIT = "audit"


class Threshold:
    """Drops what is below the least level, which may change. Who decided what about a key is always written."""

    def __init__(self) -> None:
        self.least = logging.INFO

    def __call__(self, _logger: Any, method: str, event: EventDict) -> EventDict:
        if LEVELS[method] < self.least and event["event"] != AUDIT:
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
    """Writes one line for each request: `off`, `notable` (all but PLAIN outcomes) or `all`. And the warnings about
    those that failed, see `troubles`.

    JSON lines skip the logger's processors, and the lines of one turn of the event loop leave in one write: through
    the processors a line costs a fifth of a replay (measured).
    """

    def __init__(self, logger: Any, selection: str, layout: str, shows_path: Callable[[str], bool]) -> None:
        """`shows_path`: whether lines of requests under a rule, by its name, have their path."""
        self._logger, self._is_json, self._loop = logger, layout == "json", asyncio.get_running_loop()
        self._left_out = {"notable": PLAIN, "off": frozenset(BY_LABEL)}.get(selection, frozenset[str]())
        self._shows_path, self._troubles = shows_path, TroubleLog(logger, self._loop)
        self._lines: list[str] = []
        # The second that was formatted last, and its text.
        self._second, self._date = 0, ""

    def add(self, report: RequestReport, seconds: float, client_gone: bool) -> None:
        """Log one request that took `seconds`, unless its outcome or level is left out."""
        label = report.outcome.label
        if label in EVENTS:
            self._troubles(report)
        if label in self._left_out:
            return
        level = "error" if label in ERROR_OUTCOMES else "info"
        if LEVELS[level] < _threshold.least:
            return
        # The same line for people, too.
        line = _as_json(report, seconds, client_gone, self._shows_path(report.rule))
        if self._is_json:
            self._append(f'{{{line}"event": "request", "level": "{level}", "timestamp": "{self._timestamp()}"}}')
        else:
            getattr(self._logger, level)("request", **json.loads(f"{{{line.removesuffix(', ')}}}"))

    def _timestamp(self) -> str:
        """Return the time in UTC, as RFC 3339 writes it. The part up to the second is formatted once a second."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._date = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._date}.{int((now - second) * 1e6):06d}Z"

    def _append(self, line: str) -> None:
        if not self._lines:
            self._loop.call_soon(self.flush)
        self._lines.append(line)

    def close(self) -> None:
        """Write all that is waiting, of the warnings as well."""
        self._troubles.flush()
        self.flush()

    def flush(self) -> None:
        """Write the lines that are waiting."""
        if self._lines:
            sys.stderr.write("\n".join((*self._lines, "")))
            sys.stderr.flush()
            self._lines.clear()


def _as_json(report: RequestReport, seconds: float, client_gone: bool, shows_path: bool) -> str:
    """Return what an access line says, as the members of an object: FIELDS in their order, then DETAILS.

    Only texts are quoted, one by one, and names once: a fifth of the time of json.dumps (measured).
    """
    asked, problem, path, more = report.asked, None, "", _names(report.rule, report.upstream)
    request_id = client = '""'
    if asked is not None:
        problem, request_id, client = asked.problem, quoted(asked.request_id), quoted(asked.client)
        if shows_path and (path := asked.path):
            path = f'"path": {quoted(path)}, '
        if trace_id := asked.trace_id if report.trace is None else trace_id_of(report):
            more += f'"trace_id": "{trace_id}", '
        if problem is not None and problem.slug:
            more += f'"problem": "{problem.slug}", '
    # Of what went well, nothing has to be asked.
    if report.outcome is not _REPLAYED and (reason := reason_of(report)):
        more += f'"reason": {quoted(reason)}, '
    return (
        f'"outcome": "{report.outcome.label}", "method": {quoted(report.method)}, "status": {report.status}, '
        f'"key_id": "{key_id(report.key) if report.key else ""}", "request_id": {request_id}, "client": {client}, '
        f'"duration_ms": {seconds * 1000:.2f}, "upstream_ms": {report.upstream_s * 1000:.2f}, '
        f'"client_gone": {"true" if client_gone else "false"}, {path}{more}'
    )


@functools.lru_cache(1024)
def _names(rule: str, upstream: str) -> str:
    """Return what a line says of the route. There is one entry for each."""
    return "".join([f'"{name}": {quoted(one)}, ' for name, one in (("rule", rule), ("upstream", upstream)) if one])
