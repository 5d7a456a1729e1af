"""One server of the store: its connections, its clock, and the calls of scripts on it."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from oncegate.decision import HOLD
from oncegate.keys.digests import KEY_DIGEST_BYTES
from oncegate.store.breaker import Breaker
from oncegate.store.record import TOKEN_BYTES
from oncegate.store.record_name import store_key
from oncegate.store.redis.arguments import CLAIM_COUNT, PLAIN_TAIL, RELEASE_COUNT
from oncegate.store.redis.durable import DurabilityLevel, WaitingLink
from oncegate.store.redis.health_monitor import HEALTH_S, HealthMonitor
from oncegate.store.redis.link import Link
from oncegate.store.redis.membership import InspectionHistory, Membership
from oncegate.store.redis.replies import is_out_of_memory
from oncegate.store.redis.server import Info, Opener, Prepare, Unfit, check_mode, preparer, version_of
from oncegate.store.redis.talk import LinkTalk, Talk
from oncegate.store.redis.wire import Observers, Script, ScriptCall, resp
from oncegate.store.results import NotAttempted, Unconfirmed

MIN_PROBE_PAUSE_S, MAX_PROBE_PAUSE_S = 0.05, 0.5
# Retention of a probe's record, should its release be lost.
PROBE_RETENTION_MS = 10_000


class Clock:
    """A server's clock, as its replies report it. It may lag behind, and never runs ahead."""

    __slots__ = ("offset_ms",)

    def __init__(self) -> None:
        self.offset_ms = 0.0

    def note(self, now_ms: int) -> None:
        """Take over the server's time from a reply."""
        self.offset_ms = now_ms - time.monotonic() * 1000

    def now_ms(self, _key: bytes = b"") -> int:
        return int(time.monotonic() * 1000 + self.offset_ms)


def _ignore_time(_now_ms: int) -> None:
    """Take no time over: another connection reports it."""


