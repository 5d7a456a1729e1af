"""Which host of a store is its primary, by what all of them say. Pure.

A former primary goes on taking writes after a standby was promoted, so the host that answers first may be wrong. The
timeline of a promoted server is higher.
"""

from collections.abc import Sequence
from typing import NamedTuple

from oncegate.store.postgres.connections.facts import Facts, Run
from oncegate.store.postgres.connections.hosts import Host


class Sighting(NamedTuple):
    """What one host said last.

    `facts`: None where it could not be asked; `reason`: why it cannot be asked now, or empty. `is_known`: the host was
    chosen over the same connection before, so nothing can have happened to it in between.
    """

    host: Host
    facts: Facts | None
    reason: str = ""
    is_known: bool = False


class Choice(NamedTuple):
    """`at`: the place of the primary among the hosts, or None. `reason`: why there is none, for operators.

    `is_refused`: a server would take writes, and must not be given any.
    """

    at: int | None
    reason: str = ""
    is_refused: bool = False


def choose(sightings: Sequence[Sighting], known: Run | None, current: int | None, is_replicated: bool) -> Choice:
    """Return the primary. `known`: the run of the last one, and `current` its place."""
    primaries = [at for at, one in enumerate(sightings) if one.facts and not one.facts.is_standby]
    if not primaries:
        return Choice(None, _unreachable(sightings))
    runs = {at: _run(sightings[at]) for at in primaries}
    if len({run.system for run in runs.values()}) > 1:
        return Choice(None, "the hosts of the store's URL have different databases", is_refused=True)
    timeline = max(run.timeline for run in runs.values())
    newest = [at for at in primaries if runs[at].timeline == timeline]
    if len(newest) > 1 and is_replicated:
        names = " and ".join(str(sightings[at].host) for at in newest)
        return Choice(None, f"{names} both take writes on timeline {timeline}: stop one of them", is_refused=True)
    at = current if current in newest else newest[0]
    if known is not None and runs[at].system == known.system and (silent := _silent(sightings)):
        if timeline < known.timeline:
            reason = f"{sightings[at].host} is on timeline {timeline}, before the last primary's {known.timeline}"
            return Choice(None, f"{reason}, and {silent}", is_refused=True)
        if is_replicated and timeline == known.timeline and not sightings[at].is_known:
            reason = f"a host may have been promoted while {sightings[at].host} was not connected"
            return Choice(None, f"{reason}, and {silent}", is_refused=True)
    return Choice(at)


def _run(sighting: Sighting) -> Run:
    assert sighting.facts is not None
    return sighting.facts.run


def _silent(sightings: Sequence[Sighting]) -> str:
    """Return which hosts cannot be asked, with the reason, or empty."""
    return "; ".join(f"{one.host} cannot be asked: {one.reason}" for one in sightings if one.reason)


def _unreachable(sightings: Sequence[Sighting]) -> str:
    reasons = [one.reason or "this is a standby, which takes no writes" for one in sightings]
    named = "; ".join(f"{one.host}: {reason}" for one, reason in zip(sightings, reasons, strict=True))
    return f"the store is not reachable: {named}"
