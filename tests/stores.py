"""The stores that tests call verbs on."""

from collections.abc import Callable, Coroutine
from typing import Any

from oncegate.store.opening import open_store
from oncegate.store.store import Store, StoreConfig


def drop(work: Coroutine[Any, Any, Any]) -> None:
    """Do nothing of what nobody waits for."""
    work.close()


def store_at(
    url: str,
    *,
    timeout_ms: int = 5000,
    patience_s: float = 5.0,
    background: Callable[[Coroutine[Any, Any, Any]], Any] = drop,
    **options: Any,
) -> Store:
    """Return a store that is not started."""
    config = StoreConfig(url=url, timeout_ms=timeout_ms, patience_s=patience_s, background=background, **options)
    return open_store(config)
