"""What is known of a key is told in every state in which it can be read: one test for each cell of the table."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oncegate.decision import Decision
from oncegate.gateway.answers import decide_duplicate, duplicate_refusal
from oncegate.store.health.breaker import FAILURES, Breaker
from oncegate.store.membership import Membership
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.migrations.grants import grants
from oncegate.store.record import PREFIX_BYTES, Claim
from oncegate.store.redis.store import RedisStore
from oncegate.store.results import StoreEvent
from oncegate.store.store import PostgresOptions, Store
from tests.conftest import Valkey
from tests.postgres_probe import PostgresProbe
from tests.probes import Probe
from tests.stores import OTHER, PATIENCE_S, SAME, Behind, claim, claimed, connected, key, store_small
from tests.test_redis_store import ACL

REFERENCE = Path(__file__).parent.parent / "docs/reference/answers.md"
NEW, RUNNING, COMPLETE, UNKNOWN = (key(number) for number in range(900, 904))
# What is asked for in each column: the key and the fingerprint of the request.
COLUMNS = {
    "new key": (NEW, SAME),
    "running": (RUNNING, SAME),
    "complete": (COMPLETE, SAME),
    "unknown": (UNKNOWN, SAME),
    "used for another request": (COMPLETE, OTHER),
}
KNOWN = ["409 `in-flight`", "replay", "409 `outcome-unknown`", "422 `key-reused`"]
REFUSED = "503 `store-unavailable`"
POLICY: Any = SimpleNamespace(lease_ms=60_000, in_flight_status=409)
State = Any


def member(identity: str = "namespace=a", quarantine_ms: int = 0) -> Membership:
    def ignore(_event: StoreEvent, _text: str) -> None: ...

    return Membership(bytes(PREFIX_BYTES), "one", identity, False, 60_000, quarantine_ms, 60.0, True, ignore)


def limited(valkey: Valkey, *rights: str) -> str:
    """Return the URL for a user who has the rights of the documents, and these."""
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "gate", "reset", ">pw", *ACL, *rights)
    return valkey.url.replace("redis+unix://", "redis+unix://gate:pw@")


def breaker(store: Any) -> Breaker:
    """Return the circuit breaker of a store on one server."""
    return store.nodes[0].breaker if isinstance(store, RedisStore) else store._servers.breaker


@asynccontextmanager
async def plain(valkey: Valkey | Probe, **options: Any) -> AsyncIterator[Store]:
    """A store with these options, and nothing else in the way."""
    async with connected(valkey.url, timeout_ms=300, behind=Behind(), **options) as store:
        yield store


@asynccontextmanager
async def with_other_identity(valkey: Valkey | Probe) -> AsyncIterator[Store]:
    async with plain(valkey, member=member("namespace=b")), plain(valkey, member=member()) as store:
        yield store


@asynccontextmanager
async def with_user(valkey: Valkey, *rights: str) -> AsyncIterator[Store]:
    async with connected(limited(valkey, *rights), timeout_ms=300, behind=Behind(), member=member()) as store:
        yield store


@asynccontextmanager
async def full(valkey: Valkey) -> AsyncIterator[Store]:
    async with plain(valkey) as store:
        with valkey.client() as client:
            client.config_set("maxmemory", 1)
            try:
                yield store
            finally:
                client.config_set("maxmemory", 0)


@asynccontextmanager
async def broken(valkey: Valkey | Probe, **options: Any) -> AsyncIterator[Store]:
    """A store whose circuit breaker is open."""
    async with plain(valkey, **options) as store:
        for _ in range(FAILURES):
            breaker(store).failed(asyncio.get_running_loop().time())
        assert store.broken
        yield store


@asynccontextmanager
async def read_only(valkey: Valkey) -> AsyncIterator[Store]:
    async with plain(valkey) as store:
        with valkey.client() as client:
            client.replicaof("127.0.0.1", 1)
            try:
                yield store
            finally:
                client.replicaof("no", "one")


@asynccontextmanager
async def disconnected(valkey: Valkey, *which: str) -> AsyncIterator[Store]:
    async with plain(valkey, durability="replicated") as store:
        for one in which:
            await getattr(store.nodes[0], one).close()
        yield store


STATES: dict[str, State] = {
    "ready": plain,
    "quarantine": lambda valkey: plain(valkey, member=member(quarantine_ms=60_000)),
    "another identity": with_other_identity,
    "losses cannot be seen": lambda valkey: with_user(valkey, "resetkeys", "~once:{*"),
    "a right is missing": lambda valkey: with_user(valkey, "-hset"),
    "memory full": full,
    "Redis is a replica": read_only,
    "no replica": lambda valkey: plain(valkey, durability="replicated"),
    "`appendfsync` is not `always`": lambda valkey: plain(valkey, durability="fsync"),
    "circuit breaker open": broken,
    "no replica, circuit breaker open": lambda valkey: broken(valkey, durability="replicated"),
    "no connection for claims": lambda valkey: disconnected(valkey, "claims"),
    "Redis unreachable": lambda valkey: disconnected(valkey, "claims", "link"),
}


@asynccontextmanager
async def with_role(probe: PostgresProbe, *changes: str) -> AsyncIterator[Store]:
    """A store whose user has the rights that `oncegate migrate` gives, and then these changes."""
    role = f"known_{os.getpid()}"
    probe.sql(f"CREATE ROLE {role} LOGIN")
    try:
        for row in probe.sql(grants(role)):
            for statement in row[0].split(";"):
                probe.sql(statement)
        for change in changes:
            probe.sql(change.format(role))
        url = probe.url.replace("postgres@", f"{role}@")
        async with connected(url, timeout_ms=300, behind=Behind()) as store:
            yield store
    finally:
        probe.sql(f"DROP OWNED BY {role}")
        probe.sql(f"DROP ROLE {role}")


@asynccontextmanager
async def over_its_limit(probe: PostgresProbe) -> AsyncIterator[Store]:
    async with plain(probe, postgres=PostgresOptions(max_bytes=1)) as store:
        servers: Any = store._servers
        await servers.health.measure(await servers.free_session(Level.OFF, float("inf")))
        assert store.refuses_new
        yield store


@asynccontextmanager
async def ended(probe: PostgresProbe) -> AsyncIterator[Store]:
    async with plain(probe) as store:
        store.end_calls()
        yield store


ON_POSTGRES: dict[str, State] = {
    **{state: STATES[state] for state in ("ready", "quarantine", "another identity", "circuit breaker open")},
    "a right is missing": lambda probe: with_role(probe, "REVOKE INSERT ON record FROM {}"),
    "memory full": over_its_limit,
    "Redis is a replica": lambda probe: with_role(probe, "ALTER ROLE {} SET default_transaction_read_only = on"),
    "no replica": STATES["no replica"],
    "no replica, circuit breaker open": STATES["no replica, circuit breaker open"],
    "Redis unreachable": ended,
}


def expected() -> dict[tuple[str, str], str]:
    """Return the cells of the table in the reference, by state and column."""
    text = REFERENCE.read_text()
    table = re.search(r"\| state of the store \|(.*)\|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text)
    assert table
    columns = [one.strip() for one in table[1].split("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2].splitlines()]
    return {(row[0], column): cell for row in rows for column, cell in zip(columns, row[1:], strict=True)}


CELLS = expected()


def test_the_table_has_every_state_and_every_column():
    """The table of the reference and these tests know the same states and columns, and refuse new keys alone."""
    assert CELLS.keys() == {(state, column) for state in STATES for column in COLUMNS}
    for state in STATES.keys() - {"ready", "Redis unreachable"}:
        assert [CELLS[state, column] for column in COLUMNS] == [REFUSED, *KNOWN]


async def seed(valkey: Valkey | Probe) -> None:
    """Leave a running, a complete and an unknown key in the store."""
    async with connected(valkey.url) as store:
        await claimed(store, key=RUNNING)
        await store_small(store, await claimed(store, key=COMPLETE))
        await store.mark_unknown(await claimed(store, key=UNKNOWN), "why", PATIENCE_S)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("state", STATES)
async def test_what_a_request_gets(valkey, state, column):
    """Each state of the store and each state of the key: only first-time keys are refused."""
    await seed(valkey)
    await assert_gets_what_the_table_says(valkey, STATES, state, column)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("state", ON_POSTGRES)
async def test_what_a_request_gets_from_postgresql(database, state, column):
    """It is the same in the states that a PostgreSQL may have."""
    probe = PostgresProbe(database)
    await seed(probe)
    await assert_gets_what_the_table_says(probe, ON_POSTGRES, state, column)


async def assert_gets_what_the_table_says(
    stored: Valkey | Probe, states: Mapping[str, State], state: str, column: str
) -> None:
    of, fingerprint = COLUMNS[column]
    async with states[state](stored) as store:
        found = await claim(store, of, fingerprint=fingerprint)
        if isinstance(found, Claim):
            answer = "executed"
        elif (decision := decide_duplicate(found, fingerprint)) is Decision.REPLAY:
            answer = "replay"
        else:
            problem = duplicate_refusal(decision, found, POLICY, 1.0).problem
            answer = f"{problem.status} `{problem.slug}`"
    assert answer == CELLS[state, column]


async def test_a_key_that_may_be_retried_at_the_memory_limit(valkey):
    """A key that is unknown and may be executed again is unknown as long as it cannot be claimed."""
    async with connected(valkey.url) as store:
        await store.mark_unknown(await claimed(store, mode=b"retry", key=UNKNOWN), "why", PATIENCE_S)
    async with full(valkey) as store:
        assert decide_duplicate(await claim(store, UNKNOWN, mode=b"retry"), SAME) is Decision.OUTCOME_UNKNOWN


async def test_a_response_of_a_former_window_is_not_told(probe):
    """A derived key stands for a window: past it a request is a new one, which is refused and not answered."""
    await seed(probe)
    async with broken(probe) as store:
        await asyncio.sleep(0.01)
        now = await claim(store, COMPLETE, window_ms=3_600_000)
        assert decide_duplicate(now, SAME) is Decision.REPLAY
        past = await claim(store, COMPLETE, window_ms=1)
        assert duplicate_refusal(decide_duplicate(past, SAME), past, POLICY, 1.0).problem.slug == "store-unavailable"


async def test_a_claim_that_nobody_holds_is_not_told(probe):
    """A claim of this proxy that is being withdrawn is nobody's request: its key is not said to be running."""
    async with plain(probe) as store:
        owner = await claimed(store, key=NEW)
        store._claims._withdrawn_tokens.add(owner.token)
        for _ in range(FAILURES):
            breaker(store).failed(asyncio.get_running_loop().time())
        found = await claim(store, NEW)
        assert duplicate_refusal(decide_duplicate(found, SAME), found, POLICY, 1.0).problem.slug == "store-unavailable"
