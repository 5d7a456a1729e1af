"""What tests of the PostgreSQL store share: migrated schemas, roles, and servers of a store that are closed again."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from oncegate.store.postgres.migrations.grants import grants
from oncegate.store.postgres.migrations.run import Target, connect
from oncegate.store.postgres.servers import Servers, ServersConfig
from tests.postgres_database import migrated

DEADLINE_S = 20.0
_NUMBERS = itertools.count()


def new_name(what: str) -> str:
    """Return a name that no other test has, also in another process."""
    return f"{what}_{os.getpid()}_{next(_NUMBERS)}"


async def migrate(url: str, schema: str, role: str = "") -> None:
    """Make the tables of the store in a schema, and give a role its rights on them."""
    await migrated(url, schema)
    if role:
        connection = await connect(Target(url, schema))
        await connection.execute(await connection.fetchval(grants(role)))
        await connection.close()


def new_schema(url: str, schema: str = "") -> str:
    """Return the name of a schema with the tables of the store. Not for use inside a loop."""
    schema = schema or new_name("schema")
    asyncio.run(migrate(url, schema))
    return schema


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)
    assert condition(), what


@asynccontextmanager
async def opened(url: str, schema: str, durability: str = "fsync", **options: Any) -> AsyncIterator[Servers]:
    """Open the servers of a store. `is_up=False`: do not wait until they are connected."""
    is_up = options.pop("is_up", True)
    config = {"timeout_s": 5.0, **options}
    servers = Servers(ServersConfig(url=url, schema=schema, durability=durability, **config))
    servers.start()
    try:
        if is_up:
            deadline = asyncio.get_running_loop().time() + DEADLINE_S
            assert await servers.wait_up(deadline), servers.not_ready_reason()
        yield servers
    finally:
        await servers.close()
