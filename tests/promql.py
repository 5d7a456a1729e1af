"""What the expressions of alerts and dashboards ask for, held to the metrics that a scrape has."""

import re
from collections.abc import Iterator, Mapping

from docs.generate import OPEN_LABELS, empty_metrics

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
    for name, matchers in _NAME.findall(expression):
        if name not in metrics:
            yield f"{name} is no metric"
            continue
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
