"""Where a request goes and how it is treated there: a policy with what carries it out."""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from oncegate.adaptation.preflight import Preflight
from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.ticker import Ticker
from oncegate.downstream.request import Request
from oncegate.gateway.cancelling import Cancellations
from oncegate.messages.request_head import ForwardedInfo, RequestHead, renamed, request_head, without
from oncegate.messages.target import normalized_path
from oncegate.rules.body_conditions import Document
from oncegate.rules.model import Rules
from oncegate.rules.policy import Policy
from oncegate.store.kept import Kept, pack_kept
from oncegate.store.leases import Leases
from oncegate.store.store import Store
from oncegate.store.waiters import Waiters
from oncegate.streams.capability import rule_mark
from oncegate.streams.feeds import Feeds
from oncegate.streams.followers import Followers
from oncegate.streams.links import Links
from oncegate.upstream.pool import Pool

# A field value that no request has: it marks the place of one that differs from request to request.
GAP = b"\0"
# A head as it goes to the upstream, in the pieces around its gaps and behind them the client's address. Its lines
# depend on whether the client is trusted, and on its scheme.
ForwardedPieces = dict[tuple[bool, bytes], list[bytes]]


@dataclass(slots=True)
class UsualTime:
    """How long the executed requests of one rule usually take, by those that this worker has seen; 0 before the first.

    It outlives a reload of the rules, under the rule's name.
    """

    seconds: float = 0.0


class Verdicts(Protocol):
    """What becomes of unknown keys about which the API is asked. `rule` is the name of a rule that says how."""

    def want(self, key: bytes, until_s: float) -> None:
        """Ask about a key as soon as that is due, until `until_s` (the loop's time), because somebody waits."""

    async def next_s(self, key: bytes, token: bytes, rule: str) -> float | None:
        """Return how long until the API is asked about a claim; None: it is not, and the key is left to a person."""


@dataclass(frozen=True, slots=True)
class ExchangeDeps:
    """What every exchange on a route works with. Times in seconds; `clock` is the event loop's.

    `background` finishes work after its request was answered. `silence_s` is the longest silence of the upstream,
    `reuse_idle_s` the longest idle time of a connection that is used again, `settle_timeout_s` how long the store is
    asked again to take a response, `store_timeout_s` the same for all that nobody waits for. `longest_s`: no await of
    an exchange takes longer. `usual`: how long the rule's requests usually take, for Retry-After.
    `ticker`: times what is recorded. `wait_ended` counts a wait by how it ended (the label of a Woken).
    `resent(age_s)` counts an unknown key of that age that was settled by sending its request once more.
    `notes_releases`: a released claim leaves a note. `verdicts`: None where nobody asks about unknown keys.
    """

    store: Store
    leases: Leases
    waiters: Waiters
    cancellations: Cancellations
    feeds: Feeds
    followers: Followers
    wait_ended: Callable[[str], None]
    pool: Pool
    memory: MemoryBudget
    ticker: Ticker
    background: Callable[[Coroutine[Any, Any, Any]], None]
    clock: Callable[[], float]
    silence_s: float
    reuse_idle_s: float
    store_timeout_s: float
    settle_timeout_s: float
    longest_s: float
    usual: UsualTime
    notes_releases: bool = False
    resent: Callable[[float], None] = lambda _: None
    verdicts: Verdicts | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One way through the proxy. `host` is the upstream's Host field, `prefix` the beginning of its paths.

    `upstream`: its name for operators, or its host and port. `origin`: its URL.
    """

    policy: Policy
    deps: ExchangeDeps
    host: bytes
    prefix: bytes
    origin: str
    # Whether a head decides the same about its request whatever its key is.
    is_key_independent: bool
    upstream: str = ""
    # The header of a request's id (lower case), which oncegate writes anew; empty where it does not.
    request_id_name: bytes = b""
    # To the addresses of its responses; None where it gives none.
    links: Links | None = None
    # Makes the digest of a body that is kept with its key, None where none is.
    digest_body: Callable[[Iterable[bytes]], bytes] | None = None
    # With each record of the route, packed. The upstream of the settings need not be named.
    kept: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        upstream = self.upstream if self.policy.destination else ""
        object.__setattr__(self, "kept", pack_kept(Kept(rule=self.policy.rule, upstream=upstream)))

    def id_line(self, request: Request) -> bytes:
        """Return the line that tells the upstream the id of a request; nothing where its header has the key."""
        return request.id_line if self.request_id_name else b""

    def forwarded_head(self, head: RequestHead, info: ForwardedInfo, body_bytes: int | None) -> bytes:
        """Return the open head of a request for the upstream; `body_bytes` None: chunked, negative: no body."""
        policy = self.policy
        if self.request_id_name in head.fields:
            head = without(head, self.request_id_name)
        if policy.forward_key is not None:
            head = head._replace(pairs=renamed(head.pairs, policy.key_header, policy.forward_key))
        host = head.host if policy.pass_host and head.host else self.host
        return request_head(head, info, host, self.prefix, body_bytes)

    def forwarded_pieces(
        self, head: RequestHead, info: ForwardedInfo, body_bytes: int | None, ready: ForwardedPieces
    ) -> list[bytes]:
        """Return `forwarded_head` of a head with GAP in its gaps, in pieces; they are kept in `ready`."""
        kind = info.trusted, info.scheme
        if (pieces := ready.get(kind)) is None:
            forwarded = self.forwarded_head(head, replace(info, client=GAP), body_bytes)
            pieces = ready[kind] = forwarded.split(GAP)
        return pieces


class Routes:
    """The routes of a rules file, by the names of their rules. The default's name is empty."""

    def __init__(self, rules: Rules, by_name: Mapping[str, Route]) -> None:
        self._rules, self._by_name = rules, by_name
        self.pages = rules.pages
        self.default = by_name[""]
        self.has_rules = len(by_name) > 1
        self._by_mark = {rule_mark(name): route for name, route in by_name.items() if route.links is not None}
        self._has_cors = any(rule.policy.adaptation.cors is not None for rule in rules)

    def choose(self, head: RequestHead, document: Document | None = None) -> Route | None:
        """Return the route of the first rule that matches a request; None where its body decides and is not here."""
        rule = self._rules.choose(head, document)
        return None if rule is None else self._by_name[rule.name]

    def chosen(self, head: RequestHead, document: Document) -> Route:
        """Return the route of a request whose body is here, or will not be read."""
        route = self.choose(head, document)
        assert route is not None
        return route

    def by_mark(self, mark: bytes) -> Route | None:
        """Return the route of the rule with this `rule_mark`, None for none that gives addresses."""
        return self._by_mark.get(mark)

    def for_preflight(self, head: RequestHead) -> tuple[Route, Preflight | None] | None:
        """Return the route of what a preflight asks for, and what may be granted; None for any other request."""
        found = self._rules.for_preflight(head) if self._has_cors else None
        return (self._by_name[found[0].name], found[1]) if found is not None else None

    def first_possible(self, head: RequestHead) -> Route:
        """Return the route of the first rule that a request matches, if its body meets the conditions."""
        path = normalized_path(head.target)
        return next(self._by_name[rule.name] for rule in self._rules if rule.match(head, path))


def is_key_independent(policy: Policy, rules: Rules) -> bool:
    """Return whether a policy treats requests alike that differ in the value of the default key header alone.

    Not so where the key is elsewhere, where the header is forwarded under another name, or where it chooses the rule.
    """
    key_header = rules.default.policy.key_header
    plain = policy.sources is None and policy.forward_key is None and policy.key_header == key_header
    return plain and key_header not in rules.matched
