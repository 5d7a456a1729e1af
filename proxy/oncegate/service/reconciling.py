"""What asks the API about unknown keys in one worker: nothing, until a rule says how."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from oncegate.observe.metrics import Metrics
from oncegate.rules.model import Rule, Rules
from oncegate.store.store import Store
from oncegate.store.waiters import Waiters, Woken

if TYPE_CHECKING:
    from oncegate.reconcile.janitor import Janitor
    from oncegate.reconcile.pace import Pace
    from oncegate.reconcile.questions import Asking
    from oncegate.reconcile.wanted import Wanted


class Reconciling:
    """Asks by the rules in effect. As `Verdicts` for the request path. `log`: a logger of structlog."""

    def __init__(self, store: Store, waiters: Waiters, metrics: Metrics, log: Any) -> None:
        self._store, self._waiters, self._metrics, self._log = store, waiters, metrics, log
        self._rules: dict[str, Rule] = {}
        self._has_plans = asyncio.Event()
        # Writes the lines about probes that are waiting.
        self._flush: Callable[[], None] = lambda: None
        self._parts: tuple[Asking, Pace, Wanted, Janitor] | None = None

    def follow(self, rules: Rules) -> None:
        """Ask by these rules from now on. A question that is under way ends by those before."""
        self._rules = {rule.policy.rule: rule for rule in rules if rule.policy.reconcile is not None}
        for name in self._rules:
            self._metrics.reconciling.follow(name)
        if self._rules:
            self._parts = self._parts or self._made()
            self._has_plans.set()

    def _made(self) -> "tuple[Asking, Pace, Wanted, Janitor]":
        # Here, because most proxies have no such rule.
        from oncegate.observe.reconciling_log import ReconcilingLog
        from oncegate.reconcile.janitor import Janitor
        from oncegate.reconcile.pace import Pace
        from oncegate.reconcile.questions import Asking
        from oncegate.reconcile.step import Probing
        from oncegate.reconcile.wanted import Wanted

        loop = asyncio.get_running_loop()
        asking, pace = Asking(), Pace(self._store, loop.time)
        report = ReconcilingLog(self._metrics.reconciling, self._log, loop)
        self._flush = report.flush
        deps = Probing(self._store, asking, pace, report, self._ended)
        wanted = Wanted(deps, lambda: self._rules, lambda key: self._waiters.wake(key, Woken.NO_VERDICT))
        return asking, pace, wanted, Janitor(deps, lambda: self._rules, self._log.warning)

    def _ended(self, key: bytes, freed: bool) -> None:
        self._waiters.claim_ended(key, not_sent=freed, declined=False)

    async def run(self) -> None:
        """Work through the unknown keys, until cancelled."""
        while True:
            await self._has_plans.wait()
            self._has_plans.clear()
            if self._parts is not None:
                await self._parts[3].run()

    def want(self, key: bytes, until_s: float) -> None:
        if self._parts is not None:
            self._parts[2].want(key, until_s)

    async def next_s(self, key: bytes, token: bytes, rule: str) -> float | None:
        return None if self._parts is None else await self._parts[2].next_s(key, token, rule)

    def open_breakers(self) -> dict[str, bool]:
        """Return whether the breaker of each upstream that was asked keeps questions back now."""
        return {} if self._parts is None else self._parts[1].open_breakers()

    def close(self) -> None:
        """Begin no more questions. One that is under way may end while the worker does."""
        if self._parts is not None:
            self._parts[2].close()
            self._parts[3].close()

    async def end(self) -> None:
        """Give up what is under way. Its lease lapses, and another worker asks again."""
        if self._parts is not None:
            await self._parts[2].end()
            await self._parts[0].close()
        self._flush()
