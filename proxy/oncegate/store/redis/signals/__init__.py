"""What processes tell each other by the store, beside the records: `mailboxes.py` has the notes for one of them."""
