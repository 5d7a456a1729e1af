"""Turns the tables of a rules file into rules, and reports all problems with them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from oncegate.keys.fingerprint_parts import BODY_JSON, fingerprint_source
from oncegate.keys.sources import Cookie, Header, KeySources, Member
from oncegate.messages.request_head import LAST_EVENT_ID
from oncegate.probing.table import rule_contradictions
from oncegate.rules.fields import FILES, MATCHING, RULE, SHARED, UPSTREAM, Check
from oncegate.rules.file import Table
from oncegate.rules.model import Match, Rule, Upstream
from oncegate.rules.presets import COUNTING, PRESETS
from oncegate.rules.resolution import (
    CALL_GRACE_S,
    guarded_methods,
    preset_values,
    preset_when,
    rule_policy,
    statuses_of,
)
from oncegate.settings.addresses import Origin
from oncegate.settings.contradictions import contradictions_in
from oncegate.settings.credentials import ACCOUNTS, CREDENTIALS, expanded
from oncegate.settings.names import GUARDABLE
from oncegate.settings.settings import Settings
from oncegate.settings.wording import variable_name

Contradictions = Iterable[tuple[str, str]]


class RulesReader:
    """Reads the tables of one rules file. A reader serves one file.

    A problem does not end it, so that an operator sees all of them at once.
    """

    def __init__(self, settings: Settings, file: Path, default: Rule) -> None:
        self._settings, self._file, self._default = settings, file, default
        self._errors: list[tuple[int, str]] = []
        self._names: set[tuple[str, str]] = set()
        self._upstreams: dict[str, Upstream] = {}
        # Of the rules so far, those with problems in other fields included.
        self._matches: list[tuple[Table, Match]] = []

    @property
    def complaints(self) -> list[str]:
        """The messages of all problems, in the order of the file's lines."""
        return [text for _, text in sorted(self._errors, key=lambda error: error[0])]

    def _complain(self, table: Table, field: str, reason: str) -> None:
        line = table.lines.get(field, table.lines.get("", 1))
        self._errors.append((line, table.complaint(self._file, field, reason)))

    def rules(self, tables: Iterable[Table]) -> list[Rule]:
        """Return the rules in order, without those that have problems."""
        tables = list(tables)
        # Rules name upstreams that the file may define after them.
        for table in tables:
            if table.kind == "upstream":
                self._upstream(table)
        rules = [self._rule(table) for table in tables if table.kind == "rule"]
        for number, (table, match) in enumerate(self._matches):
            self._report_unreachable(table, match, self._matches[:number])
        return [rule for rule in rules if rule is not None]

    def _checked(self, table: Table, checks: Mapping[str, Check]) -> dict[str, Any]:
        """Return the valid fields of a table as values, and report the others."""
        values: dict[str, Any] = {}
        for name, value in table.fields.items():
            if name not in checks:
                # With a cutoff of 0 there always is a nearest name.
                near = get_close_matches(name, checks, 1, 0)[0]
                self._complain(table, name, f"is unknown; did you mean {near}?")
                continue
            try:
                values[name] = checks[name](value)
            except ValueError as error:
                self._complain(table, name, str(error))
        if "name" not in table.fields:
            self._complain(table, "", "has no name")
        elif "name" in values and (table.kind, values["name"]) in self._names:
            self._complain(table, "name", f"is the name of another {table.kind} as well")
        self._names.add((table.kind, values.get("name", "")))
        return values

    # Upstreams ...

    def _upstream(self, table: Table) -> None:
        values = self._checked(table, UPSTREAM)
        if "url" not in table.fields:
            self._complain(table, "", "has no url")
        if not {"name", "url"} <= set(values):
            # A rule that names this upstream has no problem of its own.
            if "name" in values:
                self._upstreams.setdefault(values["name"], self._default.upstream)
            return
        files: dict[str, Any] = {name: values.get(name) for name in FILES}
        for missing, given in (("cert_file", "key_file"), ("key_file", "cert_file")):
            if files[missing] is None and files[given] is not None:
                self._complain(table, given, f"needs {missing} beside it")
        for field, path in files.items():
            if path is not None and values["url"].scheme == "http":
                self._complain(table, field, "needs https in url")
        own = {name: value for name, value in values.items() if name not in ("url", "was")} | files
        # The oldest name: while a file with a new name is rolled out, proxies with either file agree.
        known_as = (*values.get("was", ()), values["name"])[0]
        self._upstreams[values["name"]] = replace(
            self._default.upstream, origin=values["url"], known_as=known_as, **own
        )

    def _upstream_of(self, table: Table, value: Origin | str | None) -> Upstream:
        """Return the upstream of a rule: that of the settings, one at a URL, or one with a name."""
        if value is None or value == self._default.upstream.origin:
            return self._default.upstream
        if isinstance(value, Origin):
            return replace(self._default.upstream, origin=value, known_as=str(value))
        if value not in self._upstreams:
            self._complain(table, "upstream", "is neither a URL nor the name of an [[upstream]]")
        return self._upstreams.get(value, self._default.upstream)

    # Rules ...

    def _rule(self, table: Table) -> Rule | None:
        """Return the rule of a table, None where one of its fields has a problem or two contradict each other."""
        errors = len(self._errors)
        values = self._checked(table, RULE)
        match = Match(
            host=values.get("host"),
            path=values.get("path"),
            methods=values.get("methods"),
            headers=values.get("headers", ()),
            when=values["when"] if "when" in values else preset_when(values.get("preset", "")),
        )
        # A rule with a problem elsewhere can still hide a later one.
        if MATCHING.keys().isdisjoint(table.fields.keys() - values.keys()):
            self._matches.append((table, match))
        if len(self._errors) > errors:
            return None
        preset = PRESETS.get(values.get("preset", ""))
        # The rule's own fields override those of its preset.
        values = {**preset_values(preset.fields if preset else {}), **values}
        settings = self._settings.model_copy(update={name: values[name] for name in SHARED if name in values})
        key = _key_sources(values, preset.retry_count_header if preset else None)
        self._report_contradictions(table, values, settings, key)
        if len(self._errors) > errors:
            return None
        upstream = self._upstream_of(table, values.get("upstream"))
        return Rule(
            match=match,
            policy=rule_policy(settings, values, key, upstream),
            upstream=upstream,
            settings=settings,
            set_host=values.get("set_host"),
            line=table.lines.get("", 1),
        )

    def _report_contradictions(
        self, table: Table, values: dict[str, Any], settings: Settings, key: KeySources | None
    ) -> None:
        for first, complaint, second, _ in contradictions_in(settings, [name for name in SHARED if name in values]):
            first_name, second_name = (name if name in SHARED else variable_name(name) for name in (first, second))
            if first in table.fields:
                self._complain(table, first, f"{complaint} {second_name}")
            else:
                self._complain(table, second, f"{first_name} {complaint} {second_name}")
        try:
            statuses_of(settings, values)
        except ValueError as error:
            self._complain(table, "release_statuses", str(error))
        for field, reason in _contradictions(values, settings, key):
            self._complain(table, field, reason)

    def _report_unreachable(self, table: Table, match: Match, before: list[tuple[Table, Match]]) -> None:
        """Report a rule that no request reaches, because an earlier one matches all of its requests."""
        if earlier := next((other for other, matched in before if matched.includes(match)), None):
            place = f"{earlier.label} (line {earlier.lines.get('', 1)})"
            self._complain(table, "", f"can never match: {place} comes first and matches all of its requests")
        # Requests for other hosts get 421 before any rule is tried.
        host, hosts = match.host, self._settings.hosts
        if host and hosts and not host.startswith("*.") and not {host, host.partition(":")[0]} & set(hosts):
            self._complain(table, "host", "can never match: ONCEGATE_HOSTS does not have this host")


