"""Host names with the addresses that they had lately: one look-up at a time for each, shared by all who ask."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from oncegate.hostnames.system import AddressInfo, Found, LookUp, look_up_in_thread, says_no_address, system_look_up

# How long a look-up may take until an older answer is used in its place.
PATIENCE_S = 0.2
# For how long an older answer is used while nobody says what the name has now (RFC 8767 serves it for days).
STALE_S = 3600.0
# How long a failure is kept for those who ask next: the first pause before an attempt to connect is as long.
FAILURE_KEPT_S = 0.05

Report = Callable[..., None]
# Called with the end of each look-up: `unchanged` (also of the first), `changed`, `no_address` or `failed`.
Count = Callable[[str], None]


def _tell_nobody(_event: str, **_fields: object) -> None:
    """Report nothing."""


class HostName:
    """One name. An answer is kept for `ttl_s`. Times are the loop's, in seconds.

    While a name server is silent, or says that it cannot tell, the answer before is used: after PATIENCE_S, and for
    STALE_S at most. That a name has no address any more is an answer. `report(event, **fields)` is told of the first
    look-up without addresses in a row, and of its end.
    """

    def __init__(self, host: str, ttl_s: float, look_up: LookUp, report: Report, count: Count = _tell_nobody) -> None:
        self.host, self.ttl_s, self._report, self._count = host, ttl_s, report, count
        # Whether the last report was of a failure.
        self._has_failed = False
        self._look_up, self._loop = look_up, asyncio.get_running_loop()
        self._answer: tuple[AddressInfo, ...] = ()
        # The same as text, without ports.
        self.hosts = frozenset[str]()
        self._answered_at = self._failed_at = -float("inf")
        # Why the last look-up failed; None once one has an answer.
        self._failure: OSError | None = None
        self._began_at = 0.0
        # Done when the look-up ends that is under way.
        self._pending: asyncio.Future[None] | None = None
        # Called with the addresses after every answer.
        self.observers: list[Callable[[frozenset[str]], None]] = []

    @property
    def is_waited_for(self) -> bool:
        """Whether nothing can be connected to before a look-up ends that is under way."""
        return self._pending is not None and not self._answer

    async def addresses(self, port: int) -> list[AddressInfo]:
        """Return where to connect for this port, in the system's order. Raises OSError where nobody can tell."""
        if not self._is_fresh():
            await self._renew()
        if not self._answer or self._loop.time() - self._answered_at > STALE_S:
            # One exception for all who ask: each raise would add its frames to those before.
            raise (self._failure or OSError("a name without an address")).with_traceback(None)
        return [_with_port(one, port) for one in self._answer]

    def _is_fresh(self) -> bool:
        now = self._loop.time()
        if self._failure is not None:
            return now - self._failed_at < FAILURE_KEPT_S
        return now - self._answered_at < self.ttl_s

    async def _renew(self) -> None:
        """Wait for a new answer, but not for long where an older one can be used."""
        pending = self.look_up()
        now = self._loop.time()
        patience_s = None
        if self._answer and now - self._answered_at <= STALE_S:
            # The one before failed already: this one is not worth a wait.
            patience_s = 0.0 if self._failure is not None else max(0.0, self._began_at + PATIENCE_S - now)
        # Not `wait_for`: whoever stops waiting leaves the look-up to the others.
        try:
            await asyncio.wait((pending,), timeout=patience_s)
        finally:
            # Also where whoever waits gives up.
            if not pending.done() and self._loop.time() - self._began_at >= PATIENCE_S:
                self._note_failure("no name server answers")

    def _note_failure(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._report("host name not looked up", host=self.host, reason=reason)

    def look_up(self) -> "asyncio.Future[None]":
        """Begin a look-up, unless one is under way; return a future that is done at its end."""
        if self._pending is None:
            self._pending, self._began_at = self._loop.create_future(), self._loop.time()
            look_up_in_thread(self._look_up, self.host, self._loop, self._take)
        return self._pending

    def _take(self, found: Found) -> None:
        """Take the end of the look-up that is under way."""
        pending, self._pending = self._pending, None
        now = self._loop.time()
        if isinstance(found, OSError):
            self._failure, self._failed_at = found, now
            self._note_failure(str(found))
        else:
            self._failure = None
            if self._has_failed:
                self._has_failed = False
                self._report("host name looked up again", host=self.host)
        result = "failed"
        if not isinstance(found, OSError) or says_no_address(found):
            before = self.hosts
            self._answer, self._answered_at = (() if isinstance(found, OSError) else tuple(found)), now
            self.hosts = frozenset(one[4][0] for one in self._answer)
            result = "changed" if before and self.hosts != before else "unchanged"
            result = result if self.hosts else "no_address"
            for observer in self.observers:
                observer(self.hosts)
        self._count(result)
        if pending is not None and not pending.done():
            pending.set_result(None)


class Resolver:
    """All names of a worker. `ttl_s`: how long an answer is kept. `look_up` blocks in a thread of its own.

    `report(event, **fields)` is told what operators should know, `count` how each look-up ended.
    """

    def __init__(
        self,
        ttl_s: float = 1.0,
        look_up: LookUp = system_look_up,
        report: Report = _tell_nobody,
        count: Count = _tell_nobody,
    ) -> None:
        self._of_names = ttl_s, look_up, report, count
        # Names stand in settings and rules, or come from the servers of a cluster: there are few.
        self._names: dict[str, HostName] = {}

    def name(self, host: str) -> HostName:
        """Return the one `HostName` of a name; `host` is in lower case."""
        found = self._names.get(host)
        if found is None:
            found = self._names[host] = HostName(host, *self._of_names)
        return found


def is_address(host: str) -> bool:
    """Return whether a host is an address that needs no look-up: no name, and without a scope."""
    with suppress(ValueError):
        return not getattr(ip_address(host), "scope_id", None)
    return False


def _with_port(info: AddressInfo, port: int) -> AddressInfo:
    family, kind, protocol, canonical, address = info
    at: tuple[Any, ...] = (address[0], port, *address[2:])
    return family, kind, protocol, canonical, at
