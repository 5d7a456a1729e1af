"""The metrics, and the one record of a request that they and the access log read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

OUTCOMES = (
    "executed", "replayed", "released", "in_flight", "mismatch", "unknown", "not_kept", "invalid", "too_large",
    "overloaded", "passthrough", "unguarded", "store_unavailable", "upstream_unreachable", "upstream_lost",
    "upstream_timeout", "truncated", "answer_not_stored", "fenced", "corrupt", "failed", "client_gone",
)  # fmt: skip
HOW_SETTLED = ("store", "store_bare", "release", "unknown", "unconfirmed", "lost", "fenced")
VERBS = ("claim", "append", "renew", "settle", "read")
SUPPRESSED = ("replayed", "in_flight", "mismatch", "unknown", "not_kept")
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. `word` is one of OUTCOMES; `key` is a short digest, empty without one.

    `upstream_s` is the part of `seconds` spent on the upstream; `saved_s` and `replayed_bytes` are what
    a replay spared and sent.
    """

    word: str
    status: int
    method: str
    key: str = ""
    seconds: float = 0.0
    upstream_s: float = 0.0
    saved_s: float = 0.0
    replayed_bytes: int = 0
    common_tenant: bool = False
    client_left: bool = False
    detail: str = ""


class Metrics:
    """The metrics of one process. `gauges` are asked at each scrape: in_flight, waiting, store_memory_ratio."""

    def __init__(self, version: str, gauges: dict[str, Callable[[], float]]) -> None:
        self.registry = registry = CollectorRegistry()
        prefix: Any = {"namespace": "oncegate", "registry": registry}
        requests = Counter("requests", "Requests by what became of them.", ["outcome"], **prefix)
        settled = Counter("settled", "Claims by how they ended.", ["how"], **prefix)
        suppressed = Counter("duplicates_suppressed", "Requests that were not executed again.", ["how"], **prefix)
        store = Histogram("store_seconds", "Time of one call to the store.", ["verb"], buckets=_SECONDS, **prefix)
        self._requests = {word: requests.labels(word) for word in OUTCOMES}
        self._settled = {how: settled.labels(how) for how in HOW_SETTLED}
        self._suppressed = {how: suppressed.labels(how) for how in SUPPRESSED}
        self._store = {verb: store.labels(verb) for verb in VERBS}
        self._request_s = Histogram("request_seconds", "Time from head to end.", buckets=_SECONDS, **prefix)
        self._overhead_s = Histogram(
            "overhead_seconds", "Time in the proxy, upstream time taken out.", buckets=_SECONDS, **prefix
        )
        self._upstream_s = Histogram("upstream_seconds", "Time spent on the upstream.", buckets=_SECONDS, **prefix)
        self._saved_s = Counter("upstream_seconds_saved", "Upstream time that replays spared.", **prefix)
        self._replayed_bytes = Counter("replayed_bytes", "Bytes of bodies sent from the store.", **prefix)
        self._claims_lost = Counter("claims_lost", "Claims whose record vanished or was taken.", **prefix)
        self._repeated = Counter("settle_repeated", "Calls to the store that were repeated.", **prefix)
        self._unscoped = Counter("unscoped", "Guarded requests without any credential.", **prefix)
        self._eof_framed = Counter("eof_framed", "Answers ended by closing alone, stored as whole.", **prefix)
        Info("build", "The version that runs.", **prefix).info({"version": version})
        for name, ask in gauges.items():
            Gauge(name, _GAUGES[name], **prefix).set_function(ask)

    def observe(self, outcome: Outcome) -> None:
        """Count one request."""
        self._requests[outcome.word].inc()
        self._request_s.observe(outcome.seconds)
        self._overhead_s.observe(max(0.0, outcome.seconds - outcome.upstream_s))
        if outcome.upstream_s:
            self._upstream_s.observe(outcome.upstream_s)
        if outcome.word in self._suppressed:
            self._suppressed[outcome.word].inc()
            self._saved_s.inc(outcome.saved_s)
            self._replayed_bytes.inc(outcome.replayed_bytes)
        if outcome.common_tenant:
            self._unscoped.inc()

    def store_call(self, verb: str, seconds: float) -> None:
        """Count one call to the store; verb "repeat" says that one is repeated."""
        if verb == "repeat":
            self._repeated.inc()
        else:
            self._store[verb].observe(seconds)

    def settled(self, how: str) -> None:
        self._settled[how].inc()

    def claim_lost(self) -> None:
        self._claims_lost.inc()

    def eof_framed(self) -> None:
        self._eof_framed.inc()

    def text(self) -> bytes:
        """Return what a scrape gets."""
        return generate_latest(self.registry)


_GAUGES = {
    "in_flight": "Guarded requests under way, those that wait for another apart.",
    "waiting": "Duplicates that wait for their original.",
    "store_memory_ratio": "Memory the store uses, of its limit.",
    "ready": "1 where /readyz says yes.",
    "buffered_bytes": "Bytes of bodies and answers held in memory.",
}
