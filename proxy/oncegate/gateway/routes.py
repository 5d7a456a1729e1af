"""Where a request goes and how it is treated there: a policy with what carries it out."""

from collections.abc import Mapping
from dataclasses import dataclass

from oncegate.gateway.exchange import ExchangeDeps
from oncegate.messages.request_head import RequestHead
from oncegate.rules.model import Rules
from oncegate.rules.policy import Policy


@dataclass(frozen=True, slots=True)
class Route:
    """One way through the proxy. `host`: what the upstream's Host field says; `prefix`: of its paths."""

    policy: Policy
    deps: ExchangeDeps
    host: bytes
    prefix: bytes


class Routes:
    """The routes of a rules file; by the rules' names, the default's is empty."""

    def __init__(self, rules: Rules, by_name: Mapping[str, Route]) -> None:
        self._rules, self._by_name = rules, by_name
        self.default = by_name[""]

    def __call__(self, head: RequestHead) -> Route:
        return self._by_name[self._rules.choose(head).name]

    @property
    def headers(self) -> frozenset[bytes]:
        """The header fields, in lower case, that are looked at to choose."""
        return self._rules.matched

    @property
    def chosen(self) -> bool:
        """Whether there is anything to choose from."""
        return len(self._by_name) > 1
