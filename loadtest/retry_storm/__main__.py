"""`python -m loadtest.retry_storm`: the same flaky API and the same clients, with and without oncegate."""

import argparse
import shutil
import sys
from pathlib import Path

import uvloop

from loadtest.retry_storm.plan import BROWNOUT, USUAL, Plan
from loadtest.retry_storm.report import plot, table
from loadtest.retry_storm.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.retry_storm", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=45.0, help="in which operations begin")
    parser.add_argument("--rate", type=float, default=30.0, help="operations a second")
    parser.add_argument("--quick", action="store_true", help="6 seconds of operations")
    parser.add_argument("--folder", type=Path, default=Path("build/retry_storm"), help="is emptied first")
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = Plan(asked.seed, 6.0 if asked.quick else asked.seconds, asked.rate)
    chances = [", ".join(f"{how} {share:.0%}" for how, share in one.items()) for one in (USUAL, BROWNOUT)]
    print(f"seed {plan.seed}: {plan.rate:g} operations a second for {plan.seconds:g} s, then what is still open")
    print(f"of the API's executions {chances[0]}; in the middle third {chances[1]}\n", flush=True)
    without, with_it, asking = uvloop.run(run(plan, folder))
    text = table(without, with_it, asking)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    plot(folder / "storm.png", plan, without, with_it)
    print(f"\nwritten: {folder}/table.md, storm.png")
    return 1 if with_it.duplicates or asking.duplicates else 0


if __name__ == "__main__":
    sys.exit(main())
