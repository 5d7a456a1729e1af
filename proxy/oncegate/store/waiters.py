"""Duplicates waiting for the original.

If it runs in this worker, its completion wakes them; otherwise one poll loop checks their keys in the store.
"""

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

MAX_WAITERS_PER_KEY = 64
# The pauses between polls: they grow from the first to the longest, and start anew with every new waiter.
MIN_POLL_S, MAX_POLL_S = 0.05, 0.5


class Woken(Enum):
    """Why a wait ended."""

    # The record changed: read it again.
    RECORD_CHANGED = "record_changed"
    # The key is free and nothing was sent for it: this duplicate may claim it.
    MAY_CLAIM = "may_claim"
    # The upstream wants no retry now, or this worker ends its waits: the client retries later.
    DECLINED = "declined"
    # The deadline passed.
    TIMED_OUT = "timed_out"
    # The original does not run, so there is nothing to wait for.
    NOT_RUNNING = "not_running"
    CLIENT_LEFT = "client_left"
    # Too many duplicates wait already.
    NO_ROOM = "no_room"


@dataclass(eq=False, slots=True)
class _Waiter:
    scope: Scope
    is_half_closed: Callable[[], bool]
    future: "asyncio.Future[Woken]"


class Waiters:
    """The waiting duplicates of one worker, at most `max_waiters` of them.

    `lease_ms`: the length of a lease, for the poll. `is_held_here(key)` returns whether the original runs in this
    worker.
    """

    def __init__(self, store: Store, max_waiters: int, lease_ms: int, is_held_here: Callable[[bytes], bool]) -> None:
        self._store, self._max_waiters, self._lease_ms = store, max_waiters, lease_ms
        self._is_held_here = is_held_here
        self._by_key: dict[bytes, list[_Waiter]] = {}
        self._count = 0
        self._poll_s = MIN_POLL_S
        self._closed = False
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return self._count

    async def wait(
        self,
        key: bytes,
        scope: Scope,
        deadline_s: float,
        client_left: "asyncio.Future[None]",
        is_half_closed: Callable[[], bool],
    ) -> Woken:
        """Wait for a key until `deadline_s` (the loop's time), or until `client_left` is done.

        `is_half_closed()` returns whether the client closed its side of the connection. Such a client may have left,
        or may still read its response. It waits while there is room.
        """
        if self._closed or not (self._has_room(key) or self._make_room(key)):
            return Woken.NO_ROOM
        queue = self._by_key.setdefault(key, [])
        loop = asyncio.get_running_loop()
        waiter = _Waiter(scope, is_half_closed, loop.create_future())
        queue.append(waiter)
        self._count += 1
        self._poll_s = MIN_POLL_S
        self._arrived.set()
        try:
            await asyncio.wait(
                (waiter.future, client_left), timeout=deadline_s - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._leave(key, waiter)
        if waiter.future.done():
            if waiter.future.result() is Woken.MAY_CLAIM and client_left.done():
                # Its turn goes to the next waiter.
                self.let_one_claim(key)
            else:
                return waiter.future.result()
        return Woken.CLIENT_LEFT if client_left.done() else Woken.TIMED_OUT

    def _has_room(self, key: bytes) -> bool:
        return self._count < self._max_waiters and len(self._by_key.get(key, ())) < MAX_WAITERS_PER_KEY

    def _make_room(self, key: bytes) -> bool:
        """End the wait of one half-closed client, and return whether there was one.

        It gets its response now, and clients that have left keep nobody out.
        """
        queue = self._by_key.get(key, [])
        queues = [queue] if len(queue) >= MAX_WAITERS_PER_KEY else self._by_key.values()
        for waiter in chain.from_iterable(queues):
            if waiter.is_half_closed() and not waiter.future.done():
                waiter.future.set_result(Woken.DECLINED)
                return True
        return False

    def _leave(self, key: bytes, waiter: _Waiter) -> None:
        self._count -= 1
        queue = self._by_key.get(key, [])
        if waiter in queue:
            queue.remove(waiter)
        if not queue:
            self._by_key.pop(key, None)

    def claim_ended(self, key: bytes, *, not_sent: bool, declined: bool) -> None:
        """Wake the waiters of a key whose claim this worker has settled.

        `not_sent`: the key is free and nothing was sent, so one waiter may claim it. `declined`: the key is free, and
        the upstream wants no retry now.
        """
        if key in self._by_key:
            if not_sent:
                self.let_one_claim(key)
            else:
                self.wake(key, declined=declined)

    def wake(self, key: bytes, *, declined: bool = False) -> None:
        """Wake every waiter of a key: to read the record again, or with `declined` to refuse the client."""
        if waiters := self._by_key.get(key):
            reason = Woken.DECLINED if declined else Woken.RECORD_CHANGED
            for waiter in waiters:
                if not waiter.future.done():
                    waiter.future.set_result(reason)

    def let_one_claim(self, key: bytes) -> None:
        """Let one waiter of a key claim it. The others go on waiting, now for that one."""
        for waiter in self._by_key.get(key, ()):
            if not waiter.future.done():
                waiter.future.set_result(Woken.MAY_CLAIM)
                return

    def close(self) -> None:
        """End every wait, and refuse new ones."""
        self._closed = True
        for key in list(self._by_key):
            self.wake(key, declined=True)

    async def run(self) -> None:
        """Poll all keys whose original runs in another worker, until cancelled."""
        while True:
            self._arrived.clear()
            if not self._by_key:
                await self._arrived.wait()
            await asyncio.sleep(self._poll_s)
            self._poll_s = min(self._poll_s * 1.5, MAX_POLL_S)
            polled = [
                (key, queue[0].scope) for key, queue in self._by_key.items() if queue and not self._is_held_here(key)
            ]
            await asyncio.gather(*[self._poll_key(key, scope) for key, scope in polled])

    async def _poll_key(self, key: bytes, scope: Scope) -> None:
        record = await self._store.peek(key, scope, self._lease_ms)
        if isinstance(record, Unconfirmed) or self._is_held_here(key):
            return
        if record is None:
            # In another worker the request was declined, or not sent. The store does not show which of the two, and
            # a burst of claims must not follow a 429.
            self.wake(key, declined=True)
            return
        state = effective_state(record.state, record.lease_left_ms) if isinstance(record, Record) else None
        if state is not State.IN_FLIGHT:
            self.wake(key)
