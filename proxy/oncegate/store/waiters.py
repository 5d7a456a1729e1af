"""Duplicates waiting for the original.

If it runs in this worker, its completion wakes them; otherwise one poll loop checks their keys in the store, each after
a pause of its own and within a limit for all together (`PollSchedule`).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from itertools import chain, count

from oncegate.decision import State, effective_state
from oncegate.keys.digests import Scope
from oncegate.store.record import Record
from oncegate.store.results import Followed, ReadFailure, Unconfirmed
from oncegate.store.store import Store

MAX_WAITERS_PER_KEY = 64
# Of one replica, all its workers together. A poll costs Valkey about as much as a claim of a key that is taken.
MAX_POLLS_PER_S = 500
# The pauses between the polls of one key: each is half as long again as the last.
MIN_PAUSE_S, MAX_PAUSE_S, GROWTH = 0.05, 0.5, 1.5
# Polls that are due within so many seconds leave together.
TICK_S = 0.01
# The share of a second's polls that may leave at once. The rest of the second gets the rest: no second has more.
BURST_SHARE = 1 / 20


class Woken(Enum):
    """Why a wait ended, or why there was none. `label` names it in metrics."""

    # The record changed: read it again.
    RECORD_CHANGED = "record_changed"
    # The original's response has begun: a duplicate that joins it may try.
    HEAD_CAME = "head_came"
    # The store has said nothing for a lease and a second to one that joins.
    STORE_SILENT = "store_silent"
    # The key is free and nothing was sent for it: this duplicate may claim it.
    MAY_CLAIM = "may_claim"
    # The key is free, and the upstream may want no retry now: the client retries later.
    DECLINED = "declined"
    # The outcome is unknown, and the API is asked no more: a person has to find it out.
    NO_VERDICT = "no_verdict"
    # This worker ends its waits, or this one: the client retries later.
    SENT_AWAY = "sent_away"
    # The deadline passed.
    TIMED_OUT = "timed_out"
    CLIENT_LEFT = "client_gone"
    # Too many duplicates wait already.
    NO_ROOM = "no_room"
    # The spool has no room for the body of another one.
    NO_ROOM_FOR_BODY = "no_room_for_body"

    def __init__(self, label: str) -> None:
        self.label = label


@dataclass(eq=False, slots=True)
class _Waiter:
    scope: Scope
    is_half_closed: Callable[[], bool]
    future: "asyncio.Future[Woken]"
    # The token of the claim whose response it joins, empty where it waits for the end; and what it found.
    joins: bytes
    found: State


class Waiters:
    """The waiting duplicates of one worker, at most `max_waiters` of them.

    `is_held_here(key)` returns whether the original runs in this worker. `lease_ms`: the length of a lease, for the
    poll. `polls_per_s`: this worker's share of the polls. `polled()` is called for each of them.
    """

    def __init__(
        self,
        store: Store,
        is_held_here: Callable[[bytes], bool],
        *,
        max_waiters: int,
        lease_ms: int,
        polls_per_s: float,
        polled: Callable[[], None],
    ) -> None:
        self._store, self._max_waiters, self._lease_ms = store, max_waiters, lease_ms
        self._is_held_here, self._polled = is_held_here, polled
        self._by_key: dict[bytes, list[_Waiter]] = {}
        self._schedule = PollSchedule(polls_per_s)
        self._clock = asyncio.get_running_loop().time
        # And when the store last said something about an original that somebody joins (the loop's time).
        self._count, self._heard_s = 0, 0.0
        self._closed, self._arrived = False, asyncio.Event()

    def __len__(self) -> int:
        return self._count

    def refusal(self, key: bytes) -> Woken | None:
        """Return why one more duplicate of a key may not wait. None: it may, if `wait` is the next thing awaited."""
        if self._closed:
            return Woken.SENT_AWAY
        return None if self._has_room(key) or self._make_room(key) else Woken.NO_ROOM

    async def wait(
        self,
        key: bytes,
        scope: Scope,
        deadline_s: float,
        client_left: "asyncio.Future[None]",
        is_half_closed: Callable[[], bool],
        joins: bytes = b"",
        found: State = State.IN_FLIGHT,
    ) -> Woken:
        """Wait for a key without `refusal`, until `deadline_s` (the loop's time) or until `client_left` is done.

        `is_half_closed()` returns whether the client closed its side of the connection. Such a client may have left,
        or may still read its response. It waits while there is room. `joins`, `found`: as in _Waiter.
        """
        self._heard_s = self._heard_s if self._by_key else self._clock()
        if key not in self._by_key:
            self._by_key[key] = []
            self._schedule.add(key, self._clock())
            self._arrived.set()
        waiter = _Waiter(scope, is_half_closed, asyncio.get_running_loop().create_future(), joins, found)
        self._by_key[key].append(waiter)
        self._count += 1
        try:
            await asyncio.wait(
                (waiter.future, client_left), timeout=deadline_s - self._clock(), return_when=asyncio.FIRST_COMPLETED
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
        """End the wait of one half-closed client, which keeps nobody out, and return whether there was one."""
        queue = self._by_key.get(key, [])
        queues = [queue] if len(queue) >= MAX_WAITERS_PER_KEY else self._by_key.values()
        for waiter in chain.from_iterable(queues):
            if waiter.is_half_closed() and not waiter.future.done():
                waiter.future.set_result(Woken.SENT_AWAY)
                return True
        return False

    def _leave(self, key: bytes, waiter: _Waiter) -> None:
        self._count -= 1
        queue = self._by_key.get(key, [])
        if waiter in queue:
            queue.remove(waiter)
        if not queue:
            self._by_key.pop(key, None)
            self._schedule.remove(key)

    def claim_ended(self, key: bytes, *, not_sent: bool, declined: bool) -> None:
        """Wake the waiters of a key whose claim this worker has settled.

        `not_sent`: the key is free and nothing was sent, so one waiter may claim it. `declined`: the key is free, and
        the upstream wants no retry now.
        """
        if key in self._by_key:
            if not_sent:
                self.let_one_claim(key)
            else:
                self.wake(key, Woken.DECLINED if declined else Woken.RECORD_CHANGED)

    def wake(self, key: bytes, reason: Woken) -> None:
        """Wake every waiter of a key."""
        for waiter in self._by_key.get(key, ()):
            if not waiter.future.done():
                waiter.future.set_result(reason)

    def wake_joining(self, key: bytes, reason: Woken = Woken.HEAD_CAME) -> None:
        """Wake the waiters that join the response to a key."""
        for waiter in self._by_key.get(key, ()):
            if waiter.joins and not waiter.future.done():
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
            self.wake(key, Woken.SENT_AWAY)

    async def run(self) -> None:
        """Poll all keys whose original runs in another worker, until cancelled."""
        schedule = self._schedule
        # A failure of one poll ends all of them, also those that have not begun, and the caller starts this anew.
        for key in self._by_key:
            schedule.add(key, self._clock())
        async with asyncio.TaskGroup() as polls:
            while True:
                self._arrived.clear()
                if not schedule:
                    await self._arrived.wait()
                await asyncio.sleep(schedule.pause_s(self._clock()))
                for key in schedule.take_due(self._clock(), lambda key: not self._is_held_here(key)):
                    polls.create_task(self._poll(key, self._by_key[key][0].scope))

    async def _poll(self, key: bytes, scope: Scope) -> None:
        self._polled()
        try:
            await self._poll_key(key, scope)
        finally:
            self._schedule.polled(key, self._clock())

    async def _poll_key(self, key: bytes, scope: Scope) -> None:
        # Who waited may have left since this poll was due.
        joined = next((waiter.joins for waiter in self._by_key.get(key, ()) if waiter.joins), b"")
        if joined and await self._poll_head(key, joined):
            return
        record = await self._store.peek(key, scope, self._lease_ms)
        if isinstance(record, Unconfirmed) or self._is_held_here(key):
            return
        state = effective_state(record.state, record.lease_left_ms) if isinstance(record, Record) else None
        for waiter in self._by_key.get(key, ()):
            if waiter.found is not state and not waiter.future.done():
                # Elsewhere a running original was declined, or not sent: a burst of claims must not follow a 429.
                is_declined = record is None and waiter.found is State.IN_FLIGHT
                waiter.future.set_result(Woken.DECLINED if is_declined else Woken.RECORD_CHANGED)

    async def _poll_head(self, key: bytes, token: bytes) -> bool:
        """Look for the head of a response; return whether that says all about its key."""
        found = await self._store.follow(key, token, 0)
        if found is ReadFailure.UNCONFIRMED:
            if self._clock() > self._heard_s + self._lease_ms / 1000 + 1:
                self.wake_joining(key, Woken.STORE_SILENT)
            return True
        self._heard_s = self._clock()
        if not isinstance(found, Followed):
            return False
        if found.state is not State.IN_FLIGHT:
            self.wake(key, Woken.RECORD_CHANGED)
        elif found.head or found.dropped:
            self.wake_joining(key)
        elif found.count:  # Its owner is of an older version, and gives no head.
            for waiter in self._by_key.get(key, ()):
                waiter.joins = b""
        return True


class PollSchedule:
    """The keys to poll, at most `polls_per_s` of them in any second. Times are those of one clock, in seconds."""

    def __init__(self, polls_per_s: float) -> None:
        self._burst = max(1.0, polls_per_s * BURST_SHARE)
        self._per_s = max(polls_per_s - self._burst, polls_per_s / 2)
        self._allowed, self._counted_s = self._burst, 0.0
        # The pause of each key, and the number of its place in `_due`. A place with another number is left over.
        self._keys: dict[bytes, tuple[float, int]] = {}
        self._due: list[tuple[float, int, bytes]] = []
        self._number = count()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes, now_s: float) -> None:
        """Poll a key from now on, first after the shortest pause."""
        self._place(key, MIN_PAUSE_S, now_s)

    def remove(self, key: bytes) -> None:
        """Poll a key no more."""
        self._keys.pop(key, None)

    def polled(self, key: bytes, now_s: float) -> None:
        """Poll a key that `take_due` returned once more, after a longer pause."""
        if key in self._keys:
            pause_s, _ = self._keys[key]
            self._place(key, min(pause_s * GROWTH, MAX_PAUSE_S), now_s)

    def take_due(self, now_s: float, needs_poll: Callable[[bytes], bool]) -> list[bytes]:
        """Return the keys that are due now, those that are due longest first, as far as the limit allows.

        A key without need of a poll uses nothing up, and is asked about after the longest pause.
        """
        self._allowed = min(self._burst, self._allowed + max(0.0, now_s - self._counted_s) * self._per_s)
        self._counted_s = now_s
        taken = []
        while self._due and self._due[0][0] <= now_s:
            _, number, key = self._due[0]
            is_left_over = self._keys.get(key, (0.0, -1))[1] != number
            if not is_left_over and self._allowed < 1:
                break
            heappop(self._due)
            if is_left_over:
                continue
            if needs_poll(key):
                self._allowed -= 1
                taken.append(key)
            else:
                self._place(key, MAX_PAUSE_S, now_s)
        return taken

    def pause_s(self, now_s: float) -> float:
        """Return when to call `take_due` again. A key that is added meanwhile is due no sooner."""
        if not self._due:
            return MIN_PAUSE_S
        return min(max(self._due[0][0] - now_s, TICK_S), MIN_PAUSE_S)

    def _place(self, key: bytes, pause_s: float, now_s: float) -> None:
        number = next(self._number)
        self._keys[key] = (pause_s, number)
        heappush(self._due, (now_s + pause_s, number, key))
