"""One key: what its owners, the API behind, an operator, the network and time can do next.

A step is what is atomic in reality (one script, one write); between two steps of one owner anything may happen.
`certain` steps come with time; all others are chance: faults, pauses, an operator. So what holds where no certain step
is left holds once the faults stop.
"""

from collections.abc import Callable, Iterator

from tests.model import rules
from tests.model.rules import (
    ABSENT,
    CANCELLED,
    COMPLETE,
    ENDINGS,
    HOLD,
    IN_FLIGHT,
    LAPSED,
    NOBODY,
    OPERATOR,
    RESEND,
    UNKNOWN,
    WHOLE,
    Record,
)
from tests.model.world import (
    ABOUT_TO_COME,
    ACTIVE,
    CLAIMED,
    CLAIMING,
    DEAD,
    ENDED,
    FOUND_FREE,
    GIVEN_UP,
    HOW,
    HUNG,
    LATE,
    REPEATING,
    SENT,
    STALE,
    STREAMED,
    STREAMING,
    TOLD,
    WITHDRAWING,
    WITHDRAWN,
    Owner,
    Probe,
    Setting,
    Step,
    World,
    by_itself,
    deliver,
    put,
    taken,
    written,
)


class Key:
    """One key under the rules, less the safeguards in `cut`. `calls` are all calls of the store's verbs."""

    def __init__(self, setting: Setting, cut: rules.Cut) -> None:
        self.setting, self.cut = setting, cut
        self.calls: dict[tuple[object, ...], rules.Done] = {}
        self.ways: dict[str, Callable[[World, int, Owner], Iterator[Step]]] = {
            ABOUT_TO_COME: self._comes, CLAIMING: self._claims, REPEATING: self._claims, FOUND_FREE: self._takes,
            CLAIMED: self._sends, STALE: self._claims_again, SENT: self._hears, STREAMING: self._appends,
            STREAMED: self._hears_the_end, GIVEN_UP: self._waits, WITHDRAWING: self._withdraws,
            **dict.fromkeys(HOW, self._settles),
        }  # fmt: skip

    def steps(self, world: World) -> Iterator[Step]:
        """Return what can happen next."""
        for me, owner in enumerate(world.owners, 1):
            if owner.place in self.ways:
                yield from self.ways[owner.place](world, me, owner)
            yield from self._chance(world, me, owner)
        yield from self._time(world)
        if self.setting.operator:
            yield from self._operates(world)
        if self.setting.cancels:
            yield from self._cancels(world)
        if self.setting.joins:
            yield from self._follows(world)
        if self.setting.asks:
            yield from self._asks(world)
        if self.setting.api:
            yield from self._behind(world)
        if self.setting.reconciles:
            yield from self._reconciles(world)

    def _call(self, verb: str, *args: object) -> rules.Done:
        if (verb, *args) not in self.calls:
            self.calls[verb, *args] = getattr(rules, verb)(*args, self.cut)
        return self.calls[verb, *args]

    def _mode(self, me: int) -> str:
        mode = self.setting.modes[me - 1]
        return HOLD if mode == RESEND else mode

    def _claim_mode(self, me: int, owner: Owner, seen: int) -> str:
        return RESEND if owner.resent and seen != NOBODY else self._mode(me)

    # Claiming ...

    def _comes(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        # Equal owners come in their order: which of them is the first makes no difference.
        if me == 1 or world.owners[me - 2].place != ABOUT_TO_COME:
            yield Step(f"{me} comes", put(world, me, owner, CLAIMING))

    def _claims(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        word, record = self._call("claim", world.record, me, self._claim_mode(me, owner, owner.seen), owner.seen, False)
        after, broken = world._replace(record=record), taken(world.record, record, me, owner.seen)
        then = REPEATING if owner.place == CLAIMING else self._given_up(owner)
        if word == "claimed":
            if "ATOMIC" in self.cut and world.record.token != me:
                yield Step(f"{me} finds the key free", put(world, me, owner, FOUND_FREE), certain=True)
                return
            yield Step(f"{me} claims", put(after, me, owner, CLAIMED, freed=False), True, broken)
            if self.setting.lost_claims:
                yield Step(f"{me} claims; the reply is lost", put(after, me, owner, then), broken=broken)
        else:
            yield from self._frees_what_was_given_up(world, me, owner)
            step = self._is_told(world, me, owner)
            yield step._replace(broken=step.broken or by_itself(world.record, me))
        if self.setting.lost_claims and owner.claim_copy < 0:
            copy = put(world, me, owner, then, claim_copy=owner.seen)
            yield Step(f"the claim of {me} does not arrive in time", copy)

    def _is_told(self, world: World, me: int, owner: Owner) -> Step:
        record = world.record
        if rules.is_open(record, self._mode(me), self.cut) and record.token != owner.seen:
            return Step(f"{me} finds the key open", put(world, me, owner, CLAIMING, seen=record.token), certain=True)
        if self._may_resend(world, me, owner):
            after = put(world, me, owner, CLAIMING, seen=record.token, resent=True)
            return Step(f"{me} finds what its API recognizes", after, certain=True)
        may_stand = (owner.place == REPEATING or owner.claim_copy >= 0) and "COPIES_WITHDRAWN" not in self.cut
        told = ENDED if owner.resent else TOLD
        return self._delivers_the_record(world, me, owner, self._given_up(owner) if may_stand else told)

    def _may_resend(self, world: World, me: int, owner: Owner) -> bool:
        """Return whether a request is sent once more: one that its API recognizes by its key."""
        record, modes = world.record, self.setting.modes
        if owner.resent or modes[me - 1] != RESEND or not rules.is_over(record) or record.mode != HOLD:
            return False
        same = modes[record.token - 1] == RESEND or "RESEND_OF_SAME" in self.cut
        return same and (not world.api.old or "RESEND_IN_TIME" in self.cut)

    def _given_up(self, owner: Owner) -> str:
        """Return where an owner is whose claim was not confirmed. One of a resend ends with its lease."""
        return ENDED if owner.resent and "RESEND_STAYS" not in self.cut else GIVEN_UP

    def _frees_what_was_given_up(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        """At the same worker: it knows that nothing was sent for the claim that stands there."""
        token = world.record.token
        stands = world.record.state in (IN_FLIGHT, UNKNOWN) and token not in (me, owner.seen)
        if stands and world.owners[token - 1].place in (GIVEN_UP, WITHDRAWING):
            _, record = self._call("settle", world.record, token, self._mode(token), "release")
            after = put(world._replace(record=record), me, owner, CLAIMING, seen=token)
            yield Step(f"{me} frees what {token} has given up", after)

    def _takes(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        record = Record(IN_FLIGHT, me, self._mode(me), lease=True)
        yield Step(f"{me} claims", put(world._replace(record=record), me, owner, CLAIMED), certain=True)

    def _waits(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        """503: nothing was sent. The claim may be in the store, or may yet get there."""
        if "WITHDRAWN_AT_ALL" in self.cut:
            yield Step(f"{me} has given up", put(world, me, owner, WITHDRAWN), certain=True)
            return
        if "WITHDRAWN_LATE" in self.cut:
            yield from self._withdraws(world, me, owner)
        yield Step(f"the deadline of {me}'s claim is over", put(world, me, owner, WITHDRAWING), certain=True)

    def _withdraws(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        _, record = self._call("settle", world.record, me, self._mode(me), "release")
        if self.setting.lands_late and owner.claim_copy >= 0 and "ENDED_FIRST" not in self.cut:
            if record != world.record:
                yield Step(f"{me} frees what has landed", world._replace(record=record))
            yield Step(f"the server ends the claim of {me}", put(world, me, owner, claim_copy=-1), certain=True)
            return
        place = WITHDRAWN if owner.place == WITHDRAWING else TOLD
        yield Step(f"{me} withdraws its claim", put(world._replace(record=record), me, owner, place), certain=True)

    def _claims_again(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        """A claim that is older than half a lease is asked for again before anything is sent."""
        if "CLAIMED_AGAIN" in self.cut:
            yield from self._sends(world, me, owner)
            return
        released = self._frees(owner, "release")
        if owner.resent and world.api.old and "RESEND_IN_TIME" not in self.cut:
            yield Step(f"the API knows the key of {me} no more", put(world, me, owner, released), certain=True)
            return
        word, record = self._call("claim", world.record, me, self._mode(me), NOBODY, False)
        after, ours = world._replace(record=record), word == "claimed"
        place = CLAIMED if ours else released
        broken = "" if ours else by_itself(world.record, me)
        told = put(after, me, owner, place, freed=owner.freed and not ours)
        yield Step(f"{me} claims again: {word}", told, True, broken)
        if self.setting.lost_claims:
            yield Step(f"{me} claims again; the reply is lost", put(after, me, owner, released))
            if owner.claim_copy < 0:
                copy = put(world, me, owner, released, claim_copy=NOBODY)
                yield Step(f"the second claim of {me} does not arrive in time", copy)

    # The exchange ...

    def _sends(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        counted = [number for number, one in enumerate(world.owners, 1) if number != me and one.counts]
        earlier = not all(self._recognizes(world, me, number) for number in counted)
        broken = "twice" if earlier and not owner.freed else ""
        if not owner.freed and world.record.token != me:
            broken = broken or "lapsed send"
        sent = put(world, me, owner, SENT, counts=self._mode(me) == HOLD and not owner.freed, coming=self.setting.api)
        yield Step(f"{me} sends", sent._replace(api=world.api._replace(waited=False)), True, broken)
        yield Step(f"{me} reaches nobody", put(world, me, owner, self._frees(owner, ENDINGS["not_sent"])))
        if "UNSENT_STAYS" in self.cut:
            yield Step(f"{me} is cancelled before it sends", put(world, me, owner, "release", counts=True))
        else:
            yield from self._is_cancelled(world, me, owner)

    def _recognizes(self, world: World, me: int, other: int) -> bool:
        """Return whether the API takes the request of `me` for that of `other`."""
        return self.setting.modes[me - 1] == self.setting.modes[other - 1] == RESEND and not world.api.forgotten

    def _frees(self, owner: Owner, how: str) -> str:
        """Return how a claim is settled that would be released: one of a resend keeps its key."""
        return ENDINGS["no_response"] if owner.resent and "RESEND_KEEPS" not in self.cut else how

    def _hears(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        lost = "release" if "LOST_IS_UNKNOWN" in self.cut else ENDINGS["no_response"]
        yield Step(f"{me} gets no answer", put(world, me, owner, lost), certain=True)
        if owner.coming or not self.setting.api:
            place = self._frees(owner, ENDINGS["declined"])
            yield Step(f"{me} is declined", put(world, me, owner, place, counts=False, coming=False))
        if not self.setting.api or (world.api.done and not owner.coming):
            yield self._has_all(world, me, owner, ENDINGS["complete"])
        yield from self._is_cancelled(world, me, owner)
        if self.setting.streams:
            yield self._has_all(world, me, owner, ENDINGS["too_large"])
            yield Step(f"{me} gets the first piece", put(world, me, owner, STREAMING))

    def _is_cancelled(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        """By its own process, or by a note from another one; where notes name keys alone, by any of them."""
        if self.setting.cancels:
            yield Step(f"{me} is cancelled", put(world, me, owner, ENDINGS["cancelled"]))
            if "NOTE_NAMES_CLAIM" in self.cut and world.note not in (NOBODY, me):
                yield Step(f"{me} finds the note", put(world, me, owner, ENDINGS["cancelled"]), broken="astray")

    def _appends(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        word, record = self._call("append", world.record, me)
        after = world._replace(record=record)
        yield from self._is_cancelled(world, me, owner)
        place = {"appended": STREAMED, "absent": "bare", "torn": "bare"}.get(word, ENDINGS["truncated"])
        yield Step(f"{me} appends: {word}", put(after, me, owner, place), True, written(world.record, record, me))
        yield Step(f"{me} appends; the reply is lost", after)

    def _hears_the_end(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        yield Step(f"the answer to {me} breaks off", put(world, me, owner, ENDINGS["truncated"]), certain=True)
        yield from self._is_cancelled(world, me, owner)
        yield self._has_all(world, me, owner, "stream")

    def _has_all(self, world: World, me: int, owner: Owner, how: str) -> Step:
        after, broken = put(world, me, owner, how), ""
        if "WITHHELD" in self.cut:
            after, broken = deliver(after, me, own=True)
        return Step(f"{me} has its whole answer", after, broken=broken)

    # Settling ...

    def _settles(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        how = owner.place
        word, record = self._call("settle", world.record, me, self._mode(me), how)
        after, broken = world._replace(record=record), written(world.record, record, me)
        if how == "cancelled" and word == "unknown":
            after = put(after, me, owner, counts=True)
        if word == "unknown" and world.record.state == IN_FLIGHT:
            after = is_back(after, me)
        settled = after.owners[me - 1]
        if word == "torn":
            yield Step(f"{me} settles {how}: torn", put(after, me, settled, "bare"), certain=True)
        else:
            ended = self._concludes(after, me, settled, word)
            yield ended._replace(broken=broken or ended.broken)
        yield Step(f"{me} settles {how}; the reply is lost", after, broken=broken)
        if self.setting.late_settles and not owner.settle_copy:
            yield Step(f"a settle of {me} is delayed", put(world, me, owner, how, settle_copy=how))
        if rules.HOW[how] == "store":
            yield Step(f"{me} is interrupted", put(world, me, owner, "unknown"))

    def _concludes(self, world: World, me: int, owner: Owner, word: str) -> Step:
        how, story = owner.place, f"{me} settles {owner.place}: {word}"
        answered = rules.HOW[how] == "store"
        own = word == "stored" or "FENCED_IS_SILENT" in self.cut
        if answered and own:
            after, broken = deliver(put(world, me, owner, ENDED), me, own=True)
            return Step(story, after, True, broken)
        if word in ("fenced", "complete") and how != "stream":  # else its client has the head of another answer
            return self._delivers_the_record(world, me, owner, ENDED)._replace(story=story)
        # A key that was freed is freed again once no claim for it can arrive any more.
        again = how == "release" and owner.claim_copy >= 0 and "COPIES_WITHDRAWN" not in self.cut
        return Step(story, put(world, me, owner, GIVEN_UP if again else ENDED), certain=True)

    def _delivers_the_record(self, world: World, me: int, owner: Owner, place: str) -> Step:
        after, broken = put(world, me, owner, place), ""
        what = rules.told(world.record)
        if world.record.state == UNKNOWN and world.record.mode == CANCELLED:
            after = after._replace(stopped=world.record.token)
        if what == "replay":
            after, broken = deliver(put(world, me, owner, ENDED if place == TOLD else place), world.record.answer)
        return Step(f"{me} gets what the record says: {what}", after, True, broken)

    # What happens to them ...

    def _chance(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        if owner.place in ACTIVE or owner.place in (GIVEN_UP, WITHDRAWING):
            yield Step(f"{me} dies", put(world, me, owner, DEAD))
        if owner.place in ACTIVE:
            yield from self._renews(world, me, owner)
        if self.setting.hangs and owner.place in (CLAIMED, SENT):
            yield Step(f"{me} hangs", put(world, me, owner, HUNG))
        if owner.claim_copy >= 0:
            late = owner.place in LATE and not self.setting.lands_late
            mode = self._claim_mode(me, owner, owner.claim_copy)
            _, record = self._call("claim", world.record, me, mode, owner.claim_copy, late)
            broken = taken(world.record, record, me, owner.claim_copy)
            after = put(world._replace(record=record), me, owner, claim_copy=-1)
            yield Step(f"an old claim of {me} arrives", after, broken=broken)
        if owner.settle_copy:
            word, record = self._call("settle", world.record, me, self._mode(me), owner.settle_copy)
            counts = owner.counts or (owner.settle_copy == "cancelled" and word == "unknown")
            after = put(world._replace(record=record), me, owner, settle_copy="", counts=counts)
            if word == "unknown" and world.record.state == IN_FLIGHT:
                after = is_back(after, me)
            yield Step(f"an old settle of {me} arrives", after, broken=written(world.record, record, me))

    def _renews(self, world: World, me: int, owner: Owner) -> Iterator[Step]:
        word, record = self._call("renew", world.record, me)
        place = CLAIMED if word == "renewed" and owner.place == STALE else owner.place
        if record != world.record or place != owner.place:
            after = put(world._replace(record=record), me, owner, place)
            yield Step(f"{me} renews", after, broken=written(world.record, record, me))

    def _time(self, world: World) -> Iterator[Step]:
        """A lease passes for sure where nobody renews it; where somebody does, by a pause."""
        record = world.record
        if not record.lease or "LEASE" in self.cut:
            return
        owner = world.owners[record.token - 1]
        renewed = owner.place in ACTIVE or (owner.place == HUNG and "RENEWED_ALIVE" in self.cut)
        after = is_back(world._replace(record=record._replace(lease=False)), record.token)
        if owner.place == CLAIMED:
            after = put(after, record.token, owner, STALE)
        yield Step(f"the lease of {record.token} passes", after, certain=not renewed)

    def _operates(self, world: World) -> Iterator[Step]:
        record, seen = world.record, world.operator
        if seen == NOBODY and record.state in (IN_FLIGHT, UNKNOWN):
            yield Step("the operator looks", world._replace(operator=record.token))
        if seen in (NOBODY, OPERATOR):
            return
        for how in ("answer", "release"):
            word, became = self._call("resolve", record, seen, how, "")
            after = world._replace(record=became, operator=OPERATOR)
            if word in ("resolved", "released"):
                after = put(after, seen, world.owners[seen - 1], counts=False, freed=True)
            broken = "final" if record.state == COMPLETE and became != record else ""
            yield Step(f"the operator says {how}: {word}", after, broken=broken)

    # Who stops it, who reads it while it comes, and who asks ...

    def _cancels(self, world: World) -> Iterator[Step]:
        """Somebody elsewhere sees whose the key is, and leaves a note for that claim."""
        record = world.record
        if world.note == NOBODY and record.state == IN_FLIGHT and record.lease:
            if "OWNER_ENDS_IT" in self.cut:
                _, became = self._call("settle", record, record.token, self._mode(record.token), "cancelled")
                yield Step("somebody marks the key cancelled", world._replace(record=became, note=record.token))
            else:
                yield Step(f"somebody leaves a note for {record.token}", world._replace(note=record.token))

    def _follows(self, world: World) -> Iterator[Step]:
        """A reader in another process looks at the record again and again, for the claim that it began with."""
        record, whose = world.record, world.follower
        if whose == NOBODY:
            if record.state == IN_FLIGHT and record.lease and record.piece == record.token:
                yield Step(f"a reader gets the beginning of {record.token}", world._replace(follower=record.token))
            return
        if whose == OPERATOR:
            return
        if "STORED_FIRST" in self.cut and world.owners[whose - 1].place == "stream":
            after, broken = deliver(world._replace(follower=OPERATOR), whose, own=True)
            yield Step(f"the reader of {whose} gets the end at once", after, broken=broken)
        word, _ = self._call_reader("follow", record, whose)
        blind = "FOLLOW_NAMES_CLAIM" in self.cut and record.state in (IN_FLIGHT, COMPLETE)
        if blind and max(record.piece, record.answer) not in (NOBODY, whose):
            yield Step(f"the reader of {whose} goes on", world._replace(follower=OPERATOR), broken="mixed")
        elif word == "found" and record.state == COMPLETE and record.body == WHOLE:
            after, broken = deliver(world._replace(follower=OPERATOR), record.answer)
            yield Step(f"the reader of {whose} gets the end", after, True, broken)
        elif word == "gone" or record.state == COMPLETE or rules.is_over(record):
            yield Step(f"the reader of {whose} is broken off", world._replace(follower=OPERATOR), certain=True)

    def _call_reader(self, verb: str, record: Record, token: int) -> rules.Done:
        if (verb, record, token) not in self.calls:
            self.calls[verb, record, token] = getattr(rules, verb)(record, token)
        return self.calls[verb, record, token]

    def _asks(self, world: World) -> Iterator[Step]:
        """Asking changes nothing; only what is said may be wrong."""
        if world.record.state == ABSENT and any(owner.counts for owner in world.owners):
            yield Step("somebody asks, and is told that there is nothing", world, broken="denied")

    # What is behind, and who asks there ...

    def _behind(self, world: World) -> Iterator[Step]:
        """Requests arrive, or never do. Time passes for who waits for that, and for what the API knows."""
        owners, api = world.owners, world.api
        for me, owner in enumerate(owners, 1):
            if owner.coming:
                executed = put(world, me, owner, coming=False)
                yield Step(f"the API executes {me}", executed._replace(api=api._replace(done=True)))
                yield Step(f"the request of {me} gets lost", put(world, me, owner, coming=False, counts=False))
        still = not any(owner.coming for owner in owners)
        if self.setting.reconciles and still and not api.waited and rules.is_over(world.record):
            yield Step("nothing can arrive any more", world._replace(api=api._replace(waited=True)))
        if not self.setting.forgets:
            return
        if not api.old:
            yield Step("nobody relies on the API any more", world._replace(api=api._replace(old=True)))
        unsent = any(owner.resent and owner.place in (CLAIMING, REPEATING, CLAIMED, STALE) for owner in owners)
        if api.old and not api.forgotten and not unsent:
            yield Step("the API forgets the key", world._replace(api=api._replace(forgotten=True)))

    def _reconciles(self, world: World) -> Iterator[Step]:
        if world.probe.verdict:
            yield self._is_settled(world)
            return
        record, api = world.record, world.api
        stopped = record.mode == CANCELLED and "VERDICT_LEAVES_STOPPED" not in self.cut
        if not rules.is_over(record) or stopped:
            return
        shown = api.done and not api.forgotten
        if shown or "OWN_REFERENCE" in self.cut:
            found = world._replace(probe=Probe(record.token, verdict="answer"))
            yield Step(f"the API shows what {record.token} has made", found)
        counts = (api.waited or "ABSENT_WAITS" in self.cut) and (not api.old or "ABSENT_IN_TIME" in self.cut)
        if counts and not (shown and (api.glitched or not self.setting.forgets)):
            before = world.probe
            agrees = before.token == record.token and before.agreed and not before.stale
            ends = agrees or "ABSENT_AGREES" in self.cut
            after = Probe(record.token, agreed=not ends, verdict="release" if ends else "")
            absent = world._replace(probe=after, api=api._replace(glitched=api.glitched or shown))
            yield Step(f"the API says that there is nothing of {record.token}", absent)

    def _is_settled(self, world: World) -> Step:
        """The verdict is about a claim, as it was when somebody looked at it."""
        record, probe = world.record, world.probe
        seen = record.token if "VERDICT_COMPARES" in self.cut else probe.token
        as_seen = UNKNOWN if record.state == UNKNOWN else LAPSED
        as_seen = "" if "VERDICT_SPARES" in self.cut else as_seen
        word, became = self._call("resolve", record, seen, probe.verdict, as_seen)
        if probe.stale and "VERDICT_AS_SEEN" not in self.cut and seen == probe.token:
            word, became = "running", record
        broken = ""
        if word in ("resolved", "released") and became != record:
            may_come = world.api.done or any(owner.coming for owner in world.owners)
            if record.token != probe.token or record.lease or record.mode == CANCELLED:
                broken = "overruled"
            elif probe.verdict == "release" and may_come:
                broken = "freed early"
            elif probe.verdict == "answer" and not world.api.done:
                broken = "made up"
        after = world._replace(record=became, probe=Probe())
        return Step(f"the verdict is {probe.verdict}: {word}", after, broken=broken)


def is_back(world: World, me: int) -> World:
    """Return the world after a lease of `me` that ended: whoever looked at its claim before that has seen another."""
    probe = world.probe
    return world._replace(probe=probe._replace(stale=True)) if probe.token == me and not probe.stale else world
