"""Memory and writes that the requests of a worker share."""
