"""Open keys, whatever keeps them: `listing.py` puts them in order, page by page, for a server or for a whole store."""
