"""The table of a run, for people and READMEs, and its plot."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.clients.sending import Outcome
from loadtest.retry_storm.plan import Plan
from loadtest.retry_storm.run import Side

COLOURS = {"without": "#a33f3f", "with oncegate": "#2f7d4f"}
TITLES = (
    "calls that reached the API, a second",
    "duplicate executions so far",
    "paid beyond what was due, %",
    "share of operations answered within so many seconds",
)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of sorted values lies; 0 if there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def figures(side: Side) -> dict[str, str]:
    """Return the rows of one column."""
    executions, times = side.executions, side.answered_s()
    open_ = [one for one in side.ended if one.outcome not in (Outcome.ANSWERED, Outcome.REFUSED)]
    done = [one for one in open_ if executions[one.operation.number]]
    (cents, cents_due), (tokens, tokens_due) = side.paid("charges"), side.paid("prompts")
    return {
        "operations wanted": f"{len(side.operations):,}",
        "tries of the clients": f"{sum(one.tries for one in side.ended):,}",
        "calls that reached the API": f"{len(side.calls):,}",
        "of them declined (503)": f"{sum(how == 'busy' for _, _, how in side.calls):,}",
        "executions": f"{executions.total():,}",
        "**duplicate executions**": f"**{len(side.duplicates):,}**",
        "money taken / due": f"{cents / 100:,.0f} / {cents_due / 100:,.0f} EUR ({_over(cents, cents_due)})",
        "tokens paid / due": f"{tokens:,} / {tokens_due:,} ({_over(tokens, tokens_due)})",
        "operations answered": f"{side.count(Outcome.ANSWERED):,}",
        "told that the outcome is unknown": f"{side.count(Outcome.UNKNOWN):,}",
        "of them answered when they asked once more": f"{side.learnt:,}",
        "given up without an answer": f"{side.count(Outcome.OPEN):,}",
        "of unknown and given up, done all the same": f"{len(done):,}",
        "p50 / p99 to an answer": f"{percentile(times, 0.5) * 1000:,.0f} / {percentile(times, 0.99) * 1000:,.0f} ms",
    }


def _over(paid: int, due: int) -> str:
    return f"{(paid / due - 1) * 100 if due else 0:+.1f} %"


def table(without: Side, with_it: Side, asking: Side) -> str:
    """Return the figures as a table in Markdown."""
    columns = figures(without), figures(with_it), figures(asking)
    head = ("", *COLOURS, "and it asks the API"), ("---", "---:", "---:", "---:")
    rows = [*head, *((name, *(one[name] for one in columns)) for name in columns[0])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(path: Path, plan: Plan, without: Side, with_it: Side) -> None:
    """Plot calls per second, duplicates, money and tokens paid beyond what was due, and the time to a response."""
    import matplotlib  # here, so that the table comes without it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, ((calls, copies), (paid, waits)) = pyplot.subplots(2, 2, figsize=(14, 9), layout="constrained")
    for place, (side, (name, colour)) in enumerate(zip((without, with_it), COLOURS.items(), strict=True)):
        style: dict[str, Any] = {"where": "post", "color": colour, "label": name}
        calls.step(*_calls(side), **style)
        copies.step(*_duplicates(side, plan), **style)
        bars = paid.bar([place * 0.4, 1 + place * 0.4], _beyond(side), 0.4, color=colour)
        paid.bar_label(bars, fmt="%+.1f %%")
        times = side.answered_s()
        style["label"] = f"{side.count(Outcome.UNKNOWN)} told unknown, {side.count(Outcome.OPEN)} given up"
        waits.step(times, [(index + 1) / len(side.ended) for index in range(len(times))], **style)
    paid.set_xticks([0.2, 1.2], ["money", "tokens"])
    for axes, title in zip((calls, copies, paid, waits), TITLES, strict=True):
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    for axes in (calls, copies):
        axes.axvspan(*plan.brownout, color="#f0e6d2", zorder=0, label="the API fails most")
    calls.legend()
    waits.legend(loc="lower right")
    figure.suptitle(f"Retry storm, seed {plan.seed}: {len(without.operations)} operations, the same on both sides")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _calls(side: Side) -> tuple[list[int], list[int]]:
    """Return the seconds of the run, and how many calls reached the API in each."""
    rate = Counter(int(at - side.begun) for at, _, _ in side.calls)
    seconds = [*range(max(rate, default=0) + 1)]
    return seconds, [rate[second] for second in seconds]


def _duplicates(side: Side, plan: Plan) -> tuple[list[float], list[int]]:
    """Return times, and how many duplicates there were by then."""
    times = [at - side.begun for at in side.duplicates]
    return [0.0, *times, max(plan.seconds, *times, 0.0)], [*range(len(times) + 1), len(times)]


def _beyond(side: Side) -> list[float]:
    """Return by how many percent more money, and more tokens, were paid than due."""
    amounts = [side.paid(kind) for kind in ("charges", "prompts")]
    return [100 * (paid / due - 1) if due else 0.0 for paid, due in amounts]
