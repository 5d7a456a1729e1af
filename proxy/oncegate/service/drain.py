"""The drain of one worker: requests in flight finish within the grace, and the rest is cut off.

After the grace each step has a bound of its own: if nothing makes progress any more, the drain ends within a second.
It does not wait longer for an upstream, a store or a client that hangs. A key whose request was cut off after sending
becomes unknown.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from oncegate.downstream.listener import Listener
from oncegate.gateway.handler import Gateway
from oncegate.store.store import Store
from oncegate.store.waiters import Waiters
from oncegate.upstream.pools import Pools

# Progress is polled: it is a sum of counts that several parts keep.
POLL_S = 0.02
# How long a connection stays open without a request: its client may have sent one just now.
LAST_CALL_S = 1.0
# After so many polls without progress, and after so many in all, the drain waits no longer for keys to settle.
IDLE_POLLS, MAX_POLLS = 20, 150
# After that: for clients to receive their problem responses, and then for aborted connections to end their requests.
NOTIFY_S, UNWIND_S = 0.1, 0.2


class Drain:
    """Ends the work of one worker. `background` are tasks that finish work whose client has its response already."""

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
        # How many requests and responses did not finish.
        self.cut_off = 0

    async def run(self, immediate: asyncio.Event, grace_s: float) -> bool:
        """Let each connection end with its next response and wait until all work is done; return whether nothing had
        to be cut off.

        The wait ends after `grace_s` seconds, or once `immediate` is set; what is still in flight is cut off then.
        """
        self._listener.retire()
        self._listener.close_tunnels()
        self._waiters.close()
        await unless(immediate, self._finish(), grace_s)
        if not self._in_progress():
            return True
        # A cut connection ends its request, which then settles its key as unknown, or frees it if nothing was sent.
        self._cut_off_all()
        await self._wait_for_settling()
        # From here on the store's calls fail at once, and clients hear that the outcome is unknown.
        self._store.end_calls()
        await unless(None, self.idle(), NOTIFY_S)
        self._listener.abort()
        await unless(None, self.idle(), UNWIND_S)
        return False

    def _cut_off_all(self) -> None:
        """Close the connections to the upstreams and to stalled clients, so that their requests end."""
        self.cut_off = max(self._requests(), self._listener.count_unsent())
        self._pools.cut("the proxy was shut down")
        self._listener.abort_stalled()

    async def _wait_for_settling(self) -> None:
        """Wait while cut-off requests settle their keys, as long as their number falls."""
        remaining, idle_polls = self._in_progress(), 0
        for _ in range(MAX_POLLS):
            if not remaining or idle_polls == IDLE_POLLS:
                return
            await asyncio.sleep(POLL_S)
            before, remaining = remaining, self._in_progress()
            idle_polls = 0 if remaining < before else idle_polls + 1

    async def _finish(self) -> None:
        """Wait until nothing is in progress and no client is left that could send a request, or reads its response."""
        while self._in_progress() or self._listener.connections:
            self._listener.close_quiet(LAST_CALL_S)
            await asyncio.sleep(POLL_S)

    async def idle(self) -> bool:
        """Return True once nothing is in progress."""
        while self._in_progress():
            await asyncio.sleep(POLL_S)
        return True

    def _requests(self) -> int:
        gateway = self._gateway
        return gateway.in_flight + gateway.reading + gateway.relaying + len(self._waiters)

    def _in_progress(self) -> int:
        return self._requests() + len(self._background) + self._listener.count_unsent()


async def unless(stop: asyncio.Event | None, work: Coroutine[Any, Any, Any], seconds: float | None = None) -> Any:
    """Return the result of `work`; cancel it and return None if `stop` is set or the time is over first."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait()) if stop else None
    waiting = [task, stopped] if stopped else [task]
    await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    result = task.result() if task.done() else None
    for one in waiting:
        one.cancel()
    return result
