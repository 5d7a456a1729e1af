"""Opens the store for an operator, beside the proxies that use it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from oncegate.operating.errors import OperatorError
from oncegate.settings.errors import SettingsError
from oncegate.settings.postgres_url import is_postgres
from oncegate.settings.settings import Settings
from oncegate.settings.store_url import socket_url
from oncegate.store.opening import open_store, postgres_options
from oncegate.store.record_view import StoreError
from oncegate.store.store import Store, StoreConfig

TIMEOUT_MS = 5000


@asynccontextmanager
async def opened_store(settings: Settings, actor: str) -> AsyncIterator[Store]:
    """Open the store for the time of a block. Raises OperatorError if it is not reachable, or fails in the block.

    `actor`: who the audit trail says acted.
    """
    url = settings.store_url.get_secret_value()
    config = StoreConfig(
        url=socket_url(settings.data_dir) if url == "embedded" else url,
        timeout_ms=TIMEOUT_MS,
        patience_s=TIMEOUT_MS / 1000,
        # Nothing goes on after a command.
        background=lambda work: work.close(),
        durability=settings.durability if is_postgres(url) else "memory",
        postgres=replace(postgres_options(settings), actor=actor.encode("utf-8", "replace")),
    )
    try:
        store = open_store(config)
    except SettingsError as error:
        raise OperatorError(str(error)) from error
    store.start()
    try:
        if not await store.wait_up(TIMEOUT_MS / 1000):
            reason = store.not_ready_reason() or "the store is not reachable"
            raise OperatorError(f"{reason}{_embedded_hint(settings)}")
        yield store
    except StoreError as error:
        # The store's own checks name what helps, such as a migration; the error of a server does not.
        reason = store.not_ready_reason() or "the store"
        raise OperatorError(f"{reason}: {error}") from error
    finally:
        await store.close()


def _embedded_hint(settings: Settings) -> str:
    """Return where the embedded store is looked for, as it runs only while its proxy does; empty for another store."""
    if settings.store_url.get_secret_value() != "embedded":
        return ""
    folder = settings.data_dir.absolute()
    return f"; the embedded store in {folder} runs while `oncegate serve` does, with the same ONCEGATE_DATA_DIR"
