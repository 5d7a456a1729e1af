"""A record as an operator sees it: whose, how far it got, why nobody knows more. Never what was asked or answered.

Looking changes nothing. `scan` goes through a store page by page, so that nobody else waits for it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NamedTuple

from oncegate.decision import State, effective_state
from oncegate.keys.digests import parse_record_id, store_key
from oncegate.store.record import Corrupt, StoredResponse, self_check, tenant_of, unpack
from oncegate.store.redis.membership import IDENTITIES, replica_key, replica_value
from oncegate.store.redis.node import Node
from oncegate.store.redis.wire import ErrorReply
from oncegate.store.results import Unconfirmed
from oncegate.store.store import Store

ASK_S = 5.0  # for one reply
PAGE = 500  # names that a server looks through before others have their turn
FIELDS = ("meta", "state", "token", "fence", "mode", "fingerprint", "self", "lease", "created", "why", "stage", "bytes")
STAGES = {
    "claimed": "claimed; nothing was sent when its lease was renewed last",
    "sent": "the request was being sent, or sent, when its lease was renewed last",
    "answered": "an answer had begun when its lease was renewed last",
    "": "claimed; it ended before its lease was renewed, so nobody knows whether anything was sent",
}


class StoreError(Exception):
    """The store does not answer, or not as it should."""


class RecordView(NamedTuple):
    """One record. `state`: a word of State, released (by an operator) or corrupt. Times are the store's, in ms."""

    key: bytes  # digest
    state: str
    token: bytes
    now_ms: int
    fence: bytes = b"0"
    mode: bytes = b""
    fingerprint: bytes = b""
    tenant: bytes = b""
    described: bytes = b""
    created_ms: int = 0
    lease_left_ms: int = 0
    lapsed: bool = False  # its owner stopped renewing: it died, or sleeps
    why: str = ""
    far: str = ""
    bytes_kept: int = 0  # of an answer that had begun
    answer: StoredResponse | None = None

    @property
    def owner_may_live(self) -> bool:
        """Whether somebody may still be at it: a lease that passed may be that of an owner that will wake up."""
        return self.lease_left_ms > 0 or self.lapsed or self.state == "corrupt"


def read_fields(key: bytes, found: list[bytes | None], now_ms: int) -> RecordView | None:
    """Return the record in these FIELDS, None where there is none."""
    fields = {name: value for name, value in zip(FIELDS, found, strict=True) if value is not None}
    if not fields:
        return None
    if (meta := fields.get("meta")) is not None:
        return _complete(key, meta, now_ms)
    token = fields.get("token", b"")
    if fields.get("state") == b"released":
        return RecordView(key, "released", token, now_ms, fields.get("fence", b"0"))
    try:
        return _running(key, token, fields, now_ms)
    except (KeyError, ValueError):
        return RecordView(key, "corrupt", token, now_ms)


def _complete(key: bytes, meta: bytes, now_ms: int) -> RecordView:
    record = unpack(key, tenant_of(meta), meta, None, now_ms)
    if isinstance(record, Corrupt):
        return RecordView(key, "corrupt", meta[1:17], now_ms)
    return RecordView(
        key,
        State.COMPLETE.value,
        record.token,
        now_ms,
        fingerprint=record.fingerprint,
        tenant=tenant_of(meta),
        created_ms=record.created_ms,
        answer=record.answer,
    )


def _running(key: bytes, token: bytes, fields: dict[str, bytes], now_ms: int) -> RecordView:
    """Raise KeyError or ValueError for what is no record."""
    written = State(fields["state"].decode())
    left_ms = int(fields["lease"]) - now_ms
    state = effective_state(written, left_ms)
    lapsed = state is not written
    described, mode, fingerprint = fields["self"], fields["mode"], fields["fingerprint"]
    if described != self_check(key, described[:16], token, mode, fingerprint):
        raise ValueError
    return RecordView(
        key,
        state.value,
        token,
        now_ms,
        fence=fields["fence"],
        mode=mode,
        fingerprint=fingerprint,
        tenant=described[:16],
        described=described,
        created_ms=int(fields["created"]),
        lease_left_ms=max(0, left_ms),
        lapsed=lapsed,
        why="its owner stopped renewing its lease" if lapsed else fields.get("why", b"").decode("utf-8", "replace"),
        far="" if "why" in fields else STAGES.get(fields.get("stage", b"").decode(), ""),
        bytes_kept=int(fields.get("bytes", 0)),
    )