def _key_sources(values: dict[str, Any], counted_in: str | None) -> KeySources | None:
    """Return the sources of a rule's key. `counted_in`: where the SDKs of its preset count their retries."""
    if "key" not in values:
        return None
    if mark := values.get("retry_mark"):
        return KeySources(values["key"], mark, unmarked_is_new=True)
    return KeySources(values["key"], counted_in.encode() if counted_in else None)


def _contradictions(values: dict[str, Any], settings: Settings, key: KeySources | None) -> Contradictions:
    """Yield the fields of a rule that contradict others, and why."""
    guard = values.get("guard")
    # `required` refuses a request without a key, `pass` forwards it.
    if guard == "required" and values.get("on_bad_key") == "pass":
        yield "on_bad_key", 'contradicts guard = "required": a request without a key cannot pass'
    # Such a rule looks as if it protected its requests, and would forward all of them.
    if (guard in ("optional", "required") or key) and guard != "off" and not guarded_methods(values, settings):
        yield "methods", f"has none that can be guarded; these can: {', '.join(GUARDABLE)}"
    if "cancel_grace_s" in values and values.get("on_client_gone") != "cancel":
        yield "cancel_grace_s", 'needs on_client_gone = "cancel"'
    if "heartbeat_agents" in values and "heartbeat_s" not in values:
        yield "heartbeat_agents", "needs heartbeat_s beside it"
    if "token_prices" in values and values.get("preset") not in COUNTING:
        yield "token_prices", f"needs a preset that counts tokens; these do: {', '.join(sorted(COUNTING))}"
    if values.get("pass_host") and values.get("set_host"):
        yield "set_host", "contradicts pass_host"
    # The record would expire within its window.
    if key and key.window_ms > settings.retention_s * 1000:
        yield "key", "has a window longer than retention_s"
    yield from _mark_contradictions(values.get("retry_mark"), key)
    header = settings.key_header.lower().encode() if key is None else key.only_header
    forward = values.get("forward_key")
    # Only a single header can be renamed or dropped.
    if forward is not None and header is None:
        yield "forward_key", "needs a key that is one header alone"
    # oncegate sends a lost request again, which is safe only where the upstream recognizes it by its key.
    if values.get("upstream_idempotent") and (forward == "" or (key and key.window_ms)):
        yield "upstream_idempotent", "needs an upstream that gets the key"
    if "upstream_key_retention_s" in values and "upstream_idempotent" not in values:
        yield "upstream_key_retention_s", "needs upstream_idempotent beside it"
    if values.get("protocol") == "json-rpc":
        yield from _json_rpc_contradictions(values, key)
    yield from _stream_contradictions(values, settings)
    yield from _tenant_contradictions(values, settings, header)
    yield from _fleeting_contradictions(values, settings, key)
    yield from rule_contradictions(values, settings.on_unknown, key)


