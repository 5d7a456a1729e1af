"""What a store reports besides the results of its verbs: losses of data, and proxies that do not fit together."""

from enum import Enum


class StoreEvent(Enum):
    """An event that operators should know. Its value is the kind in metrics and logs."""

    # Losses of data.
    FLUSHED = "flushed"  # the store is empty, or another one
    ROLLED_BACK = "rolled_back"  # acknowledged writes are gone
    EVICTED = "evicted"  # the store evicted keys
    MOVED = "moved"  # the store restarted or failed over, and may have lost its last writes
    FOUNDED = "founded"  # the store has no epoch: it is new, or it lost everything

    # Proxies on one store that do not fit together.
    IDENTITY = "identity"  # this proxy's settings name keys in another way than the others', so it claims none
    IDENTITY_ACCEPTED = "accepted"  # the same, and the operator accepted it
    RULES = "rules"  # other proxies have rules that name keys in another way

    INFO = "info"  # the server refuses INFO, so some of its health is not watched


class ClaimEvent(Enum):
    """What became of a claim that this proxy still held. Its value is the last word of the log event."""

    LOST = "lost"  # its record is gone, so another request may have executed the same key
    FENCED = "fenced"  # its record has another owner
