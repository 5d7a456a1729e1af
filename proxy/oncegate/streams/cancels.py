"""Notes to the owner of a claim from somebody who does not run its request; above all that it is to end.

A cancel is a note in the owner's mailbox, not a state of the record: the owner closes its connection to the upstream
and settles the claim. The note names one claim by its token, so that it never ends a later one of the same key.
"""

from enum import Enum
from typing import NamedTuple

from oncegate.decision import CANCELLED
from oncegate.keys.digests import KEY_DIGEST_BYTES
from oncegate.store.record import TOKEN_BYTES, ViewState
from oncegate.store.record_view import StoreError
from oncegate.store.store import Store

# The first byte of a note: end this claim; somebody has the address of its response; somebody reads it from the store.
CANCEL, FETCHED, READ = b"c", b"r", b"j"
_TOKEN_AT = 1 + KEY_DIGEST_BYTES
_REASON_AT = _TOKEN_AT + TOKEN_BYTES
MAX_REASON_BYTES = 200


class CancelResult(Enum):
    """What a cancel met. `may_change`: the next one may meet something else, as the claim may still run."""

    # Its owner is told. A response that is complete before it hears of it is stored all the same.
    ACCEPTED = "accepted", True
    # The store does not say, or did not take the note.
    UNCONFIRMED = "unconfirmed", True
    CANCELLED = "cancelled", False
    COMPLETE = "complete", False
    # Nobody knows its outcome, for another reason: its owner died, for example.
    UNKNOWN = "unknown", False
    # There is no record, or another claim's.
    ABSENT = "absent", False

    def __init__(self, label: str, may_change: bool) -> None:
        self.label, self.may_change = label, may_change


class Note(NamedTuple):
    """What a mailbox has for its owner, about one claim. `reason`: of a cancel, for operators."""

    kind: bytes
    key: bytes
    token: bytes
    reason: str = ""


def pack_note(note: Note) -> bytes:
    """Return a note in at most 241 bytes."""
    return b"".join((note.kind, note.key, note.token, note.reason.encode()[:MAX_REASON_BYTES]))


def unpack_note(packed: bytes) -> Note | None:
    """Return the note that was packed, None for one that a newer version wrote."""
    if len(packed) < _REASON_AT or packed[:1] not in (CANCEL, FETCHED, READ):
        return None
    reason = packed[_REASON_AT:].decode("utf-8", "replace")
    return Note(packed[:1], packed[1:_TOKEN_AT], packed[_TOKEN_AT:_REASON_AT], reason)


async def tell_owner(store: Store, key: bytes, token: bytes, reason: str) -> CancelResult:
    """Ask the owner of a claim to end it. Nobody answers for an owner that died: then its lease decides."""
    try:
        record = await store.records.read(key)
    except StoreError:
        return CancelResult.UNCONFIRMED
    if record is None or record.token != token:
        return CancelResult.ABSENT
    match record.state:
        case ViewState.COMPLETE | ViewState.EXPIRED:
            return CancelResult.COMPLETE
        case ViewState.UNKNOWN:
            return CancelResult.CANCELLED if record.mode == CANCELLED else CancelResult.UNKNOWN
        case ViewState.IN_FLIGHT:
            is_posted = await store.post(token, pack_note(Note(CANCEL, key, token, reason)))
            return CancelResult.ACCEPTED if is_posted else CancelResult.UNCONFIRMED
        case _:
            return CancelResult.ABSENT
