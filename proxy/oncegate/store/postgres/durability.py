"""Where a commit has to be before it counts. Pure."""

from enum import Enum


class Level(Enum):
    """How far the commits of a session go before the server replies."""

    # As the setting of the durability says: a claim, a takeover, a withdrawal.
    CLAIM = "claim"
    # To the server's disk: a settle.
    DISK = "disk"
    # Nowhere: reads, renewals, housekeeping.
    OFF = "off"
