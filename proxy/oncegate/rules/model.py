"""Rules as requests use them: which requests a rule matches, and its policy and upstream. Pure."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path

from oncegate.adaptation.error_pages import ErrorPages
from oncegate.adaptation.preflight import Preflight, read_preflight
from oncegate.keys.sources import Header
from oncegate.messages.request_head import LAST_EVENT_ID, RequestHead
from oncegate.messages.target import normalized_host, normalized_path
from oncegate.rules.body_conditions import BodyConditions, Document
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
    """The conditions by which a rule matches a request. None, or no headers: any request.

    `host`, `path` and the values of `headers` are patterns of `patterns.py`; header names are lower-case. `when`: what
    the body must say, beside the head.
    """

    def __init__(
        self,
        host: str | None = None,
        path: str | None = None,
        methods: frozenset[str] | None = None,
        headers: Iterable[tuple[bytes, str]] = (),
        when: BodyConditions | None = None,
    ) -> None:
        self.when = when
        self.host, self.path, self.methods, self.headers = host, path, methods, dict(headers)
        self._path = path_matcher(path) if path is not None else None
        self._headers = [(name, text_matcher(glob)) for name, glob in self.headers.items()]

    def __call__(self, head: RequestHead, path: bytes) -> bool:
        """Return whether a request's head matches. `path`: its normalized path. A header must match in each line."""
        if self.methods is not None and head.method not in self.methods:
            return False
        if self._path is not None and self._path.fullmatch(path) is None:
            return False
        if self.host is not None and not host_matches(self.host, normalized_host(head.host).decode("latin-1")):
            return False
        for name, pattern in self._headers:
            values = head.fields.get(name)
            # A field may come in several lines, and an upstream may act on any one of them.
            if values is None or not all(pattern.fullmatch(value.strip(b" \t")) for value in values):
                return False
        return True

    def is_possible(self, head: RequestHead, path: bytes, others: Collection[bytes]) -> bool:
        """Return whether a head may match that is known in part. `others`: fields that it may have with any value."""
        headers = [(name, glob) for name, glob in self.headers.items() if name not in others]
        return Match(self.host, self.path, self.methods, headers)(head, path)

    @property
    def shown(self) -> str:
        """All conditions as people read them."""
        methods = ",".join(sorted(self.methods)) if self.methods else "*"
        headers = [f"{header.decode()}: {glob}" for header, glob in self.headers.items()]
        globs = self.when.globs.items() if self.when else ()
        bodies = [f"body:{place}: {' or '.join(texts)}" for place, texts in globs]
        return " ".join([methods, (self.host or "") + (self.path or "/**"), *headers, *bodies])

    @property
    def conditions(self) -> tuple[object, ...]:
        """All conditions in a fixed order, for comparison."""
        # Sorted: the order of a set differs from process to process, and replicas compare these values.
        of_head = self.host, self.path, self.methods and sorted(self.methods), sorted(self.headers.items())
        # Without `when` the conditions are those of the versions that did not have it.
        return of_head if self.when is None else (*of_head, sorted(self.when.globs.items()))

    def includes(self, other: "Match") -> bool:
        """Return whether each request that `other` matches is surely matched here, too; False where not certain."""
        methods = self.methods is None or (other.methods is not None and self.methods >= other.methods)
        headers = all(name in other.headers for name in self.headers)
        return (
            methods
            and headers
            and (self.when is None or (other.when is not None and self.when.includes(other.when)))
            and host_includes(self.host, other.host)
            and path_includes(self.path, other.path)
            and all(text_includes(glob, other.headers[name]) for name, glob in self.headers.items())
        )


