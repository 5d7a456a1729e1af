"""The first step of the request path: what is to be done with a request, as a value.

Nothing is sent, awaited or claimed here. `Gateway` does what the value says.
"""

import asyncio
from dataclasses import replace
from typing import NamedTuple, cast

from oncegate.adaptation.error_pages import wants_page
from oncegate.adaptation.heartbeats import Heartbeats
from oncegate.adaptation.json_rpc import Caller, cancelled_call
from oncegate.downstream.body import Bodies, Body, BufferedBody, NoBody, TooLarge, stated_length
from oncegate.downstream.request import Request
from oncegate.gateway.answers import AnswerOptions, Refuse, body_refusal, key_refusal, malformed, scope_refusal
from oncegate.gateway.keyed_request import Begun, HeadPlan, KeyedRequest, Waiting, claim_request_of, kept_of, plan_head
from oncegate.gateway.relay import Relay, pass_through
from oncegate.gateway.routes import Route, Routes
from oncegate.gateway.streams.own import AnswerOwn, OwnPaths
from oncegate.gateway.streams.resume import Resume
from oncegate.gateway.tunnel import Tunnel
from oncegate.keys.digests import Digests, Scope, UnstableScope, finish_fingerprint, finish_key
from oncegate.keys.documents import Missing
from oncegate.keys.forms import is_multipart
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.known_heads.requests import KnownHead
from oncegate.messages.admission import Admission, Refused
from oncegate.messages.request_head import RequestHead, is_websocket, one_forward_less, preferred_wait_s, prefers
from oncegate.observe.labels import Unguarded
from oncegate.rules.body_conditions import NO_BODY, read_document, unread_document
from oncegate.rules.identity import (
    Identity,
    ScopedRequest,
    caller_of,
    identify,
    key_in_head,
    last_event_id,
    may_forward_unkeyed,
    scope_of,
    uses_no_key,
)
from oncegate.rules.policy import Policy


class ReadBody(NamedTuple):
    """The body is still on its way: read it, then identify the request.

    `key` None: the body has it. `scope` None: the body decides which rule matches; `route` is that of the first that
    may. `by_body`: the body has decided it.
    """

    route: Route
    head: RequestHead
    scope: Scope | None
    key: bytes | None
    by_body: bool = False


Step = AnswerOptions | AnswerOwn | Refuse | Relay | Resume | Tunnel | KeyedRequest


