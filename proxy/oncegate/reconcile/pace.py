"""How often an upstream is asked: a rate for all replicas together, and a breaker in each worker.

The rate is a mark for each upstream: the time from which the next question may leave, moved on by compare-and-set. An
upstream that asks for a pause (RFC 9110, section 10.2.3) moves that time for all replicas. `now_ms` returns the store's
time, by which all of them count.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import nullcontext
from email.utils import parsedate_to_datetime
from hashlib import blake2b

from oncegate.messages.fields import Pairs, by_name
from oncegate.store.record_name import store_key
from oncegate.store.store import Store

# A mark outlasts the longest pause: without one, anybody may ask.
MAX_PAUSE_S, _LASTS_MS = 300.0, 600_000
# Others may be faster so often; then they have what the rate allows.
_TRIES = 3
# Until a store that did not reply is asked again.
_SILENT_S = 1.0
# Failures in a row after which the breaker opens, and for how long: twice as long after each failure that follows.
FAILURES, MIN_OPEN_S, MAX_OPEN_S = 5, 1.0, 30.0


NowMs = Callable[[], int]


class Breaker:
    """Keeps questions from an upstream that does not answer. Times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._failures, self._open_s, self._until_s, self._tries = 0, MIN_OPEN_S, 0.0, False

    @property
    def is_open(self) -> bool:
        return self._failures >= FAILURES

    def is_holding(self, now_s: float) -> bool:
        return self.is_open and now_s < self._until_s

    def wait_s(self, now_s: float) -> float:
        """Return how long no question may leave; 0: the caller's may. While it is open, one tries for all."""
        if now_s < self._until_s:
            return self._until_s - now_s
        if self.is_open:
            self._tries, self._until_s = True, now_s + self._open_s
        return 0.0

    def failed(self, now_s: float) -> None:
        """Note a failure. Of questions that were under way together, and fail for one reason, one counts as the try."""
        self._failures += 1
        if self._tries:
            self._open_s = min(self._open_s * 2, MAX_OPEN_S)
        if self._tries or self._failures == FAILURES:
            self._tries, self._until_s = False, now_s + self._open_s

    def answered(self) -> None:
        self._failures, self._open_s, self._until_s, self._tries = 0, MIN_OPEN_S, 0.0, False


class Pace:
    """The pace of all upstreams, by their origins. `clock` returns seconds."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self._breakers: dict[str, Breaker] = {}
        self._queues: dict[str, asyncio.Lock] = {}
        # The marks as this process last saw them.
        self._seen: dict[str, bytes] = {}

    def open_breakers(self) -> dict[str, bool]:
        """Return whether the breaker of each upstream keeps questions back now."""
        now_s = self._clock()
        return {origin: breaker.is_holding(now_s) for origin, breaker in self._breakers.items()}

    async def take(self, origin: str, rate_per_s: float, now_ms: NowMs, patience_s: float = 0.0) -> float:
        """Take the next place at an upstream, within `patience_s`, in the order in which it is asked for.

        Return 0.0 if the caller may ask now, else how long it should wait.
        """
        ends_s, queue = self._clock() + patience_s, self._queues.setdefault(origin, asyncio.Lock())
        if queue.locked() and not patience_s:
            return 1 / rate_per_s
        try:
            async with asyncio.timeout_at(ends_s) if patience_s else nullcontext():
                await queue.acquire()
        except TimeoutError:
            return 1 / rate_per_s
        try:
            while (wait_s := await self._try(origin, rate_per_s, now_ms)) and self._clock() + wait_s < ends_s:
                await asyncio.sleep(wait_s)
            return wait_s
        finally:
            queue.release()

    async def _try(self, origin: str, rate_per_s: float, now_ms: NowMs) -> float:
        if wait_s := self._breaker(origin).wait_s(self._clock()):
            return wait_s
        interval_ms = max(1, round(1000 / rate_per_s))
        for _ in range(_TRIES):
            before, now = self._seen.get(origin, b""), now_ms()
            if (free_ms := _number(before)) > now:
                return min((free_ms - now) / 1000, MAX_PAUSE_S)
            taken = await self._swap(origin, before, now + interval_ms)
            if taken is not False:
                return 0.0 if taken else _SILENT_S
        return interval_ms / 1000

    async def pause(self, origin: str, seconds: float, now_ms: NowMs) -> None:
        """Let nobody ask an upstream for so long, which is bounded."""
        until_ms = now_ms() + int(min(seconds, MAX_PAUSE_S) * 1000)
        for _ in range(_TRIES):
            before = self._seen.get(origin, b"")
            if _number(before) >= until_ms or await self._swap(origin, before, until_ms) is not False:
                return

    def failed(self, origin: str) -> None:
        """Note that an upstream gave no answer, or one that says that it gives none now."""
        self._breaker(origin).failed(self._clock())

    def answered(self, origin: str) -> None:
        self._breaker(origin).answered()

    def _breaker(self, origin: str) -> Breaker:
        return self._breakers.setdefault(origin, Breaker())

    async def _swap(self, origin: str, before: bytes, free_ms: int) -> bool | None:
        """Move the mark on, and learn what it says where others were faster; None: the store does not say."""
        name, after = store_key(_digest(origin)) + b":pace", b"%d" % free_ms
        taken = await self._store.marks.swap(name, before, after, _LASTS_MS)
        self._seen[origin] = after if taken else await self._store.marks.get(name)
        return taken


def asked_pause_s(status: int, fields: Pairs) -> float:
    """Return for how long an answer asks to be left alone (RFC 9110, section 10.2.3); 0.0 where it does not."""
    text = _first(fields, b"retry-after")
    if status not in (429, 503) or not text:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}", text):
        return min(float(text), MAX_PAUSE_S)
    try:
        # By the clock of who wrote both: it need not be this machine's.
        until, written = parsedate_to_datetime(text), parsedate_to_datetime(_first(fields, b"date"))
        return min(max(0.0, (until - written).total_seconds()), MAX_PAUSE_S)
    # Also of an answer without a date, or with one without a time zone, or out of this world.
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _first(fields: Pairs, name: bytes) -> str:
    return by_name(fields).get(name, [b""])[0].strip().decode("latin-1")


def _digest(origin: str) -> bytes:
    """Return the name of an upstream in place of a key's digest."""
    return blake2b(b"probes of " + origin.encode(), digest_size=24).digest()


def _number(value: bytes) -> int:
    return int(value) if value.isdigit() else 0
