"""How many cores this process may use."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable(cgroup: Path = CGROUP) -> int:
    """Return the cores of the process's affinity, or fewer where a container's quota allows less; at least 1."""
    return math.ceil(min(len(os.sched_getaffinity(0)), _quota(cgroup)))


def _quota(cgroup: Path) -> float:
    """Return the cores that the CPU controller grants; infinity without a limit.

    cgroup v2: `cpu.max` is "QUOTA PERIOD" or "max PERIOD"; v1: two files in the folder `cpu`, a quota of -1 is none.
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
