"""What a store in PostgreSQL writes: WAL for an execution and a renewal, and how many updates stay on their page."""

import asyncio
import os
import random
import subprocess
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import asyncpg

from loadtest.bench.machine import PYTHON
from oncegate.keys.digests import Scope
from oncegate.messages.response_head import response_digest
from oncegate.store.opening import open_store
from oncegate.store.record import Claim, ClaimRequest, StoredResponse
from oncegate.store.store import PostgresOptions, Store, StoreConfig

PATIENCE_S = 20.0
LEASE_MS, DAY_MS, UNKNOWN_MS = 60_000, 86_400_000, 90 * 86_400_000
# Calls at once. They leave in batches, and each batch has the WAL of one commit.
CALLERS = 64
SCOPE = Scope(b"default", b"n" * 16)
UPDATES = (
    "SELECT sum(n_tup_upd), sum(n_tup_hot_upd) FROM pg_stat_user_tables WHERE schemaname = $1 AND relname ~ '^record'"
)


class Rows(NamedTuple):
    """WAL in bytes. `hot`: the share of updates that touch no index."""

    execution_bytes: float
    renewal_bytes: float
    hot: float


async def measure_rows(url: str, executions: int = 5000, in_flight: int = 5000) -> Rows:
    """Measure on a server that nobody else uses. Autovacuum is off meanwhile."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("ALTER SYSTEM SET autovacuum = off")
        await connection.execute("SELECT pg_reload_conf()")
        wal = await _wal(connection, url, executions)
        hot = await _hot(connection, url, executions, in_flight)
        await connection.execute("ALTER SYSTEM RESET autovacuum")
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()
    return Rows(*wal, hot)


def migrate(url: str, schema: str = "oncegate") -> None:
    """Make the schema of oncegate's records, or bring it up to date."""
    settings = {"STORE_URL": url, "STORE_SCHEMA": schema, "UPSTREAM": "http://127.0.0.1:9"}
    env = {**os.environ, **{f"ONCEGATE_{name}": value for name, value in settings.items()}}
    subprocess.run([PYTHON, "-m", "oncegate", "migrate"], env=env, stdout=subprocess.DEVNULL, check=True)


async def _wal(connection: asyncpg.Connection, url: str, executions: int) -> tuple[float, float]:
    async with _store(url, "bench_wal") as store:
        await _execute(store, executions // 5)
        before = await _position(connection)
        await _execute(store, executions)
        execution_bytes = (await _position(connection) - before) / executions
        claims = await _claim(store, executions)
        # The first renewal of a row makes room on its page.
        await _all(store.renew(claim) for claim in claims)
        before = await _position(connection)
        await _all(store.renew(claim) for claim in claims)
        return execution_bytes, (await _position(connection) - before) / executions


async def _hot(connection: asyncpg.Connection, url: str, executions: int, in_flight: int) -> float:
    """Return the share of HOT updates while so many keys are in flight; each is renewed once before it is settled."""
    dice = random.Random(7)
    async with _store(url, "bench_hot") as store:
        claims = await _claim(store, in_flight)
        for _ in range(executions // CALLERS):
            dice.shuffle(claims)
            done, claims = claims[:CALLERS], claims[CALLERS:]
            await _all(store.renew(claim) for claim in claims[:CALLERS])
            await _settle(store, done)
            claims += await _claim(store, CALLERS)
    # The servers of the connections that are closed have written their counts.
    updates, hot = await connection.fetchrow(UPDATES, "bench_hot")
    return float(hot / updates)


@asynccontextmanager
async def _store(url: str, schema: str) -> AsyncIterator[Store]:
    migrate(url, schema)
    config = StoreConfig(
        url=url,
        timeout_ms=int(PATIENCE_S * 1000),
        patience_s=PATIENCE_S,
        background=lambda work: work.close(),
        durability="fsync",
        postgres=PostgresOptions(schema=schema, audit_key=b"k" * 32),
    )
    store = open_store(config)
    store.start()
    try:
        if not await store.wait_up(PATIENCE_S):
            raise RuntimeError(f"the store is not up: {store.not_ready_reason()}")
        yield store
    finally:
        await store.close()


async def _position(connection: asyncpg.Connection) -> int:
    """Return how many bytes of WAL there are."""
    return int(await connection.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'"))


async def _all(calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return the results of all calls, CALLERS of them at once."""
    found, some = [], []
    for call in calls:
        some.append(call)
        if len(some) == CALLERS:
            found += await asyncio.gather(*some)
            some = []
    return found + await asyncio.gather(*some)


async def _claim(store: Store, count: int) -> list[Claim]:
    requests = (
        ClaimRequest(os.urandom(24), SCOPE, os.urandom(16), b"hold", LEASE_MS, DAY_MS, UNKNOWN_MS) for _ in range(count)
    )
    claims = await _all(store.claim(request) for request in requests)
    if wrong := [one for one in claims if not isinstance(one, Claim)]:
        raise RuntimeError(f"not claimed: {wrong[0]}")
    return claims


async def _settle(store: Store, claims: list[Claim]) -> None:
    """Store a response with a head and a body of 300 bytes for each claim."""
    body = os.urandom(150).hex().encode()
    await _all(store.store(claim, _response(body), body, PATIENCE_S) for claim in claims)


async def _execute(store: Store, count: int) -> None:
    while count > 0:
        await _settle(store, await _claim(store, min(count, CALLERS)))
        count -= CALLERS


def _response(body: bytes) -> StoredResponse:
    block = b"Content-Type: application/json\r\nX-Request-Id: %b\r\n" % os.urandom(35).hex().encode()
    digest = response_digest(201, b"Created", block)
    digest.update(body)
    return StoredResponse(
        201, b"Created", block, digest.digest(), 1, len(body), True, False, True, 1_800_000_000_000, 5, 0
    )
