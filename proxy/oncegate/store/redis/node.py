"""One server of the store: its connections, its clock, and what it says of itself."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from oncegate.keys.digests import KEY_DIGEST_BYTES, store_key
from oncegate.store.breaker import Breaker
from oncegate.store.record import TOKEN_BYTES
from oncegate.store.redis.durable import DurabilityLevel, WaitingLink
from oncegate.store.redis.health_monitor import (
    HEALTH_S,
    HealthMonitor,
    Membership,
    Memory,
    OverLink,
    Talk,
)
from oncegate.store.redis.link import ErrorReply, Link, Script, resp
from oncegate.store.redis.server import Info, Opener, Prepare, Unfit, check_mode, preparer, version_of
from oncegate.store.results import NotAttempted, Unconfirmed

INLINE_BYTES = 65536  # a stored body up to this comes with the reply to `claim`
_13 = b"$13\r\n"
ORDINARY = b"\r\n" + resp(INLINE_BYTES, 0, b"")  # no window, nothing seen
CLAIM_ARGUMENTS = 10
TOO_LATE = b"$1\r\n0" + ORDINARY  # what makes a claim a mere look
PROBE_FIRST_S, PROBE_MOST_S = 0.05, 0.5
PROBE_KEPT_MS = 10_000


class Clock:
    """A server's clock, as far as its replies tell. It may lag behind, never run ahead."""

    __slots__ = ("offset_ms",)

    def __init__(self) -> None:
        self.offset_ms = 0.0

    def heard(self, now_ms: int) -> None:
        self.offset_ms = now_ms - time.monotonic() * 1000

    def now_ms(self, _key: bytes = b"") -> int:
        return int(time.monotonic() * 1000 + self.offset_ms)


def told(loop: asyncio.AbstractEventLoop, reply: object) -> "asyncio.Future[Any]":
    """Return the future of a reply that is known."""
    future: asyncio.Future[Any] = loop.create_future()
    future.set_result(reply)
    return future


class StoreServers(Protocol):
    """What runs the scripts: one server, or the servers of a cluster, each for its keys.

    Replies come as `Link.script` gives them. `args` are `count` arguments in RESP; `whole`: the script by its
    body, for a server that does not know it. Deadlines are the loop's time.
    """

    @property
    def nodes(self) -> "list[Node]":
        """The servers that take writes now."""

    @property
    def memory_ratio(self) -> float: ...

    def start(self) -> None: ...

    async def close(self) -> None: ...

    async def wait_up(self, deadline: float) -> bool: ...

    def give_up(self) -> None: ...

    def problem(self) -> str | None: ...

    async def watch(self) -> None: ...

    async def probe(self) -> None:
        """Find out when servers that claims were given up on take them again, until cancelled."""

    def node_of(self, name: bytes) -> "Node | None":
        """Return the server that has the key `name` now, None where that is not known."""

    def breaker_of(self, key: bytes) -> Breaker:
        """Return what counts the claims that fail where `key` lies."""

    def claim(
        self, key: bytes, described: bytes, rest: bytes, deadline: float, left_s: float, whole: bool = False
    ) -> Awaitable[Any]:
        """Run `claim`, void where it is executed after `deadline`, which is `left_s` from now.

        Its arguments before and after that time are in RESP.
        """

    def run(
        self, verb: str, key: bytes, deadline: float, args: bytes, count: int, whole: bool = False
    ) -> Awaitable[Any]: ...

    def heard(self, now_ms: int) -> None:
        """Take note of the time in a reply to `claim`."""

    def now_ms(self, key: bytes) -> int:
        """Return the time of the server that has `key`."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What all servers of a store have in common. `observe(verb, seconds)` hears of every script's reply;
    `log(event, **fields)` is told what an operator wants to know."""

    scripts: dict[str, Script]
    timeout_s: float
    observe: Callable[[str, float], None]
    log: Callable[..., None]
    level: DurabilityLevel | None
    cluster: bool = False
    member: Membership | None = None
    broke: Callable[[], None] = lambda: None  # hears when claims are no longer tried for a while
    memories: dict[bytes, Memory] = field(default_factory=dict)

    def check(self, info: Info) -> None:
        """Raise Unfit for a server that another URL is for, or that cannot give what is asked."""
        check_mode(info, self.cluster)
        if self.level is not None and (unable := self.level.unable_by_version(version_of(info))):
            raise Unfit(f"the store {unable}")


