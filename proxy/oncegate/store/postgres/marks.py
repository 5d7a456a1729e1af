"""Marks in a table that is not logged: a crash empties it, and a standby has none of it."""

from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.records import fetch
from oncegate.store.postgres.servers import Servers
from oncegate.store.record_view import StoreError

TIMEOUT_S = 1.0
_PUT = """
INSERT INTO mark (name, value, expires) VALUES ($1, $2, now_ms() + $3)
ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires = excluded.expires
"""
_GET = "SELECT value FROM mark WHERE name = $1 AND expires > now_ms()"


class PostgresMarks:
    """The marks of a store. See `Marks`."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    async def put(self, name: bytes, value: bytes, lasts_ms: int) -> None:
        await self._ask(_PUT, name, value, lasts_ms)

    async def exists(self, name: bytes) -> bool | None:
        values = await self._ask(_GET, name)
        return None if values is None else bool(values)

    async def get(self, name: bytes) -> bytes:
        values = await self._ask(_GET, name)
        return values[0] if values else b""

    async def _ask(self, statement: str, *args: object) -> list[bytes] | None:
        try:
            rows = await fetch(self._servers, Level.OFF, statement, *args, timeout_s=TIMEOUT_S)
        except StoreError:
            return None
        return [row["value"] for row in rows]
