"""What the rules make of one request that an operator describes: its rule, its scope, the identity of its key.

It calls the functions of the request path itself. Nothing is sent or stored.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from oncegate.keys.digests import Digests, Scope, UnstableScope
from oncegate.keys.documents import Missing
from oncegate.keys.syntax import BadKey
from oncegate.messages.admission import Admission, Refused
from oncegate.messages.request_head import RequestHead
from oncegate.rules.body_conditions import read_document
from oncegate.rules.identity import Identity, ScopedRequest, caller_of, identify, key_in_head, scope_of
from oncegate.rules.model import Rule, Rules
from oncegate.settings.settings import Settings

_URL = re.compile(r"(?:[a-z]+://(?P<host>[^/?#]+))?(?P<target>[/?][^#]*)?")


@dataclass(frozen=True, slots=True)
class WholeBody:
    """A request body in memory, in the form that `identify` expects."""

    data: bytes
    spooled: bool = False

    def blocks(self) -> Iterable[bytes]:
        """Return the body's blocks: one."""
        return (self.data,)


class AskedRequest(NamedTuple):
    """A request as an operator describes it. `headers`: lines `Name: value`."""

    method: str
    url: str
    headers: Sequence[str] = ()
    body: bytes = b""


class Identified(NamedTuple):
    """A request that has a key. `identity.key` is the digest under which its record is stored."""

    rule: Rule
    scope: Scope
    identity: Identity


class Keyless(NamedTuple):
    """A request without a key, or that would be refused. `rule`: None where none was chosen."""

    rule: Rule | None
    reason: str


def admit(settings: Settings, rules: Rules, asked: AskedRequest) -> RequestHead | Refused:
    """Return the head of a request as the listener takes it. Raises ValueError if it is no HTTP request."""
    pairs, target = _pairs(asked)
    hosts = [host.encode() for host in settings.hosts]
    admission = Admission(hosts, rules.default.policy.key_header, rules.acted_on)
    # HTTP/1.1, as nearly all clients speak it.
    return admission.admit(asked.method.upper(), target, (1, 1), pairs)


def identify_request(settings: Settings, rules: Rules, asked: AskedRequest) -> Identified | Keyless:
    """Return what a request's key is, or why it has none. Raises ValueError if it is no HTTP request."""
    head = admit(settings, rules, asked)
    if isinstance(head, Refused):
        return Keyless(None, head.detail)
    rule = rules.choose(head, read_document(head.fields, asked.body)) or rules.default
    policy, body = rule.policy, WholeBody(asked.body)
    if head.method not in policy.methods:
        return Keyless(rule, f"the rule does not guard {head.method}")
    caller = caller_of(policy, head, body)
    key = caller if isinstance(caller, Missing | BadKey) else key_in_head(policy, head)
    if isinstance(key, Missing | BadKey):
        return Keyless(rule, key.detail)
    digests = Digests(settings.secret.get_secret_value().encode())
    scope = scope_of(policy, digests, head)
    if isinstance(scope, UnstableScope):
        return Keyless(rule, "the scheme of Authorization is not known to stay the same")
    if isinstance(scope, BadKey):
        return Keyless(rule, scope.detail)
    identity = identify(policy, digests, ScopedRequest(head, scope, key, body))
    return Identified(rule, scope, identity) if isinstance(identity, Identity) else Keyless(rule, identity.detail)


def _pairs(asked: AskedRequest) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the header fields and the target of a request."""
    match = _URL.fullmatch(asked.url)
    if match is None or not asked.url:
        raise ValueError(f"{asked.url!r} is no URL: write http://api.example.com/v1/orders or /v1/orders")
    target = match["target"] or "/"
    pairs = []
    for line in asked.headers:
        field, colon, value = line.partition(":")
        if not colon or not field.strip():
            raise ValueError(f"{line!r} is no header: write 'Idempotency-Key: abc'")
        pairs.append((field.strip().encode(), value.strip().encode()))
    names = {field.lower() for field, _ in pairs}
    # A client sends these two fields by itself.
    if b"host" not in names:
        pairs.insert(0, (b"Host", (match["host"] or "localhost").encode()))
    if asked.body and b"content-length" not in names:
        pairs.append((b"Content-Length", b"%d" % len(asked.body)))
    # A URL without a path has the path / (RFC 9110, section 4.2.3).
    return pairs, ("/" + target if target.startswith("?") else target).encode()
