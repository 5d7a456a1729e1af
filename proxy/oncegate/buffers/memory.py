"""The memory that bodies and answers of one worker may take together."""

from dataclasses import dataclass


@dataclass(slots=True)
class MemoryBudget:
    """Bytes of bodies and answers that a worker holds in memory, against its limit."""

    limit: int
    used: int = 0

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they fit."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        self.used -= size

    @property
    def tight(self) -> bool:
        """Whether what is streamed should take less, so that room is left for newcomers."""
        return self.used > self.limit // 2
