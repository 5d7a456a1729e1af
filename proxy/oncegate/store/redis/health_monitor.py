"""The health of one server: whether it is fit, how full it is, and whether it still has what it acknowledged.

A server is inspected on every new connection before anything else, and every HEALTH_S seconds after that. Managed
servers may refuse INFO; then only the keys below are inspected.

- `once:epoch` names the data set and lives as long as the data does. If it is gone or has changed, everything is lost.
  It also has the end of the quarantine, so that every proxy keeps it, also after a restart. While a cluster moves the
  slot of this key, the server's own count of flushes stands in.
- `once:replica:PREFIX` is a counter of each proxy. A server forgets the latest writes first, so a counter that went
  back means that acknowledged writes are lost. The value also names the proxy to operators who look at a record.
- `once:identities` has the settings by which proxies name keys.
- `once:members` has the rules by which live proxies name keys, so that two different rules files are noticed, and the
  layouts of records that they read. `once:rules` has those of older versions.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from oncegate.store.membership import HEALTH_S, RULES_DIFFER, Losses, Membership
from oncegate.store.redis.membership import (
    EPOCH,
    InspectionHistory,
    OtherProxies,
    WrittenLayout,
    proxy_record_key,
    proxy_record_value,
)
from oncegate.store.redis.replies import first_error, is_passing
from oncegate.store.redis.server import is_refusal, memory_ratio, not_ready_reason, parse_info
from oncegate.store.redis.talk import Question, Talk, call, command
from oncegate.store.redis.wire import ErrorReply, Script
from oncegate.store.results import ClaimsSuspended, StoreEvent

# How long the store counts as full after it refused a claim for want of memory.
FULL_S = 2.5 * HEALTH_S
# After so long without a loss, a new hash tag in a cluster is no new store.
SETTLED_S = 10.0


class _Inspection(NamedTuple):
    """One inspection of a server, on behalf of one proxy."""

    talk: Talk
    member: Membership
    # A hash tag whose keys lie on the server; empty where the server has all keys.
    hash_tag: bytes
    history: InspectionHistory
    # Of a loss found by this inspection.
    quarantine_ms: int
    # Whether the hash tag is new on a store that is known.
    is_new_tag: bool


class HealthMonitor:
    """Watches one server.

    `histories`, by hash tag, belong to all servers of a store: after a failover the new master is compared with
    what the former one had. So does `layout`, which is written as all of them agree.
    """

    def __init__(
        self,
        scripts: dict[str, Script],
        member: Membership | None,
        histories: dict[bytes, InspectionHistory],
        layout: WrittenLayout,
    ) -> None:
        # A copy without a verb, so that metrics do not count these calls among the request path's.
        self._epoch_script = Script("", scripts["epoch"].body)
        self._member = member
        self._others = OtherProxies(scripts, member, layout) if member else None
        self._clock = asyncio.get_running_loop().time
        self._histories = histories
        self._proxy_record_key = proxy_record_key(member.token_prefix) if member else b""
        self.info: dict[str, str] = {}
        self.memory_ratio = 0.0
        self._info_refused = False
        self._evicted: int | None = None
        self._flushes, self._was_flushed = -1, False
        self._losses, self._full_until = Losses(), float("-inf")
        # Why what shows losses and other proxies could not be asked for.
        self._unwatched = ""
        # Two inspections at once would each take the other's increment of the counter for a loss.
        self._inspecting = asyncio.Lock()

    # What is known ...

    def not_ready_reason(self) -> str | None:
        """Return why this server cannot be relied on, or None."""
        if self._others and self._others.differs:
            return f"this proxy names keys in another way than others on this store ({self._others.differs})"
        if self._unwatched:
            return self._unwatched
        if reason := self._losses.not_ready_reason():
            return reason
        if self.full:
            return "the store's memory is full: first-time keys are refused"
        return not_ready_reason(self.info)

    def notice(self) -> str | None:
        """Return what was lost lately, or that rules differ, or None."""
        return self._losses.notice() or (RULES_DIFFER if self.rules_differ else None)

    @property
    def rules_differ(self) -> bool:
        """Whether other proxies on this store have named keys by other rules for a while."""
        return self._others is not None and self._others.rules_differ

    @property
    def quarantine_left_s(self) -> float:
        return self._losses.quarantine_left_s

    @property
    def full(self) -> bool:
        """Whether the server refuses first-time keys at its memory limit."""
        return self.memory_ratio >= 1 or self._clock() < self._full_until

    def note_full(self) -> None:
        """Note that the server refused a claim at its memory limit."""
        self._full_until = self._clock() + FULL_S

    def note_packing(self, allowed: bool) -> None:
        """Note whether the server lets this proxy use packed records."""
        if self._others:
            self._others.may_pack = allowed

    def suspended(self) -> ClaimsSuspended | None:
        """Return why first-time keys are refused now, or None."""
        if self._others and self._others.differs:
            return ClaimsSuspended("this proxy names keys in another way than others")
        if self._unwatched:
            return ClaimsSuspended(self._unwatched)
        return self._losses.suspended()

    # Inspections ...

    async def inspect(self, talk: Talk, hash_tag: bytes | None, info: object, *others: Question) -> list[Any]:
        """Inspect the server once, and return the replies to `others`, which are asked in the same write.

        `hash_tag`: a hash tag whose keys lie on it, empty for a server with all keys, None where none is known yet.
        `info`: its reply to INFO.
        """
        async with self._inspecting:
            self._note_info(info)
            if self._member is None or self._others is None or hash_tag is None:
                return await talk.ask(*others)
            inspection = self._begin(talk, self._member, hash_tag)
            about_others = self._others.questions(hash_tag)
            # In one write: the reply to one decides nothing about the next.
            replies = await talk.ask(
                *about_others, self._epoch_question(inspection), self._counter_question(inspection), *others
            )
            identities, members, older, identity = replies[:4]
            epoch, counter, *asked_for = replies[len(about_others) :]
            self._note_refusals(identity, members, epoch, counter)
            self._others.note_identity(identity)
            self._others.note(hash_tag, identities, members, older)
            await self._note_losses(inspection, epoch, counter)
            return asked_for

    def _note_info(self, reply: object) -> None:
        if isinstance(reply, bytes):
            self._info_refused, self.info = False, parse_info(reply)
        elif isinstance(reply, ErrorReply) and is_refusal(reply):
            if not self._info_refused and self._member is not None:
                text = f"memory, eviction and role of the store are not watched: {reply}"
                self._member.report(StoreEvent.INFO, text)
            self._info_refused, self.info = True, {}
        self.memory_ratio = memory_ratio(self.info)
        before, self._flushes = self._flushes, count_flushes(self.info)
        self._was_flushed = self._flushes > before >= 0

    def _note_refusals(self, *replies: object) -> None:
        """Claim nothing while the store does not say what it lost, or who else uses it."""
        error = first_error(reply for reply in replies if not (isinstance(reply, ErrorReply) and is_passing(reply)))
        self._unwatched = f"the store's keys for losses and other proxies cannot be used: {error}" if error else ""

    # Losses ...

    def _begin(self, talk: Talk, member: Membership, hash_tag: bytes) -> _Inspection:
        """Return what an inspection compares with."""
        now = self._clock()
        # The keys of a new hash tag came from a known one, if the store is known: the cluster moved slots.
        is_new_tag = hash_tag not in self._histories and any(
            now - one.since > SETTLED_S for one in self._histories.values()
        )
        history = self._histories.setdefault(hash_tag, InspectionHistory(now))
        return _Inspection(talk, member, hash_tag, history, 0 if is_new_tag else member.quarantine_ms, is_new_tag)

    async def _note_losses(self, inspection: _Inspection, epoch: object, counter: object) -> None:
        """Find out whether anything was lost, report it, and begin a quarantine if the settings ask for one."""
        member = inspection.member
        change = self._note_epoch(inspection, epoch)
        forgotten = self._note_counter(inspection, counter)
        flushed = change is StoreEvent.FLUSHED and forgotten is not StoreEvent.EVICTED
        loss = change if flushed else forgotten or change
        if loss is None or (loss is StoreEvent.FOUNDED and inspection.is_new_tag):
            return
        if loss is StoreEvent.FOUNDED and self._others is not None:
            self._others.note_founded()
        self._losses.report(member, loss)
        if member.quarantine_ms and (forgotten or (change is not StoreEvent.MOVED and not self.quarantine_left_s)):
            (reply,) = await inspection.talk.ask(self._epoch_question(inspection, begin_quarantine=True))
            self._note_epoch(inspection, reply)

    def _epoch_question(self, inspection: _Inspection, begin_quarantine: bool = False) -> Question:
        member, history = inspection.member, inspection.history
        fresh = f"{member.token_prefix.hex()}-{history.counter}"
        # A new run of a durable store has lost nothing.
        durable_id = "" if member.durable else self.info.get("master_replid", "")
        args = (fresh, durable_id, inspection.quarantine_ms, int(begin_quarantine))
        return call(self._epoch_script, EPOCH + inspection.hash_tag, *args)

    def _note_epoch(self, inspection: _Inspection, reply: object) -> StoreEvent | None:
        """Note the epoch and the quarantine of the data set, and return the loss that they show."""
        history, replication_id = inspection.history, self.info.get("master_replid", "")
        if not isinstance(reply, list):
            # In a cluster: the slot of the epoch is being moved away.
            return StoreEvent.FLUSHED if self._was_flushed else None
        verdict, epoch, left_ms = reply
        self._losses.note_quarantine(left_ms)
        known, history.epoch = history.epoch, epoch
        id_before, history.replication_id = history.replication_id, replication_id
        if known and known != epoch:
            return StoreEvent.FLUSHED
        if verdict == b"moved" or (id_before and replication_id and id_before != replication_id):
            return StoreEvent.MOVED
        return StoreEvent.FOUNDED if verdict == b"founded" else None

    def _counter_question(self, inspection: _Inspection) -> Question:
        member = inspection.member
        value = proxy_record_value(inspection.history.counter + 1, member.retention_ms, member.proxy_name)
        return command("SET", self._proxy_record_key + inspection.hash_tag, value, "PX", member.retention_ms, "GET")

    def _note_counter(self, inspection: _Inspection, previous: object) -> StoreEvent | None:
        """Return the loss that the server's counter of evictions and this proxy's counter show."""
        member, history = inspection.member, inspection.history
        before, self._evicted = self._evicted, int(self.info.get("evicted_keys", 0))
        forgotten = StoreEvent.EVICTED if before is not None and self._evicted > before else None
        # Any other reply leaves open whether the counter was written. The next inspection shows it.
        if isinstance(previous, bytes | None):
            now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            expired = previous is None and now_s - history.counter_written_s > 0.9 * member.retention_ms / 1000
            if history.counter > (int(previous.split(b" ", 1)[0]) if previous else 0) and not expired:
                # Where keys were evicted, the counter itself may be one of them.
                forgotten = forgotten or StoreEvent.ROLLED_BACK
            history.counter, history.counter_written_s = history.counter + 1, now_s
        return forgotten


def count_flushes(info: Mapping[str, str]) -> int:
    """Return how often the server executed FLUSHALL or FLUSHDB since it started, by its INFO."""
    statistics = (info.get(f"cmdstat_{name}", "calls=0") for name in ("flushall", "flushdb"))
    return sum(int(calls[1]) for one in statistics if (calls := re.match(r"calls=(\d+)", one)))
