"""The request path starts here and reads top to bottom: decide the first step, read, claim, execute or answer."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from oncegate.adaptation.json_rpc import call_name
from oncegate.decision import Meanwhile
from oncegate.downstream.body import Bodies
from oncegate.downstream.heartbeat import Heartbeat
from oncegate.downstream.request import Request
from oncegate.gateway.answers import (
    REFUSED,
    UNKNOWN,
    AnswerOptions,
    Refuse,
    Taken,
    answer_options,
    failed,
    original_declined,
    overloaded,
    refuse,
    send,
)
from oncegate.gateway.duplicates import (
    CLAIMS_AGAIN,
    after_wait,
    answer_duplicate,
    refuse_keyed,
    wait_for_original,
    waits_for_original,
)
from oncegate.gateway.exchange import Exchange
from oncegate.gateway.first_step import FirstStep, ReadBody, Step
from oncegate.gateway.keyed_request import KeyedRequest, begin_trace, open_head
from oncegate.gateway.relay import Relay, answer_preflight, relay
from oncegate.gateway.settling import Progress
from oncegate.gateway.streams.join import Changed, join, may_join
from oncegate.gateway.streams.later import respond_later
from oncegate.gateway.streams.own import AnswerOwn
from oncegate.gateway.streams.resume import Resume, resume
from oncegate.gateway.tunnel import Tunnel, pass_through_report, tunnel
from oncegate.observe.labels import Unguarded
from oncegate.observe.outcome import Observe, Outcome, RequestReport
from oncegate.observe.tracing import Trace, Tracing
from oncegate.store.kept import is_resent, unpack_kept
from oncegate.store.leases import suspended_clock_s
from oncegate.store.record import Claim, Corrupt, Record
from oncegate.store.results import ClaimsSuspended, Unconfirmed
from oncegate.store.waiters import Woken

# Bound once for the request path, as in `decision`.
_CANCELLED: Final = Outcome.CANCELLED
_BROKEN_OFF: Final = Outcome.BROKEN_OFF
_ACCEPTED: Final = Outcome.ACCEPTED


class Gateway:
    """Answers every request of the public listener.

    `in_flight` counts the keyed requests under way, without the duplicates that wait and without those whose body is
    still on its way, which `reading` counts; `relaying` counts the requests that are passed through. `on_failure` is
    given what made a request fail in here.
    """

    def __init__(
        self,
        first_step: FirstStep,
        bodies: Bodies,
        *,
        max_in_flight: int,
        observe: Observe,
        on_failure: Callable[[BaseException], None],
        tracing: Tracing | None = None,
    ) -> None:
        self._first_step, self._bodies, self._tracing = first_step, bodies, tracing
        self._max_in_flight, self._observe, self._on_failure = max_in_flight, observe, on_failure
        self.in_flight = self.reading = self.relaying = 0

    async def answer(self, request: Request) -> None:
        """Answer one request. Whatever fails in here closes the connection without a clean end."""
        began, beating, trace = time.perf_counter(), None, None
        try:
            step = self._first_step.decide(request)
            if isinstance(step, ReadBody):
                step = await self._read_body(request, step)
            if request.response.heartbeat_s and isinstance(step, KeyedRequest | Relay | Resume):
                response, counts = request.response, request.connection.counts.heartbeats
                beating = Heartbeat(response, response.heartbeat_s, request.content.is_eof, counts)
            if isinstance(step, KeyedRequest):
                if self._tracing is not None:
                    step.trace = trace = begin_trace(self._tracing, request, step, began)
                if step.later is None:
                    report = await self._execute_once(request, step)
                else:
                    report = await respond_later(request, step, self._execute_once, self._observe, self._on_failure)
            elif isinstance(step, Relay) and step.ready is None:
                report = await self._relay(request, step)
            elif isinstance(step, Relay):  # as `_relay`, with a coroutine less, which is a fiftieth of it
                self.relaying += 1
                try:
                    report = pass_through_report(request, step, await relay(request, step))
                finally:
                    self.relaying -= 1
            elif isinstance(step, Resume):
                report, trace = await self._resume(request, step, began)
            elif isinstance(step, AnswerOwn):
                report = await step.answer(request, step)
            else:
                report = await _pass_or_refuse(request, step)
        except Exception as error:
            report = RequestReport(Outcome.FAILED, 500, request.message.method)
            self._break_off(error, request, failed(REFUSED))
        if beating is not None:
            beating.stop()
        outcome = report.outcome
        # A client that was broken off has not left by itself.
        gone = (request.response.client_gone and outcome is not _BROKEN_OFF) or outcome is _CANCELLED
        report.asked, report.trace = request, None if outcome is _ACCEPTED else trace
        self._observe(report, time.perf_counter() - began, gone)

    async def _resume(self, request: Request, step: Resume, began_s: float) -> tuple[RequestReport, Trace | None]:
        """Send the rest of a stream, whose reader has its beginning."""
        keyed = step.keyed
        if self._tracing is not None:
            keyed.trace = begin_trace(self._tracing, request, keyed, began_s)
        answer = await resume(request, step)
        report = refuse_keyed(request, keyed, answer) if isinstance(answer, Refuse) else answer
        return report, keyed.trace

    def _break_off(self, error: Exception, request: Request, answer: Refuse) -> None:
        """End a request that failed in here, unless its response is out already."""
        self._on_failure(error)
        if not request.response.started:
            send(request, answer)
        elif not request.response.finished:
            request.response.abort()

    async def _read_body(self, request: Request, step: ReadBody) -> Step:
        """Read the body whole and return the next step.

        The request is not in flight yet: else clients that send slowly could hold every place.
        """
        if self.in_flight >= self._max_in_flight:
            return overloaded()
        self.reading += 1
        try:
            request.response.send_continue()
            body = await self._bodies.read(request.content, step.route.policy.max_request_bytes)
        finally:
            self.reading -= 1
        return self._first_step.with_body(request, step, body)

    async def _relay(self, request: Request, step: Relay) -> RequestReport:
        """Pass a request through."""
        self.relaying += 1
        try:
            if step.preflight is not None:
                relayed = await answer_preflight(request, step, step.preflight)
            else:
                relayed = await relay(request, step)
        finally:
            self.relaying -= 1
            if step.body is not None:
                step.body.close()
        if step.takes_back and 200 <= relayed.status < 300:
            deps = step.route.deps
            deps.background(deps.cancellations.cancel_call(step.takes_back))
        return pass_through_report(request, step, relayed)

    # A request with a key ...

    async def _execute_once(self, request: Request, keyed: KeyedRequest) -> RequestReport:
        """Claim the key and execute the request, or answer it as a duplicate."""
        route, claim_request, body = keyed.route, keyed.claim_request, keyed.body
        if self.in_flight >= self._max_in_flight:
            body.close()
            return refuse_keyed(request, keyed, overloaded())
        self.in_flight += 1
        try:
            deadline, waited = route.deps.clock() + keyed.wait_s, False
            while True:
                asked_s = suspended_clock_s()
                taken = await route.deps.store.claim(claim_request)
                if isinstance(taken, Claim):
                    return await self._execute(request, keyed, taken, asked_s)
                # Another request has the key, or nobody knows.
                if keyed.fresh and isinstance(taken, Record):
                    return await self._relay_unguarded(request, keyed, Unguarded.NO_DUPLICATE)
                if route.policy.bypass and self._may_bypass(taken, keyed, waited):
                    report = await self._relay_unguarded(request, keyed, Unguarded.STORE)
                    return replace(report, key=claim_request.key)
                if not waits_for_original(keyed, taken):
                    return await answer_duplicate(request, keyed, taken)
                if (answered := await self._join_or_wait(request, keyed, taken, deadline)) is not None:
                    return answered
                if not waited:
                    waited = True
                    # The original's response is this request's own by now, however long ago it began.
                    claim_request = replace(claim_request, window_ms=0)
        finally:
            self.in_flight -= 1
            body.close()

    async def _execute(self, request: Request, keyed: KeyedRequest, claim: Claim, asked_s: float) -> RequestReport:
        """Forward a request whose key is ours. `asked_s` is when the store was asked for it."""
        if keyed.trace is not None:
            keyed.trace.claimed(claim.fence, unpack_kept(claim.kept_before).trace)
        grace_s = keyed.route.policy.cancel_grace_s
        if keyed.later is not None:
            keyed.later.set_result(claim)
            # Nobody waits, so that nobody leaves.
            grace_s = None
        exchange = self._exchange(request, keyed, claim, asked_s)
        progress = exchange.progress
        try:
            caller, tenant = keyed.caller, keyed.claim_request.scope.tenant
            call = b"" if caller is None else call_name(tenant, request.checked_head().fields, caller.id)
            if grace_s is None and not (call or keyed.route.policy.cancellable):
                outcome = await exchange.run()
            else:
                cancellations, held = keyed.route.deps.cancellations, progress.held
                outcome = await cancellations.run(exchange, held, request.response, grace_s, call)
        except Exception as error:
            self._break_off(error, request, keyed.named(request, failed(UNKNOWN if progress.sent else REFUSED)))
            return _exchange_report(request, keyed, Outcome.FAILED, 500, progress)
        status = progress.head.status if progress.head else 0
        if exchange.refuse is not None:
            send(request, keyed.named(request, exchange.refuse))
            status = exchange.refuse.problem.status
        elif not request.response.started and outcome is Outcome.FENCED:
            # The claim that took the key decides what this client gets.
            policy = keyed.route.policy
            found = await keyed.route.deps.store.peek(claim.key, keyed.claim_request.scope, policy.lease_ms)
            status = (await answer_duplicate(request, keyed, found)).status
        return _exchange_report(request, keyed, outcome, status, progress)

    def _exchange(self, request: Request, keyed: KeyedRequest, claim: Claim, asked_s: float) -> Exchange:
        """Return the exchange that a claim is for. If that fails, nothing was sent, and the key is freed."""
        deps, held = keyed.route.deps, None
        try:
            head = open_head(request, keyed.route, keyed.body.size)
            held = deps.leases.hold(claim, asked_s, deps.longest_s)
            return Exchange(keyed, held, head, request)
        except Exception:
            if held is not None:
                deps.leases.drop(held)
            # It may have been sent under another claim. Then its key is unknown once the lease is over.
            if not is_resent(claim.kept):
                deps.background(deps.store.release(claim, deps.settle_timeout_s))
            raise

    async def _relay_unguarded(self, request: Request, keyed: KeyedRequest, why: Unguarded) -> RequestReport:
        """Pass a request through although it has a key, as nobody else's response can be its own."""
        head, trace = request.checked_head(), keyed.trace
        return await self._relay(request, Relay(keyed.route, head, keyed.body, why, None, keyed.key_field, trace=trace))

    def _may_bypass(self, taken: Record | Corrupt | Unconfirmed, keyed: KeyedRequest, waited: bool) -> bool:
        """Return whether a request may go on without a claim: not where a claim is known, or may have been made."""
        if not isinstance(taken, Unconfirmed) or isinstance(taken, ClaimsSuspended):
            return False
        return not (taken.maybe_executed or waited or keyed.claim_request.key in keyed.route.deps.leases)

    # A duplicate of a running original ...

    async def _join_or_wait(
        self, request: Request, keyed: KeyedRequest, taken: Taken, deadline_s: float
    ) -> RequestReport | None:
        """Answer a duplicate now or later. None: it is to ask for the key once more. Not counted as in flight."""
        clock = keyed.route.deps.clock
        self.in_flight -= 1
        try:
            joins = b""
            if isinstance(taken, Record) and may_join(keyed, taken):
                match await join(request, keyed, taken):
                    case RequestReport() as report:
                        return report
                    case Refuse() as refused:
                        return refuse_keyed(request, keyed, refused)
                    case Changed():
                        keyed.not_joined = taken.token
                        return None
                    case Meanwhile() as instead:
                        joins = taken.token if instead is Meanwhile.WAIT_FOR_HEAD else b""
            if not keyed.wait_s:
                return await answer_duplicate(request, keyed, taken)
            began_s = clock()
            woken = await wait_for_original(request, keyed, taken, self._bodies, deadline_s, joins)
        finally:
            self.in_flight += 1
        if woken is Woken.CLIENT_LEFT:
            return keyed.report(request, Outcome.CLIENT_GONE, 0)
        found = after_wait(taken, clock() - began_s)
        if woken is Woken.DECLINED:
            return refuse_keyed(request, keyed, original_declined(found, keyed.route.policy))
        return None if woken in CLAIMS_AGAIN else await answer_duplicate(request, keyed, found)


def _exchange_report(
    request: Request, keyed: KeyedRequest, outcome: Outcome, status: int, progress: Progress
) -> RequestReport:
    """Return the report of a request that was executed, or was to be."""
    key, scope = keyed.claim_request.key, keyed.claim_request.scope
    reason = "" if progress.lost is None or outcome is Outcome.FAILED else str(progress.lost)
    return RequestReport(
        outcome, status, request.message.method, key, progress.upstream_s, 0.0, 0, scope.without_credential, reason,
        keyed.route.policy.rule, None, progress.settlements, progress.close_delimited, None, None, keyed.route.upstream,
    )  # fmt: skip


async def _pass_or_refuse(request: Request, step: Tunnel | AnswerOptions | Refuse) -> RequestReport:
    """Pass a connection through, or answer without the upstream."""
    match step:
        case Tunnel():
            return pass_through_report(request, step, await tunnel(request, step))
        case AnswerOptions():
            return answer_options(request)
        case Refuse():
            return refuse(request, step)
