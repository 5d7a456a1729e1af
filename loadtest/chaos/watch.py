"""Whether the machine itself stood still: a process that got no processor is no fault of the proxy's.

Every process of a run is asked how long it was ready and not running (/proc/PID/schedstat, in nanoseconds). Where
that is most of an interval, a line of `stalls.jsonl` says so, in the form of a fault: the judge takes it as one.
"""

import asyncio
import json
import time
from pathlib import Path

from loadtest.chaos.parts import Part, Replica

PERIOD_S = 0.25
STALLED_SHARE = 0.7


def waited_s(pid: int) -> float | None:
    """Return how long a process has waited for a processor in its life, None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return None


class Watch:
    """Looks at all processes every quarter of a second."""

    def __init__(self, parts: list[Part], path: Path) -> None:
        self._parts, self._path = parts, path
        self._before: dict[int, float] = {}
        self._spans: list[dict[str, object]] = []
        self._open: dict[str, dict[str, object]] = {}

    async def run(self) -> None:
        """Look until cancelled."""
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
