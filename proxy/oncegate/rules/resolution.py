"""Resolves settings, preset and fields of a rule to the policy that requests use. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from oncegate.adaptation.adaptation import Adaptation
from oncegate.adaptation.addresses import Addresses, own_authorities
from oncegate.adaptation.cookies import Cookies
from oncegate.adaptation.cors import EXPOSED, Cors, DecidedBy
from oncegate.adaptation.heartbeats import Heartbeats
from oncegate.adaptation.origins import Origins
from oncegate.decision import UnknownMode
from oncegate.keys.digests import length_prefixed
from oncegate.keys.fingerprint_parts import fingerprint_source
from oncegate.keys.sources import Header, KeySources, Source
from oncegate.probing.plan import for_rule
from oncegate.rules.body_conditions import BodyConditions
from oncegate.rules.fields import MATCHING, PARTS, RULE, SHARED
from oncegate.rules.model import Match, Rule, Upstream
from oncegate.rules.policy import Policy
from oncegate.rules.presets import COUNTING, PRESETS
from oncegate.rules.statuses import AMBIGUOUS_STATUSES, DIRECT_STATUS, RELEASE_STATUSES, Statuses
from oncegate.settings.addresses import Origin
from oncegate.settings.credentials import expanded
from oncegate.settings.names import GUARDABLE
from oncegate.settings.settings import Settings
from oncegate.settings.statuses import DEFAULT
from oncegate.settings.values import DAY_MS

# How long a client may be away until its request is cancelled, under `on_client_gone = "cancel"`.
CANCEL_GRACE_S = 30.0
# The same for JSON-RPC, where it is the least: a call with a key says that its client comes back.
CALL_GRACE_S = 60.0
# Longer than any installation lives. A time, so that the scripts need no case of their own for it.
FOREVER_MS = 100 * 365 * DAY_MS


def policy_of(settings: Settings) -> Policy:
    """Return the policy of the settings alone, without any rule."""
    return Policy(
        methods=frozenset(settings.methods),
        # Field names are case-insensitive (RFC 9110, section 5.1); heads have them in lower case.
        key_header=settings.key_header.lower().encode(),
        key_required=settings.key_required,
        namespace=settings.namespace.encode(),
        scope_headers=tuple(name.lower().encode() for name in expanded(settings.scope_headers)),
        stable_schemes=tuple(scheme.encode() for scheme in settings.stable_schemes),
        pass_host=settings.pass_host,
        # Redis takes whole milliseconds (PEXPIRE).
        retention_ms=int(settings.retention_s * 1000),
        unknown_retention_ms=unknown_retention_ms(settings),
        tombstone_ms=tombstone_ms(settings),
        lease_ms=settings.lease_ms,
        wait_for_duplicates=settings.on_duplicate in ("wait", "join"),
        joins_duplicates=settings.on_duplicate == "join",
        wait_max_s=settings.wait_max_s,
        max_stored_bytes=settings.max_stored_bytes,
        max_request_bytes=settings.max_request_bytes,
        statuses=statuses_of(settings, {}),
        mode=UnknownMode(settings.on_unknown.encode()).wire,
        pass_interim=settings.pass_interim,
        adaptation=adaptation_of(settings, settings.upstream),
        bypass=settings.on_store_down == "bypass",
        asks=settings.ask_keys,
    )


def adaptation_of(
    settings: Settings, upstream: Origin, set_host: str | None = None, key_headers: Iterable[bytes] = ()
) -> Adaptation:
    """Return what is adapted in responses of an upstream; `set_host` is the Host that it gets instead of its own.

    `key_headers`: those of a rule's keys, without any that of the settings.
    """
    names = [name.title() for name in key_headers] or [settings.key_header.encode()]
    origins, decided_by = Origins(settings.cors_origins), DecidedBy(settings.cors_by)
    own = own_authorities((upstream.authority, *([set_host] if set_host else ())), upstream.scheme)
    prefix = upstream.path_prefix.encode()
    cookies = Cookies(settings.cookie_domain, settings.rewrite_cookie_path, prefix)
    exposed = (*EXPOSED, *([settings.request_id_header.encode()] if settings.request_id_header else ()))
    cors = Cors(origins, settings.cors_credentials, decided_by, tuple(names), exposed)
    return Adaptation(
        cors=cors if settings.cors_origins else None,
        addresses=Addresses(upstream.scheme, own, prefix) if settings.rewrite_location else None,
        cookies=cookies if settings.cookie_domain or settings.rewrite_cookie_path else None,
    )


def unknown_retention_ms(settings: Settings) -> int:
    """Return how long a key is kept that is in flight or unknown. A derived key has the ordinary retention instead."""
    retention_ms = int(settings.retention_s * 1000)
    # A retry of an unknown key executes in this mode, so that nothing is gained by keeping it longer.
    if settings.on_unknown == "retry":
        return retention_ms
    if not settings.unknown_retention_s:
        return FOREVER_MS
    # A key must not be free sooner because its outcome is not known.
    return max(retention_ms + tombstone_ms(settings), int(settings.unknown_retention_s * 1000))


def tombstone_ms(settings: Settings) -> int:
    """Return how long a key is refused after its retention. A derived key is not."""
    return int(settings.tombstone_s * 1000)


def longest_ms(settings: Settings) -> int:
    """Return how long a record can be kept, whatever becomes of it."""
    return max(unknown_retention_ms(settings), int(settings.retention_s * 1000) + tombstone_ms(settings))


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
        rest_s=settings.upstream_rest_s,
        spare_connections=settings.upstream_spare_connections,
    )
    return Rule(match=Match(), policy=policy_of(settings), upstream=upstream, settings=settings)


def preset_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's fields as values. Those that are settings as well are values already."""
    return {name: value if name in SHARED else RULE[name](value) for name, value in fields.items()}


