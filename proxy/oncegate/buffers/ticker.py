"""One timer for all who wait for about the same time."""

import asyncio
from collections.abc import Callable
from math import ceil


class Ticker:
    """Calls back after a delay that is rounded up to whole ticks. Whatever is due in one tick is called together.

    For what every stream waits for again and again: a timer for each would take memory and wake the process each time,
    and what is called together also leaves in one write.
    """

    __slots__ = ("_due", "_loop", "_tick_s", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, tick_s: float = 0.05) -> None:
        self._loop, self._tick_s = loop, tick_s
        # By the tick in which they are due. The keys of each matter, the values do not.
        self._due: dict[int, dict[Callable[[], None], None]] = {}
        # Set while anybody waits.
        self._timer: asyncio.TimerHandle | None = None

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> int:
        """Call back after `delay_s`; return the tick, for `cancel`."""
        tick = ceil((self._loop.time() + delay_s) / self._tick_s)
        self._due.setdefault(tick, {})[callback] = None
        if self._timer is None:
            self._timer = self._loop.call_later(self._tick_s, self._run)
        return tick

    def cancel(self, tick: int, callback: Callable[[], None]) -> None:
        """Do not call back, if that is still to come."""
        if (waiting := self._due.get(tick)) is not None:
            waiting.pop(callback, None)

    def _run(self) -> None:
        now = self._loop.time() / self._tick_s
        try:
            for tick in sorted(tick for tick in self._due if tick <= now):
                # One by one, as each may cancel another.
                while waiting := self._due[tick]:
                    waiting.popitem()[0]()
                del self._due[tick]
        finally:
            self._timer = self._loop.call_later(self._tick_s, self._run) if self._due else None