class FirstStep:
    """Decides the first step of each request, by the rules in effect."""

    def __init__(self, digests: Digests, bodies: Bodies) -> None:
        """`follow` is called before the first request."""
        self._digests, self._bodies = digests, bodies

    def follow(self, admission: Admission, routes: Routes, own: OwnPaths | None) -> None:
        """Decide by these rules from now on. `own`: what oncegate answers itself, None for nothing."""
        self._admission, self._routes, self._own = admission, routes, own

    def decide(self, request: Request) -> Step | ReadBody:
        """Return the first step of a request."""
        known, content, message = request.known, request.content, request.message
        if known is not None:
            if isinstance(plan := known.plan, HeadPlan) and isinstance(content, BufferedBody):
                begun = self._begun(request, known, plan) if known.has_ids or plan.tenant_at else plan.begun
                if begun is not None:
                    return self._planned_step(request, plan, begun, content)
            if isinstance(plan, Relay):
                request.adaptation = plan.route.policy.adaptation
                return plan
            step = self._step_for(request, known.watched(request.checked_head()))
            if isinstance(step, Relay) and _is_planned(request, step):
                known.plan = replace(step, ready={})
            return step
        # CONNECT may come without a target.
        target = (message.path or "").encode("utf-8", "surrogateescape")
        head = self._admission.admit(message.method, target, message.version, message.raw_headers)
        if self._own is not None and (own := self._own.step(request, head)) is not None:
            _note_expectation(request, own.head)
            return own
        if isinstance(head, Refused):
            return malformed(head)
        if head.method == "OPTIONS" and b"max-forwards" in head.fields:
            forwarded = one_forward_less(head)
            if forwarded is None:
                _note_expectation(request, head)
                return AnswerOptions()
            head = forwarded
        request.head = head
        request.known = known = request.connection.remember_head(message, head)
        return self._step_for(request, head if known is None else known.watched(head))

    def _begun(self, request: Request, known: KnownHead, plan: HeadPlan) -> Begun | None:
        """Return what is begun for a request whose own values say whose it is or where it goes; None for no plan."""
        if self._routes.has_rules and self._routes.choose(known.with_values(request.values)) is not plan.route:
            return None
        return plan.begin(request, self._digests)

    def _planned_step(self, request: Request, plan: HeadPlan, begun: Begun, content: BufferedBody) -> Step:
        """Return the step for a request under a known head."""
        policy = plan.route.policy
        request.adaptation = policy.adaptation
        if policy.heartbeats is not None:
            set_heartbeat(request, policy.heartbeats)
        body = self._bodies.take_buffered(content, policy.max_request_bytes)
        if not isinstance(body, Body):
            return body_refusal(body)
        try:
            return plan.keyed_request(request, begun, body)
        except Exception:
            body.close()
            raise

    def _step_for(self, request: Request, head: RequestHead) -> Step | ReadBody:
        """Return the step for a request that was admitted."""
        if head.method == "OPTIONS" and (found := self._routes.for_preflight(head)) is not None:
            _note_expectation(request, head)
            # What is not listed is answered by the API, as it answers.
            return Relay(found[0], head, preflight=found[1])
        route = self._routes.choose(head) if self._routes.has_rules else self._routes.default
        return self._step_on(request, route, head) if route is not None else self._step_by_body(request, head)

    def _step_by_body(self, request: Request, head: RequestHead) -> Step | ReadBody:
        """Return the step for a request whose body decides which rule matches it."""
        fields = head.fields
        unread = NO_BODY if request.message.upgrade else unread_document(fields, stated_length(fields))
        if unread is not None:
            return self._step_on(request, self._routes.chosen(head, unread), head)
        _note_expectation(request, head)
        pending = ReadBody(self._routes.first_possible(head), head, None, None)
        request.adaptation = pending.route.policy.adaptation
        body = self._bodies.take(request.content, fields, pending.route.policy.max_request_bytes)
        return pending if body is None else self.with_body(request, pending, body)

    def _step_on(self, request: Request, route: Route, head: RequestHead, body: Body | None = None) -> Step | ReadBody:
        """Return the step for a request on its route. `body`: it is here, because it has decided the route."""
        policy, fields = route.policy, head.fields
        self._prepare_answer(request, policy, head)
        # A wish for any other protocol is ignored (RFC 9110, section 7.8).
        if request.message.upgrade and head.method not in policy.methods and is_websocket(head):
            return Tunnel(route, head)
        if b"expect" in fields:
            _note_expectation(request, head)
        if head.method not in policy.methods:
            return pass_through(route, head, body)
        return self._guarded_step(request, route, head, body)

    def _guarded_step(self, request: Request, route: Route, head: RequestHead, body: Body | None) -> Step | ReadBody:
        """Return the step for a request whose method is guarded."""
        policy, fields = route.policy, head.fields
        if body is not None:
            _set_caller(request, caller_of(policy, head, body))
        # Most keys are in the header of their own.
        if policy.sources is None and (lines := fields.get(policy.key_header)) is not None:
            key: bytes | Missing | BadKey | None = parse_key(lines)
        else:
            key = key_in_head(policy, head)
        if isinstance(key, Missing | BadKey):
            return _without_key(route, head, key, body)
        scope = self._scope(request, policy, head)
        if not isinstance(scope, Scope):
            if body is not None:
                body.close()
            return scope_refusal(scope, policy.rule)
        pending = ReadBody(route, head, scope, key, body is not None)
        if body is not None and body.size > policy.max_request_bytes:
            body.close()
            return body_refusal(TooLarge())
        taken = body or self._bodies.take(request.content, fields, policy.max_request_bytes)
        return pending if taken is None else self.with_body(request, pending, taken)

    def _scope(self, request: Request, policy: Policy, head: RequestHead) -> Scope | UnstableScope | BadKey:
        """Return whose key a request carries. `head` may be watched: what only says whose it is, may differ."""
        if policy.scope_sources:
            return scope_of(policy, self._digests, head)
        return request.connection.memo.scope(self._digests, policy, request.checked_head().fields)

    def _prepare_answer(self, request: Request, policy: Policy, head: RequestHead) -> None:
        """Note for whom the response is, whatever it will be."""
        request.adaptation = policy.adaptation
        if policy.heartbeats is not None:
            set_heartbeat(request, policy.heartbeats)
        if wants_page(policy.pages, head.fields):
            has_window = policy.sources is not None and policy.sources.window_ms > 0
            request.render = self._routes.pages.renderer(head, reload_is_safe=not has_window)

    def with_body(self, request: Request, pending: ReadBody, body: Body | NoBody) -> Step:
        """Return the step for a request whose body is here, or the reason why it is not."""
        if not isinstance(body, Body):
            return body_refusal(body, client_gone=request.response.client_gone)
        try:
            if pending.scope is None:
                document = read_document(pending.head.fields, body.data, body.spooled)
                route = self._routes.chosen(pending.head, document)
                # The body is here: there is nothing left to read.
                step = cast(Step, self._step_on(request, route, pending.head, body))
                if isinstance(step, Relay) and pending.route.policy.json_rpc and isinstance(document, tuple):
                    return replace(step, takes_back=self._taken_back(pending, document[0]))
                return step
            identified = self._identify(request, pending, pending.scope, body)
        except Exception:
            body.close()
            raise
        if isinstance(identified, KeyedRequest | Resume):
            return identified
        return _without_key(pending.route, pending.head, identified, body)

    def _taken_back(self, pending: ReadBody, message: object) -> bytes:
        """Return the name of the call that a JSON-RPC message takes back, nothing for any other message."""
        scope = scope_of(pending.route.policy, self._digests, pending.head)
        return cancelled_call(scope.tenant, pending.head.fields, message) if isinstance(scope, Scope) else b""

    def _identify(
        self, request: Request, pending: ReadBody, scope: Scope, body: Body
    ) -> KeyedRequest | Resume | Missing | BadKey:
        """Return the request with its key and fingerprint, and how long it may wait if it is a duplicate."""
        route, head, key = pending.route, pending.head, pending.key
        policy, digests, memo = route.policy, self._digests, request.connection.memo
        caller = caller_of(policy, head, body) if policy.json_rpc else None
        if isinstance(caller, Missing | BadKey):
            return caller
        _set_caller(request, caller)
        is_later = policy.respond_async and prefers(head.fields.get(b"prefer", ()), b"respond-async")
        waiting = _waiting(policy, head, may_wait=not is_later)
        event_id = last_event_id(policy, head)
        identity: Identity | Missing | BadKey
        if key is None or policy.fingerprint is not None or is_multipart(head.fields):
            identity = identify(policy, digests, ScopedRequest(head, scope, key, body))
            if not isinstance(identity, Identity):
                return identity
        else:
            # Most requests: all of the request enters the fingerprint.
            # A plan names no rendering: who navigates goes the long way. Nor does a head decide where a body does.
            is_planned = route.is_key_independent and request.render is None and not (pending.by_body or is_later)
            known = request.known if is_planned else None
            prefix = memo.fingerprint_prefix(digests, policy, head)
            key_prefix = digests.key_prefix(scope)
            if known is not None and not known.varies_in(head.fields):
                known.plan = plan_head(known, head, route, Begun(scope, key_prefix, prefix), waiting)
            blocks = body.blocks() if body.spooled else (body.data,)
            identity = Identity(finish_key(key_prefix, key), finish_fingerprint(prefix, blocks))
        claim = claim_request_of(policy, scope, identity, kept_of(request, route, body))
        keyed = KeyedRequest(route, claim, body, *waiting, identity.fresh, caller)
        if event_id:
            return Resume(keyed, event_id)
        if is_later:
            keyed.later = asyncio.get_running_loop().create_future()
        return keyed


