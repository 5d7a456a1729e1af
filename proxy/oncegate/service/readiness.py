"""Says in the log why a worker is not ready, and when it is ready again."""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

# A reason that goes within this time, as a reconnect does, is not worth a line.
LOOK_S = 1.0
_NUMBER = re.compile(r"\d+")


class ReadinessLog:
    """Looks at the reasons again and again, and logs them when they change. `log` is a logger of structlog.

    `reasons` returns None while nobody wants to know, as in a drain.
    """

    def __init__(self, reasons: Callable[[], Sequence[str] | None], log: Any) -> None:
        self._reasons, self._log = reasons, log
        # Without their numbers, which count down.
        self._logged: list[str] = []

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Log what is new since the last look."""
        if (reasons := self._reasons()) is None:
            return
        now = [_NUMBER.sub("", reason) for reason in reasons]
        if now == self._logged:
            return
        self._logged = now
        if reasons:
            self._log.warning("not ready", reasons=list(reasons))
        else:
            self._log.info("ready again")
