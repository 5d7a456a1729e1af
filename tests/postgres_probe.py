"""A store in PostgreSQL as tests see it: see `Probe`."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from oncegate.store.postgres import rows
from oncegate.store.postgres.rows import MODE_OF, STAGES
from oncegate.store.record import Claim, Record, self_check
from oncegate.store.results import ClaimResult
from tests.postgres_database import Database
from tests.probes import Fields, Probe

STATES = {1: b"in_flight", 2: b"unknown", 3: b"complete", 4: b"released", 5: b"expired"}
ACTOR = b"the probe"
STAGE_OF = {number: stage.wire for stage, number in STAGES.items()}


# What a column holds, by the field's name and its value.
NUMBERS = ("fence", "lease", "created", "lease_ms", "bytes", "status")
# Of rows that say more than a missing one. What an operator released says so to its owner.
STANDS = "(state = 4 AND token <> '' OR NOT is_free(state, created, lease, lease_ms, frees, now_ms()))"
LEFT_MS = "frees + CASE state WHEN 1 THEN greatest(lease - lease_ms - created, 0) ELSE 0 END - now_ms()"
READING = "reading_name_2($1, $2)"


class PostgresProbe(Probe):
    renewals_write_expiry = False

    def __init__(self, database: Database) -> None:
        self.url, self._connection = database.url, database.connection
        # Nothing that a test writes has to be on a disk.
        self._connection.execute("SET synchronous_commit = off")

    def sql(self, statement: str, *args: object) -> list[Any]:
        """Return the rows of a statement."""
        return self._connection.fetch(statement, *args)

    def everything(self) -> str:
        tables = self.sql("SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema()")
        # A bytea is written in hexadecimal digits.
        return "".join(row[0] for table in tables for row in self.sql(f"SELECT one::text FROM {table[0]} AS one"))

    def now_ms(self) -> int:
        return int(self._connection.value("SELECT now_ms()"))

    def fields(self, key: bytes) -> Fields:
        rows = self.sql(f"SELECT * FROM record WHERE key = $1 AND {STANDS}", key)
        if not rows:
            return {}
        row = rows[0]
        # What was appended before the outcome was unknown lies there until its day is dropped, and does not count.
        query = "SELECT index, bytes FROM chunk WHERE key = $1 AND token = $2"
        chunks = self.sql(query, key, row["token"]) if row["chunks"] else []
        body = {f"b{chunk['index']}": chunk["bytes"] for chunk in chunks if chunk["index"] >= 0}
        if row["body"] is not None:
            body["b0"] = row["body"]
        state = STATES.get(row["state"], b"%d" % row["state"])
        if state == b"complete":
            until = {"until": b"%d" % row["expires"]} if row["expires"] < row["frees"] else {}
            return {"meta": row["meta"], **until, **body}
        if state == b"expired":
            return {"state": state, **{name: row[name] for name in ("token", "fingerprint")}}
        if state == b"released":
            return {"state": state, "token": row["token"], "fence": b"%d" % row["fence"]}
        found = {
            "state": state,
            "token": row["token"],
            "fence": b"%d" % row["fence"],
            "mode": MODE_OF.get(row["mode"], b"%d" % row["mode"]),
            "fingerprint": row["fingerprint"],
            "self": row["tenant"] + row["self"],
            "lease": b"%d" % row["lease"],
            "created": b"%d" % row["created"],
        }
        if state == b"in_flight":
            found["lease_ms"] = b"%d" % row["lease_ms"]
            heads = [chunk["bytes"] for chunk in chunks if chunk["index"] < 0]
            marks = self.sql(f"SELECT expires FROM mark WHERE name = {READING}", key, row["token"])
            found |= dict(zip(("head",), heads, strict=False))
            found |= dict(zip(("readers_until",), [b"%d" % one["expires"] for one in marks], strict=False))
        if row["stage"]:
            found["stage"] = STAGE_OF.get(row["stage"], b"%d" % row["stage"])
        if row["why"] is not None:
            found["why"] = row["why"]
        if row["kept"] is not None:
            found["more"] = row["kept"]
        if row["status"]:
            found["status"] = b"%d" % row["status"]
        if body:
            found["bytes"] = b"%d" % row["bytes"]
        return found | body

    def change(self, key: bytes, /, **values: bytes | int | None) -> None:
        for field, value in values.items():
            if field == "head" or re.fullmatch(r"b\d+", field):
                self._change_chunk(key, -1 if field == "head" else int(field[1:]), value)
                continue
            if field == "readers_until":
                self._change_readers(key, value)
                continue
            for column, cell in self._cells(field, value):
                self.sql(f"UPDATE record SET {column} = $2 WHERE key = $1", key, cell)

    def _cells(self, field: str, value: bytes | int | None) -> Iterator[tuple[str, object]]:
        if field == "until":
            yield "expires", value
        elif isinstance(value, int):
            yield field, value
        elif field == "self":
            whole = bytes(value or b"")
            yield "tenant", whole[:16]
            yield "self", whole[16:]
        elif field in NUMBERS:
            yield field, int(value or 0)
        elif field == "state":
            yield field, next((number for number, state in STATES.items() if state == value), 9)
        elif field == "mode":
            yield field, next((number for number, mode in MODE_OF.items() if mode == value), 9)
        elif field == "more":
            yield "kept", value
        elif field == "meta":
            yield field, value
            # A window counts from the column.
            if value and value[33:49].isdigit():
                yield "created", int(value[33:49])
        else:
            yield field, value if value is not None or field in ("why", "meta") else b""

    def _change_chunk(self, key: bytes, index: int, value: bytes | int | None) -> None:
        if index == 0:
            self.sql("UPDATE record SET body = $2 WHERE key = $1 AND body IS NOT NULL", key, value)
        if value is None:
            self.sql("DELETE FROM chunk WHERE key = $1 AND index = $2", key, index)
        else:
            self.sql("UPDATE chunk SET bytes = $3 WHERE key = $1 AND index = $2", key, index, value)

    def _change_readers(self, key: bytes, value: bytes | int | None) -> None:
        (token,) = self.sql("SELECT token FROM record WHERE key = $1", key)[0]
        self.sql(f"DELETE FROM mark WHERE name = {READING}", key, token)
        if value is not None:
            self.sql(f"INSERT INTO mark VALUES ({READING}, '', $3)", key, token, value)

    def damages(self, field: str, value: bytes) -> Iterable[bytes | int | None]:
        if field in (*NUMBERS, "readers_until"):
            # One is an int, the others are bigints.
            bits = 30 if field == "lease_ms" else 62
            yield from (0, 1, -1, 1 << bits, -1 << bits)
        elif field in ("state", "mode"):
            # Not 4: it is a state that leaves the key free, and no check covers it.
            yield from (0, 3, 6, 9, -1) if field == "state" else (0, 4, 9)
        else:
            # Each comparison is one of the server's: a few places are as good as all of them.
            yield from (value[:-1], b"")
            for place in (0, len(value) // 2, len(value) - 1):
                yield value[:place] + bytes([value[place] ^ 0x80]) + value[place + 1 :]

    def remove(self, key: bytes) -> None:
        self.sql("WITH gone AS (DELETE FROM record WHERE key = $1) DELETE FROM chunk WHERE key = $1", key)

    def left_ms(self, key: bytes) -> int:
        rows = self.sql(f"SELECT {LEFT_MS} AS left_ms FROM record WHERE key = $1 AND state <> 4", key)
        return int(rows[0]["left_ms"]) if rows else -2

    def expire(self, key: bytes, left_ms: int) -> None:
        by_ms = left_ms - self.left_ms(key)
        self.sql("UPDATE record SET frees = frees + $2, expires = expires + $2 WHERE key = $1", key, by_ms)

    def copy(self, key: bytes, other: bytes) -> None:
        columns = [row[0] for row in self.sql(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'record'::regclass AND attnum > 0 AND attname <> 'key'"
        )]  # fmt: skip
        listed = ", ".join(columns)
        self.sql(f"INSERT INTO record (key, {listed}) SELECT $2, {listed} FROM record WHERE key = $1", key, other)

    def keys(self) -> list[bytes]:
        return [row["key"] for row in self.sql(f"SELECT key FROM record WHERE {STANDS}")]

    def marks(self) -> dict[bytes, int]:
        return {row[0]: row[1] for row in self.sql("SELECT name, expires - now_ms() FROM mark")}

    def remove_mark(self, name: bytes) -> None:
        self.sql("DELETE FROM mark WHERE name = $1", name)

    def index(self, key: bytes, score: int) -> None:
        self.sql("DELETE FROM open_key WHERE key = $1", key)
        self.sql("INSERT INTO open_key (key, score) VALUES ($1, $2)", key, score)

    def entries(self) -> dict[bytes, list[int]]:
        rows = self.sql("SELECT key, array_agg(score) AS scores FROM open_key GROUP BY key")
        return {row["key"]: row["scores"] for row in rows}

    def scan_left_ms(self) -> int:
        return int(self._connection.value("SELECT until - now_ms() FROM lease WHERE name = 'scan'"))

    def end_scan(self) -> None:
        self.sql("UPDATE lease SET until = 0 WHERE name = 'scan'")

    def claim(
        self, key: bytes, tenant: bytes, token: bytes, *, fingerprint: bytes, mode: bytes, lease_ms: int,
        retention_ms: int, not_after_ms: int, window_ms: int, seen: bytes,
    ) -> ClaimResult:  # fmt: skip
        described = self_check(key, tenant, token, mode, fingerprint)
        claim = Claim(key, token, b"", mode, fingerprint, described, 0, lease_ms, retention_ms, retention_ms)
        if len(seen) > len(token):
            row = rows.claim_row(claim, not_after_ms, seen, window_ms)
            result = rows.claim_result(claim, tenant, self.call(rows.TAKE, row))
            if isinstance(result, rows.Takeable) and result.token != token:
                return rows.LATE
        else:
            result = rows.claim_result(claim, tenant, self.call(rows.CLAIM, rows.claim_row(claim, not_after_ms)))
        if isinstance(result, rows.Takeable):
            seen = result.token
        elif not (seen and isinstance(result, Record)) or len(seen) > len(token):
            return result
        # As the proxy does: a record is taken in a second step.
        row = rows.claim_row(claim, not_after_ms, seen, window_ms)
        result = rows.claim_result(claim, tenant, self.call(rows.TAKE, row))
        return rows.LATE if isinstance(result, rows.Takeable) else result

    def save(self, key: bytes) -> object:
        return [
            (table, row["saved"])
            for table in ("record", "chunk")
            for row in self.sql(f"SELECT one::text AS saved FROM {table} one WHERE key = $1", key)
        ]

    def restore(self, key: bytes, saved: object) -> None:
        assert isinstance(saved, list)
        for table, row in saved:
            self.sql(f"INSERT INTO {table} SELECT (saved).* FROM (SELECT $1::text::oncegate.{table} AS saved) one", row)

    def call(self, verb: rows.Verb, row: rows.Row) -> Any:
        """Return the row of the result of a verb for one key."""
        return self.sql(verb.statement, [row], ACTOR, True, b"")[0]
