"""The store: five verbs on one record for each key, and what their replies mean.

Only this package speaks to a store. `claim` is the one place that makes a Claim. Whatever was not
confirmed is repeated with the same token, within the caller's budget: the scripts make a repeat safe.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from proxy.decision import is_open, state_now
from proxy.keys import Scope, store_key
from proxy.store.link import ErrorReply, Link, Script, Unconfirmed, resp
from proxy.store.record import TOKEN_BYTES, Claim, Corrupt, Record, StoredAnswer, pack, running, self_check, unpack
from proxy.store.server import (
    FULL_RATIO,
    Unfit,
    load_scripts,
    memory_ratio,
    opener,
    parse_info,
    preparer,
    problem,
)

__all__ = [
    "Claim",
    "Claiming",
    "Corrupt",
    "Record",
    "Settled",
    "Settling",
    "Store",
    "StoredAnswer",
    "Unconfirmed",
    "Unfit",
]

INLINE_BYTES = 65536  # a stored body up to this comes with the reply to `claim`
READ_BYTES = 262144  # of a larger one at a time
_ORDINARY = b"\r\n" + resp(INLINE_BYTES, 0, b"")  # no window, nothing seen
_16, _16_NEXT, _32_NEXT, _13 = b"$16\r\n", b"\r\n$16\r\n", b"\r\n$32\r\n", b"$13\r\n"  # bytes of words of a known size
_RELEASE = resp(b"release")
PAUSE_FIRST_S, PAUSE_MOST_S = 0.01, 0.5
HEALTH_S = 2.0


class Settled(NamedTuple):
    """How a settle came out.

    `word`: stored, released, unknown; torn (the record lacks chunks); fenced (another's, or another
    answer of ours); unconfirmed. `lost`: the record was gone and was written anew, where it says so.
    """

    word: str
    lost: bool = False


_STORED = Settled("stored")
Settling = Coroutine[Any, Any, Settled]
Claiming = Coroutine[Any, Any, Claim | Record | Corrupt | Unconfirmed]


@dataclass(slots=True)
class _Clock:
    """The server's clock, as far as its replies tell. It may lag behind, never run ahead."""

    offset_ms: float = 0.0

    def heard(self, now_ms: int) -> None:
        self.offset_ms = now_ms - time.monotonic() * 1000

    def now_ms(self) -> int:
        return int(time.monotonic() * 1000 + self.offset_ms)


