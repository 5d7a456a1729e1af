"""What oncegate answers itself on the public listener, by the rules in effect."""

from collections.abc import Callable, Iterable

from oncegate.gateway.routes import Routes
from oncegate.gateway.streams.address import Addresses, Purpose
from oncegate.gateway.streams.asking import Asking
from oncegate.gateway.streams.later import come_for
from oncegate.gateway.streams.own import Answer, OwnPaths
from oncegate.gateway.streams.reading import read
from oncegate.gateway.streams.stopping import stop
from oncegate.keys.digests import Digests
from oncegate.messages.admission import Admission
from oncegate.rules.model import Rule, Rules
from oncegate.settings.settings import Settings
from oncegate.streams.capability import CANCEL, LATER, READ, Capabilities, rule_mark
from oncegate.streams.links import Links
from oncegate.streams.own_path import KEYS, STREAMS, OwnPath

PURPOSES = {
    READ: Purpose(lambda policy: policy.resumable, ("GET", "HEAD"), read),
    CANCEL: Purpose(lambda policy: policy.cancellable, ("DELETE",), stop),
    LATER: Purpose(lambda policy: policy.respond_async, ("GET", "HEAD"), come_for),
}


def own_paths(settings: Settings, rules: Rules, routes: Routes, admission: Admission) -> OwnPaths:
    """Return what is answered below the own path.

    It stays reserved once it was: no address that a former rule gave away reaches an API, or a log.
    """
    addresses = Addresses(_capabilities(settings), routes, PURPOSES)
    answers: dict[bytes, Answer] = {STREAMS: addresses.answer}
    if asking := [rule.policy.adaptation.cors for rule in rules if rule.policy.asks]:
        cors = tuple(one for one in asking if one is not None)
        answers[KEYS] = Asking(admission, routes, _digests(settings), cors).answer
    return OwnPaths(OwnPath(settings.own_path), answers)


def links_of(settings: Settings, rule: Rule) -> Links | None:
    """Return the links to the addresses that a rule gives away, None for none."""
    policy = rule.policy
    if not (policy.resumable or policy.cancellable or policy.respond_async):
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


def digest_body_of(settings: Settings, rule: Rule) -> Callable[[Iterable[bytes]], bytes] | None:
    """Return what digests the bodies of a rule's requests for who asks about them, None where nobody may."""
    return _digests(settings).body if rule.policy.keeps_body_digest else None


def _capabilities(settings: Settings) -> Capabilities:
    return Capabilities(_digests(settings).capability_key)


def _digests(settings: Settings) -> Digests:
    return Digests(settings.secret.get_secret_value().encode())
