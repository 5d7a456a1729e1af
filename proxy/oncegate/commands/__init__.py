"""What a person types: serve, check, demo, keys and healthcheck."""
