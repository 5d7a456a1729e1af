"""A request whose key is known: what the rest of the request path needs, and what its head alone decides."""

import asyncio
import random
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

from oncegate.adaptation.json_rpc import Caller
from oncegate.downstream.body import Body
from oncegate.downstream.request import Request
from oncegate.gateway.answers import Refuse, with_key
from oncegate.gateway.routes import GAP, Route
from oncegate.keys.digests import Digests, Scope, finish_key
from oncegate.keys.notes import read_note
from oncegate.keys.syntax import parse_key
from oncegate.known_heads.requests import KnownHead
from oncegate.messages.fields import Fields
from oncegate.messages.request_head import ForwardedInfo, RequestHead, uncoded
from oncegate.messages.request_ids import TRACEPARENT
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.observe.tracing import Trace, Tracing, new_trace
from oncegate.probing.kept_values import read_values
from oncegate.rules.identity import Identity, fingerprint_parts, with_target
from oncegate.rules.policy import Policy
from oncegate.store.kept import pack_body_digest, pack_first, pack_note, pack_request_id, pack_trace, pack_values
from oncegate.store.record import Claim, ClaimRequest
from oncegate.store.record_name import store_key
from oncegate.streams.links import ClaimName
from oncegate.values import Value

# Bound once for the request path.
_random = random.random


class KeyedRequest(Value):
    """A request with its body, its key and all that the store needs to claim it.

    `wait_s` is how long it may wait for its original; `fields` are further ones of its response as a duplicate, and
    `join_fields` further ones where it gets the response while that comes; None: it does not join.
    `fresh`: it is no duplicate, however equal, so that a record under its key belongs to another request. `caller`:
    whoever sent a JSON-RPC request. `trace`: of a request that is traced. `later`: of one whose client does not wait,
    done once its key is claimed.
    """

    route: Route
    claim_request: ClaimRequest
    body: Body
    wait_s: float
    fields: bytes = b""
    join_fields: bytes | None = None
    fresh: bool = False
    caller: Caller | None = None
    trace: Trace | None = None
    # The token of an original that it could not join.
    not_joined: bytes = b""
    later: "asyncio.Future[Claim] | None" = None

    @property
    def key_id(self) -> bytes:
        """The id of its key, 32 characters: what people and the API call it by."""
        # The store has the name at hand.
        return store_key(self.claim_request.key)[6:-1]

    @property
    def key_field(self) -> bytes:
        """The field that tells the client the id, its line ended."""
        # As `key_field(self.key_id)`, in one call: replays come here.
        return b"Oncegate-Key-Id: %b\r\n" % store_key(self.claim_request.key)[6:-1]

    def own_fields(self, request: Request, token: bytes, created_ms: int) -> bytes:
        """Return the fields that tell a client the id, and where the response of a claim is read again."""
        # As `key_field`, in one call.
        line = b"Oncegate-Key-Id: %b\r\n" % store_key(self.claim_request.key)[6:-1]
        return line if self.route.links is None else line + self.link_fields(request, token, created_ms)

    def link_fields(self, request: Request, token: bytes, created_ms: int) -> bytes:
        """Return the fields by which an answer names the addresses of a claim's response, each line ended."""
        links, claim = self.route.links, self.claim_request
        if links is None:
            return b""
        return links.fields(ClaimName(claim.key, token, claim.scope.tenant, created_ms), request.requester.outer)

    def plain_key(self, request: Request) -> str | None:
        """Return the key as the client wrote it, None unless it came alone in a header.

        A key in a body, a form or a path may be private: whoever reads an answer in a log must not find it there.
        """
        head = request.checked_head()
        for name in self.route.policy.key_headers:
            if (lines := head.fields.get(name)) is not None:
                key = parse_key(lines)
                return key.decode("ascii") if isinstance(key, bytes) else None
        return None

    def named(self, request: Request, answer: Refuse, fields: bytes = b"") -> Refuse:
        """Return an answer of oncegate's own with the names of its key, and with further header fields."""
        return with_key(answer, self.key_id, self.plain_key(request), fields)

    def report(self, request: Request, outcome: Outcome, status: int, reason: str = "") -> RequestReport:
        """Return the report of a request that was not executed; `status` is what its client got."""
        claim, route = self.claim_request, self.route
        return RequestReport(
            outcome,
            status,
            request.message.method,
            claim.key,
            without_credential=claim.scope.without_credential,
            reason=reason,
            rule=route.policy.rule,
            upstream=route.upstream,
        )


