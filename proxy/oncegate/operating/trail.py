"""A key's entries of the audit trail, where the store has one."""

from typing import Any

from oncegate.operating.errors import OperatorError
from oncegate.settings.postgres_url import is_postgres
from oncegate.settings.settings import Settings
from oncegate.store.store import Store


async def trail_of(settings: Settings, store: Store, key: bytes) -> list[dict[str, Any]] | None:
    """Return the entries that a key's record leads to, the oldest first; None where the store has no trail.

    An entry has the fields that `oncegate audit` prints. Raises OperatorError.
    """
    url = settings.store_url.get_secret_value()
    if not is_postgres(url) or not settings.audit:
        return None
    # Its driver is an extra, which is there if the store is.
    import asyncpg

    from oncegate.store.postgres.audit import OPERATOR, facts
    from oncegate.store.postgres.migrations.run import MigrationError, Target, connect
    from oncegate.store.postgres.trail import chain_of

    try:
        connection = await connect(Target(url, settings.store_schema, patience_s=2.0))
        try:
            entries = await chain_of(connection, key)
        finally:
            connection.terminate()
    except (MigrationError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise OperatorError(f"the audit trail: {error}") from error
    said = [facts(entry) for entry in entries]
    for entry, one in zip(entries, said, strict=True):
        if not entry.actor.startswith(OPERATOR):
            one["actor"] = (await store.records.proxy_of(entry.actor))[0]
    return said
