"""The decisions about a key: what a duplicate gets, and how a claim ends."""

from collections.abc import Iterable
from functools import reduce
from itertools import product
from random import Random

import pytest

from oncegate.decision import (
    HOLD,
    Decision,
    Disposition,
    Ending,
    Meanwhile,
    Settlement,
    State,
    api_recognizes,
    decide,
    effective_state,
    ending,
    may_resend,
    may_take_over,
    meanwhile,
    must_reclaim,
    of_resend,
    retry_after_s,
    usual_s,
)

RUNNING, PASSED = 1, 0  # what is left of a lease, in ms

# What was found, what is left of its lease -> what the same request gets. Another one is a mismatch.
DECISIONS = [
    # found           lease    kept   same fingerprint     other fingerprint
    (State.IN_FLIGHT, RUNNING, True, Decision.IN_FLIGHT, Decision.KEY_REUSED),
    (State.IN_FLIGHT, RUNNING, False, Decision.IN_FLIGHT, Decision.KEY_REUSED),
    (State.IN_FLIGHT, PASSED, True, Decision.OUTCOME_UNKNOWN, Decision.KEY_REUSED),
    (State.IN_FLIGHT, PASSED, False, Decision.OUTCOME_UNKNOWN, Decision.KEY_REUSED),
    (State.COMPLETE, RUNNING, True, Decision.REPLAY, Decision.KEY_REUSED),
    (State.COMPLETE, PASSED, True, Decision.REPLAY, Decision.KEY_REUSED),
    (State.COMPLETE, RUNNING, False, Decision.RESPONSE_NOT_KEPT, Decision.KEY_REUSED),
    (State.COMPLETE, PASSED, False, Decision.RESPONSE_NOT_KEPT, Decision.KEY_REUSED),
    (State.UNKNOWN, RUNNING, True, Decision.OUTCOME_UNKNOWN, Decision.KEY_REUSED),
    (State.UNKNOWN, RUNNING, False, Decision.OUTCOME_UNKNOWN, Decision.KEY_REUSED),
    (State.UNKNOWN, PASSED, True, Decision.OUTCOME_UNKNOWN, Decision.KEY_REUSED),
    (State.UNKNOWN, PASSED, False, Decision.OUTCOME_UNKNOWN, Decision.KEY_REUSED),
    (State.EXPIRED, RUNNING, True, Decision.KEY_EXPIRED, Decision.KEY_REUSED),
    (State.EXPIRED, PASSED, True, Decision.KEY_EXPIRED, Decision.KEY_REUSED),
    (State.EXPIRED, RUNNING, False, Decision.KEY_EXPIRED, Decision.KEY_REUSED),
    (State.EXPIRED, PASSED, False, Decision.KEY_EXPIRED, Decision.KEY_REUSED),
]

# The modes of records, and what a damaged one may have. A request that was cancelled is never executed by a retry.
MODES = (b"hold", b"retry", b"cancelled", b"")
# As of now: what was found, the same fingerprint, the record's own mode, past its window -> whether it is open.
OPEN = {
    (State.UNKNOWN, True, b"retry", False),
    (State.UNKNOWN, True, b"retry", True),
    *product([State.COMPLETE, State.EXPIRED], (True, False), MODES, [True]),
}

# How far the exchange got -> what becomes of its claim.
ENDINGS = {
    Ending.NOT_SENT: Settlement.RELEASE,
    Ending.NO_RESPONSE: Settlement.UNKNOWN,
    Ending.TRUNCATED: Settlement.UNKNOWN,
    Ending.CANCELLED: Settlement.CANCELLED,
    Ending.DECLINED: Settlement.RELEASE,
    Ending.AMBIGUOUS: Settlement.UNKNOWN,
    Ending.TOO_LARGE: Settlement.STORE_WITHOUT_BODY,
    Ending.COMPLETE: Settlement.STORE,
}

# A whole answer: what its status means, whether its body was kept -> how the exchange ended.
WHOLE = {
    (Disposition.RELEASE, True): Ending.DECLINED,
    (Disposition.RELEASE, False): Ending.DECLINED,
    (Disposition.AMBIGUOUS, True): Ending.AMBIGUOUS,
    (Disposition.AMBIGUOUS, False): Ending.AMBIGUOUS,
    (Disposition.STORE, True): Ending.COMPLETE,
    (Disposition.STORE, False): Ending.TOO_LARGE,
}


@pytest.mark.parametrize(("found", "lease_left_ms", "kept", "same", "other"), DECISIONS)
def test_what_a_duplicate_gets(found, lease_left_ms, kept, same, other):
    """State and lease decide. Fingerprints are compared first, so that another request's state never shows."""
    now = effective_state(found, lease_left_ms)
    assert decide(now, same_request=True, body_stored=kept) is same
    assert decide(now, same_request=False, body_stored=kept) is other


