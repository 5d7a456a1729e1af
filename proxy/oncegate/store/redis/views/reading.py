"""Records as operators see them, read with plain commands beside the scripts."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

from oncegate.store.record import DROPPED, Corrupt, ViewState
from oncegate.store.record_name import store_key
from oncegate.store.record_view import FIELDS, RecordView, StoreError, read_fields
from oncegate.store.redis.layouts.packed import COMPLETE, UNTIL, UNTIL_BYTES, hash_fields, numbered
from oncegate.store.redis.node import Node
from oncegate.store.redis.wire import ErrorReply
from oncegate.store.results import Unconfirmed

# For one reply.
TIMEOUT_S = 5.0
# Keys that a server looks through before it serves others.
PAGE = 500


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


async def read(node: Node, key: bytes, ask_at: Callable[..., Awaitable[Any]] = ask, packed: bool = True) -> Any:
    """Return the value of a packed record, the fields of any other, or an error. `packed`: which it probably is."""
    name = store_key(key)
    commands: list[tuple[bytes | str, ...]] = [("GET", name), ("HMGET", name, *FIELDS)]
    reply = await ask_at(node, *commands[not packed])
    return await ask_at(node, *commands[packed]) if is_error(reply, "WRONGTYPE") else reply


def view(key: bytes, reply: Any, now_ms: int) -> RecordView | None:
    """Return the record that `read` has read, None for no record. Raises StoreError."""
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


async def time_ms(node: Node) -> int:
    seconds, micros = checked(await ask(node, "TIME"))
    return int(seconds) * 1000 + int(micros) // 1000


async def left_ms(node: Node, key: bytes) -> int:
    """Return how long a record is kept, -1 where the key was moved to another server since. Raises StoreError."""
    reply = await ask(node, "PTTL", store_key(key))
    if is_error(reply, "MOVED"):
        reply = await ask_importing(node, "PTTL", store_key(key))
    return -1 if is_error(reply, "MOVED") or is_error(reply, "ASK ") else int(checked(reply))


async def due_names(node: Node, names: Collection[bytes], packed: Collection[bytes]) -> set[bytes]:
    """Return the names of those records that are open or past their retention, or may be. `packed`: as in `read_page`.

    Nearly all records are complete. A few bytes of each say so, and to read all of it would take many times as long.
    """
    now_ms, due = await time_ms(node), set[bytes]()
    kinds = [(name, ask(node, "GETRANGE", name, 0, 0)) for name in packed]
    states = [(name, ask(node, "HMGET", name, "state", "until")) for name in names if name not in packed]
    ends = []
    for name, asked in kinds:
        kind = await asked
        if kind == UNTIL:
            ends.append((name, ask(node, "GETRANGE", name, -UNTIL_BYTES, -1)))
        elif kind not in (COMPLETE, DROPPED, b""):
            due.add(name)
    for name, asked in (*states, *ends):
        reply = await asked
        state, until = reply if isinstance(reply, list) else (None, reply)
        is_kept = until is None or (isinstance(until, bytes) and until.isdigit() and int(until) > now_ms)
        if state is not None or not is_kept:
            due.add(name)
    return due


async def read_page(node: Node, keys: Collection[bytes], packed: Collection[bytes]) -> dict[bytes, RecordView | None]:
    """Return the records of keys, None for no record. Keys that were moved to another server are left out.

    `packed`: those whose records are probably packed. Raises StoreError.
    """
    now_ms = await time_ms(node)
    replies = await asyncio.gather(*[read(node, key, packed=key in packed) for key in keys])
    records: dict[bytes, RecordView | None] = {}
    for key, first in zip(keys, replies, strict=True):
        reply = await read(node, key, ask_importing) if is_error(first, "MOVED") else first
        if not (is_error(reply, "MOVED") or is_error(reply, "ASK ")):
            records[key] = view(key, reply, now_ms)
    # How long they are kept is asked of unfinished ones alone: most records are complete.
    unfinished = [record for record in records.values() if record and record.response is None]
    left = await asyncio.gather(*[left_ms(node, record.key) for record in unfinished])
    return records | {one.key: one._replace(left_ms=ms) for one, ms in zip(unfinished, left, strict=True)}
