"""All pools of a worker: one for each upstream that some rule names."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any
from weakref import WeakSet

from oncegate.upstream.pool import Pool


class Pools:
    """Pools by what describes their upstream. `make` opens one; equal descriptions share it.

    One that no rule names any more lives on with the requests that still use it, and ends with the last.
    """

    def __init__(self, make: Callable[[Any], Pool]) -> None:
        self._make = make
        self._named: dict[Hashable, Pool] = {}
        self._all: WeakSet[Pool] = WeakSet()

    def of(self, upstream: Hashable) -> Pool:
        """Return the pool of an upstream."""
        pool = self._named.get(upstream)
        if pool is None:
            pool = self._named[upstream] = self._make(upstream)
            self._all.add(pool)
        return pool

    def keep(self, upstreams: Iterable[Hashable]) -> None:
        """Forget all upstreams but these."""
        kept = set(upstreams)
        self._named = {upstream: pool for upstream, pool in self._named.items() if upstream in kept}

    def cut(self, detail: str) -> int:
        """Fail every connection that is under way or still being made and return how many there were."""
        return sum(pool.cut(detail) for pool in list(self._all))

    def close(self) -> None:
        for pool in list(self._all):
            pool.close()
