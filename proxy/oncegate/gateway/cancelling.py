"""Ends exchanges that nobody wants any more: the upstream connection is closed, and the key is unknown, `cancelled`.

Somebody asks for it: an operator, a reader at the address of a response, a caller that takes its call back. Or the last
reader has been away for the grace of a policy. Readers are the exchange's own client, as long as it has not closed its
side of the connection, and in any process the duplicates that wait and the followers.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Protocol

from oncegate.downstream.response import ResponseWriter
from oncegate.observe.outcome import Outcome
from oncegate.store.leases import LeasedClaim, Leases
from oncegate.store.readers import Calls, Readers
from oncegate.store.record import TOKEN_BYTES
from oncegate.store.store import MOST_NOTES, Store
from oncegate.streams.cancels import CANCEL, FETCHED, READ, CancelResult, Note, pack_note, tell_owner, unpack_note

NO_READER = "its last reader left"
TAKEN_BACK = "its client took it back"
STOPPED = "it was stopped at its address"
# Who cancels by these reasons, in metrics. Operators give reasons of their own.
BY = {NO_READER: "client_gone", TAKEN_BACK: "call", STOPPED: "address"}
OPERATOR = "operator"
# For a server to end a call that was taken back by itself. Some say nothing more about it (MCP asks for that), so that
# its response would go on until the timeout.
END_S = 1.0
# Until the store is asked again whether somebody waits.
AGAIN_S = 1.0
# The pauses until the owner of a claim that is to end is told again. By then a lease is over.
INSIST_S = (1.0, 2.0, 4.0, 8.0, 16.0)
# How often the mailbox is read where the store does not tell of notes, while an exchange runs that somebody may cancel:
# one under a rule that cancels, or one that has run for so long that an operator may have seen it.
PERIOD_S, SEEN_S = 0.2, 1.0
# How often where it does, as what it told may be lost, while an exchange runs that is older than this.
RARELY_S = 5.0


class Exchange(Protocol):
    """An exchange, as far as its cancellation deals with it."""

    async def run(self) -> Outcome: ...


class Cancellations:
    """Cancels the exchanges of this worker, and asks others to cancel theirs. `counts`: of cancels, by who asked."""

    def __init__(self, store: Store, leases: Leases, counts: dict[str, float]) -> None:
        self._store, self._leases, self._counts = store, leases, counts
        self.readers, self._calls = Readers(store.marks), Calls(store.marks)
        # How many exchanges run that their clients may cancel.
        self._cancellable = 0
        # By tokens of claims that others hold and that are to end.
        self._insisting: dict[bytes, asyncio.Task[None]] = {}

    async def run(
        self, exchange: Exchange, held: LeasedClaim, response: ResponseWriter, grace_s: float | None, call: bytes
    ) -> Outcome:
        """Run the exchange of a claim that its client may cancel: the mailbox is read meanwhile.

        `grace_s`: it ends after so long without readers; None: never. `call`: the name by which `cancel_call` finds it,
        empty for none.
        """
        execution, watch = held.claim.key + held.claim.token, None
        if grace_s is not None:
            watch = asyncio.get_running_loop().create_task(self._cancel_unread(held, response, grace_s))
        try:
            with self._counted(), self._calls.named(call, execution) if call else nullcontext():
                return await exchange.run()
        finally:
            if watch is not None:
                watch.cancel()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._cancellable += 1
        try:
            yield
        finally:
            self._cancellable -= 1

    async def _cancel_unread(self, held: LeasedClaim, response: ResponseWriter, grace_s: float) -> None:
        await response.reader_leaves()
        await asyncio.sleep(grace_s)
        while await self.readers.may_wait(held.claim.key):
            await asyncio.sleep(AGAIN_S)
        # Somebody may have come for its address just now.
        await self.collect()
        if not held.fetched:
            self._cancel(held, NO_READER)

    def _cancel(self, held: LeasedClaim, reason: str) -> None:
        if held.cancel(reason):
            self._counts[BY.get(reason, OPERATOR)] += 1

    # From any process ...

    async def cancel_claim(self, key: bytes, token: bytes, reason: str) -> CancelResult:
        """Cancel the exchange of one claim, in whichever process it runs. `reason` is for operators."""
        if (held := self._leases.held(key, token)) is not None:
            self._cancel(held, reason)
            return CancelResult.ACCEPTED
        found = await tell_owner(self._store, key, token, reason)
        if found is CancelResult.ACCEPTED and token not in self._insisting:
            insisting = asyncio.get_running_loop().create_task(self._insist(key, token, reason))
            self._insisting[token] = insisting
            insisting.add_done_callback(lambda _: self._insisting.pop(token, None))
        return found

    async def _insist(self, key: bytes, token: bytes, reason: str) -> None:
        """Tell the owner again until its claim has ended: a failover may lose a note."""
        for pause_s in INSIST_S:
            await asyncio.sleep(pause_s)
            if not (await tell_owner(self._store, key, token, reason)).may_change:
                break

    async def cancel_call(self, call: bytes) -> None:
        """Cancel a call that its client took back, unless its server ends it by itself."""
        await asyncio.sleep(END_S)
        if execution := self._calls.here(call) or await self._calls.elsewhere(call):
            await self.cancel_claim(execution[:-TOKEN_BYTES], execution[-TOKEN_BYTES:], TAKEN_BACK)

    async def note_fetched(self, key: bytes, token: bytes) -> bool:
        """Let a claim never end for want of readers: somebody has its address. False: the store did not confirm it."""
        if (held := self._leases.held(key, token)) is None:
            return await self._store.post(token, pack_note(Note(FETCHED, key, token)))
        held.fetched = True
        return True

    # The mailbox ...

    async def deliver(self) -> None:
        """Read the mailbox when the store tells of a note, and else while somebody may leave one, until cancelled."""
        told, wakes = asyncio.Event(), self._store.wakes
        wakes.watch_mail(told.set)
        while True:
            is_told_of = wakes.tells_of_mail
            with suppress(TimeoutError):
                async with asyncio.timeout(RARELY_S if is_told_of else PERIOD_S):
                    await told.wait()
            if told.is_set() or self._may_be_asked(is_told_of):
                told.clear()
                if await self.collect() >= MOST_NOTES:
                    told.set()

    def _may_be_asked(self, is_told_of: bool) -> bool:
        """Return whether there may be a note of which nobody has told."""
        if is_told_of:
            return self._leases.oldest_s > RARELY_S
        return self._cancellable > 0 or self._leases.oldest_s > SEEN_S

    async def collect(self) -> int:
        """Do what the notes in the mailbox of this worker say, and return how many there were."""
        notes = await self._store.collect(self._store.token_prefix)
        for packed in notes:
            note = unpack_note(packed)
            held = self._leases.held(note.key, note.token) if note is not None else None
            if note is None or held is None:
                continue
            if note.kind == CANCEL:
                self._cancel(held, note.reason)
            elif note.kind == READ:
                held.read_elsewhere = True
                held.on_read()
            else:
                held.fetched = True
        return len(notes)
