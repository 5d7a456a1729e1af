"""What became of one request: the outcome, and the record that metrics and the access log read."""

from enum import Enum
from typing import Final, NamedTuple, Protocol

from oncegate.messages.problems import Problem
from oncegate.observe.labels import SettlementLabel, Unguarded, UnguardedKey
from oncegate.observe.tracing import Trace
from oncegate.observe.usage import Tokens
from oncegate.values import Value


class Outcome(Enum):
    """What became of one request. The value is the word of the metric label and of the access log's field.

    A response that was passed on has the word of its `Oncegate-Status`. A response of oncegate itself has the
    code of its problem, see `outcome_of`.
    """

    # The response came from the upstream or from the store.
    EXECUTED = "executed"
    REPLAYED = "replayed"
    # The response of the store is one that the API gave when it was asked what had become of the request.
    RECONCILED = "reconciled"
    # The response of an original that was still running, as it came.
    JOINED = "joined"
    # A reader came back to a response, or to its address, and got it from there on.
    RESUMED = "resumed"
    # An execution was stopped at its address, or had ended by then.
    STOPPED = "stopped"
    RELEASED = "released"
    UNKNOWN = "unknown"
    PASSTHROUGH = "passthrough"
    UNGUARDED = "unguarded"
    # The client did not wait for the response: its exchange is reported again when it ends.
    ACCEPTED = "accepted"
    # A question about a key was answered, and the answers to others.
    ASKED = "asked"
    KEY_ABSENT = "key_absent"
    KEY_RELEASED = "key_released"
    ASK_REFUSED = "ask_refused"
    # oncegate itself allowed a page of another origin to send a request.
    PREFLIGHT = "preflight"

    # oncegate refused the request; the upstream did not get it.
    KEY_MISSING = "key_missing"
    KEY_INVALID = "key_invalid"
    SCOPE_UNSTABLE = "scope_unstable"
    REQUEST_REFUSED = "request_refused"
    BODY_TOO_LARGE = "body_too_large"
    OVERLOADED = "overloaded"
    STORE_UNAVAILABLE = "store_unavailable"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"

    # A record under the same key decided.
    IN_FLIGHT = "in_flight"
    KEY_REUSED = "key_reused"
    OUTCOME_UNKNOWN = "outcome_unknown"
    RESPONSE_NOT_KEPT = "response_not_kept"
    KEY_EXPIRED = "key_expired"
    STREAM_GONE = "stream_gone"
    RECORD_CORRUPT = "record_corrupt"

    # The request was sent, or may have been, and the client did not get the upstream's whole response.
    UPSTREAM_LOST = "upstream_lost"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"
    # It read the response of another request, which did not end whole. That one has a report of its own.
    BROKEN_OFF = "broken_off"
    ANSWER_NOT_STORED = "answer_not_stored"
    FENCED = "fenced"
    FAILED = "failed"
    CLIENT_GONE = "client_gone"

    def __init__(self, label: str) -> None:
        # A plain attribute: `value` costs 290 ns more with Python 3.11 (measured), and every request reads it.
        self.label = label


# For the request path: a look-up in here costs 20 ns, `Outcome.EXECUTED` 100 ns and `Outcome(label)` 700 ns
# (Python 3.11, measured).
BY_LABEL: Final = {outcome.label: outcome for outcome in Outcome}


def outcome_of(problem: Problem) -> Outcome:
    """Return the outcome of a request that gets this problem."""
    return BY_LABEL[problem.code]


# Outcomes of duplicates: requests with a key that were not executed a second time.
SUPPRESSED: Final = (
    Outcome.REPLAYED,
    Outcome.RECONCILED,
    Outcome.JOINED,
    Outcome.IN_FLIGHT,
    Outcome.KEY_REUSED,
    Outcome.OUTCOME_UNKNOWN,
    Outcome.RESPONSE_NOT_KEPT,
    Outcome.KEY_EXPIRED,
)


class Asked(Protocol):
    """A request as its client sent it. Each of these is read only where somebody asks for it.

    `path`: without the query. `client`: its address, behind trusted proxies the one that they saw. `host`: as it names
    the API. `request_id`: as it was passed on, or made. `trace_id`: of its `traceparent`, 32 hexadecimal digits. Empty
    where there is none. `problem`: what oncegate sent of its own, None for nothing.
    """

    @property
    def path(self) -> str: ...

    @property
    def client(self) -> str: ...

    @property
    def scheme(self) -> str: ...

    @property
    def host(self) -> str: ...

    @property
    def request_id(self) -> str: ...

    @property
    def trace_id(self) -> str: ...

    @property
    def problem(self) -> Problem | None: ...


class RequestReport(Value):
    """What became of one request.

    `key` is the digest of its key, empty without one. `upstream_s` is the time spent on the upstream.
    `saved_s` is the upstream time that a replay saved and `replayed_bytes` the size of the body that it sent.
    `tokens` are those that a replay saved at an LLM's API, None where they are not counted.
    `without_credential`: the request had none, so that it shares its tenant with all such requests.
    `rule` is the name of the rule that decided, empty for none. `settlements` say how its claim ended, and whether it
    was lost; `close_delimited`: a response that ended by closing alone was stored as complete. `unguarded_key`: why
    the key that a request seems to carry guards nothing, None without such a key. `reason`: why it ended so, in words,
    empty where the outcome says it all. `unguarded`: why it was forwarded without protection, None where it was not.
    `upstream`: the name of the API that its rule leads to, or its host and port; empty where no rule decided.
    `asked`: the request itself, None for what never became one. `trace`: of a request that is traced.
    """

    outcome: Outcome
    status: int
    method: str
    key: bytes = b""
    upstream_s: float = 0.0
    saved_s: float = 0.0
    replayed_bytes: int = 0
    without_credential: bool = False
    reason: str = ""
    rule: str = ""
    tokens: Tokens | None = None
    settlements: tuple[SettlementLabel, ...] = ()
    close_delimited: bool = False
    unguarded_key: UnguardedKey | None = None
    unguarded: Unguarded | None = None
    upstream: str = ""
    asked: Asked | None = None
    trace: Trace | None = None


class Observe(Protocol):
    """Takes the report of each request once, with its duration in seconds and whether its client left early."""

    def __call__(self, report: RequestReport, seconds: float = 0.0, client_gone: bool = False) -> None: ...


class ClientCounts(NamedTuple):
    """What the public listener counts, each by the values of its label: to be added to."""

    # By labels.CLIENT_CONNECTIONS.
    connections: dict[str, float]
    # By labels.HEARTBEATS.
    heartbeats: dict[str, float]
    # Without a label.
    pages: dict[str, float]
