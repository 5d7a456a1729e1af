"""What is asked about open keys costs the same among any number of complete ones."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from redis import Redis

from oncegate.store.open_keys.listing import open_counts, open_keys
from oncegate.store.record_view import OpenKind
from oncegate.store.store import Store
from oncegate.store.unknown_keys import UnknownKeys
from tests.conftest import Valkey
from tests.parts import until
from tests.postgres_database import Database
from tests.stores import PATIENCE_S, claimed, connected, key
from tests.test_open_keys import indexed

OPEN = 100
# Ten million records take 2 GB in Redis, packed as small as they come.
MANY = [20_000, pytest.param(10_000_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])]


def fill_redis(client: Redis, count: int) -> None:
    """Write complete records whose bodies do not matter, by the server itself."""
    script = "for n = ARGV[1], ARGV[2] do redis.call('SET', 'once:{' .. string.format('%032d', n) .. '}', '\\5') end"
    for first in range(0, count, 10_000):
        client.eval(script, 0, first, first + 9_999)


async def open_some(store: Store) -> None:
    """Leave keys in flight and unknown."""
    claims = await asyncio.gather(*[claimed(store, key=key(number)) for number in range(OPEN)])
    await asyncio.gather(*[store.mark_unknown(one, "cut off", PATIENCE_S) for one in claims[: OPEN // 2]])


async def use(store: Store) -> None:
    """Do all that is done about open keys in usual times, and find each of them."""
    replica = UnknownKeys(store, 3_600_000, 36_000_000, lambda *_, **__: None)
    await replica.recount()
    assert replica.counts[OpenKind.UNKNOWN].keys == replica.counts[OpenKind.IN_FLIGHT].keys == OPEN // 2
    assert (await open_counts(store.records))[OpenKind.UNKNOWN].keys == OPEN // 2
    assert len((await open_keys(store.records, 1000)).records) == OPEN // 2
    assert len((await open_keys(store.records, 1000, kinds=OpenKind)).records) == OPEN


@contextmanager
def commands_of(client: Redis) -> Iterator[dict[str, int]]:
    """Count how often the server executes each command."""
    counts: dict[str, int] = {}
    client.config_resetstat()
    yield counts
    stats = client.info("commandstats")
    counts.update({name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()})


@pytest.mark.parametrize("count", MANY)
async def test_open_keys_among_many_in_redis(own_valkey: Valkey, count: int) -> None:
    """The same commands among none and among many, no SCAN and no KEYS among them, and none that takes long."""
    with own_valkey.client() as client:
        async with connected(own_valkey.url) as store:
            await indexed(store)
            await open_some(store)
            with commands_of(client) as among_none:
                await use(store)
            client.delete("once:counts")
            await asyncio.to_thread(fill_redis, client, count)
            client.config_set("slowlog-log-slower-than", 50_000)
            client.slowlog_reset()
            with commands_of(client) as among_many:
                await use(store)
            assert client.slowlog_len() == 0
    for counts in (among_none, among_many):
        assert not {"scan", "keys", "zscan", "smembers"} & counts.keys()
        assert counts["zcount"] == 8
    assert among_none.keys() - {"config|resetstat"} == among_many.keys() - {"config|resetstat", "del"}
    assert sum(among_many.values()) - sum(among_none.values()) <= 4


@pytest.mark.parametrize("count", MANY)
async def test_open_keys_among_many_in_postgres(database: Database, count: int) -> None:
    """Of the records, those alone are read that are open: by their keys."""
    # No statement takes longer than its deadline.
    for first in range(0, count, 200_000):
        database.connection.execute(
            "INSERT INTO record (key, state) SELECT substr(sha256(int4send(number)), 1, 24), 3"
            f" FROM generate_series({first + 1}, {min(count, first + 200_000)}) AS number"
        )
    async with connected(database.url) as store:
        await indexed(store)
        await open_some(store)
    before = rows_read(database)
    async with connected(database.url) as store:
        await use(store)
    # A session says what it read when it ends.
    await until(lambda: rows_read(database) > before)
    assert rows_read(database) - before < OPEN * 6


def rows_read(database: Database) -> int:
    """Return how many rows of records were read so far, by sessions that ended."""
    statistics = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relid = 'record'::regclass"
    return int(database.connection.value(statistics))
