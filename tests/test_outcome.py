"""Outcomes of requests: each problem has its own, and each value of `Oncegate-Status` that is not `refused`."""

from typing import get_args

import pytest

from oncegate.decision import Decision, Disposition, Settlement, UnknownMode
from oncegate.gateway.exchange import OUTCOMES
from oncegate.messages.problems import PROBLEM_KINDS, REFUSALS, problem, refusal
from oncegate.observe.labels import SETTLEMENTS, StoreLoss
from oncegate.observe.outcome import BY_LABEL, SUPPRESSED, Outcome, outcome_of
from oncegate.service.service import LOSSES
from oncegate.settings.settings import Settings
from oncegate.store.membership import LOSSES as HEALTH_LOSSES
from oncegate.store.results import SettleStatus, StoreEvent


@pytest.mark.parametrize("slug", PROBLEM_KINDS)
def test_a_problem_has_the_outcome_of_its_code(slug):
    """The label is the slug with underscores."""
    outcome = outcome_of(problem(slug, "a detail"))
    assert outcome.label == slug.replace("-", "_")


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_has_one_outcome(status):
    """Requests that never get as far as a key are counted together, whatever their status."""
    assert outcome_of(refusal(status, "a detail")) is Outcome.REQUEST_REFUSED


@pytest.mark.parametrize("disposition", Disposition)
def test_a_response_that_is_passed_on_has_the_outcome_of_its_status_field(disposition):
    """The label is the value of the field."""
    assert BY_LABEL[disposition.label].label == disposition.label


def test_labels_are_the_values():
    """No outcome is found under two labels."""
    assert {label: outcome.value for label, outcome in BY_LABEL.items()} == {one.value: one.value for one in Outcome}
    assert len(BY_LABEL) == len(Outcome)


def test_a_suppressed_duplicate_met_a_record():
    """What was executed, or may have been by this request, is none."""
    assert {outcome.label for outcome in SUPPRESSED} == {
        "replayed", "reconciled", "joined", "in_flight", "key_reused", "outcome_unknown", "response_not_kept",
        "key_expired",
    }  # fmt: skip


def test_every_end_of_a_claim_has_its_label():
    """Each settlement, and each status that replaces one: it was not confirmed, or another owner was in the way."""
    # A record that lacks chunks is settled once more, without its body: that end is counted.
    refused = {status for status in SettleStatus if not status.is_done} - {SettleStatus.INCOMPLETE}
    ends = {settlement.label for settlement in Settlement} | {status.label for status in refused}
    assert set(SETTLEMENTS) == ends | {"lost"}


def test_every_confirmed_settle_is_a_settlement():
    """The store's words for a settle that was carried out are labels of settlements."""
    confirmed = {status.label for status in SettleStatus if status.is_done}
    assert confirmed <= {settlement.label for settlement in Settlement}


def test_every_disposition_has_its_outcome():
    """An exchange reports the outcome that its Oncegate-Status names."""
    assert set(OUTCOMES) == {disposition.label for disposition in Disposition}
    for label, (outcome, field) in OUTCOMES.items():
        assert (outcome.label, field) == (label, f"Oncegate-Status: {label}\r\n".encode())


def test_every_decision_is_the_code_of_a_problem():
    """A duplicate that gets no replay is counted under the outcome that refused it."""
    decisions = {decision.value for decision in Decision} - {Decision.REPLAY.value}
    assert decisions <= {slug.replace("-", "_") for slug in PROBLEM_KINDS} & set(BY_LABEL)
    assert {outcome.label for outcome in SUPPRESSED} == decisions | {"replayed", "reconciled", "joined"}


def test_the_setting_has_the_modes_of_the_record():
    """ONCEGATE_ON_UNKNOWN has a value for each mode that a record can have."""
    values = get_args(Settings.model_fields["on_unknown"].annotation)
    assert [value.encode() for value in values] == [
        mode.wire for mode in UnknownMode if mode is not UnknownMode.CANCELLED
    ]


def test_a_move_of_the_store_is_no_certain_loss():
    """Every other kind may have taken claims along."""
    assert [loss for loss in StoreLoss if not loss.is_certain] == [StoreLoss.MOVED]


def test_every_loss_of_the_store_is_counted_under_its_kind():
    """Logs and metrics have one name for a loss; only a new store is no loss to count."""
    assert {event.kind: loss.label for event, loss in LOSSES.items()} == {loss.label: loss.label for loss in StoreLoss}
    assert [event for event in HEALTH_LOSSES if event not in LOSSES] == [StoreEvent.FOUNDED]
