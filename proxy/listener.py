"""The public listener's connections: aiohttp's low-level server, with the deadlines and manners it lacks.

aiohttp parses requests and keeps connections; here it learns to answer a client that half-closed, to
time out slow heads, to count connections, and to refuse in our own words.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from proxy.client import Client
from proxy.problems import refusal

HEAD_S = 10.0  # for a request's head, from its first byte
KEEP_ALIVE_S = 75.0  # between requests
LINGER_S = 10.0  # for which the rest of a refused body is read and dropped, so that the answer is seen
SWEEP_S = 0.5

Handler = Callable[[web.BaseRequest], Awaitable[Client]]


class ClientConnection(RequestHandler):
    """One client's connection."""

    __slots__ = ("body", "gone", "half_closed", "head_since", "last", "room")

    def __init__(self, manager: "Listener", **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self.head_since: float | None = None
        self.half_closed = False
        self.last = False  # no further request is taken
        self.body: StreamReader | None = None  # of the last request whose head came
        self.room: asyncio.Future[None] | None = None  # somebody waits until more can be written
        self.gone: asyncio.Future[None] | None = None  # somebody waits while the client stays

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        manager = self._manager
        if isinstance(manager, Listener) and not manager.has_room():
            problem = refusal(503, "too many connections")
            transport.write(Client.closing_answer(problem))  # type: ignore[attr-defined]
            self.force_close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages:
            self._look_at(*self._messages[-1])
        if self._waiter is None or self._waiter.done() or self._messages:
            self.head_since = None
        elif data and self.head_since is None:
            self.head_since = self._loop.time()

    def _look_at(self, message: object, content: StreamReader) -> None:
        """Remember the newest request's body, and end its reading when its framing turns out to be broken."""
        if isinstance(message, _ErrInfo):
            self._end_body()
        else:
            self.body = content

    def _end_body(self) -> None:
        """Wake whoever waits for more of a body that cannot become whole."""
        if self.body is not None and not self.body.is_eof():
            # A TimeoutError, because aiohttp's own reading of what is left of a body takes no other for an end.
            self.body.set_exception(TimeoutError("the body is not well-formed"))

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the answer: the client said all it had to say, not that it left."""
        if not self._request_count or (self._waiter is not None and not self._waiter.done()):
            return None  # nothing was asked, or all of it is answered
        self.half_closed = True
        self._end_body()
        return not self.ssl_context  # TLS has no half-closed connections

    @property
    def asks_no_more(self) -> bool:
        """Whether the answer under way is the last one: we close, or the client half-closed and asks nothing else."""
        return self.last or (self.half_closed and not self._messages)

    def close(self) -> None:
        """Take no further request; aiohttp's own way would drop what is still to come of a body, too."""
        self.last = True
        if self.body is None or self.body.is_eof():
            super().close()
        else:
            self._keepalive = False

    def resume_writing(self) -> None:
        super().resume_writing()
        self._settle(self.room)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._settle(self.room)
        self._settle(self.gone)

    @staticmethod
    def _settle(future: "asyncio.Future[None] | None") -> None:
        if future is not None and not future.done():
            future.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - may quote the request
    ) -> web.StreamResponse:
        """Answer what aiohttp could not parse. After a failure of ours the head may be out: only closing is safe."""
        if not isinstance(exc, HttpProcessingError):
            self.log_exception("a request's handling failed", exc_info=exc)
            raise ConnectionError("the handling failed")
        client = Client(request, stall_s=HEAD_S)
        client.answer(refusal(status, "the request is not well-formed HTTP"), close=True)
        return client


class Listener(web.Server):
    """Makes the connections of one public listener and holds them to their limits."""

    def __init__(self, handler: Handler, *, max_connections: int) -> None:
        super().__init__(
            handler,
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=LINGER_S,
            auto_decompress=False,
            access_log=None,
            max_line_size=16384,
            max_field_size=16384,
        )
        self._max_connections = max_connections

    def __call__(self) -> RequestHandler:
        return ClientConnection(self, loop=self._loop, **self._kwargs)

    def has_room(self) -> bool:
        """Return whether the newest connection still fits."""
        return len(self._connections) <= self._max_connections

    async def sweep(self) -> None:
        """Close connections whose head takes too long, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            late = self._loop.time() - HEAD_S
            for connection in self.connections:
                if isinstance(connection, ClientConnection) and (connection.head_since or late + 1) < late:
                    self._time_out(connection)

    @staticmethod
    def _time_out(connection: ClientConnection) -> None:
        if connection.transport is not None:
            connection.transport.write(Client.closing_answer(refusal(408, "the head took too long")))
        connection.force_close()
