"""The Redis client of the store: connections, servers, clusters, sentinels, scripts."""
