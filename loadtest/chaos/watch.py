"""Detects stalls of the machine: a process that got no processor is not the proxy's fault.

The watch asks for every process of a run how long it was ready but not running (/proc/PID/schedstat, nanoseconds).
If that is most of an interval, it writes a line to `stalls.jsonl` in the form of a fault, and the judge counts it.
"""

import asyncio
import json
import time
from pathlib import Path

from loadtest.chaos.parts import Part, Replica

PERIOD_S = 0.25
STALLED_SHARE = 0.7


def waited_s(pid: int) -> float | None:
    """Return how long a process has waited for a processor in its life, None if it has exited."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return None


class Watch:
    """Checks all processes every quarter of a second."""

    def __init__(self, parts: list[Part], path: Path) -> None:
        self._parts, self._path = parts, path
        self._before: dict[int, float] = {}
        self._spans: list[dict[str, object]] = []
        self._open: dict[str, dict[str, object]] = {}

    async def run(self) -> None:
        """Check until cancelled."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(PERIOD_S)
            now = time.monotonic()
            if now - last > 2 * PERIOD_S:
                self._stalled("run", None, last, now)
            for part in self._parts:
                self._look(part, last, now)
            last = now

    def _look(self, part: Part, last: float, now: float) -> None:
        pid = part.process.pid if part.process is not None else 0
        waited = waited_s(pid)
        if waited is None:
            return
        if waited - self._before.get(pid, waited) > STALLED_SHARE * (now - last):
            self._stalled(part.name, part.number if isinstance(part, Replica) else None, last, now)
        self._before[pid] = waited

    def _stalled(self, name: str, replica: int | None, since: float, until: float) -> None:
        span = self._open.get(name)
        if span is None or span["ended"] != since:
            span = {"kind": "machine", "place": name, "replica": replica, "begun": since, "detail": "got no processor"}
            self._open[name] = span
            self._spans.append(span)
        span["ended"] = until

    def write(self) -> None:
        self._path.write_text("".join(json.dumps(span) + "\n" for span in self._spans))
