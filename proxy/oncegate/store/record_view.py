"""Records as operators see them: whose they are, how far they got, and why an outcome is unknown.

Nothing here shows what was requested or responded, and nothing changes a record.
"""

from enum import Enum
from typing import NamedTuple, Self

from oncegate.decision import HOLD, State, effective_state
from oncegate.store.kept import NOTHING, Kept, pack_kept, unpack_kept
from oncegate.store.record import (
    DROPPED,
    Claim,
    Corrupt,
    StoredResponse,
    ViewState,
    read_status,
    self_check,
    tenant_of,
    unpack,
    unpack_expired,
)
from oncegate.store.stages import describe_stage

FIELDS = (
    "meta",
    "state",
    "token",
    "fence",
    "mode",
    "fingerprint",
    "self",
    "lease",
    "created",
    "why",
    "stage",
    "bytes",
    "lease_ms",
    "status",
    "until",
    # The last one: see store/redis/records.py.
    "more",
)


class StoreError(Exception):
    """The store does not reply, or replies with an error."""


class OpenKind(Enum):
    """What an open key is: one whose record is not complete."""

    # Its outcome is unknown under `hold`: a person has to decide it.
    UNKNOWN = "unknown"
    # Its lease ended while it was in flight: its owner died or is paused.
    LAPSED = "lapsed"
    IN_FLIGHT = "in_flight"
    # Its outcome is unknown in the mode `retry` or `cancelled`: nobody has to decide it.
    WAIVED = "waived"


# Of a decision, in the audit trail.
EVIDENCE_BYTES = 1024

# What a person may have to decide.
UNDECIDED = (OpenKind.UNKNOWN, OpenKind.LAPSED)


class RecordView(NamedTuple):
    """One record. Times are the store's, in milliseconds."""

    # Digest.
    key: bytes
    state: ViewState
    token: bytes
    now_ms: int
    fence: bytes = b"0"
    mode: bytes = b""
    fingerprint: bytes = b""
    tenant: bytes = b""
    self_check: bytes = b""
    created_ms: int = 0
    lease_left_ms: int = 0
    # Of one in flight, as it is written; 0 of any other.
    lease_end_ms: int = 0
    # Since the lease of an owner ended that stopped renewing it, because it died or is paused. Else 0.
    lapsed_ms: int = 0
    # Until a record that is not complete is removed; -1 where the store does not say.
    left_ms: int = -1
    # Why the outcome is unknown, and how far the exchange got.
    reason: str = ""
    progress: str = ""
    # Of a response that is not complete.
    bytes_stored: int = 0
    # Of the response to a tombstone, or of one that came and does not tell the outcome; 0 for none.
    status: int = 0
    # Of a complete record, and of an expired one until it is dropped.
    response: StoredResponse | None = None
    # Of either, as a hash has it.
    meta: bytes = b""
    # Whether the record lies packed in a string.
    packed: bool = False
    kept: Kept = NOTHING

    @property
    def owner_may_live(self) -> bool:
        """Whether the owner may still work on the key. An owner whose lease has lapsed may be paused, and go on."""
        return self.lease_left_ms > 0 or self.lapsed_ms > 0 or self.state is ViewState.CORRUPT

    @property
    def open_kind(self) -> OpenKind | None:
        """What kind of an open key this is, None for any other record."""
        if self.state is ViewState.IN_FLIGHT:
            return OpenKind.IN_FLIGHT
        if self.state is not ViewState.UNKNOWN:
            return None
        if self.lapsed_ms > 0:
            return OpenKind.LAPSED
        return OpenKind.UNKNOWN if self.mode == HOLD else OpenKind.WAIVED

    @property
    def since_ms(self) -> int:
        """By what open keys are ordered: the time of the claim of an unknown one, the end of any other's lease."""
        ends_ms = self.now_ms + self.lease_left_ms - self.lapsed_ms
        return ends_ms if self.open_kind in (OpenKind.IN_FLIGHT, OpenKind.LAPSED) else self.created_ms


