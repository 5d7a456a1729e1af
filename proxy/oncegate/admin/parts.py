"""What the admin listener shows, as the process that has it gives it: a single worker, or the supervisor of several."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from oncegate.observe.metrics import Metrics
from oncegate.observe.reconciling import ReconcilingCounts
from oncegate.rules.model import Rules
from oncegate.settings.settings import Settings

Value = TypeVar("Value")


@dataclass(slots=True)
class AdminParts:
    """What the routes of the admin listener are made from. A reload replaces `settings`.

    `metrics` returns the sums of all workers. `not_ready_reasons` returns why the proxy is not ready, an empty list if
    it is. `notices` returns what an operator should look at although it is ready. `rules` returns the rules in effect.
    """

    settings: Settings
    store_url: str
    log: Any
    metrics: Callable[[], Awaitable[Metrics]]
    not_ready_reasons: Callable[[], Awaitable[list[str]]]
    notices: Callable[[], Awaitable[list[str]]]
    rules: Callable[[], Rules]
    # What a person settles is counted here.
    reconciling: ReconcilingCounts


def at_once(value: Callable[[], Value]) -> Callable[[], Awaitable[Value]]:
    """Return what waits for a value that is there already."""

    async def waited() -> Value:
        return value()

    return waited
