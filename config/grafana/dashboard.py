"""Makes the Grafana dashboard `oncegate.json`: `make docs` writes it. Change it here, not there.

A row is a title and its panels, each a title, a unit and its series: a legend and an expression. The rows read from top
to bottom as an operator asks at night: is it well, what do requests get, what is unknown, what of the store and the
upstreams, and what is it worth.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("oncegate.json")
# Each expression is limited to the chosen job. Grafana makes $__rate_interval at least four scrapes long.
_JOB = 'job=~"$job"'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _PLOT_HEIGHT, _NUMBER_HEIGHT = 24, 8, 4
# Below the first step a value is well.
_RED_ABOVE_0 = ((None, "green"), (1, "red"))


class Panel(NamedTuple):
    """One panel. `series`: legend and expression, in which $(...) are the matchers of a metric.

    `steps`: for a single number, from which value on it has which colour; empty for a plot over time.
    """

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    about: str = ""
    steps: tuple[tuple[float | None, str], ...] = ()


def _rate(metric: str, by: str, matchers: str = "") -> str:
    return f"sum by ({by}) (rate(oncegate_{metric}{_selector(matchers)}[$__rate_interval]))"


def _increase(metric: str, matchers: str = "") -> str:
    return f"sum(increase(oncegate_{metric}{_selector(matchers)}[$__range]))"


def _gauge(function: str, metric: str, matchers: str = "") -> str:
    return f"{function} (oncegate_{metric}{_selector(matchers)})"


def _quantile(share: float, metric: str, by: str = "", matchers: str = "") -> str:
    buckets = f"rate(oncegate_{metric}_bucket{_selector(matchers)}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({', '.join(filter(None, ('le', by)))}) ({buckets}))"


def _selector(matchers: str) -> str:
    return "{" + ", ".join(filter(None, (_JOB, matchers))) + "}"


_SAVED = 'outcome=~"replayed|joined"'
# What oncegate or its store did not manage.
_FAILED = 'outcome=~"store_unavailable|overloaded|failed|record_corrupt|answer_not_stored"'
_UPSTREAM_FAILED = 'outcome=~"upstream_unreachable|upstream_lost|upstream_timeout|truncated"'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Is it well?": (
        Panel(
            "Alerts that fire",
            "short",
            (("", 'count(ALERTS{alertname=~"Oncegate.*", alertstate="firing"}) or vector(0)'),),
            steps=_RED_ABOVE_0,
        ),
        Panel(
            "Proxies ready",
            "short",
            (("ready", _gauge("sum", "ready")), ("scraped", _gauge("count", "ready"))),
            steps=((None, "red"), (1, "green")),
        ),
        Panel(
            "Keys whose outcome is unknown",
            "short",
            (
                ("unknown", _gauge("max", "open_unknown_keys")),
                ("of dead owners", _gauge("max", "open_lapsed_keys")),
            ),
            "Somebody has to decide each: docs/how-to/unknown-outcomes.md",
            steps=_RED_ABOVE_0,
        ),
        Panel(
            "Claims lost in this time",
            "short",
            (("", _increase("claims_lost_total")),),
            "Each may have executed twice.",
            steps=_RED_ABOVE_0,
        ),
        Panel(
            "Memory of the store",
            "percentunit",
            (("", _gauge("max", "store_memory_ratio")),),
            "From 90 % on responses are stored without their bodies; at 100 % first-time keys are refused.",
            steps=((None, "green"), (0.8, "orange"), (0.9, "red")),
        ),
        Panel(
            "Available in this time",
            "percentunit",
            (
                (
                    "",
                    f"1 - {_increase('requests_total', _FAILED)} / {_increase('requests_total')}",
                ),
            ),
            "The share of requests that oncegate and its store did not refuse or fail.",
            steps=((None, "red"), (0.999, "green")),
        ),
    ),
    "Requests": (
        Panel("Requests by outcome", "reqps", (("{{outcome}}", f"{_rate('requests_total', 'outcome')} > 0"),)),
        Panel(
            "Refused or failed by oncegate and its store",
            "reqps",
            (("{{outcome}}", _rate("requests_total", "outcome", _FAILED)),),
        ),
        Panel(
            "Requests by rule", "reqps", (("{{rule}} to {{upstream}}", _rate("rule_requests_total", "rule, upstream")),)
        ),
        Panel(
            "Without a claim, by reason",
            "reqps",
            (
                ("{{reason}}", _rate("unguarded_total", "reason")),
                ("key ignored: {{reason}}", _rate("unguarded_keys_total", "reason")),
            ),
            "store_unavailable: the store is down under bypass. The others are the clients', or the rule's.",
        ),
        Panel(
            "Time of a request",
            "s",
            (
                ("p50", _quantile(0.5, "request_seconds")),
                ("p99", _quantile(0.99, "request_seconds")),
                ("p99 in the proxy", _quantile(0.99, "overhead_seconds")),
            ),
            "In the proxy: without the upstream, but with the waits of duplicates and of slow clients.",
        ),
        Panel(
            "In flight",
            "short",
            (
                ("in flight", _gauge("sum", "in_flight")),
                ("duplicates that wait", _gauge("sum", "waiting")),
                ("bodies on their way", _gauge("sum", "reading_bodies")),
            ),
        ),
    ),
    "Unknown outcomes and losses": (
        Panel("How claims end", "ops", (("{{settlement}}", _rate("settled_total", "settlement")),)),
        Panel(
            "Claims that became unknown, were lost or fenced",
            "ops",
            (
                (
                    "{{settlement}}",
                    _rate("settled_total", "settlement", 'settlement=~"unknown|unconfirmed|lost|fenced"'),
                ),
            ),
        ),
        Panel(
            "Open keys of the store",
            "short",
            (
                ("in flight", _gauge("max", "open_in_flight_keys")),
                ("in flight past their lease", _gauge("max", "open_lapsed_keys")),
                ("unknown", _gauge("max", "open_unknown_keys")),
                ("unknown, nobody has to decide", _gauge("max", "open_waived_keys")),
                ("expire undecided within a week", _gauge("max", "unknown_keys_expiring")),
            ),
        ),
        Panel(
            "Age of the oldest open key",
            "s",
            (
                ("in flight", _gauge("max", "in_flight_oldest_seconds")),
                ("unknown", _gauge("max", "open_unknown_oldest_seconds")),
                ("in flight past its lease", _gauge("max", "open_lapsed_oldest_seconds")),
            ),
        ),
        Panel(
            "Probes by verdict",
            "ops",
            (("{{rule}} {{verdict}}", f"{_rate('probes_total', 'rule, verdict')} > 0"),),
            "What the APIs say about unknown keys, under rules with reconcile.",
        ),
        Panel(
            "Unknown keys that were settled, by whom",
            "ops",
            (
                ("{{by}}", _rate("reconciled_total", "by")),
                ("left to a person: {{rule}}, {{reason}}", f"{_rate('left_to_a_person_total', 'rule, reason')} > 0"),
            ),
        ),
        Panel(
            "Age of unknown keys when they are settled",
            "s",
            (
                ("p50", _quantile(0.5, "reconciled_age_seconds")),
                ("p99", _quantile(0.99, "reconciled_age_seconds")),
            ),
        ),
        Panel(
            "APIs that are not asked, because they do not answer",
            "short",
            (("{{upstream}}", _gauge("sum by (upstream)", "probe_breakers_open")),),
        ),
        Panel("Losses of the store", "short", (("{{kind}}", _gauge("max by (kind)", "store_losses_total")),)),
    ),
    "Store": (
        Panel(
            "Time of a call, p99",
            "s",
            (("{{verb}}", _quantile(0.99, "store_seconds", "verb", 'verb!="connect"')),),
        ),
        Panel("Time of a claim, p50", "s", (("claim", _quantile(0.5, "store_seconds", "verb", 'verb="claim"')),)),
        Panel("Calls", "ops", (("{{verb}}", _rate("store_seconds_count", "verb")),)),
        Panel(
            "Trouble",
            "short",
            (
                ("breaker open", _gauge("max", "store_breaker_open")),
                ("full", _gauge("max", "store_full")),
                ("rules differ", _gauge("max", "rules_differ")),
                ("quarantine", f"{_gauge('max', 'quarantine_seconds')} > bool 0"),
            ),
        ),
        Panel(
            "Connections opened and calls repeated",
            "ops",
            (
                ("connections", _rate("store_seconds_count", "verb", 'verb="connect"')),
                ("calls repeated", _rate("store_retries_total", "job")),
            ),
        ),
        Panel(
            "PostgreSQL: size",
            "bytes",
            (
                ("records", _gauge("max", "store_record_bytes")),
                ("bodies", _gauge("max", "store_chunk_bytes")),
                ("audit trail", _gauge("max", "store_audit_bytes")),
            ),
        ),
        Panel(
            "PostgreSQL: housekeeping is behind, oldest snapshot",
            "s",
            (
                ("behind", _gauge("max", "store_behind_seconds")),
                ("snapshot", _gauge("max", "store_snapshot_seconds")),
            ),
        ),
    ),
    "Upstreams": (
        Panel(
            "Requests that reached no whole response",
            "reqps",
            (("{{upstream}} {{outcome}}", _rate("rule_requests_total", "upstream, outcome", _UPSTREAM_FAILED)),),
        ),
        Panel(
            "Time of the upstream",
            "s",
            (
                ("{{upstream}} p50", _quantile(0.5, "upstream_seconds", "upstream")),
                ("{{upstream}} p99", _quantile(0.99, "upstream_seconds", "upstream")),
            ),
        ),
        Panel(
            "Connections by state",
            "short",
            (("{{upstream}} {{state}}", _gauge("sum by (upstream, state)", "upstream_pool")),),
        ),
        Panel(
            "Connections opened, reused and failed",
            "ops",
            (("{{upstream}} {{event}}", _rate("upstream_connections_total", "upstream, event")),),
        ),
        Panel("Look-ups of host names", "ops", (("{{result}}", _rate("dns_lookups_total", "result")),)),
    ),
    "What it is worth": (
        Panel(
            "Executions saved in this time",
            "short",
            (("", _increase("duplicates_suppressed_total", _SAVED)),),
            steps=((None, "green"),),
        ),
        Panel(
            "Upstream time saved in this time",
            "s",
            (("", _increase("upstream_seconds_saved_total")),),
            steps=((None, "green"),),
        ),
        Panel(
            "LLM tokens saved in this time",
            "short",
            (("", _increase("llm_tokens_saved_total")),),
            steps=((None, "green"),),
        ),
        Panel(
            "Duplicates by what they got",
            "reqps",
            (("{{outcome}}", _rate("duplicates_suppressed_total", "outcome")),),
        ),
        Panel("Waits of duplicates by their end", "ops", (("{{end}}", _rate("waits_total", "end")),)),
        Panel("LLM tokens saved, by kind", "short", (("{{kind}}", _rate("llm_tokens_saved_total", "kind")),)),
    ),
    "Processes": (
        Panel("Workers", "short", (("workers", _gauge("sum", "workers")),)),
        Panel("Workers that died", "short", (("{{instance}}", _gauge("max by (instance)", "worker_restarts_total")),)),
        Panel("Time since the start", "s", (("{{instance}}", f"time() - oncegate_start_time_seconds{_selector('')}"),)),
        Panel("Versions", "short", (("{{version}}", _gauge("count by (version)", "build_info")),)),
        Panel("Bodies in memory", "bytes", (("{{instance}}", _gauge("max by (instance)", "buffered_bytes")),)),
        Panel(
            "Connections of clients",
            "short",
            (
                ("open", _gauge("sum", "client_open_connections")),
                ("{{event}} per second", _rate("client_connections_total", "event")),
            ),
        ),
    ),
}


def expressions() -> list[str]:
    """Return each expression of the dashboard."""
    return [expression for row in ROWS.values() for panel in row for _, expression in panel.series]


def dashboard() -> str:
    """Return the dashboard as Grafana reads it."""
    document = {
        "uid": "oncegate",
        "title": "oncegate",
        "tags": ["oncegate"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_choice(), _job_choice()]},
        "annotations": {"list": []},
        "panels": list(_panels()),
    }
    return json.dumps(document, indent=1) + "\n"


def _source_choice() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _job_choice() -> dict[str, Any]:
    query = "label_values(oncegate_build_info, job)"
    choice = {"name": "job", "label": "Job", "type": "query", "datasource": _SOURCE, "query": query, "refresh": 2}
    return choice | {"multi": True, "includeAll": True, "current": {"text": ["All"], "value": ["$__all"]}}


def _panels() -> Iterator[dict[str, Any]]:
    """Yield the panels from top to bottom: numbers six to a line, plots three."""
    y = number = 0
    for title, row in ROWS.items():
        kind = {"type": "row", "title": title, "collapsed": False, "panels": []}
        yield {"id": (number := number + 1), **kind, "gridPos": _place(0, y, _WIDTH, 1)}
        y += 1
        numbers, plots = [one for one in row if one.steps], [one for one in row if not one.steps]
        for panels, height, most in ((numbers, _NUMBER_HEIGHT, 6), (plots, _PLOT_HEIGHT, 3)):
            for start in range(0, len(panels), most):
                line = panels[start : start + most]
                width = _WIDTH // (most if panels is plots else len(line))
                for at, panel in enumerate(line):
                    yield _panel(panel, (number := number + 1), _place(at * width, y, width, height))
                y += height


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + at), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
        for at, (legend, expression) in enumerate(panel.series)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.steps:
        steps = [{"value": value, "color": colour} for value, colour in panel.steps]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    kind = {"type": "stat" if panel.steps else "timeseries", "title": panel.title, "description": panel.about}
    fields = {"fieldConfig": {"defaults": defaults, "overrides": []}, "options": options}
    return {"id": number, **kind, "datasource": _SOURCE, "gridPos": place, "targets": targets, **fields}


if __name__ == "__main__":
    FILE.write_text(dashboard())
