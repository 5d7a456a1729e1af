"""Plain commands beside the scripts: records as operators see them, and marks.

A scan goes through a server page by page, so that it does not hold up requests.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

from oncegate.store import membership
from oncegate.store.open_keys.listing import scanned_open_counts, scanned_open_keys
from oncegate.store.record import Corrupt, ViewState
from oncegate.store.record_name import parse_record_id, store_key
from oncegate.store.record_view import (
    FIELDS,
    UNDECIDED,
    OpenCounts,
    OpenKind,
    OpenPage,
    RecordView,
    StoreError,
    read_fields,
)
from oncegate.store.redis.layouts.packed import hash_fields, numbered
from oncegate.store.redis.membership import (
    EPOCH,
    IDENTITIES,
    MEMBERS,
    OLDER,
    PACKED,
    proxy_record_key,
    proxy_record_value,
)
from oncegate.store.redis.node import Node
from oncegate.store.redis.topologies.topology import StoreServers
from oncegate.store.redis.wire import ErrorReply
from oncegate.store.results import Unconfirmed

# For one reply.
TIMEOUT_S, MARK_TIMEOUT_S = 5.0, 1.0
# Keys that a server looks through before it serves others.
PAGE = 500
# The mark of a scan that one of the replicas does.
SCAN_KEY = b"once:scan"


def checked(reply: Any) -> Any:
    """Return a reply. Raises StoreError for an error, and where no reply came."""
    if isinstance(reply, Unconfirmed | ErrorReply):
        raise StoreError(reply.reason if isinstance(reply, Unconfirmed) else str(reply))
    return reply


def ask(node: Node, *words: bytes | str | int) -> Awaitable[Any]:
    """Return the reply to a plain command."""
    return node.link.command(*words, deadline=asyncio.get_running_loop().time() + TIMEOUT_S)


def ask_importing(node: Node, *words: bytes | str | int) -> Awaitable[Any]:
    """Return the reply of a cluster node that is importing the key's slot."""
    ask(node, "ASKING")
    return ask(node, *words)


def is_error(reply: object, kind: str) -> bool:
    """Return whether a reply is an error whose text begins with `kind`."""
    return isinstance(reply, ErrorReply) and str(reply).startswith(kind)


async def _read(node: Node, key: bytes, ask_at: Callable[..., Awaitable[Any]] = ask, packed: bool = True) -> Any:
    """Return the value of a packed record, the fields of any other, or an error. `packed`: which it probably is."""
    name = store_key(key)
    commands: list[tuple[bytes | str, ...]] = [("GET", name), ("HMGET", name, *FIELDS)]
    reply = await ask_at(node, *commands[not packed])
    return await ask_at(node, *commands[packed]) if is_error(reply, "WRONGTYPE") else reply


def _view(key: bytes, reply: Any, now_ms: int) -> RecordView | None:
    """Return the record that `_read` has read, None for no record. Raises StoreError."""
    if is_error(reply, "WRONGTYPE"):
        return RecordView(key, ViewState.CORRUPT, b"", now_ms)
    found = checked(reply)
    if found is None:
        return None
    if isinstance(found, bytes):
        fields = hash_fields(key, found)
        if isinstance(fields, Corrupt):
            return RecordView(key, ViewState.CORRUPT, found[1:17], now_ms)
        record = read_fields(key, [fields.get(name) for name in FIELDS], now_ms)
        return record and record._replace(packed=True)
    if found[-1] is not None:
        with suppress(ValueError):
            in_more = numbered(found[-1])
            found = [value or in_more.get(name) for name, value in zip(FIELDS, found, strict=True)]
    return read_fields(key, found, now_ms)


async def _time_ms(node: Node) -> int:
    seconds, micros = checked(await ask(node, "TIME"))
    return int(seconds) * 1000 + int(micros) // 1000


async def _left_ms(node: Node, key: bytes) -> int:
    """Return how long a record is kept, -1 where the key was moved to another server since. Raises StoreError."""
    reply = await ask(node, "PTTL", store_key(key))
    if is_error(reply, "MOVED"):
        reply = await ask_importing(node, "PTTL", store_key(key))
    return -1 if is_error(reply, "MOVED") or is_error(reply, "ASK ") else int(checked(reply))


