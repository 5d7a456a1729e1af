"""A record of every kind, and everything that a build does with one, in words.

It runs under this build and under an older one, so it uses only what both have.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

from redis import Redis

from oncegate.keys.digests import Digests, Scope
from oncegate.messages.response_head import response_digest
from oncegate.store import record_view
from oncegate.store.opening import open_store
from oncegate.store.record import (
    Claim,
    ClaimRequest,
    Corrupt,
    Record,
    StoredResponse,
    cancelled_claim,
    pack,
    self_check,
)
from oncegate.store.record_name import store_key
from oncegate.store.record_view import claim_of
from oncegate.store.results import SettleResult, Unconfirmed
from oncegate.store.stages import SENT
from oncegate.store.store import Store, StoreConfig
from oncegate.store.unknown_keys import UnknownKeys

LEASE_MS, RETENTION_MS, UNKNOWN_RETENTION_MS, TOMBSTONE_MS = 60_000, 3_600_000, 36_000_000, 7_200_000
PATIENCE_S = 20.0
CHUNKS = b"the first half, ", b"the second"
CREATED_MS = 1_700_000_000_000
YEARS_MS = 50 * 365 * 86_400_000
SAME, OTHER = b"f" * 16, b"o" * 16
FOREIGN, OPERATOR = b"F" * 16, b"O" * 16


# What a decision is about. The older build takes a token.
seen: Any = getattr(record_view, "Deciding", bytes)


class Kind(NamedTuple):
    """One kind of record: how it comes about after its claim. `mode`: of the claim."""

    name: str
    make: Callable[[Store, Redis, Claim], Awaitable[object]]
    mode: bytes = b"hold"
    tenant: bytes = b"n" * 16
    tombstone_ms: int = 0


# Records ...


def key_of(name: str, tenant: bytes) -> bytes:
    return Digests(b"").key(Scope(b"default", tenant), name.encode())


def response(*chunks: bytes, stored: bool = True, **more: Any) -> StoredResponse:
    """Return the response whose body is these chunks."""
    trailers = more.get("trailers", b"")
    digest = response_digest(201, b"Made", b"X: 1\r\n")
    digest.update(b"".join(chunks) + trailers)
    return StoredResponse(
        status=201,
        reason=b"Made",
        block=b"X: 1\r\n",
        digest=digest.digest(),
        chunks=len(chunks),
        size=sum(map(len, chunks)),
        body_stored=stored,
        close_delimited=False,
        stated_length=True,
        completed_ms=1_763_960_000_000,
        took_ms=40,
        age_s=0,
        **more,
    )


def _change(**fields: int) -> Callable[[Store, Redis, Claim], Awaitable[None]]:
    """Return what moves times of a record to so many ms from now."""

    async def change(_store: Store, client: Redis, owner: Claim) -> None:
        seconds, micros = client.time()
        for field, from_now_ms in fields.items():
            client.hset(store_key(owner.key), field, seconds * 1000 + micros // 1000 + from_now_ms)

    return change


def _stored(*chunks: bytes, **more: Any) -> Callable[[Store, Redis, Claim], Awaitable[None]]:
    async def stored(store: Store, _client: Redis, owner: Claim) -> None:
        whole = response(*chunks, **more)
        parts = chunks if whole.body_stored else ()
        for index, chunk in enumerate(parts[:-1]):
            await store.append(owner, index, chunk, PATIENCE_S)
        await store.store(owner, whole, parts[-1] if parts else b"", PATIENCE_S)

    return stored


async def _nothing(_store: Store, _client: Redis, _owner: Claim) -> None:
    """Leave the claim as it is."""


async def _renewed(store: Store, _client: Redis, owner: Claim) -> None:
    await store.renew(owner, SENT)


async def _begun(store: Store, _client: Redis, owner: Claim) -> None:
    for index, chunk in enumerate(CHUNKS):
        await store.append(owner, index, chunk, PATIENCE_S)


def _unknown(status: int = 0, cancelled: bool = False) -> Callable[[Store, Redis, Claim], Awaitable[object]]:
    async def unknown(store: Store, _client: Redis, owner: Claim) -> object:
        return await store.mark_unknown(cancelled_claim(owner) if cancelled else owner, "lost", PATIENCE_S, status)

    return unknown


async def _released(store: Store, _client: Redis, owner: Claim) -> object:
    return await store.release_by_operator(owner.key, seen(owner.token), OPERATOR, owner.fence)


async def _expired(store: Store, client: Redis, owner: Claim) -> None:
    await _stored(b'{"id": 1}')(store, client, owner)
    await _change(until=-1)(store, client, owner)


async def _dropped(store: Store, client: Redis, owner: Claim) -> None:
    await _expired(store, client, owner)
    view = await store.records.read(owner.key)
    assert view is not None
    await store.drop(view)


KINDS = [
    Kind("in flight", _nothing),
    Kind("in flight, no tenant", _nothing, tenant=bytes(16)),
    Kind("in flight, renewed", _renewed),
    Kind("in flight, half stored", _begun),
    Kind("lapsed", _change(lease=-1)),
    Kind("lapsed, retry", _change(lease=-1), mode=b"retry"),
    Kind("in flight, the clock stepped back", _change(lease=10 * LEASE_MS)),
    Kind("unknown", _unknown()),
    Kind("unknown, retry", _unknown(), mode=b"retry"),
    Kind("unknown, cancelled", _unknown(cancelled=True)),
    Kind("unknown, with a status", _unknown(status=503)),
    Kind("released", _released),
    Kind("complete", _stored(b'{"id": 1}')),
    Kind("complete, no tenant", _stored(b'{"id": 1}'), tenant=bytes(16)),
    Kind("complete, in chunks", _stored(*CHUNKS)),
    Kind("complete, without body", _stored(b'{"id": 1}', stored=False)),
    Kind("complete, empty body", _stored()),
    Kind("complete, with trailers", _stored(b'{"id": 1}', trailers=b"X-Sum: 1\r\n")),
    Kind("complete, with an id", _stored(b'{"id": 1}', request_id=b'"call-1"')),
    Kind("complete, with a tombstone", _stored(b'{"id": 1}'), tombstone_ms=TOMBSTONE_MS),
    Kind("expired", _expired, tombstone_ms=TOMBSTONE_MS),
    Kind("tombstone", _dropped, tombstone_ms=TOMBSTONE_MS),
]


def claiming(
    store: Store, kind: Kind, *, fingerprint: bytes = SAME, mode: bytes = b"", window_ms: int = 0
) -> Coroutine[Any, Any, Claim | Record | Corrupt | Unconfirmed]:
    request = ClaimRequest(
        key=key_of(kind.name, kind.tenant),
        scope=Scope(b"default", kind.tenant),
        fingerprint=fingerprint,
        mode=mode or kind.mode,
        lease_ms=LEASE_MS,
        retention_ms=RETENTION_MS,
        unknown_retention_ms=UNKNOWN_RETENTION_MS,
        window_ms=window_ms,
        tombstone_ms=kind.tombstone_ms,
    )
    return store.claim(request)


async def make(store: Store, client: Redis, kind: Kind) -> None:
    """Write a record of this kind, whose key is free, with half of its life behind it."""
    owner = await claiming(store, kind)
    assert isinstance(owner, Claim), owner
    # Long ago, by the clock of any machine that runs the tests.
    client.hset(store_key(owner.key), "created", CREATED_MS)
    await kind.make(store, client, replace(owner, created_ms=CREATED_MS))
    client.pexpire(store_key(owner.key), client.pttl(store_key(owner.key)) // 2)


# What a build does with one ...


async def _settled(settling: Coroutine[Any, Any, SettleResult]) -> str:
    settled = await settling
    return settled.status.label + (", it was gone" if settled.record_was_gone else "")


async def _view(store: Store, kind: Kind) -> Any:
    view = await store.records.read(key_of(kind.name, kind.tenant))
    assert view is not None
    return view


async def _owner(store: Store, kind: Kind) -> Claim:
    """Return the claim of the record's owner."""
    view = await _view(store, kind)
    claim = claim_of(view, UNKNOWN_RETENTION_MS)
    times = {"lease_ms": LEASE_MS, "retention_ms": RETENTION_MS, "tombstone_ms": kind.tombstone_ms}
    # What is complete or released does not have all that a claim has.
    check = self_check(view.key, kind.tenant, view.token, kind.mode, SAME)
    return replace(claim, mode=kind.mode, fingerprint=SAME, self_check=view.self_check or check, **times)


