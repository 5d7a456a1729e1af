"""The load: wrk with one thread, on the other core, and what it says at its end."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True)
class Load:
    """What one run of wrk saw. Latencies in seconds; `refused` are answers of 400 and above."""

    requests: int
    seconds: float
    refused: int
    broken: int
    p50_s: float
    p99_s: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def run(
    port: int, path: str, key: str, seconds: int, connections: int, cores: frozenset[int], *, unique: bool = False
) -> Load:
    """Send charges for `seconds`: without a key where `key` is empty; with another one each time if `unique`."""
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", SCRIPT]
        + [f"http://127.0.0.1:{port}", path, key, "unique" if unique else "same"],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    result = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not result:
        raise RuntimeError(f"wrk said nothing: {done.stdout}{done.stderr}")
    requests, micros, refused, broken, p50, p99 = map(float, result[0])
    return Load(int(requests), micros / 1e6, int(refused), int(broken), p50 / 1e6, p99 / 1e6)
