"""`python -m loadtest.chaos`: one run, its verdict and its report."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import uvloop

from loadtest.chaos.run import STORES, Plan, run


def plan() -> Plan:
    """Return the plan that the command line describes."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="how long there are faults")
    parser.add_argument("--requests", type=int, default=1_000_000, help="or until there were so many")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--clients", type=int, default=2, help="processes")
    parser.add_argument("--workers", type=int, default=64, help="operations at a time, for each of them")
    parser.add_argument("--sample", type=int, default=5000, help="keys that each asks for again at the end")
    parser.add_argument("--store", default="redis", choices=STORES)
    parser.add_argument("--failover", action="store_true", help="the store has a standby that takes over")
    parser.add_argument("--durability", default="", help="ONCEGATE_DURABILITY; without it what suits the store")
    parser.add_argument("--kinds", nargs="*", default=(), help="these faults alone")
    parser.add_argument("--folder", type=Path, default=Path("build/chaos"), help="is emptied first")
    told = parser.parse_args()
    told.folder = told.folder.absolute()
    return Plan(**vars(told))


def program(name: str, folder: Path, quiet: bool = False) -> int:
    """Run one of the programs that read the logs of a run, and return its exit code."""
    command = [sys.executable, "-m", f"loadtest.chaos.{name}", str(folder)]
    return subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode


def main() -> int:
    asked = plan()
    shutil.rmtree(asked.folder, ignore_errors=True)
    print(f"seed {asked.seed}: {asked.seconds:g} s or {asked.requests} requests, in {asked.folder}", flush=True)
    uvloop.run(run(asked))
    verdict = program("check", asked.folder, quiet=True)  # the report repeats what it says
    return program("report", asked.folder) or verdict


if __name__ == "__main__":
    sys.exit(main())
