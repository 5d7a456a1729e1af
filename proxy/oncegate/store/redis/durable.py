"""Claims that count only once replicas or disks have them: how far, and the connection on which they wait.

WAIT stops everything behind it, so these claims have a connection of their own. What is asked while one
WAIT runs leaves together in the next write, with one WAIT for all of it.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from oncegate.store.redis.link import Link
from oncegate.store.results import Unconfirmed, UnderReplicated

WAIT_SHARE = 0.75  # of what is left of the budget; the rest is for giving the claim back
LEAST_SHARE = 0.1  # a claim with less of its budget left is not sent: it would cut the WAIT of the others short
AOF_SINCE = (7, 2)
# How long claims do not count once a replica has left: it may have been promoted, while others still confirm to the
# old master. By then the sentinels have told so: a leader sees a promotion within a second, and is asked each second.
LEFT_S = 5.0
ALL_MS = 20  # for which claims wait for every replica: one that is leaving is not seen to have left at once
_CONNECTED = re.compile(rb"connected_slaves:(\d+)")


@dataclass(frozen=True, slots=True)
class DurabilityLevel:
    """How far a claim must have come: on `replicas` replicas, and on the disk of each where `fsync`."""

    replicas: int
    fsync: bool

    def words(self, wait_ms: int) -> tuple[str | int, ...]:
        """Return the command that waits for it."""
        return ("WAITAOF", 1, self.replicas, wait_ms) if self.fsync else ("WAIT", self.replicas, wait_ms)

    def lacking(self, reply: object) -> str | None:
        """Return what a reply to that command lacks, None for nothing. It is a count also when the time is over."""
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
        """Return why a server of a version cannot give this level, None where it can."""
        if not self.fsync or version >= AOF_SINCE:
            return None
        return "has no WAITAOF, which the durability fsync needs: Redis 7.2 or newer, or Valkey"

    def unable(self, info: dict[str, str]) -> str | None:
        """Return why a server cannot give this level, by its INFO; None where it can."""
        if self.fsync and info.get("aof_enabled", "1") == "0":
            return "has no append-only file, which the durability fsync needs (appendonly yes)"
        online = sum("state=online" in value for name, value in info.items() if name.startswith("slave"))
        if info.get("role") == "master" and online < self.replicas:
            return f"has {online} replicas, and the durability needs {self.replicas}"
        return None


def level(durability: str, several: bool) -> DurabilityLevel | None:
    """Return what a setting asks of a store, None for nothing: its memory. A single server has no replicas of ours."""
    match durability:
        case "replicated":
            return DurabilityLevel(1, fsync=False)
        case "fsync":
            return DurabilityLevel(int(several), fsync=True)
        case _:
            return None


class _Asked(NamedTuple):
    future: "asyncio.Future[Any]"
    asking: bool
    call: tuple[Any, ...]  # of Link.script

    @property
    def deadline(self) -> float:
        return float(self.call[4])

    def resolve(self, result: object) -> None:
        if not self.future.done():
            self.future.set_result(result)


class WaitingLink(Link):
    """A connection for claims. `script` gives Below for a claim that too few have; replies that are no claims
    come at once. `heard(now_ms)` is told the server's time before the waiting."""

    def __init__(self, *args: Any, level: DurabilityLevel, heard: Callable[[int], None]) -> None:
        super().__init__(*args)
        self._level, self._heard = level, heard
        self._asked: list[_Asked] = []
        self._committing = False
        self._replicas, self._counted_at, self._left_at = 0, self.at, float("-inf")

    def script(self, *call: Any) -> "asyncio.Future[Any]":
        return self._ask(False, call)

    def script_asking(self, *call: Any) -> "asyncio.Future[Any]":
        return self._ask(True, call)

    def _ask(self, asking: bool, call: tuple[Any, ...]) -> "asyncio.Future[Any]":
        one = _Asked(self._loop.create_future(), asking, call)
        self._asked.append(one)
        if not self._committing:
            self._committing = True
            self._loop.call_soon(self._commit)
        return one.future

    def _commit(self) -> None:
        """Send what was asked so far, and one WAIT behind it."""
        asked, self._asked = self._asked, []
        latest = self._loop.time() + self._stall_s * LEAST_SHARE
        batch = [one for one in asked if one.deadline >= latest]
        for one in asked:
            if one.deadline < latest:
                one.resolve(Unconfirmed("no time was left to wait for replicas", maybe_executed=False))
        self._committing = bool(batch)
        if not batch:
            return
        claimed: list[tuple[_Asked, Any]] = []
        for one in batch:
            call = super().script_asking if one.asking else super().script
            call(*one.call).add_done_callback(partial(self._replied, one, claimed))
        left_s = min(one.deadline for one in batch) - self._loop.time()
        words = self._level.words(max(1, int(left_s * WAIT_SHARE * 1000)))
        deadline = self._loop.time() + left_s
        if self._replicas > self._level.replicas:
            self.command("WAIT", self._replicas, ALL_MS, deadline=deadline)
        waited = self.command(*words, deadline=deadline)
        if self._level.replicas:
            counted = self.command("INFO", "replication", deadline=deadline)
            counted.add_done_callback(lambda _: self._waited(claimed, waited, counted))
        else:
            waited.add_done_callback(partial(self._waited, claimed))

    def _replied(self, one: _Asked, claimed: list[tuple[_Asked, Any]], future: "asyncio.Future[Any]") -> None:
        reply = future.result()
        if isinstance(reply, list):
            self._heard(reply[1])
        if isinstance(reply, list) and reply[0] == b"claimed":
            claimed.append((one, reply))
        else:
            one.resolve(reply)

    def _waited(
        self,
        claimed: list[tuple[_Asked, Any]],
        waited: "asyncio.Future[Any]",
        counted: "asyncio.Future[Any] | None" = None,
    ) -> None:
        """Give the claims of a write their replies, and go on with what was asked meanwhile."""
        reply = waited.result() if waited.done() else Unconfirmed("the store counts replicas before it waits for them")
        if isinstance(reply, Unconfirmed):
            instead: Unconfirmed | None = Unconfirmed(reply.detail)
        else:
            lacking = self._level.lacking(reply) or (counted and self._left(counted.result()))
            instead = UnderReplicated(lacking) if lacking else None
        for one, answer in claimed:
            one.resolve(answer if instead is None else instead)
        self._commit()

    def _left(self, info: object) -> str | None:
        """Return why a claim that enough replicas have does not count all the same, None where it does."""
        found = _CONNECTED.search(info) if isinstance(info, bytes) else None
        if found is None:
            return None
        now, before, self._replicas = self._loop.time(), self._replicas, int(found[1])
        if self._counted_at != self.at:  # another server
            self._counted_at, self._left_at = self.at, float("-inf")
        elif self._replicas < before:
            self._left_at = now
        return "a replica has left the master, and may have taken its place" if now - self._left_at < LEFT_S else None
