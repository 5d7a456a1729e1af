"""Duplicates that wait for the original: woken by this worker's own settles, asked for together else."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import chain

from oncegate.decision import State, effective_state
from oncegate.keys.digests import Scope
from oncegate.store.record import Record
from oncegate.store.results import Unconfirmed
from oncegate.store.store import Store

A_KEY = 64
POLL_FIRST_S, POLL_MOST_S = 0.05, 0.5


class Woken(Enum):
    """Why a wait ended."""

    LOOK = "look"  # the key changed: ask the store again
    CLAIM = "claim"  # nothing was sent for it: this one may try
    BUSY = "busy"  # declined, or the time is over: come again later
    GONE = "gone"  # the client left
    FULL = "full"  # too many wait already


@dataclass(eq=False, slots=True)
class _Waiter:
    scope: Scope
    asks_no_more: Callable[[], bool]
    future: "asyncio.Future[Woken]"


class Waiters:
    """The waiting duplicates of one worker. `ours(key)`: whether the original runs in this worker."""

    def __init__(self, store: Store, most: int, lease_ms: int, ours: Callable[[bytes], bool]) -> None:
        self._store, self._most, self._lease_ms, self._ours = store, most, lease_ms, ours
        self._by_key: dict[bytes, list[_Waiter]] = {}
        self._count = 0
        self._poll_s = POLL_FIRST_S
        self._closed = False
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return self._count

    async def wait(
        self,
        key: bytes,
        scope: Scope,
        until: float,
        leaving: "asyncio.Future[None]",
        asks_no_more: Callable[[], bool],
    ) -> Woken:
        """Wait for a key until the loop's time `until`, or until the client leaves.

        `asks_no_more`: whether it closed its side. It may have left, or wait for its answer like that;
        it waits while there is room.
        """
        if self._closed or not (self._has_room(key) or self._make_room(key)):
            return Woken.FULL
        line = self._by_key.setdefault(key, [])
        loop = asyncio.get_running_loop()
        waiter = _Waiter(scope, asks_no_more, loop.create_future())
        line.append(waiter)
        self._count += 1
        self._poll_s = POLL_FIRST_S
        self._arrived.set()
        try:
            await asyncio.wait(
                (waiter.future, leaving), timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._leave(key, waiter)
        if waiter.future.done():
            if waiter.future.result() is Woken.CLAIM and leaving.done():
                self.nothing_was_sent(key)  # its turn goes to the next
            else:
                return waiter.future.result()
        return Woken.GONE if leaving.done() else Woken.BUSY

    def _has_room(self, key: bytes) -> bool:
        return self._count < self._most and len(self._by_key.get(key, ())) < A_KEY

    def _make_room(self, key: bytes) -> bool:
        """Send one away that asks no more; it gets its answer, and nobody is shut out by clients that left."""
        line = self._by_key.get(key, [])
        lines = [line] if len(line) >= A_KEY else self._by_key.values()
        for waiter in chain.from_iterable(lines):
            if waiter.asks_no_more() and not waiter.future.done():
                waiter.future.set_result(Woken.BUSY)
                return True
        return False

    def _leave(self, key: bytes, waiter: _Waiter) -> None:
        self._count -= 1
        line = self._by_key.get(key, [])
        if waiter in line:
            line.remove(waiter)
        if not line:
            self._by_key.pop(key, None)

    def claim_ended(self, key: bytes, *, not_sent: bool, declined: bool) -> None:
        """Wake those who wait for a key whose claim this worker has settled.

        `not_sent`: it is free, and nothing was sent, so that one of them may claim it. `declined`: it is free, and the
        upstream wants no retry now.
        """
        if key in self._by_key:
            if not_sent:
                self.nothing_was_sent(key)
            else:
                self.wake(key, declined=declined)

    def wake(self, key: bytes, *, declined: bool = False) -> None:
        """Wake everybody who waits for a key: to look at its record, or (`declined`) to come again later."""
        if waiters := self._by_key.get(key):
            reason = Woken.BUSY if declined else Woken.LOOK
            for waiter in waiters:
                if not waiter.future.done():
                    waiter.future.set_result(reason)

    def nothing_was_sent(self, key: bytes) -> None:
        """Let one of those who wait for a key claim it; the others go on waiting, now for that one."""
        for waiter in self._by_key.get(key, ()):
            if not waiter.future.done():
                waiter.future.set_result(Woken.CLAIM)
                return

    def close(self) -> None:
        """Send everybody away, also those who still come."""
        self._closed = True
        for key in list(self._by_key):
            self.wake(key, declined=True)

    async def run(self) -> None:
        """Ask for all keys whose original runs elsewhere, until cancelled."""
        while True:
            self._arrived.clear()
            if not self._by_key:
                await self._arrived.wait()
            await asyncio.sleep(self._poll_s)
            self._poll_s = min(self._poll_s * 1.5, POLL_MOST_S)
            elsewhere = [(key, line[0].scope) for key, line in self._by_key.items() if line and not self._ours(key)]
            await asyncio.gather(*[self._ask(key, scope) for key, scope in elsewhere])

    async def _ask(self, key: bytes, scope: Scope) -> None:
        found = await self._store.peek(key, scope, self._lease_ms)
        if isinstance(found, Unconfirmed) or self._ours(key):
            return
        if found is None:
            # Declined or not sent, over there: which one cannot be seen, and a storm must not follow a 429.
            self.wake(key, declined=True)
        elif not isinstance(found, Record) or effective_state(found.state, found.lease_left_ms) is not State.IN_FLIGHT:
            self.wake(key)
