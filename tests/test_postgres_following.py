"""Following a response in PostgreSQL: what a reader locks and writes, and owners that write no head."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from oncegate.decision import State
from oncegate.store.kept import was_replaced
from oncegate.store.postgres import rows
from oncegate.store.postgres.marks import NOTE_MS
from oncegate.store.record import PREFIX_BYTES, Claim
from oncegate.store.record_view import Deciding
from oncegate.store.results import (
    AppendStatus,
    DropStatus,
    Followed,
    ReadFailure,
    RenewStatus,
    SettleResult,
    SettleStatus,
)
from oncegate.store.store import Store
from tests.own_postgres import OwnPostgres
from tests.postgres_schemas import NEVER, Schema, foreign, fresh_schema, lapse
from tests.postgres_server import Server
from tests.stores import FOREIGN, KEY, PATIENCE_S, answer, claimed, connected, key

HEAD = b"a packed head"
READING_MS = 5000
DONE = (AppendStatus.APPENDED, AppendStatus.APPENDED_READ)
STORED = SettleResult(SettleStatus.STORED)
FOLLOW = "SELECT * FROM follow_2(ARRAY[ROW($1, $2, $3, $4, $5)::follow_call_2], '', true, '')"


@pytest.fixture
async def schema() -> AsyncIterator[Schema]:
    async with fresh_schema() as schema:
        yield schema


@pytest.fixture
async def store(schema: Schema) -> AsyncIterator[Store]:
    async with schema.connected() as store:
        yield store


async def running(store: Store, *chunks: bytes, mode: bytes = b"hold") -> Claim:
    """Claim the key, and append these chunks of its response."""
    owner = await claimed(store, mode)
    for index, chunk in enumerate(chunks):
        head = b"" if index else HEAD
        assert await store.append(owner, index, chunk, PATIENCE_S, head) is AppendStatus.APPENDED
    return owner


async def followed(store: Store, token: bytes, first: int = 0, reading_ms: int = 0) -> Followed:
    found = await store.follow(KEY, token, first, reading_ms)
    assert isinstance(found, Followed), found
    return found


# What a reader locks and writes ...


async def test_a_reader_is_in_nobody_s_way(schema: Schema, store: Store) -> None:
    """A read that has noted its reader, and whose transaction goes on, holds nothing that the owner needs."""
    owner = await running(store, b"one, ")
    async with schema.other.transaction():
        row = await schema.other.fetchrow(FOLLOW, KEY, owner.token, 0, 1 << 18, READING_MS)
        assert (row["head"], row["chunks"]) == (HEAD, [b"one, "])
        assert await schema.other.fetchval("SELECT expires FROM mark") == row["now"] + READING_MS
        async with asyncio.timeout(PATIENCE_S):
            assert await store.renew(owner) is RenewStatus.RENEWED
            # The note is not committed, so nobody sees it.
            assert await store.append(owner, 1, b"two", PATIENCE_S) is AppendStatus.APPENDED
            assert await store.store(owner, answer(b"one, ", b"two"), b"", PATIENCE_S) == STORED


async def test_a_read_writes_nothing_but_its_note(schema: Schema, store: Store) -> None:
    """It gets a transaction number only where it notes its reader, once a second whatever the number of readers."""
    owner = await running(store, b"one, ")
    numbers = []
    for reading_ms in (0, READING_MS, READING_MS, 0, READING_MS):
        async with schema.other.transaction():
            await schema.other.fetchrow(FOLLOW, KEY, owner.token, 0, 1 << 18, reading_ms)
            numbers.append(await schema.other.fetchval("SELECT pg_current_xact_id_if_assigned() IS NOT NULL"))
    assert numbers == [False, True, False, False, False]


async def locked(schema: Schema, statement: str, *args: object) -> list[str]:
    """Run a statement, and return the partitions of bodies that it has locked."""
    async with schema.other.transaction():
        await schema.other.fetch(statement, *args)
        rows = await schema.other.fetch(
            "SELECT DISTINCT relname FROM pg_locks JOIN pg_class ON relation = pg_class.oid"
            " WHERE pid = pg_backend_pid() AND relname ~ '^chunk_[0-9]{8}$'"
        )
    return [row["relname"] for row in rows]


async def test_no_other_day_is_locked(schema: Schema, store: Store) -> None:
    """Whatever is appended or read touches the partition of its own day, also from a plan that is made once."""
    owner = await running(store, b"one, ")
    await schema.other.execute("SET plan_cache_mode = force_generic_plan")
    for number in range(3):
        for statement, args in (
            (FOLLOW, (KEY, owner.token, 0, 1 << 18, 0)),
            ("SELECT append_2($1, $2, $3, $4, $5)", (KEY, owner.token, 1 + number, b"more", b"")),
            ("SELECT append_2($1, $2, $3, $4, $5)", (KEY, owner.token, 0, b"one, ", HEAD)),
        ):
            assert len(await locked(schema, statement, *args)) == 1, statement
    # Nothing new: no body is looked at.
    assert await locked(schema, FOLLOW, KEY, owner.token, 4, 1 << 18, READING_MS) == []


async def test_many_are_followed_in_few_statements(schema: Schema, store: Store) -> None:
    """What a turn of the loop asks for leaves together, sixteen a statement; each reader gets its own response."""
    owners = [await claimed(store, key=key(number)) for number in range(64)]
    for number, owner in enumerate(owners):
        await store.append(owner, 0, b"%d" % number, PATIENCE_S, HEAD)
    asked = [store.follow(owner.key, owner.token, first, READING_MS) for owner in owners for first in (0, 1)]
    found = await asyncio.gather(*asked)
    assert [one.chunks for one in found if isinstance(one, Followed)] == [
        chunks for number in range(64) for chunks in ([b"%d" % number], [])
    ]
    assert await schema.other.fetchval("SELECT count(*) FROM mark") == 64
    assert await schema.other.fetchval("SELECT count(DISTINCT xmin::text) FROM mark") <= 8


async def read_for(store: Store, owners: list[Claim], until: float) -> int:
    """Read each response again and again until the loop's time `until`, and return how often."""
    loop, rounds = asyncio.get_running_loop(), 0
    while loop.time() < until:
        mixed = random.sample(owners, len(owners))
        found = await asyncio.gather(*[store.follow(one.key, one.token, 0, 20) for one in mixed])
        assert all(isinstance(one, Followed) for one in found), found
        rounds += 1
    return rounds


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.full)])
async def test_readers_owners_and_housekeeping_share_keys_without_a_deadlock(schema: Schema, seconds: int) -> None:
    """Two proxies read the same keys in any order, their notes expire at once and are removed, owners go on."""
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    async with schema.connected() as store, schema.connected() as second:
        before = await schema.other.fetchval(deadlocks)
        owners = [await claimed(store, key=key(number)) for number in range(40)]
        until = asyncio.get_running_loop().time() + seconds
        reading = [asyncio.ensure_future(read_for(one, owners, until)) for one in (store, second) for _ in range(2)]
        count = 0
        while not all(one.done() for one in reading):
            await schema.other.execute("DELETE FROM mark WHERE expires <= now_ms()")
            statuses = await asyncio.gather(*[store.append(one, count, b"x", PATIENCE_S) for one in owners])
            assert set(statuses) <= {AppendStatus.APPENDED, AppendStatus.APPENDED_READ}
            assert {await store.renew(one) for one in owners[:4]} == {RenewStatus.RENEWED}
            count += 1
        assert min(await asyncio.gather(*reading)) > 1
        assert count > 1
        await schema.other.execute("SELECT pg_stat_force_next_flush()")
        assert await schema.other.fetchval(deadlocks) == before


