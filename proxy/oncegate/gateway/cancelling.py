"""Ends exchanges that nobody wants any more: the upstream connection is closed, and the key is unknown, `cancelled`.

`run` is the way in for an exchange whose policy allows it. It ends when its last reader has been away for the grace of
the policy. Readers are its own client, as long as it has not closed its side of the connection, and the duplicates that
wait for its response, in any process.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from oncegate.decision import CANCELLED
from oncegate.downstream.response import ResponseWriter
from oncegate.observe.outcome import Outcome
from oncegate.store.readers import Calls, Readers
from oncegate.store.record import TOKEN_BYTES, Claim, ViewState, cancelled_claim
from oncegate.store.record_view import RecordView, StoreError, claim_of
from oncegate.store.results import SettleStatus
from oncegate.store.store import Store

NO_READER = "its last reader left"
TAKEN_BACK = "its client took it back"
# For a server to end a call that was taken back by itself. Some say nothing more about it (MCP asks for that), so that
# its response would go on until the timeout.
END_S = 1.0
# Until the store is asked again whether somebody waits.
AGAIN_S = 1.0
# For marking the record of another process.
MARK_S = 1.0


class Cancellable(Protocol):
    """An exchange, as far as its cancellation deals with it."""

    async def run(self) -> Outcome: ...

    def cancel(self, reason: str) -> bool: ...


class Cancellations:
    """The exchanges of one worker that can be cancelled, by the digest of their key."""

    def __init__(self, store: Store, background: Callable[[Coroutine[Any, Any, Any]], None]) -> None:
        self._store, self._background = store, background
        self.readers, self._calls = Readers(store.marks), Calls(store.marks)
        self._running: dict[bytes, Cancellable] = {}

    async def run(
        self, exchange: Cancellable, key: bytes, response: ResponseWriter, grace_s: float | None = None
    ) -> Outcome:
        """Run an exchange so that `cancel` finds it. `grace_s`: it ends after so long without readers; None: never."""
        self._running[key] = exchange
        watch = None
        if grace_s is not None:
            watch = asyncio.get_running_loop().create_task(self._cancel_unread(exchange, key, response, grace_s))
        try:
            return await exchange.run()
        finally:
            if watch is not None:
                watch.cancel()
            if self._running.get(key) is exchange:
                del self._running[key]

    async def _cancel_unread(self, exchange: Cancellable, key: bytes, response: ResponseWriter, grace_s: float) -> None:
        await response.reader_leaves()
        await asyncio.sleep(grace_s)
        while await self.readers.may_wait(key):
            await asyncio.sleep(AGAIN_S)
        exchange.cancel(NO_READER)

    @contextmanager
    def named(self, call: bytes, claim: Claim) -> Iterator[None]:
        """Let `cancel_call` find the exchange of a claim by the name of its call, unless that is empty."""
        with self._calls.named(call, claim.key + claim.token) if call else nullcontext():
            yield

    async def cancel_call(self, call: bytes) -> None:
        """Cancel a call that its client took back, unless its server ends it by itself."""
        await asyncio.sleep(END_S)
        if here := self._calls.here(call):
            await self.cancel(here[:-TOKEN_BYTES], TAKEN_BACK)
        elif there := await self._calls.elsewhere(call):
            # The mark outlasts the call, and another one may have its key by now.
            await self._cancel_elsewhere(there[:-TOKEN_BYTES], TAKEN_BACK, there[-TOKEN_BYTES:])

    async def cancel(self, key: bytes, reason: str) -> bool:
        """Cancel the exchange of a key, in whichever process it runs; return whether there was one.

        Another process hears of it with the next renewal of its lease. From now on no retry executes the key.
        """
        if (exchange := self._running.get(key)) is not None:
            exchange.cancel(reason)
            return True
        return await self._cancel_elsewhere(key, reason, None)

    async def _cancel_elsewhere(self, key: bytes, reason: str, token: bytes | None) -> bool:
        """Cancel the exchange of another process; `token`: that of its claim, where it must be this one."""
        try:
            record = await self._store.records.read(key)
            if record is None or record.state is not ViewState.IN_FLIGHT or token not in (None, record.token):
                return False
            return await self._mark(record, reason)
        except StoreError:
            return False

    async def _mark(self, record: RecordView, reason: str) -> bool:
        """Mark a record as cancelled in its owner's name, unless the owner has settled it meanwhile."""
        if record.left_ms <= 0:
            return False
        claim = cancelled_claim(claim_of(record, record.left_ms))
        result = await self._store.mark_unknown(claim, f"cancelled: {reason}", MARK_S, record.status)
        return result.status is SettleStatus.MARKED_UNKNOWN

    def note_unknown(self, claim: Claim) -> None:
        """Take note that somebody else marked the record of a claim of this worker unknown."""
        if claim.key in self._running:
            self._background(self._follow(claim))

    async def _follow(self, claim: Claim) -> None:
        """Cancel an exchange whose record was cancelled by another process."""
        try:
            record = await self._store.records.read(claim.key)
        except StoreError:
            return
        exchange = self._running.get(claim.key)
        if exchange is not None and record is not None and (record.token, record.mode) == (claim.token, CANCELLED):
            exchange.cancel(record.reason.removeprefix("cancelled: "))
