"""Logs: one JSON object a line on standard error, or lines for people; and the access line."""

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog

from proxy.keys import short
from proxy.metrics import Outcome

PLAIN = frozenset(("executed", "passthrough"))  # what `notable` leaves out
# What deserves a person's look beyond the request itself.
ALARMING = frozenset(("corrupt", "failed", "fenced", "answer_not_stored"))

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

    def __call__(self, outcome: Outcome, seconds: float, client_left: bool) -> None:
        level = "error" if outcome.word in ALARMING else "info"
        if outcome.word in self._left_out or level not in self._levels:
            return
        line = {
            "outcome": outcome.word,
            "method": outcome.method,
            "status": outcome.status,
            "key": short(outcome.key) if outcome.key else "",
            "ms": round(seconds * 1000, 2),
            "upstream_ms": round(outcome.upstream_s * 1000, 2),
            "client_left": client_left,
        }
        if outcome.detail:
            line["detail"] = outcome.detail
        if outcome.rule:
            line["rule"] = outcome.rule
        if self._json:
            self._add(_encode({**line, "event": "request", "level": level, "timestamp": _now()}))
        else:
            getattr(self._logger, level)("request", **line)

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


_encode = json.JSONEncoder().encode


def _is_shown(level: str, least: str) -> bool:
    return getattr(logging, level.upper()) >= getattr(logging, least.upper())  # type: ignore[no-any-return]


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
