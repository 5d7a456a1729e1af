"""A request with its key, named; and what of its name its head alone decides, for all that say the same again."""

from hashlib import blake2b
from typing import NamedTuple

from oncegate.downstream.body import Body
from oncegate.downstream.request import Request
from oncegate.gateway.routes import Route
from oncegate.keys.digests import Digests, Scope, UnstableScope, finish_fingerprint, finish_key
from oncegate.keys.documents import Missing
from oncegate.keys.syntax import BadKey
from oncegate.messages.head_cache import KnownHead
from oncegate.messages.request_head import RequestHead, preferred_wait_s
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.rules.identity import Identity, ScopedRequest, ScopeMemo, identify, scope_of
from oncegate.rules.policy import Policy


class KeyedRequest(NamedTuple):
    """A request with its key, named: what the rest of the path needs to know of it."""

    route: Route
    method: str
    key: bytes  # digest
    scope: Scope
    fingerprint: bytes
    wait_s: float  # how long it may wait for its original
    extra: bytes  # fields that its answer gets as a duplicate
    window_ms: int = 0  # of a derived key: what is complete for longer does not count
    fresh: bool = False  # surely no duplicate, however equal: what it meets under its key is another request

    def report(
        self,
        outcome: Outcome,
        status: int,
        upstream_s: float = 0.0,
        detail: str = "",
        saved_s: float = 0.0,
        sent: int = 0,
    ) -> RequestReport:
        """Return what became of this request; `saved_s` and `sent` (bytes) are a replay's."""
        common, rule = self.scope.common, self.route.policy.rule
        return RequestReport(
            outcome, status, self.method, self.key, upstream_s, saved_s, sent, common, detail, rule, None
        )


class HeadPlan(NamedTuple):
    """A guarded request as far as its head decides, whatever its key: made once for a head that comes again."""

    route: Route
    scope: Scope
    scoped: blake2b  # the digest of its key, without the key
    begun: blake2b  # its fingerprint, without the body
    wait_s: float
    extra: bytes


class Identifier:
    """Names guarded requests, with what their connections said before at hand.

    `chosen_by`: the header fields that are looked at to choose a route.
    """

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        self.chosen_by: frozenset[bytes] = frozenset()

    def _familiar(self, request: Request) -> ScopeMemo:
        connection = request.protocol
        if connection.familiar is None:
            connection.familiar = ScopeMemo(self._digests)
        return connection.familiar

    def scope(self, request: Request, policy: Policy, head: RequestHead) -> Scope | UnstableScope | BadKey:
        """Return whose key it is."""
        if policy.scope_sources:
            return scope_of(policy, self._digests, head)
        return self._familiar(request).scope(policy, head.fields)

    def name(
        self, request: Request, route: Route, head: RequestHead, scope: Scope, key: bytes | None, body: Body
    ) -> KeyedRequest | Missing | BadKey:
        """Return the request with its names, and how long it may wait if it is a duplicate."""
        policy, fields = route.policy, head.fields
        wait_s, extra = policy.wait_max_s if policy.wait_for_duplicates else 0.0, b""
        if b"prefer" in fields and (preferred := preferred_wait_s(fields[b"prefer"])) is not None:
            wait_s = min(preferred, policy.wait_max_s)
            extra = b"Preference-Applied: wait=%d\r\n" % wait_s
        if key is not None and policy.fingerprint is None:  # as most are
            begun = self._familiar(request).fingerprint_prefix(policy, head)
            if request.seen is not None and self._is_plain(policy, request.seen):
                request.seen.prepared = HeadPlan(route, scope, self._digests.key_prefix(scope), begun, wait_s, extra)
            fingerprint = finish_fingerprint(begun, body.blocks())
            return KeyedRequest(route, head.method, self._digests.key(scope, key), scope, fingerprint, wait_s, extra)
        named = identify(policy, self._digests, ScopedRequest(head, scope, key, body))
        if not isinstance(named, Identity):
            return named
        return KeyedRequest(
            route, head.method, named.key, scope, named.fingerprint, wait_s, extra, named.window_ms, named.fresh
        )

    def again(self, prepared: HeadPlan, method: str, value: bytes, body: Body) -> KeyedRequest:
        """Return the request that says what came before, all but its key and body; `value`: of its key's field."""
        route, scope, scoped, begun, wait_s, extra = prepared
        fingerprint = begun.copy()
        fingerprint.update(body.data)
        key = finish_key(scoped, value.strip(b'"'))
        return KeyedRequest(
            route=route,
            method=method,
            key=key,
            scope=scope,
            fingerprint=fingerprint.digest(),
            wait_s=wait_s,
            extra=extra,
        )

    def _is_plain(self, policy: Policy, seen: KnownHead) -> bool:
        """Return whether all that the head decides is the same for each value of the field that may differ."""
        plain = policy.sources is None and policy.forward_key is None
        return plain and policy.key_header == seen.name and seen.name not in self.chosen_by