def _waiting(policy: Policy, head: RequestHead, *, may_wait: bool) -> Waiting:
    """Return what a request does as a duplicate, with the fields that tell its client what became of its wishes.

    `may_wait`: it waits where its rule says so, without a word of its client.
    """
    join_fields = b"" if policy.joins_duplicates and may_wait else None
    wait_s, fields = policy.wait_max_s if policy.wait_for_duplicates and may_wait else 0.0, b""
    if (preferences := head.fields.get(b"prefer")) is not None:
        if prefers(preferences, b"join"):
            wait_s, join_fields = policy.wait_max_s, b"Preference-Applied: join\r\n"
        if (preferred_s := preferred_wait_s(preferences)) is not None:
            wait_s = min(preferred_s, policy.wait_max_s)
            fields = b"Preference-Applied: wait=%d\r\n" % wait_s
    return Waiting(wait_s, fields, join_fields)


def _is_planned(request: Request, step: Relay) -> bool:
    """Return whether each request under the known head of this one is passed through like this one."""
    is_as_usual = step.body is None and step.preflight is None and request.render is None
    return is_as_usual and not request.values and step.route.policy.heartbeats is None


def _note_expectation(request: Request, head: RequestHead) -> None:
    """Note whether the client waits for a 100 (Continue) before it sends its body (RFC 9110, section 10.1.1)."""
    if b"expect" in head.fields:
        request.response.awaits_continue = not head.http10 and not request.content.is_eof()


def _set_caller(request: Request, caller: Caller | Missing | BadKey | None) -> None:
    """Let the answers of oncegate's own to a JSON-RPC request be JSON-RPC errors."""
    if isinstance(caller, Caller):
        request.render = caller.render


def set_heartbeat(request: Request, heartbeats: Heartbeats) -> None:
    """Let the client of a request have a sign of life until its response begins, if it is known to take one."""
    if heartbeats.takes_interim(request.checked_head()):
        request.response.heartbeat_s = heartbeats.period_s


def _without_key(route: Route, head: RequestHead, reason: Missing | BadKey, body: Body | None = None) -> Relay | Refuse:
    """Forward a request that has no key, or none that can be used, or refuse it, as its rule says."""
    policy = route.policy
    if may_forward_unkeyed(policy, reason):
        if uses_no_key(policy, reason):
            return pass_through(route, head, body)
        why = Unguarded.NO_KEY if isinstance(reason, Missing) else Unguarded.BAD_KEY
        return Relay(route, head, body, unguarded=why)
    if body is not None:
        body.close()
    return key_refusal(reason, policy.rule)
