"""What the store in PostgreSQL does in its own way: batches, withdrawals, and rows that others hold."""

import asyncio
import hmac
import itertools
import os
import random
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from oncegate.decision import State
from oncegate.store.postgres import rows
from oncegate.store.record import Claim, ClaimRequest, Corrupt, Record, ViewState, pack
from oncegate.store.record_view import Deciding
from oncegate.store.results import (
    AppendStatus,
    DropStatus,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    Unconfirmed,
)
from oncegate.store.store import PostgresOptions, Store
from tests.postgres_schemas import NEVER, Schema, foreign, fresh_schema, held, lapse
from tests.stores import (
    BODY,
    FOREIGN,
    KEY,
    LEASE_MS,
    PATIENCE_S,
    SAME,
    SCOPE,
    Behind,
    answer,
    claim,
    claimed,
    connected,
    key,
    store_small,
)

STORED = SettleResult(SettleStatus.STORED)


@pytest.fixture
async def schema() -> AsyncIterator[Schema]:
    async with fresh_schema() as schema:
        yield schema


@pytest.fixture
async def store(schema: Schema) -> AsyncIterator[Store]:
    async with schema.connected() as store:
        yield store


# Batches ...


async def test_of_many_claims_of_a_key_in_one_turn_one_has_it(store: Store) -> None:
    found = await asyncio.gather(*[claim(store, key(number // 4)) for number in range(400)])
    owners = [one for one in found if isinstance(one, Claim)]
    assert len({owner.key for owner in owners}) == len(owners) == 100
    assert all(one.state is State.IN_FLIGHT for one in found if isinstance(one, Record))
    settled = await asyncio.gather(*[store_small(store, owner) for owner in owners])
    assert set(settled) == {STORED}
    told = await asyncio.gather(*[claim(store, owner.key) for owner in owners])
    assert all(isinstance(one, Record) and one.body == BODY for one in told)


async def test_of_two_settles_of_a_key_in_one_turn_one_counts(store: Store) -> None:
    owner = await claimed(store)
    settled = await asyncio.gather(store_small(store, owner), store_small(store, owner, b"another"))
    assert sorted(one.status.label for one in settled) == ["fenced", "stored"]


def asked(number: int, retention_ms: int) -> ClaimRequest:
    return ClaimRequest(
        key=key(number),
        scope=SCOPE,
        fingerprint=SAME,
        mode=b"hold",
        lease_ms=LEASE_MS,
        retention_ms=retention_ms,
        unknown_retention_ms=retention_ms,
    )


# The first is no bigint, and does not leave the proxy. The second is one, but no time has room for it.
@pytest.mark.parametrize("bad", [1 << 70, (1 << 63) - 1])
async def test_one_bad_row_fails_alone(store: Store, bad: int) -> None:
    retentions = [bad if number == 37 else 1000 for number in range(100)]
    found = await asyncio.gather(*[store.claim(asked(*one)) for one in enumerate(retentions)])
    failed = [number for number, one in enumerate(found) if not isinstance(one, Claim)]
    assert failed == [37]
    assert isinstance(found[37], Unconfirmed)
    assert not found[37].maybe_executed


async def test_a_chunk_counts_once_however_often_it_is_appended(store: Store) -> None:
    owner = await claimed(store)
    for _ in range(3):
        assert await store.append(owner, 0, b"first", PATIENCE_S) is AppendStatus.APPENDED
    assert await store.append(owner, 0, b"other", PATIENCE_S) is AppendStatus.INCOMPLETE
    assert await store.store(owner, answer(b"first", b"last"), b"last", PATIENCE_S) == STORED
    assert await store.read(KEY, owner.token, 0) == [b"first", b"last"]


@pytest.mark.parametrize("size", [rows.ROW_BYTES, rows.ROW_BYTES + 1, 200_000])
async def test_a_body_of_any_size_comes_back(store: Store, size: int) -> None:
    owner, body = await claimed(store), os.urandom(size)
    assert await store_small(store, owner, body) == STORED
    found = await claim(store)
    assert isinstance(found, Record)
    assert found.body == (body if size <= rows.ROW_BYTES else None)
    assert await store.read(KEY, owner.token, 0) == [body]


async def test_calls_gather_while_a_batch_is_on_its_way(schema: Schema, store: Store, monkeypatch) -> None:
    """What is asked for meanwhile leaves together, as soon as that batch is answered."""
    monkeypatch.setattr("oncegate.store.postgres.batches.GATHERING_S", 60.0)
    asked = []
    for number in range(8):
        asked.append(asyncio.ensure_future(claimed(store, key=key(number))))
        await asyncio.sleep(0)
    await asyncio.gather(*asked)
    transactions = await schema.other.fetchval("SELECT count(DISTINCT xmin::text) FROM record")
    assert transactions == 2


async def test_calls_gather_behind_no_batch_that_is_stuck(schema: Schema, store: Store) -> None:
    """A batch that takes long, such as one whose commit waits for a standby, holds no other call back."""
    stuck = "SELECT count(*) FROM pg_locks WHERE relation = 'record'::regclass AND NOT granted"
    async with schema.other.transaction():
        await schema.other.execute("LOCK TABLE record IN EXCLUSIVE MODE")
        asked = []
        for number in (1, 2):
            asked.append(asyncio.ensure_future(claimed(store, key=key(number))))
            while await schema.other.fetchval(stuck) < number:
                await asyncio.sleep(0.002)
    await asyncio.gather(*asked)


async def test_functions_outlive_a_change_of_their_table(schema: Schema, store: Store) -> None:
    """As a migration makes it while proxies are at work."""
    for number, column in enumerate(("one", "two", "three")):
        owner = await claimed(store, key=key(number))
        assert await store.append(owner, 0, b"first", PATIENCE_S) is AppendStatus.APPENDED
        await schema.other.execute(f"ALTER TABLE record ADD COLUMN {column} int")
        assert await store.append(owner, 1, b"more", PATIENCE_S) is AppendStatus.APPENDED
        assert await store.store(owner, answer(b"first", b"more", b"last"), b"last", PATIENCE_S) == STORED
        assert await store.read(owner.key, owner.token, 0) == [b"first", b"more", b"last"]


async def test_the_end_of_all_calls(schema: Schema, store: Store) -> None:
    """After `end_calls`, calls under way and calls still to come end at once, and the store closes."""
    async with schema.other.transaction():
        # What a claim waits for, and what nothing waits for.
        await schema.other.execute("LOCK TABLE record")
        under_way = [asyncio.ensure_future(claim(store, key(number))) for number in range(3)]
        await asyncio.sleep(0.1)
        assert not any(one.done() for one in under_way)
        store.end_calls()
        async with asyncio.timeout(PATIENCE_S / 2):
            ended = [*await asyncio.gather(*under_way), await claim(store, key(9))]
            await store.close()
    assert [type(one) for one in ended] == [Unconfirmed] * 4


# Rows that another transaction holds ...


async def test_nobody_waits_for_a_claim_that_is_not_committed(schema: Schema, store: Store) -> None:
    owner = await claimed(store)
    other = foreign(replace(owner, key=key(2)))
    async with held(schema, rows.CLAIM, rows.claim_row(other, NEVER), commits=False) as (made,):
        assert made["tag"] == 0
        # Beside it in one batch, another key is claimed.
        found, beside = await asyncio.gather(claim(store, key(2)), claim(store, key(3)))
        assert isinstance(found, Record)
        assert found.state is State.IN_FLIGHT
        assert isinstance(beside, Claim)
    assert isinstance(await claim(store, key(2)), Claim)


async def test_a_takeover_meets_a_settle(schema: Schema, store: Store) -> None:
    owner = await claimed(store, b"retry")
    await lapse(schema)
    async with held(schema, rows.SETTLE, rows.store_row(owner, answer(BODY), BODY)) as (settled,):
        assert settled["tag"] == 1
        found = await claim(store, mode=b"retry")
        assert isinstance(found, Record)
        assert found.state is State.IN_FLIGHT
    # What was read before the settle says that the record is open. It is not any more.
    (taken,) = await schema.run(rows.TAKE, rows.claim_row(foreign(owner), NEVER, owner.token))
    assert (taken["tag"], taken["body"]) == (3, BODY)


async def test_a_settle_meets_a_takeover(schema: Schema, store: Store) -> None:
    owner = await claimed(store, b"retry")
    await lapse(schema)
    async with held(schema, rows.TAKE, rows.claim_row(foreign(owner), NEVER, owner.token)) as (taken,):
        assert taken["tag"] == 0
        settling = asyncio.ensure_future(store_small(store, owner))
        await asyncio.sleep(0.05)
        assert not settling.done()
        # Other keys are settled meanwhile.
        assert await store_small(store, await claimed(store, key=key(2))) == STORED
    assert await settling == SettleResult(SettleStatus.FENCED)


async def test_a_takeover_meets_a_renewal(schema: Schema, store: Store) -> None:
    owner = await claimed(store, b"retry")
    await lapse(schema)
    async with held(schema, rows.RENEW, (owner.key, owner.token, LEASE_MS, 2)) as (renewed,):
        assert renewed["tag"] == 1
        assert isinstance(await claim(store, mode=b"retry"), Record)
    (taken,) = await schema.run(rows.TAKE, rows.claim_row(foreign(owner), NEVER, owner.token))
    assert taken["tag"] == 1
    assert await store.renew(owner) is RenewStatus.RENEWED


async def test_a_renewal_meets_a_takeover(schema: Schema, store: Store) -> None:
    owner = await claimed(store, b"retry")
    await lapse(schema)
    async with held(schema, rows.TAKE, rows.claim_row(foreign(owner), NEVER, owner.token)):
        assert await store.renew(owner) is RenewStatus.UNCONFIRMED
    assert await store.renew(owner) is RenewStatus.FENCED


# Claims that land late ...


async def test_a_claim_that_lands_late_is_withdrawn(schema: Schema) -> None:
    behind = Behind()
    async with schema.connected(timeout_ms=300, behind=behind) as store:
        transaction = schema.other.transaction()
        await transaction.start()
        # Without the lock of a claim: the store's own insert waits for the end of this one.
        await schema.other.execute("INSERT INTO record (key, state) VALUES ($1, 1)", KEY)
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        withdrawing = asyncio.ensure_future(behind.run())
        await asyncio.sleep(0.1)
        # The key is free, as everybody sees it, and yet the claim is under way.
        assert not withdrawing.done()
        await transaction.rollback()
        await asyncio.wait_for(withdrawing, PATIENCE_S)
        row = await schema.other.fetchrow("SELECT state, token FROM record WHERE key = $1", KEY)
        assert tuple(row) == (4, b"")
        events = await schema.other.fetch("SELECT event FROM audit WHERE key = $1 ORDER BY no", KEY)
        assert [row["event"] for row in events] == [1, 8]
        assert isinstance(await claim(store), Claim)


# What outlives its response ...


@pytest.mark.parametrize("size", [9, 10_000])
async def test_a_key_outlives_its_response(store, schema, size):
    """After the retention the row says the same before and after its response is dropped; then the key is free."""
    body = os.urandom(size)
    owner = replace(await claimed(store), tombstone_ms=7_200_000)
    if size > rows.ROW_BYTES:
        assert await store.append(owner, 0, body, PATIENCE_S) is AppendStatus.APPENDED
    stored = answer(body)
    assert await store.store(owner, stored, b"" if size > rows.ROW_BYTES else body, PATIENCE_S) == STORED
    view = await store.records.read(KEY)
    assert await store.drop(view) is DropStatus.KEPT
    await schema.other.execute(f"UPDATE {schema.name}.record SET expires = 1")
    expired = await claim(store)
    assert isinstance(expired, Record)
    assert (expired.state, expired.status, expired.response) == (State.EXPIRED, 201, None)
    assert await store.read(KEY, owner.token, 0) is ReadFailure.GONE
    assert await store.drop(view._replace(token=FOREIGN)) is DropStatus.FENCED
    assert [await store.drop(view) for _ in range(2)] == [DropStatus.DROPPED] * 2
    dropped = await claim(store)
    assert replace(dropped, now_ms=0) == replace(expired, now_ms=0)
    assert (await store.records.read(KEY)).state is ViewState.EXPIRED
    for table in ("chunk", "record WHERE meta IS NOT NULL OR body IS NOT NULL"):
        assert await schema.other.fetchval(f"SELECT count(*) FROM {schema.name}.{table}") == 0
    events = await schema.other.fetch(f"SELECT event FROM {schema.name}.audit ORDER BY no")
    assert [row["event"] for row in events] == [1, 4, 11]
    assert (await store.store(owner, stored, b"", PATIENCE_S)).status is SettleStatus.FENCED
    assert await store.renew(owner) is RenewStatus.COMPLETE
    await schema.other.execute(f"UPDATE {schema.name}.record SET frees = 1")
    assert await store.records.read(KEY) is None
    assert isinstance(await claim(store), Claim)


async def test_a_purged_key_is_refused_for_the_rest_of_its_retention(store, schema):
    """Also without a tombstone of its own, and also where an operator gave the response."""
    owner = await claimed(store)
    given = replace(owner, token=store.token())
    meta = pack(given, answer(BODY))
    assert await store.resolve_by_operator(given, Deciding(owner.token), meta, BODY) is ResolveStatus.RESOLVED
    frees = f"SELECT frees FROM {schema.name}.record"
    before = await schema.other.fetchval(frees)
    assert await store.drop(await store.records.read(KEY), purge=True) is DropStatus.DROPPED
    refused = await claim(store)
    assert (refused.state, refused.status, refused.token) == (State.EXPIRED, 201, given.token)
    assert await schema.other.fetchval(frees) == before
    await schema.other.execute(f"UPDATE {schema.name}.record SET fingerprint = '\\x00'")
    assert isinstance(await claim(store), Corrupt)


# Two proxies ...


async def use(store: Store, until: float, number: random.Random) -> int:
    """Claim and settle a few keys in all ways until the loop's time `until`. Return the number of executions."""
    loop, executed = asyncio.get_running_loop(), 0
    while loop.time() < until:
        asked = asked_briefly(number.randrange(20), lease_ms=number.choice([5, 1000]))
        found = await store.claim(asked)
        if not isinstance(found, Claim):
            assert not isinstance(found, Unconfirmed), found
            continue
        executed += 1
        status: object = await store.renew(found)
        if number.random() < 0.3:
            status = await store.append(found, 0, b"first", PATIENCE_S)
            assert status is not AppendStatus.UNCONFIRMED
        match number.randrange(4):
            case 0:
                settled = await store.release(found, PATIENCE_S)
            case 1:
                settled = await store.mark_unknown(found, "cut off", PATIENCE_S)
            case _:
                settled = await store.store(found, answer(BODY), BODY, PATIENCE_S)
        assert settled.status is not SettleStatus.UNCONFIRMED
    return executed


def asked_briefly(number: int, lease_ms: int) -> ClaimRequest:
    """Return a claim of a derived key whose record is over in no time."""
    request = asked(number, 60_000)
    return replace(request, mode=b"retry", lease_ms=lease_ms, window_ms=10)


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.full)])
async def test_two_proxies_share_keys_without_a_deadlock(schema: Schema, seconds: int) -> None:
    """Their batches overlap. The audit trail has every change of a key, one after the other."""
    loop = asyncio.get_running_loop()
    for second in range(seconds):
        async with schema.connected() as store, schema.connected() as other:
            until = loop.time() + 1
            users = [
                use(one, until, random.Random(20 * second + number)) for number in range(20) for one in (store, other)
            ]
            assert sum(await asyncio.gather(*users)) > 20
    entries = await schema.other.fetch("SELECT * FROM audit ORDER BY key, no")
    for name, chain in itertools.groupby(entries, key=lambda entry: entry["key"]):
        check_chain(name, list(chain))
    heads = await schema.other.fetch("SELECT key, audit_no, audit_digest FROM record")
    last = {entry["key"]: (entry["no"], entry["digest"]) for entry in entries}
    assert {row["key"]: (row["audit_no"], row["audit_digest"]) for row in heads} == last


def check_chain(name: bytes, entries: list[Any]) -> None:
    """Check that a key has one owner at a time, and that only the owner settled it.

    Once its successor has freed the key, an owner that was taken over writes its record anew.
    """
    owner, before, before_at = b"", b"", 0
    for number, entry in enumerate(entries, 1):
        assert (entry["no"], entry["before_at"]) == (number, before_at)
        if entry["event"] in (1, 2):
            # A takeover names the owner before.
            assert entry["event"] == 1 or entry["detail"] == owner
            owner = entry["token"]
        assert owner in (entry["token"], b"")
        assert entry["digest"] == digest_of(before, name, entry)
        owner = b"" if entry["event"] == 5 else entry["token"]
        before, before_at = entry["digest"], entry["at"]


def digest_of(before: bytes, name: bytes, entry: Any) -> bytes:
    """Return the digest of an audit entry, without a secret."""
    sized = [len(entry[name]).to_bytes(4, "big") + entry[name] for name in ("token", "actor", "rule", "detail")]
    parts = (
        before, name, struct.pack(">qqh", entry["no"], entry["at"], entry["event"]), sized[0],
        struct.pack(">q", entry["fence"]), sized[1], sized[2],
        struct.pack(">iq", entry["status"], entry["size"]), sized[3],
    )  # fmt: skip
    return hmac.digest(b"", b"".join(parts), "sha256")


async def test_what_an_operator_does_is_confirmed_as_a_claim_is(schema, store):
    """An act that a failover may take back is not reported as done."""
    owners = [await claimed(store, key=key(number)) for number in range(3)]
    await store_small(store, owners[2])
    view = await store.records.read(owners[2].key)
    given = replace(owners[0], token=store.token())
    options = {"durability": "replicated", "postgres": PostgresOptions(schema=schema.name)}
    # No standby confirms anything there.
    async with connected(schema.url, **options) as desk:
        resolved = await desk.resolve_by_operator(given, Deciding(owners[0].token), pack(given, answer(BODY)), BODY)
        released = await desk.release_by_operator(
            owners[1].key, Deciding(owners[1].token), desk.token(), owners[1].fence
        )
        assert (resolved, released) == (ResolveStatus.UNCONFIRMED,) * 2
        assert await desk.drop(view, purge=True) is DropStatus.UNCONFIRMED
        assert await desk.drop(view) is DropStatus.DROPPED


async def test_a_release_is_confirmed_as_a_claim_is(schema, store):
    """A key that a failover may take back is not told to be free. A settle needs no standby."""
    released, stored = [await claimed(store, key=key(number)) for number in range(2)]
    options = {"durability": "replicated", "postgres": PostgresOptions(schema=schema.name)}
    # No standby confirms anything there.
    async with connected(schema.url, **options) as owner:
        assert (await owner.release(released, 0.1)).status is SettleStatus.UNCONFIRMED
        assert (await owner.store(stored, answer(BODY), BODY, PATIENCE_S)).status is SettleStatus.STORED


@pytest.mark.parametrize("ends", ["unknown", "bare"])
async def test_a_purge_leaves_no_part_of_a_response(schema, store, ends):
    """Also of one that was not kept, or whose outcome is unknown: that it stays."""
    owner = await claimed(store)
    assert await store.append(owner, 0, b"part" * 2000, PATIENCE_S) is AppendStatus.APPENDED
    if ends == "unknown":
        await store.mark_unknown(owner, "cut off", PATIENCE_S)
    else:
        await store.store(owner, answer(BODY, kept=False), b"", PATIENCE_S)
    view = await store.records.read(KEY)
    assert await store.drop(view, purge=True) is DropStatus.DROPPED
    assert await schema.other.fetchval("SELECT count(*) FROM chunk") == 0
    purged = await store.records.read(KEY)
    assert purged.state is (ViewState.UNKNOWN if ends == "unknown" else ViewState.EXPIRED)
    events = await schema.other.fetchval("SELECT array_agg(event ORDER BY no) FROM audit")
    assert events == [1, 6 if ends == "unknown" else 4, 12]
    again = DropStatus.ABSENT if ends == "unknown" else DropStatus.DROPPED
    assert await store.drop(view, purge=True) is again
