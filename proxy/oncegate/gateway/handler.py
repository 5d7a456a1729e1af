"""The request path starts here and reads top to bottom: let in, name, read, claim, decide, answer."""

import time
from collections.abc import Callable, Coroutine
from ipaddress import ip_address

from oncegate.decision import Decision
from oncegate.downstream.body import Bodies, Body, BrokenOff, NoRoom, TooLarge
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.answers import REFUSED, UNKNOWN, explain, judge, no_body, no_scope, overloaded, refuse, reject
from oncegate.gateway.exchange import Exchange, ExchangeDeps
from oncegate.gateway.keyed_request import HeadPlan, Identifier, KeyedRequest
from oncegate.gateway.relay import relay
from oncegate.gateway.replay import replay
from oncegate.gateway.routes import Route, Routes
from oncegate.gateway.tunnel import tunnel
from oncegate.gateway.waiters import Woken
from oncegate.keys.digests import Digests, Scope
from oncegate.keys.documents import Missing
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.admission import Admission, Refused
from oncegate.messages.fields import tokens
from oncegate.messages.problems import problem, refusal
from oncegate.messages.request_head import ForwardedInfo, RequestHead, is_websocket, renamed, request_head
from oncegate.observe.outcome import BY_LABEL, Observe, Outcome, RequestReport
from oncegate.observe.usage import usage_reader
from oncegate.rules.identity import key_in_head, may_forward_unkeyed, uses_no_key
from oncegate.settings.addresses import Network
from oncegate.store.leases import LeasedClaim, suspended_clock_s
from oncegate.store.record import Claim, ClaimRequest, Corrupt, Record
from oncegate.store.results import ClaimsSuspended, Unconfirmed
from oncegate.store.store import Claiming

Way = RequestReport | Coroutine[None, None, RequestReport]  # answered already, or what will answer
UNGUARDED = b"Oncegate-Status: unguarded\r\n"
_REPLAY = Decision.REPLAY  # bound once, as in `decision`
NO_VALUE = b"\0"  # which no field that came in can have


