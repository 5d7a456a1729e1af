"""What an operator sees: metrics, logs and the admin listener."""