class Deciding(NamedTuple):
    """What a decision about an open key depends on, when it is carried out.

    `token`: of the record that was looked at. `seen_lease`: its `lease_end_ms`, which has to be the same and over, so
    that an owner that is back, or was meanwhile, is left alone; None: whatever it is. `evidence`: for the audit trail,
    UTF-8; what is longer than EVIDENCE_BYTES is cut.
    """

    token: bytes
    seen_lease: int | None = None
    evidence: bytes = b""

    @classmethod
    def of(cls, record: RecordView, evidence: bytes = b"") -> Self:
        """Return what a decision depends on that holds for a record as it was seen, and for no later one."""
        return cls(record.token, record.lease_end_ms, evidence)


# One record from its fields ...


def read_fields(key: bytes, values: list[bytes | None], now_ms: int) -> RecordView | None:
    """Return the record with these values of FIELDS, or None for no record."""
    fields = {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}
    if not fields:
        return None
    if (meta := fields.get("meta")) is not None:
        record = _complete(key, meta, fields.get("until", b""), now_ms)
        return record._replace(kept=unpack_kept(fields.get("more")))
    token = fields.get("token", b"")
    if fields.get("state") == b"released":
        return RecordView(key, ViewState.RELEASED, token, now_ms, fields.get("fence", b"0"))
    try:
        return _unfinished(key, token, fields, now_ms)
    except (KeyError, ValueError):
        return RecordView(key, ViewState.CORRUPT, token, now_ms)


def _complete(key: bytes, meta: bytes, until: bytes, now_ms: int) -> RecordView:
    """Return a complete record or a tombstone. `until`: the end of its retention, empty if it has no tombstone."""
    tenant = tenant_of(meta)
    if meta[:1] == DROPPED:
        record = unpack_expired(key, tenant, meta, now_ms)
    else:
        record = unpack(key, tenant, meta, None, now_ms)
    if isinstance(record, Corrupt):
        return RecordView(key, ViewState.CORRUPT, meta[1:17], now_ms)
    left_ms = int(until) - now_ms if until.isdigit() else 1
    state = effective_state(record.state, 0, left_ms)
    return RecordView(
        key,
        ViewState(state.value),
        record.token,
        now_ms,
        fingerprint=record.fingerprint,
        tenant=tenant,
        created_ms=record.created_ms,
        status=record.status,
        response=record.response,
        meta=meta,
    )


def _unfinished(key: bytes, token: bytes, fields: dict[str, bytes], now_ms: int) -> RecordView:
    """Return a record in flight or unknown. Raises KeyError or ValueError for fields that are no such record."""
    stored_state = State(fields["state"].decode())
    # Further off than a whole lease: the clock stepped back.
    left_ms = min(int(fields["lease"]) - now_ms, int(fields.get("lease_ms", fields["lease"])))
    state = effective_state(stored_state, left_ms)
    lapsed = state is not stored_state
    stored_check, mode, fingerprint = fields["self"], fields["mode"], fields["fingerprint"]
    tenant = stored_check[:16]
    if stored_check != self_check(key, tenant, token, mode, fingerprint):
        raise ValueError
    return RecordView(
        key,
        ViewState(state.value),
        token,
        now_ms,
        fence=fields["fence"],
        mode=mode,
        fingerprint=fingerprint,
        tenant=tenant,
        self_check=stored_check,
        created_ms=int(fields["created"]),
        lease_left_ms=max(0, left_ms),
        lease_end_ms=0 if stored_state is State.UNKNOWN else int(fields["lease"]),
        lapsed_ms=max(1, -left_ms) if lapsed else 0,
        reason="its owner stopped renewing its lease" if lapsed else fields.get("why", b"").decode("utf-8", "replace"),
        progress="" if "why" in fields else describe_stage(fields.get("stage")),
        bytes_stored=int(fields.get("bytes", 0)),
        status=read_status(fields.get("status", b"")),
        kept=unpack_kept(fields.get("more")),
    )


def claim_of(record: RecordView, kept_ms: int) -> Claim:
    """Return the claim that the owner of a record had, without its lease. `kept_ms`: how long the record is kept."""
    return Claim(
        key=record.key,
        token=record.token,
        fence=record.fence,
        mode=record.mode,
        fingerprint=record.fingerprint,
        self_check=record.self_check,
        created_ms=record.created_ms,
        lease_ms=0,
        retention_ms=kept_ms,
        unknown_retention_ms=kept_ms,
        kept=pack_kept(record.kept),
    )