def _ignore_breaker() -> None:
    """Nobody is to know that a breaker opened."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What all servers of a store have in common.

    `observers`, by a script's verb, are called with the seconds of each call, `log(event, **fields)` with what
    operators should know, and `breaker_opened()` when claims are no longer tried for a while. `histories` are shared,
    because after a failover another server is compared with what this one had.
    """

    scripts: dict[str, Script]
    timeout_s: float
    observers: Observers
    log: Callable[..., None]
    level: DurabilityLevel | None = None
    cluster: bool = False
    member: Membership | None = None
    breaker_opened: Callable[[], None] = _ignore_breaker
    histories: dict[bytes, InspectionHistory] = field(default_factory=dict)

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
        self, open_connection: Opener, config: NodeConfig, name: str = "the store", accept: Prepare | None = None
    ) -> None:
        self.name, self._config = name, config
        # In a cluster: a hash tag whose keys lie on this server.
        self.tag = b""
        self._claim, self._settle, self._read = (config.scripts[verb] for verb in ("claim", "settle", "read"))
        self._loop = asyncio.get_running_loop()
        self._clock = Clock()
        self.now_ms = self._clock.now_ms
        self.health = HealthMonitor(config.scripts, config.member, config.histories)
        self.breaker = Breaker(self._loop.time, self._breaker_opened)
        # Whether `_refusal` has to be asked before a claim.
        self._may_refuse = False
        with_clock = preparer(config.scripts, self._clock.note, config.check, accept, self._inspect_over)
        without_clock = preparer(config.scripts, _ignore_time, config.check, accept)
        self.reads = Link(open_connection, without_clock, config.timeout_s, config.observers)
        self.note_time: Callable[[int], None] = self._clock.note
        if config.level is None:
            self.link = self.claims = Link(open_connection, with_clock, config.timeout_s, config.observers)
            return
        # The clock has to be the one of the server that executes the claims. WaitingLink reports it before the claims
        # wait for replicas; when their results arrive, that time is old.
        self.note_time = _ignore_time
        self.link = Link(open_connection, without_clock, config.timeout_s, config.observers)
        self.claims = WaitingLink(
            open_connection,
            with_clock,
            config.timeout_s,
            config.observers,
            level=config.level,
            note_time=self._clock.note,
        )

    # Life of the connections ...

    @property
    def nodes(self) -> "list[Node]":
        return [self]

    @property
    def up(self) -> bool:
        return self.link.up and self.claims.up

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

    # Health ...

    def not_ready_reason(self) -> str | None:
        """Return why this server cannot be relied on now, or None."""
        for link in (self.link, self.claims):
            if not link.up:
                return f"{self.name} is not reachable: {link.down_reason}"
        unable = self._config.level.unable(self.info) if self._config.level else None
        if self.breaker.open:
            return f"{self.name} does not confirm claims"
        return f"{self.name} {unable}" if unable else self.health.not_ready_reason()

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
        """Ask the server for its INFO once, and for losses of what it acknowledged. Every connection is used.

        One that is idle for hours may be gone without a sign. The first large replay would wait for it in vain.
        """
        for link in self.links - {self.link}:
            if link.up:
                link.command("PING", deadline=self._loop.time() + self._config.timeout_s)
        await self._inspect_over(LinkTalk(self.link, self._config.timeout_s))

    async def _inspect_over(self, talk: Talk) -> None:
        await self.health.inspect(talk, None if self._config.cluster and not self.tag else self.tag)
        self._may_refuse = self.health.may_suspend or self.breaker.open

    def _breaker_opened(self) -> None:
        self._may_refuse = True
        self._config.breaker_opened()

    def _refusal(self) -> NotAttempted | None:
        """Return why claims are not sent now, or None."""
        if (suspended := self.health.suspended()) is not None:
            return suspended
        if self.breaker.open:
            return NotAttempted(f"{self.name} does not confirm claims")
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
        token, timeout_s = os.urandom(TOKEN_BYTES), self._config.timeout_s
        name, deadline = store_key(key), self._loop.time() + timeout_s
        head = resp(token, b"", b"", HOLD, int(timeout_s * 1000), PROBE_RETENTION_MS)
        # By body in a second try, for a server that does not know the script.
        for by_body in (False, True):
            call = ScriptCall(self._claim, name, CLAIM_COUNT, deadline, by_body)
            reply = await self.claim(call, head, PLAIN_TAIL, timeout_s, probe=True)
            if isinstance(reply, list):
                args = resp(token, b"release", PROBE_RETENTION_MS)
                await self.run(ScriptCall(self._settle, name, RELEASE_COUNT, deadline), args)
                return True
        return is_out_of_memory(reply)

    # Scripts ...

    def claim(self, call: ScriptCall, head: bytes, tail: bytes, left_s: float, probe: bool = False) -> Awaitable[Any]:
        """Run `claim`. See StoreServers; a `probe` is sent also while claims are refused."""
        link = self.claims
        if self._may_refuse and not probe and (refusal := self._refusal()) is not None:
            return _resolved(self._loop, refusal)
        if not link.up:
            return self._claim_when_up(call, head, tail, probe)
        # The deadline in the time of the server that is connected now: after a failover it is another server.
        not_after = b"$13\r\n%013d" % (self.now_ms() + int(left_s * 1000))
        return link.script(call, b"".join((head, not_after, tail)))

    async def _claim_when_up(self, call: ScriptCall, head: bytes, tail: bytes, probe: bool) -> Any:
        await self.claims.wait_up(call.deadline)
        left_s = call.deadline - self._loop.time()
        if not self.claims.up or left_s <= 0:
            return Unconfirmed(self.claims.down_reason, maybe_executed=False)
        return await self.claim(call, head, tail, left_s, probe)

    def run(self, call: ScriptCall, args: bytes) -> Awaitable[Any]:
        link = self.reads if call.script is self._read else self.link
        # While the connection is up, the reply is a plain future. A coroutine would cost a step of a task more.
        return link.script(call, args) if link.up else self._run_when_up(link, call, args)

    async def _run_when_up(self, link: Link, call: ScriptCall, args: bytes) -> Any:
        await link.wait_up(call.deadline)
        if not link.up:
            return Unconfirmed(link.down_reason, maybe_executed=False)
        return await self.run(call, args)


def _resolved(loop: asyncio.AbstractEventLoop, reply: object) -> "asyncio.Future[Any]":
    """Return a future that has its result already."""
    future: asyncio.Future[Any] = loop.create_future()
    future.set_result(reply)
    return future
