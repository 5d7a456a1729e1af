"""The store's scripts, one verb a file. Each opens with its contract."""
