"""In which order the addresses of a name are tried: new connections are spread over them."""

import random
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest

from oncegate.hostnames.system import AddressInfo

# For how long an address that could not be reached is tried after the others.
AVOID_S = 10.0


class Rotation:
    """Begins with another address each time. Those that failed lately come last. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Not the first: all workers begin at the same time.
        self._turn = random.randrange(1 << 16)
        # Address -> until when it is avoided.
        self._failed: dict[str, float] = {}

    def order(self, addresses: Sequence[AddressInfo]) -> list[AddressInfo]:
        """Return the addresses in the order to be tried.

        The first is of the family that the system prefers, the next of the other one (RFC 8305, section 4).
        """
        if len(addresses) == 1:
            return [*addresses]
        self._turn += 1
        by_family: dict[int, list[AddressInfo]] = {}
        failed: list[AddressInfo] = []
        for one in addresses:
            # Those that failed take no turn: else their neighbour would get their share, too.
            (failed if self._is_avoided(one) else by_family.setdefault(one[0], [])).append(one)
        turned = [_turned(members, self._turn) for members in by_family.values()]
        return [one for row in zip_longest(*turned) for one in row if one is not None] + failed

    def note_failed(self, address: str) -> None:
        """Try an address after the others for a while."""
        now = self._clock()
        self._failed = {one: until for one, until in self._failed.items() if until > now}
        self._failed[address] = now + AVOID_S

    def note_reached(self, order: Sequence[AddressInfo], address: str) -> None:
        """Note which of the addresses was reached: those that were tried before it failed, or were slow."""
        for one in order:
            if one[4][0] == address:
                break
            self.note_failed(one[4][0])
        self._failed.pop(address, None)

    def _is_avoided(self, one: AddressInfo) -> bool:
        return self._failed.get(one[4][0], 0.0) > self._clock()


def _turned(members: list[AddressInfo], turn: int) -> list[AddressInfo]:
    first = turn % len(members)
    return members[first:] + members[:first]
