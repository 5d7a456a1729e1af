"""Logs: one JSON object a line on standard error, or lines for people; and the access line."""

import logging
import sys
from collections.abc import Callable
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
    """Writes one line a request: `off`, `notable` (all but plain executions and pass-through) or `all`."""

    def __init__(self, logger: Any, which: str) -> None:
        self._logger, self._which = logger, which

    def __call__(self, outcome: Outcome, seconds: float, client_left: bool) -> None:
        if self._which == "off" or (self._which == "notable" and outcome.word in PLAIN):
            return
        write = self._logger.error if outcome.word in ALARMING else self._logger.info
        detail = {"detail": outcome.detail} if outcome.detail else {}
        write(
            "request",
            outcome=outcome.word,
            method=outcome.method,
            status=outcome.status,
            key=short(outcome.key) if outcome.key else "",
            ms=round(seconds * 1000, 2),
            upstream_ms=round(outcome.upstream_s * 1000, 2),
            client_left=client_left,
            **detail,
        )
