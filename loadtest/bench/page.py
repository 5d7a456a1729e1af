"""The figures of one run as the page docs/explain/benchmarks.md has them: a paragraph and two tables in Markdown."""

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loadtest.bench.goals import CONNECTIONS
from loadtest.bench.table import Cell, Figure, Table

COLUMNS = ("no-rest", "oncegate", "earlier", "nginx+lua", "obvious", "nginx", "aiohttp")


class Circumstances(NamedTuple):
    """What a reader must know of a run."""

    commit: str
    against: str
    rounds: int
    seconds: int
    cores: int


def write_page(path: Path, run: Circumstances, table: Table, figures: Sequence[Figure]) -> None:
    parts = (costs(table) if table.cells else []), reached(figures)
    path.write_text("\n\n".join([told(run), *("\n".join(part) for part in parts if part)]) + "\n")


def told(run: Circumstances) -> str:
    """Return the paragraph that says when and how the run was recorded."""
    against = f" beside {run.against} (`earlier`)" if run.against else ""
    return (
        f"Recorded on {time.strftime('%Y-%m-%d')} at {run.commit}{against}: rounds of {run.seconds} s in turns, "
        f"{run.rounds} of them, medians, {CONNECTIONS} connections, Python {platform.python_version()}, {run.cores} "
        f"core{'s' * (run.cores > 1)}. Each cell has requests a second and the proxy's CPU time for one."
    )


def costs(table: Table) -> list[str]:
    """Return a row for each scenario, with a column for each contender that was measured."""
    cells = {(cell.scenario, cell.contender): cell for cell in table.cells.values() if cell.connections == CONNECTIONS}
    columns = [name for name in COLUMNS if name in {contender for _, contender in cells}]
    rows = [
        [scenario, *(_cost(cells.get((scenario, name))) for name in columns)]
        for scenario in dict.fromkeys(scenario for scenario, _ in cells)
    ]
    return _lines(["", *columns], rows)


def _cost(cell: Cell | None) -> str:
    return f"{cell.median('rate'):,.0f}, {cell.median('cpu_us'):.0f} us" if cell else ""


def reached(figures: Sequence[Figure]) -> list[str]:
    """Return a row for each figure, with its goal and its wish where it has them."""
    rows = [
        [
            figure.name,
            f"{figure.value:.2f} {figure.unit}".strip(),
            _goal(figure, figure.limit, missed="**missed**"),
            _goal(figure, figure.wish, missed="missed"),
            figure.note,
        ]
        for figure in figures
    ]
    return _lines(["", "figure", "must", "wished", ""], rows)


def _goal(figure: Figure, limit: float | None, missed: str) -> str:
    if limit is None:
        return ""
    return f"{figure.sign} {limit:g}: {'met' if figure.reaches(limit) else missed}"


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
