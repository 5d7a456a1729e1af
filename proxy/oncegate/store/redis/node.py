"""One server of the store: its connections, its clock, and the calls of scripts on it."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio.connection import AbstractConnection

from oncegate.keys.digests import KEY_DIGEST_BYTES
from oncegate.store.health.breaker import Breaker
from oncegate.store.membership import HEALTH_S, Membership
from oncegate.store.record_name import store_key
from oncegate.store.redis import arguments
from oncegate.store.redis.durable import ClaimCheck, DurabilityLevel, WaitingLink
from oncegate.store.redis.health_monitor import HealthMonitor
from oncegate.store.redis.link import Link
from oncegate.store.redis.membership import InspectionHistory, WrittenLayout
from oncegate.store.redis.replies import is_out_of_memory
from oncegate.store.redis.server import (
    INFO,
    Clock,
    Info,
    Opener,
    Openers,
    Unfit,
    check_mode,
    greet,
    parse_info,
    set_up,
    version_of,
)
from oncegate.store.redis.talk import Talk
from oncegate.store.redis.wire import Script, ScriptCall
from oncegate.store.results import Forbidden, NotAttempted, StoreFull, Unconfirmed
from oncegate.store.store import Observers

MIN_PROBE_PAUSE_S, MAX_PROBE_PAUSE_S = 0.05, 0.5
# Asked before a new connection to this address is used, with the server's INFO; raises if it is not to be used.
Accept = Callable[[tuple[str, int] | None, Info], Awaitable[None]]


def _ignore_time(_now_ms: int) -> None:
    """Take no time over: another connection reports it."""


async def _accept_any(_at: tuple[str, int] | None, _info: Info) -> None:
    """Use whichever server a connection leads to."""


def random_key() -> bytes:
    """Return a digest that no request has."""
    return os.urandom(KEY_DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What all servers of a store have in common.

    `observers`, by a script's verb, are called with the seconds of each call, `log(event, **fields)` with what
    operators should know, and `breaker_opened()` when claims are no longer tried for a while. `histories` are shared:
    after a failover another server is compared with what this one had. So is the `layout` that records are written in.
    """

    scripts: dict[str, Script]
    timeout_s: float
    observers: Observers
    log: Callable[..., None]
    breaker_opened: Callable[[], None]
    openers: Openers
    level: DurabilityLevel | None = None
    cluster: bool = False
    member: Membership | None = None
    histories: dict[bytes, InspectionHistory] = field(default_factory=dict)
    layout: WrittenLayout = field(default_factory=WrittenLayout)

    def check(self, info: Info) -> None:
        """Raise Unfit for a server of another kind than the URL says, or too old for the durability."""
        check_mode(info, self.cluster)
        if self.level is not None and (unable := self.level.unable_by_version(version_of(info))):
            raise Unfit(f"the store {unable}")


