"""Warns of rules that take one event for two receivers as the same: neither key nor fingerprint tells them apart. Pure.

The id of an event names the event, not its delivery. A sender with two webhooks sends the same id to both.
"""

from collections.abc import Iterator
from itertools import combinations

from oncegate.keys.sources import Derived, Receiver, Segment, Source
from oncegate.rules.model import Rule, Rules


def receiver_warnings(rules: Rules) -> Iterator[str]:
    """Yield a warning for each rule, and each pair of rules, that would swallow the event of a second receiver."""
    blind = [rule for rule in rules.rules if rule.policy.methods and not _tells_receivers(rule)]
    for rule in blind:
        if rule.match.path is None or "*" in rule.match.path:
            yield (
                f'rule "{rule.name}" matches several paths, and neither its key nor its fingerprint has the path: '
                f'an event with one id on two paths is executed once. Add "receiver" to its key.'
            )
    for one, other in combinations(blind, 2):
        if one.policy.namespace == other.policy.namespace and not _joined_names(one).isdisjoint(_joined_names(other)):
            yield (
                f'rules "{one.name}" and "{other.name}" share the namespace "{one.policy.namespace.decode()}", and '
                "neither their keys nor their fingerprints have the path: an event with one id for both is executed "
                'once. Add "receiver" to their keys, or give one of them another namespace.'
            )


def _tells_receivers(rule: Rule) -> bool:
    policy = rule.policy
    if policy.fingerprint is None or "target" in policy.fingerprint:
        return True
    return all(any(isinstance(source.kind, Receiver | Segment | Derived) for source in one) for one in _keys(rule))


def _keys(rule: Rule) -> tuple[tuple[Source, ...], ...]:
    sources = rule.policy.sources
    # A key that is one header alone has no sources.
    return ((),) if sources is None else sources.alternatives


def _joined_names(rule: Rule) -> set[tuple[bytes, ...]]:
    """Return the names of the parts that each alternative of a key joins. Keys of other names never equal."""
    return {tuple(sorted(source.name for source in alternative)) for alternative in _keys(rule)}
