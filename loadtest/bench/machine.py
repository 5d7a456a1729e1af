"""Processes pinned to a core, and their cost: CPU time and memory from /proc, child processes included."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PYTHON = sys.executable
ROOT = Path(__file__).parents[2]
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
START_S, PATIENCE_S, STOP_S = 30.0, 0.5, 10.0
PERIOD_US = 10_000  # in which a share of a core is given


class Cores(NamedTuple):
    """The core of the proxy, and the core that everything else shares."""

    proxy: frozenset[int]
    other: frozenset[int]


def two_cores() -> Cores:
    """Return the first two cores that this process may use; the same one twice if there is only one."""
    ours = sorted(os.sched_getaffinity(0))
    return Cores(frozenset(ours[:1]), frozenset(ours[1:2] or ours[:1]))


def pinned(cores: frozenset[int]) -> Callable[[], None]:
    """Return a function that a child runs to stay on these cores."""
    return lambda: os.sched_setaffinity(0, cores)


@contextmanager
def share(pid: int, cores: frozenset[int]) -> Iterator[None]:
    """Limit a process to a fifth of these cores. Raises OSError on a system without control groups."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)
    group, limits = _control_group(pid)
    try:
        group.mkdir()
        for name, value in {**limits, "cgroup.procs": str(pid)}.items():
            (group / name).write_text(value)
    except OSError as why:
        _leave(group, pid)
        raise OSError(f"no cgroup to write to: {why}") from why
    try:
        yield
    finally:
        _leave(group, pid)


def _leave(group: Path, pid: int) -> None:
    with contextlib.suppress(OSError):  # the process has ended, or was never in it
        (group.parent / "cgroup.procs").write_text(str(pid))
    with contextlib.suppress(OSError):
        group.rmdir()


def _control_group(pid: int) -> tuple[Path, dict[str, str]]:
    """Return a group's path and the files that limit it, for version 1 or 2 of control groups."""
    first, second = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    name = f"oncegate-bench-{pid}"
    if (first / "cgroup.procs").exists():
        return first / name, {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(PERIOD_US // 5)}
    return second / name, {"cpu.max": f"{PERIOD_US // 5} {PERIOD_US}"}


class Process:
    """One server of the bench, until `stop`, in a folder of its own. Its output goes to a file."""

    def __init__(self, cores: frozenset[int], *command: object, env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="oncegate-bench-"))
        self.started_at = time.monotonic()
        with (self.folder / "log").open("wb") as log:
            self._popen = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": f"{ROOT / 'proxy'}:{ROOT}", **(env or {})},
                stdout=log,
                stderr=log,
                preexec_fn=pinned(cores),
            )
        self.pid = self._popen.pid

    def log(self) -> bytes:
        """Return its output."""
        return (self.folder / "log").read_bytes()

    def said(self) -> str:
        """Return the end of its output."""
        return self.log().decode(errors="replace")[-2000:]

    def age_s(self) -> float:
        return time.monotonic() - self.started_at

    def await_port(self, port: int) -> "Process":
        """Return the process once it listens there. Raises RuntimeError with its output."""
        while time.monotonic() < self.started_at + START_S:
            if self._popen.poll() is not None:
                raise RuntimeError(f"{self._popen.args!r} ended with {self._popen.returncode}:\n{self.said()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return self
            time.sleep(0.002)
        raise RuntimeError(f"{self._popen.args!r} does not listen on {port}:\n{self.said()}")

    def cpu_s(self) -> float:
        """Return the CPU seconds, user and system, of the process and its present children."""
        return sum(map(cpu_s, family(self.pid)))

    def rss_bytes(self) -> int:
        """Return the resident memory of the process and its children."""
        return sum(map(_rss_bytes, family(self.pid)))

    def stop(self) -> None:
        """End it: SIGTERM, soon a second one, then SIGKILL."""
        for wait_s in (PATIENCE_S, STOP_S):
            self._popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(wait_s)
                break
        else:
            self._popen.kill()
            self._popen.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def family(pid: int) -> list[int]:
    """Return the process and all its descendants."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """Sum the threads' time on a core, which the scheduler counts in ns; utime and stime only count ticks."""
    total = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _rss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return 0


def busy_s(cores: frozenset[int]) -> float:
    """Return the seconds in which these cores were not idle, together, since the machine started."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            total += sum(map(int, [*fields[:3], *fields[5:8]]))  # all but idle and iowait
    return total / TICKS_A_SECOND
