"""The results: medians with their spread, as text, CSV and a plot."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from loadtest.bench.scenarios import Run


class Cell(NamedTuple):
    """All rounds of one measurement."""

    scenario: str
    connections: int
    contender: str
    runs: list[Run]

    def median(self, field: str) -> float:
        return median(float(getattr(run, field)) for run in self.runs)

    def spread(self, field: str) -> tuple[float, float]:
        """Return the least and the greatest."""
        values = [getattr(run, field) for run in self.runs]
        return min(values), max(values)


class Table:
    """All cells, in the order in which they were first measured."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        self.cells: dict[tuple[str, int, str], Cell] = {}
        for run in self.runs:
            place = (run.scenario, run.connections, run.contender)
            self.cells.setdefault(place, Cell(*place, [])).runs.append(run)

    def ratio(self, scenario: str, connections: int, other: str, field: str, ours_is: str = "oncegate") -> float | None:
        """Return oncegate's median divided by another's, None where one was not measured."""
        ours, theirs = (self.cells.get((scenario, connections, name)) for name in (ours_is, other))
        if ours is None or theirs is None or not theirs.median(field):
            return None
        return ours.median(field) / theirs.median(field)

    def lines(self) -> list[str]:
        """Return the table as text, one block for each scenario and number of connections."""
        found = []
        for place in dict.fromkeys((cell.scenario, cell.connections) for cell in self.cells.values()):
            cells = [cell for cell in self.cells.values() if (cell.scenario, cell.connections) == place]
            found += ["", f"{place[0]}, {place[1]} connection{'s' * (place[1] > 1)}", HEADER]
            found += [self._line(cell) for cell in cells]
        return found

    def _line(self, cell: Cell) -> str:
        low, high = cell.spread("rate")
        cheap, dear = cell.spread("cpu_us")
        rate = self.ratio(cell.scenario, cell.connections, cell.contender, "rate")
        cpu = self.ratio(cell.scenario, cell.connections, cell.contender, "cpu_us")
        load = max(run.load1 for run in cell.runs)
        return (
            f"  {cell.contender:10}{cell.median('rate'):8.0f} {f'{low:.0f}-{high:.0f}':>13}"
            f"{cell.median('cpu_us'):8.1f} {f'{cheap:.1f}-{dear:.1f}':>13}"
            f"{cell.median('p50_ms'):8.2f}{cell.median('p99_ms'):8.2f}"
            f"{_times(rate):>9}{_times(cpu):>9}{cell.median('other_busy'):7.0%}{load:6.1f}"
            f"{'' if all(run.sound for run in cell.runs) else '  WRONG ANSWERS'}"
        )


HEADER = (
    f"  {'':10}{'req/s':>8} {'spread':>13}{'CPU us':>8} {'spread':>13}{'p50 ms':>8}{'p99 ms':>8}"
    f"{'our rate':>9}{'our CPU':>9}{'other':>7}{'load':>6}"
)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


class Figure(NamedTuple):
    """One line of the list of goals. `limit` is the least value allowed if `least`, else the greatest.

    `wish` is the better value that is hoped for.
    """

    name: str
    value: float
    unit: str
    limit: float | None
    least: bool = False
    note: str = ""
    wish: float | None = None

    @property
    def met(self) -> bool:
        return self.limit is None or self.reaches(self.limit)

    @property
    def sign(self) -> str:
        return ">=" if self.least else "<="

    def reaches(self, limit: float) -> bool:
        return self.value >= limit if self.least else self.value <= limit

    def line(self) -> str:
        goal = "" if self.limit is None else f"{self.sign} {self.limit:g}"
        verdict = "" if self.limit is None else "met" if self.met else "MISSED"
        wish = ""
        if self.wish is not None:
            wish = f"wish {self.sign} {self.wish:g} {'met' if self.reaches(self.wish) else 'missed'}"
        remark = "; ".join(filter(None, (wish, self.note)))
        return f"  {self.name:62}{self.value:9.2f} {self.unit:6}{goal:>10} {verdict:7}{remark}"


def write_csv(folder: Path, runs: Sequence[Run], figures: Sequence[Figure]) -> None:
    """Write every run, and every figure with its goal."""
    for name, rows, fields in (("runs", runs, Run._fields), ("figures", figures, Figure._fields)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(fields)
            writer.writerows([f"{one:.6g}" if isinstance(one, float) else one for one in row] for row in rows)
