"""The arguments and results of the functions in the database: one row for each key. Pure.

Only bytes and whole numbers go in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oncegate.decision import CANCELLED, HOLD, RETRY, State
from oncegate.store.kept import as_replaced, of_complete, rule_in, was_replaced
from oncegate.store.postgres.verb import Row, Verb
from oncegate.store.record import (
    Claim,
    Corrupt,
    Record,
    StoredResponse,
    pack,
    running,
    self_check,
    tenant_of,
    unpack,
)
from oncegate.store.results import (
    AppendStatus,
    ClaimResult,
    DropStatus,
    Followed,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    Unconfirmed,
)
from oncegate.store.stages import CLAIMED, DROPPED, RESPONSE_BEGUN, SENT, Stage

# A body up to this size lies in its record, and comes with the reply to a claim.
ROW_BYTES = 4096
# About how much of a larger body one read returns.
READ_BYTES = 262144

# Columns as in the types claim_call, renew_call, settle_call, follow_call_2. The driver refuses what one cannot hold.
# kept
CLAIM = Verb("claim", "claim_1", 2, (11,))
TAKE = Verb("claim", "take_1", 2, (11,))
PEEK = Verb("claim", "peek_2", 2, (11,))
RENEW = Verb("renew", "renew_1", 1)
# meta, body, tail, why, kept
SETTLE = Verb("settle", "settle_1", 2, (13, 17, 18, 19, 20))

# A reply may have READ_BYTES, and hardly any has: sixteen fit into a batch.
FOLLOW = Verb("follow", "follow_2", 1, reply_bytes=READ_BYTES // 16)

_MODES = {b"": 0, HOLD: 1, RETRY: 2, CANCELLED: 3}
MODE_OF = {number: mode for mode, number in _MODES.items()}
STAGES: Mapping[Stage, int] = {CLAIMED: 1, SENT: 2, RESPONSE_BEGUN: 3, DROPPED: 4}
# The tag of a record in flight whose lease ends later than a whole one from now, because the clock stepped back.
RESTARTS = 8
# By the tag of claim_1.
_STATES = {
    tag: state.value.encode() for tag, state in ((1, State.IN_FLIGHT), (RESTARTS, State.IN_FLIGHT), (2, State.UNKNOWN))
}
# Behind the token that a claim expects: a record in the mode hold is open to it, too.
ALSO_HOLD = b"h"
# Events of the audit trail that a settle writes.
STORED, RELEASED, UNKNOWN, CANCELLATION, WITHDRAWN = 4, 5, 6, 7, 8


# Claims ...


@dataclass(frozen=True, slots=True)
class Takeable:
    """A record that the claim may take with `token` as the expected one: freed, its own, or of a clock that fell."""

    token: bytes


# The key has no record, and the claim came after its deadline. The reply has the server's time, so that the next try
# is not late.
LATE = Unconfirmed("the store was reached too late", maybe_executed=False)
# Another transaction is about to write the key.
BUSY = Unconfirmed("another call holds the key", maybe_executed=False)


def lock_of(key: bytes) -> int:
    """Return the number of the advisory lock of a key."""
    return int.from_bytes(key[:8], "big", signed=True)


def claim_row(claim: Claim, not_after_ms: int, expected: bytes | None = None, window_ms: int = 0) -> Row:
    """Return the arguments of `claim_1`, and of `take_1` with the token that it expects.

    A claim may end unknown without anybody to say so: it is kept as long.
    """
    check, kept = claim.self_check, claim.kept
    return (
        claim.key, lock_of(claim.key), claim.token, claim.fingerprint, check[:16], check[16:], _MODES[claim.mode],
        claim.lease_ms, claim.unknown_retention_ms, not_after_ms, rule_in(kept),
        kept or None, expected, window_ms,
    )  # fmt: skip


def claim_result(claim: Claim, tenant: bytes, row: Mapping[str, Any]) -> ClaimResult | Takeable:
    """Return what a row of `claim_1` or `take_1` means."""
    tag, now_ms = row["tag"], row["now"]
    if tag == 0:
        return _claimed(claim, row)
    if tag == 3:
        found = unpack(claim.key, tenant, row["meta"] or b"", row["body"], now_ms)
        if (more := row["kept"]) and isinstance(found, Record):
            found.kept = more
        return found
    if tag == 5:
        return _expired(claim.key, tenant, row)
    if tag == 6:
        return LATE
    if tag == 7:
        return BUSY
    owner = row["owner"]
    if tag in (4, RESTARTS) or (tag == 1 and owner == claim.token):
        return Takeable(owner)
    return _running(claim, tenant, row)


def _claimed(claim: Claim, row: Mapping[str, Any]) -> Claim:
    # Of the record that it took, as it is now.
    kept = as_replaced(claim.kept) if was_replaced(row["kept"] or b"") else claim.kept
    return Claim(
        # Positions, not names: arguments by name cost twice as much here (Python 3.11, measured).
        claim.key, claim.token, b"%d" % row["fence"], claim.mode, claim.fingerprint, claim.self_check,
        row["created"], claim.lease_ms, claim.retention_ms, claim.unknown_retention_ms, claim.tombstone_ms, kept,
        claim.resend_ms, claim.kept_before,
    )  # fmt: skip


def _running(claim: Claim, tenant: bytes, row: Mapping[str, Any]) -> Record | Corrupt:
    state, now_ms = _STATES.get(row["tag"]), row["now"]
    if state is None:
        return Corrupt("unknown state")
    fields = [
        state, row["owner"], b"", MODE_OF.get(row["mode"], b"?"), row["fingerprint"], row["self"], row["lease_left"],
        row["created"], b"%d" % row["status"], row["kept"],
    ]  # fmt: skip
    return running(claim.key, tenant, fields, now_ms)


def _expired(key: bytes, tenant: bytes, row: Mapping[str, Any]) -> Record | Corrupt:
    """Return a record whose retention is over, by what stays of it when its response is dropped."""
    owner, fingerprint = row["owner"], row["fingerprint"]
    if row["self"] != self_check(key, tenant, owner, MODE_OF.get(row["mode"], b"?"), fingerprint):
        return Corrupt("the record does not match its check")
    return Record(State.EXPIRED, owner, fingerprint, row["created"], row["now"], status=row["status"])


def peeked(claim: Claim, tenant: bytes, row: Mapping[str, Any]) -> Record | Corrupt | None:
    """Return the record that a row of `peek_2` shows to one who claims nothing, or None for a key that is free."""
    if row["tag"] in (4, 6):
        return None
    result = claim_result(claim, tenant, row)
    return result if isinstance(result, Record | Corrupt) else _running(claim, tenant, row)


def busy_record(claim: Claim, now_ms: int) -> Record:
    """Return the record of a key that another claim is taking right now."""
    return Record(State.IN_FLIGHT, bytes(16), claim.fingerprint, now_ms, now_ms, claim.lease_ms, mode=claim.mode)


# Settles ...


def _settle_row(claim: Claim, event: int, retention_ms: int, status: int, *outcome: bytes | int | None) -> Row:
    check, tombstone_ms, kept = claim.self_check, 0, claim.kept
    if event == STORED:
        tombstone_ms, kept = claim.tombstone_ms, of_complete(kept)
    return (
        claim.key, lock_of(claim.key), claim.token, event, retention_ms, tombstone_ms, status, int(claim.fence or b"0"),
        claim.created_ms, _MODES[claim.mode], claim.fingerprint, check[:16], check[16:], *outcome,
        None if event in (RELEASED, WITHDRAWN) else kept or None,
    )  # fmt: skip


def store_row(claim: Claim, response: StoredResponse, last_chunk: bytes) -> Row:
    """Return the arguments of `settle_1` for a response."""
    chunks, size = (response.chunks, response.size) if response.body_stored else (0, 0)
    body, tail = None, last_chunk or None
    if chunks <= 1 and response.body_stored and len(last_chunk) == size <= ROW_BYTES:
        body, tail = last_chunk, None
    outcome = (pack(claim, response), response.digest, chunks, size, body, tail, None)
    return _settle_row(claim, STORED, claim.retention_ms, response.status, *outcome)


def release_row(claim: Claim, event: int = RELEASED) -> Row:
    """Return the arguments of `settle_1` that free the key."""
    return _settle_row(claim, event, claim.retention_ms, 0, None, None, 0, 0, None, None, None)


def unknown_row(claim: Claim, reason: str, status: int) -> Row:
    """Return the arguments of `settle_1` that mark the key unknown."""
    event = CANCELLATION if claim.mode == CANCELLED else UNKNOWN
    why = reason.encode("utf-8", "replace")
    return _settle_row(claim, event, claim.unknown_retention_ms, status, None, None, 0, 0, None, None, why)


_SETTLE = {
    1: SettleStatus.STORED,
    2: SettleStatus.RELEASED,
    3: SettleStatus.MARKED_UNKNOWN,
    4: SettleStatus.INCOMPLETE,
    # The token is ours, but the record has another response of ours. As behind a fence, nothing was changed.
    5: SettleStatus.FENCED,
    6: SettleStatus.FENCED,
}
_RENEW = {
    1: RenewStatus.RENEWED,
    2: RenewStatus.ABSENT,
    3: RenewStatus.UNKNOWN,
    4: RenewStatus.COMPLETE,
    5: RenewStatus.FENCED,
}
_APPEND = {
    1: AppendStatus.APPENDED,
    8: AppendStatus.APPENDED_READ,
    2: AppendStatus.ABSENT,
    3: AppendStatus.INCOMPLETE,
    4: AppendStatus.COMPLETE,
    5: AppendStatus.FENCED,
}
_RESOLVE = {
    1: ResolveStatus.RESOLVED,
    2: ResolveStatus.ABSENT,
    3: ResolveStatus.RELEASED,
    4: ResolveStatus.COMPLETE,
    5: ResolveStatus.FENCED,
    6: ResolveStatus.RUNNING,
}
_DROP = {
    1: DropStatus.DROPPED,
    2: DropStatus.KEPT,
    3: DropStatus.ABSENT,
    4: DropStatus.FENCED,
}
# By the tag of follow_2.
_FOLLOWED = {
    1: State.IN_FLIGHT,
    RESTARTS: State.IN_FLIGHT,
    2: State.UNKNOWN,
    3: State.COMPLETE,
    5: State.EXPIRED,
}
# The usual end of an exchange, made once.
_DONE = SettleResult(SettleStatus.STORED)
# Of a key that was freed, and of what another transaction holds: nothing was changed, and a repeat may find it free.
RELEASED_TAG, BUSY_TAG = 2, 7


def settle_result(row: Mapping[str, Any], releases: bool, retried: bool) -> SettleResult:
    """Return what a row of `settle_1` means.

    `releases`: the settle frees the key. `retried`: an earlier try of it may have been executed.
    """
    tag, found = row["tag"], row["found"]
    if tag == 1 and found:
        return _DONE
    # A retried release says little of its own: the first try may have freed the key, and another claim may have it.
    if releases and retried:
        return SettleResult(SettleStatus.RELEASED)
    status = _SETTLE.get(tag, SettleStatus.UNCONFIRMED)
    return SettleResult(status, record_was_gone=not found and status.is_done)


def renew_status(tag: int) -> RenewStatus:
    return _RENEW.get(tag, RenewStatus.UNCONFIRMED)


def append_status(tag: int) -> AppendStatus:
    return _APPEND.get(tag, AppendStatus.UNCONFIRMED)


def resolve_status(tag: int) -> ResolveStatus:
    return _RESOLVE.get(tag, ResolveStatus.UNCONFIRMED)


def drop_status(tag: int) -> DropStatus:
    return _DROP.get(tag, DropStatus.UNCONFIRMED)


def read_chunks(rows: Sequence[Mapping[str, Any]]) -> list[bytes] | ReadFailure:
    """Return the chunks in the rows of `read_1`, or why there are none."""
    tag = rows[0]["tag"]
    if tag == 1:
        return [row["bytes"] for row in rows]
    return ReadFailure.GONE if tag == 2 else ReadFailure.INCOMPLETE


def followed(key: bytes, first: int, row: Mapping[str, Any]) -> Followed | ReadFailure:
    """Return what a row of `follow_2` means. `first`: the index from which on chunks were asked for."""
    if (state := _FOLLOWED.get(row["tag"])) is None:
        return ReadFailure.GONE
    chunks, response, head = list(row["chunks"] or ()), None, row["head"] or b""
    left_ms = max(0, row["lease_left"]) if state is State.IN_FLIGHT else 0
    if state is State.COMPLETE:
        meta, head = row["meta"] or b"", b""
        found = unpack(key, tenant_of(meta), meta, None, row["now"])
        if isinstance(found, Corrupt):
            return ReadFailure.INCOMPLETE
        response = found.response
    elif state is State.IN_FLIGHT and not left_ms:
        state = State.UNKNOWN
    if not chunks and first < row["count"]:
        return ReadFailure.INCOMPLETE
    dropped = state is State.IN_FLIGHT and row["stage"] == STAGES[DROPPED]
    return Followed(state, head, chunks, row["count"], response, row["replaced"], left_ms, dropped)
