"""The store and real servers: every verb in every state, and what delays, repeats and damage may not do.

Each test runs on every kind of store. What only one kind has is tested in a file of its own.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from oncegate.decision import ANY_AGE, State
from oncegate.keys.digests import Digests, Scope
from oncegate.store.kept import Kept, unpack_kept
from oncegate.store.record import Claim, Corrupt, Record, ViewState, intact, pack, pack_tombstone, self_check
from oncegate.store.record_view import Deciding, RecordView
from oncegate.store.results import (
    AppendStatus,
    ClaimResult,
    DropStatus,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    Unconfirmed,
)
from oncegate.store.store import Store
from tests.probes import Probe
from tests.stores import (
    BODY,
    FOREIGN,
    KEY,
    LEASE_MS,
    OTHER,
    PATIENCE_S,
    RETENTION_MS,
    SAME,
    SCOPE,
    TENANT,
    TOMBSTONE_MS,
    UNKNOWN_RETENTION_MS,
    act,
    answer,
    at,
    claim,
    claimed,
    connected,
    key,
    started_anew,
    store_small,
    told,
)

HOUR_MS = 3_600_000
WINDOW_MS = 10_000  # of a derived key
# Of one that took the place of another, there is more: it says so.
CLAIM_FIELDS = {"state", "token", "fence", "mode", "fingerprint", "self", "lease", "created", "lease_ms"}
# A tombstone is what is left of an expired record once its response has been dropped.
STATES = ("absent", "in flight", "lapsed", "unknown", "complete", "expired", "tombstone")


@pytest.fixture
async def store(probe: Probe) -> AsyncIterator[Store]:
    async with connected(probe.url) as store:
        yield store


def claim_raw(
    probe: Probe,
    token: bytes = FOREIGN,
    *,
    mode: bytes = b"hold",
    not_after_ms: int = 1 << 52,
    window_ms: int = 0,
    seen: bytes = b"",
) -> ClaimResult:
    """Claim with arguments that `Store.claim` does not offer."""
    who: dict[str, Any] = {"fingerprint": SAME, "mode": mode, "lease_ms": LEASE_MS, "retention_ms": RETENTION_MS}
    return probe.claim(KEY, TENANT, token, **who, not_after_ms=not_after_ms, window_ms=window_ms, seen=seen)


def word(found: ClaimResult) -> str:
    """Return in one word what came of a claim: that it took the key, that it came late, or the state that it found."""
    match found:
        case Claim():
            return "claimed"
        case Record():
            return found.state.value
        case Unconfirmed(reason="the store was reached too late"):
            return "late"
    raise AssertionError(found)


def shift(probe: Probe, **by_ms: int) -> None:
    """Move times of a record."""
    fields = probe.fields(KEY)
    probe.change(KEY, **{name: int(fields[name]) + ms for name, ms in by_ms.items()})


# Every verb in every state ...

# (what came of it, what became of the record), for the owner and for anybody else.
CLAIMED = ("claimed", "claimed")
AGAIN = ("claimed", "lease and retention anew")
STORED, STORED_LOST = ("stored", "complete"), ("stored, lost", "complete")
BARE, BARE_LOST = ("stored", "complete, no body"), ("stored, lost", "complete, no body")
RELEASED, RELEASED_LOST = ("released", "absent"), ("released, lost", "absent")
UNKNOWN, UNKNOWN_LOST = ("unknown", "unknown"), ("unknown, lost", "unknown")
KEPT = ("appended", "chunk")
RENEWED = ("renewed", "lease and retention anew")


def no(word: str) -> tuple[str, str]:
    return (word, "as before")


TABLE = {
    "claim": {
        "absent": (CLAIMED, CLAIMED),
        "in flight": (AGAIN, no("in_flight")),
        "lapsed": (AGAIN, no("unknown")),
        "unknown": (no("unknown"), no("unknown")),
        "complete": (no("replay"), no("replay")),
        "expired": (no("key_expired"), no("key_expired")),
        "tombstone": (no("key_expired"), no("key_expired")),
    },
    "append": {
        "absent": (no("absent"), no("absent")),
        "in flight": (KEPT, no("fenced")),
        "lapsed": (KEPT, no("fenced")),
        "unknown": (KEPT, no("fenced")),
        "complete": (no("complete"), no("fenced")),
        "expired": (no("complete"), no("fenced")),
        "tombstone": (no("complete"), no("fenced")),
    },
    "renew": {
        "absent": (no("absent"), no("absent")),
        "in flight": (RENEWED, no("fenced")),
        "lapsed": (RENEWED, no("fenced")),
        "unknown": (no("unknown"), no("fenced")),
        "complete": (no("complete"), no("fenced")),
        "expired": (no("complete"), no("fenced")),
        "tombstone": (no("complete"), no("fenced")),
    },
    "store": {
        "absent": (STORED_LOST, STORED_LOST),
        "in flight": (STORED, no("fenced")),
        "lapsed": (STORED, no("fenced")),
        "unknown": (STORED, no("fenced")),
        "complete": (no("stored"), no("fenced")),
        "expired": (no("fenced"), no("fenced")),
        "tombstone": (no("fenced"), no("fenced")),
    },
    "store another": {"complete": (no("fenced"), no("fenced"))},
    "store bare": {
        "absent": (BARE_LOST, BARE_LOST),
        "in flight": (BARE, no("fenced")),
        "lapsed": (BARE, no("fenced")),
        "unknown": (BARE, no("fenced")),
        "complete": (no("stored"), no("fenced")),
        "expired": (no("fenced"), no("fenced")),
        "tombstone": (no("fenced"), no("fenced")),
    },
    "release": {
        "absent": (RELEASED_LOST, RELEASED_LOST),
        "in flight": (RELEASED, no("fenced")),
        "lapsed": (RELEASED, no("fenced")),
        "unknown": (RELEASED, no("fenced")),
        "complete": (no("fenced"), no("fenced")),
        "expired": (no("fenced"), no("fenced")),
        "tombstone": (no("fenced"), no("fenced")),
    },
    "mark unknown": {
        "absent": (UNKNOWN_LOST, UNKNOWN_LOST),
        "in flight": (UNKNOWN, no("fenced")),
        "lapsed": (UNKNOWN, no("fenced")),
        "unknown": (UNKNOWN, no("fenced")),
        "complete": (no("fenced"), no("fenced")),
        "expired": (no("fenced"), no("fenced")),
        "tombstone": (no("fenced"), no("fenced")),
    },
    "read": {
        "absent": (no("gone"), no("gone")),
        "in flight": (no("gone"), no("gone")),
        "lapsed": (no("gone"), no("gone")),
        "unknown": (no("gone"), no("gone")),
        "complete": (no("chunks"), no("gone")),
        "expired": (no("gone"), no("gone")),
        "tombstone": (no("gone"), no("gone")),
    },
}


ROWS = [
    pytest.param(verb, state, own, *expected[not own], id=f"{verb}-{state}-{'own' if own else 'foreign'}")
    for verb, states in TABLE.items()
    for state, expected in states.items()
    for own in (True, False)
]


def assert_became(probe: Probe, became: str, before: dict[str, bytes], owner: Claim, own: bool) -> None:
    """Check the whole record, its lease and its retention."""
    after, now_ms = probe.fields(KEY), probe.now_ms()
    lease_anew = started_anew(int(after.get("lease", b"0")) - now_ms, LEASE_MS)
    left_ms = probe.left_ms(KEY)
    retention_anew, unknown_anew = started_anew(left_ms, RETENTION_MS), started_anew(left_ms, UNKNOWN_RETENTION_MS)
    token = owner.token if own else FOREIGN
    match became:
        case "as before":
            assert after == before
            assert not retention_anew
            assert not unknown_anew
        case "absent":
            assert after == {}
        case "claimed":
            assert after.keys() == CLAIM_FIELDS
            assert (after["state"], after["mode"], after["fingerprint"]) == (b"in_flight", b"hold", SAME)
            assert after["self"] == self_check(KEY, TENANT, after["token"], b"hold", SAME)
            assert (after["token"] == owner.token) == own
            assert int(after["fence"]) > int(owner.fence)
            assert now_ms - LEASE_MS < int(after["created"]) <= now_ms
            assert lease_anew
            assert unknown_anew
        case "lease and retention anew":
            assert {**after, "lease": b"", "stage": b""} == {**before, "lease": b"", "stage": b""}
            assert lease_anew
            assert unknown_anew or not probe.renewals_write_expiry
        case "chunk":
            # Renewals keep the lease: a stream would write it with each batch otherwise.
            assert after == {**before, "b0": b"chunk", "bytes": b"5"}
            assert not retention_anew
            # A packed claim is written anew, as a hash.
            assert unknown_anew == probe.packed
        case "complete" | "complete, no body":
            kept = became == "complete"
            who = replace(owner, token=token)
            assert after == {"meta": pack(who, answer(BODY, kept=kept))} | ({"b0": BODY} if kept else {})
            assert retention_anew
        case "unknown":
            assert after == {
                "state": b"unknown",
                "token": token,
                "fence": owner.fence,
                "mode": b"hold",
                "fingerprint": SAME,
                "self": owner.self_check,
                "created": b"%d" % owner.created_ms,
                "lease": b"0",
                "why": b"cut off",
            }
            assert unknown_anew
        case _:
            raise AssertionError(became)


@pytest.mark.parametrize(("verb", "state", "own", "result", "became"), ROWS)
async def test_every_verb_in_every_state(store, probe, verb, state, own, result, became):
    """The result of every verb in every state, and every field of the record after it, are those of the table."""
    owner = await at(store, probe, state)
    before = probe.fields(KEY)
    assert await act(store, verb, owner, own) == result
    assert_became(probe, became, before, owner, own)


def test_the_table_is_whole():
    """The table has every verb in every state; only a complete record can meet another response."""
    for verb, states in TABLE.items():
        assert tuple(states) == (("complete",) if verb == "store another" else STATES)


@pytest.mark.parametrize(
    ("state", "same", "other"),
    [
        ("in flight", "in_flight", "mismatch"),
        ("lapsed", "unknown", "mismatch"),
        ("complete", "replay", "mismatch"),
        ("unknown", "unknown", "mismatch"),
        ("expired", "key_expired", "mismatch"),
        ("tombstone", "key_expired", "mismatch"),
    ],
)
async def test_what_a_duplicate_finds(store, probe, state, same, other):
    """State and fingerprint decide what a duplicate gets; a mismatch comes first, and nothing is changed."""
    await at(store, probe, state)
    before = probe.fields(KEY)
    assert told(await claim(store)) == same
    assert told(await claim(store, fingerprint=OTHER), OTHER) == other
    found = await store.peek(KEY, SCOPE, LEASE_MS)
    assert (told(found), told(found, OTHER)) == (same, other)
    assert probe.fields(KEY) == before
    assert probe.left_ms(KEY) <= RETENTION_MS // 2


async def test_looking_at_a_free_key_does_not_take_it(store, probe):
    """A peek at a key without a record writes none."""
    assert await store.peek(KEY, SCOPE, LEASE_MS) is None
    assert len(probe.keys()) == 0


async def test_a_replay_takes_one_round_trip(store, probe):
    """The claim of a complete key returns its small response with the body."""
    await at(store, probe, "complete")
    found = await claim(store)
    assert isinstance(found, Record)
    assert (found.response, found.body) == (answer(BODY), BODY)
    assert intact(found.response, found.body)


@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
@pytest.mark.parametrize("drop", ["mark unknown", "store bare", "release"])
async def test_what_is_not_kept_leaves_no_chunks_behind(store, probe, state, drop):
    """Marking unknown, storing without a body and releasing remove the chunks that were appended."""
    owner = await at(store, probe, state)
    for index in range(3):
        assert await store.append(owner, index, b"x" * 1000, PATIENCE_S) == AppendStatus.APPENDED
    await act(store, drop, owner, own=True)
    assert not [field for field in probe.fields(KEY) if field.startswith("b")]


async def test_the_fence_only_grows(store, probe):
    """Each claim has a greater fence, also after a release, and after a fence that is ahead of the clock."""
    fences = []
    for _ in range(5):
        owner = await claimed(store, b"retry")
        fences.append(int(owner.fence))
        await store.release(owner, PATIENCE_S)
    owner = await at(store, probe, "lapsed", b"retry")
    ahead = int(owner.fence) + HOUR_MS * 1000
    probe.change(KEY, fence=ahead)
    fences += [int(owner.fence), ahead, int((await claimed(store)).fence)]
    assert fences == sorted(set(fences))
    assert fences[-1] == ahead + 1


# Chunks ...

CHUNKS = (b"a" * 200_000, b"b" * 100_000, b"c" * 100_000, b"d" * 7)


@pytest.mark.parametrize("last", [True, False], ids=["last with the settle", "all appended"])
@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
async def test_a_large_answer_is_stored_in_chunks(store, probe, state, last):
    """Chunks are appended one by one, counted by the settle, and read back as many at a time as fit."""
    owner = await at(store, probe, state)
    for index, chunk in enumerate(CHUNKS[: -1 if last else None]):
        assert await store.append(owner, index, chunk, PATIENCE_S) == AppendStatus.APPENDED
    settled = await store.store(owner, answer(*CHUNKS), CHUNKS[-1] if last else b"", PATIENCE_S)
    assert settled == SettleResult(SettleStatus.STORED)
    assert probe.fields(KEY) == {
        "meta": pack(owner, answer(*CHUNKS)),
        **{f"b{index}": chunk for index, chunk in enumerate(CHUNKS)},
    }
    assert started_anew(probe.left_ms(KEY), RETENTION_MS)
    found = await claim(store)
    assert isinstance(found, Record)
    assert found.body is None
    assert await store.read(KEY, owner.token, 0) == [CHUNKS[0]]
    assert await store.read(KEY, owner.token, 1) == list(CHUNKS[1:])
    assert await store.read(KEY, owner.token, 4) == ReadFailure.INCOMPLETE


async def test_a_repeated_append_is_harmless(store, probe):
    """An append with the same index and bytes counts once; with other bytes it is incomplete and changes nothing."""
    owner = await claimed(store)
    assert await store.append(owner, 0, b"abc", PATIENCE_S) == AppendStatus.APPENDED
    before = probe.fields(KEY)
    assert await store.append(owner, 0, b"abc", PATIENCE_S) == AppendStatus.APPENDED
    assert await store.append(owner, 0, b"abd", PATIENCE_S) == AppendStatus.INCOMPLETE
    assert await store.append(owner, 0, b"", PATIENCE_S) == AppendStatus.INCOMPLETE
    assert probe.fields(KEY) == before
    assert before["bytes"] == b"3"
    assert await store.store(owner, answer(b"abc", b"d"), b"d", PATIENCE_S) == SettleResult(SettleStatus.STORED)


async def test_chunks_may_come_in_any_order(store, probe):
    """A chunk that overtook another gives the same record."""
    owner = await claimed(store)
    for index in (2, 0, 1):
        assert await store.append(owner, index, b"%d" % index, PATIENCE_S) == AppendStatus.APPENDED
    assert await store.store(owner, answer(b"0", b"1", b"2"), b"", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    assert await store.read(KEY, owner.token, 0) == [b"0", b"1", b"2"]


TORN = {
    "one missing": ([(0, b"ab")], answer(b"ab", b"cd", b"e"), b"e"),
    "the first missing": ([(1, b"cd")], answer(b"ab", b"cd", b"e"), b"e"),
    "all missing": ([], answer(b"ab", b"cd", b"e"), b"e"),
    "the last missing": ([(0, b"ab"), (1, b"cd")], answer(b"ab", b"cd", b"e"), b""),
    "the only one missing": ([], answer(b"ab"), b""),
    "one too many": ([(0, b"ab"), (1, b"cd"), (2, b"e")], answer(b"ab", b"cd"), b""),
    "one shorter": ([(0, b"a")], answer(b"ab", b"cd"), b"cd"),
    "the last shorter": ([(0, b"ab")], answer(b"ab", b"cd"), b"c"),
}


@pytest.mark.parametrize(("appended", "stored", "last"), TORN.values(), ids=TORN.keys())
async def test_a_record_that_lacks_chunks_is_not_made_complete(store, probe, appended, stored, last):
    """The settle is incomplete and changes nothing; the response can still be stored without its body."""
    owner = await claimed(store)
    for index, chunk in appended:
        assert await store.append(owner, index, chunk, PATIENCE_S) == AppendStatus.APPENDED
    before = probe.fields(KEY)
    assert await store.store(owner, stored, last, PATIENCE_S) == SettleResult(SettleStatus.INCOMPLETE)
    assert probe.fields(KEY) == before
    assert await store.store(owner, replace(stored, body_stored=False), b"", PATIENCE_S) == SettleResult(
        SettleStatus.STORED
    )
    assert told(await claim(store)) == "not_kept"


# A record that vanished ...


@pytest.mark.parametrize("gone", ["whole", "appended before", "appended since"])
async def test_a_large_answer_whose_record_vanished_is_torn(store, probe, gone):
    """A record that vanished took its chunks along: nothing is stored under a key that has only some of them."""
    owner = await claimed(store)
    if gone == "appended before":
        await store.append(owner, 0, b"ab", PATIENCE_S)
    probe.remove(KEY)
    if gone == "appended since":
        assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.ABSENT
    assert await store.store(owner, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.INCOMPLETE)
    assert len(probe.keys()) == 0
    settled = await store.store(owner, answer(b"ab", b"cd", kept=False), b"", PATIENCE_S)
    assert settled == SettleResult(SettleStatus.STORED, record_was_gone=True)
    assert told(await claim(store)) == "not_kept"


@pytest.mark.fault(36)
@pytest.mark.parametrize("verb", ["append", "renew", "store", "store bare", "release", "mark unknown"])
@pytest.mark.parametrize("by_then", ["in flight", "lapsed", "unknown", "complete"])
async def test_a_record_that_vanished_and_was_claimed_by_another(store, probe, verb, by_then):
    """The first owner is fenced by every verb, and the other's record stays as it is."""
    owner = await at(store, probe, "absent")
    await at(store, probe, by_then)
    before = probe.fields(KEY)
    assert await act(store, verb, owner, own=True) == "fenced"
    assert probe.fields(KEY) == before


