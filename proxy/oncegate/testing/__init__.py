"""Fault injection, for tests of oncegate itself."""
