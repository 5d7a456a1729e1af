"""`python -m loadtest.soak [seconds]`: soak, then slow readers; prints the figures, exit code 1 where one is off."""

import asyncio
import sys

from loadtest.soak.run import soak


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 300.0
    report = asyncio.run(soak(seconds))
    print("\n".join(report.lines()))
    return 1 if report.failures() else 0


sys.exit(main())
