"""The index of open keys in Redis, as `Entries`: the sets that one server has."""

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from oncegate.store.open_keys.index import Entry, Records
from oncegate.store.open_keys.places import FIRST, Place
from oncegate.store.open_keys.scores import score_of_record
from oncegate.store.record_name import store_key
from oncegate.store.record_view import RecordView
from oncegate.store.redis.layouts.open_index import INDEX, SHARD_NAMES, entry_of, read_member
from oncegate.store.redis.node import Node
from oncegate.store.redis.topologies.topology import StoreServers
from oncegate.store.redis.views.reading import ask, checked, is_error, read_page, time_ms

# For each server: empty once every open record that was there before the index has an entry, until then _BEGUN.
COMPLETE, _BEGUN = b"once:open:complete", b"begun"
# Changes entries that are still as they were read: a claim writes another score. ARGV: for each its member, the score
# that it had, and the one that it gets, or '' if it goes.
CHANGE = b"""
for at = 1, #ARGV, 3 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[at])
  if score and tonumber(score) == tonumber(ARGV[at + 1]) then
    if ARGV[at + 2] == '' then
      redis.call('ZREM', KEYS[1], ARGV[at])
    else
      redis.call('ZADD', KEYS[1], ARGV[at + 2], ARGV[at])
    end
  end
end
"""


class RedisEntries:
    """The entries on one server. See `Entries`."""

    def __init__(self, node: Node, servers: StoreServers) -> None:
        self._node, self._servers = node, servers

    @property
    def _names(self) -> list[bytes]:
        if not self._node.tag:
            return [INDEX]
        return [name for name in SHARD_NAMES if self._servers.node_of(name) is self._node]

    async def is_complete(self) -> bool:
        node = self._node
        # A write that changes nothing: a user made for an older version may lack the right.
        writes = [ask(node, "ZADD", name, "XX", "0", "-") for name in self._names[:1]]
        found, *replies = await asyncio.gather(ask(node, "GET", COMPLETE + node.tag), *writes)
        may_write = not any(is_error(reply, "NOPERM") for reply in replies)
        if not may_write and checked(found) == b"":
            # What was claimed since has no entry.
            checked(await ask(node, "SET", COMPLETE + node.tag, _BEGUN))
        return may_write and checked(found) == b""

    async def begin(self) -> None:
        checked(await ask(self._node, "SET", COMPLETE + self._node.tag, _BEGUN, "NX"))

    async def note_complete(self) -> None:
        checked(await ask(self._node, "SET", COMPLETE + self._node.tag, "", "XX"))

    async def now_ms(self) -> int:
        return await time_ms(self._node)

    async def first(self, ranges: Sequence[tuple[int, int]], limit: int, place: Place) -> list[Entry]:
        asked = [self._first(name, one, limit, place) for name in self._names for one in ranges]
        found = await asyncio.gather(*asked)
        return heapq.nsmallest(limit, (one for some in found for one in some), key=lambda entry: entry.place)

    async def _first(self, name: bytes, scores: tuple[int, int], limit: int, place: Place) -> list[Entry]:
        found: list[Entry] = []
        offset = 0
        while len(found) < limit:
            words = ("ZRANGEBYSCORE", name, *scores, "WITHSCORES", "LIMIT", offset, limit)
            reply = checked(await ask(self._node, *words))
            # Those of one millisecond come in the order of their members.
            found += [entry for entry in read_entries(name, reply) if entry.place > place]
            offset += limit
            if len(reply) < 2 * limit:
                break
        return found[:limit]

    async def count(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int | None]]:
        asked = [[(name, least, most) for name in self._names] for least, most in ranges]
        return [await self._count(parts) for parts in asked]

    async def _count(self, parts: Sequence[tuple[bytes, int, int]]) -> tuple[int, int | None]:
        counts = await asyncio.gather(*[ask(self._node, "ZCOUNT", *part) for part in parts])
        oldest = await asyncio.gather(*[self._first(part[0], part[1:], 1, FIRST) for part in parts])
        least = min((entry.score for entries in oldest for entry in entries), default=None)
        return sum(checked(reply) for reply in counts), least

    async def records(self, entries: Iterable[Entry]) -> Records:
        keys: defaultdict[Node, set[bytes]] = defaultdict(set)
        for entry in entries:
            if (node := self._servers.node_of(store_key(entry.key))) is not None:
                keys[node].add(entry.key)
        pages = await asyncio.gather(*[read_page(node, its, its) for node, its in keys.items()])
        return {key: record for page in pages for key, record in page.items()}

    async def change(self, changes: Sequence[tuple[Entry, int | None]]) -> None:
        words: defaultdict[bytes, list[bytes | str | int]] = defaultdict(list)
        for entry, score in changes:
            words[entry.part] += [store_key(entry.key) + entry.token, entry.score, "" if score is None else score]
        for name, its in words.items():
            checked(await ask(self._node, "EVAL", CHANGE, 1, name, *its))

    async def enter(self, records: Collection[RecordView]) -> None:
        is_sharded = bool(self._node.tag)
        for record in records:
            name, member = entry_of(store_key(record.key), record.token, is_sharded=is_sharded)
            node, score = self._servers.node_of(name), score_of_record(record)
            if node is not None and score is not None:
                reply = await ask(node, "ZADD", name, "NX", score, member)
                # A user without the right: `is_complete` says so, also after `note_complete`.
                if not is_error(reply, "NOPERM"):
                    checked(reply)


def read_entries(name: bytes, reply: list[bytes]) -> list[Entry]:
    """Return the entries in a reply with scores. What is none is left out."""
    found = [(*read_member(member), int(float(score))) for member, score in zip(reply[::2], reply[1::2], strict=True)]
    return [Entry(score, key, token, name) for key, token, score in found if key is not None]