def preset_when(name: str) -> BodyConditions | None:
    """Return what a preset says of the bodies of its requests. It matches nothing else by itself."""
    fields = PRESETS[name].fields if name else {}
    when: BodyConditions | None = MATCHING["when"](fields["when"]) if "when" in fields else None
    return when


def _destination(upstream: Upstream, set_host: str | None) -> bytes:
    """Return where the requests of a rule go, for their fingerprints. A Host that is passed on comes beside it."""
    # Equal for two rules that lead to one place: requests may move from one to the other while they are retried.
    parts = (upstream.known_as, set_host or "")
    return length_prefixed(part.encode() for part in parts) if any(parts) else b""


def rule_policy(settings: Settings, values: dict[str, Any], key: KeySources | None, upstream: Upstream) -> Policy:
    """Return the policy of a rule: that of its settings, with what only a rule and its upstream can say."""
    policy = policy_of(settings)
    changes: dict[str, Any] = {
        "rule": values["name"],
        "destination": _destination(upstream, values.get("set_host")),
        "preset": values.get("preset", ""),
        "counts_tokens": values.get("preset") in COUNTING,
        "methods": guarded_methods(values, settings),
        "key_required": values.get("guard", "required" if settings.key_required else "optional") == "required",
        "json_rpc": values.get("protocol") == "json-rpc",
        "statuses": statuses_of(settings, values, upstream),
        "pass_bad_keys": values.get("on_bad_key") == "pass",
        "upstream_idempotent": values.get("upstream_idempotent", False),
        "in_flight_status": values.get("in_flight_status", 409),
        "pages": values.get("pages"),
        "resume": values.get("resume", False),
        "sse_ids": values.get("sse_ids", False),
        "note": values.get("note"),
        "reconcile": for_rule(values["reconcile"], upstream.origin, values.get("set_host", ""), values.get("note"))
        if "reconcile" in values
        else None,
        "resume_by_key": values.get("resume_by_key", False),
        "respond_async": values.get("respond_async", False),
        "token_prices": values.get("token_prices", ()),
        "resumable": values.get("resumable", False),
        "cancellable": values.get("cancellable", False),
    }
    if "upstream_key_retention_s" in values:
        changes["upstream_key_retention_ms"] = int(values["upstream_key_retention_s"] * 1000)
    if values.get("on_client_gone") == "cancel":
        default = CALL_GRACE_S if values.get("protocol") == "json-rpc" else CANCEL_GRACE_S
        changes["cancel_grace_s"] = values.get("cancel_grace_s", default)
    if "heartbeat_s" in values:
        changes["heartbeats"] = Heartbeats(values["heartbeat_s"], values.get("heartbeat_agents", ()))
    keys = key.headers if key is not None else ()
    adaptation = adaptation_of(settings, upstream.origin, values.get("set_host"), keys)
    changes["adaptation"] = replace(adaptation, replays_cookies=values.get("replay_cookies", False))
    if key is not None:
        # One header alone is looked up by its name, without the cost of sources.
        header = key.only_header
        changes |= {"key_header": header} if header else {"sources": key}
    if "namespace" in values:
        changes["namespace"] = values["namespace"].encode()
    if "scope" in values:
        changes |= _scope(values["scope"])
    if "stable_schemes" in values:
        changes["stable_schemes"] = tuple(scheme.encode() for scheme in values["stable_schemes"])
    # All parts are no choice: with None, a derived key is the fingerprint and costs no second digest.
    if "fingerprint" in values and set(values["fingerprint"]) != set(PARTS):
        changes["fingerprint"] = frozenset(values["fingerprint"])
        # Sorted: the order of the list does not count.
        sources = (fingerprint_source(part) for part in sorted(values["fingerprint"]))
        changes["fingerprint_sources"] = tuple(source for source in sources if source is not None)
    if "forward_key" in values:
        changes["forward_key"] = values["forward_key"].encode()
    return replace(policy, **changes)


