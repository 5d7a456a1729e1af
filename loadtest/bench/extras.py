"""The figures that the table lacks: streams, large responses, memory, start-up time, workers, a full store."""

import time
import urllib.request
import uuid
from collections.abc import Callable
from statistics import median
from typing import Any

from loadtest.bench import contenders, scenarios
from loadtest.bench.chunks import BYTES, chunks, live_streams
from loadtest.bench.contenders import Running, Site, await_layout, await_ready, serving
from loadtest.bench.followers import followers
from loadtest.bench.index_rows import open_index
from loadtest.bench.postgres import postgres
from loadtest.bench.readers import Peak, read
from loadtest.bench.redis import fill
from loadtest.bench.redis_rows import record, redis_cpu
from loadtest.bench.table import Figure
from loadtest.bench.workers import workers
from loadtest.peers.nginx import BIG_BYTES

MIB = 1024 * 1024
BLOCK = 50  # executions between two looks at a metric


def large_answer(site: Site, quick: bool) -> list[Figure]:
    """A 100 MB response of known length, over the storage limit if it is keyed: speed against nginx, and memory."""
    speeds: dict[str, list[float]] = {"keyed": [], "pass-through": [], "nginx": []}
    peak = 0
    with serving(contenders.oncegate(site)) as ours, serving(contenders.nginx_bulk(site)) as nginx:
        for _ in range(3 if quick else 7):
            for name, running in (("keyed", ours), ("nginx", nginx), ("pass-through", ours)):
                key = f"big-{uuid.uuid4().hex}" if name == "keyed" else "-"
                with Peak(running) as memory:
                    found = read(site, "sink", running.port, key)
                if found["missing"]:
                    raise RuntimeError(f"{name}: {found['missing']} bytes are missing")
                speeds[name].append(BIG_BYTES / 1e6 / found["seconds"])
                peak = max(peak, memory.above if running is ours else 0)
    keyed, through, other = (median(speeds[name]) for name in ("keyed", "pass-through", "nginx"))
    return [
        Figure("100 MB answer, keyed: MB/s, of nginx's", keyed / other, "x", 0.3, True, f"{keyed:.0f} of {other:.0f}"),
        Figure("100 MB answer, pass-through: MB/s, of nginx's", through / other, "x", 0.5, True, f"{through:.0f} MB/s"),
        Figure("100 MB answer: memory above idle", peak / MIB, "MiB", 64),
    ]


def event_streams(site: Site, quick: bool) -> list[Figure]:
    """200 keyed streams: how much later the first byte and each event arrive than without a proxy.

    The figures are medians of several rounds in turns: of 200 first bytes the 99th percentile is a single stream's.
    """
    number, every_ms = (20 if quick else 50), 100
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "direct": []}
    with serving(contenders.oncegate(site, upstream_port=site.events.port)) as ours:
        read(site, "events", site.events.port, 600, 2, 10, BYTES, "-")  # lets the sender's table of files grow
        for name, running in (("ours", ours), ("direct", site.events)) * (1 if quick else 3):
            found[name].append(read(site, "events", running.port, 200, number, every_ms, BYTES, uuid.uuid4().hex))
    rows = (
        ("first byte", "first_p50", 1),
        ("first byte", "first_p99", 5),
        ("event", "event_p50", 1),
        ("event", "event_p99", 5),
    )
    return [
        Figure(
            f"200 event streams, keyed: {what}, added, {field[-3:]}",
            (median(took["ours"]) - median(took["direct"])) * 1e3, "ms", limit,
            note=f"direct {median(took['direct']) * 1e3:.2f} ms",
        )
        for what, field, limit in rows
        for took in [{name: [one[field] for one in takes] for name, takes in found.items()}]
    ]  # fmt: skip


def start(site: Site, quick: bool) -> list[Figure]:
    """The time from the start of `oncegate serve` to its first executed response."""
    found = []
    for name in ("oncegate", "embedded"):
        taken = []
        for _ in range(3 if quick else 7):
            running = contenders.CONTENDERS[name](site)
            status, _, _ = scenarios.ask(running.port, "/v1/charges", uuid.uuid4().hex)
            taken.append(time.monotonic() - running.process.started_at)
            running.process.stop()
            if status != 200:
                raise RuntimeError(f"the first answer was {status}")
        goal = 1.5 if name == "oncegate" else None
        found.append(Figure(f"start of {name} until the first answer", median(taken), "s", goal))
    return found


def full_store(site: Site, quick: bool) -> list[Figure]:
    """The latency of a claim, by oncegate's own metric, with many records in the store and with few.

    Two proxies on two stores take turns in small blocks; the median block counts.
    """
    few, many = 1_000, 100_000 if quick else 1_000_000
    stores = {count: contenders.open_redis(site.cores) for count in (few, many)}
    ours = {
        count: contenders.oncegate(site, store_url=f"redis://127.0.0.1:{store.port}/0")
        for count, store in stores.items()
    }
    blocks: dict[int, list[float]] = {few: [], many: []}
    try:
        for count, store in stores.items():
            fill(store.port, count)
            await_ready(ours[count])
            await_layout(ours[count])
        for _ in range(30 if quick else 200):
            for count, one in ours.items():
                blocks[count].append(_mean_claim_s(one))
    finally:
        for running in (*ours.values(), *stores.values()):
            running.process.stop()
    small, large = median(blocks[few]), median(blocks[many])
    note = f"{small * 1e6:.0f} and {large * 1e6:.0f} us"
    return [Figure(f"claim: latency with {many:,} records against {few:,}", large / small, "x", 1.15, note=note)]


def _mean_claim_s(running: Running) -> float:
    """Return the mean latency of the claims of BLOCK executions, one after the other."""
    calls, seconds = _claims(running)
    scenarios.ask_many(running.port, BLOCK)
    calls_then, seconds_then = _claims(running)
    return (seconds_then - seconds) / (calls_then - calls)


def _claims(running: Running) -> tuple[float, float]:
    """Return the number of claims, and the seconds that they took."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.admin_port}/metrics", timeout=10) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    name, label = "oncegate_store_seconds", '{verb="claim"}'
    return float(lines[f"{name}_count{label}"]), float(lines[f"{name}_sum{label}"])


EXTRAS: dict[str, Callable[[Site, bool], list[Figure]]] = {
    "large-answer": large_answer,
    "event-streams": event_streams,
    "chunks": chunks,
    "live-streams": live_streams,
    "followers": followers,
    "redis-cpu": redis_cpu,
    "open-index": open_index,
    "record": record,
    "workers": workers,
    "full-store": full_store,
    "postgres": postgres,
    "start": start,
}
