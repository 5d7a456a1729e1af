"""What is kept with a record comes back from every store, in every state, until its tombstone; and it is bounded."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.store.kept import (
    NOTHING,
    Kept,
    kept_of,
    of_complete,
    original_id,
    pack_body_digest,
    pack_fields,
    pack_first,
    pack_kept,
    pack_note,
    pack_request_id,
    pack_trace,
    pack_values,
    rule_in,
    unpack_fields,
    unpack_kept,
)
from oncegate.store.record import Claim, Record, pack
from oncegate.store.record_view import Deciding, claim_of
from oncegate.store.redis.arguments import claim_head
from oncegate.store.redis.store import RedisStore
from oncegate.store.results import DropStatus, ResolveStatus, SettleStatus
from oncegate.store.store import Store
from tests.probes import Probe, RedisProbe
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

NOW_MS = 1_763_960_000_000
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
    assert await store.resolve_by_operator(decided, Deciding(owner.token), meta, BODY) is ResolveStatus.RESOLVED
    assert await seen(store) == (KEPT, KEPT)
    probe.remove(KEY)
    owner = await owner_of(store)
    assert await store.release_by_operator(KEY, Deciding(owner.token), b"O" * 16, b"9") is ResolveStatus.RELEASED
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
        owner = await owner_of(store, OPEN)
        if ends is not None:
            await ends(owner)
        told = await seen(store)
        assert told[0].rule == "charges"
        await store.records.unpack()
        assert await seen(store) == told
        probe.remove(KEY)


# What is kept for an open key alone ...

CANARY = "canary-8f3a"
OPEN = Kept("order-7", rule="charges", values=(("key", CANARY), ("path:3", "\udcff ä")), first_ms=NOW_MS - 5)


Ends = Callable[[Store, Probe, Claim], Awaitable[object]]


async def _small(store: Store, _probe: Probe, owner: Claim) -> None:
    assert (await store_small(store, owner)).status is SettleStatus.STORED


async def _chunks(store: Store, _probe: Probe, owner: Claim) -> None:
    await store.append(owner, 0, b"first, ", PATIENCE_S, b"a head")
    assert (await store.store(owner, answer(b"first, ", b"last"), b"last", PATIENCE_S)).status is SettleStatus.STORED


async def _large(store: Store, _probe: Probe, owner: Claim) -> None:
    body = b"x" * 70_000
    assert (await store.store(owner, answer(body), body, PATIENCE_S)).status is SettleStatus.STORED


async def _bare(store: Store, _probe: Probe, owner: Claim) -> None:
    bare = answer(BODY, kept=False)
    assert (await store.store(owner, bare, b"", PATIENCE_S)).status is SettleStatus.STORED


async def _lost(store: Store, probe: Probe, owner: Claim) -> None:
    probe.remove(KEY)
    assert (await store_small(store, owner)).record_was_gone


async def _unknown_first(store: Store, _probe: Probe, owner: Claim) -> None:
    await store.mark_unknown(owner, "no answer came", PATIENCE_S)
    assert (await store_small(store, owner)).status is SettleStatus.STORED


async def _resolved(store: Store, _probe: Probe, owner: Claim) -> None:
    await store.mark_unknown(owner, "no answer came", PATIENCE_S)
    view = await store.records.read(KEY)
    assert view is not None
    decided = replace(claim_of(view, 3_600_000), token=b"O" * 16)
    meta, seen = pack(decided, answer(BODY)), Deciding(owner.token, evidence=b'{"status": 200}')
    assert await store.resolve_by_operator(decided, seen, meta, BODY) is ResolveStatus.RESOLVED


async def _released(store: Store, _probe: Probe, owner: Claim) -> None:
    assert (await store.release(owner, PATIENCE_S)).status is SettleStatus.RELEASED


async def _freed(store: Store, _probe: Probe, owner: Claim) -> None:
    done = await store.release_by_operator(KEY, Deciding(owner.token), b"O" * 16, owner.fence)
    assert done is ResolveStatus.RELEASED


async def _purged(store: Store, probe: Probe, owner: Claim) -> None:
    await _small(store, probe, owner)
    view = await store.records.read(KEY)
    assert view is not None
    assert await store.drop(view, purge=True) is DropStatus.DROPPED


ENDS = [_small, _chunks, _large, _bare, _lost, _unknown_first, _resolved, _released, _freed, _purged]


@pytest.mark.parametrize("ends", ENDS, ids=lambda ends: ends.__name__[1:])
@pytest.mark.parametrize("replaces", [False, True], ids=["the first", "a takeover"])
async def test_what_is_kept_to_ask_with_is_gone_with_its_end(store, probe, ends: Ends, replaces: bool) -> None:
    """No complete record, tombstone or free key has any byte of it, whatever layout it had and however it ended."""
    if replaces:
        former = await owner_of(store, NOTHING, mode=b"retry")
        await store.mark_unknown(former, "no answer came", PATIENCE_S)
    owner = await owner_of(store, OPEN, mode=b"retry")
    assert await seen(store) == (OPEN, OPEN)
    assert CANARY.encode().hex() in probe.everything()
    await ends(store, probe, owner)
    assert CANARY.encode().hex() not in probe.everything()
    view = await store.records.read(KEY)
    if view is not None and view.response is not None:
        assert view.kept == replace(OPEN, values=(), first_ms=None)
        # What the record says of its claim is still there.
        assert view.kept.replaced == replaces


async def test_what_is_kept_to_ask_with_stays_while_the_key_is_open(store, probe):
    """In flight, with a chunk, lapsed and unknown; and the audit trail never has it."""
    owner = await owner_of(store, OPEN)
    await store.renew(owner)
    assert await seen(store) == (OPEN, OPEN)
    await store.append(owner, 0, b"first, ", PATIENCE_S, b"a head")
    probe.change(KEY, lease=probe.now_ms() - 1)
    assert await seen(store) == (OPEN, OPEN)
    await store.mark_unknown(owner, "no answer came", PATIENCE_S, 502)
    assert await seen(store) == (OPEN, OPEN)
    if not isinstance(probe, RedisProbe):
        trail = "".join(row[0] for row in probe.sql("SELECT a::text FROM audit a"))
        assert len(trail) > 100
        assert CANARY.encode().hex() not in trail


# The bytes ...


def test_values_are_kept_whole_or_not_at_all():
    """Half of a key would ask for another thing."""
    fits = (("key", "k" * (1024 - len('{"key":""}'))),)
    assert unpack_kept(pack_values(fits)).values == fits
    assert pack_values((("key", fits[0][1] + "k"),)) == pack_values(()) == b""


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"key":1}', b'{"key":{"a":"b"}}', b"\xff", b"[" * 1000, b'"x"'])
def test_damaged_values_are_none(text: bytes) -> None:
    """The other fields are still read."""
    assert unpack_kept(pack_fields([(13, text)]) + pack_kept(Kept(rule="r"))) == Kept(rule="r")


@pytest.mark.parametrize(("time", "first_ms"), [(b"", 0), (b"\0" * 7 + b"\5", 5), (b"\0" * 7, 1), (bytes(9), 1)])
def test_the_time_of_the_first_claim(time: bytes, first_ms: int) -> None:
    """A damaged one is long ago: then no API is relied on."""
    assert unpack_kept(pack_fields([(14, time)])).first_ms == first_ms
    assert pack_first(first_ms) == pack_fields([(14, time)]) or first_ms == 1
    assert pack_first(None) == b""


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
    st.booleans(), st.sampled_from([b"", bytes(16)]),
    st.dictionaries(st.text(max_size=20), TEXTS, max_size=3).map(lambda found: tuple(found.items())),
    st.none() | st.integers(0, 2**64 - 1),
)  # fmt: skip


@given(KEPTS)
def test_what_goes_in_comes_out_within_its_bounds(kept: Kept) -> None:
    """What fits is the same; what is too long is cut behind a whole character."""
    found = unpack_kept(pack_kept(kept))
    assert len(pack_kept(kept)) <= 128 + 128 + 25 + 2 * 255 + 16 + 1024 + 8 + 9 * 3
    assert (found.values, found.first_ms) == (kept.values if pack_values(kept.values) else (), kept.first_ms)
    whole = unpack_kept(of_complete(pack_kept(kept)))
    assert whole == replace(found, values=(), first_ms=None)
    assert whole.replaced == kept.replaced
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
    parts = [pack_first(kept.first_ms), pack_values(kept.values), pack_note(kept.note)]
    parts += [pack_request_id(kept.request_id[:128]), names]
    if kept.body_digest:
        parts.append(pack_body_digest(kept.body_digest))
    if kept.trace:
        parts.append(pack_trace(kept.trace))
    assert unpack_kept(b"".join(parts)) == unpack_kept(packed)
