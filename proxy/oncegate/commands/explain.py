"""What `oncegate check` prints of the rules, and what they would do with one request. Nothing is sent or stored."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oncegate.decision import Disposition
from oncegate.keys.digests import Digests, Scope, UnstableScope, key_id, store_key
from oncegate.keys.documents import Missing
from oncegate.keys.syntax import BadKey
from oncegate.messages.admission import Admission, Refused
from oncegate.messages.request_head import RequestHead, preferred_wait_s, renamed
from oncegate.rules.identity import Identity, ScopedRequest, identify, key_in_head, may_forward_unkeyed, scope_of
from oncegate.rules.model import Rule, Rules
from oncegate.rules.policy import Policy
from oncegate.settings.settings import Settings

_URL = re.compile(r"(?:[a-z]+://(?P<host>[^/?#]+))?(?P<target>[/?][^#]*)?")


@dataclass(frozen=True, slots=True)
class Text:
    """A request body that is here whole."""

    data: bytes
    spooled: bool = False

    def blocks(self) -> Iterable[bytes]:
        return (self.data,)


def table(rules: Rules) -> str:
    """Return the rules in their order, one a line, with what matters most about each."""
    titles = ("rule", "matches", "upstream", "guard", "key", "scope", "retention_s", "duplicate", "unknown")
    rows = [titles, *map(_row, rules)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _row(rule: Rule) -> tuple[str, ...]:
    policy = rule.policy
    upstream = f"{rule.upstream.name} = {rule.upstream.origin}" if rule.upstream.name else str(rule.upstream.origin)
    named = f"{rule.name} ({policy.preset})" if policy.preset else rule.name
    return (
        named or "(none matches)",
        _matches(rule),
        upstream,
        _guard(policy),
        _key(policy),
        _scope(policy),
        f"{policy.retention_ms / 1000:g}",
        f"wait {policy.wait_max_s:g} s" if policy.wait_for_duplicates else "reject",
        policy.mode.decode(),
    )


def _matches(rule: Rule) -> str:
    match = rule.match
    words = [",".join(sorted(match.methods)) if match.methods else "*", (match.host or "") + (match.path or "/**")]
    words += [f"{header.decode()}: {glob}" for header, glob in match.headers.items()]
    return " ".join(words)


def _guard(policy: Policy) -> str:
    if not policy.methods:
        return "off"
    return f"{'required' if policy.key_required else 'optional'} {','.join(sorted(policy.methods))}"


def _key(policy: Policy) -> str:
    if policy.sources is None:
        return f"header:{policy.key_header.decode()}"
    return " else ".join(" + ".join(source.text for source in one) for one in policy.sources.alternatives)


def _scope(policy: Policy) -> str:
    return f"{policy.namespace.decode()} / {', '.join(name.decode() for name in policy.scope_headers) or 'all'}"


class Explanation:
    """What becomes of one request: `lines` for people."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        self._settings, self._rules = settings, rules
        self._digests = Digests(settings.secret.get_secret_value().encode())
        self.lines: list[str] = []

    def say(self, what: str, text: str) -> None:
        self.lines.append(f"{what + ':':<14}{text}")

    def explain(self, method: str, url: str, headers: Sequence[str], body: bytes) -> str:
        """Return what the rules make of a request. ValueError where it cannot be written as one."""
        pairs, target = _request(url, headers, body)
        hosts = [host.encode() for host in self._settings.hosts]
        gate = Admission(hosts, self._rules.default.policy.key_header, self._rules.acted_on)
        head = gate.admit(method.upper(), target, (1, 1), pairs)
        if isinstance(head, Refused):
            self.say("result", f"{head.status}: {head.detail}")
        else:
            self._explain(head, Text(body))
        return "\n".join(self.lines)

    def _explain(self, head: RequestHead, body: Text) -> None:
        rule = self._rules.choose(head)
        policy = rule.policy
        where = f"{rule.name} ({self._settings.rules_file}:{rule.line})"
        self.say("rule", where if rule.name else "none matches; the settings hold")
        self._say_upstream(rule, head)
        if head.method not in policy.methods:
            self.say("result", f"passes: {head.method} is not guarded here")
            return
        self.say("key", _key(policy))
        key = key_in_head(policy, head)
        if isinstance(key, Missing | BadKey):
            self._say_keyless(policy, key)
            return
        scope = scope_of(policy, self._digests, head)
        if isinstance(scope, UnstableScope | BadKey):
            reason = scope.detail if isinstance(scope, BadKey) else "the credential changes with every request"
            self.say(
                "result", f"400 scope-unstable: {reason}" if isinstance(scope, UnstableScope) else f"400: {reason}"
            )
            return
        if len(body.data) > policy.max_request_bytes:
            self.say("result", "413 body-too-large")
            return
        named = identify(policy, self._digests, ScopedRequest(head, scope, key, body))
        if isinstance(named, Identity):
            self._say_guarded(policy, head, scope, named)
        else:
            self._say_keyless(policy, named)

    def _say_upstream(self, rule: Rule, head: RequestHead) -> None:
        policy, origin = rule.policy, rule.upstream.origin
        host = head.host.decode() if policy.pass_host and head.host else rule.set_host or origin.authority
        line = f"{origin.scheme}://{origin.authority}{origin.path_prefix}{head.target.decode('latin-1')}, Host: {host}"
        self.say("upstream", line)
        if policy.forward_key is not None:
            onward = renamed(head.pairs, policy.key_header, policy.forward_key)
            sent = [field.decode("latin-1") for field, _ in onward if field not in dict(head.pairs)]
            self.say("key sent as", sent[0] if sent else "dropped")

    def _say_keyless(self, policy: Policy, why: Missing | BadKey) -> None:
        slug = "key-missing" if isinstance(why, Missing) else "key-invalid"
        self.say(
            "result",
            f"passes unguarded: {why.detail}" if may_forward_unkeyed(policy, why) else f"400 {slug}: {why.detail}",
        )

    def _say_guarded(self, policy: Policy, head: RequestHead, scope: Scope, named: Identity) -> None:
        tenant = "all" if not policy.scope_headers else "common" if scope.common else scope.tenant.hex()
        self.say("scope", f"namespace {scope.namespace.decode()}, tenant {tenant}")
        self.say("digest", f"{key_id(named.key)} in logs, {store_key(named.key).decode()} in the store")
        parts = policy.fingerprint
        told = "all parts" if parts is None else ", ".join(sorted(parts)) or "none: the key alone decides"
        self.say("fingerprint", f"{named.fingerprint.hex()} of {told}")
        self.say("result", "executed if the key is free")
        for case, text in _cases(policy, head, named):
            self.say(f"  {case}", text)


