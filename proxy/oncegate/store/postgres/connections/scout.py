"""One host of the URL: a connection over which it is asked again and again what it is."""

import asyncio
import random
from collections.abc import Callable

from oncegate.hostnames.failures import failure_words
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.connections.facts import Facts
from oncegate.store.postgres.connections.hosts import Host, retrieve
from oncegate.store.postgres.connections.primary import Sighting
from oncegate.store.postgres.connections.session import Lost, Refused, Session, SessionConfig, open_session

# How often a host is asked: at rest, and while no host is the primary.
ASK_S, SEARCH_S = 1.0, 0.05
# How long it may take for its reply until it counts as silent.
ANSWER_S = 2.0
MIN_PAUSE_S, MAX_PAUSE_S = 0.02, 0.5
# Why a connection ends that is not lost.
RENEWED = "another one has newer credentials"


class Pause:
    """The pauses between attempts to connect: they double, and have jitter, so that not all proxies come at once."""

    def __init__(self) -> None:
        self._next_s = MIN_PAUSE_S

    def reset(self) -> None:
        self._next_s = MIN_PAUSE_S

    def next_s(self) -> float:
        """Return how long to wait before the next attempt."""
        pause_s, self._next_s = self._next_s, min(self._next_s * 2, MAX_PAUSE_S)
        return pause_s * random.uniform(0.5, 1)


class Scout:
    """Asks one host. `told()` is called whenever what it says, or whether it says anything, has changed."""

    def __init__(self, host: Host, config: SessionConfig, told: Callable[[], None]) -> None:
        self.host, self._config, self._told = host, config, told
        self.session: Session | None = None
        self.facts: Facts | None = None
        # Why the host cannot be asked now; empty where it has answered.
        self.reason = "not connected yet"
        # How often to ask.
        self.every_s = SEARCH_S
        self._hurry = asyncio.Event()

    def sighting(self, chosen: Session | None) -> Sighting:
        """Return what the host said last. `chosen`: the session over which the primary was chosen."""
        return Sighting(self.host, self.facts, self.reason, self.session is not None and self.session is chosen)

    def hurry(self) -> None:
        """Ask now."""
        self._hurry.set()

    def search(self, is_searching: bool) -> None:
        """Ask as often as it takes while no host is the primary."""
        before, self.every_s = self.every_s, SEARCH_S if is_searching else ASK_S
        if self.every_s < before:
            self.hurry()

    async def run(self) -> None:
        """Ask until cancelled."""
        pause = Pause()
        while True:
            try:
                self.session = await self._open()
                pause.reset()
                await self._ask_on()
            except Exception as error:
                # Any error: if this task ended, the store would stay down for good.
                self._note(None, str(error) or failure_words(error))
            await self._wait(pause.next_s())

    async def _open(self) -> Session:
        return await open_session(self.host, Level.OFF, self._config, self._note_change)

    async def renew(self) -> bool:
        """Ask over another connection, with the credentials as they are now. Raises Unreachable.

        Return whether it leads to the same run of the server. The one before ends only then, so that the host was
        connected all the time.
        """
        before, session = self.session, await self._open()
        if before is None or before.is_lost or before is not self.session:
            session.end(RENEWED)
            return False
        self.session = session
        before.retire(RENEWED)
        return session.facts.run == before.facts.run

    async def _ask_on(self) -> None:
        """Ask until the connection is lost."""
        while (session := self.session) is not None and not session.is_lost:
            asking = asyncio.ensure_future(session.ask())
            asking.add_done_callback(retrieve)
            await asyncio.wait([asking], timeout=ANSWER_S)
            if not asking.done():
                # Its process may be paused. The connection stays, as its reply comes when it goes on.
                self._note(self.facts, "it does not answer")
                await asyncio.wait([asking])
            try:
                facts = asking.result()
            except Lost as error:
                self._note(None, error.reason)
            except Refused as error:
                self._note(self.facts, error.reason)
            else:
                if facts.backend != session.facts.backend:
                    session.end("its backend has changed: this is a connection pooler")
                else:
                    self._note(facts)
            if not session.is_lost:
                await self._wait(self.every_s)
        self._note(None, session.lost_reason if session is not None else "")

    def _note(self, facts: Facts | None, reason: str = "") -> None:
        changed = (facts, reason) != (self.facts, self.reason)
        self.facts, self.reason = facts, reason
        if changed:
            self._told()

    def _note_change(self, session: Session) -> None:
        if session.is_lost:
            self.hurry()

    async def _wait(self, seconds: float) -> None:
        self._hurry.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            pass

    def close(self, reason: str) -> None:
        if self.session is not None:
            self.session.end(reason)
