"""One client's connection, from its first request to its end.

It answers a client that half-closed, finishes what a slow client still has to receive, and ends a response cleanly
only where it is complete.
"""

import asyncio
from typing import cast

from aiohttp import StreamReader

from oncegate.downstream.body import BufferedBody
from oncegate.downstream.protocol import wake
from oncegate.downstream.reader import KEPT_HEAD_BYTES, ConnectionOwner, RequestReader
from oncegate.downstream.request import Request, Unread, known_request, request_of
from oncegate.downstream.response import ResponseWriter
from oncegate.known_heads.memo import ConnectionMemo
from oncegate.messages.problems import Problem, refusal
from oncegate.messages.request_head import ForwardedInfo
from oncegate.messages.request_line import Malformed
from oncegate.messages.response_head import status_line
from oncegate.observe.outcome import Outcome, RequestReport

# For a request's head, from its first byte; a shorter window of the minimum rate replaces it.
HEAD_S = 10.0
# Between requests.
KEEP_ALIVE_S = 75.0
# How long the client of a connection over TLS has to read its last response and close.
TLS_LINGER_S = 1.0


class ClientConnection(RequestReader):
    """One client's connection.

    `forwarded` is what forwarded requests say of its client; `retiring`: the next response is the last.
    """

    __slots__ = (
        "_is_lost", "_lingering", "_quiet_since_s", "_request", "_stops", "counts", "forwarded", "leave_waiter",
        "minimum_rate", "questions", "reader_waiter", "request_ids", "retiring", "room_waiter", "write_batcher",
    )  # fmt: skip

    def __init__(self, owner: ConnectionOwner) -> None:
        super().__init__(owner)
        self.write_batcher, self.minimum_rate, self.retiring = owner.write_batcher, owner.minimum_rate, owner.retiring
        self.request_ids, self.counts = owner.request_ids, owner.counts
        self.questions: object = None
        self.forwarded: ForwardedInfo
        # No further request is taken; and: the event loop has given the connection up.
        self._stops = self._is_lost = False
        # The request that is being answered, or since when there is none (the loop's time).
        self._request: Request | None = None
        self._quiet_since_s = 0.0
        # Done when the client ends a connection whose last response is out.
        self._lingering: asyncio.Future[None] | None = None
        # Done when more can be written, when the client left, and when it left or closed its side.
        self.room_waiter: asyncio.Future[None] | None = None
        self.leave_waiter: asyncio.Future[None] | None = None
        self.reader_waiter: asyncio.Future[None] | None = None

    @property
    def docs_url(self) -> str:
        """Where docs/ is served, for the types of problems; empty for none."""
        return self.owner.docs_url

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # TLS has no half-closed connections.
        is_tls = not cast(asyncio.Transport, transport).can_write_eof()
        self.forwarded = self.owner.forwarded_info(transport.get_extra_info("peername"), is_tls)
        self._quiet_since_s = self._loop.time()
        if not self.owner.add(self):
            self._refuse(Outcome.OVERLOADED, refusal(503, "too many connections"))
            self.force_close()

    # Its end ...

    @property
    def _has_more(self) -> bool:
        """Whether further requests came already."""
        return bool(self._messages or self._rest)

    def is_last_response(self) -> bool:
        """Return whether a response that begins now must say that it is the last."""
        return self._stops or ((self._half_closed or self.retiring) and not self._has_more)

    @property
    def is_half_closed(self) -> bool:
        """Whether the client closed its side of the connection."""
        return self._half_closed

    def close(self) -> None:
        """Take no further request."""
        self._stops = True
        self._end_other()
        # The rest of a body that is on its way is read.
        if self._body is None or self._body.is_eof():
            self._close = True
            if self._task is not None:
                wake(self._waiter)
            elif self.transport is not None:
                self.transport.close()

    def force_close(self) -> None:
        """Close now, and answer nothing more."""
        self._force_close = True
        wake(self._waiter)
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    @property
    def is_tunnel(self) -> bool:
        """Whether another protocol than HTTP is spoken."""
        return self._taker is not None

    def close_quiet(self, latest_s: float) -> None:
        """Close if no request is being answered, and the last response was out by `latest_s` (the loop's time)."""
        if self._quiet_since_s > latest_s:
            return
        if self._lingering is not None:
            wake(self._lingering)
        elif self._is_idle:
            self.close()

    def close_idle(self, latest_s: float) -> None:
        """Close if nothing was answered since `latest_s` (the loop's time)."""
        if self._quiet_since_s <= latest_s and self._is_idle:
            self.force_close()

    async def finish(self, timeout_s: float) -> None:
        """End with the response under way. It has so long; so long again without the rest of its request's body."""
        self._force_close = True
        if (task := self._task) is not None:
            wake(self._waiter)
            _, left = await asyncio.wait([task], timeout=timeout_s)
            if left and self._request is not None:
                self._request.content.set_exception(ConnectionError("the proxy ends"))
                _, left = await asyncio.wait([task], timeout=timeout_s)
            if left:
                task.cancel()
        self.force_close()

    @property
    def has_unsent_bytes(self) -> bool:
        """Whether bytes of a response are still to leave the process."""
        return self.transport is not None and self.transport.get_write_buffer_size() > 0

    @property
    def waits_for_client(self) -> bool:
        """Whether the client has to move: receive its response, or send the rest of its request."""
        return self.has_unsent_bytes or (self._body is not None and not self._body.is_eof())

    def abort(self) -> None:
        """Close at once, and never so that what was sent looks complete."""
        if self.transport is not None:
            self.transport.abort()
        self.force_close()

    def resume_writing(self) -> None:
        super().resume_writing()
        wake(self.room_waiter)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_lost = True
        if self._task is None:
            self.owner.forget(self)
        self.force_close()
        # Each of them refers to this connection.
        self._parser = self._task = None
        content = self._body if self._request is None else self._request.content
        if content is not None and not content.is_eof():
            # Whoever waits for more of the body stops waiting, also where it was refused.
            content.set_exception(exc or ConnectionResetError("the client left"))
        self._end_other()
        self._taker = None
        wake(self._lingering)
        wake(self.room_waiter)
        wake(self.leave_waiter)
        wake(self.reader_waiter)

    def eof_received(self) -> bool | None:
        keeps_open = super().eof_received()
        wake(self._lingering)
        wake(self.reader_waiter)
        return keeps_open

    # Requests are answered ...

    async def start(self) -> None:
        """Answer one request after the other until the connection ends."""
        try:
            while True:
                if (self._rest or self._buffer_paused) and not self._messages:
                    self._read_on()
                if not self._messages:
                    await self._next_request()
                    self._waiter = None
                    if not self._messages:
                        break
                request = self._pop_request()
                if isinstance(request, Malformed):
                    self._refuse(Outcome.REQUEST_REFUSED, refusal(request.status, request.detail))
                    await self._linger()
                    break
                self._request = request
                try:
                    await self.owner.handler(request)
                finally:
                    self._request = None
                    # Of a request that was not to be remembered: another one behind it must not be taken for it.
                    self._whole_segment = b""
                response = request.response
                if response.closes or self.writing_paused:
                    await self._finish(response)
                # This side or the client closes, or the client has half-closed behind this request.
                ends = response.closes or self._stops or self._force_close or (self._half_closed and not self._has_more)
                goes_on = response.finished and not ends
                if request.known is None and not request.content.is_eof():
                    goes_on = await self._drop_rest(request.content) and goes_on
                if not goes_on:
                    # A client that asked for the end sends nothing more, or should not.
                    if response.finished and (self._ignores_more or not request.message.should_close):
                        await self._linger(ends_by_closing=response.owes_clean_close)
                    break
                self._quiet_since_s = self._loop.time()
                # Else an idle connection would keep its last request.
                del request, response
        finally:
            self._task = None
            if self.transport is not None:
                self.write_batcher.flush()
                self.transport.close()
            if self._is_lost:
                self.owner.forget(self)

    def _pop_request(self) -> Request | Malformed:
        """Return the next request, or what came in its place."""
        message, content = self._messages.pop(0)
        if isinstance(content, BufferedBody):
            return known_request(content, self)
        if not self.owner.head_cache.enabled:
            self.memo = ConnectionMemo()
        return message if isinstance(message, Malformed) else request_of(message, content, self)

    async def _finish(self, response: ResponseWriter) -> None:
        """Wait until a response is out of the process far enough."""
        if response.owes_clean_close:
            await response.close_cleanly()
        elif self.writing_paused:  # the next response would only be added to this one's backlog
            await response.wait_room()

    def _next_request(self) -> "asyncio.Future[None]":
        """Return a future that is done when the next request's head is complete."""
        if self._due or self._head_bytes > KEPT_HEAD_BYTES:
            self._go_idle()
        self._waiter = self._loop.create_future()
        return self._waiter

    def _refuse(self, outcome: Outcome, problem: Problem) -> None:
        """Answer what is no request, with nothing of it, behind the responses to requests."""
        asked = Unread(self, problem)
        self.owner.observe(RequestReport(outcome, problem.status, "", reason=problem.detail, asked=asked))
        if self.transport is not None:
            self.write_batcher.flush()
            self.transport.write(closing_response(problem, asked.id_line))

    async def _drop_rest(self, content: StreamReader | BufferedBody) -> bool:
        """Read the rest of a refused body for a while, so that its sender reads the response; return if it came."""
        # The body's sender, cancelled just now, still waits for the next bytes. There is room for one reader.
        await asyncio.sleep(0)
        came = True
        try:
            async with asyncio.timeout(self.owner.linger_s):
                while not content.is_eof() and not self._force_close:
                    await content.readany()
        except Exception:  # broken off, malformed, or too long: all the same now
            came = False
        content.set_exception(ConnectionError("the body was dropped"))
        return came

    async def _linger(self, *, ends_by_closing: bool = False) -> None:
        """End this side, and read on for a while: a client that is still sending gets to read its last response.

        Closed at once, the connection would be reset by what comes, and the response lost (RFC 9112, section 9.6).
        `ends_by_closing`: the client waits for the end of the connection as that of its response.
        """
        if (transport := self.transport) is None or self._half_closed:
            return
        time_s = self.owner.linger_s
        if not transport.can_write_eof():  # TLS has no half-closed connections
            if ends_by_closing:
                return
            time_s = min(time_s, TLS_LINGER_S)
        # Whatever comes is dropped.
        self._close = True
        self._quiet_since_s = self._loop.time()
        self._lingering = self._loop.create_future()
        self.write_batcher.flush()
        self._reading_paused = self._buffer_paused = False
        self._resume_transport()
        if transport.can_write_eof():
            transport.write_eof()
        await asyncio.wait([self._lingering], timeout=time_s)


def closing_response(problem: Problem, fields: bytes) -> bytes:
    """Return a problem as the last response of a connection, for what never became a request; see `send_problem`."""
    body = problem.body()
    length = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    return b"".join((status_line(problem.status, problem.reason), problem.head_fields(), fields, length, body))
