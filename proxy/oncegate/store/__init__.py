"""The store: one record for each key, and the verbs on it.

- `store.py` has `Store`, the verbs: claim, reclaim, peek, renew, append, store, release, mark_unknown and read, and for
  operators resolve_by_operator and release_by_operator.
- `claims.py` tries a claim until it is confirmed, and withdraws claims that nobody holds.
- `record.py` is what a record holds and its bytes; `record_name.py` is its name in the store and its id.
- `results.py` is what the verbs return; `events.py` is what a store reports by itself.
- `leases.py` renews the claims of a worker; `stages.py` is how far their exchanges have got.
- `waiters.py` holds duplicates until the original has its response.
- `breaker.py` stops claims that fail one after the other.
- `record_view.py` shows records to operators. It sends Redis commands of its own.
- `redis/` is the Redis client: connections, topologies, durability, health, and the Lua scripts.

The request path knows `Store`, `Leases`, `Waiters` and the values that they use, and nothing of Redis. A second store,
for example on PostgreSQL, would be a package beside `redis/`, a class with the verbs of `Store` that returns the same
values, and its own `record_view.py` and `claims.py`. All other modules would serve both.
"""