@dataclass(frozen=True, slots=True)
class Upstream:
    """An API behind the proxy. Equal upstreams share one connection pool.

    `known_as`: what tells it from others in fingerprints: its oldest name, or its URL where it has no name. Empty for
    the upstream of the settings, whose URL may change.
    `certificates`: a digest of the files that it names; with other certificates, it gets another pool.
    `direct`: nothing stands between, so that its responses are those of the API. `via`: the names that the API itself
    writes into `Via`.
    """

    name: str
    origin: Origin
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None
    connect_timeout_s: float
    connect_retries: int
    max_connections: int
    reuse_idle_s: float
    rest_s: float
    spare_connections: int | None
    certificates: str = ""
    known_as: str = ""
    direct: bool = False
    via: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What logs and metrics call it: its name, or its host and port where it has no name."""
        return self.name or self.origin.authority


@dataclass(frozen=True, slots=True)
class Rule:
    """The policy and the upstream of one route. `settings`: those in effect for it. `line`: its place in the file."""

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
    """All rules in order, and the default for requests that none matches. `pages`: what people read, under any rule.

    `with_key_in_path`: the names of those that take a key or a scope from the path, which may be private.
    """

    rules: tuple[Rule, ...]
    default: Rule
    pages: ErrorPages = field(default_factory=ErrorPages)
    with_key_in_path: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = frozenset(rule.name for rule in self if rule.policy.reads_path)
        object.__setattr__(self, "with_key_in_path", names)

    def __iter__(self) -> Iterator[Rule]:
        return iter((*self.rules, self.default))

    def choose(self, head: RequestHead, document: Document | None = None) -> Rule | None:
        """Return the first rule that matches a request, else the default.

        `document`: that of its body. None: it is not here yet; the result is None then where it decides.
        """
        # The normalized path (RFC 3986, section 6.2.2): `/x/../v1/charges` must not evade the rule for `/v1/charges`.
        path = normalized_path(head.target)
        for rule in self.rules:
            if not rule.match(head, path):
                continue
            if (when := rule.match.when) is None:
                return rule
            if document is None:
                return None
            if not when.unmet(document):
                return rule
        return self.default

    def possible(self, head: RequestHead, others: Collection[bytes]) -> Iterator[Rule]:
        """Yield the rules that a request may match whose head is known in part, up to the one that it surely matches.

        `others`: the lower-case names of fields that it may have with any value.
        """
        path = normalized_path(head.target)
        for rule in self.rules:
            if rule.match.is_possible(head, path, others):
                yield rule
                if rule.match.when is None and not rule.match.headers:
                    return
        yield self.default

    def for_preflight(self, head: RequestHead) -> tuple[Rule, Preflight | None] | None:
        """Return the rule of what a preflight asks for, and what may be granted; None for any other request.

        A page gets no leave to send a request that could fall under a rule which does not list its origin.
        """
        asked = read_preflight(head)
        if asked is None:
            return None
        rules = list(self.possible(head._replace(method=asked.method.decode()), asked.names))
        cors = [one for rule in rules if (one := rule.policy.adaptation.cors) and asked.origin in one.origins]
        return rules[-1], Preflight(asked, tuple(cors)) if len(cors) == len(rules) else None

    def passed_over(self, head: RequestHead, document: Document) -> Iterator[tuple[Rule, str]]:
        """Yield the rules that match a request's head but not its body, before the one that is chosen; and why."""
        path, chosen = normalized_path(head.target), self.choose(head, document)
        for rule in takewhile(lambda rule: rule is not chosen, self.rules):
            if rule.match.when is not None and rule.match(head, path):
                yield rule, rule.match.when.unmet(document)

    @property
    def identity_digest(self) -> str:
        """A digest of how the rules name keys: the conditions of each rule, and its key, scope and methods.

        Two replicas with different digests do not find each other's records.
        """
        default = _identity(self.default.policy)
        rules = [(rule.match.conditions, _identity(rule.policy)) for rule in self.rules]
        # The last rules name keys as the default does: without them nothing would be named differently.
        while rules and rules[-1][1] == default:
            rules.pop()
        return blake2b(repr((default, rules)).encode(), digest_size=8).hexdigest()

    @property
    def acted_on(self) -> frozenset[bytes]:
        """The lower-case names of all header fields that some rule acts on."""
        policies = [rule.policy for rule in self]
        keys = {name for policy in policies if policy.sources for name in policy.sources.headers}
        headers = {name for policy in policies for name in (policy.key_header, *policy.scope_headers)}
        parts = {
            source.kind.name
            for one in policies
            for source in one.fingerprint_sources
            if isinstance(source.kind, Header)
        }
        adapted = {name for policy in policies for name in policy.adaptation.acted_on}
        beaten = {name for policy in policies if policy.heartbeats for name in policy.heartbeats.acted_on}
        resumed = {LAST_EVENT_ID} if any(policy.resume for policy in policies) else frozenset[bytes]()
        return self.matched | beaten | keys | headers | parts | adapted | resumed

    @property
    def matched(self) -> frozenset[bytes]:
        """The lower-case names of the header fields by which rules match."""
        return frozenset(name for rule in self for name in rule.match.headers)


def _identity(policy: Policy) -> tuple[object, ...]:
    """Return all of a policy that decides how a key is named."""
    sources = policy.sources
    key = (
        (
            [[source.text for source in one] for one in sources.alternatives],
            sources.retry_count_header,
            *["unmarked is new"] * sources.unmarked_is_new,
        )
        if sources
        else policy.key_header
    )
    # Retention, waits and upstreams are left out: they name no key, and may differ while a change is rolled out.
    scope = (policy.scope_headers, [source.text for source in policy.scope_sources])
    where = (policy.destination, policy.pass_host) if sources and sources.reads_destination else None
    named = sorted(policy.methods), key, policy.namespace, scope, where
    # A derived key of JSON-RPC is the fingerprint.
    is_of_parts = policy.json_rpc and sources is not None and sources.window_ms
    return (*named, sorted(policy.fingerprint or ())) if is_of_parts else named
