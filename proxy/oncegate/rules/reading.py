"""Turns the tables of a rules file into rules, and reports all problems with them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from oncegate.keys.sources import Header, KeySources, Source
from oncegate.rules.fields import FILES, MATCHING, PARTS, RULE, SHARED, TREATING, UPSTREAM, Check
from oncegate.rules.file import Table
from oncegate.rules.model import Match, Rule, Upstream
from oncegate.rules.policy import AMBIGUOUS_STATUSES, DEFAULT_STATUSES, RELEASE_STATUSES, Policy, Statuses
from oncegate.rules.presets import COUNTING, PRESETS
from oncegate.settings.addresses import Origin
from oncegate.settings.contradictions import contradictions_in
from oncegate.settings.names import GUARDABLE
from oncegate.settings.settings import Settings
from oncegate.settings.wording import variable_name


def policy_of(settings: Settings) -> Policy:
    """Return the policy of the settings alone, without any rule."""
    return Policy(
        methods=frozenset(settings.methods),
        key_header=settings.key_header.lower().encode(),
        key_required=settings.key_required,
        namespace=settings.namespace.encode(),
        scope_headers=tuple(name.lower().encode() for name in settings.scope_headers),
        pass_host=settings.pass_host,
        retention_ms=int(settings.retention_s * 1000),
        lease_ms=settings.lease_ms,
        wait_for_duplicates=settings.on_duplicate == "wait",
        wait_max_s=settings.wait_max_s,
        max_stored_bytes=settings.max_stored_bytes,
        max_request_bytes=settings.max_request_bytes,
        mode=settings.on_unknown.encode(),
        bypass=settings.on_store_down == "bypass",
    )


def default_rule(settings: Settings) -> Rule:
    """Return the rule for requests that no rule of the file matches."""
    upstream = Upstream(
        name="",
        origin=settings.upstream,
        ca_file=settings.upstream_ca_file,
        cert_file=settings.upstream_cert_file,
        key_file=settings.upstream_key_file,
        connect_timeout_s=settings.connect_timeout_s,
        connect_retries=settings.connect_retries,
        max_connections=settings.max_upstream_connections,
        reuse_idle_s=settings.upstream_reuse_idle_s,
    )
    return Rule(Match(), policy_of(settings), upstream, settings)


class Reading:
    """Reads the tables of one rules file. A reading serves once.

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
        for one, other in (("cert_file", "key_file"), ("key_file", "cert_file")):
            if files[one] is None and files[other] is not None:
                self._complain(table, other, f"needs {one} beside it")
        for one in files:
            if files[one] is not None and values["url"].scheme == "http":
                self._complain(table, one, "needs https in url")
        own = {name: value for name, value in values.items() if name != "url"} | files
        self._upstreams[values["name"]] = replace(self._default.upstream, origin=values["url"], **own)

    def _upstream_of(self, table: Table, value: Origin | str | None) -> Upstream:
        """Return the upstream of a rule: that of the settings, one at a URL, or one with a name."""
        if value is None:
            return self._default.upstream
        if isinstance(value, Origin):
            return replace(self._default.upstream, origin=value)
        if value not in self._upstreams:
            self._complain(table, "upstream", "is neither a URL nor the name of an [[upstream]]")
        return self._upstreams.get(value, self._default.upstream)

    # Rules ...

    def _rule(self, table: Table) -> Rule | None:
        """Return the rule of a table, None where one of its fields has a problem or two contradict each other."""
        errors = len(self._errors)
        values = self._checked(table, RULE)
        match = Match(values.get("host"), values.get("path"), values.get("methods"), values.get("headers", ()))
        if MATCHING.keys().isdisjoint(table.fields.keys() - values.keys()):
            self._matches.append((table, match))
        if len(self._errors) > errors:
            return None
        preset = PRESETS.get(values.get("preset", ""))
        values = {**_preset_values(preset.fields if preset else {}), **values}
        settings = self._settings.model_copy(update={name: values[name] for name in SHARED if name in values})
        counts = preset.retry_count_header.encode() if preset and preset.retry_count_header else None
        key = KeySources(values["key"], counts) if "key" in values else None
        self._report_contradictions(table, values, settings, key)
        if len(self._errors) > errors:
            return None
        upstream = self._upstream_of(table, values.get("upstream"))
        policy = _policy(settings, values, key)
        return Rule(match, policy, upstream, settings, values.get("set_host"), table.lines.get("", 1))

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
            _statuses(values)
        except ValueError as error:
            self._complain(table, "release_statuses", str(error))
        for field, reason in _contradictions(values, settings, key):
            self._complain(table, field, reason)

    def _report_unreachable(self, table: Table, match: Match, before: list[tuple[Table, Match]]) -> None:
        """Report a rule that no request reaches, because an earlier one matches all of its requests."""
        earlier = next((other for other, one in before if one.includes(match)), None)
        if earlier is not None:
            place = f"{earlier.label} (line {earlier.lines.get('', 1)})"
            self._complain(table, "", f"can never match: {place} comes first and matches all of its requests")
        host, hosts = match.host, self._settings.hosts
        if host and hosts and not host.startswith("*.") and not {host, host.partition(":")[0]} & set(hosts):
            self._complain(table, "host", "can never match: ONCEGATE_HOSTS does not have this host")


