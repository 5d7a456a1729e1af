"""What is watched of one server: is it fit, how full is it, and does it still have what it acknowledged.

Asked on every new connection before anything else, and every HEALTH_S seconds after that. INFO may be
refused (managed servers do): then only what the server's own keys tell is watched.

- `once:epoch` names the data set. It lives as long as the data does: gone or another one means that
  everything is lost. It also holds until when unseen keys are refused, for every proxy and past its restart.
  While its slot is being moved away, the server's own count of flushes stands in.
- `once:replica:…` is a counter of each proxy. Whatever the server forgot, it forgot from the end: a counter
  that went back says that acknowledged writes are lost. It names the proxy to those who look at a record.
- `once:identities` has the settings by which proxies name keys.
- `once:rules` has the rules by which those that are about now do: two files side by side are noticed.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import Any, Protocol

from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis.link import ErrorReply, Link, Script, resp
from oncegate.store.redis.server import is_refusal, memory_ratio, parse_info, problem
from oncegate.store.results import ClaimsSuspended

EPOCH, IDENTITIES, RULES = b"once:epoch", b"once:identities", b"once:rules"
HEALTH_S = 1.0
FULL_S = 2.5 * HEALTH_S  # for which a claim refused for want of memory says that the store is full
SETTLED_S = 10.0  # from which a store is known
LIVE_S = 5 * HEALTH_S  # for which a proxy that says nothing counts as being about
DIFFER_S = 2 * LIVE_S  # for which rules may differ unnoticed: a file is read again by one proxy after the other
FOUND_AFTER_S = 5 * HEALTH_S  # a refused replica lets the others come first where the store forgot them all

RULES_DIFFER = "other proxies on this store name keys by other rules: a retry that meets one of them executes again"
LOSSES = {
    "flushed": "the store lost everything, or is another one: its epoch is gone",
    "rolled_back": "the store lost acknowledged writes: its counter of this proxy went back",
    "evicted": "the store evicted keys",
    "moved": "the store restarted or failed over: unless it is durable, its last writes may be lost",
    "founded": "the store has no epoch: it is new, or it lost everything",
}


@dataclass(slots=True)
class Memory:
    """What was last seen of the keys at one place. `since`: the loop's time of the first look."""

    since: float
    epoch: bytes = b""
    run: str = ""
    mark: int = 0
    marked_s: float = 0.0  # when, on a clock that goes on while the machine sleeps


@dataclass(frozen=True, slots=True)
class Membership:
    """What one proxy says of itself to the others, and how it takes a loss. Times in the unit of their name.

    `described` are the settings that name keys, of the form `name=value name=value`; `rules` tells the digest
    of the rules that do so now. `durable`: the store confirms only what survives a restart. `quarantine_ms`: of
    a loss; 0: go on.
    """

    token_prefix: bytes
    replica: str
    described: str
    accept: bool
    retention_ms: int
    quarantine_ms: int
    notice_s: float  # for which a loss is a reason on /readyz
    durable: bool
    report: Callable[[str, str], None]  # a word of LOSSES, or identity, accepted, rules, info; and what there is to say
    rules: Callable[[], str] = str


def replica_key(token: bytes) -> bytes:
    """Return the key that says whose token this is; its prefix will do."""
    return b"once:replica:" + token[:PREFIX_BYTES].hex().encode()


def replica_value(mark: int, retention_ms: int, name: str) -> bytes:
    """Return what stands there; with the retention, the time left tells when it was written."""
    return b"%d %d %s" % (mark, retention_ms, name.encode())


class Talk(Protocol):
    """How a server is asked; what it refuses comes as a value."""

    def command(self, *words: Any) -> Awaitable[Any]:
        """Return the reply to one command."""

    def script(self, script: Script, key: bytes, *args: Any) -> Awaitable[Any]:
        """Return the reply of one script, without its tag."""


class OverLink:
    """Talk over the shared connection."""

    def __init__(self, link: Link, timeout_s: float) -> None:
        self._link, self._timeout_s = link, timeout_s
        self._clock = asyncio.get_running_loop().time

    def command(self, *words: Any) -> Awaitable[Any]:
        return self._link.command(*words, deadline=self._clock() + self._timeout_s)

    def script(self, script: Script, key: bytes, *args: Any) -> Awaitable[Any]:
        return self._link.script(script, key, resp(*args), len(args), self._clock() + self._timeout_s, whole=True)


