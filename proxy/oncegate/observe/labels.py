"""The closed sets of label values that other rooms count by. `Outcome`, of requests, is in `outcome`."""

from enum import Enum
from typing import Final


class SettlementLabel(Enum):
    """How a claim ended. A claim that is LOST is counted twice, also under the settlement that was tried."""

    STORED = "stored"
    # The response was too large, or the store was nearly full.
    STORED_WITHOUT_BODY = "stored_without_body"
    RELEASED = "released"
    UNKNOWN = "unknown"
    # Unknown as well: somebody stopped the request, so that no retry executes it.
    CANCELLED = "cancelled"
    # The store did not confirm in time; the settlement is tried again in the background.
    UNCONFIRMED = "unconfirmed"
    # The record had vanished from the store.
    LOST = "lost"
    # The record had another owner.
    FENCED = "fenced"

    def __init__(self, label: str) -> None:
        # A plain attribute: `value` costs 290 ns more (Python 3.11, measured).
        self.label = label


class UnguardedKey(Enum):
    """Why the key that a request seems to carry guards nothing."""

    # The method is none that the rule guards, such as PUT.
    METHOD = "method"
    # The header is none that the rule reads a key from, such as X-Idempotency-Key.
    NAME = "name"

    def __init__(self, label: str) -> None:
        self.label = label


class Unguarded(Enum):
    """Why a request was forwarded without the protection that its method has. Where a problem says the same, the label
    is its code."""

    # The store could not claim its key, and the rule forwards such requests.
    STORE = "store_unavailable"
    # It has no key, or none that can be used.
    NO_KEY = "key_missing"
    BAD_KEY = "key_invalid"
    # Its key is derived, and the record under it is of another request.
    NO_DUPLICATE = "no_duplicate"

    def __init__(self, label: str) -> None:
        self.label = label


class StoreLoss(Enum):
    """How a store lost data. `is_certain`: it may have taken claims along; MOVED may have lost nothing."""

    FLUSHED = "flushed", True
    ROLLED_BACK = "rolled_back", True
    EVICTED = "evicted", True
    # The store restarted or failed over.
    MOVED = "moved", False

    def __init__(self, label: str, is_certain: bool) -> None:
        self.label, self.is_certain = label, is_certain


# The labels of `store.waiters.Woken`.
WAIT_ENDS: Final = (
    *("record_changed", "head_came", "store_silent", "may_claim", "declined"),
    *("no_verdict", "sent_away", "timed_out", "client_gone", "no_room", "no_room_for_body"),
)
# The calls to the store, and opening a connection to one of its servers.
VERBS: Final = ("claim", "append", "renew", "settle", "read", "follow", "connect")
# Who stops a request: nobody reads its response any more; its caller took it back; a reader, at its address; a person.
CANCELS: Final = ("client_gone", "call", "address", "operator")
# What is counted of connections. Of clients: opened, or refused because of their number.
CLIENT_CONNECTIONS: Final = ("opened", "refused")
# Signs of life: 102 (Processing) before a response, a comment between events.
HEARTBEATS: Final = ("interim", "comment")
# To upstreams: opened; used again for another request; not opened; no room for another until the connect timeout.
UPSTREAM_CONNECTIONS: Final = ("opened", "reused", "failed", "no_room")
# A connection to an upstream has a request, has none, or is being opened; a request waits for one.
UPSTREAM_STATES: Final = ("active", "idle", "connecting", "waiting")
# How the look-up of a host name ended: the addresses as before, or the first ones; other addresses than before; the
# name has none; no name server says.
LOOK_UPS: Final = ("unchanged", "changed", "no_address", "failed")

SETTLEMENTS: Final = {settlement.label: settlement for settlement in SettlementLabel}
