"""Builds the parts of one worker from its settings. They are constructed nowhere else."""

import asyncio
import os
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.ticker import Ticker
from oncegate.downstream.body import Bodies
from oncegate.downstream.certificate import Replaceable, listener_tls
from oncegate.downstream.listener import Listener
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.gateway.cancelling import Cancellations
from oncegate.gateway.first_step import FirstStep
from oncegate.gateway.handler import Gateway
from oncegate.gateway.routes import ExchangeDeps, Route, Routes, UsualTime, is_key_independent
from oncegate.hostnames.resolver import Resolver
from oncegate.keys.digests import Digests, identity_settings
from oncegate.known_heads.requests import HeadCache
from oncegate.messages.admission import Admission
from oncegate.messages.request_ids import RequestIds
from oncegate.messages.request_line import HeadLimits
from oncegate.observe.metrics import Metrics
from oncegate.observe.outcome import Observe
from oncegate.observe.reconciling import By
from oncegate.observe.tracing import Tracing
from oncegate.rules.loading import load_rules
from oncegate.rules.model import Rule, Rules, Upstream
from oncegate.rules.resolution import longest_ms, unknown_retention_ms
from oncegate.service.own_paths import digest_body_of, links_of, own_paths
from oncegate.service.pooling import pool_to
from oncegate.service.reconciling import Reconciling
from oncegate.service.reload import TakeOver
from oncegate.settings.errors import SettingsError, needs_extra
from oncegate.settings.settings import Settings
from oncegate.store.leases import Leases, OnClaimEvent
from oncegate.store.membership import Membership
from oncegate.store.opening import login_of, open_store, postgres_options
from oncegate.store.results import StoreEvent
from oncegate.store.store import Store, StoreConfig
from oncegate.store.unknown_keys import UnknownKeys
from oncegate.store.waiters import MAX_POLLS_PER_S, Waiters
from oncegate.streams.feeds import Feeds
from oncegate.streams.followers import Followers
from oncegate.upstream.pool import Pool
from oncegate.upstream.pools import Pools

if TYPE_CHECKING:
    from oncegate.observe.spans import SpanExport

# Somebody may be about to write the file, or a mount failed.
NO_RULES_LEFT = "the file has no rule any more; a restart takes it, a reload does not"
# How long the end of a worker waits until its last spans are with the collector.
FLUSH_S = 1.0


@dataclass(frozen=True, slots=True)
class Reporting:
    """What the parts report to: a request's end, a failure in here, a claim that was lost or fenced, a finding about
    the store, and a store that confirms no claims any more. `background` runs what nobody waits for."""

    metrics: Metrics
    log: Any
    observe: Observe
    failed: Callable[[BaseException], None]
    claim_lost: OnClaimEvent
    store_finding: Callable[[StoreEvent, str], None]
    store_broke: Callable[[], None]
    background: Callable[[Coroutine[Any, Any, Any]], None]


