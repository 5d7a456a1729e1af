"""The store in Redis: each verb is a Lua script.

A call that was not confirmed is repeated with the same token; the scripts make a repeat safe.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from itertools import count
from typing import Any

from oncegate.keys.digests import Scope
from oncegate.store.record import PREFIX_BYTES, Claim, ClaimRequest, StoredResponse, pack_tombstone, self_check
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding, RecordView
from oncegate.store.redis import arguments
from oncegate.store.redis.claims import MAX_PAUSE_S, MIN_PAUSE_S, Claims
from oncegate.store.redis.layouts.followed import followed
from oncegate.store.redis.membership import WrittenLayout
from oncegate.store.redis.node import Node, NodeConfig
from oncegate.store.redis.records import RedisMarks, RedisRecords
from oncegate.store.redis.replies import (
    append_status,
    drop_status,
    is_final,
    is_noscript,
    may_have_run,
    read_chunks,
    renew_status,
    resolve_status,
    settle_result,
)
from oncegate.store.redis.server import FULL_RATIO, Openers, load_scripts, logins_of
from oncegate.store.redis.signals.mailboxes import Mailbox
from oncegate.store.redis.signals.wakes import RedisWakes
from oncegate.store.redis.topologies.topology import is_cluster, log_in, refusals, servers_of
from oncegate.store.redis.wire import ScriptCall, resp
from oncegate.store.results import (
    AppendStatus,
    DropStatus,
    Followed,
    NotClaimed,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
)
from oncegate.store.stages import CLAIMED, DROPPED, RESPONSE_BEGUN, Stage
from oncegate.store.store import Claiming, LoginRefused, Settling, StoreConfig, StoreLogin, Upkeep

# The least time for one try of a call that is repeated.
MIN_TRY_S = 0.05


class RedisStore:
    """The store on the servers behind one URL: a single server, a master behind Sentinel, or a cluster. See `Store`."""

    def __init__(self, config: StoreConfig) -> None:
        self._timeout_s = config.timeout_ms / 1000
        self._retried = config.retried
        self._loop = asyncio.get_running_loop()
        self._prefix, self._count = os.urandom(PREFIX_BYTES), count(1)
        self._scripts = load_scripts(indexes=not is_cluster(config.url))
        member = replace(config.member, token_prefix=self._prefix) if config.member else None
        self.layout = WrittenLayout(config.log_info)
        self._openers = Openers(self._timeout_s, config.resolver)
        self._openers.logins = logins_of((config.login or StoreLogin(config.url))._replace(url=config.url))
        node = NodeConfig(
            scripts=self._scripts,
            timeout_s=self._timeout_s,
            observers=config.observers,
            log=config.log,
            openers=self._openers,
            member=member,
            breaker_opened=config.breaker_opened,
            layout=self.layout,
        )
        self._servers = servers_of(config.url, config.durability, node)
        self.records, self.marks = RedisRecords(self._servers), RedisMarks(self._servers, self._scripts["swap"])
        # The time of the server that has a key.
        self.now_ms: Callable[[bytes], int] = self._servers.now_ms
        self._mailbox = Mailbox(self._servers, self._scripts["post"], self._repeat, config.background, self._timeout_s)
        self.collect = self._mailbox.collect
        self.wakes = RedisWakes(self._servers, self._timeout_s, self._prefix, is_sharded=is_cluster(config.url))
        self._claims = Claims(
            self._servers,
            self._scripts["claim"],
            self.release,
            config.background,
            layout=self.layout,
            timeout_s=self._timeout_s,
            patience_s=config.patience_s,
        )

    # Its life ...

    def start(self) -> None:
        self._servers.start()

    async def close(self) -> None:
        await asyncio.gather(self.wakes.close(), self._servers.close())

    async def wait_up(self, seconds: float) -> bool:
        return await self._servers.wait_up(self._loop.time() + seconds)

    async def prepare_login(self, login: StoreLogin) -> Callable[[], None]:
        logins = logins_of(login)
        if refused := await refusals(self._servers, logins):
            raise LoginRefused("; ".join(refused))

        def follow() -> None:
            self._openers.logins = logins
            log_in(self._servers, logins.server, self._timeout_s)

        return follow

    def end_calls(self) -> None:
        self._claims.stop_retrying()
        self._servers.end_calls()

    async def watch(self) -> None:
        """Inspect the servers for their health and for losses, until cancelled."""
        await self._servers.watch()

    async def probe(self) -> None:
        """Find out when servers whose breaker is open take claims again, until cancelled."""
        await self._servers.probe()

    # Its health ...

    def not_ready_reason(self) -> str | None:
        return self._servers.not_ready_reason()

    def notice(self) -> str | None:
        return next((notice for node in self.nodes if (notice := node.health.notice())), None)

    def full(self) -> bool:
        return self._servers.memory_ratio > FULL_RATIO

    @property
    def nodes(self) -> list[Node]:
        """The servers that take writes now: one, or the masters of a cluster."""
        return self._servers.nodes

    @property
    def memory_ratio(self) -> float:
        return self._servers.memory_ratio

    @property
    def upkeep(self) -> Upkeep:
        return Upkeep()

    @property
    def rules_differ(self) -> bool:
        return any(node.health.rules_differ for node in self.nodes)

    @property
    def packs_records(self) -> bool:
        return self.layout.packed

    @property
    def refuses_new(self) -> bool:
        """Whether a server refuses first-time keys at its memory limit."""
        return any(node.health.full for node in self.nodes)

    @property
    def quarantine_left_s(self) -> float:
        return max((node.health.quarantine_left_s for node in self.nodes), default=0.0)

    @property
    def broken(self) -> bool:
        return any(node.breaker.open for node in self.nodes)

    # Claiming ...

    @property
    def token_prefix(self) -> bytes:
        return self._prefix

    def token(self) -> bytes:
        return self._prefix + next(self._count).to_bytes(6, "big")

    def claim(self, request: ClaimRequest) -> Claiming:
        key, tenant, fingerprint, mode = request.key, request.scope.tenant, request.fingerprint, request.mode
        # `token()` without its frame, as this is the hot path.
        token = self._prefix + next(self._count).to_bytes(6, "big")
        check = self_check(key, tenant, token, mode, fingerprint)
        # The fence and the time of creation come with the reply.
        times = request.lease_ms, request.retention_ms, request.unknown_retention_ms, request.tombstone_ms
        claim = Claim(key, token, b"", mode, fingerprint, check, 0, *times, request.kept, request.resend_ms)
        return self._claims.run(claim, tenant, request.window_ms)

    def reclaim(self, claim: Claim, scope: Scope) -> Claiming:
        return self._claims.run(claim, scope.tenant, reclaims=True)

    def peek(self, key: bytes, scope: Scope, lease_ms: int) -> Coroutine[Any, Any, NotClaimed | None]:
        return self._claims.peek(key, scope.tenant, lease_ms)

    # What the owner of a claim does ...

    async def renew(self, claim: Claim, stage: Stage = CLAIMED) -> RenewStatus:
        # Once a response has begun, the record has chunks, or soon has some.
        layout = arguments.LAYOUT[self.layout.packed and stage is not RESPONSE_BEGUN and stage is not DROPPED]
        args = resp(claim.token, claim.lease_ms, claim.unknown_retention_ms, stage.wire, layout)
        return renew_status(await self._run("renew", claim.key, args, arguments.RENEW_COUNT, claim))

    async def append(
        self, claim: Claim, index: int, chunk: bytes, patience_s: float, head: bytes = b""
    ) -> AppendStatus:
        # The first chunk is the only one that may find its claim packed.
        layout = arguments.LAYOUT[self.layout.packed and index == 0]
        args, count = resp(claim.token, index, chunk, claim.unknown_retention_ms, layout), arguments.APPEND_COUNT
        if head:
            args, count = args + resp(head), arguments.APPEND_HEAD_COUNT
        ends = self._loop.time() + patience_s
        call = ScriptCall(self._scripts["append"], store_key(claim.key), count, ends)
        status = append_status((await self._repeat(call, args, ends))[0])
        if status is AppendStatus.APPENDED_READ:
            self.wakes.appended(claim)
        return status

    def store(self, claim: Claim, response: StoredResponse, last_chunk: bytes, patience_s: float) -> Settling:
        if self.layout.packed and (args := arguments.put(claim, response, last_chunk)) is not None:
            return self._settle(claim, args, arguments.PUT_COUNT, patience_s)
        args = arguments.store(claim, response, last_chunk)
        return self._settle(claim, args, arguments.STORE_COUNT, patience_s)

    def release(self, claim: Claim, patience_s: float) -> Settling:
        if self._claims.copy_may_come(claim):
            self._claims.withdraw_copy(claim)
        return self._settle(
            claim, arguments.release(claim, self.layout.packed), arguments.RELEASE_COUNT, patience_s, releases=True
        )

    def mark_unknown(self, claim: Claim, reason: str, patience_s: float, status: int = 0) -> Settling:
        if self.layout.packed:
            return self._settle(claim, arguments.put_unknown(claim, reason, status), arguments.PUT_COUNT, patience_s)
        args = arguments.mark_unknown(claim, reason, status)
        return self._settle(claim, args, arguments.MARK_UNKNOWN_COUNT, patience_s)

    async def _settle(
        self, claim: Claim, args: bytes, arg_count: int, patience_s: float, releases: bool = False
    ) -> SettleResult:
        now = self._loop.time()
        deadline = now + (self._timeout_s if self._timeout_s < patience_s else patience_s)
        call = ScriptCall(self._scripts["settle"], store_key(claim.key), arg_count, deadline, False, False, claim)
        reply, retried = await self._servers.run(call, args), False
        # The usual reply is a list. Any other is looked at only then: this is the hot path.
        if not isinstance(reply, list) and not is_final(reply):
            retried = may_have_run(reply)
            self._retried()
            reply, maybe_executed = await self._repeat(call, args, now + patience_s)
            retried |= maybe_executed
        if self.wakes.read and claim.token in self.wakes.read:
            self.wakes.settled(claim)
        return settle_result(reply, releases, retried)

    # Reading ...

    async def read(self, key: bytes, token: bytes, first: int) -> list[bytes] | ReadFailure:
        args = resp(token, first, arguments.READ_BYTES)
        return read_chunks(await self._run("read", key, args, arguments.READ_COUNT))

    async def follow(self, key: bytes, token: bytes, first: int, reading_ms: int = 0) -> Followed | ReadFailure:
        args = resp(token, first, arguments.READ_BYTES, reading_ms)
        return followed(key, first, await self._run("follow", key, args, arguments.FOLLOW_COUNT))

    # From process to process ...

    async def post(self, token: bytes, note: bytes) -> bool:
        if is_posted := await self._mailbox.post(token, note):
            self.wakes.posted(token)
        return is_posted

    # For operators ...

    async def resolve_by_operator(self, claim: Claim, seen: Deciding, meta: bytes, body: bytes) -> ResolveStatus:
        args = arguments.resolve(claim, seen, meta, body)
        return resolve_status(await self._run("resolve", claim.key, args, arguments.RESOLVE_COUNT))

    async def release_by_operator(self, key: bytes, seen: Deciding, operator: bytes, fence: bytes) -> ResolveStatus:
        args = arguments.release_by_operator(seen, operator, fence)
        return resolve_status(await self._run("resolve", key, args, arguments.RELEASE_BY_OPERATOR_COUNT))

    async def drop(self, record: RecordView, *, purge: bool = False) -> DropStatus:
        args = resp(record.token, pack_tombstone(record.key, record.meta), int(purge), arguments.LAYOUT[record.packed])
        return drop_status(await self._run("drop", record.key, args, arguments.DROP_COUNT))

    # Calls ...

    def _run(
        self, verb: str, key: bytes, args: bytes, arg_count: int, owner: Claim | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Run a script once, within the timeout."""
        deadline = self._loop.time() + self._timeout_s
        return self._call(ScriptCall(self._scripts[verb], store_key(key), arg_count, deadline, owner=owner), args)

    async def _call(self, call: ScriptCall, args: bytes) -> Any:
        """Run a script by its sha, and by its body if the server does not know it."""
        reply = await self._servers.run(call, args)
        return await self._servers.run(replace(call, by_body=True), args) if is_noscript(reply) else reply

    async def _repeat(self, call: ScriptCall, args: bytes, ends: float) -> tuple[Any, bool]:
        """Repeat a call until a final reply, or until `ends` (the loop's time).

        Return the last reply, and whether a try before it may have been executed.
        """
        loop, pause_s = self._loop, MIN_PAUSE_S
        # Whether a try without a reply may have done its work: it decides what a later reply means.
        maybe_executed = False
        while True:
            deadline = min(loop.time() + self._timeout_s, max(ends, loop.time() + MIN_TRY_S))
            reply = await self._call(replace(call, deadline=deadline), args)
            if is_final(reply) or loop.time() + pause_s >= min(ends, self._claims.retries_end):
                return reply, maybe_executed
            maybe_executed |= may_have_run(reply)
            self._retried()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)
