"""Schemas of their own for tests, in the PostgreSQL of the test run, and a second connection to them.

The second connection plays another proxy: what it does in a transaction of its own, it holds until its end.
"""

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from oncegate.store.postgres.migrations.partitions import missing_partitions
from oncegate.store.postgres.migrations.run import Run, Target, connect
from oncegate.store.postgres.store import hmac_pads
from oncegate.store.postgres.verb import Row, Verb
from oncegate.store.record import Claim
from oncegate.store.store import PostgresOptions
from tests.postgres_server import shared_url
from tests.stores import FOREIGN, connected

NUMBERS = itertools.count()
# A deadline that is never over.
NEVER = 1 << 60


class Schema(NamedTuple):
    """A schema of its own. `other`: a connection to it that is not the store's."""

    url: str
    name: str
    other: Any

    def connected(self, **options: Any) -> Any:
        """Return a store that is up inside the block."""
        return connected(self.url, durability="fsync", postgres=PostgresOptions(schema=self.name), **options)

    async def run(self, verb: Verb, *calls: Row) -> list[Any]:
        """Run a verb on the other connection."""
        return list(await self.other.fetch(verb.statement, calls, FOREIGN[:10], True, hmac_pads(b"")))


@asynccontextmanager
async def fresh_schema(url: str = "") -> AsyncIterator[Schema]:
    """A new schema, in the database of the whole test run or in that of a URL."""
    target = Target(url or shared_url(), f"core_{os.getpid()}_{next(NUMBERS)}")
    other = await connect(target)
    await other.execute("SET synchronous_commit = off")
    run = Run(other, target)
    await run.migrate()
    await run.execute_each(missing_partitions(1))
    try:
        yield Schema(target.url, target.schema, other)
    finally:
        await other.execute(f"DROP SCHEMA {target.schema} CASCADE")
        await other.close()


@asynccontextmanager
async def held(schema: Schema, verb: Verb, *calls: Row, commits: bool = True) -> AsyncIterator[list[Any]]:
    """What the other connection does inside a transaction that goes on until the end of the block."""
    transaction = schema.other.transaction()
    await transaction.start()
    yield await schema.run(verb, *calls)
    await (transaction.commit if commits else transaction.rollback)()


async def lapse(schema: Schema) -> None:
    await schema.other.execute("UPDATE record SET lease = now_ms() - 1")


def foreign(claim: Claim) -> Claim:
    """Return the claim that another proxy makes of the same key."""
    unowned = replace(claim, token=FOREIGN)
    return replace(unowned, self_check=claim.self_check[:16] + bytes(16))
