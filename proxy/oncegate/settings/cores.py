"""How many CPU cores this process may use."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable(cgroup: Path = CGROUP) -> int:
    """Return the number of cores, at least 1: the process's affinity, or the container's quota where that is less."""
    # Rounded up: with half a core there is still one worker.
    return math.ceil(min(len(os.sched_getaffinity(0)), _quota(cgroup)))


def _quota(cgroup: Path) -> float:
    """Return the CPU quota in cores, infinity without one.

    cgroup v2 has it in `cpu.max`, as "QUOTA PERIOD" or "max PERIOD". v1 has two files in the folder `cpu`, and a
    quota of -1 means none.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return math.inf
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else math.inf
    except ValueError:
        return math.inf
