"""The store of `oncegate demo`: the embedded one, or a PostgreSQL that lives as long as the demo."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping

from oncegate.operating.errors import OperatorError
from oncegate.server.embedded_postgres import SUPERUSER, EmbeddedPostgres, EmbeddedPostgresError

EMBEDDED, POSTGRES = "embedded", "postgres"
# Who the proxy connects as.
ROLE = "oncegate"


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bare_environment() -> dict[str, str]:
    """Return the environment without the settings of the shell that runs the demo: they do not apply to it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}


@contextlib.asynccontextmanager
async def store_settings(kind: str) -> AsyncIterator[Mapping[str, str]]:
    """Start the store if it is a PostgreSQL; yield the settings that name it. Raises OperatorError."""
    if kind == EMBEDDED:
        yield {}
        return
    import asyncpg

    with _postgres() as server:
        connection = await asyncpg.connect(server.url)
        # The audit trail is out of reach of a proxy that does not own the tables.
        await connection.execute(f"CREATE ROLE {ROLE} LOGIN")
        await connection.close()
        named = {"ONCEGATE_STORE_URL": server.url.replace(f"//{SUPERUSER}@", f"//{ROLE}@")}
        await _migrate({**bare_environment(), **named, "ONCEGATE_MIGRATE_URL": server.url})
        yield named


@contextlib.contextmanager
def _postgres() -> Iterator[EmbeddedPostgres]:
    try:
        server = EmbeddedPostgres(free_port())
        try:
            print("   PostgreSQL starts in a temporary folder; oncegate migrate makes its tables.", flush=True)
            server.create()
            server.start()
            yield server
        finally:
            server.close()
    except EmbeddedPostgresError as error:
        raise OperatorError(str(error)) from error


async def _migrate(env: Mapping[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "oncegate", "migrate", env=dict(env))
    if await process.wait() != 0:
        raise OperatorError("oncegate migrate failed")
