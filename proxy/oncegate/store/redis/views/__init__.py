"""What operators see: `reading.py` reads records with plain commands, `index.py` finds the open ones."""
