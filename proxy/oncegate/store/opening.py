"""Opens the store that a URL names."""

from oncegate.keys.digests import Digests
from oncegate.settings.errors import needs_extra
from oncegate.settings.settings import Settings
from oncegate.store.redis.store import RedisStore
from oncegate.store.store import PostgresOptions, Store, StoreConfig, StoreLogin


def open_store(config: StoreConfig) -> Store:
    """Return the store of a URL, which connects once started. Raises SettingsError if its driver is not installed."""
    if config.url.startswith(("postgresql://", "postgres://")):
        # Its driver is an extra, which a store in Redis does not need.
        with needs_extra("postgres"):
            from oncegate.store.postgres.store import PostgresStore

        return PostgresStore(config)
    return RedisStore(config)


def login_of(settings: Settings) -> StoreLogin:
    """Return what the settings say of connections to the store."""
    files = (settings.store_ca_file, settings.store_cert_file, settings.store_key_file)
    return StoreLogin(settings.store_url.get_secret_value(), *(str(path) if path else None for path in files))


def postgres_options(settings: Settings) -> PostgresOptions:
    """Return what the settings say of a store in PostgreSQL."""
    return PostgresOptions(
        schema=settings.store_schema,
        audit=settings.audit,
        audit_key=Digests(settings.secret.get_secret_value().encode()).audit_key,
        max_bytes=settings.store_max_bytes,
        promotion=settings.promotion,
    )
