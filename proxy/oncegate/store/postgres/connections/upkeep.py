"""The connections to whichever host of a store's URL is the primary: made, and made again whenever one is lost."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from oncegate.hostnames.failures import failure_words
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.connections.facts import Facts
from oncegate.store.postgres.connections.hosts import Unreachable, hosts_of
from oncegate.store.postgres.connections.pool import Pool
from oncegate.store.postgres.connections.primary import Choice, choose
from oncegate.store.postgres.connections.scout import RENEWED, Pause, Scout
from oncegate.store.postgres.connections.session import Session, SessionConfig, open_session
from oncegate.store.store import LoginRefused


class Observer(Protocol):
    """Told of what happens to connections."""

    def note_primary(self, before: Facts | None) -> None:
        """Note that hosts were asked, and the primary chosen again. `before`: what the one before had said."""

    def note_change(self, pool: Pool, session: Session) -> None:
        """Note that a session has become free, or was lost."""

    async def note_opened(self, pool: Pool, session: Session) -> None:
        """Note a new session."""


class Connections:
    """The connections of all `pools`. `Observer` is told of them."""

    def __init__(self, config: SessionConfig, pools: Sequence[Pool], observer: Observer) -> None:
        self._config, self._pools, self._observer = config, pools, observer
        self._scouts = [Scout(host, config, self._choose) for host in hosts_of(config.url)]
        self.choice = Choice(None, "the store is not reachable: not connected yet")
        # What the last primary said last, its place, the connection over which it was chosen; whether there is one now.
        self.primary: Facts | None = None
        self._at = 0
        self._chosen: Session | None = None
        self._is_chosen = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        # What takes the places of sessions with old credentials, once these end.
        self._successors: dict[Session, Session] = {}
        self._renewing: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Connect, and reconnect whenever a connection is lost, until `close`."""
        work = [scout.run() for scout in self._scouts]
        work += [self._keep(pool) for pool in self._pools for _ in range(pool.size)]
        self._tasks = [asyncio.get_running_loop().create_task(one) for one in work]

    async def close(self) -> None:
        self.end("closed")
        await asyncio.gather(*self._tasks, *self._renewing, return_exceptions=True)

    def end(self, reason: str) -> None:
        """Lose every statement now. Nobody gets a session any more."""
        for task in self._tasks + self._renewing:
            task.cancel()
        for session in self._successors.values():
            session.end(reason)
        for scout in self._scouts:
            scout.close(reason)
        for pool in self._pools:
            pool.end(reason)

    async def prepare_login(self, url: str) -> Callable[[], None]:
        """Try the credentials in another URL of the same hosts at the primary; what is returned uses them from then on.

        Raises LoginRefused where it is up, and refuses them.
        """
        host = self._scouts[self._at].host
        try:
            trial = await open_session(host, Level.OFF, replace(self._config, url=url), lambda _: None)
            trial.end("it was a trial")
        except Unreachable as error:
            if self.has_primary and not self.silence:
                raise LoginRefused(f"{host}: {error}") from None
        return partial(self._follow, url)

    def _follow(self, url: str) -> None:
        """Use these credentials for new connections, and then new connections for all there is to do."""
        self._config.url = url
        for task in self._renewing:
            task.cancel()
        self._renewing = [asyncio.get_running_loop().create_task(self._renew())]

    async def _renew(self) -> None:
        """Let each connection end as soon as another is open in its place, one after the other.

        Where none can be opened, such as at the server's limit, the one that is there stays.
        """
        for scout in self._scouts:
            before = scout.session
            with suppress(Unreachable):
                if await scout.renew() and self._chosen is before:
                    self._chosen = scout.session
        for pool in self._pools:
            for session in list(pool.sessions):
                with suppress(Unreachable, TimeoutError):
                    self._replace(pool, session, await self._open(pool))
                    async with asyncio.timeout(self._config.timeout_s):
                        await session.ended.wait()

    def _replace(self, pool: Pool, session: Session, successor: Session) -> None:
        """Let a session end, and another one take its place."""
        if session not in pool.sessions:
            # It was lost, and its place is taken.
            successor.end(RENEWED)
            return
        if (earlier := self._successors.get(session)) is not None:
            earlier.end(RENEWED)
        self._successors[session] = successor
        session.retire(RENEWED)

    @property
    def has_primary(self) -> bool:
        return self._is_chosen.is_set()

    @property
    def silence(self) -> str:
        """Why the primary cannot be asked now; empty where it has answered, or there is none."""
        return self._scouts[self._at].reason if self.has_primary else ""

    def hurry(self) -> None:
        """Ask all hosts now."""
        for scout in self._scouts:
            scout.hurry()

    async def _keep(self, pool: Pool) -> None:
        """Keep one connection of a pool to whichever host is the primary, until cancelled."""
        pause = Pause()
        while True:
            await self._is_chosen.wait()
            try:
                session: Session | None = await self._open(pool)
                pause.reset()
                while session is not None:
                    session = await self._hold(pool, session)
            except Exception as error:
                # Any error: if this task ended, there would be a connection less for good.
                pool.down_reason = str(error) or failure_words(error)
            self.hurry()
            await asyncio.sleep(pause.next_s())

    async def _hold(self, pool: Pool, session: Session) -> Session | None:
        """Have a session in its pool until it ends. Return what takes its place, None where it was lost."""
        pool.add(session)
        try:
            await self._observer.note_opened(pool, session)
            await session.ended.wait()
        finally:
            pool.remove(session)
        return self._successors.pop(session, None)

    async def _open(self, pool: Pool) -> Session:
        """Return a new connection to the primary. Raises Unreachable."""
        host, note_change = self._scouts[self._at].host, partial(self._observer.note_change, pool)
        session = await open_session(host, pool.level, self._config, note_change)
        if self.primary is None or session.facts.run != self.primary.run:
            # The server has started anew, or has been promoted, since it was asked.
            session.end("the primary has changed")
            raise Unreachable(session.lost_reason)
        return session

    def _choose(self) -> None:
        """Choose the primary again: what a host says has changed."""
        sightings, before = [scout.sighting(self._chosen) for scout in self._scouts], self.primary
        current = self._at if before else None
        self.choice = choose(sightings, before.run if before else None, current, self._config.durability.is_replicated)
        if self.choice.at is None:
            self._is_chosen.clear()
        else:
            self._at = self.choice.at
            self.primary, self._chosen = self._scouts[self._at].facts, self._scouts[self._at].session
            self._is_chosen.set()
        for scout in self._scouts:
            scout.search(self.choice.at is None)
        if before and self.primary and before.run != self.primary.run:
            for pool in self._pools:
                pool.close("the primary has changed")
        self._observer.note_primary(before)
