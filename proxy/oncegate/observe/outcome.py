"""What became of one request: the record that metrics and the access log read."""

from typing import NamedTuple, Protocol

from oncegate.observe.usage import Tokens

OUTCOMES = (
    "executed", "replayed", "released", "in_flight", "mismatch", "unknown", "not_kept", "invalid", "too_large",
    "overloaded", "passthrough", "unguarded", "store_unavailable", "upstream_unreachable", "upstream_lost",
    "upstream_timeout", "truncated", "answer_not_stored", "fenced", "corrupt", "failed", "client_gone",
)  # fmt: skip
LOSSES = ("flushed", "rolled_back", "evicted", "moved")

SUPPRESSED = ("replayed", "in_flight", "mismatch", "unknown", "not_kept")


class Outcome(NamedTuple):
    """What became of one request. `word` is one of OUTCOMES; `key` is the key's digest, empty without one.

    `upstream_s` is the time spent on the upstream; `saved_s` and `replayed_bytes` are what a replay spared
    and sent, `tokens` what it spared of an LLM's, None where nobody counts them; `rule` is the name of the
    rule that decided, empty for none.
    """

    word: str
    status: int
    method: str
    key: bytes = b""
    upstream_s: float = 0.0
    saved_s: float = 0.0
    replayed_bytes: int = 0
    common_tenant: bool = False
    detail: str = ""
    rule: str = ""
    tokens: Tokens | None = None


class Observe(Protocol):
    """Hears of every request once: what became of it, how long it took, and whether its client left before."""

    def __call__(self, outcome: Outcome, seconds: float = 0.0, client_left: bool = False) -> None: ...
