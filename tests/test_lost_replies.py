"""Calls whose replies are lost, that stay on their way, and that come after nobody waits for them any more."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from oncegate.store.record import Claim, Record, pack
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding
from oncegate.store.results import (
    AppendStatus,
    Followed,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    Unconfirmed,
)
from oncegate.store.store import Store
from tests.conftest import Valkey
from tests.parts import until
from tests.postgres_probe import PostgresProbe
from tests.postgres_relay import PostgresRelay
from tests.probes import Probe, RedisProbe
from tests.resp import Relay, started
from tests.stores import (
    KEY,
    LEASE_MS,
    OTHER,
    PATIENCE_S,
    RETENTION_MS,
    SAME,
    SCOPE,
    UNKNOWN_RETENTION_MS,
    Behind,
    act,
    answer,
    claim,
    claimed,
    connected,
    store_small,
    told,
)


@pytest.fixture
async def relay(stored: Probe, shared_valkey: Valkey) -> AsyncIterator[Relay]:
    """A relay between a store and a real server, which drops replies on demand."""
    relay = Relay(shared_valkey.socket) if isinstance(stored, RedisProbe) else PostgresRelay(stored.url)
    async with started(relay):
        yield relay


@pytest.mark.fault(10)
async def test_a_claim_that_was_held_up_on_its_way_never_lands(relay, stored):
    """A claim that the server executes after the store gave it up leaves the key free."""
    async with connected(relay.url, timeout_ms=300) as store:
        relay.hold()
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        assert relay.scripts == 0
        await arrives(relay, stored)
        assert stored.keys() == []
        assert told(await claim(store)) == "claimed"


HEAD = b"a packed head"
LIFE = {
    1: "claim",
    2: "append",
    3: "append",
    4: "follow",
    5: "renew",
    6: "store",
    7: "claim of a duplicate",
    8: "read",
    9: "none",
}


@pytest.mark.fault(8, 49)
@pytest.mark.parametrize("number", LIFE, ids=LIFE.values())
async def test_whichever_reply_is_lost_the_key_is_executed_once_and_replayed(relay, number):
    """Each call of a key's life loses its reply once; its retry finds what was done, and nothing is lost."""
    async with connected(relay.url) as store:
        relay.lose_reply(number)
        owner = await claimed(store)
        for index, chunk in enumerate((b"ab", b"cd")):
            assert await store.append(owner, index, chunk, PATIENCE_S, b"" if index else HEAD) == AppendStatus.APPENDED
        read = await store.follow(KEY, owner.token, 0)
        if LIFE[number] == "follow":
            assert read is ReadFailure.UNCONFIRMED
            read = await store.follow(KEY, owner.token, 0)
        assert isinstance(read, Followed)
        assert (read.head, read.chunks) == (HEAD, [b"ab", b"cd"])
        assert await store.renew(owner) == (RenewStatus.UNCONFIRMED if LIFE[number] == "renew" else RenewStatus.RENEWED)
        assert await store.store(owner, answer(b"ab", b"cd", b"e"), b"e", PATIENCE_S) == SettleResult(
            SettleStatus.STORED
        )
        found = await claim(store)
        assert isinstance(found, Record)
        assert found.response == answer(b"ab", b"cd", b"e")
        chunks = await store.read(KEY, found.token, 0)
        assert chunks == (ReadFailure.UNCONFIRMED if LIFE[number] == "read" else [b"ab", b"cd", b"e"])
        assert relay.lost == (LIFE[number] != "none")


@pytest.mark.fault(21, 49)
@pytest.mark.parametrize(
    ("verb", "became"),
    [("store", "replay"), ("store bare", "not_kept"), ("mark unknown", "unknown"), ("release", "claimed")],
)
async def test_a_settle_whose_reply_was_lost_is_repeated(relay, verb, became):
    """The retry returns what was done and reports no loss, because the record was there."""
    async with connected(relay.url) as store:
        owner = await claimed(store)
        relay.lose_reply()
        result = await act(store, verb, owner, own=True)
        assert relay.lost == 1
        assert result == {"replay": "stored", "not_kept": "stored", "claimed": "released"}.get(became, became)
        assert told(await claim(store)) == became


