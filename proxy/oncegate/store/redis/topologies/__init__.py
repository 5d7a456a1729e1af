"""Where the servers of a store are.

- `sentinel.py` follows the master that sentinels name.
- `cluster.py` and `cluster_map.py` know which master of a cluster has which slot.
- `topology.py` picks the kind that a URL names, and says what the verbs need of it.
"""
