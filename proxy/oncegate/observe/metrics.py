"""The metrics, and the one record of a request that they and the access log read.

Counting is plain arithmetic on lists; prometheus_client turns them into its families when it is asked.
(Its own counters and histograms cost a tenth of an execution, measured.)
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from oncegate.observe.outcome import SUPPRESSED, Outcome, RequestReport
from oncegate.observe.usage import KINDS, Tokens

HOW_SETTLED = ("stored", "stored_without_body", "released", "unknown", "unconfirmed", "lost", "fenced")
LOSSES = ("flushed", "rolled_back", "evicted", "moved")
VERBS = ("claim", "append", "renew", "settle", "read")

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
FRESH = 256  # seconds that wait to be sorted


class Counters:
    """A counter for each of a closed set of label values; with no label, for the empty one."""

    def __init__(self, name: str, help_: str, label: str = "", values: Iterable[str] = ("",)) -> None:
        self._name, self._help, self._label = name, help_, label
        self.by_value = dict.fromkeys(values, 0.0)

    def add(self, value: str = "", amount: float = 1.0) -> None:
        """Count; KeyError for a value outside the set."""
        self.by_value[value] += amount

    def snapshot(self) -> dict[str, list[float]]:
        """Return what was counted, for `merge` in another process."""
        return {value: [count] for value, count in self.by_value.items()}

    def merge(self, snapshot: "dict[str, list[float]]") -> None:
        """Count what another process counted; values that are not known here are left out."""
        for value in self.by_value.keys() & snapshot.keys():
            self.by_value[value] += snapshot[value][0]

    def family(self) -> Metric:
        family = CounterMetricFamily(f"oncegate_{self._name}", self._help, labels=[self._label] if self._label else [])
        for value, count in self.by_value.items():
            family.add_metric([value] if self._label else [], count)
        return family


class Histogram:
    """A histogram of seconds for one label value. What is added is sorted later, many at once."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BUCKETS_S) + 1), 0.0
        self.fresh: list[float] = []
        self.add = self.fresh.append

    def sort(self) -> tuple[list[int], float]:
        """Return how many fell into each bucket, and the sum."""
        fresh, counts = self.fresh, self._counts
        for bucket, count in Counter(map(bisect_left, repeat(BUCKETS_S), fresh)).items():
            counts[bucket] += count
        self._sum += sum(fresh)
        fresh.clear()
        return counts, self._sum

    def merge(self, counts: list[float], seconds: float) -> None:
        """Count what another process counted."""
        self._counts = [mine + int(theirs) for mine, theirs in zip(self._counts, counts, strict=True)]
        self._sum += seconds


class Histograms:
    """A histogram of seconds for each of a closed set of label values; with no label, for the empty one."""

    def __init__(self, name: str, help_: str, label: str = "", values: Iterable[str] = ("",)) -> None:
        self._name, self._help, self._label = name, help_, label
        self.by_value = {value: Histogram() for value in values}

    def snapshot(self) -> dict[str, list[float]]:
        """Return what was counted, for `merge` in another process: the buckets, then the sum."""
        sorted_ = {value: spread.sort() for value, spread in self.by_value.items()}
        return {value: [*counts, seconds] for value, (counts, seconds) in sorted_.items()}

    def merge(self, snapshot: "dict[str, list[float]]") -> None:
        """Count what another process counted; values that are not known here are left out."""
        for value in self.by_value.keys() & snapshot.keys():
            *counts, seconds = snapshot[value]
            self.by_value[value].merge(counts, seconds)

    def family(self) -> Metric:
        labels = [self._label] if self._label else []
        family = HistogramMetricFamily(f"oncegate_{self._name}", self._help, labels=labels)
        for value, spread in self.by_value.items():
            counts, seconds = spread.sort()
            family.add_metric([value] if self._label else [], list(_cumulated(counts)), seconds)
        return family


def _cumulated(counts: list[int]) -> Iterator[tuple[str, float]]:
    total = 0
    for bound, count in zip([*map(str, BUCKETS_S), "+Inf"], counts, strict=True):
        total += count
        yield bound, total


Snapshot = dict[str, Any]  # of a process: "counts" by metric and label value, "gauges" by name


