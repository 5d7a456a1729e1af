"""Makes the connection pool of an upstream from what its settings say."""

from oncegate.buffers.memory import MemoryBudget
from oncegate.hostnames.resolver import Resolver
from oncegate.observe.metrics import Metrics
from oncegate.rules.model import Upstream
from oncegate.upstream.connector import client_tls
from oncegate.upstream.pool import REUSE_IDLE_S, Pool

# What rests at 1,200 requests a second.
SPARE_TLS_CONNECTIONS = 256


def pool_to(
    upstream: Upstream, memory: MemoryBudget, resolver: Resolver, metrics: Metrics, *, head_cache: bool
) -> Pool:
    """Return the pool of an upstream. Raises OSError for a certificate that cannot be used."""
    files = (upstream.ca_file, upstream.cert_file, upstream.key_file)
    is_tls = upstream.origin.scheme == "https"
    return Pool(
        upstream.origin.host,
        upstream.origin.port,
        client_tls(*(str(path) if path else None for path in files)) if is_tls else None,
        connect_timeout_s=upstream.connect_timeout_s,
        connect_retries=upstream.connect_retries,
        max_connections=upstream.max_connections,
        # 0 keeps none, for requests without a key neither.
        keep_idle_s=upstream.reuse_idle_s and max(REUSE_IDLE_S, upstream.reuse_idle_s),
        rest_s=upstream.rest_s,
        spare_connections=_spare_connections(upstream),
        buffered=memory,
        resolver=resolver,
        counts=metrics.upstream_connections.of(upstream.label),
        head_cache=head_cache,
    )


def _spare_connections(upstream: Upstream) -> int:
    """Return how many idle connections stay open while another is opened. A TLS handshake costs 40 executions."""
    if upstream.spare_connections is not None:
        return upstream.spare_connections
    return SPARE_TLS_CONNECTIONS if upstream.origin.scheme == "https" else 0
