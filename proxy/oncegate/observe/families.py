"""Counters and histograms that cost little to count with.

Counting is plain arithmetic on numbers and lists; `family` makes of it what prometheus_client writes. Its own counters
and histograms cost a tenth of an execution (measured).
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# The label `le` of each, and of the last one, which has the rest.
BOUNDS = (*map(str, BUCKETS_S), "+Inf")
# Of what takes minutes to days.
LONG_BUCKETS_S = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0, 604800.0)
# The most observations of one histogram that wait to be sorted into buckets.
MAX_UNSORTED = 256
# How many groups of counters a metric has that are named after what an operator wrote. Each sample of a scrape takes
# 5 µs (measured), in which no request is served.
MAX_GROUPS = 50
# The group of what came after them.
OTHER = "other"
# Between the label values of a group in a snapshot. No name has a control character.
SEPARATOR = "\n"

# The counts of a metric by label value, for another process: one number, or a histogram's buckets and then its sum.
FamilySnapshot = dict[str, list[float]]


class Counters:
    """One counter for each value of a label from a closed set; without a label, one under the empty value.

    `by_value` is public, so that the request path counts without a call.
    """

    def __init__(self, name: str, description: str, label: str = "", values: Iterable[str] = ("",)) -> None:
        self._name, self._description, self._label = name, description, label
        self.by_value = dict.fromkeys(values, 0.0)

    def add(self, value: str = "", amount: float = 1.0) -> None:
        """Count; KeyError for a value outside the set."""
        self.by_value[value] += amount

    def snapshot(self) -> FamilySnapshot:
        """Return the counts, for `merge` in another process."""
        return {value: [count] for value, count in self.by_value.items()}

    def merge(self, snapshot: FamilySnapshot) -> None:
        """Add the counts of another process; label values that this process does not know are left out."""
        for value in self.by_value.keys() & snapshot.keys():
            self.by_value[value] += snapshot[value][0]

    def family(self) -> Metric:
        """Return the counters for prometheus_client."""
        labels = [self._label] if self._label else []
        family = CounterMetricFamily(f"oncegate_{self._name}", self._description, labels=labels)
        for value, count in self.by_value.items():
            family.add_metric([value] if self._label else [], count)
        return family


class GroupedCounters:
    """Counters in groups: a group, such as a rule with its upstream, has one for each value of the last label.

    The groups are named after what an operator wrote: they are few, but a reload may bring others. Past MAX_GROUPS, all
    further ones are one, called OTHER.
    """

    def __init__(self, name: str, description: str, labels: tuple[str, ...], values: Iterable[str]) -> None:
        self._name, self._description, self._labels = name, description, labels
        self._values = tuple(values)
        self.groups: dict[tuple[str, ...], dict[str, float]] = {}

    def of(self, *group: str) -> dict[str, float]:
        """Return the counts of a group by value, for whoever counts; all values are there from the beginning."""
        return self.groups.setdefault(self.name(*group), dict.fromkeys(self._values, 0.0))

    def name(self, *group: str) -> tuple[str, ...]:
        """Return what a group is called in the metric."""
        return group if group in self.groups or len(self.groups) < MAX_GROUPS else (OTHER,) * len(group)

    def snapshot(self) -> FamilySnapshot:
        """Return the counts of each group in the order of the values, for `merge` in another process."""
        return {SEPARATOR.join(group): list(counts.values()) for group, counts in self.groups.items()}

    def merge(self, snapshot: FamilySnapshot) -> None:
        """Add the counts of another process of the same version."""
        for group, added in snapshot.items():
            counts = self.of(*group.split(SEPARATOR))
            for value, count in zip(self._values, added, strict=True):
                counts[value] += count

    def family(self) -> Metric:
        """Return the counters for prometheus_client."""
        family = CounterMetricFamily(f"oncegate_{self._name}", self._description, labels=self._labels)
        for group, counts in self.groups.items():
            for value, count in counts.items():
                family.add_metric([*group, value], count)
        return family


class Histogram:
    """A histogram of seconds for one label value.

    `add` is the `append` of `unsorted`, the cheapest call there is: observations are sorted into buckets later, many
    at once.
    """

    def __init__(self, buckets_s: tuple[float, ...] = BUCKETS_S) -> None:
        self._buckets_s = buckets_s
        self._counts, self._sum_s = [0] * (len(buckets_s) + 1), 0.0
        self.unsorted: list[float] = []
        self.add = self.unsorted.append

    def sort(self) -> tuple[list[int], float]:
        """Sort in what waits. Return the number of observations in each bucket, and the sum of all."""
        unsorted, counts, before = self.unsorted, self._counts, 0
        # In order, the bounds are looked up among them, which costs a sixth of a look-up for each (counted).
        unsorted.sort()
        for bucket, bound in enumerate(self._buckets_s):
            upto = bisect_right(unsorted, bound)
            counts[bucket] += upto - before
            before = upto
        counts[-1] += len(unsorted) - before
        self._sum_s += sum(unsorted)
        # Emptied, not replaced: `add` is bound to this list.
        unsorted.clear()
        return counts, self._sum_s

    def observe(self, seconds: float) -> None:
        """Add an observation, where nobody else sorts."""
        self.unsorted.append(seconds)
        if len(self.unsorted) >= MAX_UNSORTED:
            self.sort()

    def merge(self, counts: list[float], sum_s: float) -> None:
        """Add the buckets and the sum of another process."""
        self._counts = [own + int(other) for own, other in zip(self._counts, counts, strict=True)]
        self._sum_s += sum_s


def sort_all(histograms: Iterable[Histogram]) -> None:
    """Sort in what waits in each."""
    for histogram in histograms:
        histogram.sort()


class Histograms:
    """One histogram of seconds for each value of a label from a closed set; without a label, one under the empty.

    `values` None: the values are named after what an operator wrote, and bounded as the groups of GroupedCounters.
    """

    def __init__(
        self,
        name: str,
        description: str,
        label: str = "",
        values: Iterable[str] | None = ("",),
        buckets_s: tuple[float, ...] = BUCKETS_S,
    ) -> None:
        self._name, self._description, self._label, self._is_open = name, description, label, values is None
        self._buckets_s = buckets_s
        self.by_value = {value: Histogram(buckets_s) for value in values or ()}

    def of(self, value: str) -> Histogram:
        """Return the histogram of a value that an operator wrote."""
        if value not in self.by_value and len(self.by_value) >= MAX_GROUPS:
            value = OTHER
        return self.by_value.setdefault(value, Histogram(self._buckets_s))

    def snapshot(self) -> FamilySnapshot:
        """Return the buckets and the sums, for `merge` in another process."""
        sorted_ = {value: histogram.sort() for value, histogram in self.by_value.items()}
        return {value: [*counts, sum_s] for value, (counts, sum_s) in sorted_.items()}

    def merge(self, snapshot: FamilySnapshot) -> None:
        """Add the counts of another process; label values that this process does not know are left out."""
        for value in snapshot if self._is_open else self.by_value.keys() & snapshot.keys():
            *counts, sum_s = snapshot[value]
            self.of(value).merge(counts, sum_s)

    def family(self) -> Metric:
        """Return the histograms for prometheus_client."""
        labels = [self._label] if self._label else []
        family = HistogramMetricFamily(f"oncegate_{self._name}", self._description, labels=labels)
        for value, histogram in self.by_value.items():
            counts, sum_s = histogram.sort()
            family.add_metric([value] if self._label else [], list(_cumulative(self._buckets_s, counts)), sum_s)
        return family


def _cumulative(buckets_s: tuple[float, ...], counts: list[int]) -> Iterator[tuple[str, float]]:
    """Yield each bucket's upper bound with the number of observations up to it, as Prometheus counts buckets."""
    total = 0
    # The last one has the rest.
    for bound, count in zip((*map(str, buckets_s), "+Inf"), counts, strict=True):
        total += count
        yield bound, total
