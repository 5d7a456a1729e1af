"""What the store does with one record: a table of the verbs as pure functions, with safeguards that can be left out.

A record is reduced to what decides: its state, whose it is, whether its lease runs, and what there is of an answer.
Owners are small numbers, times are gone: a lease runs or has passed, a claim is in time or late.
`test_scripts.py` holds this table to the real scripts.
"""

from typing import NamedTuple

ABSENT, IN_FLIGHT, UNKNOWN, COMPLETE, RELEASED = "absent", "in_flight", "unknown", "complete", "released"
EXPIRED = "expired"  # a tombstone
LAPSED = "lapsed"  # in flight, with a lease that has passed
HOLD, RETRY, CANCELLED = "hold", "retry", "cancelled"
# The mode `hold` where the API recognizes keys. Of a claim: it takes over the record that it has seen, or none.
RESEND = "resend"
NOBODY, OPERATOR = 0, 9  # beside the owners 1, 2, 3
# What a complete record has of its body.
WHOLE, BARE, TORN = "whole", "bare", "torn"

# Every reply of every verb. "told" stands for what claim says of a record that it leaves alone, "found" for what follow
# says of one that is the reader's.
WORDS = {
    "claim": {"claimed", "late", "told"},
    "append": {"appended", "torn", "absent", "complete", "fenced"},
    "renew": {"renewed", "absent", "unknown", "complete", "fenced"},
    "settle": {"stored", "released", "unknown", "torn", "complete", "fenced"},
    "resolve": {"resolved", "released", "absent", "complete", "fenced", "running"},
    "drop": {"dropped", "kept", "absent", "fenced"},
    "read": {"chunks", "gone", "torn"},
    "follow": {"found", "gone"},
}
HOW = {  # of a settle: its word, and how much of an answer it stores
    "store": "store",  # in one piece
    "stream": "store",  # a piece that was appended, and the last one
    "bare": "store",  # nothing of it
    "release": "release",
    "unknown": "unknown",
    "cancelled": "unknown",  # in a mode that no setting has
}
# How an exchange ended, and how its claim is settled.
ENDINGS = {
    "not_sent": "release",
    "no_response": "unknown",
    "truncated": "unknown",
    "cancelled": "cancelled",
    "ambiguous": "unknown",
    "declined": "release",
    "too_large": "bare",
    "complete": "store",
}


class Record(NamedTuple):
    """What stands in the store for the key. `answer` is whose answer a complete one holds."""

    state: str = ABSENT
    token: int = NOBODY
    mode: str = ""
    lease: bool = False  # runs; of one in flight
    piece: int = NOBODY  # who appended the first piece of an answer
    answer: int = NOBODY
    body: str = ""


Done = tuple[str, Record]
Cut = frozenset[str]  # the safeguards that are left out
FREE = (ABSENT, RELEASED)
FINAL = (COMPLETE, EXPIRED)


def is_over(record: Record) -> bool:
    """Return whether nobody can say any more what becomes of a record."""
    return record.state == UNKNOWN or (record.state == IN_FLIGHT and not record.lease)


def is_open(record: Record, mode: str, cut: Cut) -> bool:
    """Return whether a newcomer may ask for a record that was read: the rule of the mode `retry`."""
    if "UNKNOWN_STAYS" in cut and record.state == UNKNOWN:
        return True
    if "LAPSED_IS_UNKNOWN" in cut and record.state == IN_FLIGHT and not record.lease:
        return True
    return is_over(record) and (mode if "RECORDS_OWN_MODE" in cut else record.mode) == RETRY


def claim(record: Record, me: int, mode: str, seen: int, late: bool, cut: Cut) -> Done:
    """Claim for `me`; a record that is open only if it is the one of the token `seen`."""
    late = late and "NOT_AFTER" not in cut
    resends = mode == RESEND and seen != NOBODY
    ours = record.token == me and record.state == IN_FLIGHT and "KNOWN_AGAIN" not in cut
    if record.state not in FREE and not ours:
        opened = is_open(record, mode, cut) or ("AS_OF_NOW" in cut and record.state == IN_FLIGHT)
        opened = opened or (resends and is_over(record) and record.mode == HOLD)
        same = record.token == seen or "AS_SEEN" in cut
        if not (seen and opened and same) or late:
            return "told", record
    if late or (resends and record.state in FREE):
        return "late", record
    mode = HOLD if resends else mode
    return "claimed", record._replace(lease=True) if ours else Record(IN_FLIGHT, me, mode, lease=True)


