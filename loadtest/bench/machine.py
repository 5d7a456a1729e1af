"""Processes pinned to a core, and what they cost: CPU time and memory from /proc, children summed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
START_S, STOP_S = 20.0, 10.0


class Cores:
    """Which core is whose: the proxy has one for itself, all else shares the other."""

    def __init__(self, proxy: Sequence[int] = (), other: Sequence[int] = ()) -> None:
        ours = sorted(os.sched_getaffinity(0))
        self.proxy = frozenset(proxy or ours[:1])
        self.other = frozenset(other or ours[1:2] or ours[:1])


class Process:
    """One server of the bench, until `stop`. What it says goes to a file."""

    def __init__(self, command: Sequence[object], cores: frozenset[int], env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="oncegate-bench-"))
        self._log = (self.folder / "log").open("wb")
        self._popen = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT), **(env or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.pid = self._popen.pid

    def said(self) -> str:
        """Return the end of what it printed."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def await_port(self, port: int) -> None:
        """Return when something listens there. Raises RuntimeError with what the process said."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._popen.poll() is not None:
                raise RuntimeError(f"{self._popen.args!r} ended with {self._popen.returncode}:\n{self.said()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.005)
        raise RuntimeError(f"{self._popen.args!r} does not listen on {port}:\n{self.said()}")

    def cpu_s(self) -> float:
        """Return the CPU seconds, user and system, of the process, its living children and its dead ones."""
        return sum(_cpu_s(pid) for pid in family(self.pid))

    def rss_bytes(self) -> int:
        """Return the resident memory of the process and its children."""
        return sum(_rss_bytes(pid) for pid in family(self.pid))

    def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL."""
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._log.close()


def family(pid: int) -> list[int]:
    """Return the process and all that descend from it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICKS_A_SECOND  # utime, stime, and those of children waited for
    return 0.0


def _rss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def busy_s(cores: frozenset[int]) -> float:
    """Return the seconds that these cores have not been idle since the machine started."""
    total = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            total += sum(map(int, [*fields[:3], *fields[5:8]])) / TICKS_A_SECOND
    return total


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


PYTHON = sys.executable
