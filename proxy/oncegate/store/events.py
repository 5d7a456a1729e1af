"""What a store reports besides the results of its verbs: losses of data, and proxies that do not fit together."""

from enum import Enum


class StoreEvent(Enum):
    """An event that operators should know. `kind` is its name in metrics and logs.

    `is_error`: acknowledged data is gone, or this proxy claims no keys. The others are warnings.
    """

    # Losses of data.
    # The store is empty, or another one.
    FLUSHED = "flushed", True
    # Acknowledged writes are gone.
    ROLLED_BACK = "rolled_back", True
    # The store evicted keys.
    EVICTED = "evicted", True
    # The store restarted or failed over, and may have lost its last writes.
    MOVED = "moved", False
    # The store has no epoch: it is new, or it lost everything.
    FOUNDED = "founded", False

    # Proxies on one store that do not fit together.
    # This proxy's settings name keys in another way than the others', so it claims none.
    IDENTITY = "identity", True
    # The same, and the operator accepted it.
    IDENTITY_ACCEPTED = "accepted", False
    # Other proxies have rules that name keys in another way.
    RULES = "rules", False

    # The server refuses INFO, so some of its health is not watched.
    INFO = "info", False

    def __init__(self, kind: str, is_error: bool) -> None:
        self.kind, self.is_error = kind, is_error


class ClaimEvent(Enum):
    """What became of a claim that this proxy still held. Its value is the last word of the log event."""

    # Its record is gone, so another request may have executed the same key.
    LOST = "lost"
    # Its record has another owner.
    FENCED = "fenced"