class Node:
    """One server, or whichever server has one role, such as the master that Sentinel names.

    It has up to three connections. `link` carries everything short. `reads` carries large replies, which would hold up
    the others. `claims` carries the claims: it is `link`, unless claims wait for replicas or disks. A new connection is
    used once `accept(connection)` returns.
    """

    def __init__(
        self, open_connection: Opener, config: NodeConfig, name: str = "the store", accept: Accept = _accept_any
    ) -> None:
        self.name, self._config, self._accept = name, config, accept
        # In a cluster: a hash tag whose keys lie on this server, and a function that returns digests that do.
        self.tag, self.key_for_probe = b"", random_key
        self._claim, self.open_connection = config.scripts["claim"], open_connection
        self._loop = asyncio.get_running_loop()
        self._clock = Clock()
        self.now_ms = self._clock.now_ms
        self.health = HealthMonitor(config.scripts, config.member, config.histories, config.layout)
        self.breaker = Breaker(self._loop.time, self._breaker_opened)
        # Whether `_refusal` has to be asked before a claim.
        self._may_refuse = False
        self._check = ClaimCheck(config.scripts, config.level)
        links: Any = (open_connection, self._prepare, config.timeout_s, config.observers)
        self.reads = Link(*links)
        self.note_time: Callable[[int], None] = self._clock.note
        if config.level is None:
            self.link = self.claims = Link(*links)
            return
        # The clock has to be the one of the server that executes the claims. WaitingLink reports it before the claims
        # wait for replicas; when their results arrive, that time is old.
        self.note_time = _ignore_time
        self.link = Link(*links)
        self.claims = WaitingLink(*links, level=config.level, note_time=self._clock.note)

    # Life of the connections ...

    @property
    def nodes(self) -> "list[Node]":
        return [self]

    @property
    def up(self) -> bool:
        return self.link.up and self.claims.up

    @property
    def readable(self) -> bool:
        """Whether the server answers now, be it only to reads."""
        return self.link.responsive

    @property
    def links(self) -> set[Link]:
        return {self.link, self.reads, self.claims}

    def start(self) -> None:
        for link in self.links:
            link.start()

    async def close(self) -> None:
        await asyncio.gather(*[link.close() for link in self.links])

    def end_calls(self) -> None:
        for link in self.links:
            link.end_calls()

    async def wait_up(self, deadline: float) -> bool:
        return await self.link.wait_up(deadline) and await self.claims.wait_up(deadline)

    # A new connection ...

    async def _prepare(self, link: Link, connection: AbstractConnection) -> None:
        """Make a new connection fit for calls, in at most PREPARE_STEPS round trips.

        Losses and refusals are known before the first claim. Raises for a server that cannot be used.
        """
        talk, config, carries_claims = Talk(link), self._config, link is self.claims
        await greet(talk, connection)
        key = self._probe_key() if carries_claims else b""
        asked = self._check.questions(key) if carries_claims else []
        info, now_ms, replies = await set_up(talk, config.scripts, config.check, *asked)
        await self._accept(link.at, parse_info(info) if isinstance(info, bytes) else {})
        if carries_claims:
            self._clock.note(now_ms)
            await self._judge(talk, info, replies)

    def _probe_key(self) -> bytes:
        """Return a digest for a probe, empty where this proxy does not claim keys, or not at this server."""
        claims = self._config.member is not None and (self.tag or not self._config.cluster)
        return self.key_for_probe() if claims else b""

    # Health ...

    def not_ready_reason(self) -> str | None:
        """Return why this server cannot be relied on now, or None."""
        for link in (self.link, self.claims):
            if not link.up:
                return f"{self.name} is not reachable: {link.down_reason}"
        level = self._config.level
        unable = self._check.below_level or (level.unable(self.info) if level else None)
        if not unable and self.breaker.open:
            unable = "does not confirm claims"
        if not unable and (reason := self.health.not_ready_reason()):
            return reason
        unable = unable or self._check.failure
        return f"{self.name} {unable}" if unable else None

    @property
    def info(self) -> Info:
        """The server's last INFO."""
        return self.health.info

    @property
    def memory_ratio(self) -> float:
        return self.health.memory_ratio

    def node_of(self, _name: bytes) -> "Node | None":
        return self

    def breaker_of(self, _key: bytes) -> Breaker:
        return self.breaker

    async def watch(self) -> None:
        """Inspect the server every HEALTH_S seconds, until cancelled."""
        loop = self._loop
        while True:
            if await self.link.wait_up(loop.time() + HEALTH_S):
                await self.inspect()
                await asyncio.sleep(HEALTH_S)

    async def inspect(self) -> None:
        """Ask the server for its INFO, for losses of what it acknowledged, and whether claims can succeed.

        Every connection is used. One that is idle for hours may be gone without a sign, and the first large replay
        would wait for it in vain.
        """
        for link in self.links - {self.link}:
            if link.up:
                link.command("PING", deadline=self._loop.time() + self._config.timeout_s)
        talk, key = Talk(self.link), self._probe_key() if self._check.failure else b""
        info, *replies = await talk.ask(INFO, *self._check.questions(key))
        await self._judge(talk, info, replies)

    async def _judge(self, talk: Talk, info: object, replies: list[Any]) -> None:
        """Inspect the server with its replies to INFO and to the questions of ClaimCheck."""
        hash_tag = None if self._config.cluster and not self.tag else self.tag
        exchange = self._check.exchange(replies, self._probe_key(), self._probe_key())
        self._check.note(replies, await self.health.inspect(talk, hash_tag, info, *exchange))
        self.health.note_packing(self._check.may_pack)
        self._may_refuse = True

    def note_refusal(self, refusal: StoreFull | Forbidden) -> None:
        """Note that the server refused a claim. Inspections find out when that has changed."""
        if isinstance(refusal, StoreFull):
            self.health.note_full()
        else:
            self._check.note_forbidden(refusal.reason)
            self._may_refuse = True

    def _breaker_opened(self) -> None:
        self._may_refuse = True
        self._config.breaker_opened()

    def _refusal(self) -> NotAttempted | None:
        """Return why claims are not sent now, or None."""
        if (suspended := self.health.suspended()) is not None:
            return suspended
        if self.breaker.open:
            return NotAttempted(f"{self.name} does not confirm claims")
        if reason := self._check.refusal:
            return NotAttempted(f"{self.name} {reason}")
        self._may_refuse = False
        return None

    async def probe(self) -> None:
        """While the breaker is open, claim a random key now and then, and close the breaker once that succeeds."""
        pause_s = MIN_PROBE_PAUSE_S
        while True:
            await asyncio.sleep(pause_s if self.breaker.open else MAX_PROBE_PAUSE_S)
            pause_s = min(pause_s * 2, MAX_PROBE_PAUSE_S) if self.breaker.open else MIN_PROBE_PAUSE_S
            if self.breaker.open and await self.takes_claims(os.urandom(KEY_DIGEST_BYTES)):
                self.breaker.succeeded()

    async def takes_claims(self, key: bytes) -> bool:
        """Claim the digest of no key and free it again. Return whether the server replied to the claim.

        A server at its memory limit counts as well: it refuses first-time keys, but it works.
        """
        probe, timeout_s = arguments.probe_claim(key), self._config.timeout_s
        name, deadline = store_key(key), self._loop.time() + timeout_s
        # By body in a second try, for a server that does not know the script.
        for by_body in (False, True):
            call = ScriptCall(self._claim, name, arguments.CLAIM_COUNT, deadline, by_body)
            tail = arguments.FIRST_TAIL[False]
            reply = await self.claim(call, arguments.claim_head(probe), tail, timeout_s, probe=True)
            if isinstance(reply, list):
                settle = self._config.scripts["settle"]
                await self.run(ScriptCall(settle, name, arguments.RELEASE_COUNT, deadline), arguments.release(probe))
                return True
        return is_out_of_memory(reply)

    # Scripts ...

    def claim(self, call: ScriptCall, head: bytes, tail: bytes, left_s: float, probe: bool = False) -> Awaitable[Any]:
        """Run `claim`. See StoreServers; a `probe` is sent also while claims are refused."""
        if self._may_refuse and not probe and (refusal := self._refusal()) is not None:
            refused = self._loop.create_future()
            refused.set_result(refusal)
            return refused
        if not self.claims.up:
            return self._claim_when_up(call, head, tail, probe)
        # The deadline in the time of the server that is connected now: after a failover it is another server.
        not_after = b"$13\r\n%013d" % (self.now_ms() + int(left_s * 1000))
        return self.claims.script(call, b"".join((head, not_after, tail)))

    async def _claim_when_up(self, call: ScriptCall, head: bytes, tail: bytes, probe: bool) -> Any:
        await self.claims.wait_up(call.deadline)
        left_s = call.deadline - self._loop.time()
        if not self.claims.up or left_s <= 0:
            return Unconfirmed(self.claims.down_reason, maybe_executed=False)
        return await self.claim(call, head, tail, left_s, probe)

    def run(self, call: ScriptCall, args: bytes) -> Awaitable[Any]:
        link = self.reads if call.script.brings_chunks else self.link
        # While the connection is up, the reply is a plain future. A coroutine would cost a step of a task more.
        return link.script(call, args) if link.up else self._run_when_up(link, call, args)

    def command(self, _name: bytes, *words: bytes | str | int, deadline: float) -> Awaitable[Any]:
        return self.link.command(*words, deadline=deadline)

    async def _run_when_up(self, link: Link, call: ScriptCall, args: bytes) -> Any:
        await link.wait_up(call.deadline)
        if not link.up:
            return Unconfirmed(link.down_reason, maybe_executed=False)
        return await self.run(call, args)
