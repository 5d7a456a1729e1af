"""Opens the store that a URL names."""

from oncegate.store.redis.store import RedisStore
from oncegate.store.store import Store, StoreConfig


def open_store(config: StoreConfig) -> Store:
    """Return the store of a URL, which connects once it is started."""
    return RedisStore(config)
