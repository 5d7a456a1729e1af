"""Records as operators see them: whose they are, how far they got, and why an outcome is unknown.

Nothing here shows what was requested or responded, and nothing changes a record. `scan` goes through a store page by
page, so that it does not hold up requests.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NamedTuple

from oncegate.decision import State, effective_state
from oncegate.store.record import Claim, Corrupt, StoredResponse, ViewState, read_status, self_check, tenant_of, unpack
from oncegate.store.record_name import parse_record_id, store_key
from oncegate.store.redis.membership import IDENTITIES, proxy_record_key, proxy_record_value
from oncegate.store.redis.node import Node
from oncegate.store.redis.wire import ErrorReply
from oncegate.store.results import Unconfirmed
from oncegate.store.stages import describe_stage
from oncegate.store.store import Store

# For one reply.
TIMEOUT_S = 5.0
# Keys that a server looks through before it serves others.
PAGE = 500
FIELDS = (
    "meta",
    "state",
    "token",
    "fence",
    "mode",
    "fingerprint",
    "self",
    "lease",
    "created",
    "why",
    "stage",
    "bytes",
    "lease_ms",
    "status",
)


class StoreError(Exception):
    """The store does not reply, or replies with an error."""


class RecordView(NamedTuple):
    """One record. Times are the store's, in milliseconds."""

    # Digest.
    key: bytes
    state: ViewState
    token: bytes
    now_ms: int
    fence: bytes = b"0"
    mode: bytes = b""
    fingerprint: bytes = b""
    tenant: bytes = b""
    self_check: bytes = b""
    created_ms: int = 0
    lease_left_ms: int = 0
    # Since the lease of an owner ended that stopped renewing it, because it died or is paused. Else 0.
    lapsed_ms: int = 0
    # Why the outcome is unknown, and how far the exchange got.
    reason: str = ""
    progress: str = ""
    # Of a response that is not complete.
    bytes_stored: int = 0
    # Of a response that came and does not tell the outcome; 0 for none.
    status: int = 0
    response: StoredResponse | None = None

    @property
    def owner_may_live(self) -> bool:
        """Whether the owner may still work on the key. An owner whose lease has lapsed may be paused, and go on."""
        return self.lease_left_ms > 0 or self.lapsed_ms > 0 or self.state is ViewState.CORRUPT


# One record from its fields ...


def read_fields(key: bytes, values: list[bytes | None], now_ms: int) -> RecordView | None:
    """Return the record with these values of FIELDS, or None for no record."""
    fields = {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}
    if not fields:
        return None
    if (meta := fields.get("meta")) is not None:
        return _complete(key, meta, now_ms)
    token = fields.get("token", b"")
    if fields.get("state") == b"released":
        return RecordView(key, ViewState.RELEASED, token, now_ms, fields.get("fence", b"0"))
    try:
        return _unfinished(key, token, fields, now_ms)
    except (KeyError, ValueError):
        return RecordView(key, ViewState.CORRUPT, token, now_ms)


def _complete(key: bytes, meta: bytes, now_ms: int) -> RecordView:
    record = unpack(key, tenant_of(meta), meta, None, now_ms)
    if isinstance(record, Corrupt):
        return RecordView(key, ViewState.CORRUPT, meta[1:17], now_ms)
    return RecordView(
        key,
        ViewState.COMPLETE,
        record.token,
        now_ms,
        fingerprint=record.fingerprint,
        tenant=tenant_of(meta),
        created_ms=record.created_ms,
        response=record.response,
    )


def _unfinished(key: bytes, token: bytes, fields: dict[str, bytes], now_ms: int) -> RecordView:
    """Return a record in flight or unknown. Raises KeyError or ValueError for fields that are no such record."""
    stored_state = State(fields["state"].decode())
    # Further off than a whole lease: the clock stepped back.
    left_ms = min(int(fields["lease"]) - now_ms, int(fields.get("lease_ms", fields["lease"])))
    state = effective_state(stored_state, left_ms)
    lapsed = state is not stored_state
    stored_check, mode, fingerprint = fields["self"], fields["mode"], fields["fingerprint"]
    tenant = stored_check[:16]
    if stored_check != self_check(key, tenant, token, mode, fingerprint):
        raise ValueError
    return RecordView(
        key,
        ViewState(state.value),
        token,
        now_ms,
        fence=fields["fence"],
        mode=mode,
        fingerprint=fingerprint,
        tenant=tenant,
        self_check=stored_check,
        created_ms=int(fields["created"]),
        lease_left_ms=max(0, left_ms),
        lapsed_ms=max(1, -left_ms) if lapsed else 0,
        reason="its owner stopped renewing its lease" if lapsed else fields.get("why", b"").decode("utf-8", "replace"),
        progress="" if "why" in fields else describe_stage(fields.get("stage")),
        bytes_stored=int(fields.get("bytes", 0)),
        status=read_status(fields.get("status", b"")),
    )


