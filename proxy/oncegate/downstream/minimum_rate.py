"""How slowly a client may send or take bytes while the proxy waits for it. Pure."""

from typing import NamedTuple


class MinimumRate(NamedTuple):
    """In each `window_s` seconds of waiting a client has to move `bytes_per_s` on average, and a byte at least."""

    window_s: float
    bytes_per_s: int

    @property
    def least(self) -> int:
        """The bytes that a window asks for."""
        return max(1, int(self.window_s * self.bytes_per_s))


class RateWatch:
    """Holds one body to a minimum rate. Only the time that was spent waiting for the client counts."""

    __slots__ = ("_minimum_rate", "_moved", "window_left_s")

    def __init__(self, minimum_rate: MinimumRate) -> None:
        self._minimum_rate, self._moved = minimum_rate, 0
        self.window_left_s = minimum_rate.window_s

    def keeps_up(self, waited_s: float, moved: int) -> bool:
        """Count what moved within a time of waiting; return False once a window is over that moved too little."""
        self._moved += moved
        self.window_left_s -= waited_s
        if self.window_left_s > 0:
            return True
        fast = self._moved >= self._minimum_rate.least
        self._moved, self.window_left_s = 0, self._minimum_rate.window_s
        return fast
