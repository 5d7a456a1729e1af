"""HTTP messages: checks of requests, heads as they are forwarded and replayed, and problems. Pure."""
