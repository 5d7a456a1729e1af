"""The report of a run: `python -m loadtest.chaos.report FOLDER` writes a text and a plot, and prints the text."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 100
COLOURS = {
    "executed": "#2f7d4f",
    "replayed": "#7cc08f",
    "joined": "#a9dcb9",
    "in flight": "#d9c25f",
    "refused": "#c9813a",
    "unknown": "#7a4fa3",
    "no answer": "#b8b8b8",
}


def _colour(how: str, word: str, slug: str) -> str:
    """Return the group of the plot to which an attempt belongs."""
    if how != "whole":
        return "no answer"
    if slug == "in-flight":
        return "in flight"
    return word if word in ("executed", "replayed", "joined", "unknown") else "refused"


def per_second(folder: Path, begun: float) -> dict[str, Counter[int]]:
    """Return how many attempts of each group ended in each second of the run."""
    groups: dict[str, Counter[int]] = {name: Counter() for name in COLOURS}
    for path in folder.glob("client-*.tsv"):
        with path.open() as file:
            for line in file:
                words = line.split("\t")
                groups[_colour(words[6], words[8], words[10])][int(float(words[1]) - begun)] += 1
    return groups


def faults(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "faults.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda fault: float(fault["begun"]))


def text(verdict: dict[str, Any], timeline: list[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """Return the report's lines: the verdict, the figures, the timeline."""
    violations, void = verdict["violations"], verdict["void"]
    yield f"seed {facts['seed']}, {facts['replicas']} replicas, leases of {facts['lease_s']:g} s"
    yield "VOID: " + "; ".join(void) if void else f"{len(violations)} violations, {verdict['excused']} excused"
    yield from (f"  {one['invariant']} {one['key']}: {one['text']}" for one in violations[:SHOWN])
    yield ""
    for name, value in verdict["figures"].items():
        if isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {count:>9}  {what}" for what, count in value.items())
        else:
            yield f"{name}: {value}"
    yield ""
    yield "timeline (seconds from the start; place; what was done)"
    for fault in timeline:
        since, until = fault["begun"] - facts["begun"], fault["ended"] - facts["begun"]
        yield f"{since:8.2f} - {until:7.2f}  {fault['place']:<16} {fault['kind']:<24} {fault['detail']}"


def plot(path: Path, groups: dict[str, Counter[int]], timeline: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Plot requests per second by their outcome, above the faults."""
    import matplotlib  # here, so that the text comes without it

    matplotlib.use("agg")
    from matplotlib import pyplot

    seconds = range(int(facts["ended"] - facts["begun"]) + 1)
    kinds = sorted({fault["kind"] for fault in timeline})
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(16, 10), height_ratios=(2, 1 + len(kinds) / 12), layout="constrained"
    )
    above.stackplot(
        seconds,
        [[group[second] for second in seconds] for group in groups.values()],
        labels=list(groups),
        colors=list(COLOURS.values()),
    )
    above.axvline(facts["calm"] - facts["begun"], color="black", linewidth=0.8, linestyle="--", label="no more faults")
    above.set_ylabel("requests a second")
    above.legend(loc="upper right", ncols=4)
    for row, kind in enumerate(kinds):
        spans = [
            (fault["begun"] - facts["begun"], max(0.15, fault["ended"] - fault["begun"]))
            for fault in timeline
            if fault["kind"] == kind
        ]
        below.broken_barh(spans, (row - 0.4, 0.8), color="#a33f3f")
    below.set_yticks(range(len(kinds)), kinds, fontsize=8)
    below.set_xlabel("seconds")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(folder: Path) -> None:
    facts, timeline = json.loads((folder / "run.json").read_text()), faults(folder)
    lines = "\n".join(text(json.loads((folder / "verdict.json").read_text()), timeline, facts))
    (folder / "report.txt").write_text(lines + "\n")
    print(lines)
    plot(folder / "report.png", per_second(folder, facts["begun"]), timeline, facts)
    print(f"\nwritten: {folder}/report.txt, report.png, verdict.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
