"""Calls of one verb, made in batches: what a turn of the event loop asks for leaves as one statement.

A statement is never cancelled. A caller stops waiting at its deadline, and the statement goes on: `Call.sent` says when
it is over, which a withdrawal has to know.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.connections.session import Answer, Lost, Refused, Session
from oncegate.store.postgres.servers import Servers
from oncegate.store.postgres.verb import Row, Verb
from oncegate.store.results import Forbidden, NotAttempted, StoreFull, Unconfirmed

MOST_ROWS, MOST_BYTES = 128, 262_144
# While a batch of the verb is on its way, calls gather for the next one, until so many wait or it takes so long. A
# statement costs the server as much as ten rows of one do, so this saves a sixth of its CPU time; to gather 64 costs a
# third of the replays a second (32 callers, measured). Nobody waits for a commit that is stuck.
GATHERED_ROWS, GATHERING_S = 8, 0.005
# What a row takes beside its heads and bodies.
_ROW_BYTES = 384
NOT_SENT = Unconfirmed("no connection to the store was free in time", maybe_executed=False)
NO_REPLY = Unconfirmed("the store did not reply in time")
ENDED = Unconfirmed("calls were ended", maybe_executed=False)
# Disk full; insufficient privilege.
_FULL, _FORBIDDEN = "53100", "42501"
# A key that another call has inserted just now. A repeat finds its record.
_TAKEN = "23505"
# Data exceptions, constraints and limits of the server: a repeat would not help. One row of a batch may cause them
# alone, and a lack of memory and damage as well.
_OF_VALUES = ("22", "23", "54")
_BY_ONE_ROW = (*_OF_VALUES, "53200", "XX")


class Sent:
    """One statement. `is_over`: the server has ended it. `lost`: it has no reply, and may still be executed."""

    __slots__ = ("is_over", "lost")

    def __init__(self) -> None:
        self.is_over = False
        self.lost: Lost | None = None


class Call:
    """One row that waits for its place in a batch, and then for its reply.

    `deadline`: the loop's time at which its caller stops waiting. `reply`: the row of the result and whether its commit
    is below the level, or Unconfirmed.
    """

    __slots__ = ("began", "deadline", "key", "reply", "row", "sent", "size", "token")

    def __init__(self, loop: asyncio.AbstractEventLoop, row: Row, token: object, size: int, deadline: float) -> None:
        self.key, self.token, self.row = row[0], token, row
        self.size, self.deadline = _ROW_BYTES + size, deadline
        self.began = loop.time()
        self.sent: Sent | None = None
        self.reply: asyncio.Future[tuple[Mapping[str, Any], bool] | Unconfirmed] = loop.create_future()


def _key_of(call: Call) -> Any:
    return call.key


class Batches:
    """The calls of one verb at one level. `tail`: the arguments behind the columns.

    `observe(seconds)` is called with the time of each call.
    """

    def __init__(
        self, servers: Servers, verb: Verb, level: Level, tail: tuple[object, ...], observe: Callable[[float], None]
    ) -> None:
        self._servers, self._verb, self._level, self._tail, self._observe = servers, verb, level, tail, observe
        self._loop = asyncio.get_running_loop()
        self._statement = verb.statement
        self._queue: deque[Call] = deque()
        # Parts of a refused batch.
        self._parts: deque[list[Call]] = deque()
        self._scheduled = False
        self._waiter: asyncio.Task[None] | None = None
        # How many batches are on their way.
        self._running = 0
        # Calls without a reply, and one timer for all of them: it is set to the deadline that comes first.
        self._open: set[Call] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._gathering: asyncio.TimerHandle | None = None
        # When the newest batch left.
        self._sent_s = 0.0

    def call(self, row: Row, deadline: float) -> Call:
        """Ask for one row. `deadline`: the loop's time at which its caller stops waiting."""
        verb = self._verb
        call = Call(self._loop, row, row[verb.token_at], verb.size(row), deadline)
        self._open.add(call)
        if deadline < self._timer_at:
            self._set_timer(deadline)
        self._queue.append(call)
        if not self._scheduled:
            self._scheduled = True
            # Behind all callbacks that are due in this turn of the loop.
            self._loop.call_soon(self._send)
        return call

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(at, self._expire), at

    def _expire(self) -> None:
        """End the calls whose callers stop waiting now."""
        # A timer may come a moment early, by the resolution of the loop's clock.
        for call in [call for call in self._open if call.deadline <= max(self._timer_at, self._loop.time())]:
            self._end(call, NOT_SENT if call.sent is None else NO_REPLY)
        self._timer, self._timer_at = None, float("inf")
        if self._open:
            self._set_timer(min(call.deadline for call in self._open))

    def _end(self, call: Call, reply: tuple[Mapping[str, Any], bool] | Unconfirmed) -> None:
        self._open.discard(call)
        if not call.reply.done():
            call.reply.set_result(reply)

    def _send(self) -> None:
        self._scheduled = False
        until_s = self._sent_s + GATHERING_S
        if not self._running or len(self._queue) >= GATHERED_ROWS or self._parts or self._loop.time() >= until_s:
            self._send_now()
        elif self._gathering is None:
            self._gathering = self._loop.call_at(until_s, self._send_now)

    def _send_now(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if self._waiter is not None:
            return
        while self._queue or self._parts:
            session = self._servers.session(self._level)
            if session is None:
                self._waiter = self._loop.create_task(self._wait())
                return
            self._send_batch(session)

    async def _wait(self) -> None:
        """Wait for a free connection, for as long as a caller waits."""
        try:
            while any(not call.reply.done() for call in self._queue) or self._parts:
                session = await self._servers.free_session(self._level, self._loop.time() + 1.0)
                if session is not None:
                    self._send_batch(session)
                    break
                if self._servers.has_ended:
                    self._end_all([*self._queue, *chain(*self._parts)], ENDED)
                    self._queue.clear()
                    self._parts.clear()
        finally:
            self._waiter = None
        self._send_now()

    def _send_batch(self, session: Session) -> None:
        calls = self._parts.popleft() if self._parts else self._next_batch()
        # In the order of their keys: rows are locked in it.
        calls = sorted((call for call in calls if not call.reply.done()), key=_key_of)
        if not calls:
            session.free()
            return
        sent = Sent()
        for call in calls:
            call.sent = sent
        self._running += 1
        self._sent_s = self._loop.time()
        task = session.start(self._statement, [call.row for call in calls], *self._tail)
        task.add_done_callback(partial(self._note_reply, calls, sent))

    def _next_batch(self) -> list[Call]:
        """Take what fits into one statement. A second call of a key waits for the next: one row would be lost."""
        batch: dict[object, Call] = {}
        later: list[Call] = []
        size = 0
        while self._queue and len(batch) < MOST_ROWS:
            call = self._queue[0]
            if call.reply.done():
                self._queue.popleft()
            elif call.key in batch:
                later.append(self._queue.popleft())
            elif batch and size + call.size > MOST_BYTES:
                break
            else:
                batch[call.key] = self._queue.popleft()
                size += call.size
        self._queue.extendleft(reversed(later))
        return list(batch.values())

    def _note_reply(self, calls: list[Call], sent: Sent, task: asyncio.Task[Answer]) -> None:
        """Note how a statement ended."""
        self._running -= 1
        if task.cancelled():
            # The process ends: nobody waits any more.
            return
        error = task.exception()
        sent.is_over = not (isinstance(error, Lost) and error.maybe_executed)
        if isinstance(error, Lost):
            sent.lost = error
            self._end_all(calls, Unconfirmed(error.reason, error.maybe_executed))
        elif isinstance(error, Refused):
            self._refuse(calls, error)
        else:
            self._answer(calls, task.result())
        if self._queue or self._parts:
            self._send()

    def _answer(self, calls: list[Call], answer: Answer) -> None:
        rows = {row["token"]: row for row in answer.rows}
        now = self._loop.time()
        for call in calls:
            row = rows.get(call.token)
            self._end(call, NO_REPLY if row is None else (row, answer.is_below))
            self._observe(now - call.began)

    def _refuse(self, calls: list[Call], refused: Refused) -> None:
        """End or repeat calls of a statement that the server has undone. Halved, a batch finds its bad row."""
        if len(calls) > 1 and refused.sqlstate.startswith(_BY_ONE_ROW):
            half = len(calls) // 2
            self._parts += [calls[:half], calls[half:]]
            return
        if refused.sqlstate == _FULL:
            self._end_all(calls, StoreFull(refused.reason))
        elif refused.sqlstate == _FORBIDDEN:
            self._end_all(calls, Forbidden(refused.reason, maybe_executed=False))
        elif refused.sqlstate.startswith(_OF_VALUES) and refused.sqlstate != _TAKEN:
            self._end_all(calls, NotAttempted(refused.reason))
        else:
            self._end_all(calls, Unconfirmed(refused.reason, maybe_executed=False))

    def _end_all(self, calls: list[Call], reply: Unconfirmed) -> None:
        for call in calls:
            self._end(call, reply)
