"""Heads that came before: equal bytes are parsed equally, so they need not be parsed again.

Both sides of a proxy say the same over and over on connections that are kept. HTTP/2 sends an index for it
(RFC 7541); HTTP/1.1 sends it whole, and it costs a look at a table in place of a parser (a tenth of an execution for
an answer, as much for a request: measured).
"""

from typing import Generic, TypeVar

MOST = 256  # heads
MOST_BYTES = 4096  # of one
IN_VAIN = 64  # heads in a row that had not come before, from which on one in so many is kept

Parsed = TypeVar("Parsed")


class Recurring(Generic[Parsed]):
    """What was made of heads, by their bytes. Bounded; where hardly any comes again, few are kept."""

    __slots__ = ("_by_head", "_in_vain", "find")

    def __init__(self) -> None:
        self._by_head: dict[bytes, Parsed] = {}
        self._in_vain = 0
        self.find = self._by_head.get

    def keep(self, head: bytes, parsed: Parsed) -> None:
        """Remember what was made of a head that was not found."""
        self._in_vain += 1
        if len(head) > MOST_BYTES or (self._in_vain > IN_VAIN and self._in_vain % IN_VAIN):
            return
        if len(self._by_head) >= MOST:
            self._by_head.clear()
        self._by_head[head] = parsed

    def paid(self) -> None:
        """Note that one was found."""
        self._in_vain = 0
