"""What the metrics said in the last ten minutes, for rates and for the lines that show how they went."""

from collections import deque
from collections.abc import Iterable
from itertools import pairwise

from prometheus_client.core import Metric

PERIOD_S = 10.0
PERIODS = 60
# Over which time a rate is taken, and a quantile.
RATE_S, QUANTILE_S = 60.0, 600.0
# The labels by which pages tell values apart; those that differ in others are added up.
LABELS = ("verb", "outcome", "settlement", "kind", "reason", "le")

TOKENS = "oncegate_llm_tokens_saved_total"

Name = tuple[str, ...]


class Reading:
    """What the metrics said at one moment. A name is that of a metric, and then the values of its LABELS.

    `tokens_by_rule`: the LLM tokens that replays saved, by rule and kind.
    """

    __slots__ = ("at_s", "tokens_by_rule", "values")

    def __init__(self, families: Iterable[Metric], at_s: float) -> None:
        self.at_s = at_s
        self.values: dict[Name, float] = {}
        self.tokens_by_rule: dict[str, dict[str, float]] = {}
        for family in families:
            for sample in family.samples:
                labels = sample.labels
                name = (sample.name, *(labels[label] for label in LABELS if label in labels))
                self.values[name] = self.values.get(name, 0.0) + float(sample.value)
                if sample.name == TOKENS:
                    self.tokens_by_rule.setdefault(labels["rule"], {})[labels["kind"]] = float(sample.value)

    def get(self, *name: str) -> float:
        return self.values.get(name, 0.0)

    def by_label(self, metric: str) -> dict[str, float]:
        """Return the values of a metric by its last label."""
        return {name[-1]: value for name, value in self.values.items() if name[0] == metric and len(name) > 1}

    def sum(self, metric: str) -> float:
        return sum(value for name, value in self.values.items() if name[0] == metric)


class History:
    """The readings of the last ten minutes, one each PERIOD_S, and the newest."""

    def __init__(self) -> None:
        self._kept: deque[Reading] = deque(maxlen=PERIODS + 1)
        self._newest: Reading | None = None

    def note(self, reading: Reading) -> None:
        """Take a reading. It is kept if the last one that is kept is a period old."""
        self._newest = reading
        # Timers are late, never early: half a period is enough to tell a new one.
        if not self._kept or reading.at_s - self._kept[-1].at_s > PERIOD_S - 1.0:
            self._kept.append(reading)

    @property
    def newest(self) -> Reading:
        return self._newest or Reading((), 0.0)

    def rate(self, *names: Name) -> float:
        """Return how much these counters together grew a second, over the last minute."""
        before = self._before(RATE_S)
        seconds = self.newest.at_s - before.at_s
        return sum(self._growth(before, name) for name in names) / seconds if seconds > 0 else 0.0

    def growth(self, name: Name) -> float:
        """Return how much a counter grew over the last minute."""
        return self._growth(self._before(RATE_S), name)

    def rates(self, *names: Name) -> list[float]:
        """Return how much these counters together grew a second, in each period."""
        return [
            sum(max(0.0, after.get(*name) - before.get(*name)) for name in names) / (after.at_s - before.at_s)
            for before, after in pairwise(self._kept)
        ]

    def gauges(self, name: str) -> list[float]:
        """Return what a gauge said at each reading."""
        return [reading.get(name) for reading in self._kept]

    def quantile(self, share: float, histogram: str, *labels: str) -> float | None:
        """Return the upper bound of the bucket that has this share of the last ten minutes; None for no observation."""
        before = self._before(QUANTILE_S)
        name = (f"{histogram}_bucket", *labels)
        bounds = [one[-1] for one in self.newest.values if one[:-1] == name]
        counts = [(float(bound), self._growth(before, (*name, bound))) for bound in bounds]
        counts.sort()
        if not counts or not counts[-1][1]:
            return None
        return next(bound for bound, counted in counts if counted >= share * counts[-1][1])

    def _before(self, seconds: float) -> Reading:
        """Return the youngest reading that is as old as that, else the oldest one."""
        wanted = self.newest.at_s - seconds + 1.0
        older = [reading for reading in self._kept if reading.at_s <= wanted]
        return older[-1] if older else self._kept[0] if self._kept else self.newest

    def _growth(self, before: Reading, name: Name) -> float:
        return max(0.0, self.newest.get(*name) - before.get(*name))
