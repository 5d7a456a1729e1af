"""The Redis client of the store: Redis 7.0 or newer, or Valkey.

- `wire.py` writes commands, `link.py` is one shared connection, `talk.py` has conversations outside the request path.
- `arguments.py` and `replies.py` translate between the values of the store and the Lua scripts in `lua/`.
- `node.py` is one server with its connections, `server.py` is how to connect to it and what its INFO says.
- `durable.py` waits for replicas and disks; `health_monitor.py` and `membership.py` watch a server for losses.
- `sentinel.py`, `cluster.py` and `cluster_map.py` find the servers; `topology.py` picks the kind that a URL names.
"""
