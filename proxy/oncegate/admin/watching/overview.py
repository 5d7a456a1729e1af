"""What every page shows of this moment, asked for once a second at most, however many people look."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from oncegate.admin.parts import AdminParts
from oncegate.admin.watching import history
from oncegate.admin.watching.history import History, Reading
from oncegate.admin.watching.store_view import StoreView
from oncegate.operating.errors import OperatorError
from oncegate.operating.worklist import has_whole_index, indexed_counts
from oncegate.rules.prices import Prices
from oncegate.settings.errors import SettingsError
from oncegate.store.open_keys.places import OpenCount, OpenCounts
from oncegate.store.record_view import OpenKind

LOOK_S = 1.0
# Looks take at most this share of the time, and are no further apart than that: counts of very many keys take longer.
SHARE, LONGEST_S = 0.05, 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """What the store and the metrics said at one moment.

    `store_error`: why the store said nothing; `open` then has what it said last. `reasons`: why the proxy is not ready.
    `notices`: what an operator should look at although it is. `is_whole`: whether the index has every open key.
    `proxies`: the names of the processes that serve on this store.
    """

    open: OpenCounts = field(default_factory=dict)
    store_error: str = ""
    reasons: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    is_whole: bool = True
    proxies: list[str] = field(default_factory=list)

    @property
    def undecided(self) -> int:
        """How many keys a person may have to decide."""
        return self._of(OpenKind.UNKNOWN).keys + self._of(OpenKind.LAPSED).keys

    @property
    def oldest_ms(self) -> int:
        return max(self._of(OpenKind.UNKNOWN).oldest_ms, self._of(OpenKind.LAPSED).oldest_ms)

    @property
    def lapsed(self) -> int:
        return self._of(OpenKind.LAPSED).keys

    @property
    def waived(self) -> int:
        return self._of(OpenKind.WAIVED).keys

    @property
    def in_flight(self) -> int:
        return self._of(OpenKind.IN_FLIGHT).keys

    def _of(self, kind: OpenKind) -> OpenCount:
        return self.open.get(kind, OpenCount())


class Overview:
    """Looks at the store and the metrics for all pages, and remembers the metrics of the last ten minutes."""

    def __init__(self, parts: AdminParts) -> None:
        self._parts = parts
        self.history, self.store = History(), StoreView(lambda: parts.settings)
        self._look, self._next_at = Look(), 0.0
        self._looking: asyncio.Task[None] | None = None
        # Whether the index has every open key. Once it has, it stays so.
        self._is_whole = False
        # What tokens cost under each rule that says so.
        self.prices: dict[str, Prices] = {}
        self._prices_due = 0.0
        # How often the store was asked.
        self.store_questions = 0

    @property
    def last(self) -> Look:
        """The last look, without a new one."""
        return self._look

    async def look(self) -> Look:
        """Return a look that is at most LOOK_S old, or older where the store needs long for one."""
        loop = asyncio.get_running_loop()
        if self._looking is None and loop.time() >= self._next_at:
            self._looking = loop.create_task(self._take())
        if self._looking is not None:
            # Others wait for it, too.
            await asyncio.shield(self._looking)
        return self._look

    def forget(self) -> None:
        """Let the next look be a new one: something was changed."""
        self._next_at = 0.0

    async def _take(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            counts, proxies, error = self._look.open, self._look.proxies, ""
            self.store_questions += 1
            try:
                async with self.store.opened() as store:
                    self._is_whole = self._is_whole or await has_whole_index(store)
                    counts = await indexed_counts(store)
                    proxies = await store.records.proxies()
            except OperatorError as failed:
                error = str(failed)
            await self._read()
            self._read_prices(began)
            reasons, notices = await self._parts.not_ready_reasons(), await self._parts.notices()
            self._look = Look(counts, error, reasons, notices, self._is_whole or bool(error), proxies)
        finally:
            self._next_at = began + min(LONGEST_S, max(LOOK_S, (loop.time() - began) / SHARE))
            self._looking = None

    async def _read(self) -> None:
        metrics = await self._parts.metrics()
        self.history.note(Reading(metrics.collect(), asyncio.get_running_loop().time()))

    def _read_prices(self, now: float) -> None:
        """Read the rules again, which a supervisor takes from their file."""
        if now >= self._prices_due:
            self._prices_due = now + history.PERIOD_S
            with suppress(SettingsError):
                self.prices = {rule.name: rule.policy.token_prices for rule in self._parts.rules()}

    async def run(self) -> None:
        """Read the metrics once a period, until cancelled."""
        while True:
            await self._read()
            await asyncio.sleep(history.PERIOD_S)

    async def close(self) -> None:
        await self.store.close()
