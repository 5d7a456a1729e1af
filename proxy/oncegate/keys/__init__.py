"""Keys, scopes and fingerprints: where a request has them, and the digests that are made of them. Pure."""
