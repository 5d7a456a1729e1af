"""What one worker is asked at each scrape."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from oncegate.observe.families import MAX_GROUPS, SEPARATOR
from oncegate.service.reload import Reload
from oncegate.service.wiring import Parts
from oncegate.store.record_view import UNDECIDED, OpenKind

Gauges = dict[str, Callable[[], float]]


def gauges(
    parts: Callable[[], Parts], reload: Callable[[], Reload], not_ready_reasons: Callable[[], list[str]]
) -> tuple[Gauges, Callable[[], dict[str, float]]]:
    """Return the gauges of `Metrics`, and those that have labels. `parts` and `reload` are called at each scrape."""
    started_s = time.time()
    plain: Gauges = {
        "in_flight": lambda: parts().gateway.in_flight,
        "in_flight_oldest_seconds": lambda: parts().leases.oldest_s,
        "reading_bodies": lambda: parts().gateway.reading,
        "waiting": lambda: len(parts().waiters),
        "followers": lambda: len(parts().followers),
        "store_memory_ratio": lambda: parts().store.memory_ratio,
        "store_behind_seconds": lambda: parts().store.upkeep.behind_s,
        "store_snapshot_seconds": lambda: parts().store.upkeep.snapshot_s,
        "store_hot_ratio": lambda: parts().store.upkeep.hot_ratio,
        "store_dead_ratio": lambda: parts().store.upkeep.dead_ratio,
        "store_record_bytes": lambda: parts().store.upkeep.record_bytes,
        "store_chunk_bytes": lambda: parts().store.upkeep.chunk_bytes,
        "store_audit_bytes": lambda: parts().store.upkeep.audit_bytes,
        "store_full": lambda: parts().store.refuses_new,
        "store_breaker_open": lambda: parts().store.broken,
        "rules_differ": lambda: parts().store.rules_differ,
        "packs_records": lambda: parts().store.packs_records,
        "quarantine_seconds": lambda: parts().store.quarantine_left_s,
        "unknown_keys": lambda: parts().unknown_keys.count,
        "unknown_keys_expiring": lambda: parts().unknown_keys.expiring,
        **{f"open_{kind.value}_keys": partial(_open_keys, parts, kind) for kind in OpenKind},
        **{f"open_{kind.value}_oldest_seconds": partial(_oldest_s, parts, kind) for kind in UNDECIDED},
        "ready": lambda: not not_ready_reasons(),
        "buffered_bytes": lambda: parts().memory.used,
        "workers": lambda: 1.0,
        "start_time_seconds": lambda: started_s,
        "client_open_connections": lambda: parts().listener.open_count,
        "config_last_reload_success_timestamp_seconds": lambda: reload().succeeded_s,
        "config_last_reload_failure_timestamp_seconds": lambda: reload().failed_s,
    }
    return plain, lambda: _upstream_pools(parts()) | _open_breakers(parts())


def _open_keys(parts: Callable[[], Parts], kind: OpenKind) -> float:
    return parts().unknown_keys.counts[kind].keys


def _oldest_s(parts: Callable[[], Parts], kind: OpenKind) -> float:
    return parts().unknown_keys.counts[kind].oldest_ms / 1000


def _upstream_pools(parts: Parts) -> dict[str, float]:
    """Return how many connections to each upstream are in each state, by the names of the samples."""
    totals: Counter[str] = Counter()
    for upstream, states in parts.pools.states():
        (name,) = parts.metrics.upstream_connections.name(upstream.label)
        totals.update({SEPARATOR.join(("upstream_pool", name, state)): count for state, count in states.items()})
    return dict(totals)


def _open_breakers(parts: Parts) -> dict[str, float]:
    """Return for each API that was asked about unknown keys whether it is left alone, by the names of the samples."""
    breakers = list(parts.reconciling.open_breakers().items())[-MAX_GROUPS:]
    return {SEPARATOR.join(("probe_breakers_open", origin)): float(is_open) for origin, is_open in breakers}
