"""What a reader that follows a response makes of its record, in either layout."""

from typing import Any

from oncegate.decision import State, effective_state
from oncegate.store.kept import Kept, unpack_kept
from oncegate.store.record import DROPPED, Corrupt, StoredResponse, tenant_of, unpack, unpack_expired
from oncegate.store.redis.layouts.packed import hash_fields
from oncegate.store.results import Followed, ReadFailure
from oncegate.store.stages import DROPPED as DROPPED_STAGE

# The fields that `follow` returns of a hash, in their order.
_FIELDS = ("meta", "until", "state", "lease", "lease_ms", "head", "more", "stage")
Fields = dict[str, bytes]


def followed(key: bytes, first: int, reply: Any) -> Followed | ReadFailure:
    """Return what a reply to `follow` means, which asked for the chunks from `first` on."""
    match reply:
        case [b"packed", int() as now_ms, bytes() as value]:
            fields = hash_fields(key, value)
            if isinstance(fields, Corrupt):
                return ReadFailure.INCOMPLETE
            # A packed record has one chunk, or none.
            whole = [fields["b0"]] if "b0" in fields else []
            return _followed(key, first, fields, now_ms, len(whole), whole[first:])
        case [b"hash", int() as now_ms, *rest] if len(rest) > len(_FIELDS):
            values, (count, *chunks) = rest[: len(_FIELDS)], rest[len(_FIELDS) :]
            fields = {name: value for name, value in zip(_FIELDS, values, strict=True) if value is not None}
            return _followed(key, first, fields, now_ms, count, chunks)
        case [b"gone"]:
            return ReadFailure.GONE
        case _:
            return ReadFailure.UNCONFIRMED


def _followed(
    key: bytes, first: int, fields: Fields, now_ms: int, count: int, chunks: list[bytes]
) -> Followed | ReadFailure:
    kept = unpack_kept(fields.get("more"))
    try:
        if (meta := fields.get("meta")) is not None:
            is_over = effective_state(State.COMPLETE, 0, _left_ms(fields.get("until", b""), now_ms)) is State.EXPIRED
            return _complete(key, first, meta, is_over, chunks, kept)
        state = State(fields["state"].decode())
        left_ms = min(int(fields["lease"]) - now_ms, int(fields.get("lease_ms", fields["lease"])))
    except (KeyError, ValueError):
        return ReadFailure.INCOMPLETE
    state = effective_state(state, left_ms)
    if state is State.IN_FLIGHT and not chunks and first < count:
        # A failover lost that chunk, and the owner has appended others since.
        return ReadFailure.INCOMPLETE
    return Followed(
        state,
        fields.get("head", b""),
        chunks,
        count,
        None,
        kept.replaced,
        left_ms if state is State.IN_FLIGHT else 0,
        state is State.IN_FLIGHT and fields.get("stage") == DROPPED_STAGE.wire,
    )


def _complete(
    key: bytes, first: int, meta: bytes, is_over: bool, chunks: list[bytes], kept: Kept
) -> Followed | ReadFailure:
    """Return what is there of a complete record. `is_over`: its retention."""
    tenant = tenant_of(meta)
    if meta[:1] == DROPPED or is_over:
        found = unpack_expired(key, tenant, meta, 0)
        return ReadFailure.INCOMPLETE if isinstance(found, Corrupt) else _ended(State.EXPIRED, [], None, kept)
    found = unpack(key, tenant, meta, None, 0)
    if isinstance(found, Corrupt) or found.response is None:
        return ReadFailure.INCOMPLETE
    response = found.response
    if response.body_stored and first < response.chunks and not chunks:
        return ReadFailure.INCOMPLETE
    return _ended(State.COMPLETE, chunks, response, kept)


def _ended(state: State, chunks: list[bytes], response: StoredResponse | None, kept: Kept) -> Followed:
    count = response.chunks if response is not None and response.body_stored else 0
    return Followed(state, b"", chunks, count, response, kept.replaced, 0)


def _left_ms(until: bytes, now_ms: int) -> int:
    """Return how long it is until the end of a retention; of a record without a tombstone it is not over."""
    return int(until) - now_ms if until.isdigit() else 1
