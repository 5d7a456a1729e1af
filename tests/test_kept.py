"""What is kept with a record comes back from every store, in every state, until its tombstone; and it is bounded."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.store.kept import (
    NOTHING,
    Kept,
    kept_of,
    original_id,
    pack_fields,
    pack_kept,
    pack_note,
    pack_request_id,
    pack_trace,
    rule_in,
    unpack_fields,
    unpack_kept,
)
from oncegate.store.record import Claim, Record, pack
from oncegate.store.record_view import claim_of
from oncegate.store.redis.arguments import claim_head
from oncegate.store.redis.store import RedisStore
from oncegate.store.results import DropStatus, ResolveStatus, SettleStatus
from oncegate.store.store import Store
from tests.probes import Probe
from tests.stores import (
    BODY,
    KEY,
    LEASE_MS,
    OTHER,
    PATIENCE_S,
    SCOPE,
    TOMBSTONE_MS,
    answer,
    claim,
    connected,
    store_small,
)

KEPT = Kept("order-7 ä", bytes(range(25)), b"req-1", "charges", "http://api:9000", False, bytes(range(16)))
OF_ANOTHER = Kept(request_id=b"req-2", rule="orders")


@pytest.fixture
async def store(probe: Probe) -> AsyncIterator[Store]:
    async with connected(probe.url) as store:
        yield store


async def owner_of(store: Store, kept: Kept = KEPT, mode: bytes = b"hold") -> Claim:
    owner = await claim(store, kept=kept, mode=mode)
    assert isinstance(owner, Claim)
    assert unpack_kept(owner.kept) == kept
    return owner


async def seen(store: Store) -> tuple[Kept, Kept]:
    """Return what a duplicate is told, and what an operator is shown."""
    found, view = await claim(store, fingerprint=OTHER), await store.records.read(KEY)
    assert isinstance(found, Record)
    assert view is not None
    assert [one.kept async for one in store.records.scan()] == [view.kept]
    return unpack_kept(found.kept), view.kept


@pytest.mark.parametrize("kept", [KEPT, OF_ANOTHER, NOTHING], ids=["all", "some", "nothing"])
async def test_it_stays_through_the_life_of_a_record(store, kept):
    """In flight, renewed, with a chunk, unknown, and complete with a body in chunks."""
    owner = await owner_of(store, kept)
    assert await seen(store) == (kept, kept)
    await store.renew(owner)
    assert await seen(store) == (kept, kept)
    await store.append(owner, 0, b"first, ", PATIENCE_S)
    assert await seen(store) == (kept, kept)
    assert (await store.store(owner, answer(b"first, ", b"last"), b"last", PATIENCE_S)).status is SettleStatus.STORED
    assert await seen(store) == (kept, kept)


@pytest.mark.parametrize("bodies", [(BODY,), (), (b"x" * 70_000,)], ids=["small", "empty", "large"])
async def test_a_complete_record_has_it(store, bodies):
    """Whether its body comes with the claim or not. A body that comes along still does."""
    owner = await owner_of(store)
    await store.store(owner, answer(*bodies), b"".join(bodies), PATIENCE_S)
    assert await seen(store) == (KEPT, KEPT)
    found = await claim(store)
    assert isinstance(found, Record)
    assert found.body == (BODY if bodies == (BODY,) else found.body)


async def test_an_unknown_record_has_it(store):
    """With its reason and status, and so has one that is settled after it was lost."""
    owner = await owner_of(store)
    await store.mark_unknown(owner, "no answer came", PATIENCE_S, 502)
    assert await seen(store) == (KEPT, KEPT)
    view = await store.records.read(KEY)
    assert view is not None
    assert (view.reason, view.status, claim_of(view, 1).kept) == ("no answer came", 502, pack_kept(KEPT))


async def test_a_record_that_was_lost_is_written_with_it(store, probe):
    """By its owner, who still knows it."""
    for settles in (
        lambda owner: store.mark_unknown(owner, "lost", PATIENCE_S),
        lambda owner: store_small(store, owner),
    ):
        owner = await owner_of(store)
        probe.remove(KEY)
        assert (await settles(owner)).record_was_gone
        assert await seen(store) == (KEPT, KEPT)
        probe.remove(KEY)


async def test_a_takeover_brings_its_own(store, probe):
    """Nothing of the first request is left, also where the second one has nothing."""
    for kept in (OF_ANOTHER, NOTHING):
        owner = await owner_of(store, mode=b"retry")
        await store.mark_unknown(owner, "no answer came", PATIENCE_S)
        await owner_of(store, kept, mode=b"retry")
        assert await seen(store) == (kept, kept)
        probe.remove(KEY)


async def test_a_claim_that_is_claimed_again_keeps_it(store):
    """As the worker does after a pause."""
    owner = await owner_of(store)
    again = await store.reclaim(owner, SCOPE)
    assert isinstance(again, Claim)
    assert unpack_kept(again.kept) == KEPT
    assert await seen(store) == (KEPT, KEPT)


async def test_a_released_key_has_nothing(store):
    """The next request brings its own."""
    owner = await owner_of(store)
    await store.release(owner, PATIENCE_S)
    await owner_of(store, NOTHING)
    assert await seen(store) == (NOTHING, NOTHING)


async def test_an_operators_decision(store, probe):
    """A resolved key keeps it, a freed one does not."""
    owner = await owner_of(store)
    await store.mark_unknown(owner, "no answer came", PATIENCE_S)
    view = await store.records.read(KEY)
    assert view is not None
    decided = replace(claim_of(view, 3_600_000), token=b"O" * 16)
    meta = pack(decided, answer(BODY))
    assert await store.resolve_by_operator(decided, owner.token, meta, BODY) is ResolveStatus.RESOLVED
    assert await seen(store) == (KEPT, KEPT)
    probe.remove(KEY)
    owner = await owner_of(store)
    assert await store.release_by_operator(KEY, owner.token, b"O" * 16, b"9") is ResolveStatus.RELEASED
    view = await store.records.read(KEY)
    assert view is not None
    assert view.kept == NOTHING


async def test_a_tombstone_has_nothing(store):
    """An expired record says nothing of it, and a dropped one has it no more."""
    owner = await owner_of(store)
    await store_small(store, replace(owner, tombstone_ms=TOMBSTONE_MS))
    view = await store.records.read(KEY)
    assert view is not None
    assert view.kept == KEPT
    assert await store.drop(view, purge=True) is DropStatus.DROPPED
    assert await seen(store) == (NOTHING, NOTHING)


async def test_an_expired_record_says_nothing_of_it(store):
    """Before its response is dropped, as after that."""
    owner = await owner_of(store)
    await store_small(store, replace(owner, tombstone_ms=TOMBSTONE_MS, retention_ms=1))
    await asyncio.sleep(0.01)
    found = await claim(store)
    assert isinstance(found, Record)
    assert (found.response, found.kept) == (None, b"")


async def test_unpacked_records_keep_it(store, probe):
    """Open and complete ones, for versions that read hashes alone."""
    if not isinstance(store, RedisStore):
        return
    for ends in (
        None,
        lambda owner: store.mark_unknown(owner, "why", PATIENCE_S),
        lambda owner: store_small(store, owner),
    ):
        owner = await owner_of(store)
        if ends is not None:
            await ends(owner)
        await store.records.unpack()
        assert await seen(store) == (KEPT, KEPT)
        probe.remove(KEY)


# The bytes ...


def request(kept: Kept) -> Claim:
    times = 0, LEASE_MS, 1, 1
    return Claim(KEY, b"t" * 16, b"", b"hold", b"f" * 16, bytes(32), *times, kept=pack_kept(kept))


def test_nothing_takes_no_bytes():
    """In a claim there are the two bytes that say so, as there were before anything could be kept."""
    assert pack_kept(NOTHING) == pack_kept(Kept()) == b""
    head = claim_head(request(NOTHING))
    assert head == claim_head(request(Kept()))
    assert b"\r\n$63\r\n" in head
    assert len(claim_head(request(OF_ANOTHER))) - len(head) == len(b"req-2orders") + 2 * 3


TEXTS = st.text(max_size=300)
KEPTS = st.builds(
    Kept, TEXTS, st.sampled_from([b"", bytes(25), bytes(range(25))]),
    st.text("aZ9-_.~+/=:", max_size=300).map(str.encode), TEXTS, TEXTS,
)  # fmt: skip


@given(KEPTS)
def test_what_goes_in_comes_out_within_its_bounds(kept: Kept) -> None:
    """What fits is the same; what is too long is cut behind a whole character."""
    found = unpack_kept(pack_kept(kept))
    assert len(pack_kept(kept)) <= 128 + 128 + 25 + 2 * 255 + 5 * 3
    assert (found.trace, found.request_id) == (kept.trace, kept.request_id[:128])
    for name, most in (("note", 128), ("rule", 255), ("upstream", 255)):
        before, after = (getattr(one, name).encode("utf-8", "replace").decode() for one in (kept, found))
        assert before.startswith(after)
        assert before == after or most - 4 < len(after.encode()) <= most


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (8, b"a\r\nSet-Cookie: x"),
        (8, b"\xff"),
        (8, b"a\x00"),
        (7, bytes(24)),
        (7, bytes(26)),
        (200, b"of a later version"),
    ],
)
def test_what_cannot_be_used_is_left_out(number: int, value: bytes) -> None:
    """No damage to a store may write a line into a response's head."""
    assert unpack_kept(pack_fields([(number, value)]) + pack_kept(Kept(rule="r"))) == Kept(rule="r")


@given(st.binary(max_size=60))
def test_any_bytes_are_read_without_an_error(packed: bytes) -> None:
    """Damaged ones are nothing, or what they say."""
    kept = unpack_kept(packed)
    try:
        fields: dict[int, Any] = unpack_fields(packed)
    except ValueError:
        assert kept == NOTHING
    else:
        assert kept == kept_of(fields)
        assert (original_id(packed), rule_in(packed)) == (kept.request_id, fields.get(9, b""))
    # Whatever it is, it can stand in a head.
    assert not set(original_id(packed)) & set(b"\r\n\0")


@given(KEPTS)
def test_one_field_is_read_by_itself(kept: Kept) -> None:
    """And written by itself, as a request does it, in whatever order."""
    packed = pack_kept(kept)
    assert (original_id(packed), rule_in(packed).decode()) == (unpack_kept(packed).request_id, unpack_kept(packed).rule)
    names = pack_kept(Kept(rule=kept.rule, upstream=kept.upstream))
    parts = [pack_note(kept.note), pack_request_id(kept.request_id[:128]), names]
    if kept.trace:
        parts.append(pack_trace(kept.trace))
    assert unpack_kept(b"".join(parts)) == unpack_kept(packed)