def statuses_of(settings: Settings, values: Mapping[str, Any], upstream: Upstream | None = None) -> Statuses:
    """Return both lists of statuses: those of a rule, those of the settings, and the defaults.

    An entry that is written in one list leaves the other one's default.
    """
    written, ambiguous = (values.get(name, (DEFAULT,)) for name in ("release_statuses", "ambiguous_statuses"))
    direct = (DIRECT_STATUS,) if upstream is not None and upstream.direct else ()
    release = _expanded((*settings.release_statuses, *direct), RELEASE_STATUSES, ())
    release = _expanded(written, release, ambiguous)
    return Statuses(
        release,
        _expanded(ambiguous, AMBIGUOUS_STATUSES, release),
        frozenset(name.lower().encode() for name in upstream.via) if upstream is not None else frozenset(),
        values.get("upstream_idempotent", False),
        values.get("protocol") == "json-rpc",
    )


def _expanded(entries: Iterable[str], default: Iterable[str], other: Iterable[str]) -> list[str]:
    """Return a list's entries with those of its default in their place, but for those in the `other` list."""
    default = [entry for entry in default if entry not in other]
    return [one for entry in entries for one in (default if entry == DEFAULT else (entry,))]


def guarded_methods(values: Mapping[str, Any], settings: Settings) -> frozenset[str]:
    """Return the methods that a rule guards. Those of its own `methods` field also choose its requests."""
    if values.get("guard") == "off":
        return frozenset()
    return frozenset(values["methods"]).intersection(GUARDABLE) if "methods" in values else frozenset(settings.methods)


def _scope(sources: Iterable[Source]) -> dict[str, Any]:
    """Return the policy's fields for a scope: all names in order, and the sources that are not header fields."""
    # In the order of the rule, because the order enters the digest of the tenant.
    names = [source.kind.name if isinstance(source.kind, Header) else source.text.encode() for source in sources]
    others = tuple(source for source in sources if not isinstance(source.kind, Header))
    return {"scope_headers": tuple(names), "scope_sources": others}
