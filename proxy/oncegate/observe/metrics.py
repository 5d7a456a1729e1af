"""The metrics of one process: what is counted, under which name, and how those of several workers become one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from oncegate.observe.exemplars import Exemplars
from oncegate.observe.families import (
    MAX_UNSORTED,
    SEPARATOR,
    Counters,
    FamilySnapshot,
    GroupedCounters,
    Histogram,
    Histograms,
    sort_all,
)
from oncegate.observe.gauges import GAUGE_LABELS, GAUGES
from oncegate.observe.labels import (
    CANCELS,
    CLIENT_CONNECTIONS,
    HEARTBEATS,
    LOOK_UPS,
    SETTLEMENTS,
    UPSTREAM_CONNECTIONS,
    VERBS,
    WAIT_ENDS,
    SettlementLabel,
    StoreLoss,
    Unguarded,
    UnguardedKey,
)
from oncegate.observe.outcome import BY_LABEL, SUPPRESSED, ClientCounts, RequestReport
from oncegate.observe.reconciling import ReconcilingCounts
from oncegate.observe.usage import Tokens
from oncegate.settings.names import TOKEN_KINDS

# The label `rule` of requests that no rule matches, which the settings alone decide.
DEFAULT_RULE = "(default)"
# The labels `rule` and `upstream` of requests that were refused before a rule decided.
NO_RULE = "(none)"

# The metrics of a process as plain values: `counts` by metric (each a FamilySnapshot), `gauges` by name.
Snapshot = dict[str, Any]


class Metrics(Collector):
    """The metrics of one process.

    `gauges` are called at each scrape; their names are the keys of GAUGES. `labelled()` returns the gauges that have
    labels, by the names of their samples.
    """

    def __init__(
        self,
        version: str,
        gauges: dict[str, Callable[[], float]],
        labelled: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._version, self._gauges, self._labelled = version, gauges, labelled
        # By rule and upstream: the counts of their outcomes, and the histogram of the upstream.
        self._routes: dict[tuple[str, str], tuple[dict[str, float], Histogram]] = {}
        self._exemplars = Exemplars()
        self._count_requests()
        self._count_connections()
        self._count_the_store()
        self.reconciling = ReconcilingCounts()
        self.spans = Counters("spans", "Spans, by what became of them.", label="end", values=("exported", "lost"))
        self.traces_limited = Counters("traces_limited", "Requests that the most traces a second kept from a trace.")
        self._restarts = Counters("worker_restarts", "Worker processes that died and were started again.")
        self.restarted: Callable[[], None] = self._restarts.add
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def _count_requests(self) -> None:
        self._requests = Counters("requests", "Requests, by their outcome.", label="outcome", values=BY_LABEL)
        # What requests are counted by. `_requests` is the sum.
        self._by_rule = GroupedCounters(
            "rule_requests",
            "Requests, by the rule that decided, its upstream, and their outcome.",
            labels=("rule", "upstream", "outcome"),
            values=BY_LABEL,
        )
        self._suppressed = Counters(
            "duplicates_suppressed",
            "Duplicates that were not executed a second time, by their outcome.",
            label="outcome",
            values=[outcome.label for outcome in SUPPRESSED],
        )
        self._saved_s = Counters("upstream_seconds_saved", "Upstream time that replays and joined responses saved.")
        self._replayed_bytes = Counters("replayed_bytes", "Bytes of response bodies sent from the store.")
        self._tokens_saved = GroupedCounters(
            "llm_tokens_saved",
            "LLM tokens that replays and joined responses saved, by rule.",
            labels=("rule", "kind"),
            values=TOKEN_KINDS,
        )
        self._tokens_saved.of(DEFAULT_RULE)
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
        self._unguarded = Counters(
            "unguarded",
            "Requests that passed without a claim although their method is guarded.",
            label="reason",
            values=[reason.label for reason in Unguarded],
        )
        self._close_delimited = Counters(
            "close_delimited", "Responses that ended only by closing the connection and were stored as complete."
        )
        self._request_s = Histograms("request_seconds", "Time from the head of a request to the end of its response.")
        self._overhead_s = Histograms("overhead_seconds", "Time of a request in the proxy, without upstream time.")
        self._upstream_s = Histograms("upstream_seconds", "Time spent on the upstream.", label="upstream", values=None)
        self._by_request = [one.by_value[""] for one in (self._request_s, self._overhead_s)]
        self._add_request, self._add_overhead = (one.add for one in self._by_request)

    def _count_connections(self) -> None:
        self._client_connections = Counters(
            "client_connections", "Connections of clients.", label="event", values=CLIENT_CONNECTIONS
        )
        self._heartbeats = Counters("heartbeats", "Signs of life to clients.", label="kind", values=HEARTBEATS)
        self._pages = Counters("pages", "Pages for people, in place of problems in JSON.")
        counters = self._client_connections, self._heartbeats, self._pages
        self.of_clients = ClientCounts(*[one.by_value for one in counters])
        self.upstream_connections = GroupedCounters(
            "upstream_connections",
            "Connections to upstreams.",
            labels=("upstream", "event"),
            values=UPSTREAM_CONNECTIONS,
        )
        self._look_ups = Counters("dns_lookups", "Look-ups of host names.", label="result", values=LOOK_UPS)
        self.looked_up: Callable[[str], None] = self._look_ups.add

    def _count_the_store(self) -> None:
        self._settled = Counters("settled", "Claims, by how they ended.", label="settlement", values=SETTLEMENTS)
        self.cancels = Counters(
            "cancels", "Requests under way that somebody stopped, by who did.", label="by", values=CANCELS
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
        self.identity_accepted: Callable[[], None] = self._identity_accepted.add
        self.breaker_opened: Callable[[], None] = self._breaker_opened.add
        self.store_retried: Callable[[], None] = self._retries.add
        self._store_s = Histograms(
            "store_seconds",
            "Time of one call to the store. Verb connect: of each new connection to a server.",
            label="verb",
            values=VERBS,
        )
        # Called with the seconds of a call to the store, by its verb.
        self.store_observers: dict[str, Callable[[float], None]] = {
            verb: histogram.observe for verb, histogram in self._store_s.by_value.items()
        }
        # Each request has one claim and one settle, so their observations are sorted with the requests'.
        self._by_request += [self._store_s.by_value[verb] for verb in ("claim", "settle")]
        self.store_observers |= {verb: self._store_s.by_value[verb].add for verb in ("claim", "settle")}

    # What a scrape gets, and other processes ...

    def collect(self) -> Iterator[Metric]:
        """Yield the families, for prometheus_client."""
        for family in self._families().values():
            yield self._exemplars.added_to(family.family())
        families: dict[str, GaugeMetricFamily] = {}
        for sample, value in self._gauge_values().items():
            name, *values = sample.split(SEPARATOR)
            if name not in families:
                families[name] = GaugeMetricFamily(f"oncegate_{name}", GAUGES[name], labels=GAUGE_LABELS.get(name, ()))
            families[name].add_metric(values, value)
        yield from families.values()
        yield InfoMetricFamily("oncegate_build", "The version that runs.", value={"version": self._version})

    def _gauge_values(self) -> dict[str, float]:
        return {name: float(read()) for name, read in self._gauges.items()} | self._labelled()

    def _families(self) -> dict[str, Counters | GroupedCounters | Histograms]:
        self._requests.by_value = dict.fromkeys(self._requests.by_value, 0.0)
        for counts in self._by_rule.groups.values():
            for outcome, count in counts.items():
                self._requests.by_value[outcome] += count
        kinds = Counters | GroupedCounters | Histograms
        return {name: one for name, one in (vars(self) | vars(self.reconciling)).items() if isinstance(one, kinds)}

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics in the format that a scraper accepts, by default Prometheus's, and its media type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def snapshot(self) -> Snapshot:
        """Return all counts and gauges; another process of the same version can `merge` the counts."""
        return {
            "counts": {name: family.snapshot() for name, family in self._families().items()}
            | {"exemplars": self._exemplars.snapshot()},
            "gauges": self._gauge_values(),
        }

    def merge(self, counts: dict[str, FamilySnapshot]) -> None:
        """Add the `counts` of another process's snapshot."""
        for name, family in self._families().items():
            if name in counts:
                family.merge(counts[name])
        self._exemplars.merge(counts.get("exemplars", {}))

    # What is counted ...

    def follow(self, routes: Iterable[tuple[str, str]]) -> None:
        """Let the metrics have these from now on: the names of each rule and its upstream, before their first request.

        What counted before is kept.
        """
        self._route("", "")
        for rule, upstream in routes:
            route = self._route(rule, upstream)
            if rule:
                # Of requests that the rule refused before their upstream mattered.
                self._routes[rule, ""] = route

    def _route(self, rule: str, upstream: str) -> tuple[dict[str, float], Histogram]:
        # Without an upstream no time is spent on one.
        histogram = self._upstream_s.of(upstream) if upstream else Histogram()
        if upstream and histogram not in self._by_request:
            self._by_request.append(histogram)
        names = (rule or DEFAULT_RULE, upstream) if upstream else (NO_RULE, NO_RULE)
        route = self._routes[rule, upstream] = self._by_rule.of(*names), histogram
        return route

    def observe(self, report: RequestReport, seconds: float) -> None:
        """Count one request that took `seconds`."""
        label, upstream_s = report.outcome.label, report.upstream_s
        name = report.rule, report.upstream
        counts, histogram = self._routes.get(name) or self._route(*name)
        counts[label] += 1
        self._add_request(seconds)
        if upstream_s:
            histogram.add(upstream_s)
        self._add_overhead(seconds - upstream_s if seconds > upstream_s else 0.0)
        if report.key:
            if label in self._suppressed.by_value:
                self._suppressed.by_value[label] += 1
                self._saved_s.by_value[""] += report.saved_s
                self._replayed_bytes.by_value[""] += report.replayed_bytes
                if report.tokens is not None:
                    self._save_tokens(report.rule or DEFAULT_RULE, report.tokens)
            if report.without_credential:
                self._without_credential.add()
            for settlement in report.settlements:
                self._settled.by_value[settlement.label] += 1
            if report.close_delimited:
                self._close_delimited.add()
        if report.unguarded_key is not None:
            self._unguarded_keys.add(report.unguarded_key.label)
        if report.unguarded is not None:
            self._unguarded.add(report.unguarded.label)
        if report.trace is not None:
            self._exemplars.add(report.trace.own.trace_text, report, seconds)
        if len(self._by_request[0].unsorted) >= MAX_UNSORTED:
            sort_all(self._by_request)

    def _save_tokens(self, rule: str, tokens: Tokens) -> None:
        if not tokens:
            self._without_usage.add()
        for kind, count in tokens.items():
            self._tokens_saved.of(rule)[kind] += count

    @property
    def unsure(self) -> int:
        """How many claims ended without a stored response and without a key that is surely free."""
        unsure = SettlementLabel.UNKNOWN, SettlementLabel.UNCONFIRMED
        return int(sum(self._settled.by_value[settlement.label] for settlement in unsure))

    def claim_lost(self) -> None:
        """Count a running claim whose record vanished or was taken."""
        self._claims_lost.add()

    def store_lost(self, loss: StoreLoss) -> None:
        """Count a loss of the store; one that is certain may have taken claims along."""
        self._store_losses.add(loss.label)
        if loss.is_certain:
            self._claims_lost.add()
