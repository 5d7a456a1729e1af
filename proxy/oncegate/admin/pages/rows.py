"""Records as pages show them, and the filters and rules by which they are named."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from oncegate.admin.pages.frame import field
from oncegate.admin.pages.signing import write_seen
from oncegate.admin.parts import AdminParts
from oncegate.keys.notes import escaped
from oncegate.operating.worklist import Filter, Seen
from oncegate.probing.plan import Plan
from oncegate.reconcile.progress import Progress
from oncegate.rules.model import Rule
from oncegate.settings.errors import SettingsError
from oncegate.store.record import ViewState
from oncegate.store.record_name import record_id
from oncegate.store.record_view import OpenKind, RecordView

# The words and colours of states.
KINDS = {
    OpenKind.UNKNOWN: ("unknown", "unknown"),
    OpenKind.LAPSED: ("lapsed", "unknown, owner silent"),
    OpenKind.IN_FLIGHT: ("in-flight", "in flight"),
    OpenKind.WAIVED: ("waived", "unknown, left to a retry"),
}
STATES = {
    ViewState.COMPLETE: ("complete", "complete"),
    ViewState.EXPIRED: ("waived", "expired"),
    ViewState.RELEASED: ("waived", "released"),
    ViewState.CORRUPT: ("bad", "damaged"),
}


class Row(NamedTuple):
    """One record as pages show it. `seen`: what a form says of it, so that nobody decides about another one."""

    id: str
    seen: str
    kind: str
    word: str
    note: str
    rule: str
    why: str
    status: int
    created_ms: int
    age_ms: int
    is_open: bool
    # Under a rule that reconciles: what the API's last answer meant, and when it is asked next, 0 for not again.
    verdict: str = ""
    probe_in_ms: int = 0
    is_left: bool = False


def row_of(record: RecordView, reconciling: tuple[Progress, Plan] | None = None) -> Row:
    """Return a record as pages show it. `reconciling`: how far that is, None under a rule without it."""
    kind = record.open_kind
    # A record that is not open has one of the other states.
    colour, word = KINDS[kind] if kind else STATES.get(record.state, ("waived", record.state.value))
    return Row(
        id=record_id(record.key),
        seen=write_seen(Seen.of(record)),
        kind=colour,
        word=word,
        # Clients wrote some of it: it can neither hide anything nor turn a line around.
        note=escaped(record.kept.note),
        rule=escaped(record.kept.rule),
        why=escaped(record.reason or record.progress),
        status=record.status,
        created_ms=record.created_ms,
        # After a failover the time comes from another server, whose clock may be behind.
        age_ms=max(0, record.now_ms - record.created_ms),
        is_open=kind is not None,
        **_probe(record, reconciling[0] if reconciling else None),
    )


def _probe(record: RecordView, progress: Progress | None) -> dict[str, Any]:
    if progress is None:
        return {}
    verdict, in_ms = escaped(progress.verdict), max(0, progress.due_ms - record.now_ms)
    return {"verdict": verdict or "not asked yet", "probe_in_ms": in_ms, "is_left": bool(progress.left)}


def read_filter(form: Any) -> Filter:
    """Return the filter in a query or a form."""
    return Filter(*(field(form, name).strip() for name in ("text", "rule", "status")))


def rules_of(parts: AdminParts) -> Sequence[Rule]:
    """Return the rules in effect; none where the file has a mistake by now."""
    try:
        return list(parts.rules())
    except SettingsError:
        return []


def rule_names(parts: AdminParts) -> Sequence[str]:
    """Return the names of the rules in effect."""
    return [rule.name for rule in rules_of(parts) if rule.name]
