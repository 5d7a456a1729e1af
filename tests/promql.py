"""What the expressions of alerts and dashboards ask for, held to the metrics that a scrape has.

`make lint` runs this as a program. It prints a sentence for each thing that no scrape has, and fails then.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from config.grafana.dashboard import expressions
from docs.generate import OPEN_LABELS, empty_metrics

ALERTS = Path(__file__).parent.parent / "config/alerts.yml"
# Of a scrape, and of Prometheus itself.
TARGET_LABELS = {"job", "instance"}
ALERT_LABELS = {"alertname", "alertstate"}
_NAME = re.compile(r"\b(oncegate[_:][\w:]+|ALERTS|up)\b\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")

# By metric: its labels, each with its values, None where an operator names them.
Metrics = Mapping[str, Mapping[str, set[str] | None]]


def scraped() -> Metrics:
    """Return the samples of a scrape, the metrics of Prometheus itself included."""
    found: dict[str, dict[str, set[str] | None]] = {
        "up": {},
        "ALERTS": dict.fromkeys(ALERT_LABELS),
    }
    for family in empty_metrics().collect():
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                if label in OPEN_LABELS or label == "version":
                    labels[label] = None
                elif (values := labels.setdefault(label, set())) is not None:
                    values.add(value)
    return found


def complaints(expression: str, metrics: Metrics) -> Iterator[str]:
    """Yield a sentence for each thing in an expression that no scrape has."""
    labels = set(TARGET_LABELS)
    asked = _NAME.findall(expression)
    if gone := [name for name, _ in asked if name not in metrics]:
        yield from (f"{name} is no metric" for name in gone)
        return
    for name, matchers in asked:
        labels |= metrics[name].keys()
        for label, operator, text in _MATCHER.findall(matchers):
            if label not in metrics[name].keys() | TARGET_LABELS:
                yield f"{name} has no label {label}"
            elif (values := metrics[name].get(label)) is not None:
                wanted = text.split("|") if "~" in operator else [text]
                yield from (f"{name} has no {label} {one}" for one in wanted if one not in values)
    for group in _GROUPING.findall(expression):
        for label in filter(None, re.split(r"[\s,]+", group)):
            if label not in labels:
                yield f"no metric in the expression has the label {label}"


def rules() -> list[dict[str, Any]]:
    """Return all rules of config/alerts.yml, those that record included."""
    groups: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def known() -> Metrics:
    """Return what an expression may ask for: what is scraped, and what rules record."""
    return {**scraped(), **{rule["record"]: {} for rule in rules() if "record" in rule}}


def main() -> int:
    """Print what is wrong, and return the exit status."""
    asked = [("config/alerts.yml", rule["expr"]) for rule in rules()]
    asked += [("config/grafana/dashboard.py", expression) for expression in expressions()]
    metrics = known()
    found = [f"{file}: {sentence}" for file, expression in asked for sentence in complaints(expression, metrics)]
    print(*dict.fromkeys(found), sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
