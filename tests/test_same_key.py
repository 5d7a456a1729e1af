"""A key that its API recognizes: which claims take it over to send its request once more, and what becomes of it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from oncegate.decision import CANCELLED, HOLD, RETRY, State
from oncegate.rules.policy import Policy
from oncegate.store.kept import Kept, is_resent, pack_kept, unpack_kept
from oncegate.store.record import Claim, ClaimRequest, Corrupt, Record, cancelled_claim
from oncegate.store.results import SettleStatus, Unconfirmed
from oncegate.store.store import Store
from tests.probes import Probe
from tests.stores import (
    BODY,
    KEY,
    OTHER,
    RETENTION_MS,
    SAME,
    SCOPE,
    UNKNOWN_RETENTION_MS,
    answer,
    connected,
    store_small,
)

LEASE_MS, HOUR_MS = 1_000, 3_600_000


@pytest.fixture
async def store(probe: Probe) -> AsyncIterator[Store]:
    async with connected(probe.url) as store:
        yield store


async def claim(
    store: Store,
    fingerprint: bytes = SAME,
    mode: bytes = HOLD,
    resend_ms: int = HOUR_MS,
    first_ms: int | None = 0,
    lease_ms: int = LEASE_MS,
) -> Claim | Record | Corrupt | Unconfirmed:
    times = lease_ms, RETENTION_MS, UNKNOWN_RETENTION_MS
    kept = pack_kept(Kept(rule="charges", first_ms=first_ms))
    asked = ClaimRequest(KEY, SCOPE, fingerprint, mode, *times, 0, 0, kept, resend_ms)
    return await store.claim(asked)


async def claimed(store: Store, **asked: object) -> Claim:
    found = await claim(store, **asked)
    assert isinstance(found, Claim), found
    return found


async def unknown(store: Store, **asked: object) -> Claim:
    """Return the claim whose key is unknown now."""
    owner = await claimed(store, **asked)
    assert (await store.mark_unknown(owner, "no answer came", 5.0)).status is SettleStatus.MARKED_UNKNOWN
    return owner


async def test_an_unknown_key_is_taken_over(store):
    """Under a new token and a higher fence. The first claim's time goes along, and its owner is fenced."""
    first = await unknown(store)
    second = await claimed(store)
    assert second.token != first.token
    assert int(second.fence) > int(first.fence)
    assert (is_resent(first.kept), is_resent(second.kept)) == (False, True)
    assert unpack_kept(second.kept).first_ms == first.created_ms
    assert unpack_kept(second.kept).rule == "charges"
    assert (await store_small(store, first, BODY)).status is SettleStatus.FENCED
    await store.mark_unknown(second, "no answer came", 5.0)
    third = await claimed(store)
    assert unpack_kept(third.kept).first_ms == first.created_ms
    assert (await store_small(store, third, BODY)).status is SettleStatus.STORED
    found = await claim(store)
    assert isinstance(found, Record)
    assert (found.state, found.response) == (State.COMPLETE, answer(BODY))


async def test_a_lapsed_key_is_taken_over(store):
    """The claim of an owner that does not renew it, and not before its lease is over."""
    first = await claimed(store, lease_ms=150)
    found = await claim(store)
    assert isinstance(found, Record)
    assert found.state is State.IN_FLIGHT
    await asyncio.sleep(0.2)
    assert (await claimed(store)).token != first.token


async def test_one_at_a_time(store):
    """Of many claims at the same instant, one takes the key."""
    await unknown(store)
    found = await asyncio.gather(*[claim(store) for _ in range(20)])
    owners = [one for one in found if isinstance(one, Claim)]
    assert len(owners) == 1
    assert {one.token for one in found if isinstance(one, Record)} == {owners[0].token}


