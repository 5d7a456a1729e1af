"""What `oncegate keys` shows of a record, and of how far the reconciling of its key is."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from oncegate.decision import HOLD
from oncegate.keys.notes import escaped
from oncegate.probing.plan import Plan
from oncegate.reconcile.progress import Progress, begin, mark_name, unpack
from oncegate.rules.model import Rule
from oncegate.store.kept import Kept
from oncegate.store.record import StoredResponse, ViewState
from oncegate.store.record_name import record_id
from oncegate.store.record_view import UNDECIDED, RecordView
from oncegate.store.store import Store


async def facts_of(store: Store, record: RecordView) -> dict[str, Any]:
    """Return what the store knows of a record; facts that it does not know are left out. Times are the store's."""
    owner, silent_ms = await store.records.proxy_of(record.token)
    facts: dict[str, Any] = {"id": record_id(record.key), "state": record.state.value, "scope": record.tenant.hex()}
    if record.created_ms:
        facts["claimed"] = _iso_time(record.created_ms)
        # After a failover the time comes from another server, whose clock may be behind.
        facts["age_s"] = max(0, record.now_ms - record.created_ms) // 1000
    facts |= _kept_facts(record.kept)
    facts["owner"] = owner
    if silent_ms is not None:
        facts["owner_reported_s_ago"] = silent_ms // 1000
    if record.state is ViewState.EXPIRED:
        return facts | {"status": record.response.status if record.response is not None else record.status}
    return facts | (_unfinished_facts(record) if record.response is None else _response_facts(record.response))


def _kept_facts(kept: Kept) -> dict[str, Any]:
    """Return which request it was, as far as that was kept. What clients wrote is escaped."""
    facts = {
        "note": escaped(kept.note),
        "rule": escaped(kept.rule),
        "upstream": escaped(kept.upstream),
        "request_id": kept.request_id.decode(),
        "trace_id": kept.trace[:16].hex(),
        # An earlier claim of the key may have been executed as well.
        "replaced_another": kept.replaced,
    }
    return {name: value for name, value in facts.items() if value}


def _response_facts(response: StoredResponse) -> dict[str, Any]:
    facts = {
        "status": response.status,
        "bytes": response.size,
        "body_stored": response.body_stored,
        "completed": _iso_time(response.completed_ms),
    }
    # It is what the API said of the request later.
    return facts | ({"reconciled": True} if response.reconciled else {})


def _unfinished_facts(record: RecordView) -> dict[str, Any]:
    """Return why the outcome is unknown, how far the request got, and whether its owner may still work on it."""
    facts = {
        "response_status": record.status,
        "reason": record.reason,
        "progress": record.progress,
        "bytes_stored": record.bytes_stored,
        "lease_left_ms": record.lease_left_ms,
    }
    known = {name: value for name, value in facts.items() if value}
    # A damaged record may have any bytes in this field, and must not end the list.
    return known | {"mode": record.mode.decode("ascii", "replace"), "owner_may_live": record.owner_may_live}


def _iso_time(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        # What is damaged may say anything.
        return ""


def line_of(facts: dict[str, Any]) -> str:
    """Return the facts that a list shows, on one line. The note comes last, as it may have spaces."""
    note = f"  note: {facts['note']}" if "note" in facts else ""
    detail = facts.get("reason") or facts.get("progress") or facts.get("status") or ""
    return f"{facts['id']}  {facts['state']:9}  {facts.get('claimed', '-'):29}  {facts['owner']}  {detail}{note}"


# How far keys are that settle themselves ...


# By the digest of a key.
Progresses = dict[bytes, tuple[Progress, Plan]]


async def progress_of(store: Store, rules: Iterable[Rule], records: Iterable[RecordView]) -> Progresses:
    """Return how far the reconciling of these keys is, in one question of the store; none of others. Never raises."""
    plans = {rule.name: rule.policy.reconcile for rule in rules}
    open_ones = [record for record in records if record.open_kind in UNDECIDED and record.mode == HOLD]
    asked = [(record, plan) for record in open_ones if (plan := plans.get(record.kept.rule)) is not None]
    marks = await store.marks.get_all([mark_name(record.key) for record, _ in asked]) if asked else []
    pairs = zip(asked, marks, strict=True)
    # A key without a mark is one that nobody has looked at yet.
    return {one.key: (unpack(packed, one) or begin(one, plan), plan) for (one, plan), packed in pairs}


def progress_facts(progress: Progress, plan: Plan) -> dict[str, Any]:
    """Return how far the reconciling of a key is, as people read it."""
    facts = {
        "probes": progress.asked,
        "last_verdict": escaped(progress.verdict),
        "last_reason": escaped(progress.why),
        "agreed": f"{progress.agreed} of {plan.absent_agree}" if progress.agreed else "",
        "next_probe": "" if progress.left else _iso_time(progress.due_ms),
        "left_to_a_person": escaped(progress.left),
    }
    return {name: value for name, value in facts.items() if value != ""}
