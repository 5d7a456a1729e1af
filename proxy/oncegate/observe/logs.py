"""Logs: one JSON object a line on standard error, or lines for people; and the access line."""

import asyncio
import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog

from oncegate.keys.digests import key_id
from oncegate.observe.outcome import Outcome, RequestReport

FIELDS = ("outcome", "method", "status", "key", "ms", "upstream_ms", "client_left")
PLAIN = frozenset(one.label for one in (Outcome.EXECUTED, Outcome.PASSTHROUGH))  # what `notable` leaves out
# What deserves a person's look beyond the request itself.
ALARMING = frozenset(
    one.label for one in (Outcome.RECORD_CORRUPT, Outcome.FAILED, Outcome.FENCED, Outcome.ANSWER_NOT_STORED)
)

Log = Callable[..., None]


def configure(level: str, layout: str) -> Any:
    """Set logging up for the process and return its logger. aiohttp's and asyncio's messages come this way too."""
    renderer = structlog.processors.JSONRenderer() if layout == "json" else structlog.dev.ConsoleRenderer(colors=False)
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    return structlog.get_logger()


class AccessLog:
    """Writes one line a request: `off`, `notable` (all but plain executions and pass-through) or `all`.

    The lines of one turn of the event loop leave in one write, as JSON without the logger's processors:
    through them a line cost a fifth of a replay (measured).
    """

    def __init__(self, logger: Any, which: str, level: str, layout: str, loop: asyncio.AbstractEventLoop) -> None:
        self._logger, self._json, self._loop = logger, layout == "json", loop
        self._left_out = PLAIN if which == "notable" else frozenset[str]()
        self._levels = () if which == "off" else [name for name in ("info", "error") if _is_shown(name, level)]
        self._lines: list[str] = []
        self._second, self._date = 0, ""

    def __call__(self, report: RequestReport, seconds: float, client_left: bool) -> None:
        word = report.outcome.label
        level = "error" if word in ALARMING else "info"
        if word in self._left_out or level not in self._levels:
            return
        _, status, method, key, upstream_s, _, _, _, detail, rule, _ = report
        shown = (word, method, status, key_id(key) if key else "", seconds * 1000, upstream_s * 1000, client_left)
        more = {name: value for name, value in (("detail", detail), ("rule", rule)) if value} if detail or rule else {}
        if self._json:
            self._add(_as_json(shown, more, level, self._stamp()))
        else:
            line = dict(zip(FIELDS, shown, strict=True), ms=round(shown[4], 2), upstream_ms=round(shown[5], 2))
            getattr(self._logger, level)("request", **line, **more)

    def _stamp(self) -> str:
        """Return the time; what is the same for a whole second is written once a second."""
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
        """Write what is waiting."""
        if self._lines:
            sys.stderr.write("\n".join((*self._lines, "")))
            sys.stderr.flush()
            self._lines.clear()


def _as_json(shown: tuple[Any, ...], more: dict[str, str], level: str, stamp: str) -> str:
    """Return the line. Words are quoted once, only a detail can be anything: 5 us less than json.dumps (measured)."""
    word, method, status, key, ms, upstream_ms, client_left = shown
    further = "".join([f"{_quoted(name)}: {json.dumps(value)}, " for name, value in more.items()]) if more else ""
    return (
        f'{{"outcome": "{word}", "method": {_quoted(method)}, "status": {status}, "key": "{key}", '
        f'"ms": {ms:.2f}, "upstream_ms": {upstream_ms:.2f}, "client_left": {"true" if client_left else "false"}, '
        f'{further}"event": "request", "level": "{level}", "timestamp": "{stamp}"}}'
    )


_quoted = functools.lru_cache(256)(json.dumps)


def _is_shown(level: str, least: str) -> bool:
    return getattr(logging, level.upper()) >= getattr(logging, least.upper())  # type: ignore[no-any-return]
