"""The newest traced request beside what counted it."""

from prometheus_client.core import CounterMetricFamily

from oncegate.observe.exemplars import Exemplars
from oncegate.observe.families import Histograms
from oncegate.observe.labels import SettlementLabel
from oncegate.observe.outcome import Outcome, RequestReport

REPORT = RequestReport(Outcome.UNKNOWN, 504, "POST", settlements=(SettlementLabel.UNKNOWN,))


def made(*traces: tuple[str, float], at_s: float = 1.0) -> Exemplars:
    exemplars = Exemplars(lambda: at_s)
    for trace_id, seconds in traces:
        exemplars.add(trace_id, REPORT, seconds)
    return exemplars


def shown(exemplars: Exemplars) -> dict[str, tuple[str, float]]:
    """Return the exemplars of the latency by bucket, and of the settlements."""
    settled = CounterMetricFamily("oncegate_settled", "", labels=["settlement"])
    settled.add_metric(["unknown"], 1.0)
    settled.add_metric(["stored"], 1.0)
    families = [Histograms("request_seconds", "").family(), Histograms("overhead_seconds", "").family(), settled]
    samples = [sample for family in families for sample in exemplars.added_to(family).samples if sample.exemplar]
    return {
        next(iter(one.labels.values())): (one.exemplar.labels["trace_id"], one.exemplar.value)
        for one in samples
        if one.exemplar
    }


def test_each_bucket_has_its_newest() -> None:
    """In the bucket that counted it: its upper bound is a part of it, and what is longest is in the last."""
    exemplars = made(("a", 0.001), ("b", 0.0011), ("c", 0.002), ("d", 1000.0))
    assert shown(exemplars) == {
        "0.001": ("a", 0.001),
        "0.0025": ("c", 0.002),
        "+Inf": ("d", 1000.0),
        "unknown": ("d", 1.0),
    }


def test_the_newest_of_several_workers() -> None:
    older, newer = made(("a", 0.001), ("b", 0.002), at_s=1.0), made(("c", 0.001), at_s=2.0)
    for first, second in ((older, newer), (newer, older)):
        total = Exemplars()
        total.merge(first.snapshot())
        total.merge(second.snapshot())
        assert shown(total) == {"0.001": ("c", 0.001), "0.0025": ("b", 0.002), "unknown": ("c", 1.0)}


def test_nothing_traced_adds_nothing() -> None:
    assert shown(Exemplars()) == {}
