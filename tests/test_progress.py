"""How far the reconciling of a key is: when it is asked about, when "not found" counts, and when a mark begins anew."""

from dataclasses import replace

import pytest

from oncegate.decision import Verdict
from oncegate.probing.absence import Absence, Conclusion, conclusion
from oncegate.probing.table import parse_table
from oncegate.reconcile import progress
from oncegate.reconcile.progress import Progress
from oncegate.store.record import ViewState
from oncegate.store.record_view import RecordView

NOW = 1_700_000_000_000
PLAN = parse_table(
    {
        "url": "/orders/{key}",
        "keep": ["key"],
        "reference": {},
        "succeeded": [{"status": "200"}],
        "absent": [{"status": "404"}],
        "absent_after_s": 60,
        "absent_before_s": 3600,
        "first_after_s": 2,
        "most_s": 30,
        "reconcile_for_s": 1000,
    }
)
OTHER = replace(PLAN, most_s=31)
RECORD = RecordView(b"k" * 24, ViewState.UNKNOWN, b"t" * 16, NOW, mode=b"hold", created_ms=NOW - 5000, left_ms=9000)
LAPSED = RECORD._replace(lapsed_ms=700, lease_end_ms=NOW - 700)
BEGUN = progress.begin(RECORD, PLAN)


def test_the_first_question_waits_for_the_api():
    assert not BEGUN.is_due(NOW + 1999)
    assert BEGUN.is_due(NOW + 2000)
    assert BEGUN.wait_ms(NOW + 500) == 1500


def test_nobody_else_asks_while_one_does_and_after_it_died_somebody_does():
    leased = progress.leased(BEGUN, PLAN, NOW + 2000)
    assert not leased.is_due(NOW + 2000 + 11_000 - 1), "twice the time of the question, and a second"
    assert leased.is_due(NOW + 2000 + 11_000)


def test_a_process_that_died_while_it_asked_ends_the_row_of_absences():
    """It may have heard that the request was executed."""
    agreed = progress.answered(BEGUN, Verdict.ABSENT, "", True, NOW)
    assert agreed.agreed == 1
    assert progress.leased(agreed, PLAN, NOW).agreed == 0


@pytest.mark.parametrize(
    ("verdict", "counts", "agreed"),
    [
        (Verdict.ABSENT, True, 3),
        (Verdict.ABSENT, False, 0),
        (Verdict.INCONCLUSIVE, True, 0),
        (Verdict.INCONCLUSIVE, False, 0),
    ],
)
def test_anything_but_an_absence_that_counts_ends_the_row(verdict, counts, agreed):
    before = Progress(RECORD.token, 0, NOW, NOW, asked=4, agreed=2)
    assert progress.answered(before, verdict, "", counts, NOW).agreed == agreed


def test_pauses_double_up_to_the_most_and_jitter_shortens_them_by_half_at_most():
    one, pauses = BEGUN, []
    for _ in range(7):
        one = progress.answered(one, Verdict.INCONCLUSIVE, "", False, NOW)
        pauses.append((progress.later(one, PLAN, 0.0).due_ms - NOW, progress.later(one, PLAN, 1.0).due_ms - NOW))
    assert pauses == [(4000, 2000), (8000, 4000), (16_000, 8000), *[(30_000, 15_000)] * 4]


def test_a_mark_is_read_as_it_was_written():
    one = Progress(RECORD.token, 0, 1, 2, 3, 4, 5, "absent", "why ü", "time_over", BEGUN.plan)
    assert progress.unpack(one.pack(), RECORD, PLAN) == one


