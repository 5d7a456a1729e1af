"""The health of one server: whether it is fit, how full it is, and whether it still has what it acknowledged.

A server is inspected on every new connection before anything else, and every HEALTH_S seconds after that. Managed
servers may refuse INFO; then only the keys below are inspected.

- `once:epoch` names the data set and lives as long as the data does. If it is gone or has changed, everything is lost.
  It also has the end of the quarantine, so that every proxy keeps it, also after a restart. While a cluster moves the
  slot of this key, the server's own count of flushes stands in.
- `once:replica:PREFIX` is a counter of each proxy. A server forgets the latest writes first, so a counter that went
  back means that acknowledged writes are lost. The value also names the proxy to operators who look at a record.
- `once:identities` has the settings by which proxies name keys.
- `once:rules` has the rules by which live proxies name keys, so that two different rules files are noticed.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from hashlib import blake2b
from math import ceil
from typing import NamedTuple

from oncegate.store.events import StoreEvent
from oncegate.store.redis.membership import (
    EPOCH,
    IDENTITIES,
    RULES,
    InspectionHistory,
    Membership,
    differing_names,
    proxy_record_key,
    proxy_record_value,
)
from oncegate.store.redis.server import is_refusal, memory_ratio, not_ready_reason, parse_info
from oncegate.store.redis.talk import Talk
from oncegate.store.redis.wire import ErrorReply, Script
from oncegate.store.results import ClaimsSuspended

HEALTH_S = 1.0
# How long the store counts as full after it refused a claim for want of memory.
FULL_S = 2.5 * HEALTH_S
# After so long without a loss, a new hash tag in a cluster is no new store.
SETTLED_S = 10.0
# How long a proxy counts as live after it last reported its rules.
LIVE_S = 5 * HEALTH_S
# How long rules may differ before it is reported, because proxies reload their file one after the other.
DIFFER_S = 2 * LIVE_S
# A proxy whose settings were refused waits so long before it writes them to an empty store, so that the others, if the
# store has forgotten them, write theirs first.
FOUND_AFTER_S = 5 * HEALTH_S

RULES_DIFFER = "other proxies on this store name keys by other rules: a retry that meets one of them executes again"
LOSSES = {
    StoreEvent.FLUSHED: "the store lost everything, or is another one: its epoch is gone",
    StoreEvent.ROLLED_BACK: "the store lost acknowledged writes: its counter of this proxy went back",
    StoreEvent.EVICTED: "the store evicted keys",
    StoreEvent.MOVED: "the store restarted or failed over: unless it is durable, its last writes may be lost",
    StoreEvent.FOUNDED: "the store has no epoch: it is new, or it lost everything",
}


class _Inspection(NamedTuple):
    """One inspection of a server, on behalf of one proxy."""

    talk: Talk
    member: Membership
    # A hash tag whose keys lie on the server; empty where the server has all keys.
    hash_tag: bytes
    history: InspectionHistory
    # Of a loss found by this inspection.
    quarantine_ms: int


class HealthMonitor:
    """Watches one server.

    `histories`, by hash tag, belong to all servers of a store: after a failover the new master is compared with
    what the former one had.
    """

    def __init__(
        self, scripts: dict[str, Script], member: Membership | None, histories: dict[bytes, InspectionHistory]
    ) -> None:
        # Copies without a verb, so that metrics do not count these calls among the request path's.
        self._epoch_script, self._identity_script, self._rules_script = (
            Script("", scripts[verb].body) for verb in ("epoch", "identity", "rules")
        )
        self._member = member
        self._identity = blake2b(member.identity_text.encode(), digest_size=16).hexdigest() if member else ""
        self._clock = asyncio.get_running_loop().time
        self._histories = histories
        self._proxy_record_key = proxy_record_key(member.token_prefix) if member else b""
        self.info: dict[str, str] = {}
        self.memory_ratio = 0.0
        self._info_refused = False
        self._evicted: int | None = None
        self._flushes, self._was_flushed = -1, False
        # The settings that differ from the others', and the rules that were last reported to the store.
        self._differs = self._rules = ""
        self._rules_differ_since = float("inf")
        self._rules_reported = False
        self._refused_at = float("-inf")
        self._quarantine_ends = self._lost_until = self._full_until = float("-inf")
        self._lost = ""
        # Whether `suspended` has to be asked before a claim.
        self.may_suspend = False
        # Two inspections at once would each take the other's increment of the counter for a loss.
        self._inspecting = asyncio.Lock()

    # What is known ...

    def not_ready_reason(self) -> str | None:
        """Return why this server cannot be relied on, or None."""
        if self._differs:
            return f"this proxy names keys in another way than others on this store ({self._differs})"
        if self.quarantine_left_s:
            lost = self._lost or "the store lost data"
            return f"{lost}; first-time keys are refused for {ceil(self.quarantine_left_s)} s more"
        if self.full:
            return "the store's memory is full: first-time keys are refused"
        return not_ready_reason(self.info)

    def notice(self) -> str | None:
        """Return what was lost lately, or that rules differ, or None."""
        if self._clock() < self._lost_until:
            return self._lost
        return RULES_DIFFER if self.rules_differ else None

    @property
    def rules_differ(self) -> bool:
        """Whether other proxies on this store have named keys by other rules for longer than DIFFER_S."""
        return self._clock() - self._rules_differ_since > DIFFER_S

    @property
    def quarantine_left_s(self) -> float:
        return max(0.0, self._quarantine_ends - self._clock())

    @property
    def full(self) -> bool:
        """Whether the server refuses first-time keys at its memory limit."""
        return self.memory_ratio >= 1 or self._clock() < self._full_until

    def note_full(self) -> None:
        """Note that the server refused a claim at its memory limit."""
        self._full_until = self._clock() + FULL_S

    def suspended(self) -> ClaimsSuspended | None:
        """Return why first-time keys are refused now, or None. Needed only while `may_suspend` is set."""
        if self._differs:
            return ClaimsSuspended("this proxy names keys in another way than others", replays=False)
        if left_s := self.quarantine_left_s:
            return ClaimsSuspended("the store lost data", retry_after_s=ceil(left_s))
        self.may_suspend = False
        return None

    # Inspections ...

    async def inspect(self, talk: Talk, hash_tag: bytes | None) -> None:
        """Inspect the server once.

        `hash_tag`: a hash tag whose keys lie on it, empty for a server with all keys, None where none is known yet.
        """
        async with self._inspecting:
            await self._ask_info(talk)
            if self._member is not None and hash_tag is not None:
                await self._ask_identity(talk, self._member, hash_tag)
                await self._ask_rules(talk, self._member, hash_tag)
                await self._ask_losses(talk, self._member, hash_tag)
                self.may_suspend = bool(self._differs or self.quarantine_left_s)

    async def _ask_info(self, talk: Talk) -> None:
        reply = await talk.command("INFO", "memory", "replication", "persistence", "stats", "commandstats")
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

    async def _ask_losses(self, talk: Talk, member: Membership, hash_tag: bytes) -> None:
        """Find out whether anything was lost, report it, and begin a quarantine if the settings ask for one."""
        now = self._clock()
        # The keys of a new hash tag came from a known one, if the store is known: the cluster moved slots.
        is_new_tag = hash_tag not in self._histories and any(
            now - one.since > SETTLED_S for one in self._histories.values()
        )
        history = self._histories.setdefault(hash_tag, InspectionHistory(now))
        quarantine_ms = 0 if is_new_tag else member.quarantine_ms
        inspection = _Inspection(talk, member, hash_tag, history, quarantine_ms)
        change = await self._ask_epoch(inspection)
        forgotten = await self._ask_counters(inspection)
        flushed = change is StoreEvent.FLUSHED and forgotten is not StoreEvent.EVICTED
        loss = change if flushed else forgotten or change
        if loss is None or (loss is StoreEvent.FOUNDED and is_new_tag):
            return
        self._report(member, loss)
        if member.quarantine_ms and (forgotten or (change is not StoreEvent.MOVED and not self.quarantine_left_s)):
            await self._ask_epoch(inspection, begin_quarantine=True)

    async def _ask_epoch(self, inspection: _Inspection, begin_quarantine: bool = False) -> StoreEvent | None:
        """Read the epoch and the quarantine of the data set, and return the loss that they show."""
        talk, member, hash_tag, history, quarantine_ms = inspection
        replication_id = self.info.get("master_replid", "")
        fresh = f"{member.token_prefix.hex()}-{history.counter}"
        # A new run of a durable store has lost nothing.
        durable_id = "" if member.durable else replication_id
        args = (fresh, durable_id, quarantine_ms, int(begin_quarantine))
        reply = await talk.script(self._epoch_script, EPOCH + hash_tag, *args)
        if not isinstance(reply, list):
            # In a cluster: the slot of the epoch is being moved away.
            return StoreEvent.FLUSHED if self._was_flushed else None
        verdict, epoch, left_ms = reply
        self._quarantine_ends = self._clock() + left_ms / 1000
        known, history.epoch = history.epoch, epoch
        id_before, history.replication_id = history.replication_id, replication_id
        if known and known != epoch:
            return StoreEvent.FLUSHED
        if verdict == b"moved" or (id_before and replication_id and id_before != replication_id):
            return StoreEvent.MOVED
        return StoreEvent.FOUNDED if verdict == b"founded" else None

    async def _ask_counters(self, inspection: _Inspection) -> StoreEvent | None:
        """Return the loss that the server's counter of evictions and this proxy's counter show."""
        talk, member, hash_tag, history, _ = inspection
        before, self._evicted = self._evicted, int(self.info.get("evicted_keys", 0))
        forgotten = StoreEvent.EVICTED if before is not None and self._evicted > before else None
        value = proxy_record_value(history.counter + 1, member.retention_ms, member.proxy_name)
        previous = await talk.command("SET", self._proxy_record_key + hash_tag, value, "PX", member.retention_ms, "GET")
        # Any other reply leaves open whether the counter was written. The next inspection shows it.
        if isinstance(previous, bytes | None):
            now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            expired = previous is None and now_s - history.counter_written_s > 0.9 * member.retention_ms / 1000
            if history.counter > (int(previous.split(b" ", 1)[0]) if previous else 0) and not expired:
                # Where keys were evicted, the counter itself may be one of them.
                forgotten = forgotten or StoreEvent.ROLLED_BACK
            history.counter, history.counter_written_s = history.counter + 1, now_s
        return forgotten

    def _report(self, member: Membership, loss: StoreEvent) -> None:
        self._lost = LOSSES[loss]
        if loss is not StoreEvent.FOUNDED:
            self._lost_until = self._clock() + member.notice_s
        member.report(loss, self._lost)

    async def _ask_identity(self, talk: Talk, member: Membership, hash_tag: bytes) -> None:
        """Find out whether other proxies on this store name keys by the same settings."""
        waits = self._clock() - self._refused_at < FOUND_AFTER_S
        write_mode = "accept" if member.accept else "ask" if waits else "found"
        args = (self._identity, member.identity_text, write_mode, member.retention_ms)
        match await talk.script(self._identity_script, IDENTITIES + hash_tag, *args):
            case [b"same"]:
                self._differs = ""
            case [b"accepted"]:
                self._differs = ""
                text = "this proxy names keys in another way than others on this store"
                member.report(StoreEvent.IDENTITY_ACCEPTED, text)
            case [b"differs", *others]:
                self._refused_at = self._clock()
                if not self._differs:
                    self._differs = differing_names(member.identity_text, others[0].decode())
                    text = f"this proxy names keys in another way than others: {self._differs}"
                    member.report(StoreEvent.IDENTITY, text)
            case _:
                # No proxy has written its settings, or there was no reply.
                pass

    async def _ask_rules(self, talk: Talk, member: Membership, hash_tag: bytes) -> None:
        """Find out whether other live proxies name keys by other rules. A declared change is not reported."""
        rules = member.rules()
        args = (rules, self._rules or rules, int(LIVE_S * 1000))
        match await talk.script(self._rules_script, RULES + hash_tag, *args):
            case [b"differ"] if not member.accept:
                self._rules = rules
                self._rules_differ_since = min(self._rules_differ_since, self._clock())
            case [b"differ" | b"same"]:
                self._rules, self._rules_differ_since, self._rules_reported = rules, float("inf"), False
            case _:
                # There was no reply.
                pass
        if self.rules_differ and not self._rules_reported:
            self._rules_reported = True
            member.report(StoreEvent.RULES, RULES_DIFFER)


def count_flushes(info: Mapping[str, str]) -> int:
    """Return how often the server executed FLUSHALL or FLUSHDB since it started, by its INFO."""
    statistics = (info.get(f"cmdstat_{name}", "calls=0") for name in ("flushall", "flushdb"))
    return sum(int(calls[1]) for one in statistics if (calls := re.match(r"calls=(\d+)", one)))