def claim_of(record: RecordView, left_ms: int) -> Claim:
    """Return the claim that the owner of a record had, without its lease. `left_ms`: how long the record is kept."""
    return Claim(
        key=record.key,
        token=record.token,
        fence=record.fence,
        mode=record.mode,
        fingerprint=record.fingerprint,
        self_check=record.self_check,
        created_ms=record.created_ms,
        lease_ms=0,
        retention_ms=left_ms,
        unknown_retention_ms=left_ms,
    )


# Commands of their own ...


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


def _fields_of(key: bytes) -> tuple[bytes | str, ...]:
    return ("HMGET", store_key(key), *FIELDS)


async def _time_ms(node: Node) -> int:
    seconds, micros = checked(await ask(node, "TIME"))
    return int(seconds) * 1000 + int(micros) // 1000


# Records ...


async def read_record(store: Store, key: bytes) -> RecordView | None:
    """Return the record of a key, or None. Raises StoreError."""
    node = store.node_of(key)
    if node is None:
        raise StoreError("nobody is known to have this key")
    reply = await ask(node, *_fields_of(key))
    if is_error(reply, "ASK "):
        # Its slot is being moved, and the key is at the new server already.
        address = str(reply).split(" ")[2]
        node = next((one for one in store.nodes if one.name == address), node)
        reply = await ask_importing(node, *_fields_of(key))
    if is_error(reply, "WRONGTYPE"):
        return RecordView(key, ViewState.CORRUPT, b"", 0)
    return read_fields(key, checked(reply), await _time_ms(node))


async def scan(store: Store, prefix: str = "") -> AsyncIterator[RecordView]:
    """Yield the records whose id begins with `prefix`. Raises StoreError.

    A record that comes or goes meanwhile may be left out, and any record may come twice.
    """
    for node in store.nodes:
        async for record in scan_node(node, prefix):
            yield record


async def scan_node(node: Node, prefix: str = "", pause_s: float = 0.0) -> AsyncIterator[RecordView]:
    """Yield the records of one server as `scan` does. `pause_s`: the pause after each page."""
    cursor = b"0"
    while True:
        cursor, names = checked(await ask(node, "SCAN", cursor, "MATCH", f"once:{{{prefix}*", "COUNT", PAGE))
        keys = {key for name in names if (key := parse_record_id(name.decode("ascii", "replace")))}
        for record in await _read_page(node, list(keys)):
            yield record
        if cursor == b"0":
            break
        await asyncio.sleep(pause_s)


async def _read_page(node: Node, keys: list[bytes]) -> list[RecordView]:
    now_ms = await _time_ms(node)
    replies = await asyncio.gather(*[ask(node, *_fields_of(key)) for key in keys])
    records: list[RecordView] = []
    for key, first in zip(keys, replies, strict=True):
        reply = await ask_importing(node, *_fields_of(key)) if is_error(first, "MOVED") else first
        if is_error(reply, "WRONGTYPE"):
            records.append(RecordView(key, ViewState.CORRUPT, b"", now_ms))
        elif is_error(reply, "MOVED") or is_error(reply, "ASK "):
            # The key was moved to another server since.
            continue
        elif record := read_fields(key, checked(reply), now_ms):
            records.append(record)
    return records


# Proxies on the store ...


async def proxy_of(store: Store, token: bytes) -> tuple[str, int | None]:
    """Return the name of the proxy that made a token, and the ms since it last wrote its name (None: not known)."""
    for node in store.nodes:
        name = proxy_record_key(token) + node.tag
        if (value := checked(await ask(node, "GET", name))) is not None:
            _, retention_ms, proxy_name = value.split(b" ", 2)
            left_ms = checked(await ask(node, "PTTL", name))
            return proxy_name.decode("utf-8", "replace"), max(0, int(retention_ms) - left_ms)
    return "unknown", None


async def introduce(store: Store, token: bytes, proxy_name: str, retention_ms: int) -> None:
    """Write the name behind a token, for operators who look at its record later."""
    for node in store.nodes:
        value = proxy_record_value(0, retention_ms, proxy_name)
        await ask(node, "SET", proxy_record_key(token) + node.tag, value, "PX", retention_ms)


async def identities(store: Store) -> list[str]:
    """Return the settings by which the proxies on this store name keys."""
    values = [one for node in store.nodes for one in checked(await ask(node, "HVALS", IDENTITIES + node.tag))]
    return [one.split(b" ", 1)[1].decode() for one in values]
