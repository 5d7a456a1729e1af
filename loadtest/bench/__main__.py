"""python -m loadtest.bench: the whole table; --quick in three minutes; --only payment,replay for a part.

--against COMMIT measures that commit in turns with this checkout.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from loadtest.bench import contenders, extras, tools
from loadtest.bench.against import checkout_name, package_of
from loadtest.bench.goals import goals
from loadtest.bench.machine import ROOT, two_cores
from loadtest.bench.page import Circumstances, write_page
from loadtest.bench.plot import write_plot
from loadtest.bench.scenarios import SCENARIOS, Run, rounds
from loadtest.bench.table import Table, write_csv

# What --quick measures: what the goals compare.
QUICK_CONTENDERS = ["oncegate", "no-rest", "earlier", "nginx+lua", "obvious", "aiohttp", "nginx", "direct"]
QUICK = ["execution", "payment", "llm", "fresh", "mixed", "replay", "pass-through"]
QUICK += ["chunks", "live-streams", "redis-cpu", "record"]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m loadtest.bench", description="oncegate against its peers.")
    top.add_argument("--quick", action="store_true", help="one short round of what has goals, at 32 connections")
    top.add_argument(
        "--only", type=_some_of([*SCENARIOS, *extras.EXTRAS]), help=f"some of {','.join((*SCENARIOS, *extras.EXTRAS))}"
    )
    top.add_argument("--against", metavar="COMMIT", help="a commit that is built and takes part, without rests")
    top.add_argument(
        "--contenders", type=_some_of(contenders.CONTENDERS), help=f"some of {','.join(contenders.CONTENDERS)}"
    )
    top.add_argument("--connections", type=_words, help="default: each scenario's own; 32 if quick")
    top.add_argument("--rounds", type=int, help="default 5; 1 if quick")
    top.add_argument("--seconds", type=int, default=1, help="for each measurement; default 1")
    top.add_argument("--out", type=Path, default=ROOT / "loadtest" / "results", help="folder of the CSV and the plot")
    return top


def _words(text: str) -> list[str]:
    return text.split(",")


def _some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return the reading of an argument that names some of `known`."""

    def read(text: str) -> list[str]:
        words = _words(text)
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}")
        return words

    return read


def main() -> int:
    """Measure, print and write; return 0 if every response was right, whatever the figures are."""
    given = parser().parse_args()
    tools.obtain()
    quick = given.quick
    connections = [int(one) for one in given.connections or (["32"] if quick else [])]
    count, seconds = given.rounds or (1 if quick else 5), given.seconds
    wanted = given.only or (QUICK if quick else [*SCENARIOS, *extras.EXTRAS])
    asked = given.contenders or (QUICK_CONTENDERS if quick else [*contenders.CONTENDERS])
    names = [one for one in asked if one not in contenders.AGAINST or given.against]
    cores = two_cores()
    if cores.proxy == cores.other:
        print("only one core: requests a second say nothing, CPU time a request still does")
    os.sched_setaffinity(0, cores.other)
    with tempfile.TemporaryDirectory(prefix="oncegate-bench-") as scratch:
        # PostgreSQL refuses to run as root, and its account has a folder in here.
        os.chmod(scratch, 0o711)
        tempfile.tempdir = scratch
        site = contenders.open_site(cores, package_of(given.against) if given.against else None)
        try:
            measured = rounds(site, names, [one for one in SCENARIOS if one in wanted], connections, seconds, count)
            table = Table(told(measured))
            print(*table.lines(), sep="\n", flush=True)
            figures = goals(table)
            for name, measure in extras.EXTRAS.items():
                if name in wanted:
                    print(f"... {name}", file=sys.stderr, flush=True)
                    figures += measure(site, quick)
        finally:
            site.close()
            tempfile.tempdir = None
    print("", *(figure.line() for figure in figures), sep="\n")
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(given.out, table.runs, figures)
    write_plot(given.out / "bench.svg", table)
    circumstances = Circumstances(
        checkout_name(), (given.against or "")[:7], count, seconds, len(cores.proxy | cores.other)
    )
    write_page(given.out / "page.md", circumstances, table, figures)
    print(f"\n{given.out}/runs.csv, figures.csv, bench.svg, page.md")
    return 0 if all(run.sound for run in table.runs) else 1


def told(runs: Iterable[Run]) -> Iterator[Run]:
    """Pass the runs on, and print each on the terminal."""
    for run in runs:
        print(f"... {run.round + 1} {run.contender} {run.scenario} {run.connections}", file=sys.stderr, flush=True)
        yield run


if __name__ == "__main__":
    sys.exit(main())
