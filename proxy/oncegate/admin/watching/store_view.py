"""The store as the pages read it: on a connection of its own, which is open while somebody looks.

No page is on the request path, also where the admin listener runs in a process that serves.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from oncegate.operating.errors import OperatorError
from oncegate.operating.opened_store import operator_store, told
from oncegate.settings.settings import Settings
from oncegate.store.store import Store

# After so long without a question, the connection is closed.
IDLE_S = 10.0
# How long a page waits for a connection, and for what it asks: then it shows what it has.
CONNECT_S, ANSWER_S = 0.5, 3.0


class StoreView:
    """Opens the store when it is asked, and closes it when nobody has asked for IDLE_S."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._store: Store | None = None
        self._users = 0
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def is_open(self) -> bool:
        return self._store is not None

    @asynccontextmanager
    async def opened(self, seconds: float = 0.0) -> AsyncIterator[Store]:
        """Lend the store for the time of a block, at most `seconds` or ANSWER_S. Raises OperatorError if it is down."""
        store, seconds = self._lend(), seconds or ANSWER_S
        try:
            if not await store.wait_up(CONNECT_S):
                raise OperatorError(store.not_ready_reason() or "the store is not reachable")
            with told(store):
                async with asyncio.timeout(seconds):
                    yield store
        except TimeoutError:
            raise OperatorError(f"the store did not answer within {seconds:g} s") from None
        finally:
            self._take_back()

    def _lend(self) -> Store:
        if self._idle is not None:
            self._idle.cancel()
        if self._store is None:
            self._store = operator_store(self._settings(), "")
            self._store.start()
        self._users += 1
        return self._store

    def _take_back(self) -> None:
        self._users -= 1
        if not self._users:
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._close_soon)

    def _close_soon(self) -> None:
        task = asyncio.ensure_future(self.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close the connection. The next page opens another."""
        if self._idle is not None:
            self._idle.cancel()
        store, self._store = self._store, None
        if store is not None:
            await store.close()