async def _of(store: Store, kind: Kind, is_owner: bool) -> Claim:
    owner = await _owner(store, kind)
    return owner if is_owner else replace(owner, token=FOREIGN)


def _store_small(store: Store, owner: Claim, body: bytes = b'{"id": 1}') -> Coroutine[Any, Any, str]:
    return _settled(store.store(owner, response(body), body, PATIENCE_S))


async def _store_all(store: Store, owner: Claim) -> str:
    """Store a response of which all chunks but the last were appended."""
    return await _settled(store.store(owner, response(*CHUNKS, b"!"), b"!", PATIENCE_S))


async def _read(store: Store, kind: Kind) -> str:
    chunks = await store.read(key_of(kind.name, kind.tenant), (await _view(store, kind)).token, 0)
    return chunks.value if isinstance(chunks, Enum) else repr(b"|".join(chunks))


async def _resolve(store: Store, kind: Kind) -> str:
    claim, given = await _owner(store, kind), response(b"given")
    token, claim = claim.token, replace(claim, token=OPERATOR)
    return (await store.resolve_by_operator(claim, seen(token), pack(claim, given), b"given")).value


async def _release(store: Store, kind: Kind) -> str:
    view = await _view(store, kind)
    return (await store.release_by_operator(view.key, seen(view.token), OPERATOR, view.fence)).value


