"""What the verbs of a store return.

`claim` and `peek` return a `Claim`, a `Record`, a `Corrupt` or an `Unconfirmed`; every other verb returns a status of
its own. No verb raises for a store that is down: the outcome is a value. A store of another kind returns the same.

The events at the end are what a store reports besides: losses of data, and proxies that do not fit together.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from oncegate.decision import State
from oncegate.store.record import Claim, Corrupt, Record, StoredResponse

# Replies that did not come ...


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """The store did not confirm the call.

    `maybe_executed`: the command left the proxy, so the store may have executed it, or may execute it later.
    """

    reason: str
    maybe_executed: bool = True


@dataclass(frozen=True, slots=True)
class UnderReplicated(Unconfirmed):
    """The store has the claim, but too few replicas or disks confirmed it. No copy of it will be executed later."""

    maybe_executed: bool = False


@dataclass(frozen=True, slots=True)
class StoreFull(Unconfirmed):
    """The store refused the write at its memory limit. Retrying within the deadline would not help."""

    maybe_executed: bool = False


@dataclass(frozen=True, slots=True)
class Forbidden(Unconfirmed):
    """The script of a claim met a command that the store's user may not execute, perhaps behind its first write."""


@dataclass(frozen=True, slots=True)
class NotAttempted(Unconfirmed):
    """The store was not contacted, because the call could not succeed. Retrying within the deadline would not help."""

    maybe_executed: bool = False


@dataclass(frozen=True, slots=True)
class ClaimsSuspended(NotAttempted):
    """The proxy refuses first-time keys on purpose, for example while the store is in quarantine after a loss.

    `retry_after_s`: when that may be over.
    """

    retry_after_s: int = 1


NotClaimed = Record | Corrupt | Unconfirmed
ClaimResult = Claim | NotClaimed


# Statuses of the other verbs ...


class SettleStatus(Enum):
    """How a settle ended. `is_done`: the record is as the settle wanted it."""

    # The record is complete and has this response.
    STORED = "stored", True
    # The key is free.
    RELEASED = "released", True
    # The record says that nobody knows the outcome.
    MARKED_UNKNOWN = "unknown", True
    # Nothing was changed: the record lacks chunks of the response.
    INCOMPLETE = "incomplete", False
    # Nothing was changed: the key has another owner, or another response of ours.
    FENCED = "fenced", False
    # The store did not confirm in time; the settle may have been executed.
    UNCONFIRMED = "unconfirmed", False

    def __init__(self, label: str, is_done: bool) -> None:
        # Plain attributes: every exchange asks, and a member looked up in its class costs ten times as much
        # (Python 3.11, measured).
        self.label, self.is_done = label, is_done


class SettleResult(NamedTuple):
    """`record_was_gone`: the record had vanished and was written anew, so a claim was lost."""

    status: SettleStatus
    record_was_gone: bool = False


class AppendStatus(Enum):
    """How the append of one chunk ended. The record has the chunk only after the first two."""

    APPENDED = "appended"
    # Appended, and somebody elsewhere reads the response while it comes.
    APPENDED_READ = "read"
    # The record has another chunk at this index.
    INCOMPLETE = "incomplete"
    # There is no record.
    ABSENT = "absent"
    # The owner's own response is complete already.
    COMPLETE = "complete"
    # The key has another owner.
    FENCED = "fenced"
    # The store is at its memory limit.
    NO_MEMORY = "no_memory"
    UNCONFIRMED = "unconfirmed"


class RenewStatus(Enum):
    """How the renewal of a lease ended. The lease is extended only after RENEWED."""

    RENEWED = "renewed"
    # There is no record.
    ABSENT = "absent"
    # The record is marked unknown.
    UNKNOWN = "unknown"
    # The owner's own response is complete.
    COMPLETE = "complete"
    # The key has another owner.
    FENCED = "fenced"
    UNCONFIRMED = "unconfirmed"


class ReadFailure(Enum):
    """Why a read returns no chunks."""

    # The record lacks the chunk, or is damaged.
    INCOMPLETE = "incomplete"
    # The record has another owner, or there is none.
    GONE = "gone"
    UNCONFIRMED = "unconfirmed"


@dataclass(slots=True)
class Followed:
    """What a record has of the response that a reader follows, as one read found it."""

    # As of now: once the lease is over UNKNOWN, once the retention is over EXPIRED.
    state: State
    # Packed as in store/stream_head.py. Empty: not there yet, of an owner that gives none, or not asked for (`first`).
    head: bytes
    # From the first that was asked for on: about 256 KiB, and at least one if it is there.
    chunks: list[bytes]
    # Of the chunks that the record has now.
    count: int
    # Once it is complete.
    response: StoredResponse | None
    # This claim took the place of another one of its key: the key may have been executed before.
    replaced: bool
    # Of the lease, while the key is in flight.
    left_ms: int
    # It is in flight, and its owner stores its body no more.
    dropped: bool = False


class ResolveStatus(Enum):
    """How an operator's decision about a key ended. Only RESOLVED and RELEASED change the record."""

    RESOLVED = "resolved"
    RELEASED = "released"
    # There is no record.
    ABSENT = "absent"
    # The owner's response is complete.
    COMPLETE = "complete"
    # The key has another owner than the operator saw.
    FENCED = "fenced"
    # The owner has a running lease, or was back since the record was seen, and the decision is not to be made then.
    RUNNING = "running"
    UNCONFIRMED = "unconfirmed"


class DropStatus(Enum):
    """How the dropping of a response ended. Only DROPPED says that the record is a tombstone."""

    DROPPED = "dropped"
    # Its retention is not over.
    KEPT = "kept"
    # There is no complete record.
    ABSENT = "absent"
    # The key has another owner.
    FENCED = "fenced"
    UNCONFIRMED = "unconfirmed"


# Events ...


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