@pytest.mark.fault(49)
@pytest.mark.parametrize(("verb", "word"), [("store", "fenced"), ("release", "released"), ("mark unknown", "fenced")])
async def test_a_key_that_was_given_to_another_before_the_repeat(relay, stored, verb, word):
    """The settle is done, its reply lost, an operator frees the key and it is claimed anew: the repeat is fenced.

    Not that of a release: its own first try freed the key, and whoever claims it then is no conflict.
    """
    async with connected(relay.url) as store, connected(stored.url) as elsewhere:
        owner = await claimed(store)
        relay.lose_reply(then_unreachable=True)
        settling = asyncio.ensure_future(act(store, verb, owner, own=True))
        await until(lambda: relay.lost)
        stored.remove(KEY)
        other = await claimed(elsewhere)
        before = stored.fields(KEY)
        relay.unreachable = False
        assert await settling == word
        assert stored.fields(KEY) == before
        assert before["token"] == other.token


@pytest.mark.fault(9)
async def test_a_claim_without_a_reply_from_a_store_that_stays_away(relay, stored):
    """A claim whose reply was lost is unconfirmed within its time, and is freed once the store is back."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=400, behind=behind) as store:
        relay.lose_reply(then_unreachable=True)
        began = asyncio.get_running_loop().time()
        found = await claim(store)
        assert asyncio.get_running_loop().time() - began < 5
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        assert stored.states() == [b"in_flight"]
        assert len(behind.works) == 1
        freeing = asyncio.ensure_future(behind.run())
        relay.unreachable = False
        await freeing
        assert stored.states() == []
        assert told(await claim(store)) == "claimed"


@pytest.mark.fault(9)
async def test_a_claim_that_was_given_up_is_withdrawn_however_long_the_store_stays_away(relay, stored):
    """After an outage longer than the patience the key is free, because nothing was sent for it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=200, patience_s=0.2, behind=behind) as store:
        relay.lose_reply(then_unreachable=True)
        assert isinstance(await claim(store), Unconfirmed)
        freeing = asyncio.ensure_future(behind.run())
        await asyncio.sleep(1.5)
        assert not freeing.done()
        assert stored.states() == [b"in_flight"]
        relay.unreachable = False
        await freeing
        assert stored.states() == []


@pytest.mark.fault(9)
@pytest.mark.parametrize("lapsed", [False, True], ids=["in flight", "lapsed"])
async def test_a_claim_that_was_given_up_stands_in_nobodys_way(relay, stored, lapsed):
    """A retry before the withdrawal gets the key: the same worker knows that nothing was sent for it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=300, behind=behind) as store:
        relay.lose_reply(then_unreachable=True)
        assert isinstance(await claim(store), Unconfirmed)
        assert stored.states() == [b"in_flight"]
        if lapsed:
            stored.change(KEY, lease=1)
        relay.unreachable = False
        assert await store.wait_up(PATIENCE_S)
        assert told(await claim(store, fingerprint=OTHER)) == "claimed"
        before = stored.records()
        await behind.run()
        assert stored.records() == before


@pytest.mark.fault(9)
async def test_a_claim_that_was_given_up_is_unknown_elsewhere_until_it_is_withdrawn(relay, stored):
    """Only its own process knows that nothing was sent: once the lease is over, others tell an unknown outcome.

    So "unknown" is not always the last word of a key: its owner, which is alive, may still free or complete it.
    """
    behind = Behind()
    async with connected(relay.url, timeout_ms=300, behind=behind) as store, connected(stored.url) as elsewhere:
        relay.lose_reply(then_unreachable=True)
        assert isinstance(await claim(store), Unconfirmed)
        stored.change(KEY, lease=1)
        assert told(await claim(elsewhere)) == "unknown"
        relay.unreachable = False
        await behind.run()
        assert told(await claim(elsewhere)) == "claimed"


@pytest.mark.fault(9)
async def test_a_claim_whose_caller_was_cancelled_is_withdrawn(relay, stored):
    """A cancelled claim is held by nobody, so its key is freed in the background."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=300, behind=behind) as store:
        relay.hold()
        claiming = asyncio.ensure_future(claim(store))
        await asyncio.sleep(0.05)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        relay.let_go()
        await until(lambda: stored.states() == [b"in_flight"])
        await behind.run()
        assert stored.states() == []