class Parts:
    """The parts of one worker, wired together. `rules`: those in effect. `certificate`: of the public listener."""

    def __init__(self, settings: Settings, store_url: str, rules: Rules, reporting: Reporting) -> None:
        self._settings, self._reporting, self.rules = settings, reporting, rules
        # By names of rules. None is forgotten: a request that came under a rule may outlive it.
        self._private_paths, self._reserves = rules.with_key_in_path, False
        self._usual_times: defaultdict[str, UsualTime] = defaultdict(UsualTime)
        self.metrics = metrics = reporting.metrics
        clock = asyncio.get_running_loop().time
        self.spans = open_spans(settings, reporting)
        self.memory = MemoryBudget(settings.max_buffered_bytes)
        self._ticker = Ticker(asyncio.get_running_loop())
        self._resolver = Resolver(settings.dns_ttl_s, report=reporting.log.warning, count=metrics.looked_up)
        self.store = self._store(store_url)
        self.leases = Leases(self.store, settings.lease_ms, reporting.claim_lost, clock)
        self.waiters = Waiters(
            self.store,
            self.leases.__contains__,
            max_waiters=settings.max_waiters,
            lease_ms=settings.lease_ms,
            polls_per_s=MAX_POLLS_PER_S / settings.workers,
            polled=metrics.duplicate_polled,
        )
        self.feeds = Feeds(self.store, self.memory, settings.lease_ms, settings.workers)
        self.feeds.head_came = self.waiters.wake_joining
        self.followers = Followers(settings.max_followers)
        self.reconciling = Reconciling(self.store, self.waiters, metrics, reporting.log)
        self.cancellations = Cancellations(self.store, self.leases, metrics.cancels.by_value)
        self.unknown_keys = UnknownKeys(
            self.store, int(settings.retention_s * 1000), unknown_retention_ms(settings), reporting.log.warning
        )
        self.pools = Pools(self._pool)
        self.head_cache = HeadCache(enabled=settings.head_cache, max_line_bytes=settings.max_head_line_bytes)
        minimum_rate = MinimumRate(settings.client_stall_s, settings.client_min_bytes_per_s)
        spool = MemoryBudget(settings.max_spool_bytes)
        spool_dir = str(settings.spool_dir or tempfile.gettempdir())
        bodies = Bodies(self.memory, spool, spool_dir, settings.max_request_bytes, minimum_rate)
        digests = Digests(settings.secret.get_secret_value().encode())
        self.head_cache.reset(rules.default.policy.key_header, rules.acted_on)
        metrics.follow((rule.name, rule.upstream.label) for rule in rules)
        self._first_step = FirstStep(digests, bodies)
        self._follow(rules, self._routes(rules))
        self.gateway = Gateway(
            self._first_step,
            bodies,
            max_in_flight=settings.max_in_flight,
            observe=reporting.observe,
            on_failure=reporting.failed,
            tracing=self._tracing(),
        )
        tls = listener_tls(settings)
        self.certificate = Replaceable(tls) if tls else None
        self.listener = Listener(
            self.gateway.answer,
            max_connections=settings.max_connections,
            minimum_rate=minimum_rate,
            observe=reporting.observe,
            head_cache=self.head_cache,
            request_ids=RequestIds(settings.request_id_header),
            trusted=settings.trusted_proxies,
            docs_url=str(settings.docs_url or ""),
            head_limits=HeadLimits(settings.max_head_bytes, settings.max_head_line_bytes, settings.max_head_fields),
            counts=metrics.of_clients,
        )

    def _tracing(self) -> Tracing | None:
        settings, limited = self._settings, self._reporting.metrics.traces_limited.add
        return Tracing(settings.trace_rate_per_s, settings.trace_ratio, limited) if self.spans is not None else None

    async def close(self) -> None:
        """Close the connections to the upstreams, and send the spans that are waiting."""
        await self.reconciling.end()
        self.pools.close()
        if self.spans is not None:
            await self.spans.close(FLUSH_S)

    def _store(self, url: str) -> Store:
        settings, reporting = self._settings, self._reporting
        config = StoreConfig(
            url=url,
            timeout_ms=settings.store_timeout_ms,
            patience_s=settings.settle_timeout_s,
            observers=reporting.metrics.store_observers,
            retried=reporting.metrics.store_retried,
            background=reporting.background,
            log=reporting.log.warning,
            log_info=reporting.log.info,
            durability=settings.durability,
            member=self._membership(),
            breaker_opened=reporting.store_broke,
            resolver=self._resolver,
            postgres=postgres_options(settings),
            login=login_of(settings),
        )
        return open_store(config)

    def prepare_certificate(self, settings: Settings) -> TakeOver:
        """Read the certificate of the public listener again; what is returned takes it over for new connections."""
        context, certificate = listener_tls(settings), self.certificate
        return lambda: certificate.replace(context) if certificate and context else None

    def prepare_rules(self, settings: Settings) -> tuple[Rules, TakeOver]:
        """Read rules, pages and certificates of upstreams again. Raises SettingsError and OSError.

        What is returned takes them over for requests that come from then on; those under way keep theirs.
        """
        rules = load_rules(settings)
        routes = self._routes(rules)
        if self.rules.rules and not rules.rules:
            raise SettingsError([NO_RULES_LEFT])

        def follow() -> None:
            self.rules = rules
            self._private_paths |= rules.with_key_in_path
            self._reporting.metrics.follow((rule.name, rule.upstream.label) for rule in rules)
            # Heads that are known passed the checks of other rules.
            self.head_cache.reset(rules.default.policy.key_header, rules.acted_on)
            self._follow(rules, routes)
            self.pools.retain_only(rule.upstream for rule in rules)

        return rules, follow

    def _follow(self, rules: Rules, routes: Routes) -> None:
        self.reconciling.follow(rules)
        admission = self._admission(rules)
        self._reserves = self._reserves or any(rule.policy.uses_own_path for rule in rules)
        own = own_paths(self._settings, rules, routes, admission) if self._reserves else None
        self._first_step.follow(admission, routes, own)

    def _routes(self, rules: Rules) -> Routes:
        """Return the routes of rules. Raises OSError for a certificate that cannot be used."""
        return Routes(rules, {rule.name: self._route(rule, rules) for rule in rules})

    def logs_path(self, rule: str) -> bool:
        """Return whether the access log and spans have the paths of requests under a rule."""
        return self._settings.access_log_path and rule not in self._private_paths

    def _admission(self, rules: Rules) -> Admission:
        hosts = [host.encode() for host in self._settings.hosts]
        return Admission(hosts, rules.default.policy.key_header, rules.acted_on)

    def _route(self, rule: Rule, rules: Rules) -> Route:
        origin = rule.upstream.origin
        host = rule.set_host or origin.authority
        id_name = self._settings.request_id_header.lower().encode()
        return Route(
            policy=rule.policy,
            deps=self._exchange_deps(rule),
            host=host.encode(),
            prefix=origin.path_prefix.encode(),
            origin=str(origin),
            is_key_independent=is_key_independent(rule.policy, rules),
            upstream=rule.upstream.label,
            links=links_of(self._settings, rule),
            digest_body=digest_body_of(self._settings, rule),
            request_id_name=b"" if (rule.policy.forward_key or b"").lower() == id_name else id_name,
        )

    def _exchange_deps(self, rule: Rule) -> ExchangeDeps:
        settings, reporting = rule.settings, self._reporting
        return ExchangeDeps(
            store=self.store,
            leases=self.leases,
            waiters=self.waiters,
            cancellations=self.cancellations,
            feeds=self.feeds,
            followers=self.followers,
            wait_ended=reporting.metrics.wait_ended,
            pool=self.pools.of(rule.upstream),
            memory=self.memory,
            ticker=self._ticker,
            background=reporting.background,
            clock=asyncio.get_running_loop().time,
            silence_s=settings.upstream_timeout_s,
            reuse_idle_s=rule.upstream.reuse_idle_s,
            store_timeout_s=settings.store_timeout_ms / 1000,
            settle_timeout_s=settings.settle_timeout_s,
            # Sent on the last moment of the queue for a connection, and answered on the last one of the silence.
            longest_s=settings.connect_timeout_s
            + settings.upstream_timeout_s
            + settings.client_stall_s
            + 2 * settings.settle_timeout_s
            + 10,
            usual=self._usual_times[rule.name],
            notes_releases=rule.policy.respond_async,
            resent=partial(reporting.metrics.reconciling.settled, By.RESEND),
            verdicts=self.reconciling if rule.policy.reconcile is not None else None,
        )

    def _pool(self, upstream: Upstream) -> Pool:
        return pool_to(upstream, self.memory, self._resolver, self.metrics, head_cache=self.head_cache.enabled)

    def _membership(self) -> Membership:
        """Return what this proxy tells the others on its store about itself."""
        settings = self._settings
        digests = Digests(settings.secret.get_secret_value().encode())
        return Membership(
            token_prefix=b"",
            proxy_name=f"{socket.gethostname()} pid {os.getpid()}",
            identity_text=identity_settings(digests, settings.namespace, settings.key_header, settings.scope_headers),
            accept=settings.identity_change == "accept",
            # As long as the last key that is named so may be there: rules have retentions of their own.
            retention_ms=max(longest_ms(rule.settings) for rule in self.rules),
            quarantine_ms=int(settings.quarantine_s * 1000) if settings.on_store_loss == "quarantine" else 0,
            notice_s=settings.quarantine_s,
            durable=is_durable(settings),
            report=self._reporting.store_finding,
            rules=lambda: self.rules.identity_digest,
            record_layout=settings.record_layout,
        )


def open_spans(settings: Settings, reporting: Reporting) -> "SpanExport | None":
    """Return what takes the requests that are traced, None for no tracing. Raises SettingsError."""
    if not settings.trace_rate_per_s:
        return None
    with needs_extra("otel"):
        from oncegate.observe.spans import SpanExport
    return SpanExport(reporting.log.warning, reporting.metrics.spans.add)


def is_durable(settings: Settings) -> bool:
    """Return whether the store confirms a claim only once it survives a restart or a failover."""
    return settings.store_url.get_secret_value() == "embedded" or settings.durability != "memory"
