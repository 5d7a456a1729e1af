"""What oncegate answers itself on the public listener, by the rules in effect."""

from oncegate.gateway.routes import Routes
from oncegate.gateway.streams.address import Addresses, Purpose
from oncegate.gateway.streams.own import OwnPaths
from oncegate.gateway.streams.reading import read
from oncegate.gateway.streams.stopping import stop
from oncegate.keys.digests import Digests
from oncegate.rules.model import Rule, Rules
from oncegate.settings.settings import Settings
from oncegate.streams.capability import CANCEL, READ, Capabilities, rule_mark
from oncegate.streams.links import Links
from oncegate.streams.own_path import STREAMS, OwnPath

PURPOSES = {READ: Purpose(("GET", "HEAD"), read), CANCEL: Purpose(("DELETE",), stop)}


def own_paths(settings: Settings, rules: Rules, routes: Routes) -> OwnPaths | None:
    """Return what is answered below the own path, None where no rule uses it."""
    if not any(rule.policy.uses_own_path for rule in rules):
        return None
    addresses = Addresses(_capabilities(settings), routes, PURPOSES)
    return OwnPaths(OwnPath(settings.own_path), {STREAMS: addresses.answer})


def links_of(settings: Settings, rule: Rule) -> Links | None:
    """Return the links to the addresses that a rule gives away, None for none."""
    policy = rule.policy
    if not (policy.resumable or policy.cancellable):
        return None
    base = "" if settings.public_base is None else str(settings.public_base)
    return Links(
        _capabilities(settings),
        OwnPath(settings.own_path),
        base.encode(),
        rule_mark(rule.name),
        policy.retention_ms,
        policy.resumable,
        policy.cancellable,
    )


def _capabilities(settings: Settings) -> Capabilities:
    return Capabilities(Digests(settings.secret.get_secret_value().encode()).capability_key)
