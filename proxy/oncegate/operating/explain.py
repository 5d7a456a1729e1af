"""`oncegate check`: the table of rules, and an explanation of what they do with one request.

The explanation calls the functions of the request path itself. Nothing is sent or stored.
"""

from collections.abc import Iterable
from functools import partial

from oncegate.adaptation.cookies import REPLAYED_MS
from oncegate.adaptation.error_pages import wants_page
from oncegate.adaptation.json_rpc import Caller
from oncegate.decision import RETRY, Disposition
from oncegate.keys.automatic import is_automatic
from oncegate.keys.digests import Digests, Scope, UnstableScope, key_id
from oncegate.keys.documents import Missing
from oncegate.keys.extraction import scope_fields
from oncegate.keys.key_names import has_key_name
from oncegate.keys.notes import escaped, read_note
from oncegate.keys.syntax import BadKey
from oncegate.messages.admission import Refused
from oncegate.messages.fields import only_value
from oncegate.messages.request_head import RequestHead, preferred_wait_s, prefers, renamed
from oncegate.operating.explain_pages import page_right, preflight_result
from oncegate.operating.request_identity import AskedRequest, WholeBody, admit
from oncegate.probing.described import described_question, described_rule
from oncegate.probing.kept_values import read_values
from oncegate.rules.body_conditions import read_document
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
from oncegate.rules.model import Rule, Rules
from oncegate.rules.policy import Policy
from oncegate.settings.credentials import KNOWN, expanded
from oncegate.settings.names import GUARDABLE
from oncegate.settings.settings import Settings
from oncegate.store.record_name import store_key
from oncegate.streams.own_path import OwnPath

LABEL_WIDTH = 18
_KNOWN = frozenset(name.lower() for name in expanded([KNOWN]))


def table(rules: Rules) -> str:
    """Return the rules in their order, one per line, with their most important fields."""
    cells = rows(rules)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *_notes(rules)])


def _notes(rules: Rules) -> Iterable[str]:
    """Yield what the rules store of requests, beyond what they need."""
    for rule in rules:
        if rule.policy.note is not None:
            yield f'rule "{rule.name}" stores a note with each key, for operators: {rule.policy.note.text}'
        if rule.policy.reconcile is not None:
            yield from (f'rule "{rule.name}" {text}' for text in described_rule(rule.policy.reconcile))


def rows(rules: Rules) -> list[tuple[str, ...]]:
    """Return the cells of the table: its titles, and a row for each rule."""
    titles = ("rule", "matches", "upstream", "guard", "key", "scope", "retention_s", "duplicate", "unknown")
    return [titles, *map(_row, rules)]


def _row(rule: Rule) -> tuple[str, ...]:
    policy = rule.policy
    upstream = f"{rule.upstream.name} = {rule.upstream.origin}" if rule.upstream.name else str(rule.upstream.origin)
    title = f"{rule.name} ({policy.preset})" if policy.preset else rule.name
    return (
        title or "(none matches)",
        rule.match.shown,
        upstream,
        _guard(policy),
        _key(policy),
        _scope(policy),
        f"{policy.retention_ms / 1000:g}",
        _duplicate(policy),
        policy.mode.decode(),
    )


def _duplicate(policy: Policy) -> str:
    """Return what a duplicate does while its original is running."""
    verb = "join" if policy.joins_duplicates else "wait"
    return f"{verb} {policy.wait_max_s:g} s" if policy.wait_for_duplicates else "reject"


def _guard(policy: Policy) -> str:
    if not policy.methods:
        return "off"
    return f"{'required' if policy.key_required else 'optional'} {','.join(sorted(policy.methods))}"


def _key(policy: Policy) -> str:
    if policy.sources is None:
        return f"header:{policy.key_header.decode()}"
    return " else ".join(" + ".join(source.text for source in sources) for sources in policy.sources.alternatives)


def _scope(policy: Policy) -> str:
    names = [name.decode() for name in policy.scope_headers]
    if _KNOWN.issubset(names):
        names = [KNOWN, *(name for name in names if name not in _KNOWN)]
    return f"{policy.namespace.decode()} / {', '.join(names) or 'all'}"


