"""The store: one record for each key, and the verbs on it.

- `store.py` has `Store`, the verbs: claim, reclaim, peek, renew, append, store, release, mark_unknown and read, and for
  operators resolve_by_operator and release_by_operator. `opening.py` picks the store that a URL names.
- `record.py` is what a record holds and its bytes; `record_name.py` is its name in the store and its id.
- `results.py` is what the verbs return; `events.py` is what a store reports by itself.
- `leases.py` renews the claims of a worker; `stages.py` is how far their exchanges have got.
- `waiters.py` holds duplicates until the original has its response; `readers.py` tells other processes who waits.
- `stream_head.py` is the head of a response that still runs, for those who follow it.
- `health/` stops claims that fail one after the other.
- `record_view.py` is what operators see of records; `unknown_keys.py` warns of unknown ones before they expire.
- `open_keys/` puts keys whose record is not complete in order.
- `membership.py` is what one proxy says of itself to the others on its store, and what the store lost lately.
- `redis/` is the store in Redis: connections, topologies, durability, health, and the Lua scripts.

All modules but `opening.py` know `Store` and the values that it uses, and nothing of Redis.
"""
