"""Rates, quantiles and lines of the last ten minutes, from what the metrics said."""

from oncegate.admin.watching.history import PERIODS, History, Reading
from oncegate.observe.metrics import GAUGES, Metrics
from oncegate.observe.outcome import Outcome, RequestReport

REQUESTS = "oncegate_requests_total"


def observed(metrics: Metrics, outcome: Outcome, times: int, rule: str = "") -> None:
    for _ in range(times):
        metrics.observe(RequestReport(outcome, 200, "POST", rule=rule), 0.004)


def test_rates_and_lines():
    """A rate is that of the last minute; a line has one value a period, and ten minutes at most."""
    metrics, history = Metrics("0", {name: lambda: 3.0 for name in GAUGES}), History()
    for period in range(PERIODS + 20):
        history.note(Reading(metrics.collect(), period * 10.0))
        observed(metrics, Outcome.EXECUTED, 20, "a")
        observed(metrics, Outcome.REPLAYED, 10, "b")
    executed, replayed = (REQUESTS, "executed"), (REQUESTS, "replayed")
    assert (history.rate(executed), history.rate(executed, replayed)) == (2.0, 3.0)
    assert history.growth(executed) == 120.0
    assert history.rates(executed) == [2.0] * PERIODS
    assert history.gauges("oncegate_in_flight") == [3.0] * (PERIODS + 1)
    assert history.newest.by_label(REQUESTS)["executed"] == 20.0 * (PERIODS + 19)


def test_a_reading_between_two_periods():
    """A page that looks each second does not shorten what is remembered; it gets the newest values."""
    metrics, history = Metrics("0", {}), History()
    for second in range(21):
        history.note(Reading(metrics.collect(), float(second)))
        observed(metrics, Outcome.EXECUTED, 1)
    assert len(history.rates((REQUESTS, "executed"))) == 2
    assert history.rate((REQUESTS, "executed")) == 1.0
    assert history.newest.at_s == 20.0


def test_quantiles():
    """A quantile is the bound of a bucket, over all values of other labels; without an observation there is none."""
    metrics, history = Metrics("0", {}), History()
    assert history.quantile(0.5, "oncegate_request_seconds") is None
    history.note(Reading(metrics.collect(), 0.0))
    assert history.quantile(0.5, "oncegate_request_seconds") is None
    observed(metrics, Outcome.EXECUTED, 98)
    for seconds in (0.2, 400.0):
        metrics.store_observers["claim"](seconds)
        metrics.observe(RequestReport(Outcome.EXECUTED, 200, "POST"), seconds)
    history.note(Reading(metrics.collect(), 10.0))
    assert history.quantile(0.5, "oncegate_request_seconds") == 0.005
    assert history.quantile(0.99, "oncegate_request_seconds") == 0.25
    assert history.quantile(1.0, "oncegate_request_seconds") == float("inf")
    assert history.quantile(0.5, "oncegate_store_seconds", "claim") == 0.25


def test_nothing_was_read():
    """Before the first reading all is 0."""
    history = History()
    assert (history.rate((REQUESTS, "executed")), history.rates(), history.gauges("a")) == (0.0, [], [])
    assert history.newest.sum(REQUESTS) == 0
