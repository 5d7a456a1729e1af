"""A connection as its pool sees it: when it was used, and from when on it may be used again."""

NEVER = float("inf")


class PoolEntry:
    """What the pool knows about one connection. Times are those of the loop.

    `taken_at`: a request got it. `longest_s`: how long its longest exchange took. `idle_since`, `rested_at`: it is idle
    since the one, and may be used again from the other. `makes_room_at`: an idle one is closed if it has no response
    by then. `checks_before`: how many checks by the kernel were made before it became idle. `address`: where it leads.
    `is_retired`: the name of the origin has this address no more, so that no further request is sent there.
    """

    # Not as attributes of the class: whatever a class has too is read and written at ten times the cost (Python 3.11,
    # counted), and each request does so two dozen times.
    def __init__(self) -> None:
        self.taken_at = self.longest_s = self.idle_since = self.rested_at = 0.0
        self.makes_room_at = NEVER
        self.checks_before = 0
        # Of its socket, once epoll watches that.
        self.descriptor = -1
        self.is_reused = self.is_idle = self.is_discarded = self.is_retired = False
        self.address = ""
