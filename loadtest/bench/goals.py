"""The figures that follow from the table, and their goals: one line each in GOALS."""

from typing import NamedTuple

from loadtest.bench.table import Figure, Table

CONNECTIONS = 32


class Goal(NamedTuple):
    """A ratio of two medians, at CONNECTIONS. `limit` is the least value if `least`, else the greatest."""

    scenario: str
    ours: str
    other: str
    field: str
    limit: float | None = None
    wish: float | None = None
    least: bool = False


# Beside nginx+lua and an earlier commit, connections to the API do not rest: the rest is a row of its own.
OURS, LUA, EARLIER = "no-rest", "nginx+lua", "earlier"
GOALS = (
    Goal("payment", OURS, LUA, "cpu_us", 1.7, 1.5),
    Goal("payment", OURS, EARLIER, "cpu_us", 0.58),
    Goal("llm", OURS, LUA, "cpu_us", 1.5, 1.3),
    Goal("llm", OURS, EARLIER, "cpu_us", 0.6),
    Goal("execution", OURS, LUA, "cpu_us", 1.5, 1.4),
    Goal("execution", OURS, EARLIER, "cpu_us"),
    Goal("fresh", OURS, LUA, "cpu_us", 3.2, 2.6),
    Goal("fresh", OURS, EARLIER, "cpu_us"),
    *(Goal(kind, OURS, other, "cpu_us") for kind in ("traces", "apps", "tenants", "mixed") for other in (LUA, EARLIER)),
    Goal("replay", OURS, LUA, "cpu_us", 1.35, 1.2),
    Goal("replay", OURS, EARLIER, "cpu_us"),
    Goal("pass-through", OURS, "aiohttp", "rate", 5.0, least=True),
    Goal("pass-through", OURS, EARLIER, "cpu_us"),
    Goal("execution", "oncegate", "obvious", "rate", 4.0, least=True),
    Goal("replay", "oncegate", "obvious", "rate", 3.0, least=True),
    Goal("pass-through", "oncegate", "nginx", "rate", 0.35, least=True),
    # What the rest costs.
    *(Goal(kind, "oncegate", OURS, "cpu_us") for kind in ("execution", "payment", "llm", "fresh")),
    *(Goal(kind, "oncegate", LUA, "cpu_us") for kind in ("execution", "payment", "llm", "fresh")),
    Goal("execution", "spare", OURS, "cpu_us"),
    # What tracing costs: none of the requests, 1 % and 10 % of them.
    Goal("execution", "traced-0", OURS, "cpu_us", 1.01),
    Goal("execution", "traced-1", OURS, "cpu_us", 1.04),
    Goal("execution", "traced-10", OURS, "cpu_us", 1.25),
)
WORDS = {"rate": "requests a second", "cpu_us": "CPU a request"}


def goals(table: Table) -> list[Figure]:
    """Return the figures of all goals whose contenders were measured, and the latency that oncegate adds.

    CPU time also stands for rates: a busy machine distorts it less.
    """
    found = []
    for goal in GOALS:
        scenario, ours, other, field, limit, wish, least = goal
        if (ratio := table.ratio(scenario, CONNECTIONS, other, field, ours)) is not None:
            name = f"{scenario}: {WORDS[field]}, {ours} of {other}"
            found.append(Figure(name, ratio, "x", limit, least, note=_both(table, goal), wish=wish))
        if field == "rate" and (cpu := table.ratio(scenario, CONNECTIONS, other, "cpu_us", ours)):
            found.append(Figure(f"{scenario}: CPU a request, {other} of {ours}", 1 / cpu, "x", None))
    through, direct = (table.cells.get(("execution", 1, name)) for name in ("oncegate", "direct"))
    if through and direct:
        added = through.median("p50_ms") - direct.median("p50_ms")
        found.append(Figure("execution: added latency at 1 connection, p50", added, "ms", 1.0))
    return found


def _both(table: Table, goal: Goal) -> str:
    ours, theirs = (
        table.cells[goal.scenario, CONNECTIONS, name].median(goal.field) for name in (goal.ours, goal.other)
    )
    return f"{ours:.0f} and {theirs:.0f} {'a second' if goal.field == 'rate' else 'us'}"
