"""How many followers a worker has, and how many of them may be one tenant's."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

# One tenant gets this part of the places at most.
TENANT_SHARE = 4


class Followers:
    """The places for the followers of one worker."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_of_one = -(-most // TENANT_SHARE)
        self._by_tenant: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return self._by_tenant.total()

    def has_room(self, tenant: bytes) -> bool:
        """Return whether one more of a tenant may follow."""
        return len(self) < self._most and self._by_tenant[tenant] < self._most_of_one

    @contextmanager
    def following(self, tenant: bytes) -> Iterator[None]:
        """Count one follower until the end of the block."""
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]
