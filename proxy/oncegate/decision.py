"""Every rule about a key in one place: what a duplicate gets, and how a claim ends. Pure, imports nothing of ours.

The rules of this file:
1. Every function is total and synchronous: it takes what was read, returns a value, and awaits nothing.
2. A comparison of fingerprints comes first. A request with another fingerprint never learns the key's state.
3. In doubt a key is unknown. Only a request that was surely not executed frees its key.
4. Time counts as of now: a record in flight whose lease has passed is unknown, though the store still says in_flight.
   A complete record whose retention has passed is expired, though the store may still have the response.

Which record decides what for a new request (`decide`):

| state now | response body stored | same fingerprint    | other fingerprint |
|-----------|----------------------|---------------------|-------------------|
| complete  | yes                  | replay              | key_reused        |
| complete  | no                   | response_not_kept   | key_reused        |
| in_flight |                      | in_flight           | key_reused        |
| unknown   |                      | outcome_unknown     | key_reused        |
| expired   |                      | key_expired         | key_reused        |

Which unknown key a new request with the same fingerprint may claim (`may_take_over`, `may_resend`). It is executed
again in the mode retry, and sent on with the same key where its API recognizes that:

| mode      | claimed under a rule whose API recognizes keys | as long as the API keeps the key | after that      |
|-----------|------------------------------------------------|----------------------------------|-----------------|
| retry     |                                                | execute                          | execute         |
| hold      | yes, and the rule still says so                | resend                           | outcome_unknown |
| hold      | no                                             | outcome_unknown                  | outcome_unknown |
| cancelled |                                                | outcome_unknown                  | outcome_unknown |

The response to a resend settles the key, as any other. But it never frees it: the first request may have been executed,
and another one must not come under its key.

How far an exchange got, and what becomes of its claim: the rows of `Ending`.
"""

from enum import Enum
from math import ceil
from typing import Final, assert_never


class Disposition(Enum):
    """What the status of a complete response means for its key. `label` is the outcome in logs and metrics."""

    STORE = "executed"
    RELEASE = "released"
    AMBIGUOUS = "unknown"

    def __init__(self, label: str) -> None:
        self.label = label


class State(Enum):
    """What the store holds for a key, in the spelling of the record's field `state`."""

    IN_FLIGHT = "in_flight"
    COMPLETE = "complete"
    UNKNOWN = "unknown"
    # The tombstone of a complete record: it says that the request was executed, and no longer has the response.
    EXPIRED = "expired"


class UnknownMode(Enum):
    """What a later request with an unknown key gets: a refusal, or the key. `wire` is the record's spelling.

    Policies, claims and records carry `wire`, because the store reads and writes it with every claim. CANCELLED is the
    mode of a record alone, whatever its claim's was: somebody has stopped the request, and no retry executes it.
    """

    HOLD = b"hold"
    RETRY = b"retry"
    CANCELLED = b"cancelled"

    def __init__(self, wire: bytes) -> None:
        self.wire = wire


# Bound once for the request path: a member looked up in its class costs 970 instructions (Python 3.11, measured).
HOLD: Final = UnknownMode.HOLD.wire
RETRY: Final = UnknownMode.RETRY.wire
CANCELLED: Final = UnknownMode.CANCELLED.wire


class Decision(Enum):
    """What a request with a taken key gets. All but REPLAY are the code of a problem."""

    REPLAY = "replay"
    RESPONSE_NOT_KEPT = "response_not_kept"
    IN_FLIGHT = "in_flight"
    OUTCOME_UNKNOWN = "outcome_unknown"
    KEY_EXPIRED = "key_expired"
    KEY_REUSED = "key_reused"


class Settlement(Enum):
    """What becomes of a claim. `label` names it in metrics.

    `completes`: the key keeps a response for good. `stores_body`: its body, too. `frees`: the key may be claimed again.
    """

    STORE = "stored", True, True, False
    STORE_WITHOUT_BODY = "stored_without_body", True, False, False
    RELEASE = "released", False, False, True
    UNKNOWN = "unknown", False, False, False
    # Unknown as well, in the mode `cancelled`.
    CANCELLED = "cancelled", False, False, False

    # An attribute of a member costs a tenth of a member that is looked up in its class (Python 3.11, measured).
    def __init__(self, label: str, completes: bool, stores_body: bool, frees: bool) -> None:
        self.label, self.completes, self.stores_body, self.frees = label, completes, stores_body, frees


