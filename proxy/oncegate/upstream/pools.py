"""All pools of a worker: one for each upstream that a rule names."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any
from weakref import WeakSet

from oncegate.upstream.pool import Pool


class Pools:
    """The pools by the descriptions of their upstreams; equal descriptions share a pool. `make` opens one.

    A pool that no rule names any more lives on with the requests that use it, and ends with the last of them.
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

    def retain_only(self, upstreams: Iterable[Hashable]) -> None:
        """Forget all upstreams but these."""
        named = set(upstreams)
        self._named = {upstream: pool for upstream, pool in self._named.items() if upstream in named}

    def states(self) -> Iterator[tuple[Any, dict[str, int]]]:
        """Yield each upstream that a rule names, with how many connections to it are in which state."""
        for upstream, pool in self._named.items():
            yield upstream, pool.states

    def cut(self, detail: str) -> int:
        """Fail every exchange and every attempt to connect in all pools, and return their number."""
        return sum(pool.cut(detail) for pool in list(self._all))

    def close(self) -> None:
        """Close all connections of all pools."""
        for pool in list(self._all):
            pool.close()
