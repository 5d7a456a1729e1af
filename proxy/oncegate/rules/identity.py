"""How a policy identifies a request: its scope, its key, its fingerprint, and what happens without a key. Pure.

The request path and `oncegate check --explain` use the same functions, so that they cannot disagree.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from oncegate.adaptation.json_rpc import Caller, read_caller
from oncegate.keys.digests import Digests, Scope, UnstableScope, length_prefixed
from oncegate.keys.documents import Missing, is_encoded
from oncegate.keys.extraction import ExtractedKey, SourceInput, extract_key, scope_fields
from oncegate.keys.fingerprint_parts import named_parts
from oncegate.keys.forms import form_of, is_multipart
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.request_head import LAST_EVENT_ID, RequestHead
from oncegate.messages.target import normalized_host
from oncegate.rules.policy import Policy

NO_KEY = Missing("no idempotency key was sent")


class Content(Protocol):
    """A complete request body. A `spooled` one lies on disk; its `data` is empty."""

    @property
    def data(self) -> bytes: ...

    @property
    def spooled(self) -> bool: ...

    def blocks(self) -> Iterable[bytes]: ...


class ScopedRequest(NamedTuple):
    """A request whose scope is known and whose body is complete. `key`: the key in its head, None for none."""

    head: RequestHead
    scope: Scope
    key: bytes | None
    body: Content


class Identity(NamedTuple):
    """What identifies a request: the digest of its key (24 bytes) and its fingerprint (16 bytes).

    A complete record older than `window_ms` (0: none is; ANY_AGE: each one is) does not count for it; only derived keys
    have a window.
    `fresh`: the client says that this is a new request, though it equals an earlier one.
    """

    key: bytes
    fingerprint: bytes
    window_ms: int = 0
    fresh: bool = False


def key_in_head(policy: Policy, head: RequestHead) -> bytes | Missing | BadKey | None:
    """Return the key that a request's head carries, or why there is none; None where the body decides."""
    if policy.sources is None:
        lines = head.fields.get(policy.key_header)
        return NO_KEY if lines is None else parse_key(lines)
    key = extract_key(policy.sources, SourceInput(head, destination=destination(policy, head)))
    return key.key if isinstance(key, ExtractedKey) else key


def scope_of(policy: Policy, digests: Digests, head: RequestHead) -> Scope | UnstableScope | BadKey:
    """Return the scope of a request's key; BadKey where one of the policy's `scope_sources` cannot be read."""
    if not policy.scope_sources:
        return digests.scope(policy.namespace, head.fields, policy.tenant)
    fields = scope_fields(policy.scope_sources, head)
    return fields if isinstance(fields, BadKey) else digests.scope(policy.namespace, fields, policy.tenant)


def shows_credential(policy: Policy, head: RequestHead) -> bool:
    """Return whether a request shows a credential, so that nobody else can name its key by guessing."""
    if not policy.scope_sources:
        return policy.tenant.shows_credential(head.fields)
    fields = scope_fields(policy.scope_sources, head)
    return not isinstance(fields, BadKey) and policy.tenant.shows_credential(fields)


def identify(policy: Policy, digests: Digests, request: ScopedRequest) -> Identity | Missing | BadKey:
    """Return the identity of a request, or why it has no usable key."""
    head, scope, key, body = request
    parts, blocks = _whole(policy, head, body) if policy.fingerprint is None else _chosen(policy, head, body)
    fingerprint = digests.fingerprint(parts, blocks)
    if key is not None:
        return Identity(digests.key(scope, key), fingerprint)
    sources = policy.sources
    if sources is None:
        return NO_KEY
    # A derived key is the digest of the whole request, even where the fingerprint leaves parts out. With JSON-RPC it is
    # the fingerprint: the id is new in each try.
    derives = bool(sources.window_ms) and policy.fingerprint is not None and not policy.json_rpc
    derived = digests.fingerprint(*_whole(policy, head, body)) if derives else fingerprint
    given = SourceInput(head, body.data, body.spooled, derived, destination(policy, head))
    extracted = extract_key(sources, given)
    if not isinstance(extracted, ExtractedKey):
        return extracted or NO_KEY
    return Identity(digests.key(scope, extracted.key), fingerprint, extracted.window_ms, extracted.fresh)


