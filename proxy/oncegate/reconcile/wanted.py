"""The keys that duplicates of this worker wait for: their steps are taken here as they fall due, by nobody else's loop.

What settles such a key may as well be the janitor of any worker, an operator or its owner: duplicates are woken by
their polls then.
"""

import asyncio
from collections.abc import Callable, Mapping

from oncegate.observe.reconciling import By
from oncegate.reconcile import progress
from oncegate.reconcile.step import Probing, Step, StepResult, take_step
from oncegate.rules.model import Rule
from oncegate.store.record_view import StoreError

# The least and the most pause between two looks at a key: its step may fall due earlier than it was said.
_LEAST_S, _MOST_S = 0.05, 2.5
_ENDS = (Step.SETTLED, Step.LEFT, Step.OVER)


class Wanted:
    """Takes the steps of keys for those who wait. `rules()`: those with a plan, by their names.

    `give_up(key)` is called for a key that is left to a person: nobody needs to wait for it.
    """

    def __init__(
        self, deps: Probing, rules: Callable[[], Mapping[str, Rule]], give_up: Callable[[bytes], None]
    ) -> None:
        self._deps, self._rules, self._give_up = deps, rules, give_up
        self._clock = asyncio.get_running_loop().time
        # Until when somebody waits (the loop's time), and who takes the steps meanwhile.
        self._until_s: dict[bytes, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def want(self, key: bytes, until_s: float) -> None:
        """Take the steps of a key until `until_s` (the loop's time)."""
        if self._is_closed:
            return
        is_new = key not in self._until_s
        self._until_s[key] = max(until_s, self._until_s.get(key, 0.0))
        if is_new:
            task = asyncio.get_running_loop().create_task(self._take_steps(key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Begin no more steps. A question that is under way may end."""
        self._is_closed = True

    async def end(self) -> None:
        """Give up what is under way: its lease lapses."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take_steps(self, key: bytes) -> None:
        try:
            while (left_s := self._until_s[key] - self._clock()) > 0 and not self._is_closed:
                result = await self._take_step(key, left_s)
                if result.step is Step.LEFT:
                    self._give_up(key)
                if result.step in _ENDS:
                    return
                await asyncio.sleep(min(max(_LEAST_S, result.wait_s), _MOST_S, left_s))
        finally:
            del self._until_s[key]

    async def _take_step(self, key: bytes, left_s: float) -> StepResult:
        try:
            record = await self._deps.store.records.read(key)
            if record is None:
                return StepResult(Step.OVER)
            # By the rule of the original: the one that a duplicate came by may ask elsewhere, and for something else.
            rule = self._rules().get(record.kept.rule)
            if rule is None:
                return StepResult(Step.LEFT)
            return await take_step(self._deps, record, rule, By.DUPLICATE, left_s)
        except StoreError:
            return StepResult(Step.WAITS, _MOST_S)

    async def next_s(self, key: bytes, token: bytes, rule: str) -> float | None:
        """Return how long until a claim's next question is due, for who does not wait; None: it is a person's."""
        found = self._rules().get(rule)
        plan = found.policy.reconcile if found is not None else None
        if plan is None:
            return None
        marks, now_ms = self._deps.store.marks, self._deps.store.now_ms(key)
        return progress.next_s(await marks.get(progress.mark_name(key)), token, plan, now_ms)
