"""Marks, and notes to replicas, in a table that is not logged: a crash empties it, and a standby has none of it."""

from collections.abc import Callable, Sequence

from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.records import fetch
from oncegate.store.postgres.servers import Servers
from oncegate.store.record_view import StoreError

TIMEOUT_S = 1.0
_PUT = """
INSERT INTO mark (name, value, expires) VALUES ($1, $2, now_ms() + $3)
ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires = excluded.expires
"""
# A note is its own name: one that is posted again is the same. $2: those that the last reply had, which are removed.
_POST = """
INSERT INTO mark (name, value, expires) VALUES ($1::bytea || $2, $2, now_ms() + $3)
ON CONFLICT (name) DO UPDATE SET expires = excluded.expires
"""
_COLLECT = """
WITH gone AS (DELETE FROM mark WHERE name = ANY($2::bytea[]))
SELECT value FROM mark
WHERE name > $1 AND name < $1 || '\\xff' AND name <> ALL($2::bytea[]) AND expires > now_ms() ORDER BY name LIMIT 100
"""
# Before the prefix of the replica that a note is for.
_BOX, NOTE_MS = b"note:", 60_000
_GET = "SELECT value FROM mark WHERE name = $1 AND expires > now_ms()"
_GET_ALL = "SELECT name, value FROM mark WHERE name = ANY($1::bytea[]) AND expires > now_ms()"
# An empty value stands for no mark. One that is to be none has expired by then: a DELETE between would let two win.
_TAKE = """
INSERT INTO mark AS m (name, value, expires) VALUES ($1, $2, now_ms() + $3)
ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires = excluded.expires
WHERE m.value = '' OR m.expires <= now_ms() RETURNING value
"""
_CHANGE = """
UPDATE mark SET value = $2, expires = now_ms() + $3
WHERE name = $1 AND value = $4 AND expires > now_ms() RETURNING value
"""


class PostgresMarks:
    """The marks of a store, see `Marks`, and the notes that its replicas leave for each other, see `Store`."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        # The names of the notes that were collected last.
        self._collected: list[bytes] = []

    async def put(self, name: bytes, value: bytes, lasts_ms: int) -> None:
        await self._ask(_PUT, name, value, lasts_ms)

    async def exists(self, name: bytes) -> bool | None:
        values = await self._ask(_GET, name)
        return None if values is None else bool(values)

    async def get(self, name: bytes) -> bytes:
        values = await self._ask(_GET, name)
        return values[0] if values else b""

    async def get_all(self, names: Sequence[bytes]) -> list[bytes]:
        try:
            rows = await fetch(self._servers, Level.OFF, _GET_ALL, list(names), timeout_s=TIMEOUT_S)
        except StoreError:
            return [b""] * len(names)
        values: dict[bytes, bytes] = {row["name"]: row["value"] for row in rows}
        return [values.get(name, b"") for name in names]

    async def swap(self, name: bytes, before: bytes, after: bytes, lasts_ms: int) -> bool | None:
        written = name, after, lasts_ms if after else 0
        done = await (self._ask(_CHANGE, *written, before) if before else self._ask(_TAKE, *written))
        return None if done is None else bool(done)

    async def post(self, prefix: bytes, note: bytes) -> bool:
        return await self._ask(_POST, _BOX + prefix, note, NOTE_MS) is not None

    async def collect(self, prefix: bytes) -> list[bytes]:
        # A note is removed once its reply has come: a reply that is lost loses none.
        notes = await self._ask(_COLLECT, _BOX + prefix, self._collected)
        if notes is not None:
            self._collected = [_BOX + prefix + note for note in notes]
        return notes or []

    async def _ask(self, statement: str, *args: object) -> list[bytes] | None:
        try:
            rows = await fetch(self._servers, Level.OFF, statement, *args, timeout_s=TIMEOUT_S)
        except StoreError:
            return None
        return [row["value"] for row in rows]


class NoWakes:
    """The `Wakes` of a store that tells nothing: its readers poll, and so do owners."""

    tells_of_mail = False

    def watch(self, _key: bytes, _wake: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def is_live(self, _key: bytes) -> bool:
        return False

    def watch_mail(self, _wake: Callable[[], None]) -> None:
        """Never call it."""