def caller_of(policy: Policy, head: RequestHead, body: Content) -> Caller | Missing | BadKey | None:
    """Return who sent a JSON-RPC request, or why nobody can be answered; None where the policy is about other ones."""
    if not policy.json_rpc:
        return None
    if body.spooled:
        return BadKey("the body is too long to read a JSON-RPC request from")
    if is_encoded(head.fields):
        return BadKey("the body is encoded, so no JSON-RPC request can be read from it")
    return read_caller(body.data)


def last_event_id(policy: Policy, head: RequestHead) -> bytes:
    """Return behind which event a request goes on, nothing for any other; none has an empty id."""
    if not policy.resume or (lines := head.fields.get(LAST_EVENT_ID)) is None:
        return b""
    # Several lines name no event. Such a request must not pass for one that names none.
    return b", ".join(lines).strip(b" \t")


def destination(policy: Policy, head: RequestHead) -> bytes:
    """Return where a request goes, without its path: the upstream, and the Host that is set or passed on."""
    return length_prefixed((policy.destination, normalized_host(head.host))) if policy.pass_host else policy.destination


def fingerprint_parts(policy: Policy, head: RequestHead) -> tuple[bytes, ...]:
    """Return what enters a fingerprint beside the body: method, host, target, type, coding, and any destination."""
    fields = head.fields
    parts = (
        head.method.encode(),
        # Without pass_host the upstream never sees the client's Host, so it is no part of the request.
        normalized_host(head.host) if policy.pass_host else b"",
        head.target,
        # Lines of one field have the same meaning as their comma list (RFC 9110, section 5.2).
        b",".join(fields.get(b"content-type", ())),
        b",".join(fields.get(b"content-encoding", ())),
    )
    # A response of one upstream is no answer to a request for another, whatever made its rule match. Without a
    # destination, which is the upstream of the settings, fingerprints are those of version 0.1.
    return (*parts, policy.destination) if policy.destination else parts


def with_target(parts: tuple[bytes, ...], target: bytes) -> tuple[bytes, ...]:
    """Return the parts of another request, which differs in its target alone."""
    return (*parts[:2], target, *parts[3:])


def _whole(policy: Policy, head: RequestHead, body: Content) -> tuple[tuple[bytes, ...], Iterable[bytes]]:
    """Return what enters the fingerprint of a whole request: parts of its head, and its body in blocks."""
    parts = fingerprint_parts(policy, head)
    form = form_of(head.fields, body.blocks()) if is_multipart(head.fields) else None
    # No field has a zero byte, so that no other request can be made to equal a form.
    return (parts, body.blocks()) if form is None else ((*parts[:3], form.kind, b"\0form", *parts[5:]), (form.digest,))


def _chosen(policy: Policy, head: RequestHead, body: Content) -> tuple[tuple[bytes, ...], Iterable[bytes]]:
    """Return what enters the fingerprint of a request under a rule that says which parts do."""
    chosen = policy.fingerprint or frozenset()
    with_body = "body" in chosen
    # Where a request goes is no choice.
    more: tuple[bytes, ...] = (policy.destination,) if policy.destination else ()
    if policy.fingerprint_sources:
        is_readable = not (body.spooled or is_encoded(head.fields))
        named = named_parts(policy.fingerprint_sources, head.fields, body.data if is_readable else None)
        with_body, more = with_body or named.with_body, (policy.destination, named.joined)
    # A long form is read only where it counts.
    needs_form = with_body or "type" in chosen
    whole, blocks = _whole(policy, head, body) if needs_form else (fingerprint_parts(policy, head), ())
    method, host, target, kind, coding = whole[:5]
    parts = (
        method if "method" in chosen else b"",
        host,
        target if "target" in chosen else b"",
        kind if "type" in chosen else b"",
        # The coding has no name of its own: it enters together with the body that it describes.
        coding if with_body else b"",
        *more,
    )
    return parts, blocks if with_body else ()


def uses_no_key(policy: Policy, why: Missing | BadKey) -> bool:
    """Return whether the client simply does not use keys: keys are read from headers alone, and none was sent."""
    # A missing header is a client without keys, a missing member of a body a bad request (docs/decisions/008).
    return isinstance(why, Missing) and (policy.sources is None or policy.sources.headers_only)


def may_forward_unkeyed(policy: Policy, why: Missing | BadKey) -> bool:
    """Return whether a request without a usable key is forwarded without protection, rather than refused."""
    return policy.pass_bad_keys or (uses_no_key(policy, why) and not policy.key_required)
