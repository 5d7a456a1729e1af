"""A connection as its pool sees it: when it was used, and from when on it may be used again."""

NEVER = float("inf")


class PoolEntry:
    """What the pool knows about one connection. Times are those of the loop.

    `taken_at`: a request got it. `longest_s`: how long its longest exchange took. `idle_since`, `rested_at`: it is idle
    since the one, and may be used again from the other. `makes_room_at`: an idle one is closed if it has no response
    by then. `checks_before`: how many checks by the kernel were made before it became idle. `address`: where it leads.
    `is_retired`: the name of the origin has this address no more, so that no further request is sent there.
    """

    taken_at = longest_s = idle_since = rested_at = 0.0
    makes_room_at = NEVER
    checks_before = 0
    # Of its socket, once epoll watches that.
    descriptor = -1
    is_reused = is_idle = is_discarded = is_retired = False
    address = ""
