"""Runs the parts of one worker: from its start, through reloads, to its drain and end."""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy

from oncegate import __version__
from oncegate.admin.parts import AdminParts, at_once
from oncegate.admin.serving import AdminListener, both_families, serve_admin
from oncegate.downstream.listener import set_options
from oncegate.keys.digests import key_id
from oncegate.observe.labels import StoreLoss
from oncegate.observe.logs import AccessLog
from oncegate.observe.metrics import Metrics
from oncegate.observe.outcome import RequestReport
from oncegate.rules.loading import load_rules
from oncegate.service.drain import POLL_S, Drain, unless
from oncegate.service.gauges import gauges
from oncegate.service.readiness import ReadinessLog
from oncegate.service.reload import Reload, TakeOver
from oncegate.service.store_login import FollowedLogin
from oncegate.service.wiring import Parts, Reporting
from oncegate.settings.settings import Settings
from oncegate.store.record import Claim
from oncegate.store.results import ClaimEvent, StoreEvent
from oncegate.testing import faults

# For what did not end by itself; it is waited for twice.
CANCEL_S = 0.05
BACKLOG = 1024
# The pause before a background task that failed is started again.
TASK_RESTART_S = 0.05
# Why a worker that drains is not ready.
DRAINING, SHUTTING_DOWN = "the proxy is draining", "the proxy is shutting down"
# How long the reasons against a store that is connected may take to go: one and a half inspections.
SETTLE_POLLS = int(1.5 / POLL_S)
# The events of the store that metrics count as losses.
LOSSES = {
    StoreEvent.FLUSHED: StoreLoss.FLUSHED,
    StoreEvent.ROLLED_BACK: StoreLoss.ROLLED_BACK,
    StoreEvent.EVICTED: StoreLoss.EVICTED,
    StoreEvent.MOVED: StoreLoss.MOVED,
}
_SHARED_TENANT = "all such requests are one tenant and can get each other's responses; name what identifies a client"


class Unsupported(Exception):
    """The installation cannot keep the promise."""


def _require_strict_parser() -> None:
    """aiohttp without its C extensions parses requests differently, and more leniently."""
    if HttpRequestParser is HttpRequestParserPy:
        raise Unsupported("aiohttp runs without its C extensions: unset AIOHTTP_NO_EXTENSIONS or install its wheel")


