"""When claiming is not worth the wait: after claims that failed one after the other, until a probe is claimed."""

from collections.abc import Callable

FAILURES = 3


class Breaker:
    """Counts failed claims. `clock` in seconds; `opened()` hears when it opens.

    While it is open no request asks for a claim; a probe that nobody waits for does, and closes it.
    """

    def __init__(self, clock: Callable[[], float], opened: Callable[[], None] = lambda: None) -> None:
        self._clock, self._opened = clock, opened
        self._failures = 0
        self._counted_at = float("-inf")
        self.strained = False  # whether the last claim failed
        self.open = False

    def failed(self, began: float) -> None:
        """Note a claim begun at `began` that was not confirmed within its budget.

        Those under way at once fail for one reason, such as a single slow reply: only the first of them counts.
        """
        if self.open or began < self._counted_at:
            return
        self.strained = True
        self._failures += 1
        self._counted_at = self._clock()
        if self._failures >= FAILURES:
            self.open = True
            self._opened()

    def succeeded(self) -> None:
        """Note a reply to a claim, whatever it says."""
        self._failures, self._counted_at = 0, float("-inf")
        self.strained = self.open = False
