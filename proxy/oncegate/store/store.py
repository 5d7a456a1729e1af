"""The store: the verbs on the record of a key, whatever keeps it.

`Store` is the only door to a store, and `claim` is the only function that makes a `Claim`. No verb raises for a store
that is down: the outcome is a value of `results.py`. A call that was not confirmed is repeated with the same token
within the caller's time, so that each verb must be safe to repeat, and also safe when it arrives late.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from oncegate.hostnames.resolver import Resolver
from oncegate.keys.digests import Scope
from oncegate.store.membership import Membership
from oncegate.store.open_keys.records import Records
from oncegate.store.record import Claim, ClaimRequest, StoredResponse
from oncegate.store.record_view import Deciding, RecordView
from oncegate.store.results import (
    AppendStatus,
    ClaimResult,
    DropStatus,
    Followed,
    NotClaimed,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
)
from oncegate.store.stages import CLAIMED, Stage

# That are taken from a mailbox at once.
MOST_NOTES = 100

Settling = Coroutine[Any, Any, SettleResult]
Claiming = Coroutine[Any, Any, ClaimResult]
Background = Callable[[Coroutine[Any, Any, Any]], None]
# By a verb: called with the seconds that a call took; under `connect` with those of each new connection to a server.
Observers = Mapping[str, Callable[[float], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresOptions:
    """What only a store in PostgreSQL is told. `audit_key`: of the digests in the audit trail; empty for none."""

    schema: str = "oncegate"
    audit: bool = True
    audit_key: bytes = b""
    # Who the audit trail says acted: an operator. Empty for a proxy, whose tokens name it.
    actor: bytes = b""
    # Of all that is stored; 0 for no limit.
    max_bytes: int = 0
    # Which standby a failover promotes: `any`, or `most-advanced`.
    promotion: str = "any"


class StoreLogin(NamedTuple):
    """What connections authenticate with: the credentials in a URL, and certificates for TLS, as paths.

    In a URL of PostgreSQL are the paths as well.
    """

    url: str
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class LoginRefused(Exception):
    """A server refuses a login. The text is for operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """What a store is told when it is opened. Times in the unit of their name."""

    url: str
    # Of a claim, and of one try of every other call.
    timeout_ms: int
    # Of a release in the background.
    patience_s: float
    # Finishes work that nobody waits for.
    background: Background
    observers: Observers = field(default_factory=dict)
    # Called with every call that is repeated.
    retried: Callable[[], None] = lambda: None
    # Called with an event and its fields, such as a failover; the second with one that needs nobody's attention.
    log: Callable[..., None] = lambda *_, **__: None
    log_info: Callable[..., None] = lambda *_, **__: None
    # Where a claim has to be before it counts: memory, fsync, or replicated.
    durability: str = "memory"
    # With it the store is watched for losses, and for proxies that name keys in another way.
    member: Membership | None = None
    # Called when claims stop for a while.
    breaker_opened: Callable[[], None] = lambda: None
    # Looks up the host names of the servers.
    resolver: Resolver = field(default_factory=Resolver)
    postgres: PostgresOptions = PostgresOptions()
    # Its files are used with `url`.
    login: StoreLogin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What housekeeping last found in a store; all 0 where the store needs none, or another worker does it."""

    # How long ago the first of what it did was due.
    behind_s: float = 0.0
    # The age of the oldest snapshot in the database: what it may see cannot be removed.
    snapshot_s: float = 0.0
    # Of the updates of records, the share that touched no index; of their rows, the share that is dead.
    hot_ratio: float = 0.0
    dead_ratio: float = 0.0
    record_bytes: int = 0
    chunk_bytes: int = 0
    audit_bytes: int = 0


class Marks(Protocol):
    """Short values from process to process, which may be lost. Each call waits a second at most, and never raises.

    `name` begins with the name of a record (`store_key`), in whose place the mark is kept.
    """

    async def put(self, name: bytes, value: bytes, lasts_ms: int) -> None:
        """Write a mark for `lasts_ms`, in place of one of this name."""

    async def exists(self, name: bytes) -> bool | None:
        """Return whether there is a mark; None where the store does not say."""

    async def get(self, name: bytes) -> bytes:
        """Return the value of a mark, empty if none is known."""

    async def get_all(self, names: Sequence[bytes]) -> list[bytes]:
        """Return the values of marks, as `get` does, in the order of the names."""

    async def swap(self, name: bytes, before: bytes, after: bytes, lasts_ms: int) -> bool | None:
        """Write a mark for `lasts_ms` if it has the value `before`; return whether that was done, None if not known.

        Empty values: there is no mark before, or none after. A call that came and whose reply was lost is not repeated.
        """


class Wakes(Protocol):
    """Tells readers in this process that a response went on whose exchange runs elsewhere. Any of it may be lost."""

    def watch(self, key: bytes, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` whenever more of the response to a key was stored, and at its end; return what stops that."""

    def is_live(self, key: bytes) -> bool:
        """Return whether the store tells of this key now: then polling may be slow."""

    def watch_mail(self, wake: Callable[[], None]) -> None:
        """Call `wake` whenever there is a note for this process (see `Store.post`), until the store is closed."""

    @property
    def tells_of_mail(self) -> bool:
        """Whether that works now, as this process has heard from itself."""


