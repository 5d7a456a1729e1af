"""The store and real servers: every verb in every state, and what delays, retries, losses and damage may not do."""

import asyncio
import random
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from redis import Redis

from oncegate.decision import decide, effective_state
from oncegate.keys.digests import Digests, Scope
from oncegate.messages.response_head import response_digest
from oncegate.store.record import Claim, ClaimRequest, Corrupt, Record, StoredResponse, intact, pack, self_check
from oncegate.store.record_name import store_key
from oncegate.store.redis.arguments import PLAIN_TAIL
from oncegate.store.redis.server import load_scripts
from oncegate.store.redis.wire import ScriptCall
from oncegate.store.results import (
    AppendStatus,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    StoreFull,
    Unconfirmed,
)
from oncegate.store.store import Store
from tests.conftest import Valkey
from tests.parts import OK, Tap, ask, request, until
from tests.resp import Connection, Relay, RespServer, Words, relaying, resp
from tests.stores import store_at

LEASE_MS, RETENTION_MS, UNKNOWN_RETENTION_MS = 60_000, 3_600_000, 36_000_000
PATIENCE_S = 20.0
HOUR_MS = 3_600_000
WINDOW_MS = 10_000  # of a derived key
TENANT, SAME, OTHER = b"n" * 16, b"f" * 16, b"o" * 16
SCOPE = Scope(b"default", TENANT)
Log = list[tuple[str, dict[str, Any]]]


def key(number: int) -> bytes:
    """Return one of many keys of SCOPE."""
    return Digests(b"").key(SCOPE, b"key-%d" % number)


KEY = key(1)
NAME = store_key(KEY)
FOREIGN = b"F" * 16
BODY = b'{"id": 1}'
STATES = ("absent", "in flight", "lapsed", "unknown", "complete")
SCRIPTS = load_scripts()


# What the tests are built with ...


def redis_server() -> Path | None:
    """Return the redis-server on PATH, if there is one that is new enough."""
    found = shutil.which("redis-server")
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"v=(\d+)\.", said)
    return Path(found) if version and int(version[1]) >= 7 else None


REDIS = redis_server()


@pytest.fixture(scope="session", params=["valkey", "redis"] if REDIS else ["valkey"])
def shared_server(request: pytest.FixtureRequest) -> Iterator[Valkey]:
    if request.param == "valkey":
        yield request.getfixturevalue("shared_valkey")
        return
    server = Valkey(binary=REDIS)
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Valkey) -> Iterator[Valkey]:
    """A real server, empty: Valkey, and the Redis of this system if it has one."""
    with shared_server.client() as client:
        client.config_set("maxmemory", 0)
        client.flushall()
        yield shared_server
        client.config_set("maxmemory", 0)


@pytest.fixture
def client(server: Valkey) -> Iterator[Redis]:
    with server.client() as client:
        yield client


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


@pytest.fixture
async def relay(valkey: Valkey) -> AsyncIterator[Relay]:
    """A relay between a store and a real server, which drops replies on demand."""
    async with relaying(valkey.socket) as relay:
        yield relay


@pytest.fixture
async def store(server: Valkey) -> AsyncIterator[Store]:
    async with connected(server.url) as store:
        yield store


def claim(
    store: Store,
    key: bytes = KEY,
    scope: Scope = SCOPE,
    fingerprint: bytes = SAME,
    mode: bytes = b"hold",
    window_ms: int = 0,
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
        completed_ms=1_763_960_000_000,
        took_ms=40,
        age_s=0,
    )


def store_small(store: Store, owner: Claim, body: bytes = BODY) -> Coroutine[Any, Any, SettleResult]:
    return store.store(owner, answer(body), body, PATIENCE_S)


def server_ms(client: Redis) -> int:
    seconds, micros = client.time()
    return seconds * 1000 + micros // 1000


