"""What there is around one key: its record, its owners and what an operator saw; and what must hold of it."""

from typing import NamedTuple

from tests.model import rules
from tests.model.rules import ABSENT, COMPLETE, IN_FLIGHT, NOBODY, RELEASED, TORN, UNKNOWN, Record

PROMISES = {
    "twice": "an execution begins though one was under `hold` or cancelled, not declined, not released by an operator",
    "differ": "two complete answers that were delivered differ",
    "unbacked": "an owner delivers its own answer as complete and the record does not hold it",
    "zombie": "a write of somebody who is not the owner changes the record",
    "final": "a complete record changes",
    "robbed": "a claim takes a key away whose lease runs",
    "unchecked": "a claim takes over a record that was not the one looked at",
    "lapsed send": "something is sent for a claim whose lease passed and whose key is another's",
    "itself": "an owner is refused a key because of its own claim",
    "torn": "a record is complete and lacks a piece",
    "stray": "a key is taken by a claim whose client was told that nothing was sent",
    "stuck": "a key stays in flight whatever time passes",
    "astray": "a claim is cancelled, and the cancel was meant for another one",
    "taken back": "somebody is told that a request was stopped, and later gets its answer",
    "mixed": "a reader that follows an answer gets bytes of two executions",
    "overruled": "a verdict changes the record of a living owner, of another claim, or of a request that was stopped",
    "freed early": "a verdict frees a key whose request was executed, or may be yet",
    "made up": "a verdict says that a request was executed, and none was",
    "denied": "somebody who asks is told that there is nothing, and an execution counts",
}
# An owner's way. While it is at one of the active places its leases are renewed.
ABOUT_TO_COME, CLAIMING, REPEATING, FOUND_FREE = "about to come", "claiming", "claiming again", "found the key free"
CLAIMED, STALE, SENT, STREAMING, STREAMED, HUNG = "claimed", "stale", "sent", "streaming", "streamed", "hung"
GIVEN_UP, WITHDRAWING, WITHDRAWN, TOLD, ENDED, DEAD = "given up", "withdrawing", "withdrawn", "told", "ended", "dead"
HOW = tuple(rules.HOW)
ACTIVE = {CLAIMED, STALE, SENT, STREAMING, STREAMED, *HOW}
LATE = {WITHDRAWING, WITHDRAWN}  # where a claim's deadline is over for sure
LEFT = {TOLD, WITHDRAWN}  # who says that nothing was sent


class Owner(NamedTuple):
    """One attempt of a client, with a token of its own. An owner that settles is at the place of its settle."""

    place: str = ABOUT_TO_COME
    seen: int = NOBODY  # the token of the record that it found open
    claim_copy: int = -1  # a claim that is still on its way, with what it had seen
    settle_copy: str = ""  # a settle that is still on its way
    counts: bool = False  # executed under hold or cancelled, not declined, not released by an operator
    freed: bool = False  # an operator ended its claim
    resent: bool = False  # took a key over to send its request once more
    coming: bool = False  # its request is on its way to the API, or the API does not show it yet


class Api(NamedTuple):
    """What the API knows of the key, and what time says of that."""

    done: bool = False  # it shows that it has executed a request
    waited: bool = False  # so long since the last byte that nothing can come any more
    old: bool = False  # so long since the first claim that nobody relies on it any more
    forgotten: bool = False  # it knows nothing of the key
    glitched: bool = False  # it has said once that there is nothing, against what it knows


class Probe(NamedTuple):
    """How far somebody is who asks the API."""

    token: int = NOBODY  # of the claim that was looked at
    agreed: bool = False  # the API has said once that there is nothing, and that counts
    verdict: str = ""  # answer or release, not settled yet
    stale: bool = False  # the claim's owner was back since


class World(NamedTuple):
    owners: tuple[Owner, ...]
    record: Record = Record()
    operator: int = NOBODY  # the token that the operator saw; OPERATOR: has acted
    truth: int = NOBODY  # whose answer was the first to be delivered
    note: int = NOBODY  # the token that a cancel names; it stays, because a note may come late and twice
    stopped: int = NOBODY  # of whose claim somebody was told that it was stopped
    follower: int = NOBODY  # the token whose answer a reader follows; OPERATOR: has its end, or was broken off
    api: Api = Api()
    probe: Probe = Probe()


class Step(NamedTuple):
    story: str
    world: World
    certain: bool = False
    broken: str = ""


class Setting(NamedTuple):
    """Who takes part, and what can happen."""

    modes: tuple[str, ...]
    operator: bool = False
    streams: bool = False
    lost_claims: bool = False  # their replies get lost, and they may arrive late
    late_settles: bool = False
    hangs: bool = False
    cancels: bool = False
    joins: bool = False  # a reader follows an answer while it comes
    asks: bool = False  # somebody asks what became of the key
    api: bool = False  # requests are on their way for a while
    forgets: bool = False  # the API forgets keys, and says once that there is nothing, against what it knows
    reconciles: bool = False  # somebody asks the API, and settles keys by its verdicts
    lands_late: bool = False  # a claim may take the key after its deadline, until the server has ended it


def put(world: World, me: int, owner: Owner, place: str | None = None, **more: object) -> World:
    """Return the world with an owner at another place."""
    moved = owner._replace(**({"place": place} if place else {}), **more)
    return world._replace(owners=(*world.owners[: me - 1], moved, *world.owners[me:]))


def deliver(world: World, answer: int, own: bool = False) -> tuple[World, str]:
    """Return the world in which an answer arrived whole, and what that broke."""
    if world.truth not in (NOBODY, answer):
        return world, "differ"
    if world.stopped == answer:
        return world, "taken back"
    backed = world.record.state == COMPLETE and world.record.answer == answer
    return world._replace(truth=answer), "unbacked" if own and not backed else ""


def taken(before: Record, after: Record, me: int, seen: int) -> str:
    """Return what a claim broke."""
    if after.token != me or before.token == me or before.state in (ABSENT, RELEASED):
        return ""
    if before.state == COMPLETE:
        return "final"
    return "robbed" if before.lease else "unchecked" if before.token != seen else ""


def written(before: Record, after: Record, me: int) -> str:
    """Return what a write of `me` broke."""
    if after == before:
        return ""
    if before.state == COMPLETE:
        return "final"
    if after.body == TORN:
        return "torn"
    return "zombie" if before.token not in (NOBODY, me) or before.state == RELEASED else ""


def by_itself(record: Record, me: int) -> str:
    """Return what was broken where a claim of `me` is told what stands there."""
    return "itself" if record.state == IN_FLIGHT and record.token == me else ""


def at_rest(world: World) -> str:
    """Return what is broken where time brings nothing more."""
    record = world.record
    if record.lease:
        return "stuck"
    taken = record.state in (IN_FLIGHT, UNKNOWN) and world.owners[record.token - 1].place in LEFT
    return "stray" if taken else ""
