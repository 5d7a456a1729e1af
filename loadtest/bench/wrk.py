"""The load: wrk with one thread on the other core, and the figures that it prints."""

import subprocess
from pathlib import Path
from typing import NamedTuple

from loadtest.bench.machine import pinned

SCRIPT = Path(__file__).with_name("load.lua")
MANY = 500
CHARGE = b'{"amount":2000,"currency":"usd","source":"tok_visa"}'
AUTHORIZATION = "Bearer sk_test_4eC39HqLyjWDarjtT1zdp7dc"


class Load(NamedTuple):
    """The result of one run. `refused` counts responses of 400 and above, `broken` requests without a response."""

    requests: int
    seconds: float
    refused: int
    broken: int
    p50_s: float
    p99_s: float


def run(port: int, path: str, key: str, *, mode: str, seconds: int, connections: int, cores: frozenset[int]) -> Load:
    """Send charges for `seconds`.

    `key` empty: without a key. Otherwise `mode` decides: the same key each time, another one each time (`unique`), MANY
    keys in turns (`many`), or another one under a head of a kind of heads.lua, of which more is new each time.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(SCRIPT)]
    words = [path, key, mode, AUTHORIZATION, CHARGE.decode()]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}", *words],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
        preexec_fn=pinned(cores),
    )
    result = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not result:
        raise RuntimeError(f"wrk said nothing: {done.stdout}{done.stderr}")
    requests, micros, refused, broken, p50, p99 = map(float, result[0])
    return Load(int(requests), micros / 1e6, int(refused), int(broken), p50 / 1e6, p99 / 1e6)
