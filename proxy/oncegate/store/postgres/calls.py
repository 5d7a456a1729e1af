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
from oncegate.store.results import AppendStatus, Followed, ReadFailure, Unconfirmed

# The version of the schema from which on a response can be followed while it runs.
FOLLOWING = 2
_APPEND = "SELECT append_2($1, $2, $3, $4, $5) AS tag"
_READ = "SELECT * FROM read_1($1, $2, $3, $4)"
# With a schema of version 1 there is no head, the body comes once it is complete, and nothing says what is replaced.
_APPEND_1 = "SELECT append_1($1, $2, $3, $4) AS tag"
_FOLLOW_1 = """
SELECT tag_of(state, created, lease, lease_ms, expires, frees, now) AS tag, now, stage, meta, true AS replaced,
       least(lease - now, lease_ms) AS lease_left, CASE state WHEN 3 THEN chunks ELSE 0 END AS count,
       NULL::bytea AS head, ARRAY(SELECT c.bytes FROM read_1($1, $2, $3, $4) c WHERE c.tag = 1) AS chunks
FROM record, LATERAL now_ms() AS now WHERE key = $1 AND token = $2
"""


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
        args: tuple[object, ...] = claim.key, claim.token, index, chunk
        statement, args = (_APPEND, (*args, head)) if self._servers.schema_version >= FOLLOWING else (_APPEND_1, args)
        ends, pause_s = self._loop.time() + patience_s, MIN_PAUSE_S
        while True:
            reply = await self.ask("append", Level.OFF, statement, args, ends)
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

    async def follow_1(self, key: bytes, token: bytes, first: int) -> Followed | ReadFailure:
        """Follow with a schema of version 1."""
        found = await self.ask("follow", Level.OFF, _FOLLOW_1, (key, token, first, READ_BYTES))
        if isinstance(found, Unconfirmed):
            return ReadFailure.UNCONFIRMED
        return rows.followed(key, first, found[0]) if found else ReadFailure.GONE

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
