"""What a store reports besides the results of its verbs: losses of data, and proxies that do not fit together."""

from enum import Enum


class StoreEvent(Enum):
    """An event that operators should know. Its value is the kind in metrics and logs."""

    # Losses of data.
    # The store is empty, or another one.
    FLUSHED = "flushed"
    # Acknowledged writes are gone.
    ROLLED_BACK = "rolled_back"
    # The store evicted keys.
    EVICTED = "evicted"
    # The store restarted or failed over, and may have lost its last writes.
    MOVED = "moved"
    # The store has no epoch: it is new, or it lost everything.
    FOUNDED = "founded"

    # Proxies on one store that do not fit together.
    # This proxy's settings name keys in another way than the others', so it claims none.
    IDENTITY = "identity"
    # The same, and the operator accepted it.
    IDENTITY_ACCEPTED = "accepted"
    # Other proxies have rules that name keys in another way.
    RULES = "rules"

    # The server refuses INFO, so some of its health is not watched.
    INFO = "info"


class ClaimEvent(Enum):
    """What became of a claim that this proxy still held. Its value is the last word of the log event."""

    # Its record is gone, so another request may have executed the same key.
    LOST = "lost"
    # Its record has another owner.
    FENCED = "fenced"
