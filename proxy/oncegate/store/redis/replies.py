"""The reply words of the Lua scripts, and the statuses that they mean.

The words are part of the format that proxies of several versions share, so they never change. This is the only module
that maps them. `claim` and `settle` also depend on what was asked: see `store/store.py`.
"""

from typing import Any

from oncegate.store.redis.link import ErrorReply
from oncegate.store.results import AppendStatus, ReadFailure, RenewStatus, ResolveStatus, SettleStatus, Unconfirmed

SETTLE = {
    b"stored": SettleStatus.STORED,
    b"released": SettleStatus.RELEASED,
    b"unknown": SettleStatus.MARKED_UNKNOWN,
    b"torn": SettleStatus.INCOMPLETE,
    # The token is ours, and the record has another response of ours: nothing was changed, as behind a fence.
    b"complete": SettleStatus.FENCED,
    b"fenced": SettleStatus.FENCED,
}
APPEND = {
    b"appended": AppendStatus.APPENDED,
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
}


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


def is_noscript(reply: object) -> bool:
    """Return whether the server does not know the script: it is a new master, or its scripts were flushed."""
    return isinstance(reply, ErrorReply) and str(reply).startswith("NOSCRIPT")


def is_final(reply: object) -> bool:
    """Return whether repeating the call cannot bring another reply."""
    return isinstance(reply, list) or is_out_of_memory(reply)


def may_have_run(reply: object) -> bool:
    """Return whether a call without a confirmed reply may have been executed, or may be executed later."""
    return isinstance(reply, Unconfirmed) and reply.maybe_executed
