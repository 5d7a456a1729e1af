"""How a request is named under a policy: whose it is, its key, its fingerprint, and what it is without one. Pure.

The request path and `oncegate check --explain` both ask here, so that they cannot disagree.
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple, Protocol

from oncegate.keys.digests import Digests, Scope, UnstableScope
from oncegate.keys.documents import Missing
from oncegate.keys.sources import Parts, find, scope_fields
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.fields import Fields
from oncegate.messages.request_head import RequestHead
from oncegate.rules.policy import Policy

NO_KEY = Missing("no idempotency key was sent")


class Content(Protocol):
    """A whole request body. One that is `spooled` has no `data`."""

    @property
    def data(self) -> bytes: ...

    @property
    def spooled(self) -> bool: ...

    def blocks(self) -> Iterable[bytes]: ...


class Identity(NamedTuple):
    """What names a request: the digests of its key and of what it asks for, and how long a complete one counts."""

    key: bytes
    fingerprint: bytes
    window_ms: int = 0
    fresh: bool = False


class ScopeMemo:
    """What one connection's requests said last, and how that was named: mostly they differ in key and body alone.

    Without it, digesting what is said again takes 2 % of an execution (measured).
    """

    __slots__ = ("_asked", "_begun", "_digests", "_names", "_policy", "_said", "_scope")

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        self._policy: Policy | None = None
        self._said: list[list[bytes] | None] = []
        self._asked: tuple[bytes, ...] = ()

    def scope(self, policy: Policy, fields: Fields) -> Scope | UnstableScope:
        """Return whose key it is, where header fields tell."""
        if policy is not self._policy:
            self._policy, self._names, self._said = policy, (*policy.scope_headers, b"cookie"), []
        said = list(map(fields.get, self._names))
        if said != self._said:
            self._scope, self._said = self._digests.scope(policy.namespace, fields, policy.scope_headers), said
        return self._scope

    def begun(self, policy: Policy, head: RequestHead) -> blake2b:
        """Return the fingerprint of a request, where all of it enters, without its body."""
        parts = asked(policy, head)
        if parts != self._asked:
            self._asked, self._begun = parts, self._digests.begun(parts)
        return self._begun


def key_in_head(policy: Policy, head: RequestHead) -> bytes | Missing | BadKey | None:
    """Return the key that a request's head carries, or why there is none; None where only the body can tell."""
    if policy.sources is None:
        lines = head.fields.get(policy.key_header)
        return NO_KEY if lines is None else parse_key(lines)
    found = find(policy.sources, Parts(head))
    return found if found is None or isinstance(found, Missing | BadKey) else found.key


def scope_of(policy: Policy, digests: Digests, head: RequestHead) -> Scope | UnstableScope | BadKey:
    """Return whose key it is."""
    if not policy.scope_sources:
        return digests.scope(policy.namespace, head.fields, policy.scope_headers)
    fields = scope_fields(policy.scope_sources, head)
    return fields if isinstance(fields, BadKey) else digests.scope(policy.namespace, fields, policy.scope_headers)


def name(
    policy: Policy, digests: Digests, head: RequestHead, scope: Scope, key: bytes | None, body: Content
) -> Identity | Missing | BadKey:
    """Return what names a request whose body is here; `key` is what its head carries, if that is where it is."""
    whole, parts = asked(policy, head), policy.fingerprint
    if parts is None:
        fingerprint = digests.fingerprint(whole, body.blocks())
    else:
        fingerprint = digests.fingerprint(_only(parts, whole), body.blocks() if "body" in parts else ())
    if key is not None:
        return Identity(digests.key(scope, key), fingerprint)
    sources = policy.sources
    if sources is None:
        return NO_KEY
    derived = digests.fingerprint(whole, body.blocks()) if sources.window_ms and parts is not None else fingerprint
    found = find(sources, Parts(head, body.data, body.spooled, derived))
    if found is None or isinstance(found, Missing | BadKey):
        return found or NO_KEY
    return Identity(digests.key(scope, found.key), fingerprint, found.window_ms, found.fresh)


def asked(policy: Policy, head: RequestHead) -> tuple[bytes, ...]:
    """Return what a request asks for beside its body, as it enters a fingerprint."""
    fields = head.fields
    return (
        head.method.encode(),
        head.host.lower() if policy.pass_host else b"",
        head.target,
        b",".join(fields.get(b"content-type", ())),
        b",".join(fields.get(b"content-encoding", ())),
    )


def _only(parts: frozenset[str], whole: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return what enters a fingerprint that leaves parts out; the coding belongs to the body."""
    names = ("method", "host", "target", "type", "body")
    return tuple(value if part in parts else b"" for part, value in zip(names, whole, strict=True))


def uses_no_key(policy: Policy, why: Missing | BadKey) -> bool:
    """Return whether a request has no key because its client sends none, where that is a header's business."""
    return isinstance(why, Missing) and (policy.sources is None or policy.sources.headers_only)


def passes(policy: Policy, why: Missing | BadKey) -> bool:
    """Return whether a request without a usable key goes on unguarded, rather than being refused."""
    return policy.pass_bad_keys or (uses_no_key(policy, why) and not policy.key_required)
