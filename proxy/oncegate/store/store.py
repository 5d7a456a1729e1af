"""The store: five verbs on one record for each key, and what their replies mean.

Only this package speaks to a store. `claim` is the one place that makes a Claim. Whatever was not
confirmed is repeated with the same token, within the caller's budget: the scripts make a repeat safe.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from itertools import count
from typing import Any

from oncegate.decision import State, effective_state, may_take_over
from oncegate.keys.digests import Scope, store_key
from oncegate.settings.store_url import parse_server_group
from oncegate.store.breaker import Breaker
from oncegate.store.record import (
    PREFIX_BYTES,
    TOKEN_BYTES,
    Claim,
    ClaimRequest,
    Corrupt,
    Record,
    StoredResponse,
    pack,
    running,
    self_check,
    unpack,
)
from oncegate.store.redis.cluster import Cluster
from oncegate.store.redis.durable import WAIT_SHARE, level
from oncegate.store.redis.health_monitor import Membership
from oncegate.store.redis.link import NUMBER, SIZE, ErrorReply, Link, resp
from oncegate.store.redis.node import CLAIM_ARGUMENTS, INLINE_BYTES, ORDINARY, TOO_LATE, Node, NodeConfig, StoreServers
from oncegate.store.redis.replies import (
    SETTLE,
    append_status,
    is_final,
    is_noscript,
    is_out_of_memory,
    may_have_run,
    read_chunks,
    renew_status,
    resolve_status,
)
from oncegate.store.redis.sentinel import SentinelNode
from oncegate.store.redis.server import FULL_RATIO, load_scripts, opener
from oncegate.store.results import (
    AppendStatus,
    ClaimResult,
    ClaimsSuspended,
    NotAttempted,
    NotClaimed,
    ReadFailure,
    RenewStatus,
    ResolveStatus,
    SettleResult,
    SettleStatus,
    StoreFull,
    Unconfirmed,
    UnderReplicated,
)

READ_BYTES = 262144  # of a larger one at a time
_16, _16_NEXT, _32_NEXT = b"$16\r\n", b"\r\n$16\r\n", b"\r\n$32\r\n"  # bytes of words of a known size
_STORE, _RELEASE = resp(b"store"), resp(b"release")
PAUSE_FIRST_S, PAUSE_MOST_S = 0.01, 0.5
_COMPLETE = State.COMPLETE


def servers(
    url: str,
    timeout_s: float,
    observe: Callable[[str, float], None],
    log: Callable[..., None],
    durability: str,
    member: Membership | None,
    broke: Callable[[], None],
) -> StoreServers:
    """Return what a URL names."""
    several = parse_server_group(url)
    cluster = several is not None and several.kind == "cluster"
    wanted = level(durability, several is not None)
    terms = NodeConfig(load_scripts(), timeout_s, observe, log, wanted, cluster, member, broke)
    if several is None:
        return Node(opener(url, timeout_s), terms)
    return SentinelNode(several, terms) if several.kind == "sentinel" else Cluster(several, terms)


Settling = Coroutine[Any, Any, SettleResult]
Claiming = Coroutine[Any, Any, ClaimResult]


class Store:
    """The store behind one URL. Times in the unit of their name.

    `observe(verb, seconds)` hears of every call, `repeated()` of every one that is made again;
    `background` finishes work that nobody waits for. `log(event, **fields)` is told of failovers. `durability`:
    what a claim must have reached. With a `member` the store is watched for losses, and for other proxies that
    name keys in another way; the prefix of its tokens is filled in here. `broke()` hears when claims are no longer
    tried for a while.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_ms: int,
        patience_s: float,
        observe: Callable[[str, float], None],
        repeated: Callable[[], None],
        background: Callable[[Coroutine[Any, Any, Any]], None],
        log: Callable[..., None] = lambda *_, **__: None,
        durability: str = "memory",
        member: Membership | None = None,
        broke: Callable[[], None] = lambda: None,
    ) -> None:
        self._timeout_s = timeout_ms / 1000
        self._give_back_s = self._timeout_s * (1 - WAIT_SHARE)
        self._patience_s = patience_s
        self._repeated = repeated
        self._loop = asyncio.get_running_loop()
        self._background = background
        self._prefix, self._count = os.urandom(PREFIX_BYTES), count(1)
        named = replace(member, token_prefix=self._prefix) if member else None
        self._servers = servers(url, self._timeout_s, observe, log, durability, named, broke)
        self.now_ms: Callable[[bytes], int] = self._servers.now_ms  # the time of the server that has a key
        self._strained: set[Breaker] = set()  # where a claim failed since one did not
        self._terms: dict[tuple[bytes, int, int], bytes] = {}
        self._given_up: set[bytes] = set()  # tokens of claims that may be in the store though nobody has them
        self._doubled: set[bytes] = set()  # tokens of claims of which a copy may still be on its way
        self._patience_ends = float("inf")  # the loop's time after which nothing is repeated any more

    # Its life ...

    def start(self) -> None:
        self._servers.start()

    async def close(self) -> None:
        await self._servers.close()

    async def wait_up(self, seconds: float) -> bool:
        return await self._servers.wait_up(self._loop.time() + seconds)

    def give_up(self) -> None:
        """Let every call end now, also those that still come; what is not confirmed stays unconfirmed."""
        self._patience_ends = self._loop.time()
        self._servers.give_up()

    def problem(self) -> str | None:
        """Return why the store cannot be relied on now, None where it can."""
        return self._servers.problem()

    @property
    def nodes(self) -> list[Node]:
        """The servers that take writes now: one, or the masters of a cluster."""
        return self._servers.nodes

    @property
    def links(self) -> list[Link]:
        """The connections to them that commands share."""
        return [node.link for node in self.nodes]

    @property
    def memory_ratio(self) -> float:
        return self._servers.memory_ratio

    def full(self) -> bool:
        """Return whether answers are to be stored without their body."""
        return self._servers.memory_ratio > FULL_RATIO

    def notice(self) -> str | None:
        """Return what should be looked at though the store works: what it lost lately, rules that differ."""
        return next((notice for node in self.nodes if (notice := node.losses.notice())), None)

    @property
    def rules_differ(self) -> bool:
        """Whether other proxies on this store name keys by other rules."""
        return any(node.losses.rules_differ for node in self.nodes)

    @property
    def refuses_new(self) -> bool:
        """Whether new keys are refused for want of memory."""
        return any(node.losses.full for node in self.nodes)

    @property
    def quarantine_left_s(self) -> float:
        return max((node.losses.quarantine_left_s for node in self.nodes), default=0.0)

    @property
    def broken(self) -> bool:
        """Whether claims are not even tried now, because they failed one after the other."""
        return any(node.breaker.open for node in self.nodes)

    async def watch(self) -> None:
        """Keep looking at what the servers are, and what they lose, until cancelled."""
        await self._servers.watch()

    async def probe(self) -> None:
        """Find out when servers that claims were given up on take them again, until cancelled."""
        await self._servers.probe()

    # Verbs ...

    def claim(self, request: ClaimRequest) -> Claiming:
        """Claim a key, or return the record that it has. After Unconfirmed no copy of the claim takes effect."""
        key, scope, fingerprint, mode, lease_ms, retention_ms, window_ms = request
        token = self.token()
        claim = Claim(
            key=key,
            token=token,
            fence=b"",
            mode=mode,
            fingerprint=fingerprint,
            self_check=self_check(key, scope.tenant, token, mode, fingerprint),
            created_ms=0,
            lease_ms=lease_ms,
            retention_ms=retention_ms,
        )
        return self._claim(claim, scope, window_ms, self._give_up)

    def reclaim(self, claim: Claim, scope: Scope) -> Claiming:
        """Claim again with the same token: Claim means that the key is ours, with the fence it has now."""
        return self._claim(claim, scope, 0, None)

    async def _claim(
        self, claim: Claim, scope: Scope, window_ms: int, give_up: Callable[[Claim], None] | None
    ) -> ClaimResult:
        """Claim, again with the same token where need be, until the budget is over."""
        loop, ask, described = self._loop, self._servers.claim, self._describe(claim)
        left_s = self._timeout_s
        deadline = loop.time() + left_s
        pause_s = PAUSE_FIRST_S
        stands, maybe_executed, seen = False, False, b""
        try:
            while True:
                rest = b"\r\n" + resp(INLINE_BYTES, window_ms, seen) if window_ms or seen else ORDINARY
                reply = await ask(claim.key, described, rest, deadline, left_s)
                if is_noscript(reply):
                    reply = await ask(claim.key, described, rest, deadline, left_s, whole=True)
                found = self._read_claim(claim, scope, reply)
                if self._strained and not isinstance(found, Unconfirmed):
                    self._relieve(self._servers.breaker_of(claim.key))
                if isinstance(found, Claim):
                    return self._repeated_claim(found, claim, None) if maybe_executed else found
                if isinstance(found, str):  # our idea of the server's time was behind; the reply corrected it
                    found = Unconfirmed("the store was reached too late", maybe_executed=False)
                if isinstance(found, Record) and self._may_open(found, window_ms) and found.token != seen:
                    given_up = found.token in self._given_up
                    if await self._withdrawn(found, claim) if given_up else _opens(found, claim, window_ms):
                        seen, left_s = found.token, deadline - loop.time()
                        continue
                if not isinstance(found, Unconfirmed):
                    return self._repeated_claim(found, claim, give_up) if maybe_executed else found
                stands |= isinstance(found, UnderReplicated)
                maybe_executed |= found.maybe_executed
                over = min(deadline - stands * self._give_back_s, self._patience_ends)
                if loop.time() + pause_s >= over or self._no_use(found):
                    self._learn(found, claim, deadline)
                    return await self._unconfirmed(claim, scope, found, stands, maybe_executed, give_up)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, PAUSE_MOST_S)
                left_s = deadline - loop.time()
        except (Exception, asyncio.CancelledError):
            (give_up or self._note_copy)(claim)
            raise

    def _repeated_claim(
        self, found: Claim | Record | Corrupt, claim: Claim, give_up: Callable[[Claim], None] | None
    ) -> Claim | Record | Corrupt:
        """Return what a repeat found; what was asked before it may be on its way yet."""
        (give_up or self._note_copy)(claim)
        return found

    def _may_open(self, found: Record, window_ms: int) -> bool:
        """Return whether a key is to be looked at more closely: most are complete, and stay so."""
        return found.state is not _COMPLETE or window_ms > 0 or bool(self._given_up)

    def _no_use(self, why: Unconfirmed) -> bool:
        """Return whether another try within the budget cannot bring another reply."""
        return isinstance(why, NotAttempted | StoreFull)

    def _learn(self, why: Unconfirmed, claim: Claim, deadline: float) -> None:
        """Note a claim that was not confirmed: the server is full, or it may be down."""
        if isinstance(why, StoreFull):
            if (node := self._servers.node_of(store_key(claim.key))) is not None:
                node.losses.refused_for_memory()
        elif not isinstance(why, NotAttempted):
            breaker = self._servers.breaker_of(claim.key)
            breaker.failed(deadline - self._timeout_s)
            self._strained.add(breaker)

    def _relieve(self, breaker: Breaker) -> None:
        """Note a claim that got its reply, and forget the servers that are none any more."""
        breaker.succeeded()
        self._strained &= {node.breaker for node in self.nodes} - {breaker}

    async def _unconfirmed(
        self,
        claim: Claim,
        scope: Scope,
        why: Unconfirmed,
        stands: bool,
        maybe_executed: bool,
        give_up: Callable[[Claim], None] | None,
    ) -> NotClaimed:
        """End a claim that is not ours, and leave nothing of it: one that stands for sure is freed before that.

        Where claims are withheld, what stands there is told.
        """
        if give_up is not None:
            if stands and not maybe_executed:
                maybe_executed = (await self.release(claim, self._give_back_s)).status is SettleStatus.UNCONFIRMED
            if maybe_executed:
                give_up(claim)
            elif isinstance(why, ClaimsSuspended) and why.replays:
                there = await self.look(claim.key, scope, claim.lease_ms)
                return why if there is None or isinstance(there, Unconfirmed) else there
        elif maybe_executed:
            self._note_copy(claim)
        return replace(why, maybe_executed=maybe_executed)

    async def _withdrawn(self, found: Record, claim: Claim) -> bool:
        """Free a key that a claim of ours was given up for, and for which nothing was sent, before its turn."""
        return (await self.release(claim._replace(token=found.token), self._timeout_s)).status is SettleStatus.RELEASED

    async def look(self, key: bytes, scope: Scope, lease_ms: int) -> NotClaimed | None:
        """Return what stands in the store for a key, None for nothing: a claim that is always too late."""
        nobody = Claim(key, bytes(TOKEN_BYTES), b"", b"", bytes(16), bytes(32), 0, lease_ms, 0)
        args, deadline = self._describe(nobody) + TOO_LATE, self._loop.time() + self._timeout_s
        reply = await self._call("claim", key, deadline, args, CLAIM_ARGUMENTS)
        found = self._read_claim(nobody, scope, reply)
        return None if isinstance(found, str | Claim) else found

    def _describe(self, claim: Claim) -> bytes:
        """Return the arguments of `claim` that do not depend on when and where it is asked."""
        _, token, _, mode, fingerprint, described, _, lease_ms, retention_ms = claim
        terms = self._terms.get((mode, lease_ms, retention_ms))
        if terms is None:  # one for each policy
            terms = self._terms[mode, lease_ms, retention_ms] = b"\r\n" + resp(mode, lease_ms, retention_ms)
        # Joined here: 15k instructions a claim less than word by word (measured).
        return b"".join((_16, token, _16_NEXT, fingerprint, _32_NEXT, described, terms))

    def _read_claim(self, claim: Claim, scope: Scope, reply: Any) -> ClaimResult | str:
        """Return what a reply to `claim` means; "late" where the claim came too late."""
        # By its length too: the state of a damaged record may be any word.
        word = reply[0] if isinstance(reply, list) and len(reply) == 4 else b""
        if word == b"claimed":
            _, now_ms, fence, created = reply
            self._servers.heard(now_ms)
            key, token, _, mode, fingerprint, described, _, lease_ms, retention_ms = claim
            return Claim(
                key=key,
                token=token,
                fence=fence,
                mode=mode,
                fingerprint=fingerprint,
                self_check=described,
                created_ms=int(created),
                lease_ms=lease_ms,
                retention_ms=retention_ms,
            )
        if word == b"complete":
            _, now_ms, meta, body = reply
            self._servers.heard(now_ms)
            return unpack(claim.key, scope.tenant, meta, body, now_ms)
        match reply:
            case [b"late", int(now_ms)]:
                self._servers.heard(now_ms)
                return "late"
            case [state, int(now_ms), *fields] if len(fields) == 7:
                return running(claim.key, scope.tenant, [state, *fields], now_ms)
            case ErrorReply() if str(reply).startswith("WRONGTYPE"):
                return Corrupt("the record is of another type")
            case Unconfirmed():
                return reply
            case _ if is_out_of_memory(reply):
                return StoreFull(str(reply))
            case _:  # an error: nothing was written
                return Unconfirmed(str(reply), maybe_executed=False)

    def _give_up(self, claim: Claim) -> None:
        """Free a key behind the caller's back: its claim may have been executed, or may yet be."""
        self._given_up.add(claim.token)
        self._background(self._withdraw(claim))

    def _note_copy(self, claim: Claim) -> None:
        """Note a claim that was asked for more than once: a copy that is held up would take the key once it is free.

        Only until it would be late; a release meanwhile is made again then.
        """
        self._doubled.add(claim.token)
        self._loop.call_later(self._timeout_s, self._doubled.discard, claim.token)

    async def _withdraw(self, claim: Claim) -> None:
        until = self._loop.time() + claim.retention_ms / 1000
        await asyncio.sleep(self._timeout_s)  # from now on it cannot be executed any more
        while (await self.release(claim, self._patience_s)).status is SettleStatus.UNCONFIRMED:
            if self._loop.time() >= min(until, self._patience_ends):
                break
        self._given_up.discard(claim.token)

    async def append(self, claim: Claim, index: int, chunk: bytes, patience_s: float) -> AppendStatus:
        """Store chunk `index` of a response, and extend the lease."""
        words = resp(claim.token, index, chunk, claim.lease_ms)
        reply, _ = await self._repeat("append", claim, self._loop.time() + patience_s, words, 4)
        return append_status(reply)

    async def renew(self, claim: Claim, stage: bytes = b"claimed") -> RenewStatus:
        """Extend the lease, and note how far the exchange got (`stage`). One try: the next renewal is the retry."""
        deadline = self._loop.time() + self._timeout_s
        args = resp(claim.token, claim.lease_ms, claim.retention_ms, stage)
        return renew_status(await self._call("renew", claim.key, deadline, args, 4))

    def store(self, claim: Claim, answer: StoredResponse, last: bytes, patience_s: float) -> Settling:
        """Settle: make the record complete. `last` is the last chunk if it was not appended, else empty."""
        meta, number, size = pack(claim, answer), NUMBER, SIZE
        _, _, _, digest, chunks, body_size, kept, *_ = answer
        counts = number[chunks] + number[body_size] if kept else number[0] * 2
        # Joined here: hiredis formats each word anew.
        words = (_STORE, number[claim.retention_ms], size[len(meta)], meta, _16_NEXT, digest, b"\r\n", counts)
        return self._settle(claim, 8, b"".join((*words, size[len(last)], last, b"\r\n")), patience_s)

    def release(self, claim: Claim, patience_s: float) -> Settling:
        """Settle: free the key."""
        if claim.token in self._doubled:
            self._doubled.discard(claim.token)
            self._give_up(claim)
        return self._settle(claim, 3, _RELEASE + resp(claim.retention_ms), patience_s)

    def mark_unknown(self, claim: Claim, why: str, patience_s: float) -> Settling:
        """Settle: sent, and nobody can say what became of it."""
        _, fence, mode, fingerprint, described, created_ms = claim[1:7]
        words = resp(b"unknown", claim.retention_ms, fence, mode, fingerprint, described, created_ms, why)
        return self._settle(claim, 9, words, patience_s)

    async def _settle(self, claim: Claim, count: int, words: bytes, patience_s: float) -> SettleResult:
        args = b"".join((_16, claim.token, b"\r\n", words))
        now = self._loop.time()
        deadline = now + min(self._timeout_s, patience_s)
        reply = await self._servers.run("settle", claim.key, deadline, args, count)
        again = may_have_run(reply)
        if not is_final(reply):
            self._repeated()
            reply, twice = await self._repeat("settle", claim, now + patience_s, args, count)
            again |= twice
        match reply:
            case [b"released", _] if again:
                # That the record was gone may be the doing of our own first try.
                return SettleResult(SettleStatus.RELEASED)
            case [word, before]:
                return SettleResult(SETTLE[word], record_was_gone=before == b"absent")
            case [b"fenced" | b"complete"] if again and words.startswith(_RELEASE):
                # The owner that the key has now claimed it after our own first try.
                return SettleResult(SettleStatus.RELEASED)
            case [word]:
                return SettleResult(SETTLE[word])
            case _:
                return SettleResult(SettleStatus.UNCONFIRMED)

    async def read(self, key: bytes, token: bytes, first: int) -> list[bytes] | ReadFailure:
        """Return chunks of a complete response from index `first` on: about READ_BYTES, and at least one chunk."""
        deadline = self._loop.time() + self._timeout_s
        return read_chunks(await self._call("read", key, deadline, resp(token, first, READ_BYTES), 3))

    # For operators ...

    def node_of(self, key: bytes) -> Node | None:
        """Return the server that has a key now, None where that is not known."""
        return self._servers.node_of(store_key(key))

    def token(self) -> bytes:
        """Return a new token of this store's own."""
        return self._prefix + next(self._count).to_bytes(6, "big")

    async def resolve(self, key: bytes, token: bytes, meta: bytes, body: bytes, retention_ms: int) -> ResolveStatus:
        """Give a key its response, if `token` still owns it."""
        return await self._resolve(key, resp(token, b"answer", retention_ms, meta, body), 5)

    async def set_free(self, key: bytes, token: bytes, operator: bytes, fence: bytes) -> ResolveStatus:
        """Free a key, if `token` still owns it. The token `operator` fences the owner from then on."""
        return await self._resolve(key, resp(token, b"release", operator, fence), 4)

    async def _resolve(self, key: bytes, args: bytes, count: int) -> ResolveStatus:
        return resolve_status(await self._call("resolve", key, self._loop.time() + self._timeout_s, args, count))

    # Calls ...

    async def _repeat(self, verb: str, claim: Claim, give_up: float, args: bytes, count: int) -> tuple[Any, bool]:
        """Call until a reply comes or it is `give_up` (the loop's time). At the memory limit a repeat does not help.

        Return also whether a try before the last one may have been executed.
        """
        loop = self._loop
        pause_s = PAUSE_FIRST_S
        again = False
        while True:
            deadline = min(loop.time() + self._timeout_s, max(give_up, loop.time() + 0.05))
            reply = await self._call(verb, claim.key, deadline, args, count)
            if is_final(reply) or loop.time() + pause_s >= min(give_up, self._patience_ends):
                return reply, again
            again |= may_have_run(reply)
            self._repeated()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MOST_S)

    async def _call(self, verb: str, key: bytes, deadline: float, args: bytes, count: int) -> Any:
        """Run a script once; a server that does not know it (a new master, SCRIPT FLUSH) is given its body."""
        run = self._servers.run
        reply = await run(verb, key, deadline, args, count)
        return await run(verb, key, deadline, args, count, whole=True) if is_noscript(reply) else reply


def _opens(found: Record, claim: Claim, window_ms: int) -> bool:
    """Return whether the key of a checked record can be claimed with its token as the one seen."""
    past = window_ms > 0 and found.created_ms + window_ms < found.now_ms
    state = effective_state(found.state, found.lease_left_ms)
    return may_take_over(state, found.fingerprint == claim.fingerprint, found.mode, past)
