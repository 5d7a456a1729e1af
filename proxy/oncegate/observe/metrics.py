"""The metrics of one process: what is counted, under which name, and how those of several workers become one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from oncegate.observe.families import MAX_UNSORTED, Counters, FamilySnapshot, Histogram, Histograms
from oncegate.observe.labels import SettlementLabel, StoreLoss, UnguardedKey
from oncegate.observe.outcome import SUPPRESSED, Outcome, RequestReport
from oncegate.observe.usage import TOKEN_KINDS, Tokens

# The labels of `store.waiters.Woken`.
WAIT_ENDS = (
    *("record_changed", "may_claim", "declined", "sent_away", "timed_out", "client_gone"),
    *("no_room", "no_room_for_body"),
)
VERBS = ("claim", "append", "renew", "settle", "read")

GAUGES = {
    "in_flight": "Guarded requests in progress, without the duplicates that wait for their original.",
    "reading_bodies": "Guarded requests whose body is still on its way. They are not in flight yet.",
    "waiting": "Duplicates that wait for their original request.",
    "store_memory_ratio": "Memory that the store uses, as a share of its limit.",
    "store_behind_seconds": "PostgreSQL: how long ago what housekeeping did on its last pass was due, at most.",
    "store_snapshot_seconds": "PostgreSQL: age of the oldest snapshot in the database. What it may see is not removed.",
    "store_hot_ratio": "PostgreSQL: share of the updates of records that touched no index.",
    "store_dead_ratio": "PostgreSQL: share of the rows of records that are dead.",
    "store_record_bytes": "PostgreSQL: size of the records, with their index.",
    "store_chunk_bytes": "PostgreSQL: size of the response bodies that are stored beside their records.",
    "store_audit_bytes": "PostgreSQL: size of the audit trail.",
    "store_full": "1 while the store is at its memory limit, so that first-time keys are refused.",
    "store_breaker_open": "1 while the circuit breaker is open: claims are refused without asking the store.",
    "rules_differ": "1 while other proxies on the store name keys by other rules.",
    "packs_records": "1 while records are packed in Redis: older versions of oncegate cannot use the store.",
    "quarantine_seconds": "Time until first-time keys are accepted, after the store lost data.",
    "unknown_keys": "Keys whose outcome is unknown, if this replica scanned last. One of them scans each hour.",
    "unknown_keys_expiring": "Those of them that expire within a week. After that a retry executes.",
    "ready": "1 while /readyz answers 200.",
    "buffered_bytes": "Bytes of request and response bodies held in memory.",
    "workers": "Worker processes that serve.",
}
# How the gauges of several workers become one. Those that are not named are added up.
MERGED: dict[str, Callable[[Iterable[float]], float]] = {
    # All workers use one store, so each of these describes the same thing.
    **dict.fromkeys(
        (
            "store_memory_ratio",
            "store_behind_seconds",
            "store_snapshot_seconds",
            "store_hot_ratio",
            "store_dead_ratio",
            "store_record_bytes",
            "store_chunk_bytes",
            "store_audit_bytes",
            "store_full",
            "store_breaker_open",
            "rules_differ",
            "packs_records",
            "quarantine_seconds",
            "unknown_keys",
            "unknown_keys_expiring",
        ),
        max,
    ),
    # A worker that is not ready gets its share of the connections all the same.
    "ready": min,
}


# The metrics of a process as plain values: `counts` by metric (each a FamilySnapshot), `gauges` by name.
Snapshot = dict[str, Any]


class Metrics(Collector):
    """The metrics of one process. `gauges` are called at each scrape; their names are the keys of GAUGES."""

    def __init__(self, version: str, gauges: dict[str, Callable[[], float]]) -> None:
        self._version, self._gauges = version, gauges
        self._count_requests()
        self._count_the_store()
        self._restarts = Counters("worker_restarts", "Worker processes that died and were started again.")
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def _count_requests(self) -> None:
        self._requests = Counters(
            "requests",
            "Requests, by their outcome.",
            label="outcome",
            values=[outcome.label for outcome in Outcome],
        )
        self._suppressed = Counters(
            "duplicates_suppressed",
            "Duplicates that were not executed a second time, by their outcome.",
            label="outcome",
            values=[outcome.label for outcome in SUPPRESSED],
        )
        self._saved_s = Counters("upstream_seconds_saved", "Upstream time that replays saved.")
        self._replayed_bytes = Counters("replayed_bytes", "Bytes of response bodies sent from the store.")
        self._tokens_saved = Counters(
            "llm_tokens_saved", "LLM tokens that replays saved.", label="kind", values=TOKEN_KINDS
        )
        self._without_usage = Counters(
            "llm_replays_without_usage", "Replays of LLM responses that do not state the tokens they used."
        )
        self._waits = Counters("waits", "Waits of duplicates, by how they ended.", label="end", values=WAIT_ENDS)
        # Called for each wait with how it ended, and for each poll.
        self.wait_ended: Callable[[str], None] = self._waits.add
        self._polls = Counters("wait_polls", "Times that the store was asked for duplicates that wait.")
        self.duplicate_polled: Callable[[], None] = self._polls.add
        self._without_credential = Counters(
            "without_credential", "Guarded requests without a credential. They share one tenant."
        )
        self._unguarded_keys = Counters(
            "unguarded_keys",
            "Requests that seem to carry a key, which guards nothing because of their method or of its header's name.",
            label="reason",
            values=[reason.label for reason in UnguardedKey],
        )
        self._close_delimited = Counters(
            "close_delimited", "Responses that ended only by closing the connection and were stored as complete."
        )
        self._request_s = Histograms("request_seconds", "Time from the head of a request to the end of its response.")
        self._overhead_s = Histograms("overhead_seconds", "Time of a request in the proxy, without upstream time.")
        self._upstream_s = Histograms("upstream_seconds", "Time spent on the upstream.")
        self._by_request = [one.by_value[""] for one in (self._request_s, self._overhead_s, self._upstream_s)]
        self._add_request, self._add_overhead, self._add_upstream = (one.add for one in self._by_request)

    def _count_the_store(self) -> None:
        self._settled = Counters(
            "settled",
            "Claims, by how they ended.",
            label="settlement",
            values=[settlement.label for settlement in SettlementLabel],
        )
        self._claims_lost = Counters(
            "claims_lost", "Running claims whose record vanished or was taken, and certain losses of the store."
        )
        self._store_losses = Counters(
            "store_losses",
            "Times the store lost data. Kind moved: it restarted or failed over, and may have lost the last writes.",
            label="kind",
            values=[loss.label for loss in StoreLoss],
        )
        self._identity_accepted = Counters(
            "identity_accepted", "Starts beside proxies that name keys in another way, which the settings accept."
        )
        self._breaker_opened = Counters("store_breaker_opened", "Times the circuit breaker of the store opened.")
        self._retries = Counters("store_retries", "Calls to append or settle that were repeated.")
        self._store_s = Histograms("store_seconds", "Time of one call to the store.", label="verb", values=VERBS)
        # Called with the seconds of a call to the store, by its verb.
        self.store_observers: dict[str, Callable[[float], None]] = {
            verb: self._observer(histogram) for verb, histogram in self._store_s.by_value.items()
        }
        # Each request has one claim and one settle, so their observations are sorted with the requests'.
        self._by_request += [self._store_s.by_value[verb] for verb in ("claim", "settle")]
        self.store_observers |= {verb: self._store_s.by_value[verb].add for verb in ("claim", "settle")}

    # What a scrape gets, and other processes ...

    def collect(self) -> Iterator[Metric]:
        """Yield the families, for prometheus_client."""
        for family in self._families().values():
            yield family.family()
        for name, read in self._gauges.items():
            yield GaugeMetricFamily(f"oncegate_{name}", GAUGES[name], value=float(read()))
        yield InfoMetricFamily("oncegate_build", "The version that runs.", value={"version": self._version})

    def _families(self) -> dict[str, Counters | Histograms]:
        return {name: one for name, one in vars(self).items() if isinstance(one, Counters | Histograms)}

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def snapshot(self) -> Snapshot:
        """Return all counts and gauges; another process of the same version can `merge` the counts."""
        return {
            "counts": {name: family.snapshot() for name, family in self._families().items()},
            "gauges": {name: float(read()) for name, read in self._gauges.items()},
        }

    def merge(self, counts: dict[str, FamilySnapshot]) -> None:
        """Add the `counts` of another process's snapshot."""
        for name, family in self._families().items():
            if name in counts:
                family.merge(counts[name])

    @staticmethod
    def _observer(histogram: Histogram) -> Callable[[float], None]:
        def observe_s(seconds: float) -> None:
            histogram.add(seconds)
            if len(histogram.unsorted) >= MAX_UNSORTED:
                histogram.sort()

        return observe_s

    # What is counted ...

    def observe(self, report: RequestReport, seconds: float) -> None:
        """Count one request that took `seconds`."""
        label, upstream_s = report.outcome.label, report.upstream_s
        self._requests.by_value[label] += 1
        self._add_request(seconds)
        if upstream_s:
            self._add_upstream(upstream_s)
            self._add_overhead(max(0.0, seconds - upstream_s))
        else:
            self._add_overhead(seconds)
        if report.key and label in self._suppressed.by_value:
            self._suppressed.by_value[label] += 1
            self._saved_s.by_value[""] += report.saved_s
            self._replayed_bytes.by_value[""] += report.replayed_bytes
            if report.tokens is not None:
                self._save_tokens(report.tokens)
        if report.without_credential:
            self._without_credential.add()
        for settlement in report.settlements:
            self._settled.by_value[settlement.label] += 1
        if report.unguarded_key is not None:
            self._unguarded_keys.add(report.unguarded_key.label)
        if report.close_delimited:
            self._close_delimited.add()
        if len(self._by_request[0].unsorted) >= MAX_UNSORTED:
            for histogram in self._by_request:
                histogram.sort()

    def _save_tokens(self, tokens: Tokens) -> None:
        if not tokens:
            self._without_usage.add()
        for kind, count in tokens.items():
            self._tokens_saved.add(kind, count)

    @property
    def unsure(self) -> int:
        """How many claims ended without a stored response and without a key that is surely free."""
        return int(
            self._settled.by_value[SettlementLabel.UNKNOWN.label]
            + self._settled.by_value[SettlementLabel.UNCONFIRMED.label]
        )

    def store_retried(self) -> None:
        """Count a repeated call to append or settle."""
        self._retries.add()

    def claim_lost(self) -> None:
        """Count a running claim whose record vanished or was taken."""
        self._claims_lost.add()

    def store_lost(self, loss: StoreLoss) -> None:
        """Count a loss of the store; one that is certain may have taken claims along."""
        self._store_losses.add(loss.label)
        if loss.is_certain:
            self._claims_lost.add()

    def identity_accepted(self) -> None:
        """Count a start beside proxies that name keys in another way."""
        self._identity_accepted.add()

    def breaker_opened(self) -> None:
        """Count an opening of the store's circuit breaker."""
        self._breaker_opened.add()

    def restarted(self) -> None:
        """Count a worker that died and was started again."""
        self._restarts.add()
