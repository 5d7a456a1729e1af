"""The store of a test run, of each kind, as tests of whole proxies see it."""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from tests.own_postgres import STATES
from tests.postgres_database import Database
from tests.postgres_relay import PostgresRelay
from tests.resp import Relay, started


class SharedStore(Protocol):
    """A store that is empty at first, and that other processes of the run use as well."""

    url: str

    def states(self) -> list[bytes]:
        """Return the state of every record whose key is not free."""

    def relaying(self) -> AbstractAsyncContextManager[Relay]:
        """Put a relay in front of it."""


class SharedPostgres:
    def __init__(self, database: Database) -> None:
        self.url, self._connection = database.url, database.connection

    def states(self) -> list[bytes]:
        rows = self._connection.fetch("SELECT state FROM record WHERE state < 4")
        return sorted(STATES[row["state"]] for row in rows)

    def relaying(self) -> AbstractAsyncContextManager[Relay]:
        return started(PostgresRelay(self.url))
