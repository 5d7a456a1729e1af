"""An operator's decisions about keys that are not complete: resolve and release.

Each is a compare-and-set: the store carries it out only if the record is still the one that the operator saw. It
fences the owner, so that an owner that wakes up later neither stores nor delivers its own response.
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from oncegate.messages.response_head import response_digest
from oncegate.operating.errors import OperatorError
from oncegate.operating.operator_response import OperatorResponse
from oncegate.rules.model import Rules
from oncegate.settings.settings import Settings
from oncegate.store.kept import NOTHING
from oncegate.store.record import ViewState, pack
from oncegate.store.record_name import record_id
from oncegate.store.record_view import RecordView, claim_of
from oncegate.store.results import ResolveStatus
from oncegate.store.store import Store

RESOLVE, RELEASE = "resolve", "release"

# States in which there is nothing to decide.
DECIDED = (ViewState.COMPLETE, ViewState.EXPIRED, ViewState.RELEASED)
# Messages for decisions that the store did not carry out.
NOT_CARRIED_OUT = {
    ResolveStatus.ABSENT: "the record is gone by now; nothing was changed",
    ResolveStatus.COMPLETE: "the owner completed it meanwhile, with its own response; nothing was changed",
    ResolveStatus.FENCED: "another request owns the key by now; nothing was changed. Show it before you decide again",
    ResolveStatus.UNCONFIRMED: "the store did not confirm the change; show the key before you repeat the command",
}


@dataclass(frozen=True, slots=True)
class Operator:
    """Who decides, and on which machine."""

    user: str
    host: str

    def __str__(self) -> str:
        return f"operator {self.user} on {self.host}"


@dataclass(slots=True)
class Desk:
    """What an operator works with: the settings and rules of the proxies, and their store."""

    settings: Settings
    rules: Rules
    store: Store
    operator: Operator
    # Whether the store knows who is behind this desk's tokens.
    is_introduced: bool = False

    def kept_ms(self, record: RecordView) -> tuple[int, int]:
        """Return how long the response to a key is kept, and how long the key is refused after that: as its rule says.

        Where nobody knows its rule, the longest times of any, and no shorter than the record would be kept without one.
        """
        policies = {rule.name: rule.policy for rule in self.rules}
        # An older version kept no names of rules.
        if record.kept != NOTHING and (policy := policies.get(record.kept.rule)) is not None:
            return policy.retention_ms, policy.tombstone_ms
        longest = [max(one.retention_ms for one in policies.values()), record.left_ms]
        return max(longest), max(one.tombstone_ms for one in policies.values())

    async def introduce(self) -> bytes:
        """Return a new token, after `keys show` can name the operator behind it. Raises StoreError."""
        token = self.store.token()
        # All tokens of a store begin alike, and that names who made them.
        if not self.is_introduced:
            longest_ms = max(rule.policy.retention_ms for rule in self.rules)
            await self.store.records.introduce(token, str(self.operator), longest_ms)
            self.is_introduced = True
        return token


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of an operator's decision about a record. `action` is resolve or release."""

    action: str
    record: RecordView
    status: ResolveStatus
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.status not in NOT_CARRIED_OUT

    @property
    def text(self) -> str:
        """What the operator is told."""
        return NOT_CARRIED_OUT.get(self.status, self.status.value)

    @property
    def facts(self) -> dict[str, Any]:
        """What the audit line says of it: the record by its id, never the key."""
        return {
            "outcome": self.status.value,
            "key_id": record_id(self.record.key),
            "state_before": self.record.state.value,
            "reason": self.record.reason,
            "owner_token": self.record.token.hex(),
            **self.details,
        }


def refusal(action: str, record: RecordView) -> str:
    """Return why a record cannot be resolved or released, empty if it can."""
    # A record without a token was not written by oncegate: it is not removed either.
    is_unreadable = record.state is ViewState.CORRUPT if action == RESOLVE else not record.token
    if record.state not in DECIDED and not is_unreadable:
        return ""
    return f"this key is {record.state.value}; only a key that is unknown or in flight can be {action}d"


def warning(action: str, record: RecordView) -> str:
    """Return what an operator should know before they decide about a record, empty for nothing."""
    if action == RESOLVE:
        # An owner whose lease has lapsed is fenced by the decision; no question is needed.
        is_running = record.lease_left_ms > 0
        return "Its owner is still working on it; your response would replace the owner's." if is_running else ""
    # Fencing stops the owner's response, but not a request that it has sent already.
    text = "Its owner may still live: its request may be executed, and the next one executes again."
    return text if record.owner_may_live else ""


async def resolve(desk: Desk, record: RecordView, given: OperatorResponse) -> Decision:
    """Complete an unfinished key with the operator's response, which later requests with the key get as a replay.

    `record`: as the operator saw it. Raises OperatorError for a key that cannot be resolved, StoreError.
    """
    _refuse(RESOLVE, record)
    response, body = given
    token = await desk.introduce()
    digest = response_digest(response.status, response.reason, response.block)
    digest.update(body)
    stored = replace(response, digest=digest.digest(), completed_ms=record.now_ms)
    # The owner's claim, with the operator's token. A retry may come as late as after a response of the API's.
    retention_ms, tombstone_ms = desk.kept_ms(record)
    claim = replace(claim_of(record, retention_ms), token=token, tombstone_ms=tombstone_ms)
    meta = pack(claim, stored)
    status = await desk.store.resolve_by_operator(claim, record.token, meta, body)
    return Decision(RESOLVE, record, status, {"status": response.status, "bytes": len(body)})


async def release(desk: Desk, record: RecordView) -> Decision:
    """Free an unfinished key: the next request with it executes. `record` and errors as in `resolve`."""
    _refuse(RELEASE, record)
    token = await desk.introduce()
    status = await desk.store.release_by_operator(record.key, record.token, token, record.fence)
    return Decision(RELEASE, record, status)


def _refuse(action: str, record: RecordView) -> None:
    if reason := refusal(action, record):
        raise OperatorError(reason)


def audit_line(operator: Operator, action: str, **facts: Any) -> dict[str, Any]:
    """Return the line that says who did what, for standard error or the log."""
    return {
        "event": "audit",
        "level": "warning",
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "action": action,
        **facts,
        "user": operator.user,
        "host": operator.host,
    }
