"""The gauges: what each says, and how those of several workers become one."""

from collections.abc import Callable, Iterable

GAUGES = {
    "in_flight": "Guarded requests in progress, without the duplicates that wait for their original.",
    "in_flight_oldest_seconds": "For how long the oldest guarded request has been in progress.",
    "reading_bodies": "Guarded requests whose body is still on its way. They are not in flight yet.",
    "waiting": "Duplicates that wait for their original request.",
    "followers": "Those who read a response that another request brings: joined, resumed, or at an address.",
    "store_memory_ratio": "Memory that the store uses, as a share of its limit.",
    "store_behind_seconds": "PostgreSQL: how long ago what housekeeping did on its last pass was due, at most.",
    "store_snapshot_seconds": "PostgreSQL: age of the oldest snapshot in the database. What it may see is not removed.",
    "store_hot_ratio": "PostgreSQL: share of the updates of records that touched no index.",
    "store_dead_ratio": "PostgreSQL: share of the rows of records that are dead.",
    "store_record_bytes": "PostgreSQL: size of the records, with their index.",
    "store_chunk_bytes": "PostgreSQL: size of the response bodies that are stored beside their records.",
    "store_audit_bytes": "PostgreSQL: size of the audit trail.",
    "store_full": "1 while the store is at its memory limit, so that first-time keys are refused.",
    "store_breaker_open": "1 while the circuit breaker is open: claims are refused without asking the store.",
    "rules_differ": "1 while other proxies on the store name keys by other rules.",
    "packs_records": "1 while records are packed in Redis: older versions of oncegate cannot use the store.",
    "quarantine_seconds": "Time until first-time keys are accepted, after the store lost data.",
    "unknown_keys": "Keys that somebody has to decide: all that are unknown under hold, and those of dead owners.",
    "unknown_keys_expiring": "Those of them that expire within a week. After that a retry executes.",
    "open_unknown_keys": "Keys whose outcome was marked unknown under hold.",
    "open_lapsed_keys": "Keys in flight whose lease is over: their owner died or is paused.",
    "open_in_flight_keys": "Keys in flight in the whole store.",
    "open_waived_keys": "Keys whose outcome is unknown, and which nobody has to decide: under retry, or cancelled.",
    "open_unknown_oldest_seconds": "Time since the oldest of the keys was claimed that are marked unknown under hold.",
    "open_lapsed_oldest_seconds": "Time since the first lease ended of those that are over.",
    "ready": "1 while /readyz answers 200.",
    "buffered_bytes": "Bytes of request and response bodies held in memory.",
    "workers": "Worker processes that serve.",
    "start_time_seconds": "When the service started, as seconds since 1970.",
    "client_open_connections": "Connections of clients that are open.",
    "config_last_reload_success_timestamp_seconds": "When files were last taken over, by the start or by a reload.",
    "config_last_reload_failure_timestamp_seconds": "When a reload was last refused, 0 if none was.",
    "upstream_pool": "Connections to an upstream by their state, and requests that wait for one.",
    "probe_breakers_open": "Workers that ask an API nothing about unknown keys for now: its last answers were none.",
}
# The labels of the gauges that have some. Their samples are named `name`, SEPARATOR, and the values of the labels.
GAUGE_LABELS = {"upstream_pool": ("upstream", "state"), "probe_breakers_open": ("upstream",)}
# How the gauges of several workers become one. Those that are not named are added up.
MERGED: dict[str, Callable[[Iterable[float]], float]] = {
    # All workers use one store, so each of these describes the same thing.
    **dict.fromkeys(
        (
            "store_memory_ratio",
            "store_behind_seconds",
            "store_snapshot_seconds",
            "store_hot_ratio",
            "store_dead_ratio",
            "store_record_bytes",
            "store_chunk_bytes",
            "store_audit_bytes",
            "store_full",
            "store_breaker_open",
            "rules_differ",
            "packs_records",
            "quarantine_seconds",
            "unknown_keys",
            "unknown_keys_expiring",
            "in_flight_oldest_seconds",
            "open_unknown_keys",
            "open_lapsed_keys",
            "open_in_flight_keys",
            "open_waived_keys",
            "open_unknown_oldest_seconds",
            "open_lapsed_oldest_seconds",
        ),
        max,
    ),
    # A worker that is not ready gets its share of the connections all the same.
    "ready": min,
    "start_time_seconds": min,
    # A worker may have refused what the others took.
    "config_last_reload_success_timestamp_seconds": min,
    "config_last_reload_failure_timestamp_seconds": max,
}
