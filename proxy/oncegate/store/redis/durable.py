"""Claims that take effect only once replicas or disks have them: the level, and the connection on which they wait.

WAIT and WAITAOF hold up every command behind them, so these claims have a connection of their own. Claims that come
while one WAIT runs leave together in the next write, with one WAIT for all of them.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from oncegate.store.redis import arguments
from oncegate.store.redis.link import Link
from oncegate.store.redis.replies import first_error, is_claimed, is_out_of_memory, is_passing
from oncegate.store.redis.talk import Question, command
from oncegate.store.redis.wire import ErrorReply, Script, ScriptCall
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
# What decides whether a server that says "always" writes to its disk before it replies. During a rewrite of its file it
# does not, where the second one is "yes".
_POLICY = (b"appendfsync", b"always"), (b"no-appendfsync-on-rewrite", b"no")
_ASK_POLICY = ("CONFIG", "GET", *(name.decode() for name, _ in _POLICY))
_CONNECTED = re.compile(rb"connected_slaves:(\d+)")


@dataclass(frozen=True, slots=True)
class DurabilityLevel:
    """Where a claim has to be before it counts: on `replicas` replicas, and with `fsync` on the disk of each server."""

    replicas: int
    fsync: bool

    def wait_command(self, wait_ms: int) -> tuple[str | int, ...]:
        """Return the command that waits until the server has this level, or `wait_ms` are over."""
        return ("WAITAOF", 1, self.replicas, wait_ms) if self.fsync else ("WAIT", self.replicas, wait_ms)

    def questions(self) -> list[Question]:
        """Return what a server has to be asked to find out whether it can give the level, besides its INFO."""
        # A wait for no replica and no disk ends at once: it shows whether the user may wait.
        wait = ("WAITAOF", 0, 0, 1) if self.fsync else ("WAIT", 0, 1)
        return [command(*wait), *([command(*_ASK_POLICY)] if self.fsync else ())]

    def unable_by(self, replies: Sequence[object]) -> str | None:
        """Return why a server with these replies to `questions` cannot give the level, or None."""
        if isinstance(replies[0], ErrorReply):
            return f"cannot be waited for: {replies[0]}"
        return unsafe_policy(replies[1]) if self.fsync else None

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


def unsafe_policy(reply: object) -> str | None:
    """Return why a server that replied so to CONFIG GET may confirm what is not on its disk, or None.

    WAITAOF is not believed: Valkey 9.1 confirms at once with `appendfsync everysec`. No probe can tell the policies
    apart either, because a write without fsync takes no longer than one with it on a fast disk.
    """
    if not isinstance(reply, list):
        return f"does not say whether it has appendfsync always, which the durability fsync needs: {_reason(reply)}"
    values = dict(zip(reply[::2], reply[1::2], strict=True))
    for name, needed in _POLICY:
        if (value := values.get(name, b"unknown")) != needed:
            found = f"{name.decode()} {value.decode(errors='replace')}"
            return f"has {found}, and the durability fsync needs {name.decode()} {needed.decode()}"
    return None


def _reason(reply: object) -> str:
    """Return why there is no usable reply, for operators."""
    return reply.reason if isinstance(reply, Unconfirmed) else f"{reply} (the user needs +config|get)"


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


class ClaimCheck:
    """Whether claims at one server can succeed: it gives the level, and its user may do all that a request needs.

    A probe claims and frees keys that no request has. The replies to `questions` decide whether an `exchange` follows.
    Both are noted.
    """

    def __init__(self, scripts: dict[str, Script], level: DurabilityLevel | None) -> None:
        self._scripts, self._level = scripts, level
        self._level_questions = level.questions() if level else []
        # Why the server cannot give the level, and why the last probe failed; empty where all is well.
        self.below_level = self.failure = ""
        # Whether the server's user may do what packed records need. A user made for an older version may not.
        self.may_pack = True
        # Of an exchange, the calls about records that are hashes.
        self._plain_steps = 0
        # Whether probes will fail until somebody changes the server.
        self._forbidden = False

    @property
    def refusal(self) -> str:
        """Why claims are not even tried, or empty."""
        return self.below_level or (self.failure if self._forbidden else "")

    def questions(self, key: bytes) -> list[Question]:
        """Return what the server is asked about the level, and a claim of `key` with its release; empty for none."""
        probe = arguments.claim_and_free(self._scripts, arguments.probe_claim(key)) if key else []
        return [*self._level_questions, *probe]

    def exchange(self, replies: Sequence[object], key: bytes, packed_key: bytes) -> list[Question]:
        """Return the calls of an exchange in both layouts, for a server that claimed and freed a key, else none."""
        probed = replies[len(self._level_questions) :]
        if not probed or first_error(probed):
            return []
        plain = arguments.execute(self._scripts, arguments.probe_claim(key))
        self._plain_steps = len(plain)
        return plain + arguments.execute_packed(self._scripts, arguments.probe_claim(packed_key))

    def note(self, replies: Sequence[object], exchanged: Sequence[object]) -> None:
        count = len(self._level_questions)
        self.below_level = (self._level.unable_by(replies[:count]) or "") if self._level else ""
        plain, packed = exchanged[: self._plain_steps], exchanged[self._plain_steps :]
        if not (probed := [*replies[count:], *plain]):
            return
        if packed:
            refused = first_error(packed)
            self.may_pack = refused is None or is_out_of_memory(refused) or is_passing(refused)
        error = first_error(probed)
        # At its memory limit a server refuses first-time keys, but it works.
        if error is None or is_out_of_memory(error):
            self.failure, self._forbidden = "", False
        else:
            self.failure, self._forbidden = f"cannot take claims: {error}", not is_passing(error)

    def note_forbidden(self, reason: str) -> None:
        """Note a claim of a request that the server's user may not execute."""
        self.failure, self._forbidden = f"cannot take claims: {reason}", True


