"""The records of a store for its operators, and above all the open ones.

- `records.py` is how they are read: one by its key, each in a scan, and the open ones by an index.
- `index.py` is what the index is for, whatever keeps it; `scores.py` and `places.py` are the order in it.
- `listing.py` puts open keys of a whole store in order, also where the index is not complete.
"""