class RedisRecords:
    """The records on the servers of a store, as `Records`."""

    def __init__(self, servers: StoreServers) -> None:
        self._servers = servers

    @property
    def servers(self) -> list["NodeRecords"]:
        return [NodeRecords(node) for node in self._servers.nodes]

    async def read(self, key: bytes) -> RecordView | None:
        node = self._servers.node_of(store_key(key))
        if node is None:
            raise StoreError("nobody is known to have this key")
        reply = await _read(node, key)
        if is_error(reply, "ASK "):
            # Its slot is being moved, and the key is at the new server already.
            address = str(reply).split(" ")[2]
            node = next((one for one in self._servers.nodes if one.name == address), node)
            reply = await _read(node, key, ask_importing)
        record = _view(key, reply, await _time_ms(node))
        if record is None or record.response is not None:
            return record
        # The store's user may lack the right: then nobody knows how long the record is kept.
        with suppress(StoreError):
            return record._replace(left_ms=await _left_ms(node, key))
        return record

    async def scan(self, prefix: str = "") -> AsyncIterator[RecordView]:
        for server in self.servers:
            async for record in server.scan(prefix):
                yield record

    async def proxy_of(self, token: bytes) -> tuple[str, int | None]:
        for node in self._servers.nodes:
            name = proxy_record_key(token) + node.tag
            if (value := checked(await ask(node, "GET", name))) is not None:
                _, retention_ms, proxy_name = value.split(b" ", 2)
                left_ms = checked(await ask(node, "PTTL", name))
                return proxy_name.decode("utf-8", "replace"), max(0, int(retention_ms) - left_ms)
        return "unknown", None

    async def introduce(self, token: bytes, name: str, retention_ms: int) -> None:
        for node in self._servers.nodes:
            value = proxy_record_value(0, retention_ms, name)
            await ask(node, "SET", proxy_record_key(token) + node.tag, value, "PX", retention_ms)

    async def identities(self) -> list[str]:
        replies = [checked(await ask(node, "HVALS", IDENTITIES + node.tag)) for node in self._servers.nodes]
        return [value.split(b" ", 1)[1].decode() for reply in replies for value in reply]

    async def unpack(self) -> int:
        nodes, unpacked = self._servers.nodes, 0
        for node in nodes:
            await _wait_until_nobody_packs(node)
        # A slot may move from server to server meanwhile: the last pass finds nothing at any of them.
        while found := sum([await _unpack_all(node) for node in nodes]):
            unpacked += found
        for node in nodes:
            checked(await ask(node, "HDEL", MEMBERS + node.tag, "new"))
            checked(await ask(node, "HSET", MEMBERS + node.tag, "older", await _time_ms(node)))
            checked(await ask(node, "UNLINK", OLDER + node.tag))
        return unpacked

    async def begin_quarantine(self, lasts_ms: int) -> None:
        for node in self._servers.nodes:
            # A store without an epoch is in quarantine as soon as a proxy founds it.
            checked(await ask(node, "HSET", EPOCH + node.tag, "until", await _time_ms(node) + lasts_ms))


# Packed records, for older versions ...

# Writes a packed record as a hash, if it is still the one that was read. HSET is allowed at the memory limit behind
# UNLINK.
UNPACK = b"""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
local left = redis.call('PTTL', KEYS[1])
redis.call('UNLINK', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], math.max(left, 1))
return 1
"""


async def _wait_until_nobody_packs(node: Node) -> None:
    """Wait for the last note of a proxy that packs records to be out of date. Raises StoreError if one is live."""
    deadline = asyncio.get_running_loop().time() + 2 * membership.LIVE_S
    while await _is_packing(node):
        if asyncio.get_running_loop().time() > deadline:
            raise StoreError("proxies pack records: set ONCEGATE_RECORD_LAYOUT=hash on each of them first")
        await asyncio.sleep(membership.LIVE_S / 20)


async def _is_packing(node: Node) -> bool:
    """Return whether a proxy that was live a moment ago lets packed records be written."""
    now_ms, entries = await _time_ms(node), checked(await ask(node, "HGETALL", MEMBERS + node.tag))
    notes = dict(zip(entries[::2], entries[1::2], strict=True))
    packing, live_ms = b" %d" % PACKED, membership.LIVE_S * 1000
    return any(name.endswith(packing) and now_ms - int(at_ms) <= live_ms for name, at_ms in notes.items())


async def _unpack_all(node: Node) -> int:
    """Write the packed records of a server as hashes, and return how many there were."""
    unpacked, cursor = 0, b"0"
    while True:
        reply = await ask(node, "SCAN", cursor, "MATCH", "once:{*", "COUNT", PAGE, "TYPE", "string")
        cursor, names = checked(reply)
        keys = {key for name in names if (key := parse_record_id(name.decode("ascii", "replace")))}
        unpacked += sum(await asyncio.gather(*[_unpack(node, key) for key in keys]))
        if cursor == b"0":
            return unpacked


