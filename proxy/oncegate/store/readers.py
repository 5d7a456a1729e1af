"""Marks in the store, from process to process: who waits for the response to a key, and which call runs under one.

The owner of an exchange knows its own client alone. A duplicate may wait in another worker or replica, so each process
marks the keys for which its duplicates wait. A mark outlasts such a wait by the grace of its rule: once it has expired,
nobody has waited for as long.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from oncegate.store.record_name import store_key
from oncegate.store.store import Marks

# The pauses between two looks at the duplicates that wait for a key: a sixth of the grace, within these limits.
MIN_PAUSE_S, MAX_PAUSE_S = 0.5, 5.0
# A call that ends sooner than this is known in its own process alone. The mark of a longer one is renewed.
SHORT_CALL_S, RENEW_S, CALL_MS = 0.5, 20.0, 60_000


class Readers:
    """The duplicates of one process that wait for a response under rules that cancel without readers."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._waiting: dict[bytes, list[Callable[[], bool]]] = {}
        self._marking: dict[bytes, asyncio.Task[None]] = {}

    @contextmanager
    def waiting(self, key: bytes, grace_s: float, has_left: Callable[[], bool]) -> Iterator[None]:
        """Count a duplicate as a reader of a key until the end of the block, or until `has_left()`."""
        readers = self._waiting.setdefault(key, [])
        readers.append(has_left)
        if key not in self._marking:
            self._marking[key] = asyncio.get_running_loop().create_task(self._mark(key, grace_s))
        try:
            yield
        finally:
            readers.remove(has_left)
            if not readers:
                del self._waiting[key]
                self._marking.pop(key).cancel()

    async def _mark(self, key: bytes, grace_s: float) -> None:
        pause_s = min(MAX_PAUSE_S, max(MIN_PAUSE_S, grace_s / 6))
        # Two pauses longer than the grace: a mark that comes late must not let a running one expire.
        lasts_ms = int((grace_s + 2 * pause_s) * 1000)
        while True:
            if self._waits_here(key):
                await self._marks.put(mark_name(key), b"", lasts_ms)
            await asyncio.sleep(pause_s)

    def _waits_here(self, key: bytes) -> bool:
        return any(not has_left() for has_left in self._waiting.get(key, ()))

    async def may_wait(self, key: bytes) -> bool:
        """Return whether somebody may wait for a key, or has within a grace.

        Where the store does not say, somebody may: a response that is paid for is not given up on a guess.
        """
        return await self._marks.exists(mark_name(key)) is not False or self._waits_here(key)


class Calls:
    """The calls that run under keys and that their clients may take back by a name of their own."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._running: dict[bytes, bytes] = {}

    @contextmanager
    def named(self, call: bytes, execution: bytes) -> Iterator[None]:
        """Let every process find an execution by the name of its call until the end of the block."""
        self._running[call] = execution
        marking = asyncio.get_running_loop().create_task(self._mark(call, execution))
        try:
            yield
        finally:
            marking.cancel()
            if self._running.get(call) is execution:
                del self._running[call]

    async def _mark(self, call: bytes, execution: bytes) -> None:
        pause_s = SHORT_CALL_S
        while True:
            await asyncio.sleep(pause_s)
            await self._marks.put(call_name(call), execution, CALL_MS)
            pause_s = RENEW_S

    def here(self, call: bytes) -> bytes:
        """Return the execution of a call in this process, empty if there is none."""
        return self._running.get(call, b"")

    async def elsewhere(self, call: bytes) -> bytes:
        """Return the execution of a call in another process, empty if none is known. It may have ended."""
        return await self._marks.get(call_name(call))


def call_name(call: bytes) -> bytes:
    """Return the name of a call's mark."""
    return store_key(call) + b":call"


def mark_name(key: bytes) -> bytes:
    """Return the name of a key's mark, in the slot of its record."""
    return store_key(key) + b":readers"