class Node:
    """One server, or whatever server stands at one place. Times in the unit of their name.

    `link` carries all that is short, `reads` large replies, which would stop the others, `claims` the claims:
    that is `link`, unless they wait for replicas or disks. `accept(connection)` has the last word on a new one.
    """

    def __init__(
        self, open_connection: Opener, terms: NodeConfig, name: str = "the store", accept: Prepare | None = None
    ) -> None:
        self.name, self._terms = name, terms
        self.tag = b""  # of keys that lie on it, in a cluster
        self._scripts, self._claim = terms.scripts, terms.scripts["claim"]
        self._loop = asyncio.get_running_loop()
        self._clock = Clock()
        self.now_ms = self._clock.now_ms
        self.losses = HealthMonitor(terms.scripts, terms.member, terms.memories)
        self.breaker = Breaker(self._loop.time, self._broke)
        self._shut = False  # whether `_refusal` need be asked
        heard = self._clock.heard
        clocked = preparer(terms.scripts, heard, terms.check, accept, self._attend)
        clockless = preparer(terms.scripts, lambda _: None, terms.check, accept)
        self.reads = Link(open_connection, clockless, terms.timeout_s, terms.observe)
        self.heard: Callable[[int], None] = heard
        if terms.level is None:
            self.link = self.claims = Link(open_connection, clocked, terms.timeout_s, terms.observe)
            return
        # The time is that of the server that executes the claims. They tell it themselves, before they wait.
        self.heard = lambda _: None
        self.link = Link(open_connection, clockless, terms.timeout_s, terms.observe)
        self.claims = WaitingLink(
            open_connection, clocked, terms.timeout_s, terms.observe, level=terms.level, heard=heard
        )

    # Its life ...

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

    def give_up(self) -> None:
        for link in self.links:
            link.give_up()

    async def wait_up(self, deadline: float) -> bool:
        return await self.link.wait_up(deadline) and await self.claims.wait_up(deadline)

    def problem(self) -> str | None:
        """Return why this server cannot be relied on now, None where it can."""
        for link in (self.link, self.claims):
            if not link.up:
                return f"{self.name} is not reachable: {link.down_because}"
        unable = self._terms.level.unable(self.info) if self._terms.level else None
        if self.breaker.open:
            return f"{self.name} does not confirm claims"
        return f"{self.name} {unable}" if unable else self.losses.problem()

    @property
    def info(self) -> Info:
        """What the server says of itself."""
        return self.losses.info

    @property
    def memory_ratio(self) -> float:
        return self.losses.memory_ratio

    def node_of(self, _name: bytes) -> "Node | None":
        return self

    def breaker_of(self, _key: bytes) -> Breaker:
        return self.breaker

    async def watch(self) -> None:
        """Keep looking at the server's memory, eviction policy and role, until cancelled."""
        loop = self._loop
        while True:
            if await self.link.wait_up(loop.time() + HEALTH_S):
                await self.inspect()
                await asyncio.sleep(HEALTH_S)

    async def inspect(self) -> None:
        """Ask the server once what it says of itself, and whether it still has what it acknowledged."""
        await self._attend(OverLink(self.link, self._terms.timeout_s))

    async def _attend(self, talk: Talk) -> None:
        await self.losses.attend(talk, None if self._terms.cluster and not self.tag else self.tag)
        self._shut = self.losses.withholds or self.breaker.open

    def _broke(self) -> None:
        self._shut = True
        self._terms.broke()

    def _refusal(self) -> NotAttempted | None:
        """Return why claims are not tried now, None where they are."""
        if (withheld := self.losses.withheld()) is not None:
            return withheld
        if self.breaker.open:
            return NotAttempted(f"{self.name} does not confirm claims")
        self._shut = False
        return None

    async def probe(self) -> None:
        pause_s = PROBE_FIRST_S
        while True:
            await asyncio.sleep(pause_s if self.breaker.open else PROBE_MOST_S)
            pause_s = min(pause_s * 2, PROBE_MOST_S) if self.breaker.open else PROBE_FIRST_S
            if self.breaker.open and await self.takes_claims(os.urandom(KEY_DIGEST_BYTES)):
                self.breaker.succeeded()

    async def takes_claims(self, key: bytes) -> bool:
        """Return whether a key that is nobody's can be claimed, or would be but for want of memory; free it again."""
        token, timeout_s = os.urandom(TOKEN_BYTES), self._terms.timeout_s
        deadline = self._loop.time() + timeout_s
        described = resp(token, b"", b"", b"hold", int(timeout_s * 1000), PROBE_KEPT_MS)
        for whole in (False, True):  # by its body, where the server does not know it
            reply = await self.claim(key, described, ORDINARY, deadline, timeout_s, whole, trial=True)
            if isinstance(reply, list):
                await self.run("settle", key, deadline, resp(token, b"release", PROBE_KEPT_MS), 3)
                return True
        return isinstance(reply, ErrorReply) and str(reply).startswith("OOM")

    # Scripts ...

    def claim(
        self,
        key: bytes,
        described: bytes,
        rest: bytes,
        deadline: float,
        left_s: float,
        whole: bool = False,
        asking: bool = False,
        trial: bool = False,
    ) -> Awaitable[Any]:
        link = self.claims
        if self._shut and not trial and (refusal := self._refusal()) is not None:
            return told(self._loop, refusal)
        if not link.up:
            return self._claim_when_up(key, described, rest, deadline, whole, asking, trial)
        # In the time of the server that is connected now: after a failover it is another one.
        not_after = b"%013d" % (self.now_ms() + int(left_s * 1000))
        args = b"".join((described, _13, not_after, rest))
        issue = link.script_asking if asking else link.script
        return issue(self._claim, store_key(key), args, CLAIM_ARGUMENTS, deadline, whole)

    async def _claim_when_up(
        self, key: bytes, described: bytes, rest: bytes, deadline: float, whole: bool, asking: bool, trial: bool
    ) -> Any:
        await self.claims.wait_up(deadline)
        left_s = deadline - self._loop.time()
        if not self.claims.up or left_s <= 0:
            return Unconfirmed(self.claims.down_because, maybe_executed=False)
        return await self.claim(key, described, rest, deadline, left_s, whole, asking, trial)

    def run(
        self, verb: str, key: bytes, deadline: float, args: bytes, count: int, whole: bool = False, asking: bool = False
    ) -> Awaitable[Any]:
        """Return what will be the reply; where the connection stands, that is a mere future."""
        link = self.reads if verb == "read" else self.link
        if not link.up:
            return self._run_when_up(link, verb, key, deadline, args, count, whole, asking)
        issue = link.script_asking if asking else link.script
        return issue(self._scripts[verb], store_key(key), args, count, deadline, whole)

    async def _run_when_up(self, link: Link, verb: str, key: bytes, deadline: float, *rest: Any) -> Any:
        await link.wait_up(deadline)
        if not link.up:
            return Unconfirmed(link.down_because, maybe_executed=False)
        return await self.run(verb, key, deadline, *rest)
