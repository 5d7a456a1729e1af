"""How a record lies in Redis, where that is not a hash with a field for each part.

- `packed.py` has a record in one string.
"""