def kept_of(request: Request, route: Route, body: Body) -> bytes:
    """Return what is kept with the record of a request, packed."""
    kept = pack_request_id(request.id) + route.kept
    if route.digest_body is not None:
        kept += pack_body_digest(route.digest_body(body.blocks()))
    return kept if not route.policy.keeps_more else _with_more(kept, request, route.policy, body)


def _with_more(kept: bytes, request: Request, policy: Policy, body: Body) -> bytes:
    """Return what is kept with the note of a request, and with what counts while its key is open.

    That is the values by which the API can be asked about it, and whether it may be sent once more.
    """
    if policy.note is not None:
        kept += pack_note(read_note(policy.note, request.field, body))
    if (plan := policy.reconcile) is not None:
        target = partial(_target, request)
        # First: a complete record is to lose them.
        kept = pack_values(read_values(plan, policy.key_headers, request.field, target, body)) + kept
    return pack_first(0) + kept if policy.resend_ms else kept


def _target(request: Request) -> bytes:
    return request.checked_head().target


class Waiting(NamedTuple):
    """What a duplicate does while its original is running, as in KeyedRequest."""

    wait_s: float
    fields: bytes
    join_fields: bytes | None


def claim_request_of(policy: Policy, scope: Scope, identity: Identity, kept: bytes) -> ClaimRequest:
    """Return what claims the key of a request."""
    return ClaimRequest(
        key=identity.key,
        scope=scope,
        fingerprint=identity.fingerprint,
        mode=policy.mode,
        lease_ms=policy.lease_ms,
        retention_ms=policy.retention_ms,
        # A derived key stands for a window: a form that is refused for months would help nobody.
        unknown_retention_ms=policy.retention_ms if identity.window_ms else policy.unknown_retention_ms,
        window_ms=identity.window_ms,
        tombstone_ms=0 if identity.window_ms else policy.tombstone_ms,
        kept=kept,
        resend_ms=policy.resend_ms,
    )


class Begun(NamedTuple):
    """Whose a request is, and the running digests of its key and its fingerprint: to be copied, and ended."""

    scope: Scope
    key_prefix: blake2b
    fingerprint_prefix: blake2b