class Store:
    """One Redis server. Times in the unit of their name.

    `observe(verb, seconds)` hears of every call, `repeated()` of every one that is made again;
    `background` finishes work that nobody waits for.
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
    ) -> None:
        self._timeout_s = timeout_ms / 1000
        self._patience_s = patience_s
        self._repeated = repeated
        self._loop = asyncio.get_running_loop()
        self._background = background
        self._scripts = load_scripts()
        self._clock = _Clock()
        open_connection = opener(url, self._timeout_s)
        prepare = preparer(self._scripts, self._clock.heard)
        self._terms: dict[tuple[bytes, int, int], bytes] = {}
        self._link = Link(open_connection, prepare, self._timeout_s, observe)
        self._reads = Link(open_connection, prepare, self._timeout_s, observe)  # a large reply would stop the others
        self._prefix, self._count = os.urandom(TOKEN_BYTES - 6), count(1)
        self._info: dict[str, str] = {}
        self._given_up: set[bytes] = set()  # tokens of claims that may be in the store though nobody has them
        self._patience_ends = float("inf")  # the loop's time after which nothing is repeated any more

    # Its life ...

    def start(self) -> None:
        self._link.start()
        self._reads.start()

    async def close(self) -> None:
        await asyncio.gather(self._link.close(), self._reads.close())

    async def wait_up(self, seconds: float) -> bool:
        return await self._link.wait_up(self._loop.time() + seconds)

    def give_up(self) -> None:
        """Let every call end now, also those that still come; what is not confirmed stays unconfirmed."""
        self._patience_ends = self._loop.time()
        self._link.give_up()
        self._reads.give_up()

    def problem(self) -> str | None:
        """Return why the store cannot be relied on now, None where it can."""
        if not self._link.up:
            return f"the store is not reachable: {self._link.down_because}"
        return problem(self._info)

    @property
    def memory_ratio(self) -> float:
        return memory_ratio(self._info)

    @property
    def full(self) -> bool:
        """Whether answers are to be stored without their body."""
        return self.memory_ratio > FULL_RATIO

    async def watch(self) -> None:
        """Keep looking at the server's memory, eviction policy and role, until cancelled."""
        loop = self._loop
        while True:
            if await self._link.wait_up(loop.time() + HEALTH_S):
                deadline = loop.time() + self._timeout_s
                reply = await self._link.command("INFO", "memory", "replication", deadline=deadline)
                if isinstance(reply, bytes):
                    self._info = parse_info(reply)
                await asyncio.sleep(HEALTH_S)

    def now_ms(self) -> int:
        """Return the server's time."""
        return self._clock.now_ms()

    # Verbs ...

    def claim(
        self,
        key: bytes,
        scope: Scope,
        fingerprint: bytes,
        *,
        mode: bytes,
        lease_ms: int,
        retention_ms: int,
        window_ms: int = 0,
    ) -> Claiming:
        """Claim a key, or return what stands there. Unconfirmed: a claim never lands after that.

        `window_ms`: of a derived key, after which its complete record counts no more.
        """
        token = self._prefix + next(self._count).to_bytes(6, "big")
        described = self_check(key, scope.tenant, token, mode, fingerprint)
        claim = Claim(key, token, b"", mode, fingerprint, described, 0, lease_ms, retention_ms)
        return self._claim(claim, scope, window_ms, self._give_up)

    def reclaim(self, claim: Claim, scope: Scope) -> Claiming:
        """Claim again with the same token: Claim means that the key is ours, with the fence it has now."""
        return self._claim(claim, scope, 0, None)

    async def _claim(
        self, claim: Claim, scope: Scope, window_ms: int, give_up: Callable[[Claim], None] | None
    ) -> Claim | Record | Corrupt | Unconfirmed:
        """Claim, again with the same token where need be, until the budget is over."""
        loop, clock = self._loop, self._clock
        left_s = self._timeout_s
        deadline = loop.time() + left_s
        pause_s = PAUSE_FIRST_S
        maybe_executed, seen = False, b""
        try:
            while True:
                not_after_ms = clock.now_ms() + int(left_s * 1000)
                reply = await self._ask(claim, not_after_ms, deadline, window_ms, seen)
                if is_noscript(reply):
                    reply = await self._ask(claim, not_after_ms, deadline, window_ms, seen, whole=True)
                found = self._read_claim(claim, scope, reply)
                if isinstance(found, Claim):
                    return found
                if isinstance(found, str):  # our idea of the server's time was behind; the reply corrected it
                    found = Unconfirmed("the store was reached too late", maybe_executed=False)
                if isinstance(found, Record) and found.token != seen and await self._opens(found, claim, window_ms):
                    seen, left_s = found.token, deadline - loop.time()
                    continue
                if not isinstance(found, Unconfirmed):
                    return found
                maybe_executed |= found.maybe_executed
                if loop.time() + pause_s >= min(deadline, self._patience_ends) or found.detail.startswith("OOM"):
                    if maybe_executed and give_up is not None:
                        give_up(claim)
                    return Unconfirmed(found.detail, maybe_executed)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, PAUSE_MOST_S)
                left_s = deadline - loop.time()
        except (Exception, asyncio.CancelledError):
            if give_up is not None:
                give_up(claim)
            raise

    async def _opens(self, found: Record, claim: Claim, window_ms: int) -> bool:
        """Return whether the key of a checked record can be claimed with its token as the one seen."""
        if found.token in self._given_up:  # nothing was sent for it, and its withdrawal has not come through yet
            return (await self.release(claim._replace(token=found.token), self._timeout_s)).word == "released"
        past = window_ms > 0 and found.created_ms + window_ms < found.now_ms
        state = state_now(found.state, found.lease_left_ms)
        return is_open(state, found.fingerprint == claim.fingerprint, found.mode, past)

    async def look(self, key: bytes, scope: Scope, lease_ms: int) -> Record | Corrupt | Unconfirmed | None:
        """Return what stands in the store for a key, None for nothing: a claim that is always too late."""
        nobody = Claim(key, bytes(TOKEN_BYTES), b"", b"", bytes(16), bytes(32), 0, lease_ms, 0)
        deadline = self._loop.time() + self._timeout_s
        reply = await self._ask(nobody, 0, deadline)
        if is_noscript(reply):
            reply = await self._ask(nobody, 0, deadline, whole=True)
        found = self._read_claim(nobody, scope, reply)
        return None if isinstance(found, str | Claim) else found

    def _ask(
        self,
        claim: Claim,
        not_after_ms: int,
        deadline: float,
        window_ms: int = 0,
        seen: bytes = b"",
        whole: bool = False,
    ) -> Awaitable[Any]:
        key, token, _, mode, fingerprint, described, _, lease_ms, retention_ms = claim
        terms = self._terms.get((mode, lease_ms, retention_ms))
        if terms is None:  # one for each policy
            terms = self._terms[mode, lease_ms, retention_ms] = b"\r\n" + resp(mode, lease_ms, retention_ms)
        not_after = b"%013d" % not_after_ms
        rest = b"\r\n" + resp(INLINE_BYTES, window_ms, seen) if window_ms or seen else _ORDINARY
        # Joined here: 15k instructions a claim less than word by word (measured).
        args = b"".join((_16, token, _16_NEXT, fingerprint, _32_NEXT, described, terms, _13, not_after, rest))
        return self._run("claim", key, deadline, args, 10, self._link, whole)

    def _read_claim(self, claim: Claim, scope: Scope, reply: Any) -> Claim | Record | Corrupt | Unconfirmed | str:
        """Return what a reply to `claim` means; "late" where the claim came too late."""
        if isinstance(reply, list) and reply[0] == b"claimed":
            _, now_ms, fence, created = reply
            self._clock.heard(now_ms)
            key, token, _, mode, fingerprint, described, _, lease_ms, retention_ms = claim
            return Claim(key, token, fence, mode, fingerprint, described, int(created), lease_ms, retention_ms)
        match reply:
            case [b"late", int(now_ms)]:
                self._clock.heard(now_ms)
                return "late"
            case [b"complete", int(now_ms), bytes(meta), body]:
                self._clock.heard(now_ms)
                return unpack(claim.key, scope.tenant, meta, body, now_ms)
            case [state, int(now_ms), *fields] if len(fields) == 7:
                return running(claim.key, scope.tenant, [state, *fields], now_ms)
            case ErrorReply() if str(reply).startswith("WRONGTYPE"):
                return Corrupt("the record is of another type")
            case Unconfirmed():
                return reply
            case _:  # an error: nothing was written
                return Unconfirmed(str(reply), maybe_executed=False)

    def _give_up(self, claim: Claim) -> None:
        """Free a key behind the caller's back: its claim may have been executed, or may yet be."""
        self._given_up.add(claim.token)
        self._background(self._withdraw(claim))

    async def _withdraw(self, claim: Claim) -> None:
        until = self._loop.time() + claim.retention_ms / 1000
        await asyncio.sleep(self._timeout_s)  # from now on it cannot be executed any more
        while (await self.release(claim, self._patience_s)).word == "unconfirmed":
            if self._loop.time() >= min(until, self._patience_ends):
                break
        self._given_up.discard(claim.token)

    async def append(self, claim: Claim, index: int, chunk: bytes, patience_s: float) -> str:
        """Keep chunk `index`: appended, torn, absent, complete, fenced, full (no memory) or unconfirmed."""
        words = resp(claim.token, index, chunk, claim.lease_ms)
        reply, _ = await self._repeat("append", claim, self._loop.time() + patience_s, words, 4)
        if isinstance(reply, ErrorReply):
            return "full" if str(reply).startswith("OOM") else "unconfirmed"
        return "unconfirmed" if isinstance(reply, Unconfirmed) else reply[0].decode()

    async def renew(self, claim: Claim) -> str:
        """Extend the lease once: renewed, absent, unknown, complete, fenced or unconfirmed."""
        deadline = self._loop.time() + self._timeout_s
        args = resp(claim.token, claim.lease_ms, claim.retention_ms)
        reply = await self._call("renew", claim.key, deadline, args, 3)
        return reply[0].decode() if isinstance(reply, list) else "unconfirmed"

    def store(self, claim: Claim, answer: StoredAnswer, last: bytes, patience_s: float) -> Settling:
        """Settle: make the record complete. `last` is the last chunk if it was not appended, else empty."""
        meta, digest, retention_ms = pack(claim, answer), answer.digest, claim.retention_ms
        chunks, size = (answer.chunks, answer.size) if answer.kept else (0, 0)
        words = resp(b"store", retention_ms, meta, digest, chunks, size, last)
        return self._settle(claim, 8, words, patience_s)

    def release(self, claim: Claim, patience_s: float) -> Settling:
        """Settle: free the key."""
        return self._settle(claim, 3, _RELEASE + resp(claim.retention_ms), patience_s)

    def mark_unknown(self, claim: Claim, why: str, patience_s: float) -> Settling:
        """Settle: sent, and nobody can say what became of it."""
        _, fence, mode, fingerprint, described, created_ms = claim[1:7]
        words = resp(b"unknown", claim.retention_ms, fence, mode, fingerprint, described, created_ms, why)
        return self._settle(claim, 9, words, patience_s)

    async def _settle(self, claim: Claim, count: int, words: bytes, patience_s: float) -> Settled:
        args = b"".join((_16, claim.token, b"\r\n", words))
        now = self._loop.time()
        deadline = now + min(self._timeout_s, patience_s)
        reply = await self._run("settle", claim.key, deadline, args, count, self._link)
        again = isinstance(reply, Unconfirmed) and reply.maybe_executed
        if not is_final(reply):
            self._repeated()
            reply, twice = await self._repeat("settle", claim, now + patience_s, args, count)
            again |= twice
        match reply:
            case [b"stored", b"found"]:
                return _STORED
            case [b"released", _] if again:
                return Settled("released")  # absent may be our own first try's doing
            case [word, before]:
                return Settled(word.decode(), lost=before == b"absent")
            case [b"torn"]:
                return Settled("torn")
            case [_] if again and words.startswith(_RELEASE):
                return Settled("released")  # who has the key now claimed it after our own first try
            case [_]:
                return Settled("fenced")
            case _:
                return Settled("unconfirmed")

    async def read(self, key: bytes, token: bytes, first: int) -> list[bytes] | str:
        """Return the chunks of a complete answer from `first` on, as many as fit.

        Else: torn (the record lacks that chunk), gone (it is another's now, or none) or unconfirmed.
        """
        deadline = self._loop.time() + self._timeout_s
        reply = await self._call("read", key, deadline, resp(token, first, READ_BYTES), 3, self._reads)
        match reply:
            case [b"chunks", *chunks]:
                return chunks
            case [bytes(word)]:
                return word.decode()
            case _:
                return "unconfirmed"

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
            again |= isinstance(reply, Unconfirmed) and reply.maybe_executed
            self._repeated()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MOST_S)

    async def _call(
        self, verb: str, key: bytes, deadline: float, args: bytes, count: int, link: Link | None = None
    ) -> Any:
        """Run a script once; a server that does not know it (a new master, SCRIPT FLUSH) is given its body."""
        link = link or self._link
        reply = await self._run(verb, key, deadline, args, count, link)
        return await self._run(verb, key, deadline, args, count, link, True) if is_noscript(reply) else reply

    def _run(
        self, verb: str, key: bytes, deadline: float, args: bytes, count: int, link: Link, whole: bool = False
    ) -> Awaitable[Any]:
        """Return what will be the reply; where the connection stands, that is a mere future."""
        script = self._scripts[verb]
        if link.up:
            return link.script(script, store_key(key), args, count, deadline, whole)
        return self._run_when_up(link, script, store_key(key), args, count, deadline, whole)

    async def _run_when_up(
        self, link: Link, script: Script, key: bytes, args: bytes, count: int, deadline: float, whole: bool
    ) -> Any:
        if not await link.wait_up(deadline):
            return Unconfirmed(link.down_because, maybe_executed=False)
        return await link.script(script, key, args, count, deadline, whole)


def is_final(reply: object) -> bool:
    """Return whether calling again cannot bring another reply."""
    return isinstance(reply, list) or (isinstance(reply, ErrorReply) and str(reply).startswith("OOM"))


def is_noscript(reply: object) -> bool:
    """Return whether a server does not know the script it was asked to run."""
    return isinstance(reply, ErrorReply) and str(reply).startswith("NOSCRIPT")