def append(record: Record, me: int, cut: Cut) -> Done:
    """Keep the first piece of an answer of `me`. Renewals extend the lease."""
    if record.state in FINAL:
        return "complete" if record.token == me else "fenced", record
    if record.state == ABSENT:
        return "absent", record
    if record.token != me and "TOKEN_ON_APPEND" not in cut:
        return "fenced", record
    if record.piece not in (NOBODY, me):
        return "torn", record
    return "appended", record._replace(piece=me)


def renew(record: Record, me: int, cut: Cut) -> Done:
    """Extend the lease of `me`."""
    if record.state in FINAL:
        return "complete" if record.token == me else "fenced", record
    if record.state == ABSENT:
        return "absent", record
    if record.token != me and "TOKEN_ON_RENEW" not in cut:
        return "fenced", record
    if record.state != IN_FLIGHT:
        return "unknown", record
    return "renewed", record._replace(lease=True)


def settle(record: Record, me: int, mode: str, how: str, cut: Cut) -> Done:
    """End the claim of `me`."""
    word = HOW[how]
    if record.state != ABSENT and record.token != me and f"TOKEN_ON_{word.upper()}" not in cut:
        return "fenced", record
    if record.state in FINAL and "FINAL" not in cut:
        same = word == "store" and record.answer == me
        return "stored" if same else "complete", record
    if word == "release":
        return "released", Record()
    if word == "unknown":
        stays = how == "cancelled" and "CANCELLED_STAYS" not in cut
        return "unknown", Record(UNKNOWN, me, CANCELLED if stays else mode)
    kept = {"store": WHOLE, "bare": BARE, "stream": WHOLE if record.piece else TORN}[how]
    if kept == TORN and "COUNTED" not in cut:
        return "torn", record
    return "stored", Record(COMPLETE, me, answer=me, body=kept)


def resolve(record: Record, seen: int, how: str, as_seen: str, cut: Cut) -> Done:
    """End the key for an operator who saw the token `seen`: how is answer or release. A repeat changes nothing more.

    `as_seen`: that the record still has to be unknown, or lapsed with the lease that was seen; empty for any.
    """
    blind = "OPERATOR_COMPARES" in cut
    decided = record.token == OPERATOR
    if record.state in FINAL and not blind:
        return "resolved" if decided and how == "answer" else "complete", record
    if record.state in FREE:
        return "released" if decided and how == "release" else "absent", record
    if record.token != seen and not blind:
        return "fenced", record
    if as_seen and (record.lease or as_seen != (UNKNOWN if record.state == UNKNOWN else LAPSED)):
        return "running", record
    token = record.token if "OPERATOR_FENCES" in cut else OPERATOR
    if how == "answer":
        return "resolved", Record(COMPLETE, token, answer=OPERATOR, body=WHOLE)
    return "released", Record(RELEASED, token)


def drop(record: Record, seen: int, purge: bool, cut: Cut) -> Done:
    """Leave the tombstone of the token `seen`. Its retention is never over here, so that only a purge does it."""
    if record.state not in FINAL:
        return "absent", record
    if record.token != seen:
        return "fenced", record
    if record.state == COMPLETE and not purge:
        return "kept", record
    return "dropped", Record(EXPIRED, seen)


def read(record: Record, token: int) -> Done:
    """Read the answer of `token`."""
    if record.state != COMPLETE or record.token != token:
        return "gone", record
    return "chunks" if record.body == WHOLE else "torn", record


def follow(record: Record, token: int) -> Done:
    """Look at the claim of `token` in whatever state it is; also before there is an answer."""
    return "gone" if record.state in FREE or record.token != token else "found", record


def told(record: Record) -> str:
    """Return what a newcomer with the same request gets from a record that is not open."""
    if record.state == COMPLETE:
        return "replay" if record.body == WHOLE else "response_not_kept"
    if record.state == EXPIRED:
        return "key_expired"
    return "outcome_unknown" if is_over(record) else "in_flight"
