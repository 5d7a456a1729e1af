"""The rows of docs/reference/clients.md: compared with what a test saw, or written with WRITE_CLIENTS=1.

Any test can have a row: it calls `show` with the group, which is a table of the page, and what it saw.
"""

import os
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs/reference/clients.md"


def show(group: str, name: str, *cells: str) -> None:
    """Compare the row of a client with the page, or write it. `name` is the first cell, and names the row."""
    before, lines, after = _table(group)
    row = f"| {' | '.join([name, *(cell.replace('|', '/') for cell in cells)])} |"
    place = next((place for place, line in enumerate(lines) if line.startswith(f"| {name} |")), None)
    if place is not None and lines[place] == row:
        return
    seen = "is not on the page" if place is None else f"is another on the page:\n{lines[place]}"
    assert os.environ.get("WRITE_CLIENTS"), f"this row of {PAGE.name} {seen}\nSeen (WRITE_CLIENTS=1 writes it):\n{row}"
    lines = [*lines, row] if place is None else [*lines[:place], row, *lines[place + 1 :]]
    PAGE.write_text("\n".join([*before, *lines, *after]))


def names(group: str) -> list[str]:
    """Return the names of a table's rows, in the page's order."""
    return [line.split(" | ")[0].removeprefix("| ") for line in _table(group)[1]]


def _table(group: str) -> tuple[list[str], list[str], list[str]]:
    """Return the lines of the page before the rows of a table, those rows, and the lines after them."""
    lines = PAGE.read_text().split("\n")
    title = lines.index(f"## {group}")
    ruler = next(place for place in range(title, len(lines)) if lines[place].startswith("| ---"))
    end = next(place for place in range(ruler, len(lines)) if not lines[place].startswith("|"))
    return lines[: ruler + 1], lines[ruler + 1 : end], lines[end:]
