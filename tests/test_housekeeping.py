"""Housekeeping in PostgreSQL: what is due goes, a few blocks at a time, by one worker of all; nothing else changes."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from oncegate.decision import State
from oncegate.store.postgres import housekeeping
from oncegate.store.postgres.housekeeping import Housekeeping
from oncegate.store.postgres.store import hmac_pads
from oncegate.store.record import Claim, Record
from oncegate.store.record_view import Deciding
from oncegate.store.results import DropStatus, ResolveStatus, SettleStatus
from oncegate.store.store import Store
from tests.postgres_schemas import Schema, fresh_schema
from tests.stores import BODY, PATIENCE_S, claim, claimed, key, store_small

TOMBSTONE_MS = 7_200_000
SWEEP = "SELECT * FROM sweep_1($1, $2, $3, $4, $5, $6, $7)"
LATEST = 1 << 52
PADS = hmac_pads(b"")


@pytest.fixture
async def schema() -> AsyncIterator[Schema]:
    async with fresh_schema() as schema:
        yield schema


@pytest.fixture
async def store(schema: Schema) -> AsyncIterator[Store]:
    async with schema.connected() as store:
        yield store


async def sweep(schema: Schema, holder: bytes = b"one", latest: int = LATEST, first: int = 0, most: int = 9999) -> Any:
    return await schema.other.fetchrow(SWEEP, first, most, latest, holder, 60_000, True, PADS)


async def states(schema: Schema) -> dict[bytes, int]:
    return {row["key"]: row["state"] for row in await schema.other.fetch("SELECT key, state FROM record")}


async def due(schema: Schema, number: int, **columns: int) -> None:
    """Move times of a record into the past: so many ms before now."""
    for column, ago_ms in columns.items():
        await schema.other.execute(f"UPDATE record SET {column} = now_ms() - $2 WHERE key = $1", key(number), ago_ms)


async def test_what_is_due_goes_and_nothing_else(schema, store):
    """A complete key past its retention becomes a tombstone. Rows go when their key is free, whatever their state."""
    owners = [await claimed(store, key=key(number)) for number in range(9)]
    complete, expired, over, tombstone, released, unknown, old_unknown, lapsed, old_lapsed = range(9)
    for number in (complete, expired, over, tombstone):
        await store_small(store, replace(owners[number], tombstone_ms=TOMBSTONE_MS))
    await store.release(owners[released], PATIENCE_S)
    for number in (unknown, old_unknown):
        await store.mark_unknown(owners[number], "lost", PATIENCE_S)
    await due(schema, expired, expires=5000)
    await due(schema, over, expires=9000, frees=1000)
    await due(schema, tombstone, expires=1)
    assert await store.drop(await store.records.read(key(tombstone))) is DropStatus.DROPPED
    await due(schema, tombstone, frees=1)
    await due(schema, released, frees=1)
    await due(schema, old_unknown, frees=1)
    # Its owner may yet be at work: only the end of its retention frees the key.
    await due(schema, lapsed, lease=60_000)
    await due(schema, old_lapsed, created=9_000_000, lease=8_940_000, frees=5000)
    found = await sweep(schema)
    assert (found["expired"], found["removed"]) == (1, 5)
    assert found["behind"] >= 5000
    left = await states(schema)
    assert left == {key(complete): 3, key(expired): 5, key(unknown): 2, key(lapsed): 1}
    again = await sweep(schema)
    assert (again["expired"], again["removed"], again["behind"]) == (0, 0, 0)
    refused = await claim(store, key(expired))
    assert isinstance(refused, Record)
    assert (refused.state, refused.status) == (State.EXPIRED, 201)
    assert isinstance(await claim(store, key(over)), Claim)
    assert (await claim(store, key(complete))).body == BODY


async def test_each_change_is_in_the_audit_trail(schema, store):
    """A response that is dropped, and a row that goes before it was; what was told already is not told twice."""
    for number in range(2):
        await store_small(store, replace(await claimed(store, key=key(number)), tombstone_ms=TOMBSTONE_MS))
    await due(schema, 0, expires=1)
    await due(schema, 1, expires=2, frees=1)
    await sweep(schema)
    await due(schema, 0, frees=1)
    await sweep(schema)
    assert await states(schema) == {}
    chains = "SELECT array_agg(event ORDER BY no) AS events, count(DISTINCT no) AS numbers FROM audit GROUP BY key"
    rows = await schema.other.fetch(chains)
    assert [(row["events"], row["numbers"]) for row in rows] == [([1, 4, 11], 3)] * 2
    links = """
    SELECT count(*) FROM audit a JOIN audit b ON b.key = a.key AND b.no = a.no - 1
    WHERE a.before_at = b.at AND a.digest = audit_digest_of($1, b.digest, a.key, a.no, a.at, a.event, a.token, a.fence,
        a.actor, a.rule, a.status, a.size, a.detail)
    """
    assert await schema.other.fetchval(links, PADS) == 4


async def test_one_worker_does_it(schema, store):
    """Another one gets nothing until the lease of the first is over, and then the first gets nothing."""
    await store_small(store, await claimed(store))
    assert (await sweep(schema))["blocks"] == 1
    assert (await sweep(schema, b"two"))["blocks"] is None
    assert (await sweep(schema))["blocks"] == 1
    await schema.other.execute("UPDATE lease SET until = now_ms()")
    assert (await sweep(schema, b"two"))["blocks"] == 1
    assert (await sweep(schema))["blocks"] is None


async def test_a_clock_that_stepped_back_stops_no_housekeeping(schema, store):
    """The lease of a worker that ended before the step is not waited for as long as the step was."""
    assert (await sweep(schema))["blocks"] is not None
    await schema.other.execute("UPDATE lease SET until = until + 86400000")
    assert (await sweep(schema, b"two"))["blocks"] is not None


async def test_what_an_operator_freed_fences_its_owner(schema, store):
    """Also an owner that has renewed its lease for longer than its key was to be kept: else it would write anew."""
    owner = await claimed(store)
    await due(schema, 1, created=3_000_000, frees=1000, lease=-owner.lease_ms)
    released = await store.release_by_operator(owner.key, Deciding(owner.token), store.token(), owner.fence)
    assert released is ResolveStatus.RELEASED
    assert (await sweep(schema))["removed"] == 0
    assert (await store_small(store, owner)).status is SettleStatus.FENCED


async def test_a_clock_that_stepped_ahead_forgets_nothing(schema, store):
    """Nothing is due before the proxy's clock says so, too."""
    await store_small(store, await claimed(store))
    await due(schema, 1, expires=1000, frees=1000)
    now_ms = await schema.other.fetchval("SELECT now_ms()")
    assert (await sweep(schema, latest=now_ms - 60_000))["removed"] == 0
    assert (await sweep(schema, latest=now_ms))["removed"] == 1


