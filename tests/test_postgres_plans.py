"""What the database does for a verb: how it finds rows, what it writes to its log, and whether it touches the index."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from oncegate.store.postgres import rows
from oncegate.store.postgres.connections.session import SETTINGS
from oncegate.store.postgres.verb import Row, Verb
from oncegate.store.record import Claim
from tests.postgres_schemas import NEVER, Schema, fresh_schema
from tests.postgres_server import Server
from tests.stores import LEASE_MS, answer

ALL_PLANS = {
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_level": "notice",
    "client_min_messages": "notice",
}


@pytest.fixture
async def schema() -> AsyncIterator[Schema]:
    async with fresh_schema() as schema:
        # An older server lacks some of those that a session sets.
        known = {row["name"] for row in await schema.other.fetch("SELECT name FROM pg_settings")}
        for name, value in SETTINGS.items():
            if "." in name or name in known:
                await schema.other.execute(f"SET {name} = '{value}'")
        yield schema


def claims(count: int) -> list[Claim]:
    digest = bytes(16)
    made = [
        Claim(os.urandom(24), os.urandom(16), b"1", b"hold", digest, digest * 2, 0, LEASE_MS, 1000, 1000)
        for _ in range(count)
    ]
    return sorted(made, key=lambda claim: claim.key)


def store_row(claim: Claim, head_bytes: int) -> Row:
    response = answer(b"b" * 300)
    response.block = b"X: %s\r\n" % (b"x" * max(1, head_bytes - 5))
    return rows.store_row(claim, response, b"b" * 300)


def steps(claims: list[Claim], head_bytes: int = 0) -> list[tuple[Verb, list[Row]]]:
    """Return the calls of an execution."""
    return [
        (rows.CLAIM, [rows.claim_row(one, NEVER) for one in claims]),
        (rows.TAKE, [rows.claim_row(one, NEVER, one.token) for one in claims]),
        (rows.PEEK, [rows.claim_row(one, 0) for one in claims]),
        (rows.RENEW, [(one.key, one.token, LEASE_MS, 2) for one in claims]),
        (rows.SETTLE, [store_row(one, head_bytes) for one in claims]),
    ]


async def fill(schema: Schema, count: int) -> None:
    await schema.other.execute(
        "INSERT INTO record (key, state) SELECT substr(sha256(int4send(number)), 1, 24), 3"
        " FROM generate_series(1, $1) AS number",
        count,
    )


async def check_plans(schema: Schema) -> None:
    """Check that each verb looks records up by their key, and nothing else, in a session that is new to the tables."""
    other, plans = schema.other, list[str]()
    await other.execute("LOAD 'auto_explain'; DISCARD PLANS")
    for name, value in ALL_PLANS.items():
        await other.execute(f"SET {name} = '{value}'")
    other.add_log_listener(lambda _, message: plans.append(message.message))
    for verb, calls in steps(claims(20)):
        plans.clear()
        assert {row["tag"] for row in await schema.run(verb, *calls)} <= {0, 1}
        await asyncio.sleep(0)
        scans = [scan for plan in plans for scan in re.findall(r"(\w[\w ]*?) (?:using \S+ )?on record", plan)]
        lookups = [scan for scan in scans if "Scan" in scan]
        assert lookups
        assert set(lookups) <= {"Index Scan", "Index Only Scan"}, scans
        conditions = [one for plan in plans for one in re.findall(r"Index Cond: \((.*)\)", plan)]
        assert all(one.startswith(("key = ", "(key = ")) for one in conditions if "key" in one)
    (claim,) = claims(1)
    await schema.run(rows.CLAIM, rows.claim_row(claim, NEVER))
    follow = "follow_2(ARRAY[ROW($1, $2, 0, 9, 5000)::follow_call_2], '', true, '')"
    for call in ("append_2($1, $2, 0, 'x', 'a head')", follow, follow):
        plans.clear()
        await other.fetch(f"SELECT * FROM {call}", claim.key, claim.token)
        await asyncio.sleep(0)
        scans = [scan for plan in plans for scan in re.findall(r"(\w[\w ]* Scan.*) on (?:record|mark|chunk_)", plan)]
        assert scans, plans
        assert all(scan.startswith("Index") for scan in scans), plans


@pytest.mark.parametrize("count", [0, 1000, pytest.param(1_000_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("analyzed", [False, True])
async def test_records_are_looked_up(schema: Schema, count: int, analyzed: bool) -> None:
    await fill(schema, count)
    if analyzed:
        await schema.other.execute("ANALYZE record")
    await check_plans(schema)


async def test_how_much_is_logged(schema: Schema) -> None:
    """An execution with a body of 300 bytes and a head of 150, its audit included, and a renewal."""
    sizes: dict[str, list[float]] = {}
    for _ in range(5):
        for verb, calls in steps(claims(64), head_bytes=150):
            sizes.setdefault(verb.function, []).append(await wal_bytes(schema, inlined(verb, calls)) / 64)
    # The least: after a checkpoint, whole pages are logged.
    assert min(sizes["claim_1"]) + min(sizes["settle_1"]) <= 1900, sizes
    assert 0 < min(sizes["renew_1"]) <= 165, sizes


async def wal_bytes(schema: Schema, statement: str) -> int:
    explained = await schema.other.fetch(f"EXPLAIN (ANALYZE, WAL) {statement}")
    size = re.search(r"WAL: .*bytes=(\d+)", "\n".join(row[0] for row in explained))
    return int(size[1]) if size else 0


async def test_how_much_following_logs(schema: Schema) -> None:
    """Nothing where nobody follows, and nothing for a reader: its note is not logged. A head costs a row."""
    one, other = claims(2)
    await schema.run(rows.CLAIM, *[rows.claim_row(claim, NEVER) for claim in (one, other)])
    sizes: dict[str, list[int]] = {"before": [], "now": [], "read": [], "a head": []}
    for index in range(1, 6):
        chunk = f"{index}, '{'x' * 2000}'"
        for name, claim, call in (
            ("before", one, f"append_1({{}}, {chunk})"),
            ("now", other, f"append_2({{}}, {chunk}, '')"),
            ("read", other, "follow_2(ARRAY[ROW({}, 0, 262144, 5000)::follow_call_2], '', true, '')"),
        ):
            call = call.format(f"'\\x{claim.key.hex()}', '\\x{claim.token.hex()}'")
            sizes[name].append(await wal_bytes(schema, f"SELECT * FROM {call}"))
    for claim in claims(5):
        await schema.run(rows.CLAIM, rows.claim_row(claim, NEVER))
        call = f"append_2('\\x{claim.key.hex()}', '\\x{claim.token.hex()}', 0, '{'x' * 2000}', '{'h' * 150}')"
        sizes["a head"].append(await wal_bytes(schema, f"SELECT * FROM {call}"))
    # The least: after a checkpoint, whole pages are logged.
    least = {name: min(of_one) for name, of_one in sizes.items()}
    assert least["now"] <= least["before"], sizes
    assert least["read"] == 0, sizes
    assert least["a head"] <= least["now"] + 150 + 300, sizes


async def hot_share(schema: Schema) -> float:
    """Return the share of updates that touch no index: 5,000 keys in flight, responses with heads of 300 bytes."""
    many = claims(5000)
    for verb, calls in steps(many, head_bytes=300):
        for first in range(0, len(calls), 100):
            await schema.run(verb, *calls[first : first + 100])
    await schema.other.execute("SELECT pg_stat_force_next_flush()")
    row = await schema.other.fetchrow(
        "SELECT n_tup_upd AS updates, n_tup_hot_upd AS hot FROM pg_stat_user_tables WHERE relid = 'record'::regclass"
    )
    assert row["updates"] == 15_000
    return float(row["hot"] / row["updates"])


@pytest.fixture
def own_server() -> Iterator[Server]:
    server = Server.started()
    yield server
    server.close()


async def test_most_updates_touch_no_index(own_server: Server) -> None:
    """Each record is updated three times. The server has no other sessions: see the next test."""
    async with fresh_schema(own_server.url) as schema:
        assert await hot_share(schema) >= 0.95


OPEN = {
    "a snapshot": ("postgres", "SELECT 1 FROM pg_class"),
    # Its number holds up what the server knows of old versions, in all databases.
    "a write in another database": ("other", "CREATE TABLE written (number int)"),
}


@pytest.mark.parametrize(("database", "statement"), OPEN.values(), ids=OPEN)
async def test_a_transaction_that_stays_open_costs_updates_their_place(
    own_server: Server, database: str, statement: str
) -> None:
    """Old versions that it may still see stay on their pages, and a page gets full. Nothing else fails."""
    own_server.sql("CREATE DATABASE other")
    async with fresh_schema(own_server.url) as schema:
        reader = await asyncpg.connect(own_server.url.removesuffix("postgres") + database)
        await reader.execute(f"BEGIN ISOLATION LEVEL REPEATABLE READ; {statement}")
        assert await hot_share(schema) < 0.95
        await reader.close()


def inlined(verb: Verb, calls: list[Row]) -> str:
    """Return a statement with its arguments in it."""

    def literal(value: bytes | int | None) -> str:
        return "NULL" if value is None else f"'\\x{value.hex()}'" if isinstance(value, bytes) else str(value)

    of_type = {
        "claim_1": "claim_call",
        "take_1": "claim_call",
        "peek_2": "claim_call",
        "renew_1": "renew_call",
        "settle_1": "settle_call",
    }
    made = ", ".join(f"ROW({', '.join(map(literal, call))})" for call in calls)
    return f"SELECT * FROM {verb.function}(ARRAY[{made}]::{of_type[verb.function]}[], 'proxy', true, '')"
