"""Plain commands beside the scripts: records as operators see them, and marks.

A scan goes through a server page by page, so that it does not hold up requests.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from oncegate.store import membership
from oncegate.store.open_keys.index import OpenIndex
from oncegate.store.open_keys.listing import scanned_open_counts, scanned_open_keys
from oncegate.store.open_keys.places import OpenCounts, OpenPage
from oncegate.store.record import Corrupt
from oncegate.store.record_name import parse_record_id, store_key
from oncegate.store.record_view import UNDECIDED, OpenKind, RecordView, StoreError
from oncegate.store.redis.arguments import SWAP_COUNT
from oncegate.store.redis.layouts.packed import hash_fields
from oncegate.store.redis.membership import (
    EPOCH,
    IDENTITIES,
    MEMBERS,
    OLDER,
    PACKED,
    live_proxies,
    proxy_record_key,
    proxy_record_value,
)
from oncegate.store.redis.node import Node
from oncegate.store.redis.replies import is_noscript
from oncegate.store.redis.topologies.topology import StoreServers
from oncegate.store.redis.views.index import RedisEntries
from oncegate.store.redis.views.reading import (
    PAGE,
    ask,
    ask_importing,
    checked,
    due_names,
    is_error,
    left_ms,
    read,
    read_page,
    time_ms,
    view,
)
from oncegate.store.redis.wire import Script, ScriptCall, resp

# For the reply to a command about a mark.
MARK_TIMEOUT_S = 1.0


class RedisRecords:
    """The records on the servers of a store, as `Records`."""

    finds_prefixes = False

    def __init__(self, servers: StoreServers) -> None:
        self._servers = servers

    @property
    def servers(self) -> list["NodeRecords"]:
        return [NodeRecords(node, self._servers) for node in self._servers.nodes]

    async def read(self, key: bytes) -> RecordView | None:
        node = self._servers.node_of(store_key(key))
        if node is None:
            raise StoreError("nobody is known to have this key")
        reply = await read(node, key)
        if is_error(reply, "ASK "):
            # Its slot is being moved, and the key is at the new server already.
            address = str(reply).split(" ")[2]
            node = next((one for one in self._servers.nodes if one.name == address), node)
            reply = await read(node, key, ask_importing)
        record = view(key, reply, await time_ms(node))
        if record is None or record.response is not None:
            return record
        # The store's user may lack the right: then nobody knows how long the record is kept.
        with suppress(StoreError):
            return record._replace(left_ms=await left_ms(node, key))
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

    async def proxies(self) -> list[str]:
        return sorted({name for node in self._servers.nodes for name in live_proxies(*await _members(node))})

    async def unpack(self) -> int:
        nodes, unpacked = self._servers.nodes, 0
        for node in nodes:
            await _wait_until_nobody_packs(node)
        # A slot may move from server to server meanwhile: the last pass finds nothing at any of them.
        while found := sum([await _unpack_all(node) for node in nodes]):
            unpacked += found
        for node in nodes:
            checked(await ask(node, "HDEL", MEMBERS + node.tag, "new"))
            checked(await ask(node, "HSET", MEMBERS + node.tag, "older", await time_ms(node)))
            checked(await ask(node, "UNLINK", OLDER + node.tag))
        return unpacked

    async def begin_quarantine(self, lasts_ms: int) -> None:
        for node in self._servers.nodes:
            # A store without an epoch is in quarantine as soon as a proxy founds it.
            checked(await ask(node, "HSET", EPOCH + node.tag, "until", await time_ms(node) + lasts_ms))


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


async def _members(node: Node) -> tuple[dict[bytes, bytes], int]:
    """Return what proxies say of themselves at a server, and its time in ms."""
    now_ms, entries = await time_ms(node), checked(await ask(node, "HGETALL", MEMBERS + node.tag))
    return dict(zip(entries[::2], entries[1::2], strict=True)), now_ms


async def _is_packing(node: Node) -> bool:
    """Return whether a proxy that was live a moment ago lets packed records be written."""
    notes, now_ms = await _members(node)
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


def _keys(names: Iterable[bytes]) -> set[bytes]:
    """Return the keys of records with these names. What is no record is left out."""
    return {key for name in names if (key := parse_record_id(name.decode("ascii", "replace")))}


class NodeRecords:
    """The records on one server, as `ServerRecords`."""

    # Responses of expired keys are dropped by a scan.
    needs_scans = True

    def __init__(self, node: Node, servers: StoreServers) -> None:
        self._node, self.name = node, node.name
        self.index = OpenIndex(RedisEntries(node, servers))

    async def reserve(self, work: bytes, lasts_ms: int) -> bytes | None:
        noted: bytes | None = checked(await ask(self._node, "SET", self._mark(work), "", "NX", "GET", "PX", lasts_ms))
        return noted

    async def note(self, work: bytes, found: bytes) -> None:
        checked(await ask(self._node, "SET", self._mark(work), found, "XX", "KEEPTTL"))

    def _mark(self, work: bytes) -> bytes:
        return b"once:" + work + self._node.tag

    async def scan(self, prefix: str = "") -> AsyncIterator[RecordView]:
        async for names, packed in self._pages(prefix):
            for record in (await read_page(self._node, _keys(names), _keys(packed))).values():
                if record is not None:
                    yield record

    async def scan_due(self, pause_s: float) -> AsyncIterator[RecordView]:
        async for names, packed in self._pages():
            due = await due_names(self._node, names, packed)
            for record in (await read_page(self._node, _keys(due), _keys(due & packed))).values():
                if record is not None:
                    yield record
            await asyncio.sleep(pause_s)

    async def _pages(self, prefix: str = "") -> AsyncIterator[tuple[set[bytes], set[bytes]]]:
        """Yield the names of records page by page, and which of them are of packed ones."""
        cursor = b"0"
        while True:
            # The same page twice, because nothing else tells a packed record from a hash without an error.
            page = ("SCAN", cursor, "MATCH", f"once:{{{prefix}*", "COUNT", PAGE)
            replies = await asyncio.gather(ask(self._node, *page), ask(self._node, *page, "TYPE", "string"))
            (cursor, names), (_, packed) = checked(replies[0]), checked(replies[1])
            yield set(names), set(packed)
            if cursor == b"0":
                break

    async def open_keys(self, limit: int, after: str = "", kinds: Collection[OpenKind] = UNDECIDED) -> OpenPage:
        if await self.index.is_complete():
            return await self.index.page(limit, after, kinds)
        return await scanned_open_keys(self, limit, after, kinds)

    async def open_counts(self) -> OpenCounts:
        return await self.index.counts() if await self.index.is_complete() else await scanned_open_counts(self)


class RedisMarks:
    """Marks in the slots of their records, as `Marks`. `swap`: its script."""

    def __init__(self, servers: StoreServers, swap: Script) -> None:
        self._servers, self._swap = servers, swap

    async def put(self, name: bytes, value: bytes, lasts_ms: int) -> None:
        await self._ask(name, "SET", name, value, "PX", lasts_ms)

    async def exists(self, name: bytes) -> bool | None:
        # EXISTS, not PTTL: a proxy must not need a right that the store's user can do without.
        found = await self._ask(name, "EXISTS", name)
        return found != 0 if isinstance(found, int) else None

    async def get(self, name: bytes) -> bytes:
        found = await self._ask(name, "GET", name)
        return found if isinstance(found, bytes) else b""

    async def get_all(self, names: Sequence[bytes]) -> list[bytes]:
        return await asyncio.gather(*map(self.get, names))

    async def swap(self, name: bytes, before: bytes, after: bytes, lasts_ms: int) -> bool | None:
        deadline = asyncio.get_running_loop().time() + MARK_TIMEOUT_S
        call, args = ScriptCall(self._swap, name, SWAP_COUNT, deadline), resp(before, after, lasts_ms)
        reply = await self._servers.run(call, args)
        if is_noscript(reply):
            reply = await self._servers.run(replace(call, by_body=True), args)
        return reply == [b"swapped"] if isinstance(reply, list) else None

    async def _ask(self, name: bytes, *words: bytes | str | int) -> object:
        """Return the reply to a command about a mark."""
        deadline = asyncio.get_running_loop().time() + MARK_TIMEOUT_S
        reply: object = await self._servers.command(name, *words, deadline=deadline)
        return reply