async def held_up(relay: Relay, claiming: Coroutine[Any, Any, Any]) -> str:
    """Claim so that the first command is delayed, and a retry on another connection gets its reply."""
    relay.hold()
    task = asyncio.ensure_future(claiming)
    await asyncio.sleep(0.05)
    relay.cut()
    return told(await task)


async def arrives(relay: Relay, stored: Probe) -> None:
    """Let the delayed command reach the server, and wait until it was executed."""
    if isinstance(stored, RedisProbe):
        stored.client.config_resetstat()
        relay.let_go()
        await until(lambda: "cmdstat_evalsha" in stored.client.info("commandstats"))
    else:
        relay.let_go()
        # Nobody is told of it; or its connection is ended first, by the store itself.
        await asyncio.sleep(0.3)


@pytest.mark.fault(10)
async def test_a_claim_that_was_held_up_while_its_repeat_was_refused(relay, stored):
    """The retry finds another owner; the delayed first try, arriving when the key is free, does not keep it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=3000, behind=behind) as store, connected(stored.url) as other:
        owner = await claimed(other)
        assert await held_up(relay, claim(store)) == "in_flight"
        assert await other.release(owner, PATIENCE_S) == SettleResult(SettleStatus.RELEASED)
        await arrives(relay, stored)
        await behind.run()
        assert stored.states() == []


@pytest.mark.fault(10)
@pytest.mark.parametrize("again", [False, True], ids=["claimed", "claimed again"])
async def test_a_claim_that_was_held_up_while_its_repeat_went_through(relay, stored, again):
    """The retry gets the key and releases it; the delayed first try does not keep it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=3000, behind=behind) as store:
        if again:
            owner = await claimed(store)
            assert await held_up(relay, store.reclaim(owner, SCOPE)) == "claimed"
        else:
            assert await held_up(relay, claim(store)) == "claimed"
            (record,) = stored.records().values()
            described = record["token"], record["fence"], b"hold", SAME, record["self"], int(record["created"])
            owner = Claim(KEY, *described, LEASE_MS, RETENTION_MS, UNKNOWN_RETENTION_MS)
        assert await store.release(owner, PATIENCE_S) == SettleResult(SettleStatus.RELEASED)
        await arrives(relay, stored)
        await behind.run()
        assert stored.states() == []


@pytest.mark.fault(10)
async def test_a_takeover_that_was_held_up_while_its_repeat_went_through(database):
    """The same where the key had been free before: its record is there, and the delayed try would take it again."""
    stored, behind = PostgresProbe(database), Behind()
    async with (
        started(PostgresRelay(database.url)) as relay,
        connected(relay.url, timeout_ms=3000, behind=behind) as store,
    ):
        # More than once, so that the statement is prepared.
        for _ in range(3):
            assert await store.release(await claimed(store), PATIENCE_S) == SettleResult(SettleStatus.RELEASED)
        batches, take = store._claims._batches, store._claims._batches.take

        def held(*args: Any) -> Any:
            batches.take = take
            relay.hold()
            asyncio.get_running_loop().call_later(0.05, relay.cut)
            return take(*args)

        batches.take = held
        owner = await claimed(store)
        assert await store.release(owner, PATIENCE_S) == SettleResult(SettleStatus.RELEASED)
        await arrives(relay, stored)
        await behind.run()
        assert stored.states() == []


@pytest.mark.fault(9, 10)
async def test_a_withdrawal_that_loses_its_connection_while_another_holds_its_row(database):
    """It frees the key once the row is free again. What it had sent before arrives late, and takes nobody's claim."""
    stored, behind = PostgresProbe(database), Behind()
    async with (
        started(PostgresRelay(database.url)) as relay,
        connected(relay.url, timeout_ms=300, patience_s=0.5, behind=behind) as store,
        connected(stored.url) as elsewhere,
        asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool,
        pool.acquire() as other,
    ):
        relay.lose_reply(then_unreachable=True)
        assert isinstance(await claim(store), Unconfirmed)
        relay.unreachable = False
        assert await store.wait_up(PATIENCE_S)
        holding = other.transaction()
        await holding.start()
        await other.execute(f"SELECT FROM {database.schema}.record FOR UPDATE")
        freeing = asyncio.ensure_future(behind.run())
        await asyncio.sleep(0.05)
        relay.hold()
        await asyncio.sleep(0.1)
        relay.cut()
        assert await store.wait_up(PATIENCE_S)
        await asyncio.sleep(0.1)
        assert not freeing.done()
        assert stored.states() == [b"in_flight"]
        await holding.rollback()
        await asyncio.wait_for(freeing, PATIENCE_S)
        assert stored.states() == []
        owner = await claimed(elsewhere)
        before = stored.fields(KEY)
        await arrives(relay, stored)
        assert stored.fields(KEY) == before
        assert await store_small(elsewhere, owner) == SettleResult(SettleStatus.STORED)


