"""What the rules make of one request that an operator describes, or of values: its rule, its scope, its key.

It calls the functions of the request path itself. Nothing is sent or stored.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from oncegate.keys.digests import Digests, Scope, UnstableScope
from oncegate.keys.documents import Missing
from oncegate.keys.from_values import asked_values, is_derived, keys_of_values
from oncegate.keys.sources import Receiver, Segment
from oncegate.keys.syntax import BadKey, parse_key
from oncegate.messages.admission import Admission, Refused
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.operating.errors import usage_error
from oncegate.rules.body_conditions import read_document
from oncegate.rules.identity import (
    Identity,
    ScopedRequest,
    caller_of,
    destination,
    identify,
    key_in_head,
    scope_of,
)
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


def _encoded(text: str) -> bytes:
    # A line may have bytes that are not UTF-8.
    return text.strip().encode("utf-8", "surrogateescape")


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
        pairs.append((_encoded(field), _encoded(value)))
    names = {field.lower() for field, _ in pairs}
    # A client sends these two fields by itself.
    if b"host" not in names:
        pairs.insert(0, (b"Host", (match["host"] or "localhost").encode()))
    if asked.body and b"content-length" not in names:
        pairs.append((b"Content-Length", b"%d" % len(asked.body)))
    # A URL without a path has the path / (RFC 9110, section 4.2.3).
    return pairs, ("/" + target if target.startswith("?") else target).encode()


# Values in place of a request ...


class GivenValues(NamedTuple):
    """What an operator has of a request whose key a rule reads: the values of the key's sources, in the rule's order.

    `headers`: lines `Name: value` of the header fields that say whose it is. `tenant`: the digest of these instead.
    `path`: of the request, empty for that of the rule.
    """

    values: Sequence[bytes]
    headers: Sequence[bytes] = ()
    tenant: bytes | None = None
    path: str = ""


def rule_named(rules: Rules, name: str) -> Rule:
    """Return the rule of a name. Raises OperatorError, which lists the names."""
    found = next((rule for rule in rules.rules if rule.name == name), None)
    if found is None:
        names = ", ".join(f'"{rule.name}"' for rule in rules.rules) or "none"
        raise usage_error(f'there is no rule "{name}"; the rules are: {names}')
    return found


def keys_under_rule(rule: Rule, given: GivenValues, digests: Digests) -> list[bytes]:
    """Return the digests of all keys that the values may be under a rule. Raises OperatorError if they are none."""
    policy, sources = rule.policy, rule.policy.sources
    head = _head_of(rule, given)
    if sources is not None:
        keys = keys_of_values(sources, given.values, head, destination(policy, head))
    else:
        key = parse_key(given.values)
        keys = [] if isinstance(key, BadKey) else [key]
    if not keys:
        raise usage_error(f'under the rule "{rule.name}" give {_asked(rule)}')
    scope = scope_of(policy, digests, head)
    if given.tenant is not None:
        scope = Scope(policy.namespace, given.tenant)
    if not isinstance(scope, Scope):
        reason = scope.detail if isinstance(scope, BadKey) else "the scheme of Authorization is not known to be stable"
        raise usage_error(reason)
    return [digests.key(scope, key) for key in keys]


def _head_of(rule: Rule, given: GivenValues) -> RequestHead:
    """Return the head of a request with these values, as far as key and scope may depend on it."""
    pairs = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in given.headers)]
    fields = by_name(pairs)
    path = given.path or ("" if "*" in (rule.match.path or "*") else rule.match.path)
    alternatives = rule.policy.sources.alternatives if rule.policy.sources else ()
    reads_path = any(isinstance(source.kind, Receiver) for one in alternatives for source in one)
    if not path and (reads_path or any(isinstance(source.kind, Segment) for source in rule.policy.scope_sources)):
        raise usage_error(f'a key of the rule "{rule.name}" has the path of its request: give it with --path')
    return RequestHead("POST", (path or "/").encode(), False, b"".join(fields.get(b"host", ())[:1]), pairs, fields)


def _asked(rule: Rule) -> str:
    """Return what a person has to give for a key of a rule."""
    if rule.policy.sources is None:
        return "the key, as the client sent it"
    alternatives = [one for one in rule.policy.sources.alternatives if not is_derived(one)]
    ways = [" and ".join(f"the value of {source.text}" for source in asked_values(one)) for one in alternatives]
    return ", or ".join(ways) or "the whole request, with --request: its key is made of all of it"
