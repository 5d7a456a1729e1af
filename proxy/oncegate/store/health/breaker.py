"""A circuit breaker: after several claims in a row that were not confirmed, claims are no longer tried."""

from collections.abc import Callable

FAILURES = 3


class Breaker:
    """Counts failed claims. `clock` returns seconds; `opened()` is called when the breaker opens.

    While it is open, requests get their refusal at once. A probe that no request waits for tries a claim now and then,
    and closes the breaker.
    """

    def __init__(self, clock: Callable[[], float], opened: Callable[[], None] = lambda: None) -> None:
        self._clock, self._opened = clock, opened
        self._failures = 0
        self._counted_at = float("-inf")
        self.open = False

    def failed(self, began: float) -> None:
        """Note a claim that began at `began` and was not confirmed in time.

        Claims that run at once fail for one reason, such as a single slow reply. Only the first of them counts.
        """
        if self.open or began < self._counted_at:
            return
        self._failures += 1
        self._counted_at = self._clock()
        if self._failures >= FAILURES:
            self.open = True
            self._opened()

    def succeeded(self) -> None:
        """Note a reply to a claim, whatever it says."""
        self._failures, self._counted_at = 0, float("-inf")
        self.open = False