# Decisions and marks ...


async def decided(store: Store, owner: Claim, how: str, operator: bytes, seen_lease: int = 0) -> ResolveStatus:
    """Decide, unless the owner was back since the record was seen: unknown, or lapsed at `seen_lease`."""
    seen = Deciding(owner.token, seen_lease)
    if how == "release":
        return await store.release_by_operator(KEY, seen, operator, owner.fence)
    by = replace(owner, token=operator)
    return await store.resolve_by_operator(by, seen, pack(by, answer(b"asked")), b"asked")


@pytest.mark.fault(81)
@pytest.mark.fault(49)
@pytest.mark.parametrize("how", ["resolve", "release"])
async def test_a_decision_whose_reply_was_lost_is_repeated(relay, stored, how):
    """The repeat says what was done, and changes nothing more; once another has the key, it is fenced."""
    async with connected(relay.url) as store, connected(stored.url) as elsewhere:
        owner, operator = await claimed(store), store.token()
        await store.mark_unknown(owner, "no answer came", PATIENCE_S)
        relay.lose_reply()
        assert await decided(store, owner, how, operator) is ResolveStatus.UNCONFIRMED
        assert relay.lost == 1
        after = stored.fields(KEY)
        assert await store.wait_up(PATIENCE_S)
        done = ResolveStatus.RELEASED if how == "release" else ResolveStatus.RESOLVED
        assert await decided(store, owner, how, operator) is done
        assert stored.fields(KEY) == after
        stored.remove(KEY)
        other = await claimed(elsewhere)
        assert await decided(store, owner, how, operator) is ResolveStatus.FENCED
        assert await elsewhere.renew(other) is RenewStatus.RENEWED


@pytest.mark.fault(81)
@pytest.mark.fault(10)
@pytest.mark.parametrize("meanwhile", ["renewed", "renewed and lapsed", "settled", "claimed by another"])
@pytest.mark.parametrize("how", ["resolve", "release"])
async def test_a_decision_that_was_held_up_on_its_way(relay, stored, how, meanwhile):
    """It depends on the record as it is when it comes: an owner that woke up, and any other, wins."""
    async with connected(relay.url, timeout_ms=300) as store, connected(stored.url) as elsewhere:
        owner = await claimed(elsewhere)
        stored.change(KEY, lease=(lapsed := stored.now_ms() - 1))
        relay.hold()
        assert await decided(store, owner, how, store.token(), lapsed) is ResolveStatus.UNCONFIRMED
        if meanwhile.startswith("renewed"):
            assert await elsewhere.renew(owner) is RenewStatus.RENEWED
            if meanwhile == "renewed and lapsed":
                stored.change(KEY, lease=lapsed + 1)
        elif meanwhile == "settled":
            assert (await store_small(elsewhere, owner)).status is SettleStatus.STORED
        else:
            stored.remove(KEY)
            await claimed(elsewhere)
        before = stored.fields(KEY)
        await arrives(relay, stored)
        assert stored.fields(KEY) == before


async def test_a_swap_that_was_held_up_or_lost(relay, stored):
    """Nobody knows what became of it, and it says so. One that comes late changes another's mark as little as any."""
    name = store_key(KEY) + b":test"
    async with connected(relay.url) as store, connected(stored.url) as elsewhere:
        relay.hold()
        assert await store.marks.swap(name, b"", b"one", 60_000) is None
        assert await elsewhere.marks.swap(name, b"", b"two", 60_000) is True
        await arrives(relay, stored)
        assert await elsewhere.marks.get(name) == b"two"
        assert await store.wait_up(PATIENCE_S)
        relay.lose_reply()
        assert await store.marks.swap(name, b"two", b"three", 60_000) is None
        assert await elsewhere.marks.get(name) == b"three"
