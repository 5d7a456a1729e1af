"""What the replies of the scripts about records mean.

Proxies of several versions share a store, so the reply words never change. This is the only module that maps them.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from oncegate.store.kept import as_replaced
from oncegate.store.record import Claim, Corrupt, Record, running, unpack, unpack_expired
from oncegate.store.redis.layouts.packed import unpack_packed
from oncegate.store.redis.server import is_refusal
from oncegate.store.redis.wire import ErrorReply
from oncegate.store.results import (
    AppendStatus,
    ClaimResult,
    DropStatus,
    Forbidden,
    NotAttempted,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    StoreFull,
    Unconfirmed,
)

SETTLE = {
    b"stored": SettleStatus.STORED,
    b"released": SettleStatus.RELEASED,
    b"unknown": SettleStatus.MARKED_UNKNOWN,
    b"torn": SettleStatus.INCOMPLETE,
    # The token is ours, but the record has another response of ours. As behind a fence, nothing was changed.
    b"complete": SettleStatus.FENCED,
    b"fenced": SettleStatus.FENCED,
}
APPEND = {
    b"appended": AppendStatus.APPENDED,
    b"read": AppendStatus.APPENDED_READ,
    b"torn": AppendStatus.INCOMPLETE,
    b"absent": AppendStatus.ABSENT,
    b"complete": AppendStatus.COMPLETE,
    b"fenced": AppendStatus.FENCED,
}
RENEW = {
    b"renewed": RenewStatus.RENEWED,
    b"absent": RenewStatus.ABSENT,
    b"unknown": RenewStatus.UNKNOWN,
    b"complete": RenewStatus.COMPLETE,
    b"fenced": RenewStatus.FENCED,
}
READ = {
    b"torn": ReadFailure.INCOMPLETE,
    b"gone": ReadFailure.GONE,
}
RESOLVE = {
    b"resolved": ResolveStatus.RESOLVED,
    b"released": ResolveStatus.RELEASED,
    b"absent": ResolveStatus.ABSENT,
    b"complete": ResolveStatus.COMPLETE,
    b"fenced": ResolveStatus.FENCED,
    b"running": ResolveStatus.RUNNING,
}
DROP = {
    b"dropped": DropStatus.DROPPED,
    b"kept": DropStatus.KEPT,
    b"absent": DropStatus.ABSENT,
    b"fenced": DropStatus.FENCED,
}

# Errors that pass by themselves, or whose cause is watched for itself.
PASSING = (
    *("ASK", "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "MOVED", "NOREPLICAS"),
    *("NOSCRIPT", "OOM", "READONLY", "TRYAGAIN", "UNBLOCKED"),
)
# The first word of the reply to a claim that took its key.
CLAIMED = b"claimed"
# The usual end of an exchange, made once.
STORED_REPLY, STORED = [b"stored", b"found"], SettleResult(SettleStatus.STORED)
# A claim that the server executed after its deadline. The reply has the server's time, so the next try is not late.
LATE = Unconfirmed("the store was reached too late", maybe_executed=False)


def claim_result(claim: Claim, tenant: bytes, reply: Any, note_time: Callable[[int], None]) -> ClaimResult:
    """Return what a reply to `claim` means: LATE where the key is free, and the deadline had passed.

    `note_time(now_ms)` is called with the server's time.
    """
    # By its length, too: in a damaged record the state may be any word.
    if isinstance(reply, list) and len(reply) in (4, 5) and reply[0] == CLAIMED:
        note_time(int(reply[1]))
        if claim.fence:
            # It is held, and its holder compares.
            claim = replace(claim)
        claim.fence, claim.created_ms = reply[2], int(reply[3])
        if len(reply) > 4:
            claim.kept = as_replaced(claim.kept)
        return claim
    match reply:
        # `bytes() as value`, not `bytes(value)`, which looks for a missing attribute of the type: 4,000 instructions
        # each (Python 3.11, counted). Replays come here.
        case [b"packed", int() as now_ms, bytes() as value]:
            note_time(now_ms)
            return unpack_packed(claim.key, tenant, value, now_ms)
        case [b"complete", int(now_ms), meta, body, more]:
            note_time(now_ms)
            found = unpack(claim.key, tenant, meta, body, now_ms)
            if more and isinstance(found, Record):
                found.kept = more
            return found
        case [b"late", now_ms]:
            note_time(int(now_ms))
            return LATE
        case [b"expired", int(now_ms), bytes(meta)]:
            note_time(now_ms)
            return unpack_expired(claim.key, tenant, meta, now_ms)
        case [state, int(now_ms), *fields] if len(fields) == 9:
            return running(claim.key, tenant, [state, *fields], now_ms)
        case _:
            return _failed_claim(reply)


def _failed_claim(reply: Any) -> Corrupt | Unconfirmed:
    """Return what a reply to `claim` means that names no record."""
    match reply:
        case ErrorReply() if str(reply).startswith("WRONGTYPE"):
            return Corrupt("the record is of another type")
        case Unconfirmed():
            return reply
        case ErrorReply() if is_out_of_memory(reply):
            return StoreFull(str(reply))
        case ErrorReply() if is_refusal(reply) and "script" in str(reply):
            return Forbidden(str(reply))
        case _:
            # Any other error: nothing was written.
            return Unconfirmed(str(reply), maybe_executed=False)


def is_claimed(reply: object) -> bool:
    """Return whether a reply to `claim` says that the claim took its key."""
    return isinstance(reply, list) and reply[0] == CLAIMED


def settle_result(reply: Any, releases: bool, retried: bool) -> SettleResult:
    """Return what a reply to `settle` means.

    `releases`: the settle frees the key. `retried`: an earlier try of it may have been executed.
    """
    if reply == STORED_REPLY:
        return STORED
    if not isinstance(reply, list):
        return SettleResult(SettleStatus.UNCONFIRMED)
    # A retried release says little of its own: the first try may have removed the record, and another claim may have
    # taken the free key since.
    if releases and retried:
        return SettleResult(SettleStatus.RELEASED)
    return SettleResult(SETTLE[reply[0]], record_was_gone=reply[1:] == [b"absent"])


def append_status(reply: Any) -> AppendStatus:
    """Return what a reply to `append` means."""
    if isinstance(reply, list):
        return APPEND[reply[0]]
    return AppendStatus.NO_MEMORY if is_out_of_memory(reply) else AppendStatus.UNCONFIRMED


def renew_status(reply: Any) -> RenewStatus:
    """Return what a reply to `renew` means."""
    return RENEW[reply[0]] if isinstance(reply, list) else RenewStatus.UNCONFIRMED


def resolve_status(reply: Any) -> ResolveStatus:
    """Return what a reply to `resolve` means."""
    return RESOLVE[reply[0]] if isinstance(reply, list) else ResolveStatus.UNCONFIRMED


def drop_status(reply: Any) -> DropStatus:
    """Return what a reply to `drop` means."""
    return DROP[reply[0]] if isinstance(reply, list) else DropStatus.UNCONFIRMED


def read_chunks(reply: Any) -> list[bytes] | ReadFailure:
    """Return the chunks in a reply to `read`, or why there are none."""
    match reply:
        case [b"chunks", *chunks]:
            return chunks
        case [bytes(word)]:
            return READ[word]
        case _:
            return ReadFailure.UNCONFIRMED


def is_out_of_memory(reply: object) -> bool:
    """Return whether the server refused a write at its memory limit."""
    return isinstance(reply, ErrorReply) and str(reply).startswith("OOM")


def first_error(replies: Iterable[object]) -> ErrorReply | None:
    """Return the first of these replies that is an error of the server, or None."""
    return next((reply for reply in replies if isinstance(reply, ErrorReply)), None)


def is_passing(reply: ErrorReply) -> bool:
    """Return whether an error passes by itself, as in a failover, or has a cause that is watched for itself."""
    return str(reply).startswith(PASSING)


def is_noscript(reply: object) -> bool:
    """Return whether the server does not know the script: it is a new master, or its scripts were flushed."""
    return isinstance(reply, ErrorReply) and str(reply).startswith("NOSCRIPT")


def is_final(reply: object) -> bool:
    """Return whether repeating the call cannot bring another reply."""
    return isinstance(reply, list) or is_out_of_memory(reply)


def is_final_claim(result: ClaimResult) -> bool:
    """Return whether another try of a claim within its deadline cannot end otherwise."""
    return not isinstance(result, Unconfirmed) or isinstance(result, NotAttempted | StoreFull | Forbidden)


def may_have_run(reply: object) -> bool:
    """Return whether a call without a confirmed reply may have been executed, or may be executed later."""
    return isinstance(reply, Unconfirmed) and reply.maybe_executed
