"""Drops every response that is stored for one tenant. Its keys stay refused for as long as they were to be."""

from dataclasses import dataclass

from oncegate.operating.opened_store import TIMEOUT_MS
from oncegate.store.record import ViewState
from oncegate.store.record_view import RecordView, claim_of
from oncegate.store.results import DropStatus
from oncegate.store.store import Store

WARNING = "Retries of this tenant's requests will get 410 instead of their responses."


@dataclass(slots=True)
class Purged:
    """How many responses, or parts of one, are gone; how many are still to come, and how many may still be there."""

    dropped: int = 0
    in_flight: int = 0
    unconfirmed: int = 0


async def purge_tenant(store: Store, tenant: bytes) -> Purged:
    """Drop every response that is stored for a tenant, whole or in part. Raises StoreError.

    `tenant`: its digest. A damaged record names none and stays.
    """
    purged = Purged()
    # A scan may return a record twice.
    seen: set[bytes] = set()
    async for record in store.records.scan():
        if record.tenant != tenant or record.key in seen:
            continue
        seen.add(record.key)
        if record.state is ViewState.IN_FLIGHT:
            purged.in_flight += 1
        elif (is_gone := await _drop_response(store, record)) is not None:
            purged.dropped += is_gone
            purged.unconfirmed += not is_gone
    return purged


async def _drop_response(store: Store, record: RecordView) -> bool | None:
    """Drop what a record has of a response, and return whether it is gone, or None if there was none."""
    if record.response is not None:
        return await store.drop(record, purge=True) is not DropStatus.UNCONFIRMED
    if record.state is not ViewState.UNKNOWN:
        return None
    if record.bytes_stored:
        if record.left_ms <= 0:
            return False
        # An unknown outcome stays as it is, without the part of a response that came.
        claim, patience_s = claim_of(record, record.left_ms), TIMEOUT_MS / 1000
        if not (await store.mark_unknown(claim, record.reason, patience_s, record.status)).status.is_done:
            return False
    # PostgreSQL has that part in a table of its own.
    dropped = await store.drop(record, purge=True)
    if dropped is DropStatus.UNCONFIRMED:
        return False
    return True if record.bytes_stored or dropped is DropStatus.DROPPED else None
