"""python -m loadtest.bench [--quick] [--only execution,replay]"""

import argparse
import os
import sys
import time
import urllib.request
import uuid

from loadtest.bench import contenders, wrk
from loadtest.bench.machine import Cores, busy_s


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--quick", action="store_true")
    options.add_argument("--only", default="execution,replay")
    options.add_argument("--contenders", default="oncegate,obvious,nginx+lua")
    options.add_argument("--connections", default="32")
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--seconds", type=int, default=2)
    given = options.parse_args()
    cores = Cores()
    site = contenders.open_site(cores)
    try:
        for _ in range(given.rounds):
            for name in given.contenders.split(","):
                running = contenders.ALL[name](site)
                try:
                    wrk.run(running.port, "/v1/charges", f"w{uuid.uuid4().hex}", 1, 8, cores.other, unique=True)
                    for scenario in given.only.split(","):
                        for connections in map(int, given.connections.split(",")):
                            measure(running, name, scenario, connections, given.seconds, cores)
                finally:
                    running.process.stop()
    finally:
        contenders.close_site(site)
    return 0


def prime(port, key):
    """Execute the key once, so that all that follows are replays."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/charges",
        data=b'{"amount":2000,"currency":"usd","source":"tok_visa"}',
        headers={"Content-Type": "application/json", "Authorization": "Bearer sk_test_4eC39HqLyjWDarjtT1zdp7dc"}
        | ({"Idempotency-Key": key} if key else {}),
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()
    time.sleep(0.1)


def measure(running, name, scenario, connections, seconds, cores):
    key = "" if scenario == "pass-through" else f"k{uuid.uuid4().hex}"
    prime(running.port, key)
    cpu, other = running.process.cpu_s(), busy_s(cores.other)
    load = wrk.run(running.port, "/v1/charges", key, seconds, connections, cores.other, unique=scenario == "execution")
    cpu = (running.process.cpu_s() - cpu) / load.requests
    busy = (busy_s(cores.other) - other) / load.seconds
    print(
        f"{scenario:12} {connections:4} {name:10} {load.rate:8.0f} req/s {cpu * 1e6:7.1f} us CPU "
        f"p50 {load.p50_s * 1e3:.2f} p99 {load.p99_s * 1e3:.2f} ms  other core {busy:.0%} "
        f"load {os.getloadavg()[0]:.1f}"
        + (f" REFUSED {load.refused} BROKEN {load.broken}" if load.refused or load.broken else "")
    )


if __name__ == "__main__":
    sys.exit(main())