class Store(Protocol):
    """The verbs on records, and what a worker asks about the store's health.

    `records`: the view of operators. `marks`: notes between processes.
    """

    @property
    def records(self) -> Records: ...

    @property
    def marks(self) -> Marks: ...

    @property
    def wakes(self) -> Wakes: ...

    # Its life ...

    def start(self) -> None:
        """Begin to connect."""

    async def close(self) -> None: ...

    async def wait_up(self, seconds: float) -> bool:
        """Wait until the store is connected, and return whether it is."""

    def end_calls(self) -> None:
        """End every call now, also those still to come. Calls that are not confirmed stay unconfirmed."""

    async def watch(self) -> None:
        """Inspect the store for its health and for losses, until cancelled."""

    async def probe(self) -> None:
        """While a breaker is open, find out when the store takes claims again, until cancelled."""

    async def prepare_login(self, login: StoreLogin) -> Callable[[], None]:
        """Try another login at the servers. What is returned uses it for new connections; open ones go on.

        Raises LoginRefused where a server that is up refuses it, and OSError for files that cannot be used.
        """

    # Its health ...

    def not_ready_reason(self) -> str | None:
        """Return why the store cannot be relied on now, or None."""

    def notice(self) -> str | None:
        """Return what an operator should look at though the store works, or None: a recent loss, or different rules."""

    def full(self) -> bool:
        """Return whether responses are to be stored without their body."""

    @property
    def memory_ratio(self) -> float:
        """The used share of the store's limit."""

    @property
    def upkeep(self) -> Upkeep:
        """How far behind housekeeping is, and the sizes that it found."""

    @property
    def rules_differ(self) -> bool:
        """Whether other proxies on this store name keys by other rules."""

    @property
    def packs_records(self) -> bool:
        """Whether records are written in a layout that older versions do not read."""

    @property
    def refuses_new(self) -> bool:
        """Whether the store refuses first-time keys at its limit."""

    @property
    def quarantine_left_s(self) -> float: ...

    @property
    def broken(self) -> bool:
        """Whether a circuit breaker is open: claims are not even tried, because they failed one after the other."""

    # Claiming ...

    @property
    def token_prefix(self) -> bytes:
        """The beginning of every token that this store gives, and no other: it names the owner of a claim."""

    def token(self) -> bytes:
        """Return a new token of this store's own."""

    def now_ms(self, key: bytes) -> int:
        """Return the time of the server that has a key."""

    def claim(self, request: ClaimRequest) -> Claiming:
        """Claim a key, or return the record that it has. After Unconfirmed no copy of the claim keeps the key."""

    def reclaim(self, claim: Claim, scope: Scope) -> Claiming:
        """Claim again with the same token. A Claim means that the key is this claim's, with the fence that it has."""

    def peek(self, key: bytes, scope: Scope, lease_ms: int) -> Coroutine[Any, Any, NotClaimed | None]:
        """Return the record of a key, or None for no record."""

    # What the owner of a claim does ...

    async def renew(self, claim: Claim, stage: Stage = CLAIMED) -> RenewStatus:
        """Extend the lease, and note how far the exchange got (`stage`). One try: the next renewal is the retry."""

    async def append(
        self, claim: Claim, index: int, chunk: bytes, patience_s: float, head: bytes = b""
    ) -> AppendStatus:
        """Store chunk `index` of a response, and extend the lease.

        `head`: with the first chunk, the packed head (`stream_head.py`) for followers; empty for none.
        """

    def store(self, claim: Claim, response: StoredResponse, last_chunk: bytes, patience_s: float) -> Settling:
        """Settle: make the record complete. `last_chunk` is empty if every chunk was appended."""

    def release(self, claim: Claim, patience_s: float) -> Settling:
        """Settle: free the key."""

    def mark_unknown(self, claim: Claim, reason: str, patience_s: float, status: int = 0) -> Settling:
        """Settle: note that the request was sent and that its outcome is unknown.

        `reason` is for operators. `status`: of a response that came and does not tell the outcome; 0 for none.
        """

    # Reading ...

    async def read(self, key: bytes, token: bytes, first: int) -> list[bytes] | ReadFailure:
        """Return chunks of a complete response from index `first` on: about 256 KiB, and at least one chunk."""

    async def follow(self, key: bytes, token: bytes, first: int, reading_ms: int = 0) -> Followed | ReadFailure:
        """Return what the store has of the response of one claim, also while it is running.

        The head comes with index 0, chunks from index `first` on as in `read`. Another claim's record is GONE.
        `reading_ms`: for how long to note that somebody reads, which the owner learns with its next append.
        """

    # From process to process ...

    async def post(self, token: bytes, note: bytes) -> bool:
        """Leave a note for the process that made a token; return whether the store confirms it. It lasts for 60 s."""

    async def collect(self, prefix: bytes) -> list[bytes]:
        """Take at most MOST_NOTES notes for the process with this `token_prefix`. One may come twice, or be lost."""

    # For operators ...

    async def resolve_by_operator(self, claim: Claim, seen: Deciding, meta: bytes, body: bytes) -> ResolveStatus:
        """Give the key of an operator's claim its response, if the token that was seen still owns it."""

    async def release_by_operator(self, key: bytes, seen: Deciding, operator: bytes, fence: bytes) -> ResolveStatus:
        """Free a key, if the token that was seen still owns it. The token `operator` fences the owner from then on."""

    async def drop(self, record: RecordView, *, purge: bool = False) -> DropStatus:
        """Drop the response of an expired record, and leave its tombstone. `purge`: of a complete one, too."""