@pytest.mark.parametrize(
    ("packed", "record"),
    [
        (b"", RECORD),
        (b"[]", RECORD),
        (b"null", RECORD),
        (b'{"a": 1}', RECORD),
        (b"\xff", RECORD),
        (b'["zz", 1, 2, 3, 4, 5, 6, "", "", ""]', RECORD),
        (b'["7474", "x", 2, 3, 4, 5, 6, "", "", ""]', RECORD),
        # Of another claim.
        (BEGUN.pack(), RECORD._replace(token=b"u" * 16)),
        # The owner's lease lapsed, it woke up, and then marked the key unknown: it may have sent more meanwhile.
        (progress.begin(LAPSED, PLAN).pack(), RECORD),
        # It woke up, renewed its lease, and that lapsed, too.
        (progress.begin(LAPSED, PLAN).pack(), LAPSED._replace(now_ms=NOW + 5000, lease_end_ms=NOW + 4300)),
        # By another plan: what the API says means something else, perhaps.
        (progress.begin(RECORD, OTHER).pack(), RECORD),
    ],
)
def test_any_other_mark_begins_anew(packed, record):
    assert progress.unpack(packed, record, PLAN) is None


def test_the_last_byte_was_sent_within_the_lease_or_before_somebody_saw_the_key_unknown():
    assert progress.last_byte_ms(progress.begin(LAPSED, PLAN)) == NOW - 700
    assert progress.last_byte_ms(BEGUN) == NOW
    later = LAPSED._replace(now_ms=NOW + 300, lapsed_ms=1000)
    assert progress.unpack(progress.begin(LAPSED, PLAN).pack(), later) is not None, "the same lease, seen later"


def test_the_age_counts_from_the_first_claim_of_the_key():
    assert progress.first_claim_ms(RECORD) == RECORD.created_ms
    kept = RECORD.kept.__class__(first_ms=NOW - 9000)
    assert progress.first_claim_ms(RECORD._replace(kept=kept)) == NOW - 9000


def test_after_its_time_it_is_a_person_s():
    asked = progress.answered(BEGUN, Verdict.INCONCLUSIVE, "", False, NOW)
    assert not progress.is_over(asked, PLAN, NOW + 999_999)
    assert progress.is_over(asked, PLAN, NOW + 1_000_000)
    assert not progress.is_over(BEGUN, PLAN, NOW + 1_999_999), "nobody has asked yet"
    assert progress.is_over(BEGUN, PLAN, NOW + 2_000_000)
    left = progress.left(progress.leased(BEGUN, PLAN, NOW), "time_over")
    assert not left.is_due(NOW + 10**9)
    assert progress.next_s(left.pack(), RECORD.token, PLAN, NOW) is None


def test_who_does_not_wait_hears_when_the_next_question_is_due():
    assert progress.next_s(BEGUN.pack(), RECORD.token, PLAN, NOW + 500) == 1.5
    assert progress.next_s(b"", RECORD.token, PLAN, NOW) == 2
    assert progress.next_s(BEGUN.pack(), b"u" * 16, PLAN, NOW) == 2


# The rule for absence ...

TERMS = Absence(after_ms=60_000, before_ms=3_600_000, agree=3)


@pytest.mark.parametrize(
    ("silent_ms", "age_ms", "counts"),
    [
        (59_999, 59_999, False),
        (60_000, 60_000, True),
        (60_000, 3_599_999, True),
        (60_000, 3_600_000, False),
        (10**12, 10**12, False),
        (-1, 100, False),
    ],
)
def test_not_found_is_three_facts(silent_ms, age_ms, counts):
    """Not indexed yet, never executed, forgotten: only in between it may be the second."""
    assert TERMS.counts(silent_ms, age_ms) is counts


@pytest.mark.parametrize(
    ("verdict", "agreed", "ends"),
    [
        (Verdict.SUCCEEDED, 0, Conclusion.COMPLETE),
        (Verdict.FAILED, 0, Conclusion.COMPLETE),
        (Verdict.ABSENT, 2, Conclusion.ASK_AGAIN),
        (Verdict.ABSENT, 3, Conclusion.FREE),
        (Verdict.INCONCLUSIVE, 3, Conclusion.ASK_AGAIN),
    ],
)
def test_what_a_verdict_does(verdict, agreed, ends):
    assert conclusion(verdict, agreed, TERMS) is ends


def test_no_absence_that_does_not_count_frees_a_key():
    assert conclusion(Verdict.ABSENT, 0, TERMS._replace(agree=0)) is Conclusion.ASK_AGAIN
