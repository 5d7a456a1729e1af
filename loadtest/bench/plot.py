"""The plot: CPU time and requests per second of each contender, as bars with their spread, in one SVG."""

from pathlib import Path

from loadtest.bench.table import Cell, Table

BAR, GAP, LEFT, WIDTH = 16, 22, 110, 330
COLOURS = {"oncegate": "#1f6feb", "embedded": "#79b0f7"}
FIELDS = {"cpu_us": "CPU us a request (less is better)", "rate": "requests a second (more is better)"}


def write_plot(path: Path, table: Table) -> None:
    """Draw one block for each scenario and number of connections, and one column for each of FIELDS."""
    parts, y = [], 20
    for place in dict.fromkeys((cell.scenario, cell.connections) for cell in table.cells.values()):
        cells = [cell for cell in table.cells.values() if (cell.scenario, cell.connections) == place]
        cells = [cell for cell in cells if cell.contender != "direct"]
        if not cells:
            continue
        parts.append(_text(8, y, f"{place[0]}, {place[1]} connections", bold=True))
        for column, (field, title) in enumerate(FIELDS.items()):
            x = LEFT + column * (WIDTH + 90)
            parts.append(_text(x, y, title))
            most = max(cell.spread(field)[1] for cell in cells) or 1.0
            for row, cell in enumerate(cells):
                parts += _bar(x, y + 8 + row * (BAR + 4), cell, field, WIDTH / most)
        parts += [_text(8, y + 20 + row * (BAR + 4), cell.contender) for row, cell in enumerate(cells)]
        y += len(cells) * (BAR + 4) + GAP + 10
    size = f'width="{LEFT + 2 * (WIDTH + 90)}" height="{y}"'
    style = 'font-family="sans-serif" font-size="11"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}><rect width="100%" height="100%" fill="white"/>'
    path.write_text("\n".join([frame, *parts, "</svg>", ""]))


def _bar(x: float, y: float, cell: Cell, field: str, scale: float) -> list[str]:
    value, (low, high) = cell.median(field), cell.spread(field)
    colour, middle = COLOURS.get(cell.contender, "#b0b0b0"), y + BAR / 2
    return [
        f'<rect x="{x}" y="{y}" width="{value * scale:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<path d="M{x + low * scale:.1f} {middle}H{x + high * scale:.1f}" stroke="black"/>',
        _text(x + high * scale + 6, y + 12, f"{value:.0f}"),
    ]


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight}>{text.replace("&", "&amp;").replace("<", "&lt;")}</text>'
