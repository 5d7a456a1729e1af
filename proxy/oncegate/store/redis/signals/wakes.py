"""Tells processes at once that a response which they read has gone on, or that a note is there for them.

Each record has a channel of its own, and each process. A message only wakes: what there is to read is in the record, or
in the mailbox. It may be lost, and so may all of them; then whoever waits polls. A message is a command of its own
beside the scripts: a script that may not publish would fail behind its write. Where nobody reads elsewhere, nothing is
published.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from oncegate.store.record import PREFIX_BYTES, Claim
from oncegate.store.record_name import store_key
from oncegate.store.redis.node import Node
from oncegate.store.redis.server import is_refusal
from oncegate.store.redis.signals.subscriber import Subscriber
from oncegate.store.redis.topologies.topology import StoreServers
from oncegate.store.redis.wire import ErrorReply

# How often channels are compared with the servers that there are, and connections with nothing to listen for closed.
CHECK_S = 1.0
# So long after a server has refused to subscribe or to publish it is asked again; and so often a process finds out
# whether it still hears of its mail.
REFUSED_S = 60.0
# Claims whose readers are told of the end. A process that has more is not waited for by so many readers.
MOST_CLAIMS = 10_000


def channel_of(key: bytes) -> bytes:
    """Return the channel of a record. In a cluster it has the record's slot."""
    return b"once:wake:" + store_key(key).removeprefix(b"once:")


def mail_channel_of(token: bytes) -> bytes:
    """Return the channel of the process that made a token. In a cluster it has the mailbox's slot."""
    return b"once:wake:{%s}" % token[:PREFIX_BYTES].hex().encode()


class RedisWakes:
    """The channels of a store, as `Wakes`. `is_sharded`: the store is a cluster. A reply may take `timeout_s`.

    `prefix`: of this process's tokens.
    """

    def __init__(self, servers: StoreServers, timeout_s: float, prefix: bytes, *, is_sharded: bool) -> None:
        self._mail = mail_channel_of(prefix)
        self._servers, self._timeout_s, self._is_sharded = servers, timeout_s, is_sharded
        self._publish = b"SPUBLISH" if is_sharded else b"PUBLISH"
        self._loop = asyncio.get_running_loop()
        # By channel: what is called, and the server that it is heard from.
        self._watchers: dict[bytes, list[Callable[[], None]]] = {}
        self._subscribers: dict[Node, Subscriber] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._muted_until = 0.0
        # Tokens of claims whose responses somebody reads elsewhere.
        self.read: set[bytes] = set()

    # Who reads ...

    def watch(self, key: bytes, wake: Callable[[], None]) -> Callable[[], None]:
        return self._watch(channel_of(key), wake)

    def _watch(self, channel: bytes, wake: Callable[[], None]) -> Callable[[], None]:
        watchers = self._watchers.setdefault(channel, [])
        watchers.append(wake)
        if len(watchers) == 1:
            self._listen(channel)
        if self._keeper is None:
            self._keeper = self._loop.create_task(self._keep())
        return partial(self._stop, channel, wake)

    def _stop(self, channel: bytes, wake: Callable[[], None]) -> None:
        watchers = self._watchers.get(channel, [])
        if wake in watchers:
            watchers.remove(wake)
        if not watchers and self._watchers.pop(channel, None) is not None:
            for subscriber in self._subscribers.values():
                if channel in subscriber.channels:
                    subscriber.leave(channel)

    def is_live(self, key: bytes) -> bool:
        channel = channel_of(key)
        subscriber = self._subscriber_of(channel)
        return subscriber is not None and channel in subscriber.live

    def watch_mail(self, wake: Callable[[], None]) -> None:
        self._watch(self._mail, wake)

    @property
    def tells_of_mail(self) -> bool:
        subscriber = self._subscriber_of(self._mail)
        return subscriber is not None and self._mail in subscriber.proved

    def _subscriber_of(self, channel: bytes) -> Subscriber | None:
        """Return who hears of a channel from the server that has it now."""
        node = self._servers.node_of(channel)
        return self._subscribers.get(node) if node is not None else None

    def _heard(self, channel: bytes) -> None:
        for wake in tuple(self._watchers.get(channel, ())):
            wake()

    # Who has written ...

    def appended(self, claim: Claim) -> None:
        """Wake who reads the response of a claim, and again when it is settled."""
        if len(self.read) >= MOST_CLAIMS:
            self.read.clear()
        self.read.add(claim.token)
        self._tell(channel_of(claim.key))

    def settled(self, claim: Claim) -> None:
        """Wake who reads the response of a claim for the last time."""
        self.read.discard(claim.token)
        self._tell(channel_of(claim.key))

    def posted(self, token: bytes) -> None:
        """Wake the process that made a token: there is a note for it."""
        self._tell(mail_channel_of(token))

    def _tell(self, channel: bytes) -> None:
        node, now = self._servers.node_of(channel), self._loop.time()
        if node is not None and node.link.up and now >= self._muted_until:
            deadline = now + self._timeout_s
            node.link.command(self._publish, channel, b"", deadline=deadline).add_done_callback(self._told)

    def _told(self, future: "asyncio.Future[Any]") -> None:
        reply = future.result()
        if isinstance(reply, ErrorReply) and is_refusal(reply):
            self._muted_until = self._loop.time() + REFUSED_S

    # The connections ...

    def _listen(self, channel: bytes) -> None:
        """Listen to a channel at the server that has it now, and at no other."""
        node = self._servers.node_of(channel)
        for other, subscriber in self._subscribers.items():
            if other is not node and channel in subscriber.channels:
                subscriber.leave(channel)
        if node is None:
            return
        if node not in self._subscribers:
            self._subscribers[node] = self._open(node)
        if channel not in self._subscribers[node].live and not self._subscribers[node].is_forbidden:
            self._subscribers[node].listen(channel)

    def _open(self, node: Node) -> Subscriber:
        subscriber = Subscriber(node.open_connection, self._timeout_s, is_sharded=self._is_sharded, heard=self._heard)
        subscriber.start()
        return subscriber

    async def _keep(self) -> None:
        """Follow the servers while somebody watches: slots move, masters change, and connections die silently.

        An idle connection that hears of the mail alone is not asked all the time whether it lives.
        """
        asked_anew = self._loop.time()
        while self._watchers or self._subscribers:
            await asyncio.sleep(CHECK_S)
            if self._loop.time() - asked_anew > REFUSED_S:
                asked_anew = self._loop.time()
                for subscriber in self._subscribers.values():
                    subscriber.is_forbidden = False
                    subscriber.proved.discard(self._mail)
            for node, subscriber in list(self._subscribers.items()):
                if not subscriber.channels or node not in self._servers.nodes:
                    # To its end, also if this ends meanwhile.
                    await asyncio.shield(self._subscribers.pop(node).close())
                elif node.link.up and subscriber.up and subscriber.at != node.link.at:
                    subscriber.renew("the requests go to another server")
                elif subscriber.channels != {self._mail} or not self.tells_of_mail:
                    subscriber.check()
            for channel in tuple(self._watchers):
                self._listen(channel)
            if self._mail in self._watchers and not self.tells_of_mail:
                self._tell(self._mail)
        self._keeper = None

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        subscribers, self._subscribers = self._subscribers, {}
        await asyncio.gather(*[subscriber.close() for subscriber in subscribers.values()])