@dataclass(slots=True)
class HeadPlan:
    """What a known head alone decides about its requests, whatever is in its gaps, and whatever their body.

    `begun`: with it a repeated head costs two digests. `head` is the head with GAP in its gaps, of which `key_at` is
    the key's. `tenant_at`: the gaps that say whose a request is, with the names
    of their fields; `tenant_fields`: what else says so. `parts`: what enters the fingerprint beside the body.
    `templates`: the open head for the upstream, by whether the client is trusted and its scheme.
    """

    route: Route
    begun: Begun
    waiting: Waiting
    head: RequestHead
    key_at: int
    # Of each gap, whether its value goes on in its place. Length and request id are written anew.
    gaps_go_on: tuple[bool, ...]
    tenant_at: tuple[tuple[int, bytes], ...]
    tenant_fields: Fields
    parts: tuple[bytes, ...]
    templates: dict[tuple[bool, bytes], bytes] = field(default_factory=dict)

    def begin(self, request: Request, digests: Digests) -> Begun | None:
        """Return whose a request is and what it asks for, by its own values; None where nothing can be said."""
        known, values, policy = request.known, request.values, self.route.policy
        scope, key_prefix, prefix = self.begun
        if self.tenant_at:
            fields = {**self.tenant_fields, **{name: [values[at]] for at, name in self.tenant_at}}
            found = request.connection.memo.scope(digests, policy, fields)
            if not isinstance(found, Scope):
                return None
            scope, key_prefix = found, digests.key_prefix(found)
        if known is not None and known.has_ids:
            prefix = digests.fingerprint_prefix(with_target(self.parts, known.target(values)))
        return Begun(scope, key_prefix, prefix)

    def keyed_request(self, request: Request, begun: Begun, body: Body) -> KeyedRequest:
        """Return the request with its key. The body of a request under a known head is in memory."""
        fingerprint = begun.fingerprint_prefix.copy()
        fingerprint.update(body.data)
        policy, key = self.route.policy, finish_key(begun.key_prefix, request.values[self.key_at].strip(b'"'))
        # Positions, not names: arguments by name cost 4,000 instructions more (Python 3.11, measured).
        times = policy.lease_ms, policy.retention_ms, policy.unknown_retention_ms
        rest = 0, policy.tombstone_ms, kept_of(request, self.route, body)
        claim = ClaimRequest(key, begun.scope, fingerprint.digest(), policy.mode, *times, *rest, policy.resend_ms)
        return KeyedRequest(self.route, claim, body, *self.waiting)

    def open_head(self, values: tuple[bytes, ...], client: ForwardedInfo, body_bytes: int, id_line: bytes) -> bytes:
        """Return the open head for the upstream, with these values in its gaps. `id_line`: of the request."""
        template = self.templates.get((client.trusted, client.scheme)) or self._template(client)
        # What this proxy says of the client comes behind what the client says, and Content-Length last.
        return template % (*values, client.client, body_bytes, id_line)

    def _template(self, client: ForwardedInfo) -> bytes:
        """Return the open head with %b in its gaps. So formatted it costs less than joined (measured)."""
        forwarded = self.route.forwarded_pieces(self.head, client, -1, {})
        pieces = iter([piece.replace(b"%", b"%%") for piece in forwarded])
        text = next(pieces)
        for goes_on in self.gaps_go_on:
            text += b"%b" + next(pieces) if goes_on else b"%.0b"
        text += b"%b" + next(pieces) + b"Content-Length: %d\r\n%b"
        self.templates[client.trusted, client.scheme] = text
        return text


def plan_head(known: KnownHead, head: RequestHead, route: Route, begun: Begun, waiting: Waiting) -> HeadPlan | None:
    """Return the plan for all requests under a known head, by one of them, `head`; None where there is none."""
    policy = route.policy
    whose = policy.tenant.read
    tenant_at = known.gaps_among(whose)
    # Such a source may be in the path.
    if policy.scope_sources and (known.has_ids or tenant_at):
        return None
    return HeadPlan(
        route=route,
        begun=begun,
        waiting=waiting,
        head=known.filled_with(GAP),
        key_at=known.key_at,
        gaps_go_on=known.gaps_other_than((b"content-length", route.request_id_name)),
        tenant_at=tenant_at,
        tenant_fields={name: head.fields[name] for name in head.fields if name in whose},
        parts=fingerprint_parts(policy, head),
    )


def open_head(request: Request, route: Route, body_bytes: int) -> bytes:
    """Return the open head for the upstream: without its empty line, because the fields of the claim follow.

    Of a known head, all of it is ready but what differs.
    """
    client, known, head = request.connection.forwarded, request.known, request.head
    if route.policy.asks_identity:
        # Under JSON-RPC a response that is coded cannot be read, and its key would be unknown.
        head = uncoded(request.checked_head())
    elif head is None and known is not None and isinstance(plan := known.plan, HeadPlan):
        return plan.open_head(request.values, client, body_bytes, request.id_line)
    return route.forwarded_head(head or request.checked_head(), client, body_bytes) + route.id_line(request)


def begin_trace(tracing: Tracing, request: Request, keyed: KeyedRequest, began_s: float) -> Trace | None:
    """Return the trace of a request whose head came at `began_s`; None where it is not traced.

    The record that it claims keeps its span, so that its duplicates can name it.
    """
    known, drawn = request.known, _random()
    if known is None or request.head is not None:
        value = request.field(TRACEPARENT)
    else:
        # The same without another call.
        value = known.value(TRACEPARENT, request.values)
    # Most requests: `sample` would say the same.
    if not value and drawn >= tracing.ratio:
        return None
    contexts = tracing.sample(value, drawn)
    if contexts is None:
        return None
    claim = keyed.claim_request
    keyed.claim_request = replace(claim, kept=claim.kept + pack_trace(contexts[0].packed()))
    return new_trace(contexts, began_s, keyed.route.origin)
