"""The store in Redis: Redis 7.0 or newer, or Valkey.

- `store.py` has the verbs. `claims.py` tries a claim until it is confirmed, and withdraws claims that nobody holds.
- `records.py` has the commands beside the scripts, for operators and for marks. `orphans.py` marks keys of dead owners.
- `wire.py` writes commands, `link.py` is one shared connection, `talk.py` has conversations outside the request path.
- `arguments.py` and `replies.py` translate between the values of the store and the Lua scripts in `lua/`.
- `node.py` is one server with its connections, `server.py` is how to connect to it and what its INFO says.
- `durable.py` waits for replicas and disks; `health_monitor.py` and `membership.py` watch a server for losses.
- `topologies/` finds the servers: a single one, Sentinel's master, or a cluster.
"""