# A server that is killed ...


def piece(index: int) -> bytes:
    return b"%06d" % index * 300


async def read_to_its_end(store: Store, owner: Claim) -> tuple[list[bytes], Followed | ReadFailure]:
    """Follow a response from its beginning until it has ended or cannot be read any more."""
    read: list[bytes] = []
    while True:
        found = await store.follow(owner.key, owner.token, len(read), READING_MS)
        if isinstance(found, Followed):
            read += found.chunks
            ended = found.response is not None and len(read) >= found.count
            if ended or (found.state is not State.IN_FLIGHT and found.response is None):
                return read, found
        elif found is not ReadFailure.UNCONFIRMED:
            return read, found
        await asyncio.sleep(0.01)


@pytest.mark.fault(8)
@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.full)])
async def test_a_server_that_is_killed_while_a_response_is_followed(postgres_template: Server, count: int) -> None:
    """Chunks are confirmed in its memory, so the last ones may be lost. No reader gets other bytes for that, or an end.

    Then the owner stores no body. What was read before the fault is what the owner sent, whatever became of it.
    """
    server, rng = OwnPostgres(postgres_template), random.Random(3)
    try:
        at_once = {"timeout_ms": 1000, "durability": "fsync"}
        async with connected(server.url, **at_once) as store, connected(server.url, **at_once) as elsewhere:
            for number in range(count):
                owner, fatal = await claimed(store, key=key(number)), rng.randrange(1, 20)
                reading = asyncio.ensure_future(read_to_its_end(elsewhere, owner))
                for index in range(20):
                    if index == fatal:
                        await asyncio.to_thread(server.kill)
                        await asyncio.to_thread(server.start)
                    head = b"" if index else HEAD
                    assert await store.append(owner, index, piece(index), PATIENCE_S, head) in DONE
                pieces = [piece(index) for index in range(20)]
                settled = await store.store(owner, answer(*pieces), b"", PATIENCE_S)
                if is_torn := settled.status is SettleStatus.INCOMPLETE:
                    settled = await store.store(owner, answer(*pieces, kept=False), b"", PATIENCE_S)
                assert settled == STORED
                read, end = await asyncio.wait_for(reading, PATIENCE_S)
                assert read == pieces[: len(read)]
                if isinstance(end, Followed) and end.response is not None and end.response.body_stored:
                    assert read == pieces
                    assert not is_torn
                late = await read_to_its_end(elsewhere, owner)
                assert late[0] == ([] if is_torn else pieces)
    finally:
        server.close()


