"""Memory and writes that many requests share."""