class Ending(Enum):
    """How far the exchange with the upstream got, from the worst to the best, and how that settles its claim."""

    # The upstream may have executed the request, so no other request may execute it.
    NO_RESPONSE = "no_response", Settlement.UNKNOWN
    TRUNCATED = "truncated", Settlement.UNKNOWN
    # oncegate closed the upstream connection, or had not sent anything: the request was not to be executed any more.
    CANCELLED = "cancelled", Settlement.CANCELLED
    # The upstream has read nothing of it.
    NOT_SENT = "not_sent", Settlement.RELEASE
    # A complete response whose status says: perhaps executed, or surely not.
    AMBIGUOUS = "ambiguous", Settlement.UNKNOWN
    DECLINED = "declined", Settlement.RELEASE
    # A complete response to an executed request, over the limit for stored bodies or within it.
    TOO_LARGE = "too_large", Settlement.STORE_WITHOUT_BODY
    COMPLETE = "complete", Settlement.STORE

    def __init__(self, label: str, settlement: Settlement) -> None:
        self.label, self.settlement = label, settlement


def effective_state(state: State, lease_left_ms: int, retention_left_ms: int = 1) -> State:
    """Return the state as of now. A record in flight without a running lease is unknown.

    Its owner no longer renews the lease, and may have executed the request or not. A complete record is expired once
    its retention is over. `retention_left_ms`: of a record with a tombstone; any other is removed when it is over.
    """
    if state is _IN_FLIGHT and lease_left_ms <= 0:
        return _UNKNOWN
    return _EXPIRED if state is _COMPLETE and retention_left_ms <= 0 else state


def decide(state: State, same_request: bool, body_stored: bool) -> Decision:
    """Return what a request gets from another request's record in `state` (as of now); the table above."""
    if not same_request:
        return Decision.KEY_REUSED
    if state is _COMPLETE:
        return _REPLAY if body_stored else Decision.RESPONSE_NOT_KEPT
    if state is _IN_FLIGHT:
        return Decision.IN_FLIGHT
    if state is _UNKNOWN:
        return Decision.OUTCOME_UNKNOWN
    if state is _EXPIRED:
        return Decision.KEY_EXPIRED
    assert_never(state)


class Meanwhile(Enum):
    """What a duplicate does while its original is running (Decision.IN_FLIGHT)."""

    # It gets the response as it comes.
    JOIN = "join"
    # It waits for the beginning of the response, and joins it then.
    WAIT_FOR_HEAD = "wait_for_head"
    # It waits until the original has ended.
    WAIT_FOR_END = "wait_for_end"
    # It gets in_flight.
    REFUSED = "refused"


def meanwhile(joins: bool, waits: bool, has_head: bool, fits: bool) -> Meanwhile:
    """Return what a duplicate does while its original is running.

    `joins`, `waits`: what its client and its policy want. `has_head`: the response has begun, and it is one that is
    stored, so that a response which frees the key is never joined. `fits`: this client can get it as it comes.
    """
    if joins and has_head and fits:
        return Meanwhile.JOIN
    if not waits:
        return Meanwhile.REFUSED
    return Meanwhile.WAIT_FOR_HEAD if joins and fits else Meanwhile.WAIT_FOR_END


# A window: also a record of this very millisecond is older.
ANY_AGE = -1


def is_past(window_ms: int, age_ms: int) -> bool:
    """Return whether a complete record is older than the window of a derived key. 0: the key has none."""
    return window_ms != 0 and age_ms > window_ms


def may_take_over(state: State, same_request: bool, mode: bytes, past_window: bool) -> bool:
    """Return whether a new request may claim a key that has a record in `state` (as of now).

    `mode`: the wire value of the record's own UnknownMode, not the new request's. `past_window`: the record is older
    than the window of a derived key; only derived keys have one.
    """
    # What opens a complete record opens its tombstone.
    if state is _COMPLETE or state is _EXPIRED:
        return past_window
    if state is _UNKNOWN:
        return same_request and mode == RETRY
    if state is _IN_FLIGHT:
        return False
    assert_never(state)


