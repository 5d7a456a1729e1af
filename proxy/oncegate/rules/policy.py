"""The policy for a request: the choices of settings, preset and rule, resolved to one record. Pure."""

from dataclasses import dataclass, field

from oncegate.adaptation.adaptation import NOTHING, Adaptation
from oncegate.adaptation.heartbeats import Heartbeats
from oncegate.decision import HOLD
from oncegate.keys.fingerprint_parts import has_content
from oncegate.keys.sources import KeySources, Segment, Source
from oncegate.keys.tenants import TenantFields
from oncegate.probing.plan import Plan
from oncegate.rules.prices import Prices
from oncegate.rules.statuses import AMBIGUOUS_STATUSES, RELEASE_STATUSES, Statuses

DEFAULT_STATUSES = Statuses(RELEASE_STATUSES, AMBIGUOUS_STATUSES)


@dataclass(frozen=True, slots=True)
class Policy:
    """What happens to the requests of a rule, or of the settings alone. Header names are lower-case.

    `methods`: those that are guarded. `mode`: the wire value of an UnknownMode. `unknown_retention_ms`: how long a key
    that is in flight or unknown is kept. `tombstone_ms`: how long a key is refused after its retention. `destination`:
    where requests go, as far as it is known without one: the upstream's name and a Host that is set. Empty for the
    upstream of the settings. `max_request_bytes`: 0 for the worker's own limit. `bypass`: a request that the store
    cannot claim is forwarded without protection. `joins_duplicates`: a duplicate gets the response of its original
    while that comes. `rule`, `preset`: their names, empty without one. `stable_schemes`:
    lower-case Authorization schemes whose credentials stay the same, beside the known ones. `adaptation`: what its
    responses say otherwise for each requester.

    Only a rule can set the following. `sources`: the key, where it is not `key_header` alone. `scope_sources`:
    sources beside the headers that identify the tenant. `fingerprint`: the parts that enter it, None for all;
    `fingerprint_sources`: those of them that name a header or a value of the body.
    `forward_key`: the name under which the upstream gets the key's header, empty for none, None for the same name.
    `json_rpc`: bodies are messages of JSON-RPC, so that a request has an id, and a response says what it means.
    `pass_bad_keys`: a request without a usable key is forwarded without protection. `upstream_idempotent`: the
    upstream recognizes keys itself, so that a lost request can be sent again, `upstream_key_retention_ms` from the
    first claim of its key on. `resend_ms`: that time where a retry does so, too, 0 where it does not.
    `in_flight_status`: for a duplicate
    while the original is running. `counts_tokens`: metrics count the tokens in its responses as saved by replays.
    `pass_interim`: the upstream's interim responses go on to the client. `heartbeats`: signs of life in silence.
    `cancel_grace_s`: an exchange ends after so long without readers, None for never.
    `asks`: questions about its keys are answered; `resume_by_key`: also with the address of the response, for who shows
    no more than key and credential. `respond_async`: a client that prefers so gets a 202 at once.
    `resume`: a request with Last-Event-ID continues the stream that its key names, and is never executed. `sse_ids`:
    events get ids.
    `note`: what of a request is kept with its record, for people to find it by. `reconcile`: how the API is asked about
    its unknown keys. `token_prices`: of what replays save.
    `resumable`: its answers name an address at which their response is read again, and `cancellable` one at which its
    execution is stopped. `pages`: whether people read oncegate's own answers, None where each request tells.
    """

    methods: frozenset[str]
    key_header: bytes
    key_required: bool
    namespace: bytes
    scope_headers: tuple[bytes, ...]
    pass_host: bool
    retention_ms: int
    unknown_retention_ms: int
    lease_ms: int
    wait_for_duplicates: bool
    wait_max_s: float
    max_stored_bytes: int
    joins_duplicates: bool = False
    tombstone_ms: int = 0
    statuses: Statuses = DEFAULT_STATUSES
    mode: bytes = HOLD
    rule: str = ""
    preset: str = ""
    sources: KeySources | None = None
    scope_sources: tuple[Source, ...] = ()
    fingerprint: frozenset[str] | None = None
    fingerprint_sources: tuple[Source, ...] = ()
    json_rpc: bool = False
    pass_bad_keys: bool = False
    forward_key: bytes | None = None
    upstream_idempotent: bool = False
    # As that of Stripe, which keeps keys for at least 24 hours.
    upstream_key_retention_ms: int = 86_400_000
    in_flight_status: int = 409
    max_request_bytes: int = 0
    counts_tokens: bool = False
    bypass: bool = False
    pages: bool | None = None
    destination: bytes = b""
    stable_schemes: tuple[bytes, ...] = ()
    adaptation: Adaptation = NOTHING
    cancel_grace_s: float | None = None
    pass_interim: bool = False
    heartbeats: Heartbeats | None = None
    resume: bool = False
    sse_ids: bool = False
    note: Source | None = None
    reconcile: Plan | None = None
    resumable: bool = False
    cancellable: bool = False
    asks: bool = False
    resume_by_key: bool = False
    respond_async: bool = False
    token_prices: Prices = ()
    # What `scope_headers`, `scope_sources` and `stable_schemes` come to for a request.
    tenant: TenantFields = field(init=False, repr=False, compare=False)
    # Whether a request that passes through ends when its client leaves. With JSON-RPC that cancels a call: on the wire
    # of MCP's protocol 2026-07-28 nothing else does.
    ends_with_client: bool = field(init=False, repr=False, compare=False)
    # Whoever shows that digest has sent the request, and may read its response.
    keeps_body_digest: bool = field(init=False, repr=False, compare=False)
    # Whether something of its requests is read for their records.
    keeps_more: bool = field(init=False, repr=False, compare=False)
    resend_ms: int = field(init=False, repr=False, compare=False)
    # Whether oncegate reads its responses, so that the API is asked for them without a content coding.
    asks_identity: bool = field(init=False, repr=False, compare=False)

    @property
    def key_headers(self) -> tuple[bytes, ...]:
        """The lower-case names of the headers that are a key alone, in their order: the first that came is the key."""
        return (self.key_header,) if self.sources is None else self.sources.leading_headers

    @property
    def reads_path(self) -> bool:
        """Whether a segment of the path is in the key or in the scope."""
        sources = [*self.scope_sources, *(self.sources.all if self.sources is not None else ())]
        return any(isinstance(source.kind, Segment) for source in sources)

    @property
    def uses_own_path(self) -> bool:
        """Whether its clients are answered below `ONCEGATE_OWN_PATH`."""
        return self.resumable or self.cancellable or self.asks or self.respond_async

    def __post_init__(self) -> None:
        object.__setattr__(self, "tenant", TenantFields(self.scope_headers, self.stable_schemes))
        object.__setattr__(self, "ends_with_client", self.json_rpc or self.cancel_grace_s is not None)
        object.__setattr__(self, "keeps_body_digest", self.asks and self.resumable and not self.resume_by_key)
        # Whoever gets the key has to get the same content with it. In the mode retry, a request is executed again.
        resends = self.upstream_idempotent and self.mode == HOLD and has_content(self.fingerprint)
        object.__setattr__(self, "resend_ms", self.upstream_key_retention_ms if resends else 0)
        keeps_values = self.reconcile is not None and bool(self.reconcile.keep)
        object.__setattr__(self, "keeps_more", self.note is not None or keeps_values or resends)
        object.__setattr__(self, "asks_identity", self.json_rpc or self.resume or self.sse_ids or self.resumable)
