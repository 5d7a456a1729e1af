"""A Redis Cluster whose open keys stand in an index, which no script can write there: see layouts/open_index.py.

The entry of a claim is written before the claim. Where both go to the same master over the same connection, they leave
in one write, and a claim counts only once its entry was confirmed. Else the claim waits for its entry. So a request
that was sent has an entry, whatever dies and whatever slots are moved. An entry that is left behind is harmless:
whoever reads it reads the record.
"""

from collections.abc import Awaitable
from typing import Any

from redis.crc import key_slot

from oncegate.store.open_keys.scores import score_of_unknown
from oncegate.store.record import Claim
from oncegate.store.redis.layouts.open_index import entry_of
from oncegate.store.redis.node import Node
from oncegate.store.redis.replies import is_claimed
from oncegate.store.redis.server import is_refusal
from oncegate.store.redis.topologies.cluster import Cluster
from oncegate.store.redis.wire import ErrorReply, ScriptCall
from oncegate.store.results import Unconfirmed

_NOT_ENTERED = "the index of open keys does not take the key"
# Replies after which a claim has no record. One that found none may yet come.
_ENDED = (b"stored", b"complete", b"fenced")


class IndexedCluster(Cluster):
    """A cluster that writes the entry of a claim before the claim, and removes it after its settlement."""

    async def claim(self, call: ScriptCall, head: bytes, tail: bytes, left_s: float) -> Any:
        owner = call.owner
        if owner is None:
            return await super().claim(call, head, tail, left_s)
        name, member = entry_of(call.key, owner.token, is_sharded=True)
        enter = ("ZADD", name, self._lease_end(call, owner), member)
        node, pipelined, entered = self._slots[key_slot(name)], None, False
        if node is not None and node.up and node.claims is node.link and node is self._slots[key_slot(call.key)]:
            pipelined = node.link.command(*enter, deadline=call.deadline)
        else:
            entered = await self._enter(call, enter)
        # Also without an entry: it may find a record, and a full server still tells what it has.
        reply = await super().claim(call, head, tail, left_s)
        if not is_claimed(reply):
            if _takes_nothing(reply):
                self._write("ZREM", name, member, deadline=self._soon())
            return reply
        # The entry was answered before the claim, unless that went to another server in the end.
        entered = entered or (pipelined is not None and _is_kept(await pipelined)) or await self._enter(call, enter)
        return reply if entered else Unconfirmed(_NOT_ENTERED)

    async def run(self, call: ScriptCall, args: bytes) -> Any:
        reply = await super().run(call, args)
        if call.owner is not None and isinstance(reply, list):
            self._follow(call, call.owner, reply)
        return reply

    def _follow(self, call: ScriptCall, owner: Claim, reply: list[Any]) -> None:
        """Change the entry of a claim as its verb has changed the record. Nobody waits for it."""
        name, member = entry_of(call.key, owner.token, is_sharded=True)
        verdict = reply[0]
        if verdict in _ENDED or reply == [b"released", b"found"]:
            self._write("ZREM", name, member, deadline=self._soon())
        elif verdict == b"renewed":
            self._write("ZADD", name, self._lease_end(call, owner), member, deadline=self._soon())
        elif verdict == b"unknown" and call.script.verb == "settle":
            score = score_of_unknown(owner.mode, owner.created_ms)
            self._write("ZADD", name, score, member, deadline=self._soon())

    def _lease_end(self, call: ScriptCall, owner: Claim) -> int:
        # Where the slot's master is not known, any will do: the entry says when to look at the record.
        clock = next((node for node in (self._slots[key_slot(call.key)], *self.nodes) if node is not None), None)
        return (0 if clock is None else clock.now_ms()) + owner.lease_ms

    def _soon(self) -> float:
        return self._loop.time() + self._config.timeout_s

    def _write(self, verb: str, name: bytes, *words: bytes | int, deadline: float) -> None:
        """Change an entry, if its master is known. What is lost here is mended by who reads the entry."""
        node = self._slots[key_slot(name)]
        if node is not None and node.link.up:
            node.link.command(verb, name, *words, deadline=deadline)

    async def _enter(self, call: ScriptCall, words: tuple[str, bytes, int, bytes]) -> bool:
        """Write an entry wherever its set is now, and return whether that was confirmed."""
        return _is_kept(await self.command(words[1], *words, deadline=call.deadline))

    async def command(self, name: bytes, *words: bytes | str | int, deadline: float) -> Any:
        def issue(node: Node, call: ScriptCall) -> Awaitable[Any]:
            if call.asking:
                node.link.command("ASKING", deadline=call.deadline)
            return node.link.command(*words, deadline=call.deadline)

        # No script is called: its place is taken by the words.
        return (await self._call(ScriptCall(self._config.scripts["claim"], name, 0, deadline), issue))[1]


def _takes_nothing(reply: object) -> bool:
    """Return whether a claim with this reply has not taken its key, and no try of it that came late."""
    if isinstance(reply, list):
        return bool(reply[0] != b"late")
    return isinstance(reply, Unconfirmed) and not reply.maybe_executed


def _is_kept(reply: object) -> bool:
    """Return whether an entry was written, or never will be: a user made for an older version may lack the right."""
    return isinstance(reply, int) or (isinstance(reply, ErrorReply) and is_refusal(reply))