async def at(store: Store, client: Redis, state: str, mode: bytes = b"hold") -> Claim:
    """Bring the record into a state with half its lease and retention left, and return its owner's claim."""
    owner = await claimed(store, mode)
    match state:
        case "absent":
            client.delete(NAME)
        case "in flight":
            client.hset(NAME, "lease", server_ms(client) + LEASE_MS // 2)
        case "lapsed":
            client.hset(NAME, "lease", server_ms(client) - 1)
        case "unknown":
            assert await store.mark_unknown(owner, "lost", PATIENCE_S) == SettleResult(SettleStatus.MARKED_UNKNOWN)
        case "complete":
            assert await store_small(store, owner) == SettleResult(SettleStatus.STORED)
    client.pexpire(NAME, RETENTION_MS // 2)
    return owner


def fields(client: Redis, name: bytes = NAME) -> dict[str, bytes]:
    return {field.decode(): value for field, value in client.hgetall(name).items()}


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


def raw(client: Redis, verb: str, *args: object, key: bytes = NAME) -> list[Any]:
    """Run a script by hand and return its reply without the tag."""
    tag, *reply = client.eval(SCRIPTS[verb].body, 1, key, b"tag", *args)
    assert tag == b"tag"
    return reply


def claim_raw(
    client: Redis,
    token: bytes = FOREIGN,
    *,
    fingerprint: bytes = SAME,
    mode: bytes = b"hold",
    not_after_ms: int = 1 << 52,
    window_ms: int = 0,
    seen: bytes = b"",
) -> list[Any]:
    """Run claim.lua with arguments that `Store.claim` does not offer."""
    described = self_check(KEY, TENANT, token, mode, fingerprint)
    times = (LEASE_MS, RETENTION_MS, not_after_ms, 65536, window_ms)
    return raw(client, "claim", token, fingerprint, described, mode, *times, seen)


# Every verb in every state ...


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


# (what came of it, what became of the record), for the owner and for anybody else.
CLAIMED = ("claimed", "claimed")
AGAIN = ("claimed", "lease and retention anew")
STORED, STORED_LOST = ("stored", "complete"), ("stored, lost", "complete")
BARE, BARE_LOST = ("stored", "complete, no body"), ("stored, lost", "complete, no body")
RELEASED, RELEASED_LOST = ("released", "absent"), ("released, lost", "absent")
UNKNOWN, UNKNOWN_LOST = ("unknown", "unknown"), ("unknown, lost", "unknown")
KEPT = ("appended", "chunk and lease anew")
RENEWED = ("renewed", "lease and retention anew")


def no(word: str) -> tuple[str, str]:
    return (word, "as before")


TABLE = {
    "claim": {
        "absent": (CLAIMED, CLAIMED),
        "in flight": (AGAIN, no("in_flight")),
        "lapsed": (AGAIN, no("unknown")),
        "unknown": (no("unknown"), no("unknown")),
        "complete": (no("replay"), no("replay")),
    },
    "append": {
        "absent": (no("absent"), no("absent")),
        "in flight": (KEPT, no("fenced")),
        "lapsed": (KEPT, no("fenced")),
        "unknown": (KEPT, no("fenced")),
        "complete": (no("complete"), no("fenced")),
    },
    "renew": {
        "absent": (no("absent"), no("absent")),
        "in flight": (RENEWED, no("fenced")),
        "lapsed": (RENEWED, no("fenced")),
        "unknown": (no("unknown"), no("fenced")),
        "complete": (no("complete"), no("fenced")),
    },
    "store": {
        "absent": (STORED_LOST, STORED_LOST),
        "in flight": (STORED, no("fenced")),
        "lapsed": (STORED, no("fenced")),
        "unknown": (STORED, no("fenced")),
        "complete": (no("stored"), no("fenced")),
    },
    "store another": {"complete": (no("fenced"), no("fenced"))},
    "store bare": {
        "absent": (BARE_LOST, BARE_LOST),
        "in flight": (BARE, no("fenced")),
        "lapsed": (BARE, no("fenced")),
        "unknown": (BARE, no("fenced")),
        "complete": (no("stored"), no("fenced")),
    },
    "release": {
        "absent": (RELEASED_LOST, RELEASED_LOST),
        "in flight": (RELEASED, no("fenced")),
        "lapsed": (RELEASED, no("fenced")),
        "unknown": (RELEASED, no("fenced")),
        "complete": (no("fenced"), no("fenced")),
    },
    "mark unknown": {
        "absent": (UNKNOWN_LOST, UNKNOWN_LOST),
        "in flight": (UNKNOWN, no("fenced")),
        "lapsed": (UNKNOWN, no("fenced")),
        "unknown": (UNKNOWN, no("fenced")),
        "complete": (no("fenced"), no("fenced")),
    },
    "read": {
        "absent": (no("gone"), no("gone")),
        "in flight": (no("gone"), no("gone")),
        "lapsed": (no("gone"), no("gone")),
        "unknown": (no("gone"), no("gone")),
        "complete": (no("chunks"), no("gone")),
    },
}
ROWS = [
    pytest.param(verb, state, own, *expected[not own], id=f"{verb}-{state}-{'own' if own else 'foreign'}")
    for verb, states in TABLE.items()
    for state, expected in states.items()
    for own in (True, False)
]


def assert_became(client: Redis, became: str, before: dict[str, bytes], owner: Claim, own: bool) -> None:
    """Check the whole record, its lease and its retention."""
    after, now_ms = fields(client), server_ms(client)
    lease_anew = started_anew(int(after.get("lease", b"0")) - now_ms, LEASE_MS)
    left_ms = client.pttl(NAME)
    retention_anew, unknown_anew = started_anew(left_ms, RETENTION_MS), started_anew(left_ms, UNKNOWN_RETENTION_MS)
    token = owner.token if own else FOREIGN
    match became:
        case "as before":
            assert after == before
            assert not retention_anew
            assert not unknown_anew
        case "absent":
            assert after == {}
        case "claimed":
            assert after.keys() == {
                "state",
                "token",
                "fence",
                "mode",
                "fingerprint",
                "self",
                "lease",
                "created",
                "lease_ms",
            }
            assert (after["state"], after["mode"], after["fingerprint"]) == (b"in_flight", b"hold", SAME)
            assert after["self"] == self_check(KEY, TENANT, after["token"], b"hold", SAME)
            assert (after["token"] == owner.token) == own
            assert int(after["fence"]) > int(owner.fence)
            assert now_ms - LEASE_MS < int(after["created"]) <= now_ms
            assert lease_anew
            assert unknown_anew
        case "lease and retention anew":
            assert {**after, "lease": b"", "stage": b""} == {**before, "lease": b"", "stage": b""}
            assert lease_anew
            assert unknown_anew
        case "chunk and lease anew":
            assert {**after, "lease": b""} == {**before, "lease": b"", "b0": b"chunk", "bytes": b"5"}
            assert lease_anew
            assert not retention_anew
            assert not unknown_anew
        case "complete" | "complete, no body":
            kept = became == "complete"
            who = replace(owner, token=token)
            assert after == {"meta": pack(who, answer(BODY, kept=kept))} | ({"b0": BODY} if kept else {})
            assert retention_anew
        case "unknown":
            assert after == {
                "state": b"unknown",
                "token": token,
                "fence": owner.fence,
                "mode": b"hold",
                "fingerprint": SAME,
                "self": owner.self_check,
                "created": b"%d" % owner.created_ms,
                "lease": b"0",
                "why": b"cut off",
            }
            assert unknown_anew
        case _:
            raise AssertionError(became)


@pytest.mark.parametrize(("verb", "state", "own", "result", "became"), ROWS)
async def test_every_verb_in_every_state(store, client, verb, state, own, result, became):
    """The result of every verb in every state, and every field of the record after it, are those of the table."""
    owner = await at(store, client, state)
    before = fields(client)
    assert await act(store, verb, owner, own) == result
    assert_became(client, became, before, owner, own)


def test_the_table_is_whole():
    """The table has every verb in every state; only a complete record can meet another response."""
    for verb, states in TABLE.items():
        assert tuple(states) == (("complete",) if verb == "store another" else STATES)


@pytest.mark.parametrize(
    ("state", "same", "other"),
    [
        ("in flight", "in_flight", "mismatch"),
        ("lapsed", "unknown", "mismatch"),
        ("complete", "replay", "mismatch"),
        ("unknown", "unknown", "mismatch"),
    ],
)
async def test_what_a_duplicate_finds(store, client, state, same, other):
    """State and fingerprint decide what a duplicate gets; a mismatch comes first, and nothing is changed."""
    await at(store, client, state)
    before = fields(client)
    assert told(await claim(store)) == same
    assert told(await claim(store, fingerprint=OTHER), OTHER) == other
    found = await store.peek(KEY, SCOPE, LEASE_MS)
    assert (told(found), told(found, OTHER)) == (same, other)
    assert fields(client) == before
    assert client.pttl(NAME) <= RETENTION_MS // 2


async def test_looking_at_a_free_key_does_not_take_it(store, client):
    """A peek at a key without a record writes none."""
    assert await store.peek(KEY, SCOPE, LEASE_MS) is None
    assert client.dbsize() == 0


async def test_a_replay_takes_one_round_trip(store, client):
    """The claim of a complete key returns its small response with the body."""
    await at(store, client, "complete")
    found = await claim(store)
    assert isinstance(found, Record)
    assert (found.response, found.body) == (answer(BODY), BODY)
    assert intact(found.response, found.body)


@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
@pytest.mark.parametrize("drop", ["mark unknown", "store bare", "release"])
async def test_what_is_not_kept_leaves_no_chunks_behind(store, client, state, drop):
    """Marking unknown, storing without a body and releasing remove the chunks that were appended."""
    owner = await at(store, client, state)
    for index in range(3):
        assert await store.append(owner, index, b"x" * 1000, PATIENCE_S) == AppendStatus.APPENDED
    await act(store, drop, owner, own=True)
    assert not [field for field in fields(client) if field.startswith("b")]


async def test_the_fence_only_grows(store, client):
    """Each claim has a greater fence, also after a release, and after a fence that is ahead of the clock."""
    fences = []
    for _ in range(5):
        owner = await claimed(store, b"retry")
        fences.append(int(owner.fence))
        await store.release(owner, PATIENCE_S)
    owner = await at(store, client, "lapsed", b"retry")
    ahead = int(owner.fence) + HOUR_MS * 1000
    client.hset(NAME, "fence", ahead)
    fences += [int(owner.fence), ahead, int((await claimed(store)).fence)]
    assert fences == sorted(set(fences))
    assert fences[-1] == ahead + 1


async def test_a_running_record_is_small(store, client):
    """No value of a record in flight is so long that the hash leaves the compact encoding."""
    await claimed(store)
    assert client.object("encoding", NAME) == b"listpack"
    assert client.memory_usage(NAME) < 512


@pytest.mark.parametrize("appended", [0, 1], ids=["at once", "after chunks"])
async def test_a_small_complete_record_is_written_anew(store, client, appended):
    """A small complete record has two fields, and the compact encoding where the server allows it for their sizes."""
    client.config_set("hash-max-listpack-value", 512)
    try:
        owner = await claimed(store)
        if appended:
            await store.append(owner, 0, b"x" * 5000, PATIENCE_S)
            assert client.object("encoding", NAME) == b"hashtable"
            assert await store.store(owner, answer(BODY, kept=False), b"", PATIENCE_S) == SettleResult(
                SettleStatus.STORED
            )
        else:
            assert await store_small(store, owner) == SettleResult(SettleStatus.STORED)
        assert fields(client).keys() == ({"meta"} if appended else {"meta", "b0"})
        assert client.object("encoding", NAME) == b"listpack"
    finally:
        client.config_set("hash-max-listpack-value", 64)


# Chunks ...

CHUNKS = (b"a" * 200_000, b"b" * 100_000, b"c" * 100_000, b"d" * 7)


@pytest.mark.parametrize("last", [True, False], ids=["last with the settle", "all appended"])
@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
async def test_a_large_answer_is_stored_in_chunks(store, client, state, last):
    """Chunks are appended one by one, counted by the settle, and read back as many at a time as fit."""
    owner = await at(store, client, state)
    for index, chunk in enumerate(CHUNKS[: -1 if last else None]):
        assert await store.append(owner, index, chunk, PATIENCE_S) == AppendStatus.APPENDED
    settled = await store.store(owner, answer(*CHUNKS), CHUNKS[-1] if last else b"", PATIENCE_S)
    assert settled == SettleResult(SettleStatus.STORED)
    assert fields(client) == {
        "meta": pack(owner, answer(*CHUNKS)),
        **{f"b{index}": chunk for index, chunk in enumerate(CHUNKS)},
    }
    assert started_anew(client.pttl(NAME), RETENTION_MS)
    found = await claim(store)
    assert isinstance(found, Record)
    assert found.body is None
    assert await store.read(KEY, owner.token, 0) == [CHUNKS[0]]
    assert await store.read(KEY, owner.token, 1) == list(CHUNKS[1:])
    assert await store.read(KEY, owner.token, 4) == ReadFailure.INCOMPLETE


async def test_a_repeated_append_is_harmless(store, client):
    """An append with the same index and bytes counts once; with other bytes it is incomplete and changes nothing."""
    owner = await claimed(store)
    assert await store.append(owner, 0, b"abc", PATIENCE_S) == AppendStatus.APPENDED
    client.hset(NAME, "lease", server_ms(client))
    assert await store.append(owner, 0, b"abc", PATIENCE_S) == AppendStatus.APPENDED
    assert started_anew(int(fields(client)["lease"]) - server_ms(client), LEASE_MS)
    before = fields(client)
    assert await store.append(owner, 0, b"abd", PATIENCE_S) == AppendStatus.INCOMPLETE
    assert await store.append(owner, 0, b"", PATIENCE_S) == AppendStatus.INCOMPLETE
    assert fields(client) == before
    assert before["bytes"] == b"3"
    assert await store.store(owner, answer(b"abc", b"d"), b"d", PATIENCE_S) == SettleResult(SettleStatus.STORED)


async def test_chunks_may_come_in_any_order(store, client):
    """A chunk that overtook another gives the same record."""
    owner = await claimed(store)
    for index in (2, 0, 1):
        assert await store.append(owner, index, b"%d" % index, PATIENCE_S) == AppendStatus.APPENDED
    assert await store.store(owner, answer(b"0", b"1", b"2"), b"", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    assert await store.read(KEY, owner.token, 0) == [b"0", b"1", b"2"]


TORN = {
    "one missing": ([(0, b"ab")], answer(b"ab", b"cd", b"e"), b"e"),
    "the first missing": ([(1, b"cd")], answer(b"ab", b"cd", b"e"), b"e"),
    "all missing": ([], answer(b"ab", b"cd", b"e"), b"e"),
    "the last missing": ([(0, b"ab"), (1, b"cd")], answer(b"ab", b"cd", b"e"), b""),
    "the only one missing": ([], answer(b"ab"), b""),
    "one too many": ([(0, b"ab"), (1, b"cd"), (2, b"e")], answer(b"ab", b"cd"), b""),
    "one shorter": ([(0, b"a")], answer(b"ab", b"cd"), b"cd"),
    "the last shorter": ([(0, b"ab")], answer(b"ab", b"cd"), b"c"),
}


@pytest.mark.parametrize(("appended", "stored", "last"), TORN.values(), ids=TORN.keys())
async def test_a_record_that_lacks_chunks_is_not_made_complete(store, client, appended, stored, last):
    """The settle is incomplete and changes nothing; the response can still be stored without its body."""
    owner = await claimed(store)
    for index, chunk in appended:
        assert await store.append(owner, index, chunk, PATIENCE_S) == AppendStatus.APPENDED
    before = fields(client)
    assert await store.store(owner, stored, last, PATIENCE_S) == SettleResult(SettleStatus.INCOMPLETE)
    assert fields(client) == before
    assert await store.store(owner, replace(stored, body_stored=False), b"", PATIENCE_S) == SettleResult(
        SettleStatus.STORED
    )
    assert told(await claim(store)) == "not_kept"


# A record that vanished ...


@pytest.mark.parametrize("gone", ["whole", "appended before", "appended since"])
async def test_a_large_answer_whose_record_vanished_is_torn(store, client, gone):
    """A record that vanished took its chunks along: nothing is stored under a key that has only some of them."""
    owner = await claimed(store)
    if gone == "appended before":
        await store.append(owner, 0, b"ab", PATIENCE_S)
    client.delete(NAME)
    if gone == "appended since":
        assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.ABSENT
    assert await store.store(owner, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.INCOMPLETE)
    assert client.dbsize() == 0
    settled = await store.store(owner, answer(b"ab", b"cd", kept=False), b"", PATIENCE_S)
    assert settled == SettleResult(SettleStatus.STORED, record_was_gone=True)
    assert told(await claim(store)) == "not_kept"


@pytest.mark.fault(36)
@pytest.mark.parametrize("verb", ["append", "renew", "store", "store bare", "release", "mark unknown"])
@pytest.mark.parametrize("by_then", ["in flight", "lapsed", "unknown", "complete"])
async def test_a_record_that_vanished_and_was_claimed_by_another(store, client, verb, by_then):
    """The first owner is fenced by every verb, and the other's record stays as it is."""
    owner = await at(store, client, "absent")
    await at(store, client, by_then)
    before = fields(client)
    assert await act(store, verb, owner, own=True) == "fenced"
    assert fields(client) == before


async def test_a_claim_is_claimed_again_before_sending(store, client):
    """A reclaim gets its own record back, or a new one if there is none; another's record is returned."""
    owner = await claimed(store)
    again = await store.reclaim(owner, SCOPE)
    assert again == owner
    client.delete(NAME)
    again = await store.reclaim(owner, SCOPE)
    assert isinstance(again, Claim)
    assert (again.token, int(again.fence) > int(owner.fence)) == (owner.token, True)
    client.delete(NAME)
    await claimed(store)
    assert told(await store.reclaim(owner, SCOPE)) == "in_flight"


# Where the record's own mode is retry ...

RETRY = [
    ("retry", "in flight", "in_flight", "mismatch"),
    ("retry", "lapsed", "claimed", "mismatch"),
    ("retry", "unknown", "claimed", "mismatch"),
    ("retry", "complete", "replay", "mismatch"),
    ("hold", "in flight", "in_flight", "mismatch"),
    ("hold", "lapsed", "unknown", "mismatch"),
    ("hold", "unknown", "unknown", "mismatch"),
    ("hold", "complete", "replay", "mismatch"),
]


@pytest.mark.fault(22, 33, 47)
@pytest.mark.parametrize("asked", [b"hold", b"retry"])
@pytest.mark.parametrize(("mode", "state", "same", "other"), RETRY)
async def test_an_unknown_key_is_claimed_anew_where_its_record_allows_it(
    store, client, mode, state, same, other, asked
):
    """The record's mode decides, not the newcomer's: a new token, a greater fence, the same fingerprint only."""
    owner = await at(store, client, state, mode.encode())
    if state in ("in flight", "lapsed"):
        await store.append(owner, 0, b"x", PATIENCE_S)
        client.hset(NAME, "lease", server_ms(client) + (LEASE_MS // 2 if state == "in flight" else -1))
    before = fields(client)
    assert told(await claim(store, fingerprint=OTHER, mode=asked), OTHER) == other
    assert fields(client) == before
    found = await claim(store, mode=asked)
    assert told(found) == same
    if not isinstance(found, Claim):
        assert fields(client) == before
        return
    assert found.token != owner.token
    assert int(found.fence) > int(owner.fence)
    after = fields(client)
    assert after.keys() == {"state", "token", "fence", "mode", "fingerprint", "self", "lease", "created", "lease_ms"}
    assert (after["state"], after["token"], after["mode"]) == (b"in_flight", found.token, asked)
    assert started_anew(int(after["lease"]) - server_ms(client), LEASE_MS)
    assert started_anew(client.pttl(NAME), UNKNOWN_RETENTION_MS)
    for verb in ("append", "renew", "store", "store bare", "release", "mark unknown"):
        assert await act(store, verb, owner, own=True) == "fenced"
    assert fields(client) == after


async def test_the_owner_itself_claims_anew_what_it_had_given_up(store, client):
    """An owner takes its own unknown record over where the mode is retry, with a greater fence."""
    owner = await at(store, client, "unknown", b"retry")
    again = await store.reclaim(owner, SCOPE)
    assert isinstance(again, Claim)
    assert int(again.fence) > int(owner.fence)
    assert fields(client)["state"] == b"in_flight"
    assert await store.renew(again) == RenewStatus.RENEWED


@pytest.mark.parametrize("became", ["renewed", "taken", "stored", "damaged"])
async def test_a_takeover_needs_the_record_that_was_checked(relay, valkey, became):
    """A record that changed between the check and the takeover is not overwritten."""
    async with connected(relay.url) as store, connected(valkey.url) as elsewhere:
        with valkey.client() as client:
            owner = await at(elsewhere, client, "lapsed", b"retry")
            asked = store._servers.claim

            async def meanwhile(call: ScriptCall, head: bytes, tail: bytes, left_s: float) -> Any:
                reply = await asked(call, head, tail, left_s)
                if tail == PLAIN_TAIL:  # nothing seen yet
                    match became:
                        case "renewed":
                            assert await elsewhere.renew(owner) == RenewStatus.RENEWED
                        case "taken":
                            assert isinstance(await claim(elsewhere, mode=b"retry"), Claim)
                        case "stored":
                            assert await store_small(elsewhere, owner) == SettleResult(SettleStatus.STORED)
                        case _:
                            client.hset(NAME, mapping={"token": FOREIGN, "self": b"x"})
                    meanwhile.before = fields(client)
                return reply

            store._servers.claim = meanwhile
            found = await claim(store)
            expected = {"stored": "replay", "damaged": "corrupt"}.get(became, "in_flight")
            assert told(found) == expected
            assert fields(client) == meanwhile.before


async def test_of_many_newcomers_one_takes_an_open_key_over(store, client):
    """Of fifty claims that checked the same open record, one takes it over; the others get the new record."""
    await at(store, client, "unknown", b"retry")
    found = await asyncio.gather(*[claim(store, mode=b"retry") for _ in range(50)])
    assert sorted(map(told, found)) == ["claimed"] + ["in_flight"] * 49


# Derived keys have a window ...

WINDOWED = [
    ("complete", 0, HOUR_MS, "complete"),
    ("complete", WINDOW_MS, WINDOW_MS // 2, "complete"),
    ("complete", WINDOW_MS, WINDOW_MS + 1, "claimed"),
    ("complete", WINDOW_MS, -HOUR_MS, "complete"),
    ("in flight", WINDOW_MS, WINDOW_MS + 1, "in_flight"),
    ("lapsed", WINDOW_MS, WINDOW_MS + 1, "in_flight"),
    ("unknown", WINDOW_MS, WINDOW_MS + 1, "unknown"),
]


@pytest.mark.parametrize(("state", "window_ms", "age_ms", "result"), WINDOWED)
async def test_a_derived_key_is_free_again_after_its_window(store, client, state, window_ms, age_ms, result):
    """Only a complete record older than the window is replaced, and nothing of its response is left."""
    owner = await at(store, client, state)
    created_ms = server_ms(client) - age_ms
    if state == "complete":
        client.hset(NAME, "meta", pack(replace(owner, created_ms=created_ms), answer(BODY)))
    else:
        client.hset(NAME, "created", created_ms)
    before = fields(client)
    late = claim_raw(client, window_ms=window_ms, not_after_ms=server_ms(client) - 1, seen=owner.token)
    assert late[0].decode() == (state if state in ("unknown", "complete") else "in_flight")
    for seen in (b"", FOREIGN):  # unchecked, or checked and then replaced
        assert claim_raw(client, window_ms=window_ms, seen=seen)[0] == late[0]
    assert fields(client) == before
    word, _, *facts = claim_raw(client, window_ms=window_ms, seen=owner.token)
    assert word.decode() == result
    if result != "claimed":
        assert fields(client) == before
        return
    assert int(facts[0]) > int(owner.fence)
    after = fields(client)
    assert after.keys() == {"state", "token", "fence", "mode", "fingerprint", "self", "lease", "created", "lease_ms"}
    assert (after["token"], after["fence"]) == (FOREIGN, facts[0])
    assert started_anew(client.pttl(NAME), RETENTION_MS)
    assert await act(store, "store", owner, own=True) == "fenced"


async def test_the_lease_of_a_view_does_not_grow_when_the_clock_steps_back(store, client):
    await claimed(store)
    client.hset(NAME, "lease", server_ms(client) + 3_600_000)
    view = await store.records.read(KEY)
    assert view.lease_left_ms == LEASE_MS


# Delayed, repeated and reordered ...

LATE = [
    ("store", "append", "complete"),
    ("store", "renew", "complete"),
    ("store", "release", "fenced"),
    ("store", "mark unknown", "fenced"),
    ("store", "store another", "fenced"),
    ("store", "store", "stored"),
    ("release", "append", "absent"),
    ("release", "renew", "absent"),
    ("mark unknown", "renew", "unknown"),
]


@pytest.mark.parametrize(("settle", "late", "word"), LATE)
async def test_what_comes_after_a_settle_changes_nothing(store, client, settle, late, word):
    """A delayed command of the owner that arrives after its settle changes neither record nor retention."""
    owner = await claimed(store)
    await act(store, settle, owner, own=True)
    client.pexpire(NAME, RETENTION_MS // 2)
    before = fields(client)
    assert await act(store, late, owner, own=True) == word
    assert fields(client) == before
    assert client.pttl(NAME) <= RETENTION_MS // 2


async def test_a_late_append_brings_nothing_back(store, client):
    """A chunk that arrives after its key was marked unknown leaves it unknown, and cannot be read."""
    owner = await at(store, client, "unknown")
    await store.append(owner, 0, b"late", PATIENCE_S)
    assert told(await claim(store)) == "unknown"
    assert await store.read(KEY, owner.token, 0) == ReadFailure.GONE


@pytest.mark.parametrize("mode", [b"hold", b"retry"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "foreign"])
@pytest.mark.parametrize("state", STATES)
async def test_a_claim_after_its_time_changes_nothing(store, client, state, own, mode):
    """A claim executed after not_after returns late, or the record that exists."""
    owner = await at(store, client, state, mode)
    before, left_ms = fields(client), client.pttl(NAME)
    token = owner.token if own else FOREIGN
    word = claim_raw(client, token, mode=mode, not_after_ms=server_ms(client) - 1)[0]
    assert word in (b"late", before.get("state", b"complete"))
    assert (word == b"late") == (state == "absent" or (own and state in ("in flight", "lapsed")))
    assert fields(client) == before
    assert client.pttl(NAME) <= left_ms
    assert client.exists(NAME) == (state != "absent")


@pytest.mark.fault(10)
async def test_a_claim_that_was_held_up_on_its_way_never_lands(relay, valkey):
    """A claim that the server executes after the store gave it up leaves the key free."""
    async with connected(relay.url, timeout_ms=300) as store:
        relay.hold()
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        assert relay.scripts == 0
        with valkey.client() as client:
            client.config_resetstat()
            relay.let_go()
            await until(lambda: "cmdstat_evalsha" in client.info("commandstats"))
        assert valkey.records() == {}
        assert told(await claim(store)) == "claimed"


LIFE = {
    1: "claim",
    2: "append",
    3: "append",
    4: "renew",
    5: "store",
    6: "claim of a duplicate",
    7: "read",
    8: "none",
}


@pytest.mark.fault(8, 49)
@pytest.mark.parametrize("number", LIFE, ids=LIFE.values())
async def test_whichever_reply_is_lost_the_key_is_executed_once_and_replayed(relay, number):
    """Each call of a key's life loses its reply once; its retry finds what was done, and nothing is lost."""
    async with connected(relay.url) as store:
        relay.lose_reply(number)
        owner = await claimed(store)
        for index, chunk in enumerate((b"ab", b"cd")):
            assert await store.append(owner, index, chunk, PATIENCE_S) == AppendStatus.APPENDED
        assert await store.renew(owner) == (RenewStatus.UNCONFIRMED if LIFE[number] == "renew" else RenewStatus.RENEWED)
        assert await store.store(owner, answer(b"ab", b"cd", b"e"), b"e", PATIENCE_S) == SettleResult(
            SettleStatus.STORED
        )
        found = await claim(store)
        assert isinstance(found, Record)
        assert found.response == answer(b"ab", b"cd", b"e")
        chunks = await store.read(KEY, found.token, 0)
        assert chunks == (ReadFailure.UNCONFIRMED if LIFE[number] == "read" else [b"ab", b"cd", b"e"])
        assert relay.lost == (LIFE[number] != "none")


@pytest.mark.fault(21, 49)
@pytest.mark.parametrize(
    ("verb", "became"),
    [("store", "replay"), ("store bare", "not_kept"), ("mark unknown", "unknown"), ("release", "claimed")],
)
async def test_a_settle_whose_reply_was_lost_is_repeated(relay, verb, became):
    """The retry returns what was done and reports no loss, because the record was there."""
    async with connected(relay.url) as store:
        owner = await claimed(store)
        relay.lose_reply()
        result = await act(store, verb, owner, own=True)
        assert relay.lost == 1
        assert result == {"replay": "stored", "not_kept": "stored", "claimed": "released"}.get(became, became)
        assert told(await claim(store)) == became


@pytest.mark.fault(11, 21)
@pytest.mark.parametrize("verb", ["store", "release", "mark unknown"])
async def test_a_settle_that_gets_noscript_and_then_loses_its_reply(relay, valkey, verb):
    """A settle that is sent by its body, and loses its reply then, reports no loss."""
    async with connected(relay.url) as store:
        owner = await claimed(store)
        with valkey.client() as client:
            client.script_flush()
        relay.lose_reply(2)  # NOSCRIPT is the first
        result = await act(store, verb, owner, own=True)
        assert relay.lost == 1
        assert result in ("stored", "released", "unknown")


@pytest.mark.fault(49)
@pytest.mark.parametrize(("verb", "word"), [("store", "fenced"), ("release", "released"), ("mark unknown", "fenced")])
async def test_a_key_that_was_given_to_another_before_the_repeat(relay, valkey, verb, word):
    """The settle is done, its reply lost, an operator frees the key and it is claimed anew: the repeat is fenced.

    Not that of a release: its own first try freed the key, and whoever claims it then is no conflict.
    """
    async with connected(relay.url) as store, connected(valkey.url) as elsewhere:
        owner = await claimed(store)
        relay.lose_reply(then_unreachable=True)
        settling = asyncio.ensure_future(act(store, verb, owner, own=True))
        await until(lambda: relay.lost)
        with valkey.client() as client:
            client.delete(NAME)
            other = await claimed(elsewhere)
            before = fields(client)
            relay.unreachable = False
            assert await settling == word
            assert fields(client) == before
        assert before["token"] == other.token


@pytest.mark.fault(9)
async def test_a_claim_without_a_reply_from_a_store_that_stays_away(relay, valkey):
    """A claim whose reply was lost is unconfirmed within its time, and is freed once the store is back."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=400, behind=behind) as store:
        relay.lose_reply(then_unreachable=True)
        began = asyncio.get_running_loop().time()
        found = await claim(store)
        assert asyncio.get_running_loop().time() - began < 5
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        assert valkey.states() == [b"in_flight"]
        assert len(behind.works) == 1
        freeing = asyncio.ensure_future(behind.run())
        relay.unreachable = False
        await freeing
        assert valkey.states() == []
        assert told(await claim(store)) == "claimed"


@pytest.mark.fault(9)
async def test_a_claim_that_was_given_up_is_withdrawn_however_long_the_store_stays_away(relay, valkey):
    """After an outage longer than the patience the key is free, because nothing was sent for it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=200, patience_s=0.2, behind=behind) as store:
        relay.lose_reply(then_unreachable=True)
        assert isinstance(await claim(store), Unconfirmed)
        freeing = asyncio.ensure_future(behind.run())
        await asyncio.sleep(1.5)
        assert not freeing.done()
        assert valkey.states() == [b"in_flight"]
        relay.unreachable = False
        await freeing
        assert valkey.states() == []


@pytest.mark.fault(9)
@pytest.mark.parametrize("lapsed", [False, True], ids=["in flight", "lapsed"])
async def test_a_claim_that_was_given_up_stands_in_nobodys_way(relay, valkey, lapsed):
    """A retry before the withdrawal gets the key: the same worker knows that nothing was sent for it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=300, behind=behind) as store:
        relay.lose_reply(then_unreachable=True)
        assert isinstance(await claim(store), Unconfirmed)
        assert valkey.states() == [b"in_flight"]
        if lapsed:
            with valkey.client() as client:
                client.hset(NAME, "lease", 1)
        relay.unreachable = False
        assert await store.wait_up(PATIENCE_S)
        assert told(await claim(store, fingerprint=OTHER)) == "claimed"
        before = valkey.records()
        await behind.run()
        assert valkey.records() == before


@pytest.mark.fault(9)
async def test_a_claim_whose_caller_was_cancelled_is_withdrawn(relay, valkey):
    """A cancelled claim is held by nobody, so its key is freed in the background."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=300, behind=behind) as store:
        relay.hold()
        claiming = asyncio.ensure_future(claim(store))
        await asyncio.sleep(0.05)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        relay.let_go()
        await until(lambda: valkey.states() == [b"in_flight"])
        await behind.run()
        assert valkey.states() == []


async def held_up(relay: Relay, claiming: Coroutine[Any, Any, Any]) -> str:
    """Claim so that the first command is delayed, and a retry on another connection gets its reply."""
    relay.hold()
    task = asyncio.ensure_future(claiming)
    await asyncio.sleep(0.05)
    relay.cut()
    return told(await task)


async def arrives(relay: Relay, valkey: Valkey) -> None:
    """Let the delayed command reach the server."""
    with valkey.client() as client:
        client.config_resetstat()
        relay.let_go()
        await until(lambda: "cmdstat_evalsha" in client.info("commandstats"))


@pytest.mark.fault(10)
async def test_a_claim_that_was_held_up_while_its_repeat_was_refused(relay, valkey):
    """The retry finds another owner; the delayed first try, arriving when the key is free, does not keep it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=1000, behind=behind) as store, connected(valkey.url) as other:
        owner = await claimed(other)
        assert await held_up(relay, claim(store)) == "in_flight"
        assert await other.release(owner, PATIENCE_S) == SettleResult(SettleStatus.RELEASED)
        await arrives(relay, valkey)
        await behind.run()
        assert valkey.states() == []


@pytest.mark.fault(10)
@pytest.mark.parametrize("again", [False, True], ids=["claimed", "claimed again"])
async def test_a_claim_that_was_held_up_while_its_repeat_went_through(relay, valkey, again):
    """The retry gets the key and releases it; the delayed first try does not keep it."""
    behind = Behind()
    async with connected(relay.url, timeout_ms=1000, behind=behind) as store:
        if again:
            owner = await claimed(store)
            assert await held_up(relay, store.reclaim(owner, SCOPE)) == "claimed"
        else:
            assert await held_up(relay, claim(store)) == "claimed"
            (record,) = valkey.records().values()
            owner = Claim(
                KEY, record[b"token"], b"", b"hold", SAME, b"", 0, LEASE_MS, RETENTION_MS, UNKNOWN_RETENTION_MS
            )
        assert await store.release(owner, PATIENCE_S) == SettleResult(SettleStatus.RELEASED)
        await arrives(relay, valkey)
        await behind.run()
        assert valkey.states() == []


# The clocks ...


@pytest.mark.fault(58)
@pytest.mark.parametrize(("mode", "result"), [(b"hold", "unknown"), (b"retry", "claimed")])
async def test_the_servers_clock_steps_forward(store, client, mode, result):
    """Leases end early: the key is unknown, or claimed anew where the mode is retry, and the old owner is fenced."""
    owner = await at(store, client, "in flight", mode)
    client.hincrby(NAME, "lease", -HOUR_MS)
    client.hincrby(NAME, "created", -HOUR_MS)
    assert told(await claim(store)) == result
    assert await store.renew(owner) == (RenewStatus.RENEWED if result == "unknown" else RenewStatus.FENCED)


@pytest.mark.fault(58)
async def test_the_servers_clock_steps_back(store, client):
    """A lease that seems to last for an hour begins anew at the first look, with its owner's length, and then ends."""
    owner = await at(store, client, "in flight")
    for look in (lambda: claim(store), lambda: store.peek(KEY, SCOPE, 500)):
        client.hincrby(NAME, "lease", HOUR_MS)
        client.hincrby(NAME, "created", HOUR_MS)
        for elapsed_ms, left_ms in ((0, LEASE_MS), (LEASE_MS // 2, LEASE_MS // 2), (LEASE_MS, -LEASE_MS // 2)):
            client.hincrby(NAME, "lease", -elapsed_ms)
            found = await look()
            assert isinstance(found, Record)
            assert left_ms - 1000 <= found.lease_left_ms <= left_ms
    assert await store.renew(owner) == RenewStatus.RENEWED
    assert started_anew(int(fields(client)["lease"]) - server_ms(client), LEASE_MS)


@pytest.mark.fault(57, 58)
@pytest.mark.parametrize("step_ms", [-HOUR_MS, HOUR_MS])
async def test_what_the_store_believes_of_the_servers_clock_may_be_wrong(store, client, step_ms):
    """An hour off either way, the first reply corrects the clock, and the claim succeeds within its time."""
    store._servers._clock.offset_ms += step_ms
    await claimed(store)
    assert abs(store.now_ms(KEY) - server_ms(client)) < 5000


# A server that has forgotten the scripts ...


@pytest.mark.fault(11)
@pytest.mark.parametrize(("verb", "state", "own", "result", "became"), [row for row in ROWS if row.values[2]])
async def test_a_server_without_the_scripts_is_given_them(store, client, verb, state, own, result, became):
    """After SCRIPT FLUSH every verb works as before."""
    owner = await at(store, client, state)
    before = fields(client)
    client.script_flush()
    assert await act(store, verb, owner, own) == result
    assert_became(client, became, before, owner, own)


@pytest.mark.fault(11)
async def test_scripts_that_vanish_at_any_moment(store, client):
    """300 keys are claimed and stored while the scripts are flushed all the time: each has its own response, once."""
    going = True

    async def flush() -> None:
        while going:
            client.script_flush()
            await asyncio.sleep(0.001)

    async def live(number: int) -> None:
        key = b"%024d" % number
        owner = await claimed(store, key=key)
        body = b"of %d" % number
        await store.append(owner, 0, body, PATIENCE_S)
        assert await store.renew(owner) == RenewStatus.RENEWED
        assert await store.store(owner, answer(body, body), body, PATIENCE_S) == SettleResult(SettleStatus.STORED)
        assert await store.read(key, owner.token, 0) == [body, body]

    flushing = asyncio.ensure_future(flush())
    await asyncio.gather(*[live(number) for number in range(300)])
    going = False
    await flushing
    assert client.dbsize() == 300


async def test_callers_that_stop_waiting_do_not_shift_the_others(store, client):
    """Of 200 concurrent claims some are cancelled at any moment; each of the others gets its own key."""
    dice = random.Random(11)

    async def one(number: int) -> Claim:
        await asyncio.sleep(dice.random() * 0.02)
        return await claimed(store, key=b"%024d" % number)

    tasks = [asyncio.ensure_future(one(number)) for number in range(200)]
    for task in dice.sample(tasks, 80):
        asyncio.get_running_loop().call_later(dice.random() * 0.03, task.cancel)
    for number, found in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
        if isinstance(found, Claim):
            assert found.key == b"%024d" % number
            assert fields(client, store_key(found.key))["token"] == found.token
        else:
            assert isinstance(found, asyncio.CancelledError)
    assert told(await claim(store)) == "claimed"


# At the memory limit ...


@pytest.mark.parametrize(
    ("state", "same", "other"),
    [
        ("complete", "replay", "mismatch"),
        ("in flight", "in_flight", "mismatch"),
        ("lapsed", "unknown", "mismatch"),
        ("unknown", "unknown", "mismatch"),
    ],
)
async def test_a_full_server_still_tells_what_it_has(store, client, state, same, other):
    """At the memory limit existing records are replayed and compared, because that writes nothing."""
    await at(store, client, state)
    client.config_set("maxmemory", 1)
    found = await claim(store)
    assert told(found) == same
    assert told(await claim(store, fingerprint=OTHER), OTHER) == other
    if state == "complete":
        assert (found.response, found.body) == (answer(BODY), BODY)
        assert await store.read(KEY, found.token, 0) == [BODY]


@pytest.mark.fault(13)
@pytest.mark.parametrize("forgotten", [False, True], ids=["", "scripts flushed"])
@pytest.mark.parametrize(
    ("verb", "state", "own", "result", "became"),
    [
        row
        for row in ROWS
        if row.values[0] in ("renew", "store", "store bare", "release", "mark unknown") and row.values[1] != "absent"
    ],
)
async def test_a_full_server_lets_running_work_complete(store, client, verb, state, own, result, became, forgotten):
    """At the memory limit renew and settle work as anywhere."""
    owner = await at(store, client, state)
    before = fields(client)
    client.config_set("maxmemory", 1)
    if forgotten:
        client.script_flush()
    assert await act(store, verb, owner, own) == result
    client.config_set("maxmemory", 0)
    assert_became(client, became, before, owner, own)


async def test_a_full_server_stores_the_end_of_a_streamed_answer(store, client):
    """Chunks appended before the memory limit, and the last chunk, become a complete record."""
    owner = await claimed(store)
    assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
    client.config_set("maxmemory", 1)
    assert await store.store(owner, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    assert await store.read(KEY, owner.token, 0) == [b"ab", b"cd"]


async def test_a_full_server_takes_no_more_chunks(store, client):
    """At the memory limit an append is refused as a whole; the response can then be stored without its body."""
    owner = await claimed(store)
    assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
    before = fields(client)
    client.config_set("maxmemory", 1)
    assert await store.append(owner, 1, b"cd", PATIENCE_S) == AppendStatus.NO_MEMORY
    assert fields(client) == before
    assert await store.store(owner, answer(b"ab", b"cd", kept=False), b"", PATIENCE_S) == SettleResult(
        SettleStatus.STORED
    )
    assert told(await claim(store)) == "not_kept"


@pytest.mark.fault(13)
async def test_a_full_server_refuses_new_claims(server, client):
    """A claim's first write is refused at the memory limit: nothing is written, and nothing is to be cleaned up."""
    behind = Behind()
    async with connected(server.url, behind=behind) as store:
        client.config_set("maxmemory", 1)
        began = asyncio.get_running_loop().time()
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert found.reason.startswith("OOM")
        assert not found.maybe_executed
        assert asyncio.get_running_loop().time() - began < 5
        assert behind.works == []
        assert client.dbsize() == 0
        client.config_set("maxmemory", 0)
        assert told(await claim(store)) == "claimed"


@pytest.mark.fault(13)
@pytest.mark.parametrize("state", ["lapsed", "unknown", "complete"])
async def test_a_full_server_refuses_takeovers_too(store, client, state):
    """A takeover is refused at the memory limit like a new claim; the record stays as it was, and decides."""
    owner = await at(store, client, state, b"retry")
    if state == "complete":
        client.hset(NAME, "meta", pack(replace(owner, created_ms=1), answer(BODY)))
    before = fields(client)
    client.config_set("maxmemory", 1)
    found = await claim(store, window_ms=WINDOW_MS)
    if state == "complete":  # of a window that is over: the request is a new one
        assert isinstance(found, StoreFull)
        assert (found.reason[:3], found.maybe_executed) == ("OOM", False)
    else:
        assert told(found) == "unknown"
    assert fields(client) == before
    client.config_set("maxmemory", 0)
    assert told(await claim(store, window_ms=WINDOW_MS)) == "claimed"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect the server's health more often than every two seconds."""
    monkeypatch.setattr("oncegate.store.redis.node.HEALTH_S", 0.05)


@pytest.fixture
async def watched(store: Store, often: None) -> AsyncIterator[Store]:
    task = asyncio.ensure_future(store.watch())
    yield store
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_above_nine_tenths_of_its_memory_the_store_is_full(watched, client):
    """Above 90 % of the memory limit the store is full; below it, and without a limit, it is not."""
    used = client.info("memory")["used_memory"]
    for limit, full in ((0, False), (used * 2, False), (int(used / 0.96), True), (1, True), (used * 2, False)):
        client.config_set("maxmemory", limit)
        await until(lambda full=full: watched.full() is full)
        assert watched.full() is (watched.memory_ratio > 0.9)
        if limit in (0, used * 2):
            await until(lambda expected=used / limit if limit else 0: abs(watched.memory_ratio - expected) < 0.2)


@pytest.mark.fault(14)
async def test_a_server_that_may_forget_keys_is_a_problem(watched, client):
    """Any eviction policy but noeviction is a problem for as long as it is set."""
    await until(lambda: watched.not_ready_reason() is None)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        await until(lambda: watched.not_ready_reason() is not None)
        assert "allkeys-lru" in watched.not_ready_reason()
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    await until(lambda: watched.not_ready_reason() is None)


# Damaged records ...


def damaged(value: bytes) -> Iterator[bytes]:
    """Return the value with each byte changed, once a little and once entirely, and cut short."""
    for place in range(len(value)):
        for mask in (0x01, 0x80, 0xFF):
            yield value[:place] + bytes([value[place] ^ mask]) + value[place + 1 :]
        yield value[:place]


@pytest.mark.fault(55)
async def test_a_complete_record_that_was_damaged_is_corrupt(store, client):
    """Whichever byte was damaged, the record is never replayed, never claimed, and not changed."""
    await at(store, client, "complete")
    meta = client.hget(NAME, "meta")
    for wrong in damaged(meta):
        client.hset(NAME, "meta", wrong)
        assert isinstance(await claim(store), Corrupt), wrong
        assert client.hget(NAME, "meta") == wrong


async def test_a_stored_body_that_was_damaged_is_not_intact(store, client):
    """A body with any byte changed, or without one, is not intact."""
    await at(store, client, "complete")
    for wrong in damaged(BODY):
        client.hset(NAME, "b0", wrong)
        found = await claim(store)
        assert isinstance(found, Record)
        assert not intact(found.response, found.body)
    client.hdel(NAME, "b0")
    found = await claim(store)
    assert isinstance(found, Record)
    assert not intact(found.response, found.body or b"")


@pytest.mark.fault(55)
@pytest.mark.parametrize("mode", [b"hold", b"retry"])
@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
@pytest.mark.parametrize("field", ["state", "token", "mode", "fingerprint", "self"])
async def test_a_running_record_that_was_damaged_is_corrupt(store, client, state, field, mode):
    """A record in flight or unknown with a damaged or missing field is never claimed, whatever its mode."""
    await at(store, client, state, mode)
    value = client.hget(NAME, field)
    for wrong in [*damaged(value), None]:
        client.hdel(NAME, field) if wrong is None else client.hset(NAME, field, wrong)
        before = fields(client)
        assert isinstance(await claim(store), Corrupt), wrong
        assert fields(client) == before


@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown"])
@pytest.mark.parametrize("field", ["lease", "created", "fence"])
async def test_a_damaged_time_or_fence_frees_no_key(store, client, state, field):
    """Damage to a time or a fence may read as another number, never as a free or complete key."""
    await at(store, client, state)
    value = client.hget(NAME, field)
    for wrong in [*damaged(value), b"-1", b"nan", b"inf", b"-inf", b"1e300", b"9" * 40, None]:
        client.hdel(NAME, field) if wrong is None else client.hset(NAME, field, wrong)
        before = fields(client)
        assert told(await claim(store)) in ("in_flight", "unknown", "corrupt"), wrong
        # A lease that seems too long begins anew.
        assert {**fields(client), "lease": b""} == {**before, "lease": b""}


@pytest.mark.parametrize("state", ["lapsed", "unknown"])
async def test_a_state_that_nobody_knows_is_not_claimed_anew(store, client, state):
    """A record in an unknown state is corrupt, also where its mode is retry."""
    await at(store, client, state, b"retry")
    value = client.hget(NAME, "state")
    for wrong in [*damaged(value), b"complete", b"claimed", b"late", None]:
        client.hdel(NAME, "state") if wrong is None else client.hset(NAME, "state", wrong)
        before = fields(client)
        assert isinstance(await claim(store), Corrupt), wrong
        assert fields(client) == before


OTHER_TYPES: dict[str, Callable[[Redis], object]] = {
    "string": lambda client: client.set(NAME, b"x"),
    "list": lambda client: client.rpush(NAME, b"x"),
    "set": lambda client: client.sadd(NAME, b"x"),
    "sorted set": lambda client: client.zadd(NAME, {b"x": 1}),
    "stream": lambda client: client.xadd(NAME, {b"meta": b"x"}),
    "hash of others": lambda client: client.hset(NAME, "x", "y"),
    "chunks alone": lambda client: client.hset(NAME, "b0", "y"),
    "empty meta": lambda client: client.hset(NAME, "meta", ""),
}


@pytest.mark.parametrize("put", OTHER_TYPES.values(), ids=OTHER_TYPES.keys())
async def test_what_is_no_record_is_corrupt(store, client, put):
    """A value of another type under the key's name is neither claimed nor removed."""
    put(client)
    before = client.dump(NAME)
    assert isinstance(await claim(store), Corrupt)
    assert isinstance(await claim(store, mode=b"retry"), Corrupt)
    assert isinstance(await store.peek(KEY, SCOPE, LEASE_MS), Corrupt)
    assert client.dump(NAME) == before


@pytest.mark.fault(55)
@pytest.mark.parametrize("mode", [b"hold", b"retry"])
@pytest.mark.parametrize("state", ["in flight", "lapsed", "unknown", "complete"])
async def test_a_record_found_in_another_place_is_corrupt(store, client, state, mode):
    """A record copied to another key, or read for another tenant, is never replayed and never claimed."""
    await at(store, client, state, mode)
    elsewhere = Digests(b"").key(SCOPE, b"key-2")
    client.copy(NAME, store_key(elsewhere))
    before = fields(client, store_key(elsewhere))
    assert isinstance(await claim(store, elsewhere, window_ms=1), Corrupt)
    assert isinstance(await claim(store, scope=Scope(b"default", b"N" * 16), window_ms=1), Corrupt)
    assert isinstance(await store.peek(elsewhere, SCOPE, LEASE_MS), Corrupt)
    assert fields(client, store_key(elsewhere)) == before
    assert not isinstance(await claim(store), Corrupt)


@pytest.mark.fault(55)
async def test_a_record_of_a_newer_layout_is_corrupt(store, client):
    """A proxy does not guess the layout of a newer version."""
    await at(store, client, "complete")
    client.hset(NAME, "meta", b"\x03" + client.hget(NAME, "meta")[1:])
    assert await claim(store) == Corrupt("unknown layout")


# Error replies ...

ERRORS = (
    b"-LOADING Redis is loading the dataset in memory\r\n",
    b"-READONLY You can't write against a read only replica.\r\n",
    b"-BUSY Redis is busy running a script.\r\n",
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    b"-MOVED 3999 127.0.0.1:6381\r\n",
    b"-ASK 3999 127.0.0.1:6381\r\n",
    b"-CLUSTERDOWN The cluster is down\r\n",
    b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
    b"-NOPERM this user has no permissions to run the 'evalsha' command\r\n",
    b"-ERR what now\r\n",
)
ERROR_NAMES = [error.split()[0].decode() for error in ERRORS]


@pytest.fixture
async def scripted() -> AsyncIterator[RespServer]:
    server = RespServer()
    await server.start()
    yield server
    server.close()


def tokens(scripted: RespServer) -> list[bytes]:
    return [words[5] for words in scripted.calls]


@pytest.mark.fault(12)
@pytest.mark.parametrize("error", ERRORS, ids=ERROR_NAMES)
async def test_a_claim_that_gets_errors_is_repeated_within_its_budget(scripted, error):
    """A claim that gets errors is repeated with one token until its time is over, and leaves nothing behind."""
    behind, demoted = Behind(), error.startswith((b"-READONLY", b"-MASTERDOWN"))
    full = error.startswith(b"-OOM")
    scripted.script = lambda connection, words: error
    async with connected(scripted.url, timeout_ms=150, behind=behind) as store:
        found = await claim(store)
        detail = found.reason if demoted else error[1:-2].decode()
        assert found == (StoreFull if full else Unconfirmed)(detail, maybe_executed=False)
        assert behind.works == []
    # The last call asks what is known of the key, with a token that nobody has.
    assert len(set(tokens(scripted)) - {bytes(16)}) == 1
    # One for the verbs, one for large reads: an error ends neither, unless the address may lead to another server.
    assert demoted == (len(scripted.connections) > 2)
    assert len(scripted.calls) == 2 if full else 2 <= len(scripted.calls) < 10


@pytest.mark.fault(12)
@pytest.mark.parametrize("error", [one for one in ERRORS if not one.startswith(b"-OOM")])
async def test_a_claim_survives_errors_that_pass(scripted, error):
    """A retry that succeeds gets the claim with the token of the first try."""

    def script(connection: Connection, words: Words) -> bytes:
        if len(scripted.calls) < 3:
            return error
        return resp([words[4], b"claimed", 1_763_960_000_000, b"1763960000000000", 1_763_960_000_000])

    scripted.script = script
    async with connected(scripted.url) as store:
        owner = await claimed(store)
        assert tokens(scripted) == [owner.token] * 3


OWNER = Claim(
    KEY, b"t" * 16, b"1", b"hold", SAME, self_check(KEY, TENANT, b"t" * 16, b"hold", SAME), 1, 300, 1000, 2000
)
AFTER_ERRORS = {
    "append": (lambda store: store.append(OWNER, 0, b"x", 0.15), AppendStatus.UNCONFIRMED, True),
    "renew": (lambda store: store.renew(OWNER), RenewStatus.UNCONFIRMED, False),
    "store": (lambda store: store.store(OWNER, answer(BODY), BODY, 0.15), SettleResult(SettleStatus.UNCONFIRMED), True),
    "release": (lambda store: store.release(OWNER, 0.15), SettleResult(SettleStatus.UNCONFIRMED), True),
    "mark unknown": (
        lambda store: store.mark_unknown(OWNER, "why", 0.15),
        SettleResult(SettleStatus.UNCONFIRMED),
        True,
    ),
    "read": (lambda store: store.read(KEY, OWNER.token, 0), ReadFailure.UNCONFIRMED, False),
    "peek": (lambda store: store.peek(KEY, SCOPE, 300), Unconfirmed, False),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize(("call", "result", "repeats"), AFTER_ERRORS.values(), ids=AFTER_ERRORS.keys())
@pytest.mark.parametrize("error", ERRORS, ids=ERROR_NAMES)
async def test_every_other_verb_that_gets_errors_is_unconfirmed(scripted, call, result, repeats, error):
    """Every other verb is unconfirmed, after retries with the same token where it has patience."""
    scripted.script = lambda connection, words: error
    full = error.startswith(b"-OOM")
    async with connected(scripted.url) as store:
        came = await call(store)
        if result is Unconfirmed:
            assert came == (StoreFull if full else Unconfirmed)(error[1:-2].decode(), maybe_executed=False)
        else:
            no_memory = full and result is AppendStatus.UNCONFIRMED
            assert came == (AppendStatus.NO_MEMORY if no_memory else result)
    assert len(set(tokens(scripted))) == 1
    assert (len(scripted.calls) > 1) == (repeats and not full)


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"$-1\r\n", b":1\r\n", b"*0\r\n", b"*-1\r\n", resp([b"0", b"claimed"])])
async def test_a_reply_that_is_no_answer_confirms_nothing(scripted, reply):
    """An unexpected reply leaves open whether the command ran: the claim is withdrawn, other verbs are unconfirmed."""
    behind = Behind()
    scripted.script = lambda connection, words: reply
    async with connected(scripted.url, timeout_ms=200, behind=behind) as store:
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert found.maybe_executed
        assert len(behind.works) == 1
        assert await store.append(OWNER, 0, b"x", 0.1) == AppendStatus.UNCONFIRMED
        assert await store.renew(OWNER) == RenewStatus.UNCONFIRMED
        assert await store.release(OWNER, 0.1) == SettleResult(SettleStatus.UNCONFIRMED)
        assert await store.read(KEY, OWNER.token, 0) == ReadFailure.UNCONFIRMED


async def test_a_server_that_refuses_to_tell_its_health_is_not_pestered(scripted, often):
    """After an error on INFO the server is asked again at the usual pace."""
    async with connected(scripted.url) as store:
        scripted.greeting[b"INFO"] = b"-BUSY Redis is busy running a script.\r\n"
        scripted.segments.clear()
        watching = asyncio.ensure_future(store.watch())
        await asyncio.sleep(0.5)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert 1 <= sum(b"INFO" in segment for segment in scripted.segments) < 20


async def test_a_replica_that_takes_no_writes(own_valkey):
    """A claim on a replica is unconfirmed and leaves nothing; once it is promoted, claims succeed."""
    with own_valkey.client() as client:
        async with connected(own_valkey.url, timeout_ms=300) as store:
            client.replicaof("127.0.0.1", 1)
            found = await claim(store)
            assert isinstance(found, Unconfirmed)
            assert found.reason.startswith(("READONLY", "MASTERDOWN", "UNKILLABLE"))
            assert not found.maybe_executed
            client.replicaof("no", "one")
            assert client.dbsize() == 0
            assert told(await claim(store)) == "claimed"


# A server that stands still ...


@pytest.mark.fault(7)
async def test_a_server_that_stands_still_costs_no_more_than_the_budget(own_valkey):
    """Claims on a paused server are unconfirmed within about their timeout, and none takes effect later."""
    behind, clock = Behind(), asyncio.get_running_loop().time
    async with connected(own_valkey.url, timeout_ms=500, behind=behind) as store:
        own_valkey.pause()
        began = clock()
        found = await asyncio.gather(*[claim(store, b"%024d" % number) for number in range(20)])
        assert 0.4 < clock() - began < 5
        assert all(isinstance(one, Unconfirmed) for one in found)
        began = clock()
        assert isinstance(await claim(store, b"x" * 24), Unconfirmed)
        assert clock() - began < 5
        own_valkey.resume()
        assert await store.wait_up(PATIENCE_S)
        await claimed(store)
        assert len(own_valkey.records()) == 1
        await behind.run()
        assert len(own_valkey.records()) == 1


async def test_a_settle_outlasts_a_server_that_is_restarted(own_valkey):
    """A settle is repeated through a restart; where the record was lost, it is stored and the loss reported."""
    async with connected(own_valkey.url, timeout_ms=300) as store:
        owner = await claimed(store)
        own_valkey.kill()
        settling = asyncio.ensure_future(store_small(store, owner))
        await until(lambda: store.not_ready_reason() is not None)
        assert "not reachable" in store.not_ready_reason()
        own_valkey.start()
        assert await settling == SettleResult(SettleStatus.STORED, record_was_gone=True)
        assert told(await claim(store)) == "replay"


@pytest.mark.parametrize("state", ["hangs", "is down"])
async def test_every_call_ends_when_the_store_is_given_up(own_valkey, state):
    """After `end_calls`, calls under way and calls still to come end at once."""
    async with connected(own_valkey.url, timeout_ms=20_000) as store:
        owner = await claimed(store)
        if state == "hangs":
            own_valkey.pause()
        else:
            own_valkey.kill()
            await until(lambda: store.not_ready_reason() is not None)
        calls = [
            asyncio.ensure_future(call)
            for call in (
                store.release(owner, 1000.0),
                claim(store, fingerprint=OTHER),
                store.peek(owner.key, SCOPE, 1000),
            )
        ]
        done, _ = await asyncio.wait(calls, timeout=0.3)
        assert not done
        store.end_calls()
        settled, *asked = await asyncio.wait_for(asyncio.gather(*calls), 5)
        assert settled == SettleResult(SettleStatus.UNCONFIRMED)
        assert all(isinstance(found, Unconfirmed) for found in asked)
        assert await asyncio.wait_for(store.release(owner, 1000.0), 5) == SettleResult(SettleStatus.UNCONFIRMED)
        assert isinstance(await asyncio.wait_for(claim(store, fingerprint=OTHER), 5), Unconfirmed)


@pytest.mark.fault(50)
@pytest.mark.parametrize("patience_s", [0.2, 1.0, 1.4])
async def test_a_settle_waits_for_its_patience_and_no_longer(own_valkey, patience_s):
    """A settle's patience bounds it, its first try included, whatever the timeout of one call is."""
    async with connected(own_valkey.url, timeout_ms=1000) as store:
        owner = await claimed(store)
        own_valkey.pause()
        began = asyncio.get_running_loop().time()
        assert await store.release(owner, patience_s) == SettleResult(SettleStatus.UNCONFIRMED)
        took_s = asyncio.get_running_loop().time() - began
        own_valkey.resume()
        assert patience_s * 0.5 < took_s < patience_s + 0.4


# How it is reached ...

# What the scripts need, and what is asked on a new connection; nothing else.
ACL = (
    "on", "resetkeys", "~once:*", "resetchannels", "-@all",
    "+evalsha", "+eval", "+script|load", "+info", "+time", "+select", "+ping",
    "+hget", "+hmget", "+hlen", "+hstrlen", "+exists", "+hset", "+hgetall", "+set", "+hdel", "+unlink", "+pexpire",
)  # fmt: skip


async def live(url: str) -> None:
    """Run every verb of one key's life through a connection."""
    async with connected(url) as store:
        owner = await claimed(store)
        assert await store.append(owner, 0, b"ab", PATIENCE_S) == AppendStatus.APPENDED
        assert await store.renew(owner) == RenewStatus.RENEWED
        assert await store.store(owner, answer(b"ab", b"cd"), b"cd", PATIENCE_S) == SettleResult(SettleStatus.STORED)
        assert told(await claim(store)) == "replay"
        assert await store.read(KEY, owner.token, 0) == [b"ab", b"cd"]
        for settle in (store.release, lambda owner, patience_s: store.mark_unknown(owner, "why", patience_s)):
            owner = await claimed(store, key=Digests(b"").key(SCOPE, b"key-3"))
            assert (await settle(owner, PATIENCE_S)).status in (SettleStatus.RELEASED, SettleStatus.MARKED_UNKNOWN)
        reply = await store.nodes[0].link.command("INFO", "memory", deadline=asyncio.get_running_loop().time() + 10)
        assert b"maxmemory_policy" in reply


async def assert_unreachable(url: str, because: str) -> None:
    """Check that a store at this URL stays down with a reason, and that a claim through it is unconfirmed."""
    behind = Behind()
    store = store_at(url, timeout_ms=500, patience_s=1.0, background=behind)
    store.start()
    try:
        found = await claim(store)
        assert isinstance(found, Unconfirmed)
        assert not found.maybe_executed
        await until(lambda: re.search(because, store.not_ready_reason() or ""))
    finally:
        await store.close()
        behind.close()


@pytest.mark.parametrize("url", ["redis+unix://{socket}", "redis+unix://{socket}?db=0"])
async def test_over_a_unix_socket(server, url):
    """Every verb works over a Unix socket."""
    await live(url.format(socket=server.socket))


@pytest.mark.parametrize(
    ("url", "number"),
    [("redis+unix://{socket}?db=3", 3), ("redis://127.0.0.1:{port}/5", 5), ("redis://127.0.0.1:{port}/?db=7", 7)],
)
async def test_in_a_database_of_its_number(relay, valkey, url, number):
    """The records are in the database that the URL names and in no other, also after a reconnect."""
    await live(url.format(socket=valkey.socket, port=relay.port))
    with valkey.client() as client:
        assert list(client.info("keyspace")) == [f"db{number}"]


async def test_over_tcp_with_a_user_of_few_rights(own_valkey):
    """Every verb works with a password and a user that may run scripts on the store's keys alone."""
    password = "p@ss:w/rd%?#"
    async with relaying(own_valkey.socket) as relay:
        with own_valkey.client() as client:
            client.execute_command("ACL", "SETUSER", "gate", "reset", f">{password}", *ACL)
            client.config_set("requirepass", "geheim")
            await live(f"redis://gate:{quote(password, safe='')}@127.0.0.1:{relay.port}/2")
            denied = {entry["object"] for entry in client.acl_log()}
            assert denied <= {"client|setinfo"}  # which redis-py says of itself, and does without
            await live(f"redis://:geheim@127.0.0.1:{relay.port}")
            assert set(client.info("keyspace")) == {"db0", "db2"}
        await assert_unreachable(f"redis://127.0.0.1:{relay.port}", "Authentication required")
        await assert_unreachable(f"redis://gate:wrong@127.0.0.1:{relay.port}", "invalid username-password")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def over_tls(valkey: Valkey, authority: trustme.CA) -> AsyncIterator[Relay]:
    """The real server behind TLS, as `localhost`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with relaying(valkey.socket, context) as relay:
        yield relay


async def test_over_tls(over_tls, authority, monkeypatch, tmp_path):
    """Every verb works over TLS; the certificate is checked against the authorities that SSL_CERT_FILE names."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    await live(f"rediss://localhost:{over_tls.port}/1")
    async with connected(f"rediss://localhost:{over_tls.port}") as store:
        over_tls.lose_reply()
        await claimed(store)
        assert over_tls.lost == 1


async def test_a_certificate_that_is_not_right_is_refused(over_tls, authority, monkeypatch, tmp_path):
    """With another authority, another name or no TLS, nothing is sent, and the reason is reported."""
    await assert_unreachable(f"rediss://localhost:{over_tls.port}", "(?i)certificate verify failed")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    await assert_unreachable(f"rediss://127.0.0.1:{over_tls.port}", "(?i)certificate verify failed|mismatch")
    await assert_unreachable(f"redis://localhost:{over_tls.port}", ".")
    assert over_tls.scripts == 0


# What is in the store ...


async def test_no_key_and_no_credential_is_in_the_store(gate, upstream, valkey):
    """Names and values of records have digests, and neither keys nor credentials."""
    key, credential = "canary-key-41c9", "canary-credential-7d02"
    tap = Tap()
    upstream.script = tap.script
    secret = f"Authorization: Bearer {credential}"

    def seen() -> bytes:
        return b"\n".join(
            b"\n".join((name, *record.keys(), *record.values())) for name, record in valkey.records().items()
        )

    running = asyncio.ensure_future(ask(gate.port, request("POST", "/", key, b"x", secret)))
    await until(lambda: upstream.received)
    assert valkey.states() == [b"in_flight"]
    data = seen()
    tap.end(OK)
    await running
    data += seen()
    assert b"canary" not in data
    assert key.encode() not in data
    assert credential.encode() not in data


# Operators ...


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["resolve", "release_by_operator"])
async def test_what_an_operator_decides(store, client, state, how):
    """An operator decides only keys in flight, lapsed or unknown, by the token that was shown; the owner is fenced."""
    owner = await at(store, client, state)
    before = client.hgetall(NAME)

    async def decide(seen: bytes) -> ResolveStatus:
        if how == "release_by_operator":
            return await store.release_by_operator(KEY, seen, store.token(), b"5")
        meta = pack(replace(owner, token=store.token()), answer(b"by hand"))
        return await store.resolve_by_operator(KEY, seen, meta, b"by hand", RETENTION_MS)

    if state in ("absent", "complete"):
        assert await decide(owner.token) == await decide(FOREIGN) == ResolveStatus(state)
        assert client.hgetall(NAME) == before
        return
    assert await decide(FOREIGN) is ResolveStatus.FENCED
    assert client.hgetall(NAME) == before
    assert await decide(owner.token) is (
        ResolveStatus.RELEASED if how == "release_by_operator" else ResolveStatus.RESOLVED
    )
    assert (await store_small(store, owner)).status is SettleStatus.FENCED
    assert (await store.release(owner, PATIENCE_S)).status is SettleStatus.FENCED
    assert await store.renew(owner) == RenewStatus.FENCED
    assert await store.peek(KEY, SCOPE, LEASE_MS) is None or how == "resolve"
    found = await claim(store)
    if how == "release_by_operator":
        assert isinstance(found, Claim)
        assert int(found.fence) > int(owner.fence)
    else:
        assert isinstance(found, Record)
        assert (found.body, found.fingerprint) == (b"by hand", SAME)


async def test_a_settle_and_a_decision_at_once(store, server):
    """Of a settle and a decision at once, exactly one changes the record, hundreds of times over."""
    won = {SettleStatus.STORED: 0, SettleStatus.FENCED: 0}
    outcomes = ((SettleStatus.STORED, ResolveStatus.COMPLETE), (SettleStatus.FENCED, ResolveStatus.RESOLVED))
    async with connected(server.url) as desk:
        for n in range(300):
            key = Digests(b"").key(SCOPE, b"race-%d" % n)
            owner = await claimed(store, key=key)
            meta = pack(replace(owner, token=desk.token()), answer(b"by hand"))
            settle = store_small(store, owner)
            decide_ = desk.resolve_by_operator(key, owner.token, meta, b"by hand", RETENTION_MS)
            if n % 2:
                settled, decided = await asyncio.gather(settle, decide_)
            else:
                decided, settled = await asyncio.gather(decide_, settle)
            assert (settled.status, decided) in outcomes
            found = await claim(desk, key)
            assert isinstance(found, Record)
            assert found.body == (BODY if settled.status is SettleStatus.STORED else b"by hand")
            won[settled.status] += 1
    assert all(won.values()), won


async def test_a_connection_that_went_silent_is_replaced_before_a_large_replay_needs_it(relay, client):
    """A firewall that forgets idle connections says nothing. Each connection is used often enough to notice that."""
    async with connected(relay.url, timeout_ms=500) as store:
        (node,) = store.nodes
        owner = await claimed(store)
        for index, chunk in enumerate(CHUNKS[:-1]):
            await store.append(owner, index, chunk, PATIENCE_S)
        await store.store(owner, answer(*CHUNKS), CHUNKS[-1], PATIENCE_S)
        assert await store.read(KEY, owner.token, 0) == [CHUNKS[0]]
        silent, watching = node.reads._transport, asyncio.ensure_future(store.watch())
        relay.silence()
        await until(lambda: node.reads.up and node.reads._transport is not silent, 10)
        assert await store.read(KEY, owner.token, 0) == [CHUNKS[0]]
        watching.cancel()