class Gateway:
    """Answers every request of the public listener."""

    def __init__(
        self,
        deps: ExchangeDeps,
        *,
        gate: Admission,
        routes: Routes,
        digests: Digests,
        bodies: Bodies,
        trusted: tuple[Network, ...],
        max_in_flight: int,
        observe: Observe,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._deps, self._namer, self._bodies, self._trusted = deps, Identifier(digests), bodies, trusted
        self._max_in_flight, self._observe, self._failed = max_in_flight, observe, failed
        self.in_flight = self.relaying = 0
        self._gate = gate
        self.follow(gate, routes)

    def follow(self, gate: Admission, routes: Routes) -> None:
        """Treat requests that come from now on by these routes; those under way keep theirs."""
        self._gate.heads.clear()  # they passed another gate
        self._gate, self._default = gate, routes.default
        self._choose, self._namer.chosen_by = routes if routes.chosen else None, routes.headers

    async def __call__(self, request: Request) -> ResponseWriter:
        """Answer one request. Whatever fails in here closes the connection without a clean end."""
        began = time.perf_counter()
        client = ResponseWriter(request, self._deps.pace)
        try:
            found = self._enter(request, client)
            report = found if isinstance(found, RequestReport) else await found
        except Exception as error:
            report = RequestReport(Outcome.FAILED, 500, request.message.method)
            self._break_off(error, client, REFUSED)
        self._observe(report, time.perf_counter() - began, client.gone)
        return client

    def _break_off(self, error: Exception, client: ResponseWriter, status: bytes) -> None:
        """End a request that failed in here, unless its answer is out already."""
        self._failed(error)
        if not client.started:
            client.answer(refusal(500, "see the log"), status, close=True)
        elif not client.finished:
            client.abort()

    def _enter(self, request: Request, client: ResponseWriter) -> Way:
        if (seen := request.seen) is not None and seen.prepared is not None:
            return self._guard_again(request, client, seen.prepared)
        message, head = request.message, request.head
        if head is None:
            target = (message.path or "").encode("utf-8", "surrogateescape")  # CONNECT may come without any
            entered = self._gate.admit(message.method, target, message.version, message.raw_headers)
            if isinstance(entered, Refused):
                return refuse(client, message.method, entered)
            request.head = head = entered
            request.protocol.remember(self._gate.heads, message, head)
        route, fields = self._default if self._choose is None else self._choose(head), head.fields
        if message.upgrade and tokens(fields.get(b"upgrade", ())) != [b"h2c"]:  # h2c is offered, may be ignored
            return self._switch(request, head, client, route)
        if b"expect" in fields:
            client.awaits_continue = not head.http10 and not request.content.is_eof()
        policy = route.policy
        if head.method not in policy.methods:
            return self._relay(request, head, client, route)
        key: bytes | BadKey | Missing | None
        if policy.sources is None and (lines := fields.get(policy.key_header)) is not None:  # as most are
            key = parse_key(lines)
        else:
            key = key_in_head(policy, head)
        if key is None or isinstance(key, bytes):
            return self._guard(request, head, client, route, key)
        return self._without_key(request, head, client, route, key)

    # Without a key ...

    def _without_key(
        self,
        request: Request,
        head: RequestHead,
        client: ResponseWriter,
        route: Route,
        why: Missing | BadKey,
        body: Body | None = None,
    ) -> Way:
        """Pass a request on that has no key, or none that can be used, or refuse it, as its rule says."""
        if may_forward_unkeyed(route.policy, why):
            mark = b"" if uses_no_key(route.policy, why) else UNGUARDED
            return self._relay(request, head, client, route, body, mark)
        if body is not None:
            body.close()
        told = problem("key-missing" if isinstance(why, Missing) else "key-invalid", why.detail)
        return reject(client, head.method, told)._replace(rule=route.policy.rule)

    async def _relay(
        self,
        request: Request,
        head: RequestHead,
        client: ResponseWriter,
        route: Route,
        body: Body | None = None,
        mark: bytes = b"",
    ) -> RequestReport:
        """Pass a request through; `body` is its body if it was read already, and ends here, `mark` a field for its
        answer."""
        length = _length(head) if body is None else body.size
        client.send_continue()
        stated = length if body is not None or b"content-length" in head.fields else -1 if length == 0 else None
        onward, deps = self._onward(request, head, route, stated), route.deps
        self.relaying += 1
        try:
            relayed = await relay(
                client, deps.pool, onward, head.method, body or request.content, length, deps.silence_s, mark
            )
        finally:
            self.relaying -= 1
            if body is not None:
                body.close()
        outcome = relayed.outcome
        if mark and outcome is Outcome.PASSTHROUGH:
            outcome = Outcome.UNGUARDED
        return RequestReport(
            outcome, relayed.status, head.method, upstream_s=relayed.upstream_s, rule=route.policy.rule
        )

    async def _switch(self, request: Request, head: RequestHead, client: ResponseWriter, route: Route) -> RequestReport:
        """Let a WebSocket through. It has no end: a drain does not wait for it, and closes it at its beginning."""
        if not is_websocket(head) or head.method in route.policy.methods:
            return refuse(client, head.method, Refused(501, "the only protocol switched to is WebSocket, by GET"))
        onward = self._onward(request, head, route, -1)
        tunnelled = await tunnel(request, client, route.deps.pool, onward, route.deps.silence_s)
        outcome, status, rule = tunnelled.outcome, tunnelled.status, route.policy.rule
        return RequestReport(outcome, status, head.method, upstream_s=tunnelled.upstream_s, rule=rule)

    def _onward(self, request: Request, head: RequestHead, route: Route, length: int | None) -> bytes:
        connection = request.protocol
        hop = connection.hop
        if hop is None:
            hop = connection.hop = self._hop(request.remote, b"https" if connection.ssl_context else b"http")
        policy, host, prefix = route.policy, route.host, route.prefix
        if policy.forward_key is not None:
            head = head._replace(pairs=renamed(head.pairs, policy.key_header, policy.forward_key))
        return request_head(head, hop, head.host if policy.pass_host and head.host else host, prefix, length)

    def _hop(self, remote: str, scheme: bytes) -> ForwardedInfo:
        trusted = bool(self._trusted) and any(ip_address(remote) in network for network in self._trusted)
        return ForwardedInfo(remote.encode(), scheme, trusted)

    def _onward_for(self, request: Request, route: Route, size: int) -> bytes:
        """Return the head for the upstream, of which a connection that says the same again has all but the key."""
        seen, connection = request.seen, request.protocol
        if seen is None or seen.prepared is None:
            assert request.head is not None
            return self._onward(request, request.head, route, size)
        if connection.prepared is not seen.prepared:
            before, after = self._onward(request, seen.again(NO_VALUE), route, size).split(NO_VALUE)
            connection.prepared, connection.around_key = seen.prepared, (before, after)
        return request.key.join(connection.around_key)

    # With one ...

    def _guard(
        self, request: Request, head: RequestHead, client: ResponseWriter, route: Route, key: bytes | None
    ) -> Way:
        """Check whose key it is. Every limit applies before the claim. `key` None: the body has it."""
        policy = route.policy
        scope = self._namer.scope(request, policy, head)
        if not isinstance(scope, Scope):
            return reject(client, head.method, no_scope(scope))._replace(rule=route.policy.rule)
        if self.in_flight >= self._max_in_flight:
            return overloaded(client, head.method)
        body = self._bodies.here(request.content, _length(head), policy.max_request_bytes)
        if body is None:
            return self._read_first(request, head, client, route, scope, key)
        return self._go_on(request, head, client, route, scope, key, body)

    def _guard_again(self, request: Request, client: ResponseWriter, prepared: HeadPlan) -> Way:
        """Guard a request that came before, all but its key and body."""
        method = request.message.method
        if self.in_flight >= self._max_in_flight:
            return overloaded(client, method)
        body = self._bodies.again(request.content)
        if not isinstance(body, Body):
            return no_body(client, method, body)
        try:
            guarded = self._namer.again(prepared, method, request.key, body)
        except Exception:
            body.close()
            raise
        return self._once(request, client, guarded, body)

    async def _read_first(
        self, request: Request, head: RequestHead, client: ResponseWriter, route: Route, scope: Scope, key: bytes | None
    ) -> RequestReport:
        """Read the body whole; meanwhile it counts as in flight."""
        self.in_flight += 1
        try:
            client.send_continue()
            body = await self._bodies.read(request.content, route.policy.max_request_bytes)
        finally:
            self.in_flight -= 1
        way = self._go_on(request, head, client, route, scope, key, body)
        return way if isinstance(way, RequestReport) else await way

    def _go_on(
        self,
        request: Request,
        head: RequestHead,
        client: ResponseWriter,
        route: Route,
        scope: Scope,
        key: bytes | None,
        body: Body | TooLarge | NoRoom | BrokenOff,
    ) -> Way:
        """Name a request whose body is here, or say why it is not."""
        if not isinstance(body, Body):
            return no_body(client, head.method, body)
        try:
            guarded = self._namer.name(request, route, head, scope, key, body)
        except Exception:
            body.close()
            raise
        if isinstance(guarded, KeyedRequest):
            return self._once(request, client, guarded, body)
        return self._without_key(request, head, client, route, guarded, body)

    async def _once(self, request: Request, client: ResponseWriter, guarded: KeyedRequest, body: Body) -> RequestReport:
        """Claim, and execute or answer from what stands in the store."""
        self.in_flight += 1
        try:
            until = self._deps.pool.loop.time() + guarded.wait_s
            waited = False
            while True:
                asked_s = suspended_clock_s()
                found = await self._claim(guarded)
                if isinstance(found, Claim):
                    exchange = self._exchange(request, guarded, found, asked_s, body, client)
                    try:
                        outcome = await exchange.run()
                    except Exception as error:
                        self._break_off(error, client, UNKNOWN if exchange.sent else REFUSED)
                        return guarded.report(Outcome.FAILED, 500, exchange.upstream_s)
                    return await self._answered(outcome, exchange, guarded, client)
                if guarded.fresh and isinstance(found, Record):  # an equal one runs: each goes its own way
                    return await self._unguarded(request, client, guarded.route, body)
                if guarded.route.policy.bypass and self._may_bypass(found, guarded, waited):
                    return (await self._unguarded(request, client, guarded.route, body))._replace(key=guarded.key)
                if not guarded.wait_s:
                    return await self._tell(guarded, found, client)
                if (told := await self._stand_back(guarded, found, until, client)) is not None:
                    return told
                waited = True
        finally:
            self.in_flight -= 1
            body.close()

    async def _unguarded(self, request: Request, client: ResponseWriter, route: Route, body: Body) -> RequestReport:
        """Pass a request on though it has a key, as nobody else's answer can be its own."""
        assert request.head is not None
        return await self._relay(request, request.head, client, route, body, UNGUARDED)

    def _claim(self, guarded: KeyedRequest) -> Claiming:
        route, _, key, scope, fingerprint, _, _, window_ms, _ = guarded
        policy = route.policy
        request = ClaimRequest(
            key=key,
            scope=scope,
            fingerprint=fingerprint,
            mode=policy.mode,
            lease_ms=policy.lease_ms,
            retention_ms=policy.retention_ms,
            window_ms=window_ms,
        )
        return self._deps.store.claim(request)

    def _exchange(
        self, request: Request, guarded: KeyedRequest, claim: Claim, asked_s: float, body: Body, client: ResponseWriter
    ) -> Exchange:
        """Return the exchange that a claim is for; if that fails, nothing was sent, and the key is freed."""
        policy, deps = guarded.route.policy, guarded.route.deps
        held: LeasedClaim | None = None
        try:
            onward = self._onward_for(request, guarded.route, body.size)
            held = deps.leases.hold(claim, asked_s, deps.longest_s)
            return Exchange(deps, held, guarded.scope, policy, onward, body, client)
        except Exception:
            if held is not None:
                deps.leases.drop(held)
            deps.background(deps.store.release(claim, deps.patience_s))
            raise

    async def _answered(
        self, outcome: Outcome, exchange: Exchange, guarded: KeyedRequest, client: ResponseWriter
    ) -> RequestReport:
        if not client.started and outcome is Outcome.FENCED:  # the record has the answer
            found = await self._deps.store.look(guarded.key, guarded.scope, guarded.route.policy.lease_ms)
            await self._tell(guarded, found, client)
        return guarded.report(outcome, exchange.status, exchange.upstream_s, exchange.detail)

    async def _stand_back(
        self, guarded: KeyedRequest, found: Record | Corrupt | Unconfirmed, until: float, client: ResponseWriter
    ) -> RequestReport | None:
        """Answer a request whose key is taken, or wait for its original; None: it may claim again."""
        if judge(found, guarded.fingerprint) is Decision.IN_FLIGHT:
            woken = await self._wait(guarded, until, client)
            if woken is Woken.GONE:
                return guarded.report(Outcome.CLIENT_GONE, 0)
            if woken not in (Woken.BUSY, Woken.FULL):
                return None
        return await self._tell(guarded, found, client)

    def _may_bypass(self, found: Record | Corrupt | Unconfirmed, guarded: KeyedRequest, waited: bool) -> bool:
        """Return whether a request may go on without a claim: not where one is known, or one of ours may stand."""
        if not isinstance(found, Unconfirmed) or isinstance(found, ClaimsSuspended):
            return False
        return not (found.maybe_executed or waited or guarded.key in self._deps.leases)

    async def _wait(self, guarded: KeyedRequest, until: float, client: ResponseWriter) -> Woken:
        """Wait for the original, not counted as in flight meanwhile."""
        self.in_flight -= 1
        try:
            asks_no_more = client.asks_no_more
            return await self._deps.waiters.wait(guarded.key, guarded.scope, until, client.leaving(), asks_no_more)
        finally:
            self.in_flight += 1

    # What a duplicate gets ...

    async def _tell(
        self, guarded: KeyedRequest, found: Record | Corrupt | Unconfirmed | None, client: ResponseWriter
    ) -> RequestReport:
        """Answer a request whose key is taken, by what stands in the store for it."""
        decision = judge(found, guarded.fingerprint)
        if decision is _REPLAY and isinstance(found, Record) and (answer := found.answer) is not None:
            uses = (
                usage_reader(answer.status, answer.block, answer.size) if guarded.route.policy.counts_tokens else None
            )
            along = None if uses is None else uses.add
            way = replay(client, self._deps.store, guarded.key, found, guarded.extra, along)
            outcome = way if isinstance(way, Outcome) else await way
            if outcome is Outcome.REPLAYED:
                report = guarded.report(outcome, answer.status, 0.0, "", answer.took_ms / 1000, answer.size)
                return report if uses is None else report._replace(tokens=uses.tokens())
            if client.started:
                return guarded.report(outcome, answer.status)
            decision = outcome
        told = explain(decision, found, guarded.route.policy)
        outcome = BY_LABEL[told.code]
        client.answer(told, (UNKNOWN if outcome is Outcome.OUTCOME_UNKNOWN else REFUSED) + guarded.extra)
        return guarded.report(outcome, told.status)


def _length(head: RequestHead) -> int | None:
    """Return the size of the request's body, None where only its end will tell."""
    if b"transfer-encoding" in head.fields:
        return None
    return int((head.fields.get(b"content-length") or [b"0"])[0])