def _stream_contradictions(values: dict[str, Any], settings: Settings) -> Contradictions:
    """Yield what leaves the fields about readers that come back without use, or an address open to everybody."""
    if values.get("resume_by_key") and not (settings.ask_keys and values.get("resumable")):
        yield "resume_by_key", "needs ask_keys and resumable: it is about the address in an answer to a question"
    if values.get("ask_keys") and not values.get("scope", True):
        yield "ask_keys", "needs a scope: without one a question shows no credential, and none is answered"
    for name in filter(values.get, ("resumable", "cancellable", "respond_async", "resume", "sse_ids")):
        if values.get("protocol") == "json-rpc" and name in ("respond_async", "resume"):
            yield name, "contradicts protocol: a client of JSON-RPC takes nothing but the answer to its message"
        if values.get("guard") == "off":
            yield name, 'contradicts guard = "off": only a response with a key is stored'
        elif name not in ("resume", "sse_ids") and not settings.secret.get_secret_value():
            yield name, "needs ONCEGATE_SECRET: without it anybody could make an address"
    if values.get("sse_ids") and not (values.get("resume") or values.get("resumable")):
        yield "sse_ids", "needs resume = true or resumable = true beside it: nothing else reads the ids"


def _fleeting_contradictions(values: dict[str, Any], settings: Settings, key: KeySources | None) -> Contradictions:
    """Yield what would be decided by a header that is another one in a retry: the request's id, the last event's."""
    fleeting = {settings.request_id_header.lower().encode(): "the header of ONCEGATE_REQUEST_ID_HEADER"}
    if values.get("resume"):
        fleeting[LAST_EVENT_ID] = "Last-Event-ID, which says where a reader goes on"
    parts = [fingerprint_source(part) for part in values.get("fingerprint", ())]
    read = {
        "key": key.headers if key else (),
        "scope": _scope_headers(values, settings) if "scope" in values else (),
        "fingerprint": [one.kind.name for one in parts if one is not None and isinstance(one.kind, Header)],
    }
    for field, headers in read.items():
        for name in fleeting.keys() & headers:
            yield field, f"takes {fleeting[name]}; a retry may have another one, or none"


