"""Opens the store for an operator, beside the proxies that use it."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from oncegate.operating.errors import OperatorError
from oncegate.settings.errors import SettingsError
from oncegate.settings.postgres_url import is_postgres
from oncegate.settings.settings import Settings
from oncegate.settings.store_url import socket_url
from oncegate.store.opening import login_of, open_store, postgres_options
from oncegate.store.record_view import StoreError
from oncegate.store.store import Store, StoreConfig

TIMEOUT_MS = 5000


def operator_store(settings: Settings, actor: str) -> Store:
    """Return the store as an operator uses it, which connects once started. Raises OperatorError if it cannot be.

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
        login=login_of(settings),
        postgres=replace(postgres_options(settings), actor=actor.encode("utf-8", "replace")),
    )
    try:
        return open_store(config)
    # OSError: certificates that cannot be used.
    except (SettingsError, OSError) as error:
        raise OperatorError(str(error)) from error


@asynccontextmanager
async def opened_store(settings: Settings, actor: str) -> AsyncIterator[Store]:
    """Open the store for the time of a block. Raises OperatorError if it is not reachable, or fails in the block."""
    store = operator_store(settings, actor)
    store.start()
    try:
        if not await store.wait_up(TIMEOUT_MS / 1000):
            reason = store.not_ready_reason() or "the store is not reachable"
            raise OperatorError(f"{reason}{_embedded_hint(settings)}")
        with told(store):
            yield store
    finally:
        await store.close()


@contextmanager
def told(store: Store) -> Iterator[None]:
    """Raise OperatorError in place of StoreError: the store's own checks name what helps, such as a migration."""
    try:
        yield
    except StoreError as error:
        reason = store.not_ready_reason() or "the store"
        raise OperatorError(f"{reason}: {error}") from error


def _embedded_hint(settings: Settings) -> str:
    """Return where the embedded store is looked for, as it runs only while its proxy does; empty for another store."""
    if settings.store_url.get_secret_value() != "embedded":
        return ""
    folder = settings.data_dir.absolute()
    return f"; the embedded store in {folder} runs while `oncegate serve` does, with the same ONCEGATE_DATA_DIR"
