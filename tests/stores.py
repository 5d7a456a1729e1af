"""The stores that tests call verbs on, and the claims, responses and states that they bring about there."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from oncegate.decision import decide, effective_state
from oncegate.keys.digests import Digests, Scope
from oncegate.messages.response_head import response_digest
from oncegate.store.kept import NOTHING, Kept, pack_kept
from oncegate.store.opening import open_store
from oncegate.store.record import Claim, ClaimRequest, Corrupt, Record, StoredResponse
from oncegate.store.record_name import store_key
from oncegate.store.redis.store import RedisStore
from oncegate.store.results import DropStatus, ReadFailure, SettleResult, SettleStatus, Unconfirmed
from oncegate.store.store import Store, StoreConfig
from tests.probes import Probe

LEASE_MS, RETENTION_MS, UNKNOWN_RETENTION_MS, TOMBSTONE_MS = 60_000, 3_600_000, 36_000_000, 7_200_000
PATIENCE_S = 20.0
# When responses were complete: about when their keys were claimed.
BEGAN_MS = int(time.time() * 1000)
# The variable with the layout that every store in Redis writes, whatever its proxies agree on.
TEST_LAYOUT = "TEST_RECORD_LAYOUT"
TENANT, SAME, OTHER = b"n" * 16, b"f" * 16, b"o" * 16
SCOPE = Scope(b"default", TENANT)


def key(number: int) -> bytes:
    """Return one of many keys of SCOPE."""
    return Digests(b"").key(SCOPE, b"key-%d" % number)


KEY = key(1)
NAME = store_key(KEY)
FOREIGN = b"F" * 16
BODY = b'{"id": 1}'


def drop(work: Coroutine[Any, Any, Any]) -> None:
    """Do nothing of what nobody waits for."""
    work.close()


def store_at(
    url: str,
    *,
    timeout_ms: int = 5000,
    patience_s: float = 5.0,
    background: Callable[[Coroutine[Any, Any, Any]], Any] = drop,
    **options: Any,
) -> Store:
    """Return a store that is not started."""
    config = StoreConfig(url=url, timeout_ms=timeout_ms, patience_s=patience_s, background=background, **options)
    store = open_store(config)
    if isinstance(store, RedisStore) and (layout := os.environ.get(TEST_LAYOUT)):
        store.layout.force(layout == "packed")
    return store


class Behind:
    """The background of a store. Its work runs when a test asks for it, or never."""

    def __init__(self) -> None:
        self.works: list[Coroutine[Any, Any, Any]] = []

    def __call__(self, work: Coroutine[Any, Any, Any]) -> None:
        self.works.append(work)

    async def run(self) -> None:
        works, self.works = self.works, []
        await asyncio.gather(*works)

    def close(self) -> None:
        for work in self.works:
            work.close()


@asynccontextmanager
async def connected(
    url: str, timeout_ms: int = 10_000, patience_s: float = PATIENCE_S, behind: Behind | None = None, **options: Any
) -> AsyncIterator[Store]:
    """A store that is up."""
    behind = behind or Behind()
    store = store_at(url, timeout_ms=timeout_ms, patience_s=patience_s, background=behind, **options)
    store.start()
    try:
        async with asyncio.timeout(60):
            assert await store.wait_up(PATIENCE_S), store.not_ready_reason()
            yield store
    finally:
        await store.close()
        behind.close()


async def with_index(url: str) -> None:
    """Let the index of a store's open keys be complete from the start, as it is after a while."""
    async with connected(url) as store:
        for server in store.records.servers:
            await server.index.begin()
            await server.index.note_complete()


def claim(
    store: Store,
    key: bytes = KEY,
    scope: Scope = SCOPE,
    fingerprint: bytes = SAME,
    mode: bytes = b"hold",
    window_ms: int = 0,
    kept: Kept = NOTHING,
) -> Coroutine[Any, Any, Claim | Record | Corrupt | Unconfirmed]:
    return store.claim(
        ClaimRequest(
            key=key,
            scope=scope,
            fingerprint=fingerprint,
            mode=mode,
            lease_ms=LEASE_MS,
            retention_ms=RETENTION_MS,
            unknown_retention_ms=UNKNOWN_RETENTION_MS,
            window_ms=window_ms,
            kept=pack_kept(kept),
        )
    )


