"""`python -m loadtest.chaos`: one run, its verdict, its report."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import uvloop

from loadtest.chaos.run import Plan, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="how long there are faults")
    parser.add_argument("--requests", type=int, default=1_000_000, help="or until there were so many")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, default=2, help="processes")
    parser.add_argument("--workers", type=int, default=24, help="operations at a time, for each of them")
    parser.add_argument("--folder", type=Path, default=Path("build/chaos"), help="is emptied first")
    parser.add_argument("--failover", action="store_true", help="the store has a standby that may lag behind")
    parser.add_argument("--durability", default="memory", help="ONCEGATE_DURABILITY")
    told = parser.parse_args()
    shutil.rmtree(told.folder, ignore_errors=True)
    told.folder = told.folder.absolute()
    plan = Plan(**vars(told))
    uvloop.run(run(plan))
    return subprocess.run([sys.executable, "-m", "loadtest.chaos.check", str(told.folder)]).returncode


if __name__ == "__main__":
    sys.exit(main())
