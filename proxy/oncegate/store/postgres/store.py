"""The store in PostgreSQL: each verb is a function of the database.

A call that was not confirmed is repeated with the same token; the functions make a repeat safe.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from itertools import count
from typing import Any

from oncegate.keys.digests import Scope
from oncegate.store.kept import LEADING, of_complete
from oncegate.store.open_keys.records import Records
from oncegate.store.postgres import rows
from oncegate.store.postgres.batches import Batches
from oncegate.store.postgres.calls import Calls
from oncegate.store.postgres.claims import MAX_PAUSE_S, MIN_PAUSE_S, ClaimBatches, Claims
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.housekeeping import Housekeeping
from oncegate.store.postgres.marks import NoWakes, PostgresMarks
from oncegate.store.postgres.records import PostgresRecords
from oncegate.store.postgres.rows import BUSY_TAG, READ_BYTES, ROW_BYTES
from oncegate.store.postgres.servers import Servers, ServersConfig
from oncegate.store.postgres.verb import Row, Verb
from oncegate.store.record import (
    PREFIX_BYTES,
    Claim,
    ClaimRequest,
    Record,
    StoredResponse,
    self_check,
    tenant_of,
    unpack,
)
from oncegate.store.record_view import EVIDENCE_BYTES, Deciding, RecordView
from oncegate.store.results import (
    AppendStatus,
    DropStatus,
    Followed,
    NotAttempted,
    NotClaimed,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    Unconfirmed,
)
from oncegate.store.stages import CLAIMED, Stage
from oncegate.store.store import Claiming, Settling, StoreConfig, StoreLogin, Upkeep

# The least time for one try of a call that is repeated.
MIN_TRY_S = 0.05
# Above this share of the limit, responses are stored without their body.
FULL_RATIO = 0.9
_RESOLVE = "SELECT resolve_3($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) AS tag"
# The version of the schema from which on there is that function, and a complete record loses what is kept for its open
# key alone. Before it, nothing of that is kept, and no evidence.
DECIDING = 3
_RESOLVE_2 = """
SELECT CASE (SELECT $12::bigint IS NULL OR state > 2 OR token <> $2
                 OR lease <= now_ms() AND CASE state WHEN 1 THEN lease ELSE 0 END = $12
             FROM record WHERE key = $1 FOR NO KEY UPDATE SKIP LOCKED)
    WHEN true THEN resolve_1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $14, $15, $16)
    WHEN false THEN 6
    ELSE CASE WHEN is_there($1) THEN 7 ELSE 2 END