async def test_nobody_waits_for_housekeeping_nor_it_for_others(schema, store):
    """A row that another transaction holds is left for the next pass, and claims of one that it holds are in flight."""
    owner = await claimed(store)
    await store_small(store, replace(owner, tombstone_ms=TOMBSTONE_MS))
    await due(schema, 1, expires=1)
    async with schema.connected() as other:
        async with schema.other.transaction():
            await schema.other.execute("SELECT FROM record FOR UPDATE")
            assert (await Housekeeping(other._servers, b"two", (True, PADS)).sweep()).behind_s == 0
        async with schema.other.transaction():
            assert (await sweep(schema, b"two"))["expired"] == 1
            told = await asyncio.wait_for(claim(store), 5)
            assert (told.state, told.body) == (State.EXPIRED, None)


async def test_a_pass_goes_through_the_whole_table(schema, store, monkeypatch):
    """Step by step; its sizes and shares are those of the database, and what is left is what is not due."""
    monkeypatch.setattr(housekeeping, "MIN_BLOCKS", 1)
    owners = await asyncio.gather(*[claimed(store, key=key(number)) for number in range(200)])
    await asyncio.gather(*[store_small(store, owner) for owner in owners])
    await schema.other.execute("UPDATE record SET frees = 1, expires = 1 WHERE get_byte(key, 0) < 128")
    before = len(await states(schema))
    keeper = Housekeeping(store._servers, b"me", (True, PADS))
    steps = []
    step = keeper._step

    async def counted(first: int) -> Any:
        steps.append(first)
        return await step(first)

    monkeypatch.setattr(keeper, "_step", counted)
    upkeep = await keeper.sweep()
    assert steps[0] == 0
    assert len(steps) > 2
    left = await states(schema)
    assert 0 < len(left) < before
    assert all(one[0] >= 128 for one in left)
    assert upkeep.behind_s > 1e9
    assert upkeep.record_bytes >= 8192 * steps[-1]
    assert upkeep.audit_bytes > 0
    assert 0 <= upkeep.dead_ratio <= 1
    assert 0 <= upkeep.hot_ratio <= 1
    assert upkeep.snapshot_s >= 0


