"""Each test that asks for a database gets one as it is after the migration, and is alone in it."""

import os
import subprocess
import sys

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


@pytest.mark.parametrize("words", [("serve",), ("keys", "list")], ids=" ".join)
def test_a_driver_that_is_not_installed(words: tuple[str, ...]) -> None:
    """Each command names the extra that has it."""
    start = "import sys; sys.modules['asyncpg'] = None; from oncegate.__main__ import main; sys.exit(main())"
    settings = {"ONCEGATE_STORE_URL": "postgresql://me@127.0.0.1:1/db", "ONCEGATE_UPSTREAM": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", start, *words], env=os.environ | settings, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (1, 2)
    assert "asyncpg is not installed: pip install 'oncegate[postgres]'" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
