"""An operator's decisions about keys that are not complete: resolve, release and cancel.

Each is about the record that the operator saw, and no later one. Resolving and releasing are a compare-and-set that
fences the owner, so that an owner that wakes up later neither stores nor delivers its own response. Cancelling is up to
the owner: it is asked to end the request, and the record tells what became of it.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from oncegate.messages.response_head import response_digest
from oncegate.operating.errors import OperatorError, usage_error
from oncegate.reconcile.answers import GivenResponse, given_response
from oncegate.rules.model import Rules
from oncegate.settings.settings import Settings
from oncegate.store.kept import NOTHING
from oncegate.store.record import ViewState, pack
from oncegate.store.record_name import record_id
from oncegate.store.record_view import Deciding, RecordView, claim_of
from oncegate.store.results import ResolveStatus
from oncegate.store.store import Store
from oncegate.streams.cancels import CancelResult, tell_owner

RESOLVE, RELEASE, CANCEL = "resolve", "release", "cancel"
# What was done.
DONE = {RESOLVE: "resolved", RELEASE: "released", CANCEL: "cancelled"}
# How long an owner has to end a request, and how long until it is asked once more.
CANCEL_S, AGAIN_S = 5.0, 0.2

# States in which there is nothing to decide.
DECIDED = (ViewState.COMPLETE, ViewState.EXPIRED, ViewState.RELEASED)
# Messages for decisions that the store did not carry out.
NOT_CARRIED_OUT = {
    ResolveStatus.ABSENT: "the record is gone by now; nothing was changed",
    ResolveStatus.COMPLETE: "the owner completed it meanwhile, with its own response; nothing was changed",
    ResolveStatus.FENCED: "another request owns the key by now; nothing was changed. Show it before you decide again",
    ResolveStatus.RUNNING: "its owner is still working on it; nothing was changed",
    ResolveStatus.UNCONFIRMED: "the store did not confirm the change; show the key before you repeat the command",
    CancelResult.ABSENT: "its claim is gone by now; nothing was changed",
    CancelResult.COMPLETE: "the owner completed it meanwhile; its response is stored",
    CancelResult.UNKNOWN: "its outcome is unknown by now, for another reason; nothing was changed",
    CancelResult.UNCONFIRMED: "the store did not answer; show the key before you repeat the command",
    CancelResult.ACCEPTED: f"its owner was told, and has not ended it within {CANCEL_S:g} s: it may be dead, paused or "
    "of an older version. Once its lease is over, the key is unknown",
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
    """What became of an operator's decision about a record. `action` is resolve, release or cancel."""

    action: str
    record: RecordView
    status: ResolveStatus | CancelResult
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """The word for what became of it."""
        return self.status.label if isinstance(self.status, CancelResult) else self.status.value

    @property
    def is_done(self) -> bool:
        return self.status not in NOT_CARRIED_OUT

    @property
    def text(self) -> str:
        """What the operator is told."""
        return NOT_CARRIED_OUT.get(self.status, self.outcome)

    @property
    def facts(self) -> dict[str, Any]:
        """What the audit line says of it: the record by its id, never the key."""
        return {
            "outcome": self.outcome,
            "key_id": record_id(self.record.key),
            "state_before": self.record.state.value,
            "reason": self.record.reason,
            "owner_token": self.record.token.hex(),
            **self.details,
        }


def refusal(action: str, record: RecordView) -> str:
    """Return why a record cannot be resolved, released or cancelled, empty if it can."""
    if action == CANCEL:
        state = record.state
        return "" if state is ViewState.IN_FLIGHT else f"this key is {state.value}; only one in flight can be cancelled"
    # A record without a token was not written by oncegate: it is not removed either.
    is_unreadable = record.state is ViewState.CORRUPT if action == RESOLVE else not record.token
    if record.state not in DECIDED and not is_unreadable:
        return ""
    return f"this key is {record.state.value}; only a key that is unknown or in flight can be {DONE[action]}"


def warning(action: str, record: RecordView) -> str:
    """Return what an operator should know before they decide about a record, empty for nothing."""
    if action == RESOLVE:
        # An owner whose lease has lapsed is fenced by the decision; no question is needed.
        is_running = record.lease_left_ms > 0
        return "Its owner is still working on it; your response would replace the owner's." if is_running else ""
    if action == CANCEL:
        return ""
    # Fencing stops the owner's response, but not a request that it has sent already.
    text = "Its owner may still live: its request may be executed, and the next one executes again."
    return text if record.owner_may_live else ""


def operator_response(status: int, headers: Sequence[str], body: bytes) -> GivenResponse:
    """Return the response that an operator describes. `headers`: lines `Name: value`. Raises OperatorError."""
    given = given_response(status, headers, body)
    if isinstance(given, str):
        raise usage_error(given)
    return given


async def resolve(desk: Desk, record: RecordView, given: GivenResponse) -> Decision:
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
    status = await desk.store.resolve_by_operator(claim, Deciding(record.token), meta, body)
    return Decision(RESOLVE, record, status, {"status": response.status, "bytes": len(body)})


async def release(desk: Desk, record: RecordView) -> Decision:
    """Free an unfinished key: the next request with it executes. `record` and errors as in `resolve`."""
    _refuse(RELEASE, record)
    token = await desk.introduce()
    status = await desk.store.release_by_operator(record.key, Deciding(record.token), token, record.fence)
    return Decision(RELEASE, record, status)


async def cancel(desk: Desk, record: RecordView) -> Decision:
    """Ask the owner of a key in flight to end its request, and see what becomes of it. `record`: as in `resolve`.

    A note may be lost, so the owner is asked again until the record says that the claim has ended. Raises OperatorError
    for a key that is not in flight.
    """
    _refuse(CANCEL, record)
    ends, reason = time.monotonic() + CANCEL_S, f"{desk.operator} stopped it"
    while (status := await tell_owner(desk.store, record.key, record.token, reason)).may_change:
        if time.monotonic() > ends:
            break
        await asyncio.sleep(AGAIN_S)
    return Decision(CANCEL, record, status)


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
