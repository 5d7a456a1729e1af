"""One connection to the upstream, and the one request that is on it, which is sent once.

A request ends in exactly one of three ways, and which one is certain: NotSent (the upstream has read no byte of it),
UpstreamLost (it may have, and no whole response came), or a response that is complete by its own framing.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from oncegate.buffers.memory import MemoryBudget
from oncegate.buffers.write_batcher import WriteBatcher
from oncegate.hostnames.failures import failure_words
from oncegate.known_heads.answers import KnownAnswers
from oncegate.messages.fields import MAX_HEAD_BYTES
from oncegate.upstream.arriving import ArrivingResponse
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.pool_entry import NEVER, PoolEntry
from oncegate.upstream.request import OutgoingRequest
from oncegate.upstream.tls import alert_of, is_handshake_refused, read_remainder

# Buffered bytes of a response at which reading pauses: usually, and while memory is tight.
BODY_HIGH_WATER, TIGHT_HIGH_WATER = 131072, 65536


class OwningPool(Protocol):
    """What a connection uses of the pool that owns it."""

    loop: asyncio.AbstractEventLoop
    buffered: MemoryBudget
    write_batcher: WriteBatcher
    known_answers: KnownAnswers

    def forget(self, connection: "Connection") -> None: ...


class Connection(ArrivingResponse, PoolEntry, asyncio.Protocol):
    """One connection and the one request that is on it. Between requests it is idle in the pool."""

    def __init__(self, pool: OwningPool) -> None:
        ArrivingResponse.__init__(self, pool.loop, pool.buffered)
        PoolEntry.__init__(self)
        self._pool = pool
        self._request = OutgoingRequest(pool.loop, pool.write_batcher)
        # The head came after the whole request had left, and allows another request.
        self._keep_alive = False
        # Bytes that came since the last byte of a body.
        self._head_bytes = 0

    # Sending the request ...

    def send(self, head: bytes, body: bytes, head_only: bool = False, may_bind: bool = True) -> None:
        """Send a whole request. From here on it counts as sent. `head_only`: the method is HEAD.

        `may_bind`: see OutgoingRequest.
        """
        self.response.begin(head_only)
        self._request.send(head, body, may_bind)

    def send_stream(self, head: bytes, body: AsyncIterator[bytes], chunked: bool, head_only: bool = False) -> None:
        """Send a request whose body comes in blocks. Its response may begin before the body ends."""
        self.response.begin(head_only)
        self._request.send_blocks(head, body, chunked, self._body_failed)

    def send_upgrade(self, head: bytes) -> None:
        """Send a request for another protocol. After a 101 all that comes is the body of the response."""
        self.response.begin(head_only=False, may_switch=True)
        self._request.send(head, b"")

    async def write(self, data: bytes, silence_s: float) -> None:
        """Send bytes of the other protocol. They count as a sign of life, so the deadline moves by `silence_s`."""
        await self._request.wait_for_room()
        self._request.write(data)
        self.deadline = max(self.deadline, self._loop.time() + silence_s)

    async def wait_until_written(self) -> None:
        """Wait until everything that was written has left the process."""
        await self._request.wait_until_written()

    def pause_writing(self) -> None:
        self._request.pause()

    def resume_writing(self) -> None:
        self._request.resume()

    def _body_failed(self, error: Exception) -> None:
        """End the exchange when the client's side broke: the upstream must not take a part of it for the whole."""
        stalled = isinstance(error, TimeoutError)
        words = "it paused for too long" if stalled else str(error) or failure_words(error)
        self.fail(UpstreamLost(f"the request's body broke off: {words}", timeout=stalled, body=True))

    # The end of its response ...

    @property
    def is_unanswered(self) -> bool:
        """Whether not one byte has come of the response."""
        return not (self._head_bytes or self.response.head or self.response.interims)

    def fail(self, failure: UpstreamLost | NotSent) -> None:
        """End the exchange with this failure, unless its response is complete already. Closes the connection."""
        if not self.response.is_complete and self._failure is None:
            failure.status = self.response.came_status()
            self._failure = failure
        self.deadline = NEVER
        if self._failure is not None:
            self.wake(self._failure)
        self.close()

    # Events of the socket ...

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self._request.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        response = self.response
        if response.parser is None and not response.is_switched:
            # The connection is idle, or its response complete: these bytes are never the next response.
            response.has_surplus = True
            self._pool.forget(self)
            return
        if self._taker is not None:
            self._receive_passing(data, self._taker)
            return
        buffered_before, had_head = response.buffered_bytes, response.head is not None
        is_first = not (had_head or self._head_bytes)
        unread = response.take_known(data, self._pool.known_answers) if is_first else data
        if not unread:
            self._buffered.used += response.buffered_bytes
            self._keep_alive = self._request.is_sent()
            self.wake()
            return
        if response.is_switched:
            response.on_body(data)
        elif reason := response.feed(unread):
            # A response that is complete stays so; `fail` closes the connection all the same.
            self.fail(UpstreamLost(reason))
        # An upstream that answers before it has the whole request may not read the rest: not reusable.
        if not had_head and response.head is not None:
            self._keep_alive = response.keep_alive and self._request.is_sent()
        self._count(len(data), response.buffered_bytes - buffered_before)
        if response.buffered_bytes > TIGHT_HIGH_WATER:
            self._pause_if_full()
        self.wake()
        if is_first and unread is data and self._failure is None:
            response.remember(data, self._pool.known_answers)

    def _receive_passing(self, data: bytes, take: Callable[[bytes], bool]) -> None:
        """Parse more of a body that is passed on: nothing of it is held here."""
        response = self.response
        if reason := response.feed(data):
            self.fail(UpstreamLost(reason))
        if response.chunks and self._failure is None:
            self._head_bytes = 0
            self._hand_over(take)
        else:
            self._count(len(data), response.buffered_bytes)
            self.wake()

    def _count(self, size: int, body_size: int) -> None:
        """Hold an incomplete response to the limits; `size` bytes of it came, `body_size` of them are its body."""
        self._buffered.used += body_size
        # Trailers and chunk extensions count like a head: they may not come for ever without a byte of body.
        self._head_bytes = 0 if body_size else self._head_bytes + size
        if self._head_bytes > MAX_HEAD_BYTES and not self.response.is_complete:
            self.fail(UpstreamLost("the upstream's head is too large"))

    def _pause_if_full(self) -> None:
        is_full = self._buffered.tight or self.response.buffered_bytes > BODY_HIGH_WATER
        if is_full and not self.response.is_complete:
            self.pause_reading()

    def eof_received(self) -> None:
        # The only end of a response without a length and without chunks. Any other response is cut short by it.
        if self.response.end_by_closing():
            self.wake()
        self.fail(UpstreamLost("the upstream closed the connection", closed=True))

    def connection_lost(self, exc: Exception | None) -> None:
        transport, self.transport = self.transport, None
        failure: UpstreamLost | NotSent | None = None
        # The response may be another protocol by now.
        expects_more = self.response.parser is not None or (self.response.is_switched and not self.is_discarded)
        if expects_more and transport is not None:
            failure = self._take_remainder(transport, exc)
        # A sender that waits for room would wait for ever.
        self._request.transport_lost()
        if not self.is_discarded:
            self._pool.forget(self)
            detail = f"the upstream's connection broke: {failure_words(exc)}"
            self.fail(failure or UpstreamLost(detail, closed=True))

    def _take_remainder(self, transport: asyncio.Transport, exc: Exception | None) -> UpstreamLost | NotSent:
        """Take what came before the connection broke: it may be the whole response. Return what broke it."""
        remainder = read_remainder(transport, exc)
        if remainder.data:
            self.data_received(remainder.data)
        if remainder.ended:
            self.eof_received()
        alert = alert_of(remainder.error)
        # Nothing ever came on this connection.
        if not self.idle_since and self.is_unanswered and is_handshake_refused(transport, alert):
            return NotSent(f"the upstream refused the TLS handshake: {alert}")
        detail = f"the upstream's connection broke: {alert or failure_words(remainder.error)}"
        return UpstreamLost(detail, closed=not alert)

    # The end of the exchange, and of the connection ...

    def is_reusable(self) -> bool:
        """Return whether the exchange left the connection clean, so that another request may be sent on it."""
        response = self.response
        is_clean = response.is_complete and self._keep_alive and not response.has_surplus
        if not is_clean or self._request.binds_connection or response.head is None or response.head.binds_connection:
            return False
        return self.transport is not None and not self.transport.is_closing()

    def become_idle(self, now: float) -> None:
        """Forget the exchange, keep the connection."""
        if self.response.buffered_bytes:
            self.discard_body()
        if self._is_reading_paused:
            # It was paused for a slow client, which need not have asked for more.
            self._resume_reading()
        self.response.parser = None
        self._head_bytes = 0
        self.idle_since, took_s = now, now - self.taken_at
        if took_s > self.longest_s:
            self.longest_s = took_s

    def close(self) -> None:
        """Abort the connection. What still arrives is not parsed."""
        self._request.cancel()
        self.response.stop()
        if self.transport is not None:
            self.transport.abort()

    def discard(self) -> None:
        """Close the connection for good, and forget its failure: an exception refers to frames that refer to this."""
        if self.response.is_complete:
            self._request.end_with_reset()
        self.close()
        self.is_discarded = True
        self._failure = self._arrival = None
