"""Alerts and dashboard: what they ask for exists, each alert has its tests, and ranges have enough scrapes.

What they say is tested by a real Prometheus, in `tests/real/test_prometheus.py`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.grafana.dashboard import FILE, dashboard, expressions
from tests.promql import complaints, known, main, rules

ROOT = Path(__file__).parent.parent
RULES = rules()
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TESTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "config/alerts_test.yml").read_text())["tests"]
METRICS = known()
# The longest interval between two scrapes for which the rules hold, as config/alerts.yml says.
SCRAPE_S = 60
UNITS = {"s": 1, "m": 60, "h": 3600}


def test_alerts_and_dashboard_ask_for_what_is_scraped(capsys: pytest.CaptureFixture[str]) -> None:
    """Every metric, label and value is one that the proxy has, or that a rule records: `make lint` says what is not."""
    assert (main(), capsys.readouterr().err) == (0, "")


def test_a_metric_that_is_gone_fails_the_lint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A panel without its metric would be empty, and an alert would never fire."""
    left = {name: labels for name, labels in METRICS.items() if name != "oncegate_waits_total"}
    monkeypatch.setattr("tests.promql.known", lambda: left)
    assert main() == 1
    assert capsys.readouterr().err == "config/grafana/dashboard.py: oncegate_waits_total is no metric\n"


def test_the_dashboard_is_up_to_date() -> None:
    """The file is what the program beside it makes, and has each of its expressions."""
    assert FILE.read_text() == dashboard(), "run make docs"
    panels = json.loads(FILE.read_text())["panels"]
    assert {target["expr"] for panel in panels for target in panel.get("targets", ())} == set(expressions())


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("rate(oncegate_request_total[5m])", "oncegate_request_total is no metric"),
        ("oncegate:requests_failed:ratio_rate2m > 1", "oncegate:requests_failed:ratio_rate2m is no metric"),
        ('oncegate_requests_total{result="executed"}', "oncegate_requests_total has no label result"),
        ('oncegate_requests_total{outcome=~"executed|gone"}', "oncegate_requests_total has no outcome gone"),
        ('oncegate_store_seconds_bucket{le="0.04"}', "oncegate_store_seconds_bucket has no le 0.04"),
        ("sum by (verb) (oncegate_in_flight)", "no metric in the expression has the label verb"),
    ],
)
def test_what_is_gone_is_found(expression: str, sentence: str) -> None:
    """A name, a label, a value or a bucket that no scrape has."""
    assert list(complaints(expression, METRICS)) == [sentence]


def test_ranges_have_four_scrapes_and_more() -> None:
    """One scrape may fail, and a range has its first sample only behind its beginning."""
    for rule in RULES:
        for number, unit in re.findall(r"\[(\d+)([smh])\]", rule["expr"]):
            assert int(number) * UNITS[unit] >= 4 * SCRAPE_S, rule
    for expression in expressions():
        assert set(re.findall(r"\[([^]]+)\]", expression)) <= {"$__rate_interval", "$__range"}
    # What must last for a while has two scrapes at least in that time.
    assert all(int(rule["for"][:-1]) * UNITS[rule["for"][-1]] >= SCRAPE_S for rule in ALERTS.values() if "for" in rule)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_planted_fault_and_a_planted_quiet(alert: str) -> None:
    """Its tests say by their names which of them lets it fire."""
    for verb, fires in (("fires", True), ("is quiet", False)):
        tests = [test for test in TESTS if test["name"].startswith(f"{alert} {verb}: ")]
        assert tests, f"config/alerts_test.yml has no test whose name begins with: {alert} {verb}:"
        for test in tests:
            (asked,) = test["promql_expr_test"]
            assert asked["expr"] == 'group by (alertname) (ALERTS{alertstate="firing"})'
            assert (f'"{alert}"' in str(asked["exp_samples"])) is fires, test["name"]


def test_each_alert_says_what_it_means_and_how_much_it_hurts() -> None:
    """A page wakes somebody up; a ticket waits for the morning."""
    for alert, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("page", "ticket"), alert
        assert rule["annotations"]["summary"], alert
    assert {test["name"].partition(" ")[0] for test in TESTS} - {"No"} == ALERTS.keys()