async def _drop(store: Store, kind: Kind, purge: bool) -> str:
    view = await _view(store, kind)
    # What operators' commands and the sweep drop; they ask for nothing else.
    return (await store.drop(view, purge=purge)).value if view.meta else "nothing to drop"


async def _sweep(store: Store, _kind: Kind) -> str:
    warned: list[str] = []
    keys = UnknownKeys(store, RETENTION_MS, UNKNOWN_RETENTION_MS, lambda event, **_: warned.append(event))
    # The older build has one look, which counts.
    for look in ("scan", "look", "recount"):
        if hasattr(keys, look):
            await getattr(keys, look)()
    return f"{keys.count} unknown, {keys.expiring} expiring, {len(warned)} warnings"


async def _reclaim(store: Store, kind: Kind) -> str:
    return told(await store.reclaim(await _owner(store, kind), Scope(b"default", kind.tenant)))


def _as(is_owner: bool, verb: Callable[[Store, Claim], Awaitable[Any]]) -> Callable[[Store, Kind], Awaitable[str]]:
    async def act(store: Store, kind: Kind) -> str:
        done = await verb(store, await _of(store, kind, is_owner))
        return done if isinstance(done, str) else done.value  # type: ignore[no-any-return]

    return act


def _told(**how: Any) -> Callable[[Store, Kind], Awaitable[str]]:
    async def act(store: Store, kind: Kind) -> str:
        return told(await claiming(store, kind, **how))

    return act


VERBS: dict[str, Callable[[Store, Kind], Awaitable[str]]] = {
    "claim": _told(),
    "claim, other request": _told(fingerprint=OTHER),
    "claim, retry": _told(mode=b"retry"),
    "claim, past its window": _told(window_ms=1),
    "claim, within its window": _told(window_ms=YEARS_MS),
    "reclaim": _reclaim,
    "read": _read,
    "resolve": _resolve,
    "free": _release,
    "drop": lambda store, kind: _drop(store, kind, purge=False),
    "purge": lambda store, kind: _drop(store, kind, purge=True),
    "sweep": _sweep,
    **{
        f"{name}{'' if is_owner else ', another'}": _as(is_owner, verb)
        for is_owner in (True, False)
        for name, verb in {
            "renew": lambda store, owner: store.renew(owner),
            "append": lambda store, owner: store.append(owner, 2, b"!", PATIENCE_S),
            "store": _store_small,
            "store, other body": lambda store, owner: _store_small(store, owner, b"another"),
            "store, in chunks": _store_all,
            "store, without body": lambda store, owner: _settled(
                store.store(owner, response(b"large", stored=False), b"", PATIENCE_S)
            ),
            "release": lambda store, owner: _settled(store.release(owner, PATIENCE_S)),
            "unknown": lambda store, owner: _settled(store.mark_unknown(owner, "cut off", PATIENCE_S, 502)),
        }.items()
    },
}


def told(found: object) -> str:
    """Return what a claim found, in words, without the times of this moment."""
    match found:
        case None:
            return "free"
        case Claim():
            return f"claimed, {found.mode.decode()}"
        case Corrupt():
            return f"corrupt: {found.reason}"
        case Record():
            lease = " live" if found.lease_left_ms > 0 else ""
            request = "" if found.fingerprint == SAME else ", other request"
            about = f"{found.state.value}{lease} {found.mode.decode()} {found.status or ''}".rstrip()
            return f"{about}{request}{_response_told(found.response, found.body)}"
        case _:
            return repr(found)


def _response_told(stored: StoredResponse | None, body: bytes | None) -> str:
    if stored is None:
        return ""
    head = b" ".join((b"%d" % stored.status, stored.reason, stored.block, stored.trailers, stored.request_id))
    kept = "" if stored.body_stored else ", not stored"
    return f" {head!r} {stored.size} bytes in {stored.chunks}{kept}: {body!r}"


async def facts(store: Store, client: Redis, kind: Kind) -> str:
    """Return what there is of a record afterwards: what a request finds, what an operator sees, how long it is kept."""
    key = key_of(kind.name, kind.tenant)
    found = told(await store.peek(key, Scope(b"default", kind.tenant), LEASE_MS))
    view = await store.records.read(key)
    if view is None:
        return found
    seen = [view.state.value, view.mode.decode(), view.reason, view.progress, f"{view.bytes_stored} bytes"]
    seen += [f"status {view.status}" if view.status else "", f"kept {rounded(client.pttl(store_key(key)))}"]
    return f"{found} | {', '.join(one for one in seen if one)}"


def rounded(ms: int) -> str:
    """Return a time in minutes: less has passed since it was set."""
    return f"{round(ms / 60_000)} min"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    config = StoreConfig(url=url, timeout_ms=10_000, patience_s=PATIENCE_S, background=lambda work: work.close())
    store = open_store(config)
    store.start()
    try:
        assert await store.wait_up(PATIENCE_S), store.not_ready_reason()
        yield store
    finally:
        await store.close()
