"""Slows guesses of tokens: everybody at an address waits a little after each that was wrong, and nobody for long."""

import asyncio
import time

# The wait doubles with each wrong token, up to the most. It is before the look at the token, so that a client that
# gives up early learns nothing.
FIRST_S, MOST_S = 0.25, 2.0
# Without a wrong token for so long, an address begins anew.
FORGET_S = 60.0
# Addresses that are remembered; the oldest are forgotten.
MOST_ADDRESSES = 1024


class Attempts:
    """The wrong tokens of late, by the address that they came from."""

    def __init__(self) -> None:
        # For each address how many, and when the last one came.
        self._wrong: dict[str, tuple[int, float]] = {}

    def delay_s(self, address: str) -> float:
        """Return how long an address waits before its next token is looked at."""
        count, last = self._wrong.get(address, (0, 0.0))
        if not count or time.monotonic() - last > FORGET_S:
            return 0.0
        return float(min(FIRST_S * 2 ** min(count - 1, 10), MOST_S))

    async def wait(self, address: str) -> None:
        """Wait as long as this address has to."""
        if delay_s := self.delay_s(address):
            await asyncio.sleep(delay_s)

    def note_wrong(self, address: str) -> int:
        """Count a wrong token, and return how many there were of late. The next one of this address waits longer."""
        count = 1 + (self._wrong.get(address, (0, 0.0))[0] if self.delay_s(address) else 0)
        self._wrong.pop(address, None)
        self._wrong[address] = (count, time.monotonic())
        while len(self._wrong) > MOST_ADDRESSES:
            del self._wrong[next(iter(self._wrong))]
        return count
