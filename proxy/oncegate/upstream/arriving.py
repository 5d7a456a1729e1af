"""What arrives on a connection to the upstream, and those who wait for it: a head, a body piece by piece."""

import asyncio
from collections.abc import Callable

from oncegate.buffers.memory import MemoryBudget
from oncegate.messages.response_head import ResponseHead
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.pool_entry import NEVER
from oncegate.upstream.response import IncomingResponse


class ArrivingResponse:
    """The response on one connection, for whoever waits for it.

    `response` is what has arrived of it. `deadline` is a time of the loop; the pool fails connections whose deadline is
    over.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, buffered: MemoryBudget) -> None:
        self._loop, self._buffered = loop, buffered
        self.transport: asyncio.Transport | None = None
        self.response = IncomingResponse()
        self.deadline = NEVER
        self._failure: UpstreamLost | NotSent | None = None
        # Done when something arrives; fails with the exchange.
        self._arrival: asyncio.Future[None] | None = None
        # Gets each piece of the body at once, while `pass_body` waits for `_arrival`; returns whether it takes more.
        self._taker: Callable[[bytes], bool] | None = None
        self._silence_s = NEVER
        self._is_reading_paused = False

    def next_arrival(self, silence_s: float) -> "asyncio.Future[None]":
        """Return a future that is done when something arrives. It raises UpstreamLost or NotSent when nothing will."""
        if self._failure is not None:
            raise self._failure
        self.deadline = self._loop.time() + silence_s
        self._arrival = self._loop.create_future()
        return self._arrival

    async def wait_for_head(self, silence_s: float, on_progress: Callable[[], None] = lambda: None) -> ResponseHead:
        """Return the head of the final response. Raises UpstreamLost where it takes longer than `silence_s`.

        An interim response starts that time again. `on_progress` is called at the beginning and for every such start.
        """
        now, until, interim_count = self._loop.time, 0.0, -1
        # The time may have passed while our own process stood still, with the response in the socket.
        extensions = 1
        while self.response.head is None:
            if len(self.response.interims) > interim_count:
                until, interim_count = now() + silence_s, len(self.response.interims)
                on_progress()
            elif extensions and now() >= until:
                until, extensions = now() + silence_s, 0
            await self.next_arrival(until - now())
        return self.response.head

    def is_complete_in(self, max_bytes: int) -> bool:
        """Return whether the whole response is here, with no more than `max_bytes` of body."""
        return self.response.is_complete and self.response.buffered_bytes <= max_bytes

    async def next_chunk(self, silence_s: float) -> bytes:
        """Return the next bytes of the body, empty at its end. Raises UpstreamLost where it broke off."""
        while not self.response.chunks:
            if self.response.is_complete:
                return b""
            self._resume_reading()
            await self.next_arrival(silence_s)
        return self.take_body()

    async def pass_body(self, take: Callable[[bytes], bool], silence_s: float) -> bool:
        """Give each piece of the body to `take` as it comes; return whether the body goes on. Raises UpstreamLost.

        It goes on when `take` returned False, which pauses reading until the next call, and after `wake`.
        """
        response = self.response
        if not response.chunks:
            if response.is_complete:
                return False
            self._resume_reading()
            arrival = self.next_arrival(silence_s)
            self._taker, self._silence_s = take, silence_s
            try:
                await arrival
            finally:
                self._taker = None
        elif not take(self.take_body()):
            self.pause_reading()
        return True

    def _hand_over(self, take: Callable[[bytes], bool]) -> None:
        """Give what came of the body to its taker, and end the wait if it takes no more, or nothing more comes.

        It is not counted as buffered: nobody holds it.
        """
        response, self.deadline = self.response, self._loop.time() + self._silence_s
        chunks, response.buffered_bytes = response.chunks, 0
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        try:
            takes_more = take(data)
        except Exception as error:
            # It belongs to whoever called `pass_body`, not to the event loop.
            self.wake(error)
            return
        if not takes_more:
            self.pause_reading()
            self.wake()
        elif response.is_complete:
            self.wake()

    def take_body(self) -> bytes:
        """Return the bytes of the body that have arrived, and forget them."""
        response, chunks = self.response, self.response.chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._buffered.used -= response.buffered_bytes
        response.buffered_bytes = 0
        if self._is_reading_paused:
            self._resume_reading()
        return data

    def wake(self, failure: Exception | None = None) -> None:
        """Let whoever waits for something to arrive look at what there is, or raise `failure` there."""
        # The pool's sweep may come before whoever waits has run.
        self.deadline, self._taker = NEVER, None
        if self._arrival is None or self._arrival.done():
            return
        if failure is None:
            self._arrival.set_result(None)
        else:
            self._arrival.set_exception(failure)

    def pause_reading(self) -> None:
        """Read nothing more from the socket until more of the body is asked for."""
        if self.transport is not None and not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._is_reading_paused and self.transport is not None:
            self._is_reading_paused = False
            self.transport.resume_reading()

    def discard_body(self) -> None:
        """Forget the bytes of the body that nobody took."""
        if self.response.buffered_bytes:
            self._buffered.give(self.response.buffered_bytes)
            self.response.chunks.clear()
            self.response.buffered_bytes = 0
