"""A bounded table of heads, by their bytes."""

from collections.abc import Hashable
from typing import Generic, TypeVar

MAX_HEADS = 256
MAX_STORED_HEAD_BYTES = 4096
# From so many misses in a row on, only one head in so many is stored: most traffic there never repeats a head.
MISSES_BEFORE_SAMPLING = 64

Parsed = TypeVar("Parsed")


class RecentHeads(Generic[Parsed]):
    """What parsing made of recent heads, by their bytes. Bounded in number and size; thread-bound.

    `find(head)` returns it or None, `clear()` forgets everything. Set `misses` to 0 after a hit.
    """

    __slots__ = ("_by_head", "clear", "enabled", "find", "misses")

    def __init__(self, *, enabled: bool = True) -> None:
        self._by_head: dict[Hashable, Parsed] = {}
        self.enabled, self.misses = enabled, 0
        # The dictionary's own methods: a Python frame around each would cost as much as the look-up.
        self.find, self.clear = self._by_head.get, self._by_head.clear

    def wants_more(self) -> bool:
        """Count a miss, and return whether the head that was missed should be stored."""
        self.misses += 1
        rarely_repeats = self.misses > MISSES_BEFORE_SAMPLING and self.misses % MISSES_BEFORE_SAMPLING
        return self.enabled and not rarely_repeats

    def store(self, head: Hashable, size: int, parsed: Parsed) -> None:
        """Remember what was made of a head of `size` bytes; one that is too large is ignored."""
        if size <= MAX_STORED_HEAD_BYTES:
            if len(self._by_head) >= MAX_HEADS:
                self.clear()
            self._by_head[head] = parsed