class HealthMonitor:
    """One server's watch. `memories` by place are those of all servers of a store: after a failover another
    server is asked for what this one was."""

    def __init__(self, scripts: dict[str, Script], member: Membership | None, memories: dict[bytes, Memory]) -> None:
        # Without a verb, so that they are not measured as the request path's calls are.
        self._epoch_script, self._identity_script, self._rules_script = (
            Script("", scripts[verb].body) for verb in ("epoch", "identity", "rules")
        )
        self._member = member
        self._identity = blake2b(member.described.encode(), digest_size=16).hexdigest() if member else ""
        self._clock = asyncio.get_running_loop().time
        self._memories = memories
        self._replica_key = replica_key(member.token_prefix) if member else b""
        self.info: dict[str, str] = {}
        self.memory_ratio = 0.0  # asked for with every answer
        self._info_refused = False
        self._evicted: int | None = None
        self._flushes, self._was_flushed = -1, False
        self._differs = self._rules = ""
        self._rules_differ_since = float("inf")
        self._rules_told = False
        self._refused_at = float("-inf")
        self._quarantine_ends = self._lost_until = self._full_until = float("-inf")
        self._lost = ""
        self.withholds = False  # whether `withheld` need be asked
        self._attending = asyncio.Lock()  # two who move the mark at once would take each other's for a loss

    # What is known ...

    def problem(self) -> str | None:
        """Return why this server cannot be relied on, None where it can."""
        if self._differs:
            return f"this proxy names keys in another way than others on this store ({self._differs})"
        if self.quarantine_left_s:
            lost = self._lost or "the store lost data"
            return f"{lost}; unseen keys are refused for {ceil(self.quarantine_left_s)} s more"
        if self.full:
            return "the store's memory is full: new keys are refused"
        return problem(self.info)

    def notice(self) -> str | None:
        """Return what was lost lately, or that rules differ; None where there is nothing to say."""
        if self._clock() < self._lost_until:
            return self._lost
        return RULES_DIFFER if self.rules_differ else None

    @property
    def rules_differ(self) -> bool:
        """Whether others on this store name keys by other rules, and have for a while."""
        return self._clock() - self._rules_differ_since > DIFFER_S

    @property
    def quarantine_left_s(self) -> float:
        return max(0.0, self._quarantine_ends - self._clock())

    @property
    def full(self) -> bool:
        """Whether new keys are refused for want of memory."""
        return self.memory_ratio >= 1 or self._clock() < self._full_until

    def refused_for_memory(self) -> None:
        """Note that a claim was."""
        self._full_until = self._clock() + FULL_S

    def withheld(self) -> ClaimsSuspended | None:
        """Return why unseen keys are not claimed now, None where they are. Only while `withholds`."""
        if self._differs:
            return ClaimsSuspended("this proxy names keys in another way than others", replays=False)
        if left_s := self.quarantine_left_s:
            return ClaimsSuspended("the store lost data", retry_after_s=ceil(left_s))
        self.withholds = False
        return None

    # Asking ...

    async def attend(self, talk: Talk, place: bytes | None) -> None:
        """Ask one server everything once. `place`: a hash tag whose keys lie on it, empty for a server with all
        keys, None where no such place is known."""
        async with self._attending:
            await self._ask_info(talk)
            if self._member is not None and place is not None:
                await self._ask_identity(talk, self._member, place)
                await self._ask_rules(talk, self._member, place)
                await self._ask_what_is_left(talk, self._member, place)
                self.withholds = bool(self._differs or self.quarantine_left_s)

    async def _ask_info(self, talk: Talk) -> None:
        reply = await talk.command("INFO", "memory", "replication", "persistence", "stats", "commandstats")
        if isinstance(reply, bytes):
            self._info_refused, self.info = False, parse_info(reply)
        elif isinstance(reply, ErrorReply) and is_refusal(reply):
            if not self._info_refused and self._member is not None:
                self._member.report("info", f"memory, eviction and role of the store are not watched: {reply}")
            self._info_refused, self.info = True, {}
        self.memory_ratio = memory_ratio(self.info)
        before, self._flushes = self._flushes, flushes(self.info)
        self._was_flushed = self._flushes > before >= 0

    async def _ask_what_is_left(self, talk: Talk, member: Membership, place: bytes) -> None:
        """Find out whether anything was lost, say so, and begin a quarantine where that is wanted."""
        now = self._clock()
        # A new place of a store that is known has its records from a place that is: slots move in a cluster.
        newly_placed = place not in self._memories and any(
            now - one.since > SETTLED_S for one in self._memories.values()
        )
        memory = self._memories.setdefault(place, Memory(now))
        quarantine_ms = 0 if newly_placed else member.quarantine_ms
        change = await self._ask_epoch(talk, member, place, memory, quarantine_ms)
        forgot = await self._ask_counters(talk, member, place, memory)
        how = change if change == "flushed" and forgot != "evicted" else forgot or change
        if not how or (how == "founded" and newly_placed):
            return
        self._tell(member, how)
        if member.quarantine_ms and (forgot or (change != "moved" and not self.quarantine_left_s)):
            await self._ask_epoch(talk, member, place, memory, quarantine_ms, begin=True)

    async def _ask_epoch(
        self, talk: Talk, member: Membership, place: bytes, memory: Memory, quarantine_ms: int, begin: bool = False
    ) -> str:
        """Learn which data set this is and whether it is in quarantine. Return what that says of a loss."""
        run = self.info.get("master_replid", "")
        fresh = f"{member.token_prefix.hex()}-{memory.mark}"
        durable_run = "" if member.durable else run  # of a durable store a new run has lost nothing
        args = (fresh, durable_run, quarantine_ms, int(begin))
        reply = await talk.script(self._epoch_script, EPOCH + place, *args)
        if not isinstance(reply, list):  # in a cluster: its slot is being moved away
            return "flushed" if self._was_flushed else ""
        word, epoch, left_ms = reply
        self._quarantine_ends = self._clock() + left_ms / 1000
        known, memory.epoch = memory.epoch, epoch
        run_before, memory.run = memory.run, run
        if known and known != epoch:
            return "flushed"
        if word == b"moved" or (run_before and run and run_before != run):
            return "moved"
        return "founded" if word == b"founded" else ""

    async def _ask_counters(self, talk: Talk, member: Membership, place: bytes, memory: Memory) -> str:
        """Return what the server's counter of evictions and our own mark say of a loss."""
        before, self._evicted = self._evicted, int(self.info.get("evicted_keys", 0))
        forgot = "evicted" if before is not None and self._evicted > before else ""
        value = replica_value(memory.mark + 1, member.retention_ms, member.replica)
        found = await talk.command("SET", self._replica_key + place, value, "PX", member.retention_ms, "GET")
        if isinstance(found, bytes | None):  # else it is not known whether it was set: the next one tells
            now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            expired = found is None and now_s - memory.marked_s > 0.9 * member.retention_ms / 1000
            if memory.mark > (int(found.split(b" ", 1)[0]) if found else 0) and not expired:
                forgot = forgot or "rolled_back"  # an eviction may have taken the mark itself
            memory.mark, memory.marked_s = memory.mark + 1, now_s
        return forgot

    def _tell(self, member: Membership, how: str) -> None:
        self._lost = LOSSES[how]
        if how != "founded":
            self._lost_until = self._clock() + member.notice_s
        member.report(how, self._lost)

    async def _ask_identity(self, talk: Talk, member: Membership, place: bytes) -> None:
        """Learn whether others on this store name keys as we do."""
        patient = self._clock() - self._refused_at < FOUND_AFTER_S
        how = "accept" if member.accept else "ask" if patient else "found"
        args = (self._identity, member.described, how, member.retention_ms)
        match await talk.script(self._identity_script, IDENTITIES + place, *args):
            case [b"same" | b"accepted" as word]:
                self._differs = ""
                if word == b"accepted":
                    member.report("accepted", "this proxy names keys in another way than others on this store")
            case [b"differs", *others]:
                self._refused_at = self._clock()
                if not self._differs:
                    self._differs = difference(member.described, others[0].decode())
                    member.report("identity", f"this proxy names keys in another way than others: {self._differs}")
            case _:  # nobody is there, or it is not known
                pass

    async def _ask_rules(self, talk: Talk, member: Membership, place: bytes) -> None:
        """Learn whether others that are about name keys by other rules. Of a declared change nothing is said."""
        rules = member.rules()
        args = (rules, self._rules or rules, int(LIVE_S * 1000))
        match await talk.script(self._rules_script, RULES + place, *args):
            case [b"differ"] if not member.accept:
                self._rules = rules
                self._rules_differ_since = min(self._rules_differ_since, self._clock())
            case [b"differ" | b"same"]:
                self._rules, self._rules_differ_since, self._rules_told = rules, float("inf"), False
            case _:  # it is not known
                pass
        if self.rules_differ and not self._rules_told:
            self._rules_told = True
            member.report("rules", RULES_DIFFER)


def flushes(info: Mapping[str, str]) -> int:
    """Return how often a server was told to drop everything since it started."""
    told = (info.get(f"cmdstat_{name}", "calls=0") for name in ("flushall", "flushdb"))
    return sum(int(calls[1]) for one in told if (calls := re.match(r"calls=(\d+)", one)))


def difference(ours: str, theirs: str) -> str:
    """Return the names of the settings that differ, of two descriptions of the form `name=value name=value`."""
    both = [dict(part.split("=", 1) for part in text.split(" ")) for text in (ours, theirs)]
    return ", ".join(name for name in both[0] if both[0][name] != both[1].get(name)) or "unknown"
