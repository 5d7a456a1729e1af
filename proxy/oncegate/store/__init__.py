"""The store: one record for each key, and the verbs on it.

- `store.py` has `Store`, the verbs: claim, reclaim, peek, renew, append, store, release, mark_unknown, read.
- `claims.py` tries a claim until it is confirmed, and withdraws claims that nobody holds.
- `record.py` is what a record holds and its bytes; `results.py` is what the verbs return.
- `leases.py` renews the claims of a worker; `breaker.py` stops claims that fail one after the other.
- `record_view.py` shows records to operators; `events.py` is what a store reports by itself.
- `redis/` is the Redis client: connections, topologies, durability, health, and the Lua scripts.

The rest of the proxy knows `Store` and the values in `record.py` and `results.py`, and nothing of Redis. A second
store, for example on PostgreSQL, would be a package beside `redis/`, and a class with the verbs of `Store` that returns
the same values. `breaker.py`, `leases.py`, `record.py`, `results.py` and `events.py` would serve both.
"""
