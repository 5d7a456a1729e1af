"""The store in PostgreSQL: the verbs of a record as functions of the database, each called in one statement.

- `store.py` has the verbs, `claims.py` tries a claim and withdraws it, `batches.py` sends many calls in one statement,
  `calls.py` one with its bodies, `rows.py` translates between the values of the store and the functions.
- `records.py` is the operators' view, `marks.py` has marks and notes between processes.
- `servers.py` has the servers of one URL: their connections, and whether claims can be confirmed there. `health.py`
  watches the database for losses, for other proxies, and for room. `connections/` makes and keeps the connections.
- `migrations/` has the tables and the functions, and brings a database to their newest version.
"""
