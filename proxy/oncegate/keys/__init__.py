"""What names a request: keys, their sources, scopes and fingerprints as digests."""