async def test_a_stretch_is_read_by_its_blocks_alone(schema, store):
    """However large the table is, a step reads its own stretch of it. Its plan is made before its blocks are known."""
    await claimed(store)
    for setting in ("plan_cache_mode = force_generic_plan", "enable_seqscan = off"):
        await schema.other.execute(f"SET {setting}")
    query = "SELECT key FROM record WHERE ctid >= $1 AND ctid < $2 FOR UPDATE SKIP LOCKED"
    await schema.other.execute(f"PREPARE stretch (tid, tid) AS {query}")
    plan = await schema.other.fetch("EXPLAIN EXECUTE stretch ('(8,0)', '(16,0)')")
    assert any("Tid Range Scan" in row[0] for row in plan)


async def test_the_table_reaches_a_plateau(schema, store):
    """Keys that come use the room of those that went: after many times as many keys it is hardly larger."""
    sizes = []
    for turn in range(6):
        owners = await asyncio.gather(*[claimed(store, key=key(1000 * turn + number)) for number in range(200)])
        await asyncio.gather(*[store_small(store, replace(owner, tombstone_ms=TOMBSTONE_MS)) for owner in owners])
        # The last turn's responses expire, and the tombstones of the turn before.
        await schema.other.execute("UPDATE record SET frees = 1 WHERE state = 5")
        await schema.other.execute("UPDATE record SET expires = 1 WHERE state = 3")
        await sweep(schema)
        await schema.other.execute("VACUUM record")
        sizes.append(await schema.other.fetchval("SELECT pg_total_relation_size('record')"))
    assert sizes[-1] <= 1.5 * sizes[1], sizes
    assert len(await states(schema)) == 200


@pytest.mark.parametrize(
    ("blocks", "due", "took_s", "then"),
    [
        (64, 0, 0.001, 128),
        (8192, 0, 0.001, 8192),
        (256, 0, 1.0, 128),
        (8, 0, 1.0, 8),
        (256, 20, 0.001, 256),
        (256, 25, 0.001, 128),
        # A busy machine makes every step long. That alone must not make the steps small, nor keep them so.
        (256, 20, 1.0, 256),
        (256, 3, 1.0, 512),
    ],
)
def test_how_much_a_step_takes(blocks, due, took_s, then):
    """More while steps are short, fewer where many rows are due."""
    assert housekeeping.fitting(blocks, due, took_s) == then


@pytest.mark.parametrize(("lateness", "rest"), [(0.0, 8.0), (0.5, 4.0), (1.0, 0.0), (30.0, 0.0)])
def test_the_later_the_work_the_shorter_the_rests(lateness, rest):
    """A step of a millisecond is followed by up to 8 ms of rest; by none where the work is as late as it may be."""
    assert housekeeping.pause_s(0.001, lateness) == pytest.approx(rest / 1000)


async def test_the_work_hurries_by_how_long_records_are_kept(schema, store):
    """Two seconds late is nothing for a record of a day, and twice the time that a record of ten seconds has."""
    keeper = Housekeeping(store._servers, b"me", (True, PADS))
    lateness = []
    for life_ms in (86_400_000, 10_000):
        await claimed(store, key=key(1))
        await due(schema, 1, created=life_ms + 2000, lease=life_ms, frees=2000)
        await keeper.sweep()
        lateness.append(keeper._lateness(pass_s=0))
    assert lateness[0] < 0.1
    assert lateness[1] >= 1
    # What a long pass has left behind waits for the next.
    assert keeper._lateness(pass_s=10) > 9
