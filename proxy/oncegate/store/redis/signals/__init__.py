"""What processes tell each other by the store, beside the records.

`mailboxes.py` has the notes for one of them; `wakes.py` wakes those that read a response.
"""
