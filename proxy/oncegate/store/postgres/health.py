"""The health of the database: whether it still has what it acknowledged, who else uses it, and how much room is left.

A primary is inspected before the first claim, and every HEALTH_S seconds. What the inspection writes is as durable as a
claim, so what it finds missing shows that claims may be missing as well.

- `epoch` names the data set. If it is gone or has changed, everything is lost. It also has the end of the quarantine.
- `proxy` has a counter of each proxy. The latest writes are lost first, so a counter that went back shows that
  acknowledged writes are lost: a database was restored, or a standby without them was promoted.
  It also has the settings and the rules by which the proxy names keys.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from oncegate.store.membership import HEALTH_S, RULES_DIFFER, Agreement, Losses, Membership
from oncegate.store.postgres.connections.durability import Durability
from oncegate.store.postgres.connections.facts import Run
from oncegate.store.postgres.connections.session import Answer, Refused, Session
from oncegate.store.results import ClaimsSuspended, Forbidden, StoreEvent, StoreFull, Unconfirmed

# How long the store counts as full after it refused a write for want of room.
FULL_S = 2.5 * HEALTH_S
# How often the room is measured.
ROOM_S = 10.0
# Below so many days of partitions ahead, operators are warned.
FEW_DAYS = 14
# The classes of errors that say that there is no room, and of those that pass by themselves: conflicts, locks, cancels.
NO_ROOM, PASSING = "53", ("40", "55", "57")
_INSPECT = "SELECT * FROM inspect_1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
_ASK_ROOM = """
SELECT coalesce(sum(pg_total_relation_size(oid)) FILTER (WHERE relkind = 'r'), 0)::bigint AS bytes,
       partition_days_left('audit') AS days