def _cases(policy: Policy, head: RequestHead, named: Identity) -> Iterable[tuple[str, str]]:
    """Yield what a guarded request gets by what stands under its key."""
    if named.fresh:
        yield "running", "a request of its own, passed on unguarded"
        yield "complete", "executed, and takes the key over"
    else:
        wait_s = policy.wait_max_s if policy.wait_for_duplicates else 0.0
        preferred = preferred_wait_s(head.fields.get(b"prefer", ()))
        wait_s = wait_s if preferred is None else min(preferred, policy.wait_max_s)
        answer = f"{policy.in_flight_status} in-flight"
        yield "running", f"waits up to {wait_s:g} s, then {answer}" if wait_s else answer
        window = f" for {named.window_ms / 1000:g} s from its claim, then executed" if named.window_ms else ""
        yield "complete", "replayed" + (window or f" for {policy.retention_ms / 1000:g} s")
    yield "unknown", "executed again" if policy.mode == b"retry" else "409 outcome-unknown"
    if policy.fingerprint != frozenset():
        yield "otherwise", "422 key-reused, where the fingerprint is another"
    yield "released by", _statuses(policy, Disposition.RELEASE)
    yield "unknown by", _statuses(policy, Disposition.AMBIGUOUS)
    if policy.upstream_idempotent:
        yield "lost", "sent again with the same key, a few times"


def _statuses(policy: Policy, disposition: Disposition) -> str:
    """Return the statuses that mean something for a key, written as in a rule."""
    return ", ".join(policy.statuses.entries(disposition)) or "no status"


def _request(url: str, headers: Sequence[str], body: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the fields and the target of the request that is asked about."""
    match = _URL.fullmatch(url)
    if match is None or not url:
        raise ValueError(f"{url!r} is no URL, such as http://api.example.com/v1/orders or /v1/orders")
    target = match["target"] or "/"
    pairs = []
    for line in headers:
        field, colon, value = line.partition(":")
        if not colon or not field.strip():
            raise ValueError(f"{line!r} is no header, such as 'Idempotency-Key: abc'")
        pairs.append((field.strip().encode(), value.strip().encode()))
    given = {field.lower() for field, _ in pairs}
    if b"host" not in given:
        pairs.insert(0, (b"Host", (match["host"] or "localhost").encode()))
    if body and b"content-length" not in given:
        pairs.append((b"Content-Length", b"%d" % len(body)))
    return pairs, ("/" + target if target.startswith("?") else target).encode()