def _tenant_contradictions(values: dict[str, Any], settings: Settings, key_header: bytes | None) -> Contradictions:
    """Yield what would take one client's requests for several tenants', or several clients' for one."""
    # Each request would be a tenant of its own, and no retry would find its original.
    named = next((field for field in ("scope", "key") if field in values), None)
    if named and key_header in _scope_headers(values, settings):
        yield named, "takes one header for the key and for the tenant"
    # One person's session would be given to another.
    if values.get("replay_cookies") and not _is_personal(values, settings):
        yield "replay_cookies", "needs a scope of credentials and cookies alone: several people may share any other"


def _mark_contradictions(mark: bytes | None, key: KeySources | None) -> Contradictions:
    """Yield what leaves the mark of a retry without use."""
    if mark is None:
        return
    if key is None or not key.window_ms:
        yield "retry_mark", 'needs derived: in key, such as key = [["header:Idempotency-Key"], ["derived:600"]]'
    # The last of the headers is the mark itself.
    elif mark in key.headers[:-1]:
        yield "retry_mark", "is a header that the key is read from"


def _json_rpc_contradictions(values: dict[str, Any], key: KeySources | None) -> Contradictions:
    """Yield what would make each try of a JSON-RPC request another request: its id is new in each of them."""
    sources = [source for one in key.alternatives for source in one] if key else []
    if any(isinstance(source.kind, Member) and source.kind.pointer == ("id",) for source in sources):
        yield "key", "names the id of a JSON-RPC request, which is new in each try, and the same for other clients"
    if values.get("cancel_grace_s", CALL_GRACE_S) < CALL_GRACE_S:
        yield (
            "cancel_grace_s",
            f"must be at least {CALL_GRACE_S:g} with JSON-RPC: a key says that the client comes back",
        )
    parts = values.get("fingerprint")
    if parts is None or {"body", BODY_JSON, "body:/id"}.intersection(parts):
        yield "fingerprint", 'has the id of a JSON-RPC request; list what must be equal, such as "body:/method"'
    elif key and key.window_ms and not any(part.startswith("body:") for part in parts):
        yield "fingerprint", "is what a derived key is made of, and names nothing of the body"


def _is_personal(values: dict[str, Any], settings: Settings) -> bool:
    """Return whether the scope of a rule names what one person has, and nothing else beside accounts."""
    further = _scope_headers(values, settings) - {name.lower().encode() for name in ACCOUNTS}
    cookies = [source for source in values.get("scope", ()) if not isinstance(source.kind, Header)]
    is_known = further <= {name.lower().encode() for name in (*CREDENTIALS, "Cookie")}
    return is_known and all(isinstance(source.kind, Cookie) for source in cookies) and bool(cookies or further)


def _scope_headers(values: dict[str, Any], settings: Settings) -> set[bytes]:
    """Return the lower-case names of the headers that identify the tenant of a rule's requests."""
    if "scope" not in values:
        return {name.lower().encode() for name in expanded(settings.scope_headers)}
    return {source.kind.name for source in values["scope"] if isinstance(source.kind, Header)}
