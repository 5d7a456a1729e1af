"""The connection over which one server tells that a response has gone on, or a note is there. It carries no more."""

from collections.abc import Callable
from functools import partial
from typing import Any

from redis.asyncio.connection import AbstractConnection

from oncegate.store.redis.link import Link
from oncegate.store.redis.server import Opener, greet, is_refusal
from oncegate.store.redis.talk import Talk
from oncegate.store.redis.wire import ErrorReply, resp

_MESSAGES = (b"message", b"smessage")
# What ends a sharded subscription, asked for or not: the server says so, too, when the channel's slot has moved.
_ENDED = b"sunsubscribe"


class Subscriber(Link):
    """Hears of the channels of one server. `heard(channel)`: something was published there, or may have been.

    `is_sharded`: the server is one of a cluster. `live`: the channels that the server has confirmed; `proved`: those
    of which something was heard over this connection. `is_forbidden`: its user may not subscribe.
    """

    def __init__(
        self, open_connection: Opener, stall_s: float, *, is_sharded: bool, heard: Callable[[bytes], None]
    ) -> None:
        super().__init__(open_connection, self._begin, stall_s)
        words = (b"SSUBSCRIBE", b"SUNSUBSCRIBE") if is_sharded else (b"SUBSCRIBE", b"UNSUBSCRIBE")
        self._subscribe, self._unsubscribe = words
        self._heard = heard
        self._asked: set[bytes] = set()
        self.live: set[bytes] = set()
        self.proved: set[bytes] = set()
        self.is_forbidden = False

    def listen(self, channel: bytes) -> None:
        """Subscribe, now or as soon as there is a connection. To be repeated while a channel is not live."""
        self._asked.add(channel)
        if self.up:
            self._ask(channel)

    def leave(self, channel: bytes) -> None:
        self._asked.discard(channel)
        self.live.discard(channel)
        self.proved.discard(channel)
        if self.up:
            # Its reply is told from a subscription that the server ends by itself.
            self._send(self._unsubscribe, channel, verb=str(channel))

    @property
    def channels(self) -> set[bytes]:
        """Those that are asked for."""
        return self._asked

    def check(self) -> None:
        """Find out whether the server still answers: a connection that is idle may be gone without a sign."""
        if self.up:
            self.command("PING", deadline=self._loop.time() + self.stall_s)

    async def _begin(self, _link: Link, connection: AbstractConnection) -> None:
        await greet(Talk(self), connection)
        self.live.clear()
        for channel in self._asked:
            self._ask(channel)

    def _ask(self, channel: bytes) -> None:
        self._send(self._subscribe, channel).add_done_callback(partial(self._confirmed, channel))

    def _send(self, word: bytes, channel: bytes, verb: str = "") -> Any:
        return self._issue(b"*2\r\n" + resp(word, channel), self._loop.time() + self.stall_s, verb=verb)

    def _confirmed(self, channel: bytes, future: Any) -> None:
        reply = future.result()
        if isinstance(reply, ErrorReply):
            # After any other error, such as MOVED, the channel is asked for again where it is by then.
            self.is_forbidden = is_refusal(reply)
        elif isinstance(reply, list) and channel in self._asked:
            self.live.add(channel)
            # Something may have happened before.
            self._heard(channel)

    def _resolve_oldest(self, reply: Any) -> bool:
        if type(reply) is list and len(reply) > 1:
            kind, channel = reply[:2]
            if kind in _MESSAGES:
                self.proved.add(channel)
                self._heard(channel)
                return True
            if kind == _ENDED and not (self._waiting and self._waiting[0][2] == str(channel)):
                self.live.discard(channel)
                self.proved.discard(channel)
                return True
        return super()._resolve_oldest(reply)

    def _drop(self, reason: str) -> None:
        self.live.clear()
        self.proved.clear()
        super()._drop(reason)
