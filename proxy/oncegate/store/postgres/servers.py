"""The servers of a store: which host is the primary, the connections to it, and whether it can confirm claims."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from oncegate.store.health.breaker import Breaker
from oncegate.store.membership import HEALTH_S, Membership
from oncegate.store.postgres.connections.durability import Durability, Level
from oncegate.store.postgres.connections.facts import Backend, Facts, Run
from oncegate.store.postgres.connections.pool import Pool
from oncegate.store.postgres.connections.session import Lost, Refused, Session, SessionConfig
from oncegate.store.postgres.connections.upkeep import Connections
from oncegate.store.postgres.health import Health
from oncegate.store.results import Forbidden, NotAttempted, StoreFull, Unconfirmed

# How many connections a worker has at each level.
SIZES = {Level.CLAIM: 4, Level.DISK: 2, Level.OFF: 2}
# How many claims' connections may wait for a reply that no caller waits for any more. Each holds a place at the server.
MOST_LEFT = 2
# The share of a claim's time after which its reply is late. Others may be late as well, so fewer are asked for then.
LATE_SHARE = 0.25
TEND_S = 0.1
MIN_PROBE_PAUSE_S, MAX_PROBE_PAUSE_S = 0.05, 0.5
# A commit as of a claim, that changes nothing.
_PROBE = "SELECT pg_logical_emit_message(true, 'oncegate', 'probe')"
_END = "SELECT pg_terminate_backend($1) FROM pg_stat_get_activity($1) WHERE backend_start = $2"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersConfig:
    """What the servers of a store are told.

    `timeout_s`: of a claim, and of one try of any other call. `log(event, **fields)`: what operators should know.
    `breaker_opened()`: claims stop for a while.
    """

    url: str
    timeout_s: float
    durability: str
    schema: str = "oncegate"
    promotion: str = "any"
    # With it the database is inspected for losses, and for proxies that name keys in another way.
    member: Membership | None = None
    # Of all that is stored; 0 for no limit.
    max_bytes: int = 0
    log: Callable[..., None] = lambda *_, **__: None
    breaker_opened: Callable[[], None] = lambda: None
    # Called with the seconds that a new connection took.
    connected: Callable[[float], None] = lambda _: None


class Servers:
    """The hosts of one URL, and the connections to the one that is the primary."""

    def __init__(self, config: ServersConfig) -> None:
        self._config, self._loop = config, asyncio.get_running_loop()
        self._durability = Durability(config.durability, config.promotion)
        self._session_config = SessionConfig(
            config.url, config.schema, self._durability, config.timeout_s, config.connected
        )
        self._pools = {level: Pool(level, size) for level, size in SIZES.items()}
        self._inspections = Pool(Level.CLAIM, int(config.member is not None))
        self._all_pools = [*self._pools.values(), self._inspections]
        self._connections = Connections(self._session_config, self._all_pools, self)
        self.health = Health(config.member, self._durability, config.max_bytes)
        # Why claims are not sent to the primary at all, or None.
        self._unfit: str | None = None
        # The run of the primary that was inspected last.
        self._inspected: Run | None = None
        self._inspecting = asyncio.Lock()
        # Whether as many claims' connections were left waiting as may be, when that was looked at last.
        self._is_stuck = False
        self.breaker = Breaker(self._loop.time, config.breaker_opened)
        self._tending: asyncio.Task[None] | None = None
        self._offset_ms = 0.0

    # Life of the connections ...

    def start(self) -> None:
        """Connect, and reconnect whenever a connection is lost, until `close`."""
        self._connections.start()
        self._tending = self._loop.create_task(self._tend())

    async def close(self) -> None:
        await self._connections.close()
        if self._tending is not None:
            self._tending.cancel()

    def end_calls(self) -> None:
        """Stop waiting: every statement is lost now, also those still to come."""
        self._connections.end("calls were ended")

    async def wait_up(self, deadline: float) -> bool:
        """Wait for connections at each level until `deadline` (the loop's time), and return whether there are."""
        while not (self._may_claim() and all(pool.is_up for pool in self._all_pools)):
            if self._loop.time() >= deadline:
                return False
            await asyncio.sleep(0.005)
        return True

    async def prepare_login(self, url: str) -> Callable[[], None]:
        return await self._connections.prepare_login(url)

    # What happens to connections ...

    def note_primary(self, before: Facts | None) -> None:
        primary = self._connections.primary
        self._unfit = self._reason_against(primary) if primary and self._connections.has_primary else None
        if before and primary and before.run[:2] != primary.run[:2]:
            self._config.log("store failed over", was=before.run.timeline, now=primary.run.timeline)
        self._limit_claims()
        for pool in self._all_pools:
            pool.serve()

    def note_change(self, pool: Pool, session: Session) -> None:
        answer = session.last_answer
        if pool is self._pools[Level.CLAIM] and answer is not None and not answer.is_below and self.breaker.open:
            # A claim that was left waiting for its reply is the probe.
            self.breaker.succeeded()
        self._limit_claims()
        pool.serve()

    async def note_opened(self, pool: Pool, session: Session) -> None:
        self.note_time(session.facts.now_ms)
        while pool is self._inspections and not session.is_lost and not await self._inspect():
            await asyncio.sleep(HEALTH_S)

    # Connections for callers ...

    def session(self, level: Level) -> Session | None:
        """Return an idle connection, or None. The caller runs one statement on it, or frees it."""
        return self._pools[level].take()

    async def free_session(self, level: Level, deadline: float) -> Session | None:
        """Return an idle connection as `session` does, or None if there is none until `deadline` (the loop's time)."""
        return await self._pools[level].wait(deadline)

    @property
    def has_ended(self) -> bool:
        """Whether calls were ended: nobody gets a connection any more."""
        return self._inspections.has_ended

    def _left(self) -> list[Session]:
        """Return the claims' connections whose callers have stopped waiting, the longest first."""
        late = [one for one in self._pools[Level.CLAIM].busy() if one.busy_for_s() > self._config.timeout_s]
        return sorted(late, key=Session.busy_for_s, reverse=True)

    def _limit_claims(self) -> None:
        """Set how many claims' connections may be busy: fewer while one is late."""
        pool, timeout_s = self._pools[Level.CLAIM], self._config.timeout_s
        busy_s = [one.busy_for_s() for one in pool.busy()]
        is_late = any(seconds > timeout_s * LATE_SHARE for seconds in busy_s)
        self._is_stuck = sum(seconds > timeout_s for seconds in busy_s) >= MOST_LEFT
        pool.limit = MOST_LEFT if is_late else pool.size
        if not self._may_claim():
            pool.limit = 0

    def _may_claim(self) -> bool:
        """Return whether there is a primary, and it is known what it has."""
        primary = self._connections.primary if self._connections.has_primary else None
        return primary is not None and (self._config.member is None or self._inspected == primary.run)

    async def _tend(self) -> None:
        """End the backends of claims' connections that are too many to be left waiting, until cancelled."""
        while True:
            await asyncio.sleep(TEND_S)
            self._limit_claims()
            self._pools[Level.CLAIM].serve()
            for session in self._left()[MOST_LEFT:]:
                await self.is_gone(session.facts.backend)

    async def is_gone(self, backend: Backend) -> bool:
        """End a backend of ours that may still be at work. Return whether it is certain that it is not, any more.

        What it has committed by then stays, and is to be seen.
        """
        primary = self._connections.primary
        if primary is None or primary.run.system != backend.system:
            return False
        if primary.run.booted != backend.booted:
            # Another host, or another run of this one: its processes ended with it.
            return True
        session = await self.free_session(Level.OFF, self._loop.time() + self._config.timeout_s)
        if session is None:
            return False
        try:
            return not (await session.run(_END, backend.pid, backend.started)).rows
        except (Lost, Refused):
            return False

    # Health ...

    @property
    def primary_timeline(self) -> int:
        """The timeline of the last primary's history, 0 before there was one."""
        primary = self._connections.primary
        return primary.run.timeline if primary else 0

    @property
    def schema_version(self) -> int:
        """The version of the schema when the primary was asked last, 0 before it was."""
        primary = self._connections.primary
        return primary.schema_version if primary else 0

    @property
    def readable(self) -> bool:
        """Whether the primary answers now, be it only to reads."""
        return self._connections.has_primary and not self._connections.silence and self._pools[Level.OFF].is_up

    def not_ready_reason(self) -> str | None:
        """Return why the store cannot be relied on now, or None."""
        connections = self._connections
        if connections.primary is None or not connections.has_primary:
            return connections.choice.reason
        if connections.silence:
            return f"the store is not reachable: {connections.silence}"
        if self._unfit:
            return f"the store {self._unfit}"
        for pool in self._all_pools:
            if not pool.is_up:
                return f"the store is not reachable: {pool.down_reason}"
        if self.breaker.open or len(self._left()) >= MOST_LEFT or self._is_inspection_late():
            return "the store does not confirm claims"
        return self.health.not_ready_reason()

    def _is_inspection_late(self) -> bool:
        return any(session.busy_for_s() > self._config.timeout_s for session in self._inspections.sessions)

    def _reason_against(self, facts: Facts) -> str | None:
        """Return why claims are not sent to a primary at all, or None."""
        if facts.schema_reason:
            return f"cannot be used: {facts.schema_reason}"
        if facts.is_read_only:
            return "takes no writes: it is read-only (default_transaction_read_only)"
        return self._durability.unable(facts)

    def refusal(self) -> Unconfirmed | None:
        """Return why claims are not tried now, or None."""
        if self._connections.choice.is_refused:
            return NotAttempted(self._connections.choice.reason)
        if self._unfit:
            return NotAttempted(f"the store {self._unfit}")
        if self.breaker.open or self._is_stuck:
            return NotAttempted("the store does not confirm claims")
        return self.health.refusal()

    def note_refusal(self, refusal: StoreFull | Forbidden) -> None:
        """Note that the server refused a claim."""
        self.health.note_refusal(refusal)
        # Its rights and its schema may have changed.
        self._connections.hurry()

    async def watch(self) -> None:
        """Inspect the primary, and measure its room, every HEALTH_S seconds until cancelled."""
        while True:
            await asyncio.sleep(HEALTH_S)
            if self._config.member is not None:
                await self._inspect()
            if self.health.is_room_old and (session := self.session(Level.OFF)) is not None:
                with suppress(Lost, Refused):
                    await self.health.measure(session)

    async def _inspect(self) -> bool:
        """Inspect the primary once, and return whether it is known now what it has."""
        async with self._inspecting:
            session = await self._inspections.wait(self._loop.time() + self._config.timeout_s)
            try:
                if session is None or not await self.health.inspect(session):
                    return False
            except Lost:
                return False
            self._inspected = session.facts.run
            self._limit_claims()
            self._pools[Level.CLAIM].serve()
            return True

    async def probe(self) -> None:
        """While the breaker is open, find out when claims are confirmed again, until cancelled.

        A claim that was left waiting for its reply is the first probe: its reply closes the breaker as well.
        """
        pause_s = MIN_PROBE_PAUSE_S
        while True:
            await asyncio.sleep(pause_s if self.breaker.open else MAX_PROBE_PAUSE_S)
            pause_s = min(pause_s * 2, MAX_PROBE_PAUSE_S) if self.breaker.open else MIN_PROBE_PAUSE_S
            if self.breaker.open and not self._left() and (session := self.session(Level.CLAIM)) is not None:
                with suppress(Lost, Refused):
                    await session.run(_PROBE)

    # The primary's clock ...

    def note_time(self, now_ms: int) -> None:
        """Take over the server's time from a reply."""
        self._offset_ms = now_ms - time.monotonic() * 1000

    def now_ms(self) -> int:
        """Return the server's time, as its replies report it. It may lag behind, and never runs ahead."""
        return int(time.monotonic() * 1000 + self._offset_ms)
