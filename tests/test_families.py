"""Counters and histograms: what they count, what prometheus_client makes of it, how two processes become one."""

import pytest

from oncegate.observe.families import BUCKETS_S, MAX_GROUPS, OTHER, Counters, GroupedCounters, Histograms
from oncegate.observe.metrics import Metrics
from oncegate.observe.outcome import Outcome, RequestReport


def samples(family: Counters | GroupedCounters | Histograms) -> dict[str, float]:
    """Return the samples of a family by name and label values, without those for when it began."""
    found = {}
    for sample in family.family().samples:
        if not sample.name.endswith("_created"):
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_every_label_value_is_there_from_the_beginning():
    """So that a rate can be taken of the first event."""
    counters = Counters("things", "Things.", "kind", ("a", "b"))
    assert samples(counters) == {"oncegate_things_total{kind=a}": 0, "oncegate_things_total{kind=b}": 0}
    counters.add("b", 2)
    assert samples(counters)["oncegate_things_total{kind=b}"] == 2


def test_a_counter_without_a_label():
    """It has one sample."""
    counters = Counters("things", "Things.")
    counters.add()
    assert samples(counters) == {"oncegate_things_total{}": 1}


def test_another_label_value_is_an_error():
    """The set is closed, whatever requests say."""
    with pytest.raises(KeyError):
        Counters("things", "Things.", "kind", ("a",)).add("c")


@pytest.mark.parametrize("at", range(len(BUCKETS_S)))
def test_a_bucket_holds_what_is_no_longer_than_its_bound(at):
    """The bound itself belongs to it, as Prometheus's `le` says."""
    histograms = Histograms("time_seconds", "Time.")
    bound = BUCKETS_S[at]
    histograms.by_value[""].add(bound)
    histograms.by_value[""].add(bound * 1.001)
    buckets = [value for name, value in samples(histograms).items() if "_bucket" in name]
    assert buckets == [0] * at + [1] + [2] * (len(BUCKETS_S) - at)


def test_sorting_counts_each_observation_once():
    """However often it is done between observations."""
    histograms = Histograms("time_seconds", "Time.", "verb", ("get", "set"))
    for number in range(10):
        histograms.by_value["get"].add(0.25)
        if number % 3 == 0:
            histograms.by_value["get"].sort()
    found = samples(histograms)
    assert found["oncegate_time_seconds_count{verb=get}"] == 10
    assert found["oncegate_time_seconds_sum{verb=get}"] == 2.5
    assert found["oncegate_time_seconds_count{verb=set}"] == 0


def test_the_counts_of_two_processes_become_one():
    """Label values that only the other one knows are left out: its version may be another."""
    mine, theirs = (Counters("things", "Things.", "kind", kinds) for kinds in (("a", "b"), ("b", "c")))
    for counters in (mine, theirs):
        counters.add("b")
    theirs.add("c")
    mine.merge(theirs.snapshot())
    assert mine.by_value == {"a": 0, "b": 2}
    own, other = (Histograms("time_seconds", "Time.") for _ in range(2))
    own.by_value[""].add(0.25)
    other.by_value[""].add(400)
    own.merge(other.snapshot())
    # What is added after a merge counts as well.
    own.by_value[""].add(0.25)
    found = samples(own)
    assert found["oncegate_time_seconds_count{}"] == 3
    assert found["oncegate_time_seconds_bucket{le=300.0}"] == 2
    assert found["oncegate_time_seconds_sum{}"] == 400.5


def test_groups_that_an_operator_named_are_bounded():
    """Past the most, further ones count together; those that were there before keep their own counts."""
    counters = GroupedCounters("things", "Things.", ("rule", "kind"), ("a", "b"))
    for number in range(MAX_GROUPS + 20):
        counters.of(f"rule {number}")["a"] += 1
    counters.of("rule 1")["a"] += 1
    found = samples(counters)
    assert len(found) == 2 * (MAX_GROUPS + 1)
    assert found["oncegate_things_total{rule=rule 1,kind=a}"] == 2
    assert found[f"oncegate_things_total{{rule={OTHER},kind=a}}"] == 20
    # So that a rate can be taken of the first event.
    assert found["oncegate_things_total{rule=rule 1,kind=b}"] == 0
    histograms = Histograms("time_seconds", "Time.", "upstream", None)
    for number in range(MAX_GROUPS + 20):
        histograms.of(f"api {number}").add(1.0)
    assert samples(histograms)[f"oncegate_time_seconds_count{{upstream={OTHER}}}"] == 20


def test_groups_of_two_processes_become_one():
    """Those that only the other one knows are added, because a reload may have reached it first."""
    mine, theirs = (GroupedCounters("things", "Things.", ("rule", "upstream", "kind"), ("a", "b")) for _ in range(2))
    for counters in (mine, theirs):
        counters.of("charges", "api")["b"] += 1
    theirs.of("refunds", "api:8443")["a"] += 2
    mine.merge(theirs.snapshot())
    assert mine.groups == {("charges", "api"): {"a": 0, "b": 2}, ("refunds", "api:8443"): {"a": 2, "b": 0}}


def executed(rule: str, upstream: str) -> RequestReport:
    return RequestReport(Outcome.EXECUTED, 200, "POST", rule=rule, upstream=upstream, upstream_s=0.5)


def test_requests_are_counted_by_the_rule_and_its_upstream():
    """The sum over the rules is the metric without a rule, also of several processes, and after a reload."""
    workers = [Metrics("1", {}) for _ in range(2)]
    for metrics in workers:
        metrics.follow([("charges", "old"), ("", "api")])
        metrics.observe(executed("charges", "old"), 1.0)
        metrics.follow([("charges", "new"), ("", "api")])
        metrics.observe(executed("charges", "new"), 1.0)
        metrics.observe(executed("", "api"), 1.0)
        metrics.observe(RequestReport(Outcome.KEY_MISSING, 400, "POST", rule="charges"), 1.0)
        metrics.observe(RequestReport(Outcome.REQUEST_REFUSED, 400, ""), 1.0)
    total = Metrics("1", {})
    for metrics in workers:
        total.merge(metrics.snapshot()["counts"])
    text = total.text()[0].decode()
    for sample in (
        'rule_requests_total{outcome="executed",rule="charges",upstream="old"} 2.0',
        'rule_requests_total{outcome="executed",rule="charges",upstream="new"} 2.0',
        'rule_requests_total{outcome="executed",rule="(default)",upstream="api"} 2.0',
        'rule_requests_total{outcome="key_missing",rule="charges",upstream="new"} 2.0',
        'rule_requests_total{outcome="request_refused",rule="(none)",upstream="(none)"} 2.0',
        'requests_total{outcome="executed"} 6.0',
        'requests_total{outcome="key_missing"} 2.0',
        'upstream_seconds_count{upstream="new"} 2.0',
    ):
        assert f"\noncegate_{sample}\n" in text