END AS tag, $13::bytea AS evidence
"""
_DROP = "SELECT drop_1($1, $2, $3, $4, $5, $6) AS tag"
_HMAC_BLOCK = 64


def hmac_pads(secret: bytes) -> bytes:
    """Return both blocks of HMAC-SHA-256 (RFC 2104) for a key of up to 64 bytes, which may be empty."""
    block = secret.ljust(_HMAC_BLOCK, b"\0")
    return bytes(byte ^ 0x36 for byte in block) + bytes(byte ^ 0x5C for byte in block)


class PostgresStore:
    """The store on the servers behind one URL: a primary, and standbys that may take its place. See `Store`."""

    def __init__(self, config: StoreConfig) -> None:
        self._timeout_s = config.timeout_ms / 1000
        self._retried, self._observers = config.retried, config.observers
        self._loop = asyncio.get_running_loop()
        self._prefix, self._count = os.urandom(PREFIX_BYTES), count(1)
        member = replace(config.member, token_prefix=self._prefix) if config.member else None
        options = config.postgres
        self._servers = Servers(
            ServersConfig(
                url=config.url,
                timeout_s=self._timeout_s,
                durability=config.durability,
                schema=options.schema,
                promotion=options.promotion,
                log=config.log,
                breaker_opened=config.breaker_opened,
                connected=self._observer("connect"),
                member=member,
                max_bytes=options.max_bytes,
            )
        )
        self._audit = options.actor or self._prefix, options.audit, hmac_pads(options.audit_key)
        self._housekeeping = Housekeeping(self._servers, self._prefix, self._audit[1:])
        self.records: Records = PostgresRecords(self._servers)
        # LISTEN would cost every commit of the database more than polling costs its readers.
        self.marks, self.wakes = PostgresMarks(self._servers), NoWakes()
        self._settles, self._renewals = self._batches(rows.SETTLE, Level.DISK), self._batches(rows.RENEW, Level.OFF)
        self._follows = self._batches(rows.FOLLOW, Level.OFF)
        claim_batches = ClaimBatches(self._batches)
        self._releases = claim_batches.releases
        self._claims = Claims(
            self._servers,
            claim_batches,
            config.background,
            token=self.token,
            timeout_s=self._timeout_s,
            patience_s=config.patience_s,
        )
        self._calls = Calls(self._servers, self._claims, self._timeout_s, self._observer, self._retried)

    def _batches(self, verb: Verb, level: Level) -> Batches:
        return Batches(self._servers, verb, level, self._audit, self._observer(verb.name))

    def _observer(self, verb: str) -> Callable[[float], None]:
        return self._observers.get(verb, lambda _: None)

    # Its life ...

    def start(self) -> None:
        self._servers.start()

    async def close(self) -> None:
        await self._servers.close()

    async def wait_up(self, seconds: float) -> bool:
        return await self._servers.wait_up(self._loop.time() + seconds)

    async def prepare_login(self, login: StoreLogin) -> Callable[[], None]:
        return await self._servers.prepare_login(login.url)

    def end_calls(self) -> None:
        self._claims.stop_retrying()
        self._servers.end_calls()

    async def watch(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._servers.watch())
            tasks.create_task(self._housekeeping.run())

    async def probe(self) -> None:
        await self._servers.probe()

    # Its health ...

    def not_ready_reason(self) -> str | None:
        return self._servers.not_ready_reason()

    def notice(self) -> str | None:
        return self._servers.health.notice()

    def full(self) -> bool:
        return self._servers.health.memory_ratio > FULL_RATIO

    @property
    def memory_ratio(self) -> float:
        return self._servers.health.memory_ratio

    @property
    def upkeep(self) -> Upkeep:
        return self._housekeeping.upkeep

    @property
    def rules_differ(self) -> bool:
        return self._servers.health.rules_differ

    @property
    def packs_records(self) -> bool:
        return False

    @property
    def refuses_new(self) -> bool:
        return self._servers.health.is_full

    @property
    def quarantine_left_s(self) -> float:
        return self._servers.health.quarantine_left_s

    @property
    def broken(self) -> bool:
        return self._servers.breaker.open

    # Claiming ...

    @property
    def token_prefix(self) -> bytes:
        return self._prefix

    def token(self) -> bytes:
        return self._prefix + next(self._count).to_bytes(6, "big")

    def now_ms(self, _key: bytes) -> int:
        return self._servers.now_ms()

    def claim(self, request: ClaimRequest) -> Claiming:
        key, tenant, fingerprint, mode = request.key, request.scope.tenant, request.fingerprint, request.mode
        token = self.token()
        check = self_check(key, tenant, token, mode, fingerprint)
        # The fence and the time of creation come with the reply.
        times = request.lease_ms, request.retention_ms, request.unknown_retention_ms, request.tombstone_ms
        kept = request.kept
        if kept >= LEADING and self._servers.schema_version < DECIDING:
            kept = of_complete(kept)
        claim = Claim(key, token, b"", mode, fingerprint, check, 0, *times, kept, request.resend_ms)
        return self._claims.run(claim, tenant, request.window_ms)

    def reclaim(self, claim: Claim, scope: Scope) -> Claiming:
        return self._claims.run(claim, scope.tenant, reclaims=True)

    def peek(self, key: bytes, scope: Scope, lease_ms: int) -> Coroutine[Any, Any, NotClaimed | None]:
        return self._claims.peek(key, scope.tenant, lease_ms)

    # What the owner of a claim does ...

    async def renew(self, claim: Claim, stage: Stage = CLAIMED) -> RenewStatus:
        row = (claim.key, claim.token, claim.lease_ms, rows.STAGES[stage])
        reply = await self._renewals.call(row, self._loop.time() + self._timeout_s).reply
        return RenewStatus.UNCONFIRMED if isinstance(reply, Unconfirmed) else rows.renew_status(reply[0]["tag"])

    async def append(
        self, claim: Claim, index: int, chunk: bytes, patience_s: float, head: bytes = b""
    ) -> AppendStatus:
        return await self._calls.append(claim, index, chunk, patience_s, head)

    def store(self, claim: Claim, response: StoredResponse, last_chunk: bytes, patience_s: float) -> Settling:
        return self._settle(self._settles, rows.store_row(claim, response, last_chunk), patience_s)

    def release(self, claim: Claim, patience_s: float) -> Settling:
        self._claims.withdraw_copies(claim)
        return self._settle(self._releases, rows.release_row(claim), patience_s)

    def mark_unknown(self, claim: Claim, reason: str, patience_s: float, status: int = 0) -> Settling:
        return self._settle(self._settles, rows.unknown_row(claim, reason, status), patience_s)

    async def _settle(self, batches: Batches, row: Row, patience_s: float) -> SettleResult:
        """Repeat a settle until its reply, or until the caller's patience is over."""
        loop, pause_s = self._loop, MIN_PAUSE_S
        ends, retried = loop.time() + patience_s, False
        while True:
            deadline = min(loop.time() + self._timeout_s, max(ends, loop.time() + MIN_TRY_S))
            reply = await batches.call(row, deadline).reply
            # A release that a failover may take back is repeated, and counts once it is confirmed as a claim is.
            is_below = not isinstance(reply, Unconfirmed) and reply[1] and batches is self._releases
            if not isinstance(reply, Unconfirmed) and reply[0]["tag"] != BUSY_TAG and not is_below:
                return rows.settle_result(reply[0], batches is self._releases, retried)
            is_vain = isinstance(reply, NotAttempted)
            if is_vain or loop.time() + pause_s >= min(ends, self._claims.retries_end):
                return SettleResult(SettleStatus.UNCONFIRMED)
            retried |= is_below or (isinstance(reply, Unconfirmed) and reply.maybe_executed)
            self._retried()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    # Reading ...

    async def read(self, key: bytes, token: bytes, first: int) -> list[bytes] | ReadFailure:
        return await self._calls.read(key, token, first)

    async def follow(self, key: bytes, token: bytes, first: int, reading_ms: int = 0) -> Followed | ReadFailure:
        row = key, token, first, READ_BYTES, reading_ms
        reply = await self._follows.call(row, self._loop.time() + self._timeout_s).reply
        return ReadFailure.UNCONFIRMED if isinstance(reply, Unconfirmed) else rows.followed(key, first, reply[0])

    # From replica to replica ...

    async def post(self, token: bytes, note: bytes) -> bool:
        return await self.marks.post(token[:PREFIX_BYTES], note)

    async def collect(self, prefix: bytes) -> list[bytes]:
        return await self.marks.collect(prefix)

    # For operators ...

    async def resolve_by_operator(self, claim: Claim, seen: Deciding, meta: bytes, body: bytes) -> ResolveStatus:
        small, large = (body, None) if len(body) <= ROW_BYTES else (None, body)
        record = unpack(claim.key, tenant_of(meta), meta, None, 0)
        status = record.response.status if isinstance(record, Record) and record.response else 0
        operator, fence = meta[1:17], int(meta[17:33])
        check = self_check(claim.key, tenant_of(meta), operator, claim.mode, claim.fingerprint)[16:]
        response = meta, small, large, claim.retention_ms, claim.tombstone_ms, status
        return await self._resolve(claim.key, seen, operator, fence, check, *response)

    async def release_by_operator(self, key: bytes, seen: Deciding, operator: bytes, fence: bytes) -> ResolveStatus:
        return await self._resolve(key, seen, operator, int(fence), b"", None, None, None, 0, 0, 0)

    async def _resolve(self, key: bytes, seen: Deciding, *decision: object) -> ResolveStatus:
        """Decide, again while another transaction holds the record: it ends soon, and nothing was changed."""
        ends, pause_s = self._loop.time() + self._timeout_s, MIN_PAUSE_S
        args = key, seen.token, *decision, seen.seen_lease, seen.evidence[:EVIDENCE_BYTES], *self._audit
        statement = _RESOLVE if self._servers.schema_version >= DECIDING else _RESOLVE_2
        while True:
            reply = await self._calls.ask("resolve", Level.CLAIM, statement, args, ends)
            if not isinstance(reply, list):
                return ResolveStatus.UNCONFIRMED
            if (tag := reply[0]["tag"]) != BUSY_TAG or self._loop.time() + pause_s >= ends:
                return rows.resolve_status(tag)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def drop(self, record: RecordView, *, purge: bool = False) -> DropStatus:
        level = Level.CLAIM if purge else Level.OFF
        reply = await self._calls.ask("drop", level, _DROP, (record.key, record.token, purge, *self._audit))
        return rows.drop_status(reply[0]["tag"]) if isinstance(reply, list) else DropStatus.UNCONFIRMED
