"""Decisions about open keys in PostgreSQL: evidence in the trail, and proxies and schemas of the version before."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from oncegate.store.kept import Kept, of_complete, pack_kept, unpack_kept
from oncegate.store.postgres import rows
from oncegate.store.postgres.migrations import run
from oncegate.store.postgres.migrations.files import migrations
from oncegate.store.postgres.store import hmac_pads
from oncegate.store.record import Claim, pack
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding
from oncegate.store.results import ResolveStatus, SettleStatus
from oncegate.store.store import Store
from tests.postgres_schemas import Schema, fresh_schema, lapse
from tests.stores import BODY, PATIENCE_S, answer, claim, claimed, key, store_small

KEPT = Kept(rule="charges", values=(("key", "canary"),), first_ms=5)
OF_COMPLETE = Kept(rule="charges")


@asynccontextmanager
async def schema_before(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Schema]:
    """A schema that was not migrated to the newest version yet."""
    with monkeypatch.context() as before:
        before.setattr(run, "migrations", lambda: migrations()[:-1])
        before.setattr(run, "newest_version", lambda: len(migrations()) - 1)
        schemas = fresh_schema()
        schema = await schemas.__aenter__()
    try:
        yield schema
    finally:
        await schemas.__aexit__(None, None, None)


async def decide(store: Store, owner: Claim, how: str, seen_lease: int | None = None) -> ResolveStatus:
    seen, operator = Deciding(owner.token, seen_lease, b"evidence"), b"O" * 16
    if how == "release":
        return await store.release_by_operator(owner.key, seen, operator, owner.fence)
    by = replace(owner, token=operator)
    return await store.resolve_by_operator(by, seen, pack(by, answer(BODY)), BODY)


async def details(schema: Schema) -> list[bytes]:
    """Return what the trail says of all decisions."""
    return [
        row[0] for row in await schema.other.fetch("SELECT detail FROM audit WHERE event IN (9, 10) ORDER BY at, no")
    ]


@pytest.mark.parametrize("how", ["resolve", "release"])
async def test_a_schema_that_is_not_migrated_yet(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Nothing is kept to ask with, and no evidence; a running lease is left alone as ever. Then it is migrated."""
    done = ResolveStatus.RELEASED if how == "release" else ResolveStatus.RESOLVED
    async with schema_before(monkeypatch) as schema, schema.connected() as store:
        owner = await claim(store, kept=KEPT)
        assert isinstance(owner, Claim)
        assert await schema.other.fetchval("SELECT kept FROM record") == owner.kept == pack_kept(OF_COMPLETE)
        lease = "SELECT lease FROM record"
        assert await decide(store, replace(owner, token=b"F" * 16), how, 0) is ResolveStatus.FENCED
        for seen in (0, await schema.other.fetchval(lease)):
            assert await decide(store, owner, how, seen) is ResolveStatus.RUNNING
        await lapse(schema)
        seen = await schema.other.fetchval(lease)
        for other in (0, seen - 1):
            assert await decide(store, owner, how, other) is ResolveStatus.RUNNING
        # What another transaction is about to change is waited for.
        async with schema.other.transaction():
            await schema.other.execute("UPDATE record SET lease = now_ms() + 60000")
            deciding = asyncio.create_task(decide(store, owner, how, seen))
            await asyncio.sleep(0.1)
        assert await deciding is ResolveStatus.RUNNING
        await schema.other.execute("UPDATE record SET lease = $1", seen)
        assert await decide(store, owner, how, seen) is done
        assert await decide(store, replace(owner, key=key(9)), how, seen) is ResolveStatus.ABSENT
        assert await details(schema) == [b""]
        # As a proxy of this version began it, before the schema was migrated.
        unsettled = await claimed(store, key=key(3))
        await run.Run(schema.other, run.Target(schema.url, schema.name)).migrate()
        assert (await store_small(store, unsettled)).status is SettleStatus.STORED
        number = iter(range(100, 10_000))
        async with asyncio.timeout(PATIENCE_S):
            while True:
                later = await claim(store, key(next(number)), kept=KEPT)
                assert isinstance(later, Claim)
                if unpack_kept(later.kept) == KEPT:
                    break
                await asyncio.sleep(0.02)
        assert await decide(store, later, how, 0) is ResolveStatus.RUNNING
        assert await decide(store, later, how) is done
        assert await details(schema) == [b"", b"evidence"]
        assert store.not_ready_reason() is None


async def test_proxies_of_the_version_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide and settle as they did, before and after; what they complete loses what a newer one has kept."""
    resolve_1 = "SELECT resolve_1($1, $2, $3, 8, $4, $5, $6, NULL, 1000, 0, 200, $7, true, $8)"
    async with fresh_schema() as schema, schema.connected() as store:
        for number in range(2):
            owner = await claim(store, key(number), kept=KEPT)
            assert isinstance(owner, Claim)
            kept = "SELECT kept FROM record WHERE key = $1"
            assert await schema.other.fetchval(kept, owner.key) == pack_kept(KEPT)
            if number:
                by = replace(owner, token=b"O" * 16)
                args = (
                    owner.key,
                    owner.token,
                    by.token,
                    bytes(16),
                    pack(by, answer(BODY)),
                    BODY,
                    b"somebody",
                    hmac_pads(b""),
                )
                assert await schema.other.fetchval(resolve_1, *args) == 1
                assert await schema.other.fetchval(resolve_1, *args) == 1
            else:
                (settled,) = await schema.run(rows.SETTLE, rows.store_row(owner, answer(BODY), BODY))
                assert settled["tag"] == 1
            assert await schema.other.fetchval(kept, owner.key) == pack_kept(OF_COMPLETE)
        assert await details(schema) == [b""]


@pytest.mark.parametrize(
    "kept", [b"", pack_kept(KEPT), pack_kept(OF_COMPLETE), b"\x0d\xff\xff", b"\x0e", b"\x0c\0\0\x0d"]
)
async def test_both_cut_the_same(kept: bytes) -> None:
    """Also what is damaged."""
    async with fresh_schema() as schema:
        found = await schema.other.fetchval("SELECT of_complete_3($1)", kept)
    assert (found or b"") == of_complete(kept)


async def test_a_mark_that_is_over_while_it_is_swept() -> None:
    """Housekeeping removes it while two take its place: one wins, whichever comes first."""
    async with fresh_schema() as schema, schema.connected() as store:
        sweeper: Any = store
        for number in range(30):
            name = store_key(key(number)) + b":test"
            await schema.other.execute("INSERT INTO mark VALUES ($1, 'old', 1)", name)
            swaps = [store.marks.swap(name, b"", value, 60_000) for value in (b"one", b"two")]
            *done, _ = await asyncio.gather(*swaps, sweeper._housekeeping.sweep())
            assert sorted(done) == [False, True]
            assert await store.marks.get(name) == (b"one" if done[0] else b"two")