async def test_a_claim_is_claimed_again_before_sending(store, probe):
    """A reclaim gets its own record back, or a new one if there is none; another's record is returned."""
    owner = await claimed(store)
    again = await store.reclaim(owner, SCOPE)
    assert again == owner
    probe.remove(KEY)
    again = await store.reclaim(owner, SCOPE)
    assert isinstance(again, Claim)
    assert (again.token, int(again.fence) > int(owner.fence)) == (owner.token, True)
    probe.remove(KEY)
    await claimed(store)
    assert told(await store.reclaim(owner, SCOPE)) == "in_flight"


# Where the record's own mode is retry ...

RETRY = [
    ("retry", "in flight", "in_flight", "mismatch"),
    ("retry", "lapsed", "claimed", "mismatch"),
    ("retry", "unknown", "claimed", "mismatch"),
    ("retry", "complete", "replay", "mismatch"),
    ("hold", "in flight", "in_flight", "mismatch"),
    ("hold", "lapsed", "unknown", "mismatch"),
    ("hold", "unknown", "unknown", "mismatch"),
    ("hold", "complete", "replay", "mismatch"),
]


@pytest.mark.fault(22, 33, 47)
@pytest.mark.parametrize("asked", [b"hold", b"retry"])
@pytest.mark.parametrize(("mode", "state", "same", "other"), RETRY)
async def test_an_unknown_key_is_claimed_anew_where_its_record_allows_it(store, probe, mode, state, same, other, asked):
    """The record's mode decides, not the newcomer's: a new token, a greater fence, the same fingerprint only."""
    owner = await at(store, probe, state, mode.encode())
    if state in ("in flight", "lapsed"):
        await store.append(owner, 0, b"x", PATIENCE_S)
        probe.change(KEY, lease=probe.now_ms() + (LEASE_MS // 2 if state == "in flight" else -1))
    before = probe.fields(KEY)
    assert told(await claim(store, fingerprint=OTHER, mode=asked), OTHER) == other
    assert probe.fields(KEY) == before
    found = await claim(store, mode=asked)
    assert told(found) == same
    if not isinstance(found, Claim):
        assert probe.fields(KEY) == before
        return
    assert found.token != owner.token
    assert int(found.fence) > int(owner.fence)
    after = probe.fields(KEY)
    assert after.keys() - {"more"} == CLAIM_FIELDS
    assert (after["state"], after["token"], after["mode"]) == (b"in_flight", found.token, asked)
    assert started_anew(int(after["lease"]) - probe.now_ms(), LEASE_MS)
    assert started_anew(probe.left_ms(KEY), UNKNOWN_RETENTION_MS)
    for verb in ("append", "renew", "store", "store bare", "release", "mark unknown"):
        assert await act(store, verb, owner, own=True) == "fenced"
    assert probe.fields(KEY) == after


@pytest.mark.parametrize("state", ["lapsed", "unknown"])
async def test_a_takeover_knows_what_was_kept_before(store, probe, state):
    """The new owner learns of the request that had the key; one that takes a free key learns of none."""
    before = Kept(trace=b"t" * 25, request_id=b"first")
    first = await claim(store, mode=b"retry", kept=before)
    assert isinstance(first, Claim)
    assert first.kept_before == b""
    if state == "lapsed":
        probe.change(KEY, lease=probe.now_ms() - 1)
    else:
        await store.mark_unknown(first, "cut off", PATIENCE_S)
    second = await claim(store, mode=b"retry", kept=Kept(request_id=b"second"))
    assert isinstance(second, Claim)
    assert unpack_kept(second.kept_before) == before


async def test_the_owner_itself_claims_anew_what_it_had_given_up(store, probe):
    """An owner takes its own unknown record over where the mode is retry, with a greater fence."""
    owner = await at(store, probe, "unknown", b"retry")
    again = await store.reclaim(owner, SCOPE)
    assert isinstance(again, Claim)
    assert int(again.fence) > int(owner.fence)
    assert probe.fields(KEY)["state"] == b"in_flight"
    assert await store.renew(again) == RenewStatus.RENEWED


@pytest.mark.parametrize("became", ["renewed", "taken", "stored", "damaged"])
async def test_a_takeover_needs_the_record_that_was_checked(store, probe, became):
    """A record that changed between the check and the takeover is not overwritten."""
    async with connected(probe.url) as elsewhere:
        owner = await at(elsewhere, probe, "lapsed", b"retry")
        may_take_over, left = store._claims._may_take_over, []

        async def meanwhile(*args: Any) -> bool:
            is_open = await may_take_over(*args)
            if not left:
                match became:
                    case "renewed":
                        assert await elsewhere.renew(owner) == RenewStatus.RENEWED
                    case "taken":
                        assert isinstance(await claim(elsewhere, mode=b"retry"), Claim)
                    case "stored":
                        assert await store_small(elsewhere, owner) == SettleResult(SettleStatus.STORED)
                    case _:
                        probe.change(KEY, token=FOREIGN, self=b"x")
                left.append(probe.fields(KEY))
            return is_open

        store._claims._may_take_over = meanwhile
        expected = {"stored": "replay", "damaged": "corrupt"}.get(became, "in_flight")
        assert told(await claim(store)) == expected
        assert left == [probe.fields(KEY)]


async def test_of_many_newcomers_one_takes_an_open_key_over(store, probe):
    """Of fifty claims that checked the same open record, one takes it over; the others get the new record."""
    await at(store, probe, "unknown", b"retry")
    found = await asyncio.gather(*[claim(store, mode=b"retry") for _ in range(50)])
    assert sorted(map(told, found)) == ["claimed"] + ["in_flight"] * 49


# What outlives its response ...


async def test_a_response_is_dropped_once_its_retention_is_over(store, probe):
    """A purge does not wait for it. Whoever asks is told the same before and after the drop, which frees no key."""
    owner = replace(await claimed(store), tombstone_ms=TOMBSTONE_MS)
    assert await store_small(store, owner) == SettleResult(SettleStatus.STORED)
    left_ms = probe.left_ms(KEY)
    assert RETENTION_MS < left_ms <= RETENTION_MS + TOMBSTONE_MS
    view = await store.records.read(KEY)
    before = probe.fields(KEY)
    assert view.state is ViewState.COMPLETE
    assert await store.drop(view) is DropStatus.KEPT
    assert await store.drop(view._replace(token=FOREIGN), purge=True) is DropStatus.FENCED
    assert probe.fields(KEY) == before
    probe.change(KEY, until=probe.now_ms())
    expired, seen = await claim(store), await store.records.read(KEY)
    assert (seen.state, seen.response.status) == (ViewState.EXPIRED, 201)
    assert await store.drop(view) is DropStatus.DROPPED
    assert await store.drop(view) is DropStatus.DROPPED
    dropped, seen = await claim(store), await store.records.read(KEY)
    assert replace(dropped, now_ms=0) == replace(expired, now_ms=0)
    assert (dropped.status, dropped.created_ms) == (201, owner.created_ms)
    assert (seen.state, seen.response, seen.status) == (ViewState.EXPIRED, None, 201)
    assert BODY not in b"".join(probe.fields(KEY).values())
    assert left_ms - 60_000 < probe.left_ms(KEY) <= left_ms


@pytest.mark.parametrize("state", ["absent", "in flight", "unknown", "complete"])
async def test_a_purge_without_tombstones(store, probe, state):
    """A complete record becomes a tombstone for the rest of its time; nothing else is touched."""
    owner = await at(store, probe, state)
    before, left_ms = probe.fields(KEY), probe.left_ms(KEY)
    view = RecordView(KEY, ViewState.COMPLETE, owner.token, 0, meta=before.get("meta", b"m" * 130))
    dropped = await store.drop(view, purge=True)
    if state == "complete":
        assert dropped is DropStatus.DROPPED
        assert told(await claim(store)) == "key_expired"
        assert left_ms - 60_000 < probe.left_ms(KEY) <= left_ms
    else:
        assert dropped is DropStatus.ABSENT
        assert probe.fields(KEY) == before


# Derived keys have a window ...

WINDOWED = [
    ("complete", 0, HOUR_MS, "complete"),
    ("complete", WINDOW_MS, WINDOW_MS // 2, "complete"),
    ("complete", WINDOW_MS, WINDOW_MS + 1, "claimed"),
    ("complete", WINDOW_MS, -HOUR_MS, "complete"),
    ("complete", ANY_AGE, 0, "claimed"),
    ("complete", ANY_AGE, -HOUR_MS, "complete"),
    ("in flight", WINDOW_MS, WINDOW_MS + 1, "in_flight"),
    ("lapsed", WINDOW_MS, WINDOW_MS + 1, "in_flight"),
    ("unknown", WINDOW_MS, WINDOW_MS + 1, "unknown"),
    ("expired", WINDOW_MS, WINDOW_MS // 2, "expired"),
    ("expired", WINDOW_MS, WINDOW_MS + 1, "claimed"),
    ("tombstone", WINDOW_MS, WINDOW_MS // 2, "expired"),
    ("tombstone", WINDOW_MS, WINDOW_MS + 1, "claimed"),
]


@pytest.mark.parametrize(("state", "window_ms", "age_ms", "result"), WINDOWED)
async def test_a_derived_key_is_free_again_after_its_window(store, probe, state, window_ms, age_ms, result):
    """Only a complete record older than the window is replaced, or its tombstone; nothing of its response is left."""
    owner = await at(store, probe, state)
    created_ms = probe.now_ms() - age_ms
    if state in ("complete", "expired", "tombstone"):
        meta = pack(replace(owner, created_ms=created_ms), answer(BODY))
        probe.change(KEY, meta=pack_tombstone(KEY, meta) if state == "tombstone" else meta)
    else:
        probe.change(KEY, created=created_ms)
    before = probe.fields(KEY)
    late = claim_raw(probe, window_ms=window_ms, not_after_ms=probe.now_ms() - 1, seen=owner.token)
    assert word(late) == {"in flight": "in_flight", "lapsed": "in_flight", "tombstone": "expired"}.get(state, state)
    for seen in (b"", FOREIGN):  # unchecked, or checked and then replaced
        assert word(claim_raw(probe, window_ms=window_ms, seen=seen)) == word(late)
    assert probe.fields(KEY) == before
    found = claim_raw(probe, window_ms=window_ms, seen=owner.token)
    assert word(found) == result
    if result != "claimed":
        assert probe.fields(KEY) == before
        return
    assert isinstance(found, Claim)
    assert int(found.fence) > int(owner.fence)
    after = probe.fields(KEY)
    assert after.keys() - {"more"} == CLAIM_FIELDS
    assert (after["token"], after["fence"]) == (FOREIGN, found.fence)
    assert started_anew(probe.left_ms(KEY), RETENTION_MS)
    assert await act(store, "store", owner, own=True) == "fenced"


async def test_the_lease_of_a_view_does_not_grow_when_the_clock_steps_back(store, probe):
    await claimed(store)
    probe.change(KEY, lease=probe.now_ms() + 3_600_000)
    view = await store.records.read(KEY)
    assert view.lease_left_ms == LEASE_MS


# Delayed, repeated and reordered ...

LATE = [
    ("store", "append", "complete"),
    ("store", "renew", "complete"),
    ("store", "release", "fenced"),
    ("store", "mark unknown", "fenced"),
    ("store", "store another", "fenced"),
    ("store", "store", "stored"),
    ("release", "append", "absent"),
    ("release", "renew", "absent"),
    ("mark unknown", "renew", "unknown"),
]


@pytest.mark.parametrize(("settle", "late", "word"), LATE)
async def test_what_comes_after_a_settle_changes_nothing(store, probe, settle, late, word):
    """A delayed command of the owner that arrives after its settle changes neither record nor retention."""
    owner = await claimed(store)
    await act(store, settle, owner, own=True)
    probe.expire(KEY, RETENTION_MS // 2)
    before = probe.fields(KEY)
    assert await act(store, late, owner, own=True) == word
    assert probe.fields(KEY) == before
    assert probe.left_ms(KEY) <= RETENTION_MS // 2


async def test_a_late_append_brings_nothing_back(store, probe):
    """A chunk that arrives after its key was marked unknown leaves it unknown, and cannot be read."""
    owner = await at(store, probe, "unknown")
    await store.append(owner, 0, b"late", PATIENCE_S)
    assert told(await claim(store)) == "unknown"
    assert await store.read(KEY, owner.token, 0) == ReadFailure.GONE


@pytest.mark.parametrize("mode", [b"hold", b"retry"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "foreign"])
@pytest.mark.parametrize("state", STATES)
async def test_a_claim_after_its_time_changes_nothing(store, probe, state, own, mode):
    """A claim executed after not_after returns late, or the record that exists."""
    owner = await at(store, probe, state, mode)
    before, left_ms = probe.fields(KEY), probe.left_ms(KEY)
    token = owner.token if own else FOREIGN
    found = word(claim_raw(probe, token, mode=mode, not_after_ms=probe.now_ms() - 1))
    assert found in ("late", before.get("state", b"complete" if state == "complete" else b"expired").decode())
    assert (found == "late") == (state == "absent" or (own and state in ("in flight", "lapsed")))
    assert probe.fields(KEY) == before
    assert probe.left_ms(KEY) <= left_ms
    assert bool(probe.fields(KEY)) == (state != "absent")


# The clocks ...


@pytest.mark.fault(58)
@pytest.mark.parametrize(("mode", "result"), [(b"hold", "unknown"), (b"retry", "claimed")])
async def test_the_servers_clock_steps_forward(store, probe, mode, result):
    """Leases end early: the key is unknown, or claimed anew where the mode is retry, and the old owner is fenced."""
    owner = await at(store, probe, "in flight", mode)
    shift(probe, lease=-HOUR_MS)
    shift(probe, created=-HOUR_MS)
    assert told(await claim(store)) == result
    assert await store.renew(owner) == (RenewStatus.RENEWED if result == "unknown" else RenewStatus.FENCED)


@pytest.mark.fault(58)
async def test_the_servers_clock_steps_back(store, probe):
    """A lease that seems to last for an hour begins anew at the first look, with its owner's length, and then ends."""
    owner = await at(store, probe, "in flight")
    for look in (lambda: claim(store), lambda: store.peek(KEY, SCOPE, 500)):
        shift(probe, lease=HOUR_MS)
        shift(probe, created=HOUR_MS)
        for elapsed_ms, left_ms in ((0, LEASE_MS), (LEASE_MS // 2, LEASE_MS // 2), (LEASE_MS, -LEASE_MS // 2)):
            shift(probe, lease=-elapsed_ms)
            found = await look()
            assert isinstance(found, Record)
            assert left_ms - 1000 <= found.lease_left_ms <= left_ms
    assert await store.renew(owner) == RenewStatus.RENEWED
    assert started_anew(int(probe.fields(KEY)["lease"]) - probe.now_ms(), LEASE_MS)


async def test_callers_that_stop_waiting_do_not_shift_the_others(store, probe):
    """Of 200 concurrent claims some are cancelled at any moment; each of the others gets its own key."""
    dice = random.Random(11)

    async def one(number: int) -> Claim:
        await asyncio.sleep(dice.random() * 0.02)
        return await claimed(store, key=key(number))

    tasks = [asyncio.ensure_future(one(number)) for number in range(2, 202)]
    for task in dice.sample(tasks, 80):
        asyncio.get_running_loop().call_later(dice.random() * 0.03, task.cancel)
    for number, found in enumerate(await asyncio.gather(*tasks, return_exceptions=True), 2):
        if isinstance(found, Claim):
            assert found.key == key(number)
            assert probe.fields(found.key)["token"] == found.token
        else:
            assert isinstance(found, asyncio.CancelledError)
    assert told(await claim(store)) == "claimed"


# Damaged records ...


@pytest.mark.fault(55)
async def test_a_complete_record_that_was_damaged_is_corrupt(store, probe):
    """Whichever byte was damaged, the record is never replayed, never claimed, and not changed."""
    await at(store, probe, "complete")
    meta = probe.fields(KEY)["meta"]
    for wrong in probe.damages("meta", meta):
        if wrong is None:
            continue
        probe.change(KEY, meta=wrong)
        before = probe.fields(KEY)
        found = await claim(store)
        # In a packed record the head is under the digest of the response, as its body is.
        assert isinstance(found, Corrupt) or (probe.packed and not intact(found.response, found.body)), wrong
        assert probe.fields(KEY) == before


async def test_a_stored_body_that_was_damaged_is_not_intact(store, probe):
    """A body with any byte changed, or without one, is not intact."""
    await at(store, probe, "complete")
    for wrong in (change for change in probe.damages("b0", BODY) if change is not None):
        probe.change(KEY, b0=wrong)
        found = await claim(store)
        assert isinstance(found, Record)
        assert not intact(found.response, found.body)
    probe.change(KEY, b0=None)
    found = await claim(store)
    assert isinstance(found, Record)
    assert not intact(found.response, found.body or b"")


@pytest.mark.fault(55)
@pytest.mark.parametrize("mode", [b"hold", b"retry"])
@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
@pytest.mark.parametrize("field", ["state", "token", "mode", "fingerprint", "self"])
async def test_a_running_record_that_was_damaged_is_corrupt(store, probe, state, field, mode):
    """A record in flight or unknown with a damaged or missing field is never claimed, whatever its mode."""
    await at(store, probe, state, mode)
    value = probe.fields(KEY)[field]
    for wrong in probe.damages(field, value):
        probe.change(KEY, **{field: wrong})
        before = probe.fields(KEY)
        assert isinstance(await claim(store), Corrupt), wrong
        assert probe.fields(KEY) == before


@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
@pytest.mark.parametrize("field", ["lease", "created", "fence"])
async def test_a_damaged_time_or_fence_frees_no_key(store, probe, state, field):
    """Damage to a time or a fence may read as another number, never as a free or complete key."""
    await at(store, probe, state)
    value = probe.fields(KEY)[field]
    for wrong in probe.damages(field, value):
        probe.change(KEY, **{field: wrong})
        before = probe.fields(KEY)
        assert told(await claim(store)) in ("in_flight", "unknown", "corrupt"), wrong
        # A lease that seems too long begins anew.
        assert {**probe.fields(KEY), "lease": b""} == {**before, "lease": b""}


@pytest.mark.parametrize("state", ["lapsed", "unknown"])
async def test_a_state_that_nobody_knows_is_not_claimed_anew(store, probe, state):
    """A record in an unknown state is corrupt, also where its mode is retry."""
    await at(store, probe, state, b"retry")
    value = probe.fields(KEY)["state"]
    for wrong in probe.damages("state", value):
        probe.change(KEY, state=wrong)
        before = probe.fields(KEY)
        assert isinstance(await claim(store), Corrupt), wrong
        assert probe.fields(KEY) == before


@pytest.mark.fault(55)
@pytest.mark.parametrize("mode", [b"hold", b"retry"])
@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown", "complete"])
async def test_a_record_found_in_another_place_is_corrupt(store, probe, state, mode):
    """A record copied to another key, or read for another tenant, is never replayed and never claimed."""
    await at(store, probe, state, mode)
    elsewhere = Digests(b"").key(SCOPE, b"key-2")
    probe.copy(KEY, elsewhere)
    before = probe.fields(elsewhere)
    assert isinstance(await claim(store, elsewhere, window_ms=1), Corrupt)
    assert isinstance(await claim(store, scope=Scope(b"default", b"N" * 16), window_ms=1), Corrupt)
    assert isinstance(await store.peek(elsewhere, SCOPE, LEASE_MS), Corrupt)
    assert probe.fields(elsewhere) == before
    assert not isinstance(await claim(store), Corrupt)


@pytest.mark.fault(55)
async def test_a_record_of_a_newer_layout_is_corrupt(store, probe):
    """A proxy does not guess the layout of a newer version."""
    await at(store, probe, "complete")
    probe.change(KEY, meta=b"\x03" + probe.fields(KEY)["meta"][1:])
    assert await claim(store) == Corrupt("unknown layout")


# Operators ...


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["resolve", "release_by_operator"])
async def test_what_an_operator_decides(store, probe, state, how):
    """An operator decides only keys in flight, lapsed or unknown, by the token that was shown; the owner is fenced."""
    owner = await at(store, probe, state)
    before = probe.fields(KEY)

    async def decide(seen: bytes) -> ResolveStatus:
        if how == "release_by_operator":
            return await store.release_by_operator(KEY, Deciding(seen), store.token(), b"5")
        meta = pack(replace(owner, token=store.token()), answer(b"by hand"))
        return await store.resolve_by_operator(owner, Deciding(seen), meta, b"by hand")

    if state in ("absent", "complete", "expired", "tombstone"):
        word = "absent" if state == "absent" else "complete"
        assert await decide(owner.token) == await decide(FOREIGN) == ResolveStatus(word)
        assert probe.fields(KEY) == before
        return
    assert await decide(FOREIGN) is ResolveStatus.FENCED
    assert probe.fields(KEY) == before
    assert await decide(owner.token) is (
        ResolveStatus.RELEASED if how == "release_by_operator" else ResolveStatus.RESOLVED
    )
    assert (await store_small(store, owner)).status is SettleStatus.FENCED
    assert (await store.release(owner, PATIENCE_S)).status is SettleStatus.FENCED
    assert await store.renew(owner) == RenewStatus.FENCED
    assert await store.peek(KEY, SCOPE, LEASE_MS) is None or how == "resolve"
    found = await claim(store)
    if how == "release_by_operator":
        assert isinstance(found, Claim)
        assert int(found.fence) > int(owner.fence)
    else:
        assert isinstance(found, Record)
        assert (found.body, found.fingerprint) == (b"by hand", SAME)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["resolve", "release"])
async def test_a_decision_that_leaves_a_running_lease_alone(store, probe, state, how):
    """By the store's own clock. In any other state it is as without that condition; a repeat says the same."""
    owner = await at(store, probe, state)
    before, operator, view = probe.fields(KEY), store.token(), await store.records.read(KEY)
    lease = 0 if view is None else view.lease_end_ms
    meta = pack(replace(owner, token=operator), answer(b"by hand"))

    async def decide(token: bytes = owner.token) -> ResolveStatus:
        seen = Deciding(token, lease, evidence=b"x" * 2000)
        if how == "release":
            return await store.release_by_operator(KEY, seen, operator, owner.fence)
        return await store.resolve_by_operator(owner, seen, meta, b"by hand")

    if state in ("absent", "complete", "expired", "tombstone"):
        assert await decide() is (ResolveStatus.ABSENT if state == "absent" else ResolveStatus.COMPLETE)
    elif state == "in flight":
        assert await decide(FOREIGN) is ResolveStatus.FENCED
        assert await decide() is await decide() is ResolveStatus.RUNNING
    else:
        assert await decide(FOREIGN) is ResolveStatus.FENCED
        assert probe.fields(KEY) == before
        done = ResolveStatus.RELEASED if how == "release" else ResolveStatus.RESOLVED
        assert await decide() is done
        after = probe.fields(KEY)
        assert await decide() is await decide(FOREIGN) is done
        assert probe.fields(KEY) == after
        assert (await store_small(store, owner)).status is SettleStatus.FENCED
        return
    assert probe.fields(KEY) == before


@pytest.mark.parametrize("seen_as", ["lapsed", "unknown"])
@pytest.mark.parametrize("since", ["renewed", "renewed and lapsed", "claimed again and unknown", "unknown"])
async def test_an_owner_that_was_back_since_the_record_was_seen(store, probe, seen_as, since):
    """Its token is the same, and it may have sent its request since, also where no lease runs: no verdict counts.

    Nothing of that can happen to a record that was seen unknown, and it is decided.
    """
    owner = await at(store, probe, seen_as)
    view = await store.records.read(KEY)
    assert view is not None
    match since:
        case "renewed" | "renewed and lapsed":
            renewed = await store.renew(owner)
        case "claimed again and unknown":
            renewed = RenewStatus.RENEWED if isinstance(await store.reclaim(owner, SCOPE), Claim) else None
    if since == "renewed and lapsed" and renewed is RenewStatus.RENEWED:
        probe.change(KEY, lease=view.lease_end_ms + 1)
    elif since.endswith("unknown"):
        await store.mark_unknown(owner, "no answer came", PATIENCE_S)
    before = probe.fields(KEY)
    decided = await store.release_by_operator(KEY, Deciding.of(view), store.token(), owner.fence)
    assert decided is (ResolveStatus.RUNNING if seen_as == "lapsed" else ResolveStatus.RELEASED)
    assert (probe.fields(KEY) == before) == (seen_as == "lapsed")


async def test_an_owner_that_wakes_up_and_a_verdict_at_once(store, probe):
    """Its lease is over. Of its renewal and a decision at once, one alone is done, a hundred times over."""
    won = {RenewStatus.RENEWED: 0, RenewStatus.FENCED: 0}
    outcomes = ((RenewStatus.RENEWED, ResolveStatus.RUNNING), (RenewStatus.FENCED, ResolveStatus.RESOLVED))
    async with connected(probe.url) as desk:
        for n in range(100):
            key = Digests(b"").key(SCOPE, b"race-%d" % n)
            owner = await claimed(store, key=key)
            probe.change(key, lease=probe.now_ms() - 1)
            meta = pack(replace(owner, token=desk.token()), answer(b"asked"))
            view = await desk.records.read(key)
            assert view is not None
            renew = store.renew(owner)
            decide_ = desk.resolve_by_operator(owner, Deciding.of(view), meta, b"asked")
            if n % 2:
                renewed, decided = await asyncio.gather(renew, decide_)
            else:
                decided, renewed = await asyncio.gather(decide_, renew)
            if renewed is RenewStatus.UNCONFIRMED:
                # In PostgreSQL the decision had the row. The next renewal is the retry.
                renewed = await store.renew(owner)
            assert (renewed, decided) in outcomes
            found = await claim(desk, key)
            assert isinstance(found, Record)
            assert found.state is (State.IN_FLIGHT if renewed is RenewStatus.RENEWED else State.COMPLETE)
            won[renewed] += 1
    assert all(won.values()), won


async def test_a_response_that_the_api_was_asked_for(store):
    """The record says so to whoever replays it, small or not."""
    for number, body in enumerate((b"small", b"x" * 70_000)):
        key = Digests(b"").key(SCOPE, b"asked-%d" % number)
        owner = await claimed(store, key=key)
        await store.mark_unknown(owner, "no answer came", PATIENCE_S)
        given = replace(answer(body), reconciled=True)
        by = replace(owner, token=store.token())
        seen = Deciding(owner.token, seen_lease=0)
        assert await store.resolve_by_operator(by, seen, pack(by, given), body) is ResolveStatus.RESOLVED
        found, view = await claim(store, key), await store.records.read(key)
        assert isinstance(found, Record)
        assert view is not None
        assert found.response == view.response == given


async def test_a_settle_and_a_decision_at_once(store, probe):
    """Of a settle and a decision at once, exactly one changes the record, a hundred times over."""
    won = {SettleStatus.STORED: 0, SettleStatus.FENCED: 0}
    outcomes = ((SettleStatus.STORED, ResolveStatus.COMPLETE), (SettleStatus.FENCED, ResolveStatus.RESOLVED))
    async with connected(probe.url) as desk:
        for n in range(100):
            key = Digests(b"").key(SCOPE, b"race-%d" % n)
            owner = await claimed(store, key=key)
            meta = pack(replace(owner, token=desk.token()), answer(b"by hand"))
            settle = store_small(store, owner)
            decide_ = desk.resolve_by_operator(owner, Deciding(owner.token), meta, b"by hand")
            if n % 2:
                settled, decided = await asyncio.gather(settle, decide_)
            else:
                decided, settled = await asyncio.gather(decide_, settle)
            assert (settled.status, decided) in outcomes
            found = await claim(desk, key)
            assert isinstance(found, Record)
            assert found.body == (BODY if settled.status is SettleStatus.STORED else b"by hand")
            won[settled.status] += 1
    assert all(won.values()), won
