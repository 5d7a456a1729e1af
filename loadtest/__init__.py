"""What loads, measures and breaks the service from outside; nothing of it is installed."""
