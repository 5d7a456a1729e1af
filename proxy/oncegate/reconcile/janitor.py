"""Takes the steps of unknown keys as they fall due, over the index of open keys.

Each worker has a janitor, and one of them works at a server at a time: it has reserved that for a few seconds. If it
dies, another one goes on. The more open keys there are, the less often it looks at all of them.
"""

import asyncio
import heapq
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import NamedTuple

from oncegate.observe.reconciling import By
from oncegate.reconcile import progress
from oncegate.reconcile.progress import Progress
from oncegate.reconcile.step import Probing, Step, may_ask, take_step
from oncegate.rules.model import Rule
from oncegate.store.open_keys.records import ServerRecords
from oncegate.store.record_name import record_id
from oncegate.store.record_view import UNDECIDED, RecordView, StoreError

# What is reserved, and for how long: so long after its janitor died nobody works at a server.
WORK, RESERVED_S = b"reconcile", 5.0
# Keys that are read at once, and the pause between two of these reads.
PAGE, PAGE_PAUSE_S = 100, 0.05
# Marks that are written at once.
_MARKS = 20
# The least and the most pause between two looks at one page, and how much longer it is for each further page: that
# takes a worker 5 to 10 ms. While keys are overdue, it asks for so many times as long as it looks.
MIN_LOOK_S, MAX_LOOK_S, MORE_S, ASKS = 0.05, 1.0, 0.125, 20
# Looks in a row that a store refuses before that is said: until it is connected, it refuses all.
_SILENT_LOOKS = 10
# Keys whose steps are known to fall due first. The others are found by a later look.
MOST_DUE = 5000
# Steps that are under way at once, for each upstream.
AT_ONCE = 8


class _Due(NamedTuple):
    # The loop's time, also of when the record was read.
    due_s: float
    read_s: float
    record: RecordView
    rule: Rule


