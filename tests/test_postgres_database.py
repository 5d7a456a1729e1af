"""Each test that asks for a database gets one as it is after the migration, and is alone in it."""

import asyncpg
import pytest

from tests.postgres_database import Database

# The second one sees what the first one left: one process runs both.
pytestmark = pytest.mark.xdist_group("database")


@pytest.mark.parametrize("again", [False, True])
async def test_a_database_is_as_new(database: Database, again: bool) -> None:
    """What a test before wrote is gone, also by a connection that it left behind in a transaction."""
    connection = database.connection
    assert connection.value("SELECT count(*) FROM record") == 0
    assert connection.value("SELECT count(*) FROM schema_version") > 0
    if again:
        return
    connection.execute("INSERT INTO record (key, state) VALUES ('k', 1); DELETE FROM schema_version")
    left = await asyncpg.connect(database.url, server_settings={"search_path": database.schema})
    await left.execute("BEGIN; INSERT INTO record (key, state) VALUES ('l', 1)")
    database.empty()
    with pytest.raises(asyncpg.PostgresError):
        await left.fetch("SELECT 1")