class Service:
    """One worker: its listeners, store and upstream, and the tasks that keep them. The first also speaks for others."""

    def __init__(self, settings: Settings, store_url: str, logger: Any, *, is_first: bool = True) -> None:
        _require_strict_parser()
        if settings.fault:
            faults.install(settings.fault, logger.warning)
        self._settings, self._store_url, self._log = settings, store_url, logger
        self._loop = asyncio.get_running_loop()
        self._background: set[asyncio.Task[Any]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._retired = False
        # Since when no new clients should come (the loop's time, 0 for not at all), and why.
        self._drains_since, self._leaving = 0.0, ""
        # The rules of which a request without a credential was reported.
        self._warned_of: set[str] = set()
        self.metrics = Metrics(__version__, *gauges(lambda: self._parts, lambda: self.reload, self.not_ready_reasons))
        self._access = AccessLog(logger, settings.access_log, settings.log_format, lambda rule: parts.logs_path(rule))
        reporting = Reporting(
            metrics=self.metrics,
            log=logger,
            observe=self._observe,
            failed=lambda error: self._log.error("request failed", exc_info=error),
            claim_lost=self._report_claim,
            store_finding=self._report_store,
            store_broke=self._report_broken_store,
            background=self._in_background,
        )
        self._parts = parts = Parts(settings, store_url, load_rules(settings), reporting)
        parts.unknown_keys.says_failures = is_first
        self.store, self._listener = parts.store, parts.listener
        # With several workers, their supervisor says what needs a restart.
        self.reload = Reload(
            settings,
            (parts.prepare_certificate, FollowedLogin(parts.store, settings, logger).prepare, self._prepare_rules),
            logger,
            is_quiet=settings.workers > 1,
        )
        self._drain = Drain(
            gateway=parts.gateway,
            listener=parts.listener,
            waiters=parts.waiters,
            pools=parts.pools,
            store=parts.store,
            background=self._background,
        )
        self._servers: list[asyncio.Server] = []
        self._admin: AdminListener | None = None

    def _prepare_rules(self, settings: Settings) -> TakeOver:
        rules, follow = self._parts.prepare_rules(settings)

        def take_over() -> None:
            follow()
            self._warned_of.clear()
            self._log.info("reloaded", rules=[rule.name for rule in rules.rules], files=self.reload.files)

        return take_over

    # What the parts report ...

    def _observe(self, report: RequestReport, seconds: float = 0.0, client_gone: bool = False) -> None:
        self.metrics.observe(report, seconds)
        self._access.add(report, seconds, client_gone)
        if report.trace is not None and self._parts.spans is not None:
            self._parts.spans.add(report.trace, report, shows_path=self._parts.logs_path(report.rule))
        if report.without_credential and report.rule not in self._warned_of:
            self._warned_of.add(report.rule)
            self._log.warning("requests without a credential", rule=report.rule, detail=_SHARED_TENANT)

    def _report_claim(self, event: ClaimEvent, claim: Claim) -> None:
        """Report a running claim whose record vanished (`lost`) or was taken (`fenced`): its key may execute twice."""
        self.metrics.claim_lost()
        self._log.error(f"claim {event.value}", key_id=key_id(claim.key), fence=claim.fence.decode())

    def _report_store(self, event: StoreEvent, detail: str) -> None:
        """Log a problem of the store: a loss of data, or proxies that name keys in another way."""
        if (loss := LOSSES.get(event)) is not None:
            self.metrics.store_lost(loss)
        elif event is StoreEvent.IDENTITY_ACCEPTED:
            self.metrics.identity_accepted()
        # A new installation looks like this. A quarantine, where one is set, is a reason on /readyz, and so a warning.
        level = "error" if event.is_error else "info" if event is StoreEvent.FOUNDED else "warning"
        getattr(self._log, level)("store problem", kind=event.kind, detail=detail)

    def _report_broken_store(self) -> None:
        self.metrics.breaker_opened()
        self._log.error("store circuit breaker opened", reason=self.store.not_ready_reason() or "")

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run work that no client waits for any more; the drain waits for it."""
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def not_ready_reasons(self) -> list[str]:
        """Return why this worker should get no traffic now."""
        reasons = [self._leaving] if self._leaving and not self._retired else []
        if reason := self.store.not_ready_reason():
            reasons.append(reason)
        return reasons

    def notices(self) -> list[str]:
        """Return what an operator should look at although the worker serves."""
        return [notice] if (notice := self.store.notice()) else []

    # Its life ...

    async def connect(self, seconds: float) -> list[str]:
        """Connect to the store, without listening. Return why this worker is not ready after `seconds`, or nothing."""
        self._start_tasks()
        await self.store.wait_up(seconds)
        # What an inspection finds at once may be over after the next one.
        for _ in range(SETTLE_POLLS):
            if not self.not_ready_reasons():
                break
            await asyncio.sleep(POLL_S)
        return self.not_ready_reasons()

    def _start_tasks(self) -> None:
        if self._tasks:
            return
        self.store.start()
        parts = self._parts
        keepers = [
            *(self.store.watch, self.store.probe, parts.leases.run, parts.waiters.run, parts.cancellations.deliver),
            *(parts.unknown_keys.run, parts.reconciling.run, self._listener.sweep),
        ]
        if self._settings.workers == 1:  # else their supervisor says it once
            keepers.append(ReadinessLog(lambda: None if self._leaving else self.not_ready_reasons(), self._log).run)
        self._tasks = [self._loop.create_task(self._keep(keeper)) for keeper in keepers]

    async def start(
        self,
        public: Sequence[socket.socket] = (),
        admin: socket.socket | None = None,
        *,
        is_one_of_several: bool = False,
    ) -> None:
        """Listen; the store may still be down. Raises OSError where a port is taken.

        `public`, `admin`: sockets that listen already. A worker of several shares those with its predecessor and
        successor, and the admin listener is its supervisor's.
        """
        settings = self._settings
        self._start_tasks()
        if not is_one_of_several:
            self._admin = await serve_admin(self._admin_parts(), admin)
            self.reload.add(self._admin.prepare)
        address: dict[str, Any] = {"host": settings.listen.host, "port": settings.listen.port}
        if not public and settings.listen.host == "::":
            address = {"sock": both_families(settings.listen)}
        for place in [{"sock": one} for one in public] or [address]:
            self._servers.append(await self._listen(place))
        await self.store.wait_up(1.0)

    async def _listen(self, place: dict[str, Any]) -> asyncio.Server:
        tls = self._parts.certificate.first if self._parts.certificate else None
        handshake_s = self._listener.head_s if tls else None
        server = await self._loop.create_server(
            self._listener, **place, ssl=tls, ssl_handshake_timeout=handshake_s, backlog=BACKLOG
        )
        set_options(server)
        return server

    def _admin_parts(self) -> AdminParts:
        return AdminParts(
            settings=self._settings,
            store_url=self._store_url,
            log=self._log,
            metrics=at_once(lambda: self.metrics),
            not_ready_reasons=at_once(self.not_ready_reasons),
            notices=at_once(self.notices),
            rules=lambda: self._parts.rules,
            reconciling=self.metrics.reconciling,
        )

    async def _keep(self, keeper: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a task that must never end: without it, leases expire and waiters are never woken."""
        while True:
            try:
                await keeper()
            except Exception as error:
                self._log.error("background task failed, restarting it", exc_info=error)
                await asyncio.sleep(TASK_RESTART_S)

    @property
    def listens_on(self) -> dict[str, str]:
        """Return the addresses in use, for the log: they may have been chosen by the system."""
        public = self._servers[0].sockets[0].getsockname()
        return {"public": f"{public[0]}:{public[1]}", "admin": str(self._admin.address) if self._admin else ":0"}

    async def retire(self) -> None:
        """Accept no more connections, as a successor does; return when the last client has left."""
        self._retired = True
        self._stop_accepting()
        self._listener.retire()
        await unless(None, self._gone(), self._settings.drain_s)
        # Connections without a request for so long are closed.
        self._listener.pre_shutdown()
        await self._gone()
        await self._drain.idle()

    def _stop_accepting(self) -> None:
        self._parts.feeds.close()  # A drain does not wait for followers: they can join again elsewhere.
        self._parts.reconciling.close()
        while self._servers:
            self._servers.pop().close()

    async def _gone(self) -> None:
        while self._listener.connections:
            await asyncio.sleep(POLL_S)

    @property
    def drains(self) -> bool:
        """Whether a drain has begun."""
        return bool(self._leaving)

    def begin_drain(self, reason: str = DRAINING) -> None:
        """Report not ready, and let each response end its connection and say so: clients that keep connections move on.

        Requests are served as ever, until `drain`. Idempotent.
        """
        if not self._drains_since:
            self._drains_since = self._loop.time()
        self._leaving = reason
        self._listener.retire()

    async def drain(self, immediate: asyncio.Event) -> bool:
        """Serve on for what is left of the delay, stop accepting, let what is in flight finish, and cut off the rest.

        It waits no longer once `immediate` is set. Return whether everything in flight was stored or released.
        """
        self.reload.end()
        unsure = self.metrics.unsure
        self.begin_drain(SHUTTING_DOWN)
        delay_s = self._drains_since + self._settings.drain_delay_s - self._loop.time()
        if delay_s > 0 and not self._retired:
            await unless(immediate, asyncio.sleep(delay_s))
        self._stop_accepting()
        finished = await self._drain.run(immediate, self._settings.drain_s)
        self._access.close()
        return finished and self.metrics.unsure == unsure

    @property
    def cut_off(self) -> int:
        """Requests and answers that the drain did not let finish."""
        return self._drain.cut_off

    async def close(self) -> None:
        """End what is left, within a second."""
        await self._listener.shutdown(CANCEL_S)
        left = [*self._tasks, *self._background]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self._admin:
            await self._admin.close()
        await self._parts.close()
        await self.store.close()
        self._access.close()
