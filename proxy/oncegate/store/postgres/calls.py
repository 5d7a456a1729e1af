"""Calls of one key, each a statement of its own: bodies are too large for batches."""

import asyncio
from collections.abc import Callable
from typing import Any

from oncegate.store.postgres import rows
from oncegate.store.postgres.claims import MAX_PAUSE_S, MIN_PAUSE_S, Claims
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.connections.session import Lost, Refused
from oncegate.store.postgres.rows import BUSY_TAG, READ_BYTES
from oncegate.store.postgres.servers import Servers
from oncegate.store.record import Claim
from oncegate.store.results import AppendStatus, ReadFailure, Unconfirmed

_APPEND = "SELECT append_2($1, $2, $3, $4, $5) AS tag"
_READ = "SELECT * FROM read_1($1, $2, $3, $4)"


class Calls:
    """`observe(verb)` returns what is called with the seconds of each call, `retried` is called with each repeat."""

    def __init__(
        self,
        servers: Servers,
        claims: Claims,
        timeout_s: float,
        observe: Callable[[str], Callable[[float], None]],
        retried: Callable[[], None],
    ) -> None:
        self._servers, self._claims, self._timeout_s = servers, claims, timeout_s
        self._observe, self._retried = observe, retried
        self._loop = asyncio.get_running_loop()

    async def append(self, claim: Claim, index: int, chunk: bytes, patience_s: float, head: bytes) -> AppendStatus:
        """Append, again while another transaction holds the record, or until the caller's patience is over."""
        args = claim.key, claim.token, index, chunk, head
        ends, pause_s = self._loop.time() + patience_s, MIN_PAUSE_S
        while True:
            reply = await self.ask("append", Level.OFF, _APPEND, args, ends)
            if isinstance(reply, list) and (tag := reply[0]["tag"]) != BUSY_TAG:
                return rows.append_status(tag)
            if self._loop.time() + pause_s >= min(ends, self._claims.retries_end):
                return AppendStatus.UNCONFIRMED
            self._retried()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def read(self, key: bytes, token: bytes, first: int) -> list[bytes] | ReadFailure:
        reply = await self.ask("read", Level.OFF, _READ, (key, token, first, READ_BYTES))
        return rows.read_chunks(reply) if isinstance(reply, list) else ReadFailure.UNCONFIRMED

    async def ask(
        self, verb: str, level: Level, statement: str, args: tuple[object, ...], ends: float = float("inf")
    ) -> list[Any] | Unconfirmed:
        """Return the rows of one call, within the timeout and until `ends` (the loop's time)."""
        began = self._loop.time()
        deadline = min(began + self._timeout_s, ends)
        try:
            session = await self._servers.free_session(level, deadline)
            if session is None:
                return Unconfirmed("no connection to the store was free in time", maybe_executed=False)
            running = self._loop.create_task(session.run(statement, *args))
            await asyncio.wait([running], timeout=max(0.0, deadline - self._loop.time()))
            if not running.done():
                # Its end is nobody's any more.
                running.add_done_callback(lambda task: task.exception())
                return Unconfirmed("the store did not reply in time")
            answer = await running
            if answer.is_below and level is Level.CLAIM:
                return Unconfirmed("too few standbys have the change")
            return answer.rows
        except (Lost, Refused) as failed:
            return Unconfirmed(failed.reason)
        finally:
            self._observe(verb)(self._loop.time() - began)
