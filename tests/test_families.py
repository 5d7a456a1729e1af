"""Counters and histograms: what they count, what prometheus_client makes of it, how two processes become one."""

import pytest

from oncegate.observe.families import BUCKETS_S, Counters, Histograms


def samples(family: Counters | Histograms) -> dict[str, float]:
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