class Janitor:
    """The janitor of one worker. `rules()`: those with a plan, by their names. `warn(event, **fields)`: as a logger."""

    def __init__(self, deps: Probing, rules: Callable[[], Mapping[str, Rule]], warn: Callable[..., None]) -> None:
        self._deps, self._rules, self._warn = deps, rules, warn
        self._clock = asyncio.get_running_loop().time
        self._failures, self._is_closed = 0, False

    def close(self) -> None:
        """Begin no more steps. A question that is under way may end."""
        self._is_closed = True

    async def run(self) -> None:
        """Work while there are plans, until cancelled."""
        while self._rules() and not self._is_closed:
            servers = self._deps.store.records.servers
            async with asyncio.TaskGroup() as rounds:
                for server in servers:
                    rounds.create_task(self._work(server))
            await asyncio.sleep(self._pause_s() if servers else MAX_LOOK_S)

    async def _work(self, server: ServerRecords) -> None:
        """Work at a server, unless another janitor does."""
        try:
            if await server.reserve(WORK, int(RESERVED_S * 1000)) is not None:
                return
            ends_s = self._clock() + RESERVED_S
            while (left_s := ends_s - self._clock()) > 0 and not self._is_closed:
                began_s = self._clock()
                due, pages = await self._look(server)
                # A look at thousands of keys takes longer than a reservation; leases keep two janitors apart.
                until_s = max(ends_s, self._clock() + ASKS * (self._clock() - began_s))
                await self._ask(due, min(self._pause_s() + MORE_S * (pages - 1), left_s), until_s)
            self._failures = 0
        except StoreError as error:
            self._failures += 1
            if self._failures == _SILENT_LOOKS:
                self._warn("cannot look for unknown keys", server=server.name, reason=str(error))
            await asyncio.sleep(MAX_LOOK_S)

    def _pause_s(self) -> float:
        """Return the pause between two looks: a key that was just found unknown is asked about soon."""
        first_s = [rule.policy.reconcile.first_after_s for rule in self._rules().values() if rule.policy.reconcile]
        return min(MAX_LOOK_S, max(MIN_LOOK_S, min(first_s, default=MAX_LOOK_S) / 2))

    # A look ...

    async def _look(self, server: ServerRecords) -> tuple[list[_Due], int]:
        """Return the keys of a server that fall due first, and how many pages of keys it has. New ones begin here."""
        due, place, pages = list[_Due](), "", 1
        if not await server.index.is_complete():
            return due, pages
        while True:
            page = await server.index.page(PAGE, place, UNDECIDED)
            due = heapq.nsmallest(MOST_DUE, [*due, *await self._due(page.records)], key=itemgetter(0))
            if not (place := page.after):
                return due, pages
            pages += 1
            await asyncio.sleep(PAGE_PAUSE_S)

    async def _due(self, records: Iterable[RecordView]) -> list[_Due]:
        rules, found = self._rules(), list[tuple[RecordView, Rule]]()
        for record in records:
            if may_ask(record) and (rule := rules.get(record.kept.rule)) is not None:
                found.append((record, rule))
        marks = await self._deps.store.marks.get_all([progress.mark_name(record.key) for record, _ in found])
        # Counted from here, because a store may tell its time with its records alone.
        now_s, due = self._clock(), list[_Due]()
        begun: list[tuple[bytes, Progress, RecordView]] = []
        for (record, rule), packed in zip(found, marks, strict=True):
            plan = rule.policy.reconcile
            assert plan is not None
            now = progress.unpack(packed, record, plan)
            if now is None:
                now = progress.begin(record, plan)
                begun.append((packed, now, record))
            if not now.left:
                due.append(_Due(now_s + now.wait_ms(record.now_ms) / 1000, now_s, record, rule))
        await self._begin(begun)
        return due

    async def _begin(self, begun: list[tuple[bytes, Progress, RecordView]]) -> None:
        swap = self._deps.store.marks.swap
        for first in range(0, len(begun), _MARKS):
            await asyncio.gather(
                *[
                    swap(progress.mark_name(record.key), packed, one.pack(), progress.lasts_ms(record))
                    for packed, one, record in begun[first : first + _MARKS]
                ]
            )

    # The steps ...

    async def _ask(self, due: list[_Due], pause_s: float, ends_s: float) -> None:
        """Take the steps that fall due until the next look, each upstream on its own, the first ones first.

        While some are overdue, that look can wait until `ends_s` (the loop's time): it would find none that is older.
        """
        next_s = self._clock() + pause_s
        by_origin: dict[str, list[_Due]] = {}
        for one in due:
            plan = one.rule.policy.reconcile
            by_origin.setdefault(str(plan.origin) if plan else "", []).append(one)
        async with asyncio.TaskGroup() as askers:
            for queue in by_origin.values():
                queue.reverse()
                for _ in range(min(AT_ONCE, len(queue))):
                    askers.create_task(self._take_steps(queue, next_s, ends_s))
        await asyncio.sleep(max(0.0, next_s - self._clock()))

    async def _take_steps(self, queue: list[_Due], next_s: float, ends_s: float) -> None:
        """Take the steps of a queue, whose first one is its last entry."""
        while queue and self._clock() < ends_s and not self._is_closed:
            one = queue.pop()
            if one.due_s > max(next_s, self._clock()):
                return
            await asyncio.sleep(max(0.0, one.due_s - self._clock()))
            record = one.record._replace(now_ms=one.record.now_ms + int((self._clock() - one.read_s) * 1000))
            try:
                patience_s = max(0.0, ends_s - self._clock())
                result = await take_step(self._deps, record, one.rule, By.JANITOR, patience_s)
            except StoreError:
                # The next look says so.
                return
            except Exception as error:
                # One key must not keep all others from being asked about.
                self._warn("a question failed", key_id=record_id(record.key), exc_info=error)
                continue
            if result.step is Step.HELD_BACK:
                # So are all the others.
                queue.clear()
