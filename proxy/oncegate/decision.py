"""Every rule about a key, in one place: what is done with what was found, and how a claim ends. Pure.

Two tables carry the promise:
- `decide`: a record and the fingerprint of a new request -> what that request gets;
- `Ending`: how far an exchange got -> what becomes of its claim.
A mismatch is looked at before anything else, so that another request's state never shows.
"""

from enum import Enum
from math import ceil
from typing import Final, assert_never


class Disposition(Enum):
    """What a complete answer's status means for its key; `word` is what its request's outcome is called."""

    STORE = "executed"
    RELEASE = "released"
    AMBIGUOUS = "unknown"

    def __init__(self, word: str) -> None:
        self.word = word


class State(Enum):
    """What the store holds for a key. A passed lease is read as unknown; nobody writes it."""

    IN_FLIGHT = "in_flight"
    COMPLETE = "complete"
    UNKNOWN = "unknown"


class Decision(Enum):
    """What a request whose key is taken gets."""

    REPLAY = "replay"
    NOT_KEPT = "not_kept"
    IN_FLIGHT = "in_flight"
    UNKNOWN = "unknown"
    MISMATCH = "mismatch"


class Settlement(Enum):
    """What becomes of a claim. `completes`: the key is settled for good, by an answer."""

    STORE = "store", True
    STORE_BARE = "store_bare", True  # without its body
    RELEASE = "release", False
    UNKNOWN = "unknown", False

    def __init__(self, word: str, completes: bool) -> None:
        self.word, self.completes = word, completes


class Ending(Enum):
    """How far the exchange with the upstream got, from the worst to the best, and what that makes of its claim."""

    NO_RESPONSE = "no_response", Settlement.UNKNOWN
    TRUNCATED = "truncated", Settlement.UNKNOWN
    NOT_SENT = "not_sent", Settlement.RELEASE
    AMBIGUOUS = "ambiguous", Settlement.UNKNOWN
    DECLINED = "declined", Settlement.RELEASE
    TOO_LARGE = "too_large", Settlement.STORE_BARE
    COMPLETE = "complete", Settlement.STORE

    def __init__(self, word: str, settlement: Settlement) -> None:
        self.word, self.settlement = word, settlement


def state_now(state: State, lease_left_ms: int) -> State:
    """Return the state as it counts now: an owner that no longer renews may have done anything."""
    return _NOBODY_KNOWS if state is _RUNS and lease_left_ms <= 0 else state


def decide(state: State, same_request: bool, kept: bool) -> Decision:
    """Return what a request gets from a record in `state` (as of now) that is not its own."""
    if not same_request:
        return Decision.MISMATCH
    if state is _DONE:
        return _REPLAY if kept else Decision.NOT_KEPT
    if state is _RUNS:
        return Decision.IN_FLIGHT
    if state is _NOBODY_KNOWS:
        return Decision.UNKNOWN
    assert_never(state)


def is_open(state: State, same_request: bool, mode: bytes, past_window: bool) -> bool:
    """Return whether a newcomer may take over a key whose record (in `state` as of now) was read and checked.

    The record's own mode counts, not the newcomer's; only derived keys have a window.
    """
    if state is _DONE:
        return past_window
    if state is _NOBODY_KNOWS:
        return same_request and mode == b"retry"
    if state is _RUNS:
        return False
    assert_never(state)


def ending(disposition: Disposition, kept: bool) -> Ending:
    """Return the ending of an exchange whose answer came whole; `kept`: its body is in the record."""
    if disposition is _STORE:
        return _COMPLETE if kept else _TOO_LARGE
    if disposition is _RELEASE:
        return _DECLINED
    if disposition is _AMBIGUOUS:
        return _WAS_AMBIGUOUS
    assert_never(disposition)


# Bound once: every request asks, and a member looked up in its class costs 100 ns (Python 3.11, measured).
_RUNS: Final = State.IN_FLIGHT
_DONE: Final = State.COMPLETE
_NOBODY_KNOWS: Final = State.UNKNOWN
_REPLAY: Final = Decision.REPLAY
_STORE: Final = Disposition.STORE
_RELEASE: Final = Disposition.RELEASE
_AMBIGUOUS: Final = Disposition.AMBIGUOUS
_COMPLETE, _TOO_LARGE, _DECLINED = Ending.COMPLETE, Ending.TOO_LARGE, Ending.DECLINED
_WAS_AMBIGUOUS = Ending.AMBIGUOUS


def must_reclaim(age_s: float, lease_ms: int) -> bool:
    """Return whether a claim is too old to send on: its lease may be over before the first byte is out."""
    return age_s * 1000 > lease_ms / 2


def retry_after_s(running_ms: int, lease_ms: int) -> int:
    """Return when a duplicate should come again, in whole seconds: as long again as it has been running."""
    return max(1, min(ceil(running_ms / 1000), lease_ms // 1000))