def test_the_decision_table_is_whole():
    """The table has a row for each state, lease and record, and each decision occurs in it."""
    assert {row[:3] for row in DECISIONS} == set(product(State, (RUNNING, PASSED), (True, False)))
    assert {decision for row in DECISIONS for decision in row[3:]} == set(Decision)


@pytest.mark.parametrize("found", [*product(State, (True, False), MODES, (True, False))])
def test_which_keys_are_open_to_a_newcomer(found):
    """Unknown in the mode retry by the same request, and complete or expired after the window."""
    assert may_take_over(*found) is (found in OPEN)


# What a resend needs: an unknown outcome under hold, the same request, and an API that recognizes the key.
RESENT = {(State.UNKNOWN, True, HOLD, True)}


@pytest.mark.parametrize("found", [*product(State, (True, False), MODES, (True, False))])
def test_which_keys_are_sent_on(found):
    """No more than one row of all: a cancelled request never is, and what may be executed again needs no resend."""
    assert may_resend(*found) is (found in RESENT)


@pytest.mark.parametrize(
    ("age_ms", "kept_ms", "recognized"),
    [(0, 0, False), (0, 100, False), (0, 101, True), (899, 1000, True), (900, 1000, False), (10**12, 1000, False)],
)
def test_for_how_long_an_api_recognizes_a_key(age_ms, kept_ms, recognized):
    """From the first claim on, and a lease less: what is claimed now may be sent so much later."""
    assert api_recognizes(age_ms, kept_ms, lease_ms=100) is recognized


@pytest.mark.parametrize("disposition", Disposition)
@pytest.mark.parametrize("busy", [False, True])
def test_a_resend_never_frees_its_key(disposition, busy):
    """The first request may have been executed; and an API that is busy with it has not said what became of it."""
    meant = of_resend(disposition, busy)
    assert not ending(meant, body_stored=True).settlement.frees
    assert meant is (disposition if disposition is Disposition.STORE and not busy else Disposition.AMBIGUOUS)


# joins, waits, the response has begun, it can be sent as it comes -> what a duplicate does meanwhile.
MEANWHILE = {
    (True, True, True, True): Meanwhile.JOIN,
    (True, False, True, True): Meanwhile.JOIN,
    (True, True, False, True): Meanwhile.WAIT_FOR_HEAD,
    (True, True, True, False): Meanwhile.WAIT_FOR_END,
    (True, True, False, False): Meanwhile.WAIT_FOR_END,
    **{(False, True, *rest): Meanwhile.WAIT_FOR_END for rest in product((True, False), repeat=2)},
    **{(False, False, *rest): Meanwhile.REFUSED for rest in product((True, False), repeat=2)},
    **{(True, False, *rest): Meanwhile.REFUSED for rest in [(True, False), (False, True), (False, False)]},
}


@pytest.mark.parametrize("given", [*product((True, False), repeat=4)])
def test_what_a_duplicate_does_while_its_original_runs(given):
    """It joins what it asks for, has begun and can be sent as it comes, and waits only where it may."""
    joins, waits, has_head, fits = given
    assert meanwhile(joins=joins, waits=waits, has_head=has_head, fits=fits) is MEANWHILE[given]


@pytest.mark.parametrize("left_ms", [-(10**12), -1, 0, 1, 2, 10_000, 10**12])
def test_a_passed_lease_is_read_as_unknown(left_ms):
    """A record in flight without a lease is unknown, because its owner may have executed the request. Others do not
    change."""
    assert effective_state(State.IN_FLIGHT, left_ms) is (State.IN_FLIGHT if left_ms > 0 else State.UNKNOWN)
    assert effective_state(State.COMPLETE, left_ms) is State.COMPLETE
    assert effective_state(State.UNKNOWN, left_ms) is State.UNKNOWN
    assert effective_state(State.EXPIRED, left_ms) is State.EXPIRED


@pytest.mark.parametrize("left_ms", [-(10**12), -1, 0, 1, 10**12])
def test_a_complete_record_is_expired_after_its_retention(left_ms):
    """No other state has a retention of its response, and nothing brings an expired record back."""
    assert effective_state(State.COMPLETE, 0, left_ms) is (State.COMPLETE if left_ms > 0 else State.EXPIRED)
    for state in (State.IN_FLIGHT, State.UNKNOWN, State.EXPIRED):
        assert effective_state(state, 1, left_ms) is state