def checked(reply: Any) -> Any:
    """Return a reply; StoreError where there is none."""
    if isinstance(reply, Unconfirmed | ErrorReply):
        raise StoreError(reply.detail if isinstance(reply, Unconfirmed) else str(reply))
    return reply


async def look_at(store: Store, key: bytes) -> RecordView | None:
    """Return the record of a key."""
    node = store.node_of(key)
    if node is None:
        raise StoreError("nobody is known to have this key")
    reply = await ask(node, *_fields_of(key))
    if begins(reply, "ASK "):  # its slot is on its way, and the key is there already
        place = str(reply).split(" ")[2]
        node = next((one for one in store.nodes if one.name == place), node)
        reply = await ask_arriving(node, *_fields_of(key))
    if begins(reply, "WRONGTYPE"):
        return RecordView(key, "corrupt", b"", 0)
    return read_fields(key, checked(reply), await _time_ms(node))


def ask(node: Node, *words: bytes | str | int) -> Awaitable[Any]:
    """Return the reply to a plain command."""
    return node.link.command(*words, deadline=asyncio.get_running_loop().time() + ASK_S)


def ask_arriving(node: Node, *words: bytes | str | int) -> Awaitable[Any]:
    """Return the reply of a server on which a key is before its slot, which is on its way there."""
    ask(node, "ASKING")
    return ask(node, *words)


def begins(reply: object, word: str) -> bool:
    """Return whether a reply is an error that begins like that."""
    return isinstance(reply, ErrorReply) and str(reply).startswith(word)


def _fields_of(key: bytes) -> tuple[bytes | str, ...]:
    return ("HMGET", store_key(key), *FIELDS)


async def scan(store: Store, prefix: str = "") -> AsyncIterator[RecordView]:
    """Yield the records whose id begins like that; those that come or go meanwhile may be left out or come twice."""
    for node in store.nodes:
        cursor = b"0"
        while True:
            cursor, names = checked(await ask(node, "SCAN", cursor, "MATCH", f"once:{{{prefix}*", "COUNT", PAGE))
            keys = {digest for name in names if (digest := parse_record_id(name.decode("ascii", "replace")))}
            now_ms = await _time_ms(node)
            replies = await asyncio.gather(*[ask(node, *_fields_of(key)) for key in keys])
            for key, first in zip(keys, replies, strict=True):
                reply = await ask_arriving(node, *_fields_of(key)) if begins(first, "MOVED") else first
                if begins(reply, "WRONGTYPE"):
                    yield RecordView(key, "corrupt", b"", now_ms)
                elif begins(reply, "MOVED") or begins(reply, "ASK "):  # it went meanwhile
                    continue
                elif seen := read_fields(key, checked(reply), now_ms):
                    yield seen
            if cursor == b"0":
                break


async def _time_ms(node: Node) -> int:
    seconds, micros = checked(await ask(node, "TIME"))
    return int(seconds) * 1000 + int(micros) // 1000


async def replica_of(store: Store, token: bytes) -> tuple[str, int | None]:
    """Return whose token this is, as that one said of itself, and the ms since it said so last (None: not known)."""
    for node in store.nodes:
        name = replica_key(token) + node.tag
        if (said := checked(await ask(node, "GET", name))) is not None:
            _, retention_ms, who = said.split(b" ", 2)
            left_ms = checked(await ask(node, "PTTL", name))
            return who.decode("utf-8", "replace"), max(0, int(retention_ms) - left_ms)
    return "unknown", None


async def introduce(store: Store, token: bytes, who: str, retention_ms: int) -> None:
    """Leave word of whose token this is, for those who look at the record later."""
    for node in store.nodes:
        value = replica_value(0, retention_ms, who)
        await ask(node, "SET", replica_key(token) + node.tag, value, "PX", retention_ms)


async def identities(store: Store) -> list[str]:
    """Return by which settings proxies on this store name keys."""
    said = [one for node in store.nodes for one in checked(await ask(node, "HVALS", IDENTITIES + node.tag))]
    return [one.split(b" ", 1)[1].decode() for one in said]
