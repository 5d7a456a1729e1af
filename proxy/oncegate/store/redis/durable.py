"""Claims that take effect only once replicas or disks have them: the level, and the connection on which they wait.

WAIT and WAITAOF hold up every command behind them, so these claims have a connection of their own. Claims that come
while one WAIT runs leave together in the next write, with one WAIT for all of them.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from oncegate.store.redis.link import Link
from oncegate.store.redis.replies import is_claimed
from oncegate.store.redis.wire import ScriptCall
from oncegate.store.results import Unconfirmed, UnderReplicated

# The share of the time left that a claim waits. The rest is for releasing a claim that too few replicas have.
WAIT_SHARE = 0.75
# A claim with less of its time left is not sent, as it would cut the WAIT of the others short.
MIN_SHARE = 0.1
# The Redis that has WAITAOF.
AOF_SINCE = (7, 2)
# After a replica left, claims do not count for so long: the replica may have been promoted, while others still confirm
# to the old master. The sentinels report a promotion within a second, and are asked every second.
LEFT_S = 5.0
# How long claims wait for every replica there is, so that a replica that is leaving is noticed.
ALL_MS = 20
_CONNECTED = re.compile(rb"connected_slaves:(\d+)")


@dataclass(frozen=True, slots=True)
class DurabilityLevel:
    """Where a claim has to be before it counts: on `replicas` replicas, and with `fsync` on the disk of each server."""

    replicas: int
    fsync: bool

    def wait_command(self, wait_ms: int) -> tuple[str | int, ...]:
        """Return the command that waits until the server has this level, or `wait_ms` are over."""
        return ("WAITAOF", 1, self.replicas, wait_ms) if self.fsync else ("WAIT", self.replicas, wait_ms)

    def lacking(self, reply: object) -> str | None:
        """Return what is missing by the reply to `wait_command`, or None.

        WAIT and WAITAOF reply with counts also when their time is over, so the counts have to be compared.
        """
        match reply:
            case int(replicas) if not self.fsync:
                disk = True
            case [int(local), int(replicas)] if self.fsync:
                disk = local >= 1
            case _:
                return str(reply)
        if not disk:
            return "the claim did not reach the disk in time"
        if replicas < self.replicas:
            return f"the claim reached {replicas} of {self.replicas} replicas in time"
        return None

    def unable_by_version(self, version: tuple[int, ...]) -> str | None:
        """Return why a server of this version cannot give the level, or None."""
        if not self.fsync or version >= AOF_SINCE:
            return None
        return "has no WAITAOF, which the durability fsync needs: Redis 7.2 or newer, or Valkey"

    def unable(self, info: dict[str, str]) -> str | None:
        """Return why a server with this INFO cannot give the level, or None."""
        if self.fsync and info.get("aof_enabled", "1") == "0":
            return "has no append-only file, which the durability fsync needs (appendonly yes)"
        online = sum("state=online" in value for name, value in info.items() if name.startswith("slave"))
        if info.get("role") == "master" and online < self.replicas:
            return f"has {online} replicas, and the durability needs {self.replicas}"
        return None


def level(durability: str, several: bool) -> DurabilityLevel | None:
    """Return the level of a durability setting, or None if a claim in the server's memory is enough.

    `several`: the store has several servers. Behind a single one no replicas are expected.
    """
    match durability:
        case "replicated":
            return DurabilityLevel(1, fsync=False)
        case "fsync":
            return DurabilityLevel(int(several), fsync=True)
        case _:
            return None


class _PendingClaim(NamedTuple):
    """A claim that is to be sent with the next WAIT. `future` gets its reply."""

    future: "asyncio.Future[Any]"
    call: ScriptCall
    args: bytes

    def resolve(self, result: object) -> None:
        if not self.future.done():
            self.future.set_result(result)


# Claims that took their key, with their replies, until the WAIT behind them is over.
_Claimed = list[tuple[_PendingClaim, Any]]


class WaitingLink(Link):
    """A connection for claims that wait for replicas or disks.

    `script` gives UnderReplicated for a claim that too few servers have. Replies that are no claims come at once.
    `note_time(now_ms)` is called with the server's time before the wait.
    """

    def __init__(self, *args: Any, level: DurabilityLevel, note_time: Callable[[int], None]) -> None:
        super().__init__(*args)
        self._level, self._note_time = level, note_time
        self._pending: list[_PendingClaim] = []
        self._committing = False
        # Replicas when last counted, the server they were counted on, and when one left (the loop's time).
        self._replicas, self._counted_at, self._left_at = 0, self.at, float("-inf")

    def script(self, call: ScriptCall, args: bytes) -> "asyncio.Future[Any]":
        pending = _PendingClaim(self._loop.create_future(), call, args)
        self._pending.append(pending)
        if not self._committing:
            self._committing = True
            self._loop.call_soon(self._commit)
        return pending.future

    def _commit(self) -> None:
        """Send all pending claims, and one WAIT behind them."""
        batch = self._take_batch()
        # Claims that come while this batch waits are sent after it: WAIT would hold them up anyway.
        self._committing = bool(batch)
        if not batch:
            return
        claimed: _Claimed = []
        for pending in batch:
            reply = super().script(pending.call, pending.args)
            reply.add_done_callback(partial(self._claim_replied, pending, claimed))
        self._wait_for_replicas(claimed, min(pending.call.deadline for pending in batch) - self._loop.time())

    def _take_batch(self) -> list[_PendingClaim]:
        """Return the pending claims that have time left for a wait. The others are not sent."""
        pending_claims, self._pending = self._pending, []
        latest = self._loop.time() + self._stall_s * MIN_SHARE
        for pending in pending_claims:
            if pending.call.deadline < latest:
                pending.resolve(Unconfirmed("no time was left to wait for replicas", maybe_executed=False))
        return [pending for pending in pending_claims if pending.call.deadline >= latest]

    def _wait_for_replicas(self, claimed: _Claimed, left_s: float) -> None:
        """Send the WAIT behind a batch whose first deadline is `left_s` from now."""
        words = self._level.wait_command(max(1, int(left_s * WAIT_SHARE * 1000)))
        deadline = self._loop.time() + left_s
        if self._replicas > self._level.replicas:
            self.command("WAIT", self._replicas, ALL_MS, deadline=deadline)
        waited = self.command(*words, deadline=deadline)
        if self._level.replicas:
            counted = self.command("INFO", "replication", deadline=deadline)
            counted.add_done_callback(lambda _: self._waited(claimed, waited, counted))
        else:
            waited.add_done_callback(partial(self._waited, claimed))

    def _claim_replied(self, pending: _PendingClaim, claimed: _Claimed, future: "asyncio.Future[Any]") -> None:
        reply = future.result()
        if isinstance(reply, list):
            self._note_time(reply[1])
        if is_claimed(reply):
            claimed.append((pending, reply))
        else:
            pending.resolve(reply)

    def _waited(
        self,
        claimed: _Claimed,
        waited: "asyncio.Future[Any]",
        counted: "asyncio.Future[Any] | None" = None,
    ) -> None:
        """Resolve the claims of a batch after its WAIT, and send those that came meanwhile."""
        reply = waited.result() if waited.done() else Unconfirmed("the store counts replicas before it waits for them")
        failure: Unconfirmed | None = None
        if isinstance(reply, Unconfirmed):
            failure = Unconfirmed(reply.reason)
        elif lacking := self._level.lacking(reply) or (counted and self._replica_left(counted.result())):
            failure = UnderReplicated(lacking)
        for pending, claim_reply in claimed:
            pending.resolve(claim_reply if failure is None else failure)
        self._commit()

    def _replica_left(self, info: object) -> str | None:
        """Return why a claim does not count though enough replicas have it, or None."""
        connected = _CONNECTED.search(info) if isinstance(info, bytes) else None
        if connected is None:
            return None
        now, before, self._replicas = self._loop.time(), self._replicas, int(connected[1])
        if self._counted_at != self.at:
            # The connection leads to another server now, so the counts do not compare.
            self._counted_at, self._left_at = self.at, float("-inf")
        elif self._replicas < before:
            self._left_at = now
        return "a replica has left the master, and may have taken its place" if now - self._left_at < LEFT_S else None
