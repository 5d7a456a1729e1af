"""Follows the name of an origin while its pool has connections."""

import asyncio
from collections.abc import Callable

from oncegate.hostnames.resolver import HostName

# After this share of the time for which an answer is kept the name is looked up again: the look-up takes the rest.
AGAIN_AFTER = 0.8


class NameWatch:
    """Looks a name up again and again. `is_used` says whether the pool has connections; without any, the watch ends.

    `moved` is called with the addresses of every answer.
    """

    def __init__(self, name: HostName, is_used: Callable[[], bool], moved: Callable[[frozenset[str]], None]) -> None:
        self._name, self._is_used, self._moved = name, is_used, moved
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def hosts(self) -> frozenset[str]:
        """The addresses that the name has, by the last answer."""
        return self._name.hosts

    def start(self) -> None:
        """Watch from now on, until the pool has no connection any more."""
        if self._timer is None:
            self._name.observers.append(self._moved)
            self._schedule()

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._name.observers.remove(self._moved)

    def _schedule(self) -> None:
        self._timer = self._loop.call_later(self._name.ttl_s * AGAIN_AFTER, self._look)

    def _look(self) -> None:
        if not self._is_used():
            self.stop()
            return
        self._name.look_up()
        self._schedule()
