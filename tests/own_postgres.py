"""A PostgreSQL with the store's tables that one test has to itself, as it has a Valkey (`tests.conftest.Valkey`)."""

import asyncio
import subprocess

from loadtest.postgres_server import Server
from tests.postgres_database import migrated

STATES = {1: b"in_flight", 2: b"unknown", 3: b"complete"}


class OwnPostgres(Server):
    """A server that the test may pause or kill; its files are a copy of those of `template`, which is stopped."""

    survives_a_kill = True

    def __init__(self, template: Server) -> None:
        super().__init__()
        subprocess.run(["cp", "-a", template.data, self.data], check=True)
        self.start()

    def states(self) -> list[bytes]:
        """Return the state of every record whose key is not free."""
        rows = self._in_schema("SELECT state FROM record WHERE state < 4").split()
        return sorted(STATES[int(row)] for row in rows)

    def has_body(self) -> bool:
        """Return whether a part of a response's body is there."""
        return self._in_schema("SELECT EXISTS (SELECT FROM record WHERE chunks > 0)") == "t"

    def forget(self) -> None:
        """Lose every record."""
        self._in_schema("TRUNCATE record")

    def _in_schema(self, statement: str) -> str:
        return self.sql(f"SET search_path = oncegate; {statement}")


def stopped_template() -> Server:
    """Return a server whose files can be copied: it was migrated, and stopped in order."""
    server = Server.started()
    asyncio.run(migrated(server.url, "oncegate"))
    server.stop()
    return server