class Explanation:
    """Explains one request: `explain` returns lines of a label and a text."""

    def __init__(self, settings: Settings, rules: Rules) -> None:
        self._settings, self._rules = settings, rules
        self._digests = Digests(settings.secret.get_secret_value().encode())
        self._lines: list[str] = []

    def _add(self, label: str, text: str) -> None:
        self._lines.append(f"{label + ':':<{LABEL_WIDTH}}{text}")

    def explain(self, asked: AskedRequest) -> str:
        """Return what the rules do with a request. Raises ValueError if it is no HTTP request."""
        head, body = admit(self._settings, self._rules, asked), asked.body
        if isinstance(head, Refused):
            self._add("result", f"{head.status}: {head.detail}")
        elif any(rule.policy.uses_own_path for rule in self._rules) and OwnPath(self._settings.own_path).place(
            head.target
        ):
            self._add("result", "answered by oncegate itself: no request below ONCEGATE_OWN_PATH reaches an API")
        else:
            if self._add_preflight(head):
                return "\n".join(self._lines)
            document = read_document(head.fields, body)
            rule = self._rules.choose(head, document) or self._rules.default
            for other, reason in self._rules.passed_over(head, document):
                self._add("passed over", f"{other.name} ({self._settings.rules_file}:{other.line}): {reason}")
            self._add_routing(head, rule)
            self._add_guard(rule.policy, head, WholeBody(body))
        return "\n".join(self._lines)

    def _add_preflight(self, head: RequestHead) -> bool:
        """Add who answers a preflight, and return whether the request is one."""
        found = self._rules.for_preflight(head) if any(rule.policy.adaptation.cors for rule in self._rules) else None
        if found is None:
            return False
        self._add_routing(head, found[0])
        self._add("result", preflight_result(found[1]))
        return True

    def _add_routing(self, head: RequestHead, rule: Rule) -> None:
        """Add the rule that matches, and where the request goes."""
        place = f"{rule.name} ({self._settings.rules_file}:{rule.line})"
        self._add("rule", place if rule.name else "none matches; the settings apply")
        policy, origin = rule.policy, rule.upstream.origin
        host = head.host.decode() if policy.pass_host and head.host else rule.set_host or origin.authority
        # latin-1, because a target may have any bytes.
        line = f"{origin.scheme}://{origin.authority}{origin.path_prefix}{head.target.decode('latin-1')}, Host: {host}"
        self._add("upstream", line)
        if policy.adaptation.cors is not None:
            self._add("page", page_right(policy.adaptation.cors, head.fields))
        if wants_page(policy.pages, head.fields):
            self._add("own answers", "a page that people read, not a problem in JSON")

    def _add_guard(self, policy: Policy, head: RequestHead, body: WholeBody) -> None:
        """Add how the request is guarded, or why it is not."""
        if policy.forward_key is not None:
            self._add_forwarded_key(policy, head)
        if head.method not in policy.methods:
            self._add("result", f"forwarded unguarded: the rule does not guard {head.method}")
            self._add_unguarded_key(policy, head)
            return
        self._add("key", _key(policy))
        if is_automatic(head.fields):
            self._add("browser's key", "a number that the browser made itself, which is the last of the sources")
        caller = caller_of(policy, head, body)
        if isinstance(caller, Caller):
            self._add("JSON-RPC id", f"{caller.id.decode()}: a replay has that of its own request")
        key = caller if isinstance(caller, Missing | BadKey) else key_in_head(policy, head)
        if isinstance(key, Missing | BadKey):
            self._add_keyless(policy, head, key)
            return
        scope = scope_of(policy, self._digests, head)
        if isinstance(scope, UnstableScope):
            self._add("result", "400 scope-unstable: the scheme of Authorization is not known to stay the same")
        elif isinstance(scope, BadKey):
            self._add("result", f"400: {scope.detail}")
        # The request path enforces the limit while it reads the body, before it computes the digests.
        elif len(body.data) > policy.max_request_bytes:
            self._add("result", "413 body-too-large")
        else:
            request = ScopedRequest(head, scope, key, body)
            identified = identify(policy, self._digests, request)
            if isinstance(identified, Identity):
                self._add_identity(policy, request, identified)
            else:
                self._add_keyless(policy, head, identified)

    def _add_forwarded_key(self, policy: Policy, head: RequestHead) -> None:
        assert policy.forward_key is not None
        forwarded = renamed(head.pairs, policy.key_header, policy.forward_key)
        received = dict(head.pairs)
        added = [field.decode("latin-1") for field, _ in forwarded if field not in received]
        self._add("key sent as", added[0] if added else "not sent")

    def _add_unguarded_key(self, policy: Policy, head: RequestHead) -> None:
        if policy.methods and head.method in GUARDABLE and has_key_name(head.fields):
            self._add("unguarded key", "a header looks like a key, and nothing reads it")

    def _add_keyless(self, policy: Policy, head: RequestHead, why: Missing | BadKey) -> None:
        slug = "key-missing" if isinstance(why, Missing) else "key-invalid"
        is_forwarded = may_forward_unkeyed(policy, why)
        self._add("result", f"forwarded unguarded: {why.detail}" if is_forwarded else f"400 {slug}: {why.detail}")
        if is_forwarded and uses_no_key(policy, why):
            self._add_unguarded_key(policy, head)

    def _add_identity(self, policy: Policy, request: ScopedRequest, identity: Identity) -> None:
        """Add the digests of a guarded request, and the response in each state that its key may have."""
        head, scope, _, body = request
        self._add("scope", f"namespace {scope.namespace.decode()}, tenant {_tenant(policy, head, scope)}")
        self._add("digest", f"{key_id(identity.key)} in logs, {store_key(identity.key).decode()} in the store")
        parts = policy.fingerprint
        covered = "all parts" if parts is None else ", ".join(["destination", *sorted(parts)])
        self._add("fingerprint", f"{identity.fingerprint.hex()} of {covered}")
        field = partial(only_value, head.fields)
        if policy.note is not None:
            note = escaped(read_note(policy.note, field, body))
            self._add("note", f"{note or 'none'}, of {policy.note.text}: stored with the record")
        if event_id := last_event_id(policy, head):
            self._add(
                "result", f"the stream behind the event {escaped(event_id.decode('utf-8', 'replace'))}, if it is there"
            )
            self._add("  no record", "410 stream-gone: a request with Last-Event-ID is never executed")
            return
        self._add("result", "executed if the key is free")
        for state, text in _by_state(policy, head, identity):
            self._add(f"  {state}", text)
        if (plan := policy.reconcile) is not None:
            values = dict(read_values(plan, policy.key_headers, field, lambda: head.target, body))
            for label, text in described_question(plan, values):
                self._add(label, text)


