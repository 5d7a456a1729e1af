"""Says in the log why the proxy is not ready, and when it is ready again."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

# A reason that goes within this time, as a reconnect does, is not worth a line.
LOOK_S = 1.0
_NUMBER = re.compile(r"\d+")


class ReadinessLog:
    """Looks at the reasons again and again, and logs them when they change. `log` is a logger of structlog.

    `reasons` returns None while nobody wants to know, as in a drain. Both lines are warnings: whoever reads that the
    proxy is not ready wants to read that it is.
    """

    def __init__(self, reasons: Callable[[], Sequence[str] | None], log: Any) -> None:
        self._reasons, self._log = reasons, log
        # Those that were logged last, and without their numbers, which count down; since when there are any.
        self._last: list[str] = []
        self._logged: list[str] = []
        self._since_s = 0.0

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look until the end of the block."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()

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
        if reasons:
            self._since_s = self._since_s if self._logged else time.monotonic()
            self._log.warning("not ready", reasons=list(reasons))
        else:
            seconds = round(time.monotonic() - self._since_s)
            self._log.warning("ready again", reasons_before=self._last, after_s=seconds)
        self._logged, self._last = now, list(reasons)