class Metrics(Collector):
    """The metrics of one process. `gauges` are asked at each scrape; their names are the keys of GAUGES."""

    def __init__(self, version: str, gauges: dict[str, Callable[[], float]]) -> None:
        self._version, self._gauges = version, gauges
        self._requests = Counters(
            "requests", "Requests by what became of them.", "outcome", [one.label for one in Outcome]
        )
        self._settled = Counters("settled", "Claims by how they ended.", "how", HOW_SETTLED)
        self._suppressed = Counters(
            "duplicates_suppressed", "Requests not executed again.", "how", [one.label for one in SUPPRESSED]
        )
        self._saved_s = Counters("upstream_seconds_saved", "Upstream time that replays spared.")
        self._replayed_bytes = Counters("replayed_bytes", "Bytes of bodies sent from the store.")
        self._tokens_saved = Counters("llm_tokens_saved", "Tokens of LLMs that replays spared.", "kind", KINDS)
        self._tokens_untold = Counters(
            "llm_replays_without_usage", "Replays that say nothing of the tokens they spared."
        )
        self._claims_lost = Counters(
            "claims_lost", "Claims whose record vanished or was taken, and losses of the store."
        )
        self._store_losses = Counters("store_losses", "Times the store lost data, or may have (moved).", "how", LOSSES)
        self._identity_accepted = Counters("identity_accepted", "Starts beside replicas that name keys in another way.")
        self._broken = Counters("store_breaker_opened", "Times claims were given up on for a while.")
        self._repeated = Counters("settle_repeated", "Calls to settle or append that were repeated.")
        self._unscoped = Counters("unscoped", "Guarded requests without any credential.")
        self._eof_framed = Counters("eof_framed", "Answers ended by closing alone, stored as whole.")
        self._restarts = Counters("worker_restarts", "Workers that died and were started again.")
        self._store_s = Histograms("store_seconds", "Time of one call to the store.", "verb", VERBS)
        self._request_s = Histograms("request_seconds", "Time from a request's head to the end of its answer.")
        self._overhead_s = Histograms("overhead_seconds", "Time in the proxy, upstream time taken out.")
        self._upstream_s = Histograms("upstream_seconds", "Time spent on the upstream.")
        self._by_verb = self._store_s.by_value
        self.settled = self._settled.add
        self._by_request = [one.by_value[""] for one in (self._request_s, self._overhead_s, self._upstream_s)]
        self._request, self._overhead, self._upstream = (spread.add for spread in self._by_request)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the families, for prometheus_client."""
        for one in vars(self).values():
            if isinstance(one, Counters | Histograms):
                yield one.family()
        for name, ask in self._gauges.items():
            yield GaugeMetricFamily(f"oncegate_{name}", GAUGES[name], value=float(ask()))
        yield InfoMetricFamily("oncegate_build", "The version that runs.", value={"version": self._version})

    def snapshot(self) -> Snapshot:
        """Return everything that was counted, and the gauges as they are, for `merge` in another process."""
        counts = {name: one.snapshot() for name, one in vars(self).items() if isinstance(one, Counters | Histograms)}
        return {"counts": counts, "gauges": {name: float(ask()) for name, ask in self._gauges.items()}}

    def merge(self, counts: dict[str, dict[str, list[float]]]) -> None:
        """Count what another process counted: the `counts` of its snapshot."""
        for name, one in vars(self).items():
            if isinstance(one, Counters | Histograms) and name in counts:
                one.merge(counts[name])

    def restarted(self) -> None:
        """Count a worker that died and was started again."""
        self._restarts.add()

    def text(self) -> bytes:
        """Return what a scrape gets."""
        return generate_latest(self._registry)

    def observe(self, report: RequestReport, seconds: float) -> None:
        """Count one request."""
        outcome, _, _, key, upstream_s, saved_s, replayed_bytes, common_tenant, _, _, tokens = report
        label = outcome.label
        self._requests.by_value[label] += 1
        self._request(seconds)
        if upstream_s:
            self._upstream(upstream_s)
            self._overhead(max(0.0, seconds - upstream_s))
        else:
            self._overhead(seconds)
        if key and label in self._suppressed.by_value:
            self._suppressed.by_value[label] += 1
            self._saved_s.by_value[""] += saved_s
            self._replayed_bytes.by_value[""] += replayed_bytes
            if tokens is not None:
                self._save_tokens(tokens)
        if common_tenant:
            self._unscoped.add()
        if len(self._by_request[0].fresh) >= FRESH:
            for spread in self._by_request:
                spread.sort()

    def _save_tokens(self, tokens: Tokens) -> None:
        if not tokens:
            self._tokens_untold.add()
        for kind, count in tokens.items():
            self._tokens_saved.add(kind, count)

    def store_call(self, verb: str, seconds: float) -> None:
        """Count one call to the store."""
        spread = self._by_verb[verb]
        spread.add(seconds)
        if len(spread.fresh) >= FRESH:
            spread.sort()

    def store_repeat(self) -> None:
        self._repeated.add()

    @property
    def unsure(self) -> int:
        """How many claims ended without an answer stored or a key freed for sure."""
        return int(self._settled.by_value["unknown"] + self._settled.by_value["unconfirmed"])

    def claim_lost(self) -> None:
        self._claims_lost.add()

    def store_lost(self, how: str) -> None:
        """Count a loss; one that is certain may have taken claims along."""
        self._store_losses.add(how)
        if how != "moved":
            self._claims_lost.add()

    def identity_accepted(self) -> None:
        self._identity_accepted.add()

    def store_broke(self) -> None:
        self._broken.add()

    def close_delimited(self) -> None:
        self._eof_framed.add()


GAUGES = {
    "in_flight": "Guarded requests under way, those that wait for another apart.",
    "waiting": "Duplicates that wait for their original.",
    "store_memory_ratio": "Memory the store uses, of its limit.",
    "store_full": "1 while the store's memory is so full that new keys are refused.",
    "store_breaker_open": "1 while claims are not even tried.",
    "rules_differ": "1 while other proxies on the store name keys by other rules.",
    "quarantine_seconds": "Time for which unseen keys will be refused, because the store lost data.",
    "ready": "1 where /readyz says yes.",
    "buffered_bytes": "Bytes of bodies and answers held in memory.",
    "workers": "Processes that serve.",
}
# How a gauge of several workers becomes one; those that are not named here are added up.
MERGED: dict[str, Callable[[Iterable[float]], float]] = {
    **dict.fromkeys(
        ("store_memory_ratio", "store_full", "store_breaker_open", "rules_differ", "quarantine_seconds"), max
    ),
    "ready": min,
}