def _tenant(policy: Policy, head: RequestHead, scope: Scope) -> str:
    """Return the digest of a request's tenant, and what of the request identifies the tenant."""
    if not policy.scope_headers:
        return "all"
    if scope.without_credential:
        return "without credential: all requests that have none of the scope's fields are this one tenant"
    fields = scope_fields(policy.scope_sources, head)
    names = [] if isinstance(fields, BadKey) else policy.tenant.counted(fields)
    return f"{scope.tenant.hex()} of {', '.join(name.decode() for name in names)}"


def _in_flight(wait_s: float, refused: str, *, joins: bool) -> str:
    """Return what a duplicate of a running original gets."""
    waits = f"waits up to {wait_s:g} s, then {refused}" if wait_s else refused
    return f"joins the response while it comes; until it begins {waits}" if joins else waits


def _by_state(policy: Policy, head: RequestHead, identity: Identity) -> Iterable[tuple[str, str]]:
    """Yield the states that the key of a guarded request may have, each with what the request gets."""
    # The client counts no retry: an equal request that runs is another one (docs/decisions/008).
    if identity.fresh:
        yield "in flight", "forwarded unguarded, as a request of its own"
        yield "complete", "executed, and takes the key over"
    else:
        preferences = head.fields.get(b"prefer", ())
        is_later = policy.respond_async and prefers(preferences, b"respond-async")
        wait_s = policy.wait_max_s if policy.wait_for_duplicates and not is_later else 0.0
        # RFC 7240, section 4.3. A client may ask for less than the limit, not for more.
        preferred = preferred_wait_s(preferences)
        wait_s = wait_s if preferred is None else min(preferred, policy.wait_max_s)
        if is_later:
            after = f"after {wait_s:g} s" if wait_s else "at once"
            yield "claimed", f"202 {after}, with the address of the response"
        refused = "202 with the address of the response" if is_later else f"{policy.in_flight_status} in-flight"
        joins = (policy.joins_duplicates and not is_later) or prefers(preferences, b"join")
        yield "in flight", _in_flight(wait_s, refused, joins=joins)
        times_ms = identity.window_ms, policy.retention_ms, policy.tombstone_ms
        window_s, retention_s, refused_s = (time_ms / 1000 for time_ms in times_ms)
        then = f", then 410 key-expired for {refused_s:g} s" if refused_s else ""
        # The window of a derived key runs from the claim, retention from the completion.
        period = f"{window_s:g} s from its claim" if window_s else f"{retention_s:g} s"
        then = ", then executed" if window_s else then
        if policy.adaptation.replays_cookies:
            period += f", with its cookies for {REPLAYED_MS // 1000} s at most"
        yield "complete", f"replayed for {period}{then}"
    unknown = "executed again" if policy.mode == RETRY else "409 outcome-unknown"
    resent = f"sent on with the same key for {policy.resend_ms / 1000:g} s from its claim, then "
    yield "unknown", resent + unknown if policy.resend_ms else unknown
    if policy.heartbeats is not None:
        period = f"after each {policy.heartbeats.period_s:g} s"
        gets_102 = "102, and " if policy.heartbeats.takes_interim(head) else ""
        yield "in silence", f"{gets_102}comments in a stream of events, {period}"
    if policy.cancel_grace_s is not None:
        yield "client gone", f"cancelled after {policy.cancel_grace_s:g} s without readers; then 409 outcome-unknown"
    if policy.sse_ids:
        yield "events", "get ids, unless the response is coded"
    if links := [rel for rel, has in (("resume", policy.resumable), ("cancel", policy.cancellable)) if has]:
        yield "links", ", ".join(links)
    if policy.asks:
        yield "questions", "answered for the same key and credential"
    yield "other content", "422 key-reused, if the fingerprint differs"
    if policy.json_rpc:
        yield "by message", "a result is stored; -32700, -32600 and -32601 free the key; all else is unknown"
    yield "released on", _statuses(policy, Disposition.RELEASE)
    yield "unknown on", _statuses(policy, Disposition.AMBIGUOUS)
    if policy.upstream_idempotent:
        yield "upstream lost", "sent again with the same key, a few times"


def _statuses(policy: Policy, disposition: Disposition) -> str:
    """Return the statuses of the upstream that have this disposition, as a rule writes them."""
    return ", ".join(policy.statuses.entries(disposition)) or "no status"
