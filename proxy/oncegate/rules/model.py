"""A rule as it is used: which requests it is for and what holds for them. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from oncegate.messages.request_head import RequestHead
from oncegate.messages.target import normalized_path
from oncegate.rules.patterns import (
    host_includes,
    host_matches,
    path_includes,
    path_matcher,
    text_includes,
    text_matcher,
)
from oncegate.rules.policy import Policy
from oncegate.settings.addresses import Origin
from oncegate.settings.settings import Settings


class Match:
    """Which requests a rule is for; None: any."""

    def __init__(
        self,
        host: str | None = None,
        path: str | None = None,
        methods: frozenset[str] | None = None,
        headers: Iterable[tuple[bytes, str]] = (),
    ) -> None:
        self.host, self.path, self.methods, self.headers = host, path, methods, dict(headers)
        self._path = path_matcher(path) if path is not None else None
        self._headers = [(name, text_matcher(glob)) for name, glob in self.headers.items()]

    def __call__(self, head: RequestHead, path: bytes) -> bool:
        """Return whether a request is meant; `path` is its plain path. A header has to match in each of its lines."""
        if self.methods is not None and head.method not in self.methods:
            return False
        if self._path is not None and self._path.fullmatch(path) is None:
            return False
        if self.host is not None and not host_matches(self.host, head.host.decode("latin-1").lower()):
            return False
        for name, pattern in self._headers:
            values = head.fields.get(name)
            if values is None or not all(pattern.fullmatch(value.strip(b" \t")) for value in values):
                return False
        return True

    @property
    def asked(self) -> tuple[object, ...]:
        """All that is asked of a request, in one order."""
        return self.host, self.path, self.methods and sorted(self.methods), sorted(self.headers.items())

    def includes(self, other: "Match") -> bool:
        """Return whether whatever the other one means is surely meant by this one."""
        methods = self.methods is None or (other.methods is not None and self.methods >= other.methods)
        headers = all(name in other.headers for name in self.headers)
        return (
            methods
            and headers
            and host_includes(self.host, other.host)
            and path_includes(self.path, other.path)
            and all(text_includes(glob, other.headers[name]) for name, glob in self.headers.items())
        )


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where requests go, with its own pool. Equal ones share it. Times in seconds."""

    name: str
    origin: Origin
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None
    connect_timeout_s: float
    connect_retries: int
    max_connections: int
    reuse_idle_s: float


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the requests of one route. `settings` are those in effect for it."""

    match: Match
    policy: Policy
    upstream: Upstream
    settings: Settings
    set_host: str | None = None
    line: int = 0

    @property
    def name(self) -> str:
        return self.policy.rule


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules in order, and what holds where none matches."""

    rules: tuple[Rule, ...]
    default: Rule

    def __iter__(self) -> Iterator[Rule]:
        return iter((*self.rules, self.default))

    def choose(self, head: RequestHead) -> Rule:
        """Return the rule that decides on a request."""
        path = normalized_path(head.target)
        return next((rule for rule in self.rules if rule.match(head, path)), self.default)

    @property
    def naming(self) -> str:
        """Return a digest of how requests are named: which rule is for which of them, and what is key and scope there.

        Replicas where it differs know other keys. Nothing else of a rule is in it; nor is a rule that names as its
        requests would be named without it.
        """
        usual = _naming(self.default.policy)
        rules = [(rule.match.asked, _naming(rule.policy)) for rule in self.rules]
        while rules and rules[-1][1] == usual:
            rules.pop()
        return blake2b(repr((usual, rules)).encode(), digest_size=8).hexdigest()

    @property
    def acted_on(self) -> frozenset[bytes]:
        """All header fields that some rule acts on, in lower case."""
        policies = [rule.policy for rule in self]
        keys = {name for policy in policies if policy.sources for name in policy.sources.headers}
        named = {name for policy in policies for name in (policy.key_header, *policy.scope_headers)}
        return self.matched | keys | named

    @property
    def matched(self) -> frozenset[bytes]:
        """The header fields, in lower case, by whose values rules are chosen."""
        return frozenset(name for rule in self for name in rule.match.headers)


def _naming(policy: Policy) -> tuple[object, ...]:
    """Return what decides on the name of a key."""
    sources = policy.sources
    key = (
        ([[source.text for source in one] for one in sources.alternatives], sources.retry_count_header)
        if sources
        else policy.key_header
    )
    scope = (policy.scope_headers, [source.text for source in policy.scope_sources])
    return sorted(policy.methods), key, policy.namespace, scope