async def claimed(store: Store, mode: bytes = b"hold", key: bytes = KEY) -> Claim:
    found = await claim(store, key, mode=mode)
    assert isinstance(found, Claim), found
    return found


def answer(*chunks: bytes, kept: bool = True) -> StoredResponse:
    """Return a stored answer whose body is these chunks."""
    digest = response_digest(201, b"Made", b"X: 1\r\n")
    digest.update(b"".join(chunks))
    return StoredResponse(
        status=201,
        reason=b"Made",
        block=b"X: 1\r\n",
        digest=digest.digest(),
        chunks=len(chunks),
        size=sum(map(len, chunks)),
        body_stored=kept,
        close_delimited=False,
        stated_length=True,
        completed_ms=BEGAN_MS,
        took_ms=40,
        age_s=0,
    )


def store_small(store: Store, owner: Claim, body: bytes = BODY) -> Coroutine[Any, Any, SettleResult]:
    return store.store(owner, answer(body), body, PATIENCE_S)


async def at(store: Store, probe: Probe, state: str, mode: bytes = b"hold") -> Claim:
    """Bring the record into a state with half its lease and retention left, and return its owner's claim."""
    owner = await claimed(store, mode)
    match state:
        case "absent":
            probe.remove(KEY)
        case "in flight":
            probe.change(KEY, lease=probe.now_ms() + LEASE_MS // 2)
        case "lapsed":
            probe.change(KEY, lease=probe.now_ms() - 1)
        case "unknown":
            assert await store.mark_unknown(owner, "lost", PATIENCE_S) == SettleResult(SettleStatus.MARKED_UNKNOWN)
        case "complete":
            assert await store_small(store, owner) == SettleResult(SettleStatus.STORED)
        case "expired" | "tombstone":
            with_tombstone = replace(owner, tombstone_ms=TOMBSTONE_MS)
            assert await store_small(store, with_tombstone) == SettleResult(SettleStatus.STORED)
            probe.change(KEY, until=probe.now_ms() - 1)
            if state == "tombstone":
                view = await store.records.read(KEY)
                assert view is not None
                assert await store.drop(view) is DropStatus.DROPPED
    probe.expire(KEY, RETENTION_MS // 2)
    return owner


def started_anew(left_ms: int, whole_ms: int) -> bool:
    """Return whether a time has just been set to its full length, rather than to half of it before."""
    return whole_ms * 3 // 4 < left_ms <= whole_ms


# What these tests call the decisions.
SHORT = {"key_reused": "mismatch", "response_not_kept": "not_kept", "outcome_unknown": "unknown"}


def told(found: Claim | Record | Corrupt | Unconfirmed, fingerprint: bytes = SAME) -> str:
    """Return the decision that a request gets from the result of its claim."""
    match found:
        case Claim():
            return "claimed"
        case Record():
            kept = found.response is not None and found.response.body_stored
            now = effective_state(found.state, found.lease_left_ms)
            decided = decide(now, found.fingerprint == fingerprint, kept).value
            return SHORT.get(decided, decided)
        case _:
            return type(found).__name__.lower()


async def act(store: Store, verb: str, owner: Claim, own: bool) -> str:
    """Run one verb on a record, as its owner or as somebody else, and return its result."""
    who = owner if own else replace(owner, token=FOREIGN)
    match verb:
        case "claim":
            return told(await (store.reclaim(owner, SCOPE) if own else claim(store)))
        case "append":
            return (await store.append(who, 0, b"chunk", PATIENCE_S)).value
        case "renew":
            return (await store.renew(who)).value
        case "read":
            chunks = await store.read(KEY, who.token, 0)
            return chunks.value if isinstance(chunks, ReadFailure) else "chunks" if chunks == [BODY] else "wrong"
        case "store":
            settled = await store_small(store, who)
        case "store another":
            settled = await store_small(store, who, b"another")
        case "store bare":
            settled = await store.store(who, answer(BODY, kept=False), b"", PATIENCE_S)
        case "release":
            settled = await store.release(who, PATIENCE_S)
        case _:
            settled = await store.mark_unknown(who, "cut off", PATIENCE_S)
    return settled.status.label + (", lost" if settled.record_was_gone else "")