def _preset_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's fields as values. Those that are settings as well are values already."""
    return {name: value if name in SHARED else TREATING[name](value) for name, value in fields.items()}


def _contradictions(values: dict[str, Any], settings: Settings, key: KeySources | None) -> Iterable[tuple[str, str]]:
    """Yield the fields of a rule that contradict others, and why."""
    guard = values.get("guard")
    if guard == "required" and values.get("on_bad_key") == "pass":
        yield "on_bad_key", 'contradicts guard = "required": a request without a key cannot pass'
    if (guard in ("optional", "required") or key) and guard != "off" and not _guarded_methods(values, settings):
        yield "methods", f"has none that can be guarded; these can: {', '.join(GUARDABLE)}"
    if values.get("pass_host") and values.get("set_host"):
        yield "set_host", "contradicts pass_host"
    if key and key.window_ms > settings.retention_s * 1000:
        yield "key", "has a window longer than retention_s"
    header = settings.key_header.lower().encode() if key is None else key.only_header
    forward = values.get("forward_key")
    if forward is not None and header is None:
        yield "forward_key", "needs a key that is one header alone"
    if values.get("upstream_idempotent") and (forward == "" or (key and key.window_ms)):
        yield "upstream_idempotent", "needs an upstream that gets the key"
    if header is not None and header in {source.kind.name for source in _header_sources(values.get("scope", ()))}:
        yield "scope", "must not name the header of the key"


def _header_sources(scope: Iterable[Source]) -> list[Any]:
    return [source for source in scope if isinstance(source.kind, Header)]


def _guarded_methods(values: dict[str, Any], settings: Settings) -> frozenset[str]:
    if values.get("guard") == "off":
        return frozenset()
    return frozenset(values["methods"]).intersection(GUARDABLE) if "methods" in values else frozenset(settings.methods)


def _statuses(values: dict[str, Any]) -> Statuses:
    """Return the two lists of statuses. An entry of the rule moves a status out of the other default list."""
    release, ambiguous = values.get("release_statuses"), values.get("ambiguous_statuses")
    if release is None and ambiguous is None:
        return DEFAULT_STATUSES
    if release is None:
        release = [entry for entry in RELEASE_STATUSES if entry not in (ambiguous or ())]
    if ambiguous is None:
        ambiguous = [entry for entry in AMBIGUOUS_STATUSES if entry not in release]
    return Statuses(release, ambiguous)


def _policy(settings: Settings, values: dict[str, Any], key: KeySources | None) -> Policy:
    """Return the policy of a rule: that of its settings, with what only a rule can say."""
    policy = policy_of(settings)
    changes: dict[str, Any] = {
        "rule": values["name"],
        "preset": values.get("preset", ""),
        "counts_tokens": values.get("preset") in COUNTING,
        "methods": _guarded_methods(values, settings),
        "key_required": values.get("guard", "required" if settings.key_required else "optional") == "required",
        "statuses": _statuses(values),
        "pass_bad_keys": values.get("on_bad_key") == "pass",
        "upstream_idempotent": values.get("upstream_idempotent", False),
        "in_flight_status": values.get("in_flight_status", 409),
    }
    if key is not None:
        header = key.only_header
        changes |= {"key_header": header} if header else {"sources": key}
    if "namespace" in values:
        changes["namespace"] = values["namespace"].encode()
    if "scope" in values:
        changes |= _scope(values["scope"])
    if "fingerprint" in values and set(values["fingerprint"]) != set(PARTS):
        changes["fingerprint"] = frozenset(values["fingerprint"])
    if "forward_key" in values:
        changes["forward_key"] = values["forward_key"].encode()
    return replace(policy, **changes)


def _scope(sources: Iterable[Source]) -> dict[str, Any]:
    """Return the policy's fields for a scope: all names in order, and the sources that are not header fields."""
    names = [source.kind.name if isinstance(source.kind, Header) else source.text.encode() for source in sources]
    others = tuple(source for source in sources if not isinstance(source.kind, Header))
    return {"scope_headers": tuple(names), "scope_sources": others}