FROM pg_class WHERE relnamespace = current_schema()::regnamespace
"""
WRITE_MODES = {"ask": 1, "found": 2, "accept": 3}


class Verdict(NamedTuple):
    """What an inspection found. `agreement`: a reply for `Agreement`. `before`: the counter before, None for none."""

    agreement: Sequence[bytes]
    rules_differ: bool
    is_founded: bool
    is_moved: bool
    epoch: bytes
    left_ms: int
    before: int | None


class Health:
    """Watches one database on behalf of one proxy. Without a `member`, only its room."""

    def __init__(self, member: Membership | None, durability: Durability, max_bytes: int) -> None:
        self._member, self._durability, self._max_bytes = member, durability, max_bytes
        self._agreement = Agreement(member) if member else None
        self._losses = Losses()
        self._clock = asyncio.get_running_loop().time
        # What the database had when it was last inspected.
        self._epoch, self._run = b"", b""
        self._counter, self._counter_written_s = 0, 0.0
        # Why what shows losses and other proxies cannot be asked for.
        self._unwatched = ""
        self._full_until = self._room_asked_at = float("-inf")
        self.memory_ratio = 0.0
        self._days: int | None = None

    # What is known ...

    def not_ready_reason(self) -> str | None:
        """Return why this database cannot be relied on, or None."""
        if self._agreement and self._agreement.differs:
            return f"this proxy names keys in another way than others on this store ({self._agreement.differs})"
        if self._unwatched:
            return self._unwatched
        if reason := self._losses.not_ready_reason():
            return reason
        return "the store is full: first-time keys are refused" if self.is_full else None

    def notice(self) -> str | None:
        """Return what an operator should look at though the store works, or None."""
        if lost := self._losses.notice():
            return lost
        if self.rules_differ:
            return RULES_DIFFER
        if self._days is not None and self._days < FEW_DAYS:
            return f"the audit trail has partitions for {self._days} more days: run `oncegate migrate --maintain`"
        return None

    @property
    def rules_differ(self) -> bool:
        """Whether other proxies have named keys by other rules for a while."""
        return self._agreement is not None and self._agreement.rules_differ

    @property
    def quarantine_left_s(self) -> float:
        return self._losses.quarantine_left_s

    @property
    def is_full(self) -> bool:
        """Whether first-time keys are refused for want of room."""
        return self.memory_ratio >= 1 or self._clock() < self._full_until

    def note_refusal(self, refusal: StoreFull | Forbidden) -> None:
        """Note that the server refused a claim. Inspections find out when that has changed."""
        if isinstance(refusal, StoreFull):
            self._full_until = self._clock() + FULL_S

    def refusal(self) -> Unconfirmed | None:
        """Return why first-time keys are refused now, or None."""
        if self._agreement and self._agreement.differs:
            return ClaimsSuspended("this proxy names keys in another way than others")
        if self._unwatched:
            return ClaimsSuspended(self._unwatched)
        if self.memory_ratio >= 1:
            return StoreFull("the store is full")
        return self._losses.suspended()

    # Inspections ...

    async def inspect(self, session: Session) -> bool:
        """Inspect the database over a session of the claims' level, and return whether it is known now what it has.

        Raises Lost.
        """
        member, agreement = self._member, self._agreement
        if member is None or agreement is None:
            return True
        run = session.facts.run
        try:
            answer = await self._ask(session, member, agreement, begins_quarantine=False)
            verdict = self._note(answer, agreement)
            if answer.is_below:
                return False
            loss = self._loss(verdict, member, self._describe(run))
            if loss is not None:
                self._losses.report(member, loss)
                rolled_back = loss is StoreEvent.ROLLED_BACK
                if member.quarantine_ms and (rolled_back or not self.quarantine_left_s):
                    self._note(await self._ask(session, member, agreement, begins_quarantine=True), agreement)
        except Refused as error:
            self._note_refused(error)
            return False
        self._unwatched = ""
        return True

    def _note_refused(self, error: Refused) -> None:
        if error.sqlstate.startswith(NO_ROOM):
            self._full_until = self._clock() + FULL_S
        elif not error.sqlstate.startswith(PASSING):
            # Nothing is claimed while the store does not say what it lost, or who else uses it.
            self._unwatched = f"the store's tables for losses and other proxies cannot be used: {error.reason}"

    async def _ask(self, session: Session, member: Membership, agreement: Agreement, begins_quarantine: bool) -> Answer:
        rules, _, live_ms = agreement.asked_rules()
        return await session.run(
            _INSPECT,
            member.token_prefix,
            member.proxy_name.encode(),
            self._counter + 1,
            member.retention_ms,
            agreement.identity.encode(),
            member.identity_text.encode(),
            WRITE_MODES[agreement.write_mode()],
            rules.encode(),
            live_ms,
            b"%s-%d" % (member.token_prefix.hex().encode(), self._counter),
            self._describe(session.facts.run),
            member.quarantine_ms,
            begins_quarantine,
        )

    def _describe(self, run: Run) -> bytes:
        """Return a name of the run of a server: another run may lack the last writes. Empty where it cannot."""
        if self._durability.is_replicated:
            return b""
        booted = run.booted.isoformat() if self._durability.is_memory else ""
        return f"{run.system}-{run.timeline}{booted}".encode()

    def _note(self, answer: Answer, agreement: Agreement) -> Verdict:
        """Note what does not depend on what was known before."""
        (row,) = answer.rows
        verdict = Verdict(**dict(row))
        agreement.note_identity(list(verdict.agreement))
        agreement.note_rules([b"differ" if verdict.rules_differ else b"same"])
        self._losses.note_quarantine(verdict.left_ms)
        return verdict

    def _loss(self, verdict: Verdict, member: Membership, run: bytes) -> StoreEvent | None:
        """Return the loss that a verdict shows beside what was known, and keep what it says for the next one."""
        (epoch, run_before), (self._epoch, self._run) = (self._epoch, self._run), (verdict.epoch, run)
        counter, now_s = self._counter, time.clock_gettime(time.CLOCK_BOOTTIME)
        # Rows of proxies are removed once they are old.
        expired = verdict.before is None and now_s - self._counter_written_s > 0.9 * member.retention_ms / 1000
        self._counter, self._counter_written_s = counter + 1, now_s
        if epoch and epoch != verdict.epoch:
            return StoreEvent.FLUSHED
        if counter > (verdict.before or 0) and not expired:
            return StoreEvent.ROLLED_BACK
        if verdict.is_moved or (run_before and run_before != run):
            return StoreEvent.MOVED
        return StoreEvent.FOUNDED if verdict.is_founded else None

    async def measure(self, session: Session) -> None:
        """Measure the room, if it was not measured lately. Raises Lost and Refused."""
        self._room_asked_at = self._clock()
        ((size, self._days),) = (await session.run(_ASK_ROOM)).rows
        self.memory_ratio = size / self._max_bytes if self._max_bytes else 0.0

    @property
    def is_room_old(self) -> bool:
        """Whether the room was not measured lately."""
        return self._clock() - self._room_asked_at > ROOM_S