def api_recognizes(age_ms: int, kept_ms: int, lease_ms: int) -> bool:
    """Return whether an API that keeps keys for `kept_ms` recognizes one that was first claimed `age_ms` ago.

    0: it recognizes none. A lease less than that counts: what is claimed now may be sent so much later.
    """
    return age_ms + lease_ms < kept_ms


def may_resend(state: State, same_request: bool, mode: bytes, recognized: bool) -> bool:
    """Return whether a new request may claim a key that has a record in `state` (as of now), to be sent once more.

    `mode`: the record's own. `recognized`: its claim and the new request are for an API that executes a key only once,
    and that still recognizes this one.
    """
    return state is _UNKNOWN and same_request and mode == HOLD and recognized


def of_resend(disposition: Disposition, busy: bool) -> Disposition:
    """Return what a response means where an earlier request with its key may have been executed: never a free key.

    `busy`: by its status, the API may still be working on that request.
    """
    return _AMBIGUOUS if busy or disposition is _RELEASE else disposition


def ending(disposition: Disposition, body_stored: bool) -> Ending:
    """Return the ending of an exchange whose response is complete."""
    if disposition is _STORE:
        return _WHOLE if body_stored else _TOO_LARGE
    if disposition is _RELEASE:
        return _DECLINED
    if disposition is _AMBIGUOUS:
        return _UNCLEAR
    assert_never(disposition)


# Bound once, because every request uses them: a member looked up in its class costs 100 ns (Python 3.11, measured).
_IN_FLIGHT: Final = State.IN_FLIGHT
_COMPLETE: Final = State.COMPLETE
_UNKNOWN: Final = State.UNKNOWN
_EXPIRED: Final = State.EXPIRED
_REPLAY: Final = Decision.REPLAY
_STORE: Final = Disposition.STORE
_RELEASE: Final = Disposition.RELEASE
_AMBIGUOUS: Final = Disposition.AMBIGUOUS
_WHOLE: Final = Ending.COMPLETE
_TOO_LARGE: Final = Ending.TOO_LARGE
_DECLINED: Final = Ending.DECLINED
_UNCLEAR: Final = Ending.AMBIGUOUS


class Verdict(Enum):
    """What the API's answer to a probe says of a request whose outcome is unknown, in the spelling of rules."""

    # It was executed, and this became of it.
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    # The API does not know of it, for now: see `absent` in docs/reference/rules.md for when that frees a key.
    ABSENT = "absent"
    INCONCLUSIVE = "inconclusive"


def must_reclaim(age_s: float, lease_ms: int) -> bool:
    """Return whether a claim of this age has to be made again before the first byte is sent.

    Past half of its lease, the lease may be over before that byte is out.
    """
    return age_s * 1000 > lease_ms / 2


# Longer ones help nobody: the SDKs made by Stainless and Square's obey a Retry-After up to 60 s (measured).
MAX_RETRY_AFTER_S = 60
# One request moves the estimate up by at most a fifth, and down by a ninth of that in logarithms. So it comes to rest
# where one request in ten takes longer.
MAX_RISE: Final = 1.2
MAX_FALL: Final = MAX_RISE ** (1 / 9)


def usual_s(before_s: float, took_s: float) -> float:
    """Return how many seconds requests usually take, after one more: about nine in ten take no longer.

    `before_s` is what was returned for the request before, 0 for the first. Old requests count less and less.
    """
    if before_s <= 0:
        return took_s
    # Written out: `min` and `max` take as long as all the rest (Python 3.11, counted).
    if took_s > before_s:
        risen_s = before_s * MAX_RISE
        return took_s if took_s < risen_s else risen_s
    fallen_s = before_s / MAX_FALL
    return took_s if took_s > fallen_s else fallen_s


def retry_after_s(running_s: float, usually_s: float) -> int:
    """Return the Retry-After of a duplicate whose original has been running for `running_s`, in whole seconds.

    Until requests are usually done, it is the time that is left. After that, it is as long as the original is overdue,
    which doubles with each try. At least 1 s, at most MAX_RETRY_AFTER_S. `usually_s`: see `usual_s`; 0: not known.
    """
    return max(1, min(ceil(abs(usually_s - max(0.0, running_s))), MAX_RETRY_AFTER_S))