class _PendingClaim(NamedTuple):
    """A claim that is to be sent with the next WAIT. `future` gets its reply."""

    future: "asyncio.Future[Any]"
    call: ScriptCall
    args: bytes

    def resolve(self, result: object) -> None:
        if not self.future.done():
            self.future.set_result(result)


# Replies come in order, so the last one of several comes last.
_OUT_OF_ORDER = Unconfirmed("the store replies out of order")

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
        latest = self._loop.time() + self.stall_s * MIN_SHARE
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
        replies = [self.command(*words, deadline=deadline)]
        if self._level.fsync:
            # Somebody may have changed it since the last inspection.
            replies.append(self.command(*_ASK_POLICY, deadline=deadline))
        if self._level.replicas:
            replies.append(self.command("INFO", "replication", deadline=deadline))
        replies[-1].add_done_callback(lambda _: self._waited(claimed, replies))

    def _claim_replied(self, pending: _PendingClaim, claimed: _Claimed, future: "asyncio.Future[Any]") -> None:
        reply = future.result()
        if isinstance(reply, list):
            self._note_time(int(reply[1]))
        if is_claimed(reply):
            claimed.append((pending, reply))
        else:
            pending.resolve(reply)

    def _waited(self, claimed: _Claimed, replies: list["asyncio.Future[Any]"]) -> None:
        """Resolve the claims of a batch after its WAIT, and send those that came meanwhile."""
        failure = self._failure([reply.result() if reply.done() else _OUT_OF_ORDER for reply in replies])
        for pending, claim_reply in claimed:
            pending.resolve(claim_reply if failure is None else failure)
        self._commit()

    def _failure(self, replies: list[Any]) -> Unconfirmed | None:
        """Return why the claims before a WAIT do not count, or None, by the replies to it and to what came with it."""
        waited, *others = replies
        if isinstance(waited, Unconfirmed):
            return Unconfirmed(waited.reason)
        lacking = self._level.lacking(waited)
        if self._level.fsync:
            lacking = lacking or unsafe_policy(others.pop(0))
        if self._level.replicas:
            left = self._replica_left(others.pop())
            lacking = lacking or left
        return UnderReplicated(lacking) if lacking else None

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
