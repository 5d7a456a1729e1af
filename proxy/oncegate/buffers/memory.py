"""The memory that the bodies of one worker's requests and responses may take together."""

from dataclasses import dataclass


@dataclass(slots=True)
class MemoryBudget:
    """Bytes in use, against a limit. Whoever takes bytes gives the same number back; `used` may be raised directly.

    `used` may exceed `limit`: bytes that have arrived already count, whether they fit or not.
    """

    limit: int
    used: int = 0

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they fit; return whether they do."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        """Give `size` bytes back."""
        self.used -= size

    @property
    def tight(self) -> bool:
        """Whether more than half is in use, so that streams should buffer less and leave room for new requests."""
        return self.used > self.limit // 2
