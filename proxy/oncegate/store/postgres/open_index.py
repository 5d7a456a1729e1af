"""The index of open keys in PostgreSQL, as `Entries`: a narrow table that the functions write with the records."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

from oncegate.store.open_keys.index import Entry, Records
from oncegate.store.open_keys.places import Place
from oncegate.store.open_keys.scores import BAND_MS, score_of_record
from oncegate.store.record_view import RecordView

# Four kinds of open keys: no question has more ranges of scores. This one has no scores.
_RANGES, _NONE = 4, (1, 0)
_WITHIN = " OR ".join(f"score BETWEEN ${2 * at + 1} AND ${2 * at + 2}" for at in range(_RANGES))
_KIND = " ".join(f"WHEN score BETWEEN ${2 * at + 1} AND ${2 * at + 2} THEN {at}" for at in range(_RANGES))
_COUNT = f"""
SELECT n, count(*) AS keys, min(score) AS least FROM (SELECT score, CASE {_KIND} END AS n FROM open_key) o
WHERE n IS NOT NULL GROUP BY n
"""
# The id of a record: see store/record_name.py. It is worked out for few of many keys: it takes longer than their sort.
_ID = "translate(encode(key, 'base64'), '+/', '-_') COLLATE \"C\""
_SINCE, _AFTER, _LIMIT = (f"${2 * _RANGES + at}" for at in (1, 2, 3))
_BEHIND = f"(since > {_SINCE} OR since = {_SINCE} AND {_ID} > {_AFTER})"
_FIRST = f"""
WITH o AS NOT MATERIALIZED (
    SELECT key, score, (score % {BAND_MS} + {BAND_MS}) % {BAND_MS} AS since FROM open_key WHERE {_WITHIN}
)
SELECT key, score FROM o WHERE {_BEHIND} AND since <= coalesce(
    (SELECT since FROM o WHERE {_BEHIND} ORDER BY since OFFSET {_LIMIT} LIMIT 1), {BAND_MS}
) ORDER BY since, {_ID} LIMIT {_LIMIT}
"""
# It waits for no settle that is about to change an entry, and so no settle waits for it in turn. A null removes.
_CHANGE = """
WITH seen AS MATERIALIZED (
    SELECT c.key, c.new, o.ctid FROM unnest($1::bytea[], $2::bigint[], $3::bigint[]) AS c (key, old, new)
    JOIN LATERAL (SELECT ctid FROM open_key WHERE key = c.key AND score = c.old FOR UPDATE SKIP LOCKED) o ON true
), gone AS (
    DELETE FROM open_key o USING seen s WHERE o.ctid = s.ctid RETURNING s.key, s.new
)
INSERT INTO open_key (key, score) SELECT DISTINCT key, new FROM gone
WHERE new IS NOT NULL AND NOT EXISTS (SELECT FROM open_key o WHERE o.key = gone.key AND o.score = gone.new)
"""
_ENTER = """
INSERT INTO open_key (key, score) SELECT * FROM unnest($1::bytea[], $2::bigint[]) AS e (key, score)
WHERE NOT EXISTS (SELECT FROM open_key o WHERE o.key = e.key)
"""
_BEGIN = "INSERT INTO open_complete (place, is_done) VALUES (1, false) ON CONFLICT DO NOTHING"
# Nothing after a crash that came since: then entries were lost as well.
_DONE = "UPDATE open_complete SET is_done = true"
_IS_DONE = "SELECT coalesce(bool_or(is_done), false) AS is_done FROM open_complete"

Fetch = Callable[..., Awaitable[list[Any]]]


class PostgresEntries:
    """The entries of a store. `fetch(statement, *args)` returns rows; `records(keys)` those of records, as views."""

    def __init__(self, fetch: Fetch, records: Callable[[list[bytes]], Awaitable[list[RecordView]]]) -> None:
        self._fetch, self._records = fetch, records

    async def is_complete(self) -> bool:
        return bool((await self._fetch(_IS_DONE))[0]["is_done"])

    async def begin(self) -> None:
        await self._fetch(_BEGIN)

    async def note_complete(self) -> None:
        await self._fetch(_DONE)

    async def now_ms(self) -> int:
        return int((await self._fetch("SELECT now_ms() AS now"))[0]["now"])

    async def first(self, ranges: Sequence[tuple[int, int]], limit: int, place: Place) -> list[Entry]:
        rows = await self._fetch(_FIRST, *_bounds(ranges), *place, limit)
        return [Entry(row["score"], row["key"]) for row in rows]

    async def count(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int | None]]:
        found = {row["n"]: (row["keys"], row["least"]) for row in await self._fetch(_COUNT, *_bounds(ranges))}
        return [found.get(at, (0, None)) for at in range(len(ranges))]

    async def records(self, entries: Iterable[Entry]) -> Records:
        keys = list({entry.key for entry in entries})
        return dict.fromkeys(keys) | {record.key: record for record in await self._records(keys)}

    async def change(self, changes: Sequence[tuple[Entry, int | None]]) -> None:
        if changes:
            columns = zip(*[(entry.key, entry.score, score) for entry, score in changes], strict=True)
            await self._fetch(_CHANGE, *map(list, columns))

    async def enter(self, records: Collection[RecordView]) -> None:
        scores = {record.key: score for record in records if (score := score_of_record(record)) is not None}
        if scores:
            await self._fetch(_ENTER, list(scores), list(scores.values()))


def _bounds(ranges: Sequence[tuple[int, int]]) -> list[int]:
    padded = [*ranges, *[_NONE] * (_RANGES - len(ranges))]
    return [bound for one in padded for bound in one]