@pytest.mark.parametrize("reached", Ending)
def test_what_becomes_of_a_claim(reached):
    """How far the exchange got decides how its claim is settled."""
    assert reached.settlement is ENDINGS[reached]


def test_every_settlement_is_reached():
    """A claim can be stored, stored without body, released and left unknown."""
    assert set(ENDINGS.values()) == set(Settlement)


def test_only_what_was_not_executed_frees_its_key():
    """No ending in which the upstream may have executed the request is a release."""
    released = {reached for reached in Ending if reached.settlement is Settlement.RELEASE}
    assert released == {Ending.NOT_SENT, Ending.DECLINED}


@pytest.mark.parametrize(("disposition", "kept"), list(WHOLE))
def test_how_a_whole_answer_ends_the_exchange(disposition, kept):
    """The status decides first. Only a response that is to be stored can be too large."""
    assert set(WHOLE) == set(product(Disposition, (True, False)))
    assert ending(disposition, kept) is WHOLE[disposition, kept]


@pytest.mark.parametrize("decision", [decide, ending])
def test_a_value_outside_the_tables_decides_nothing(decision):
    """A value outside the tables raises an error, instead of counting as one of the rows."""
    arguments = {decide: ("in_flight", True, True), ending: ("store", True)}
    with pytest.raises(AssertionError):
        decision(*arguments[decision])


@pytest.mark.parametrize(
    ("age_s", "lease_ms", "must"),
    [
        (0.0, 10_000, False),
        (4.9, 10_000, False),
        (5.0, 10_000, False),
        (5.001, 10_000, True),
        (10.0, 10_000, True),
        (3600.0, 10_000, True),
        (0.1, 200, False),
        (0.101, 200, True),
        (0.25, 501, False),
        (-1.0, 200, False),
    ],
)
def test_a_claim_older_than_half_a_lease_is_claimed_again(age_s, lease_ms, must):
    """A claim older than half its lease is made again before the first byte is sent."""
    assert must_reclaim(age_s, lease_ms) is must


@pytest.mark.parametrize(
    ("running_s", "usually_s", "seconds"),
    [
        # Nothing is known of such requests: as long as this one has been running.
        (0, 0, 1),
        (1, 0, 1),
        (1.001, 0, 2),
        (4.2, 0, 5),
        (3600, 0, 60),
        # Within the usual time: what is left of it.
        (0, 0.02, 1),
        (2, 12, 10),
        (11.5, 12, 1),
        (0.5, 20.2, 20),
        (5, 600, 60),
        # Past it: as long as it is overdue.
        (12, 12, 1),
        (12.5, 12, 1),
        (14, 12, 2),
        (20, 12, 8),
        (600, 12, 60),
        # The store's clock went back.
        (-5, 0, 1),
        (-5, 8, 8),
    ],
)
def test_a_duplicate_comes_again_when_its_original_is_probably_done(running_s, usually_s, seconds):
    """Retry-After is what is left of the usual time, and past that as long as the original is overdue."""
    assert retry_after_s(running_s, usually_s) == seconds


def test_the_time_to_come_again_is_bounded():
    """For any running time and any usual time, Retry-After is a whole number of seconds from 1 to 60."""
    times = (-(10.0**9), -1, 0, 0.001, 1, 59.5, 61, 10**4, 10.0**12)
    for running_s, usually_s in product(times, times):
        seconds = retry_after_s(running_s, usually_s)
        assert isinstance(seconds, int)
        assert 1 <= seconds <= 60


def settled(times: Iterable[float], usually_s: float = 0.0) -> float:
    """Return the usual time after requests that took so long, one after the other."""
    return reduce(usual_s, times, usually_s)


def test_the_usual_time_is_what_nine_requests_in_ten_keep():
    """Where times vary, about one request in ten takes longer than the usual time; a single outlier moves it little."""
    random = Random(7)
    assert settled([3.0] * 50) == 3.0
    times = [random.uniform(0, 10) for _ in range(4000)]
    usually_s = settled(times[:2000])
    longer = 0
    for took_s in times[2000:]:
        longer += took_s > usually_s
        usually_s = usual_s(usually_s, took_s)
    assert 0.08 < longer / 2000 < 0.2
    assert settled([300.0], 3.0) == pytest.approx(3.6)


@pytest.mark.parametrize(("before_s", "now_s"), [(0.05, 20.0), (20.0, 0.05)])
def test_the_usual_time_follows_an_api_that_changes(before_s, now_s):
    """It rises to four hundred times as much within 40 requests, and falls as far within 300."""
    requests = 40 if now_s > before_s else 300
    assert settled([now_s] * requests, before_s) == pytest.approx(now_s)
