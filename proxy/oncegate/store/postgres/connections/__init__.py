"""Connections to the servers of a store: which host takes writes, and how durable what it confirms is.

- `hosts.py` connects to one host of the URL; `facts.py` is what a server says of itself; `durability.py` says how far
  commits go, and whether a server can give that.
- `session.py` is one connection, which runs one statement at a time; `pool.py` has the sessions of one level.
- `scout.py` asks one host again and again; `primary.py` chooses among them; `upkeep.py` keeps all connections.
"""
