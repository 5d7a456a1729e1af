"""The end of a worker: what is in flight finishes within the grace, what does not is cut off and said to be unknown.

After the grace everything has its bound, so that the end comes within a second, whoever stands still: the
upstream, the store, a client that uploads, or one that does not read.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from oncegate.downstream.listener import Listener
from oncegate.gateway.handler import Gateway
from oncegate.gateway.waiters import Waiters
from oncegate.store.store import Store
from oncegate.upstream.pools import Pools

POLL_S = 0.02
STILL_POLLS = 20  # after the grace: for which nothing may come to its end before the store is given up
MOST_POLLS = 150  # however much still comes to its end
TELL_S = 0.1  # after that: for the clients to be told
UNWIND_S = 0.2  # after that: for what still hangs to come to its end


class Drain:
    """Ends the work of one worker. `background`: the tasks that finish something behind a client's back."""

    def __init__(
        self,
        gateway: Gateway,
        listener: Listener,
        waiters: Waiters,
        pools: Pools,
        store: Store,
        background: set[asyncio.Task[Any]],
    ) -> None:
        self._gateway, self._listener, self._waiters = gateway, listener, waiters
        self._pools, self._store, self._background = pools, store, background
        self.cut_off = 0  # requests and answers that did not finish

    async def run(self, hurry: asyncio.Event, grace_s: float) -> bool:
        """Take no further request, wait until all is done; after `grace_s` seconds, or on `hurry`, cut it off.

        Return whether nothing had to be cut off.
        """
        self._listener.pre_shutdown()
        self._waiters.close()
        if await unless(hurry, self.idle(), grace_s):
            return True
        self._cut()
        await self._settled()
        self._store.give_up()
        await unless(None, self.idle(), TELL_S)
        self._listener.abort()
        await unless(None, self.idle(), UNWIND_S)
        return False

    def _cut(self) -> None:
        """Give everybody who stands still a reason to move."""
        requests = self._gateway.in_flight + self._gateway.relaying + len(self._waiters)
        self.cut_off = max(requests, self._listener.owing())
        self._pools.cut("the proxy was shut down")
        self._listener.abort_stalled()

    async def _settled(self) -> None:
        """Wait while the keys that were cut off are marked, one after the other."""
        left, still = self._under_way(), 0
        for _ in range(MOST_POLLS):
            if not left or still == STILL_POLLS:
                return
            await asyncio.sleep(POLL_S)
            before, left = left, self._under_way()
            still = 0 if left < before else still + 1

    async def idle(self) -> bool:
        """Return when nothing is under way any more."""
        while self._under_way():
            await asyncio.sleep(POLL_S)
        return True

    def _under_way(self) -> int:
        gateway = self._gateway
        requests = gateway.in_flight + gateway.relaying + len(self._waiters)
        return requests + len(self._background) + self._listener.owing()


async def unless(hurry: asyncio.Event | None, work: Coroutine[Any, Any, Any], seconds: float | None = None) -> Any:
    """Return what `work` returns, None if `hurry` is set or the time is over first."""
    task = asyncio.ensure_future(work)
    hurried = asyncio.ensure_future(hurry.wait()) if hurry else None
    waited = [task, hurried] if hurried else [task]
    await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    result = task.result() if task.done() else None
    for one in waited:
        one.cancel()
    return result