REFUSED = {
    "another request": ({}, {"fingerprint": OTHER}),
    "a rule that does not resend": ({}, {"resend_ms": 0}),
    "a claim for an API that recognizes no keys": ({"first_ms": None}, {}),
    "an API that has forgotten it": ({}, {"resend_ms": 100}),
    "a first claim long ago": ({"first_ms": 1}, {}),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_key_that_is_not_taken_over(store, case):
    """It is left as it was."""
    before, asked = REFUSED[case]
    first = await unknown(store, **before)
    found = await claim(store, **asked)
    assert isinstance(found, Record)
    assert (found.state, found.token, found.mode) == (State.UNKNOWN, first.token, HOLD)


async def test_a_cancelled_key_is_not_taken_over(store):
    """Somebody has stopped it."""
    owner = await claimed(store)
    await store.mark_unknown(cancelled_claim(owner), "cancelled", 5.0)
    found = await claim(store)
    assert isinstance(found, Record)
    assert found.mode == CANCELLED


async def test_a_key_in_the_mode_retry_is_executed_again(store):
    """As ever: its claim frees the key where it is declined."""
    await unknown(store, mode=RETRY)
    second = await claimed(store, mode=RETRY, resend_ms=0)
    assert not is_resent(second.kept)


async def test_a_reclaim_takes_nothing_over(store):
    """The owner of a claim that lost its key does not get it back so."""
    first = await unknown(store)
    second = await claimed(store)
    await store.mark_unknown(second, "no answer came", 5.0)
    found = await store.reclaim(first, SCOPE)
    assert isinstance(found, Record)
    assert found.token == second.token


async def test_a_resend_does_not_claim_a_free_key(store):
    """The record went while it was looked at: the key may belong to another request now. Nothing is executed."""
    first = await unknown(store)
    claims, release = store._claims, store.release  # type: ignore[attr-defined]
    may_take_over, calls = claims._may_take_over, []

    async def meanwhile(*args: object) -> bool:
        is_open = await may_take_over(*args)
        if not calls:
            calls.append(await release(first, 5.0))
        return is_open

    claims._may_take_over = meanwhile
    found = await claim(store)
    assert isinstance(found, Unconfirmed) or (isinstance(found, Claim) and not await _has_two(store, found))


async def _has_two(store: Store, owner: Claim) -> bool:
    found = await claim(store)
    return not (isinstance(found, Record) and found.token == owner.token)


@pytest.mark.fault(74)
async def test_a_resend_whose_caller_is_gone_frees_nothing(store, probe):
    """Its claim may be in the store, and the first request may have been executed: it ends with its lease."""
    await unknown(store)
    works = []
    for _ in range(8):
        work = asyncio.ensure_future(claim(store, lease_ms=200))
        works.append(work)
        await asyncio.sleep(0.001)
        work.cancel()
    await asyncio.wait(works)
    await asyncio.sleep(0.3)
    found = await claim(store, fingerprint=OTHER)
    assert isinstance(found, Record)
    assert isinstance(await claim(store), Claim)


@pytest.mark.parametrize(
    ("fingerprint", "resends"),
    [
        (None, True),
        (frozenset({"method", "target", "body"}), True),
        (frozenset({"method", "target", "type", "body-json"}), True),
        (frozenset({"target", "body"}), False),
        (frozenset({"method", "target", "body:/id"}), False),
        (frozenset(), False),
    ],
)
def test_only_the_same_content_is_sent_on(fingerprint, resends):
    """What a narrower fingerprint takes for one request may be two for the API."""
    policy = of_policy(fingerprint=fingerprint)
    assert policy.resend_ms == (86_400_000 if resends else 0)


def test_in_the_mode_retry_nothing_is_sent_on():
    """A request with an unknown key is executed again there."""
    assert of_policy(mode=RETRY).resend_ms == 0
    assert of_policy(upstream_idempotent=False).resend_ms == 0


def of_policy(**fields: object) -> Policy:
    times = {"retention_ms": 1, "unknown_retention_ms": 1, "lease_ms": 1}
    given = {"upstream_idempotent": True, **fields}
    names = {"key_header": b"idempotency-key", "namespace": b"", "scope_headers": ()}
    rest = {"key_required": False, "pass_host": False, "wait_for_duplicates": False, "wait_max_s": 1.0}
    return Policy(methods=frozenset({"POST"}), max_stored_bytes=1, **names, **times, **rest, **given)
