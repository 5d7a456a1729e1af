"""The request path. `handler` is read first, top to bottom."""
