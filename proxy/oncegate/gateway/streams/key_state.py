"""What a key's record says to somebody who may know: the JSON of an answer to a question, and of a 202.

The members and their values are described in docs/reference/asking.md, with a schema.
"""

import json
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

from oncegate.decision import CANCELLED, RETRY, State, decide, effective_state, retry_after_s
from oncegate.downstream.request import Request
from oncegate.gateway.routes import ExchangeDeps
from oncegate.keys.digests import key_id
from oncegate.messages.framing import COUNTED, STATED
from oncegate.messages.problems import reason_of
from oncegate.store.record import Record
from oncegate.store.record_view import StoreError
from oncegate.store.stages import CLAIMED, RESPONSE_BEGUN, SENT

# How far an exchange had come when its lease was renewed last.
_STAGES = {CLAIMED.description: "claimed", SENT.description: "sent", RESPONSE_BEGUN.description: "responding"}


def state_of(record: Record) -> State:
    """Return the state of a record as of the moment at which it was read."""
    return effective_state(record.state, record.lease_left_ms)


def key_state(key: bytes, record: Record) -> dict[str, Any]:
    """Return what a record says of its key, whoever asks."""
    state, response = state_of(record), record.response
    document: dict[str, Any] = {
        "key_id": key_id(key),
        "state": state.value,
        "since": _time(record.created_ms),
        "on_repeat": _on_repeat(record),
    }
    if response is not None:
        document |= {
            "status": response.status,
            "completed": _time(response.completed_ms),
            "bytes": response.size,
        }
    elif record.status:
        document["status"] = record.status
    if state is State.UNKNOWN and record.mode == CANCELLED:
        document["reason"] = "cancelled"
    return document


def _on_repeat(record: Record) -> str:
    """Return what the request gets if it is sent again now: a replay, an execution, or which problem."""
    state, response = state_of(record), record.response
    if state is State.UNKNOWN and record.mode == RETRY:
        return "execution"
    decision = decide(state, True, response is not None and response.body_stored)
    return str(decision.value).replace("_", "-")


async def progress_of(deps: ExchangeDeps, key: bytes, record: Record) -> dict[str, Any]:
    """Return how far the exchange of a record in flight has come, as far as the store says."""
    with suppress(StoreError):
        view = await deps.store.records.read(key)
        if view is not None and view.token == record.token and view.response is None:
            stage = _STAGES.get(view.progress)
            return {"bytes": view.bytes_stored} | ({"stage": stage} if stage else {})
    return {}


def after_s(deps: ExchangeDeps, record: Record) -> int:
    """Return after how many seconds it is worth asking again about a record in flight."""
    return retry_after_s((record.now_ms - record.created_ms) / 1000, deps.usual.seconds)


def send_state(request: Request, status: int, document: dict[str, Any], fields: bytes) -> None:
    """Send a document about a key. `fields`: further ones, each line ended."""
    block = b"Content-Type: application/json\r\nCache-Control: private, no-store\r\nDate: %b\r\n%b%b" % (
        formatdate(usegmt=True).encode(),
        fields,
        request.id_line,
    )
    if request.adaptation.cors is not None:
        block += request.requester.own_fields()
    body = json.dumps(document).encode() + b"\n"
    if request.message.method == "HEAD":
        block, body = b"%bContent-Length: %d\r\n" % (block, len(body)), b""
    request.response.send(status, reason_of(status), block, body, COUNTED if body else STATED)


def _time(ms: int) -> str:
    """Return a time as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