async def _unpack(node: Node, key: bytes) -> int:
    """Write one record as a hash. Return 1 if it was packed, 0 otherwise, also if it is damaged."""
    value = await ask(node, "GET", store_key(key))
    if value is None or is_error(value, "MOVED") or is_error(value, "ASK ") or is_error(value, "WRONGTYPE"):
        return 0
    fields = hash_fields(key, checked(value))
    if isinstance(fields, Corrupt):
        return 0
    words = (word for field in fields.items() for word in field)
    reply = await ask(node, "EVAL", UNPACK, 1, store_key(key), value, *words)
    # It became a hash meanwhile, or was moved.
    return 0 if is_error(reply, "WRONGTYPE") or is_error(reply, "MOVED") else int(checked(reply))


class NodeRecords:
    """The records on one server, as `ServerRecords`."""

    def __init__(self, node: Node) -> None:
        self._node, self.name = node, node.name

    async def reserve_scan(self, lasts_ms: int) -> bool:
        name = SCAN_KEY + self._node.tag
        return checked(await ask(self._node, "SET", name, "", "NX", "PX", lasts_ms)) is not None

    async def scan(self, prefix: str = "", pause_s: float = 0.0) -> AsyncIterator[RecordView]:
        cursor = b"0"
        while True:
            # The same page twice, because nothing else tells a packed record from a hash without an error.
            page = ("SCAN", cursor, "MATCH", f"once:{{{prefix}*", "COUNT", PAGE)
            replies = await asyncio.gather(ask(self._node, *page), ask(self._node, *page, "TYPE", "string"))
            (cursor, names), (_, packed_names) = checked(replies[0]), checked(replies[1])
            packed = {key for name in packed_names if (key := parse_record_id(name.decode("ascii", "replace")))}
            keys = {key for name in names if (key := parse_record_id(name.decode("ascii", "replace")))}
            for record in await self._read_page(list(keys), packed):
                yield record
            if cursor == b"0":
                break
            await asyncio.sleep(pause_s)

    async def open_keys(self, limit: int, after: str = "", kinds: Collection[OpenKind] = UNDECIDED) -> OpenPage:
        return await scanned_open_keys(self, limit, after, kinds)

    async def open_counts(self) -> OpenCounts:
        return await scanned_open_counts(self)

    async def _read_page(self, keys: list[bytes], packed: set[bytes]) -> list[RecordView]:
        node, now_ms = self._node, await _time_ms(self._node)
        replies = await asyncio.gather(*[_read(node, key, packed=key in packed) for key in keys])
        records: list[RecordView] = []
        for key, first in zip(keys, replies, strict=True):
            reply = await _read(node, key, ask_importing) if is_error(first, "MOVED") else first
            if is_error(reply, "MOVED") or is_error(reply, "ASK "):
                # The key was moved to another server since.
                continue
            if record := _view(key, reply, now_ms):
                records.append(record)
        # How long they are kept is asked of unfinished ones alone: most records are complete.
        unfinished = [record for record in records if record.response is None]
        left = await asyncio.gather(*[_left_ms(node, record.key) for record in unfinished])
        timed = [record._replace(left_ms=ms) for record, ms in zip(unfinished, left, strict=True)]
        return [record for record in records if record.response is not None] + timed


class RedisMarks:
    """Marks in the slots of their records, as `Marks`."""

    def __init__(self, servers: StoreServers) -> None:
        self._servers = servers

    async def put(self, name: bytes, value: bytes, lasts_ms: int) -> None:
        await self._ask(name, "SET", name, value, "PX", lasts_ms)

    async def exists(self, name: bytes) -> bool | None:
        # EXISTS, not PTTL: a proxy must not need a right that the store's user can do without.
        found = await self._ask(name, "EXISTS", name)
        return found != 0 if isinstance(found, int) else None

    async def get(self, name: bytes) -> bytes:
        found = await self._ask(name, "GET", name)
        return found if isinstance(found, bytes) else b""

    async def _ask(self, name: bytes, *words: bytes | str | int) -> object:
        """Return the reply to a command about a mark, None where nobody is known to have it."""
        node = self._servers.node_of(name)
        if node is None:
            return None
        reply: object = await node.link.command(*words, deadline=asyncio.get_running_loop().time() + MARK_TIMEOUT_S)
        return reply