# Proxies of the first version of the schema ...


async def test_an_owner_of_the_first_version(schema: Schema, store: Store) -> None:
    """It appends and settles as it did. Its response is followed without a head; what it took over says so."""
    former = await running(store, b"of another", mode=b"retry")
    await lapse(schema)
    (taken,) = await schema.run(rows.TAKE, rows.claim_row(foreign(former), NEVER, former.token))
    assert taken["tag"] == 0
    for index, chunk in enumerate((b"one, ", b"two")):
        assert await schema.other.fetchval("SELECT append_1($1, $2, $3, $4)", KEY, FOREIGN, index, chunk) == 1
    assert await store.follow(KEY, former.token, 0) is ReadFailure.GONE
    found = await followed(store, FOREIGN, reading_ms=READING_MS)
    assert (found.head, found.chunks, found.replaced) == (b"", [b"one, ", b"two"], True)
    (settled,) = await schema.run(rows.SETTLE, rows.store_row(foreign(former), answer(b"one, ", b"two"), b""))
    assert settled["tag"] == 1
    assert (await followed(store, FOREIGN)).replaced


# What a claim replaces ...


@pytest.mark.parametrize("how", ["released", "released by an operator"])
async def test_a_replacement_that_is_given_up(schema: Schema, store: Store, how: str) -> None:
    """The next claim replaces what it has replaced, until that time is over."""
    former = await running(store, b"of another", mode=b"retry")
    await lapse(schema)
    owner = await claimed(store, b"retry")
    for _ in range(2):
        if how == "released":
            await store.release(owner, PATIENCE_S)
        else:
            await store.release_by_operator(KEY, Deciding(owner.token), b"O" * 16, owner.fence)
        owner = await claimed(store)
        assert was_replaced(owner.kept)
        assert (await followed(store, owner.token)).replaced
    await store.release(owner, PATIENCE_S)
    await schema.other.execute("UPDATE record SET frees = now_ms() - 1")
    owner = await claimed(store)
    assert not was_replaced(owner.kept)
    assert not (await followed(store, owner.token)).replaced
    assert former.token != owner.token


# What is left of it ...


@pytest.mark.parametrize("purge", [False, True])
async def test_a_dropped_response_leaves_no_head(schema: Schema, store: Store, purge: bool) -> None:
    body = os.urandom(rows.ROW_BYTES + 1)
    owner = replace(await running(store, body), tombstone_ms=60_000)
    assert await store.store(owner, answer(body), b"", PATIENCE_S) == STORED
    view = await store.records.read(KEY)
    assert view is not None
    if not purge:
        await schema.other.execute("UPDATE record SET expires = 1")
    assert await store.drop(view, purge=purge) is DropStatus.DROPPED
    assert await schema.other.fetchval("SELECT count(*) FROM chunk") == 0
    found = await followed(store, owner.token)
    assert (found.state, found.head, found.chunks, found.response) == (State.EXPIRED, b"", [], None)


# Notes from replica to replica ...


async def test_housekeeping_removes_old_notes(schema: Schema, store: Store) -> None:
    """Those of readers that have left, and those to replicas that are gone."""
    owner = await running(store, b"one")
    await store.follow(KEY, owner.token, 0, READING_MS)
    assert await store.post(FOREIGN, b"for nobody")
    assert await store.post(store.token(), b"a note")
    sweep: Any = store
    await sweep._housekeeping.sweep()
    names = "SELECT count(*) FROM mark"
    assert await schema.other.fetchval(names) == 3
    lasts = await schema.other.fetchval("SELECT max(expires) - now_ms() FROM mark")
    assert 0 < lasts <= NOTE_MS
    await schema.other.execute("UPDATE mark SET expires = 1")
    assert await store.collect(store.token_prefix) == []
    await sweep._housekeeping.sweep()
    assert await schema.other.fetchval(names) == 0


async def test_a_reply_that_is_lost_loses_no_note(schema: Schema, store: Store) -> None:
    """A note is removed by the statement after the one that brought it."""
    box = store.token_prefix
    for note in (b"one", b"two", b"one"):
        assert await store.post(box + bytes(6), note)
    notes: Any = store.marks
    statement = "SELECT value FROM mark WHERE name ~ '^note'"
    assert await store.collect(box) == [b"one", b"two"]
    # As if that reply had not come.
    notes._collected = []
    assert await store.collect(box) == [b"one", b"two"]
    assert await store.post(box + bytes(6), b"three")
    assert await store.collect(box) == [b"three"]
    assert await store.collect(box) == []
    assert await schema.other.fetch(statement.replace("name ~ '^note'", "true")) == []
    assert len(box) == PREFIX_BYTES
