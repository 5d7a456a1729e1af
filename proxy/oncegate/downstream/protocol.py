"""A client's connection as the event loop, aiohttp's parser and its bodies know it: who may read and write now.

aiohttp's own class of this kind makes a parser, a task, a timer and fifty attributes for each connection. That is more
than half of what a request costs on a connection of its own (measured).
"""

import asyncio
from contextlib import suppress
from typing import Any, Protocol

# Of what comes behind a request for another protocol before somebody takes it; then reading pauses.
TAIL_BYTES = 65536


class BytesTaker(Protocol):
    """Takes the bytes of another protocol than HTTP."""

    def feed_data(self, data: bytes) -> object: ...

    def feed_eof(self) -> None: ...


class ParserProtocol(asyncio.Protocol):
    """What aiohttp's parser and bodies ask of a connection.

    `transport` is None before the connection is made, and once it is lost or closed at once. `writing_paused`: the
    client takes its response slower than it is written.
    """

    __slots__ = (
        "_buffer_paused", "_message_tail", "_parser", "_reading_paused", "_taker", "_upgraded",
        "transport", "writing_paused",
    )  # fmt: skip

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.writing_paused = False
        # Reading is paused for the reader of a body; or for requests that wait, or for the taker of another protocol.
        self._reading_paused = self._buffer_paused = False
        self._parser: Any = None
        # After a switch to another protocol: what nobody took yet, and who takes it.
        self._upgraded, self._message_tail = False, b""
        self._taker: BytesTaker | None = None

    @property
    def connected(self) -> bool:
        """Whether more of a body may come."""
        return self.transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    # Writing ...

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False

    # Reading ...

    def pause_reading(self) -> None:
        """Read no more, as the reader of a body has enough."""
        self._reading_paused = True
        if self._parser is not None and not self._upgraded:
            self._parser.pause_reading()
        self._pause_transport()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on if reading was paused. aiohttp asks for it after every read, and feeds its parser nothing then."""
        if not self._reading_paused:
            return
        self._reading_paused = False
        if resume_parser and not self._upgraded:
            # What the parser kept in the pause; it may pause again.
            self.data_received(b"")
        if not (self._reading_paused or self._buffer_paused):
            self._resume_transport()

    def _pause_for_buffer(self) -> None:
        """Read no more, as requests wait for their turn, or bytes for their taker."""
        if not self._buffer_paused:
            self._buffer_paused = True
            self._pause_transport()

    def _resume_for_buffer(self) -> None:
        self._buffer_paused = False
        if not self._reading_paused:
            self._resume_transport()

    def _pause_transport(self) -> None:
        if self.transport is not None:
            with suppress(RuntimeError):  # it is closing
                self.transport.pause_reading()

    def _resume_transport(self) -> None:
        if self.transport is not None:
            with suppress(RuntimeError):  # as above
                self.transport.resume_reading()

    # Another protocol ...

    def set_parser(self, taker: BytesTaker) -> None:
        """Give `taker` what comes from now on, and what came since the request for its protocol."""
        self._taker = taker
        if self._message_tail:
            taker.feed_data(self._message_tail)
            self._message_tail = b""
        if self._buffer_paused:
            self._resume_for_buffer()

    def _take_other(self, data: bytes) -> None:
        """Take bytes of another protocol."""
        if self._taker is not None:
            self._taker.feed_data(data)
        else:
            self._message_tail += data
            if len(self._message_tail) >= TAIL_BYTES:
                self._pause_for_buffer()

    def _end_other(self) -> None:
        """A tunnel has no end of its own to wait for: end it."""
        if self._taker is not None:
            self._taker.feed_eof()


def wake(future: "asyncio.Future[None] | None") -> None:
    """Let whoever waits for a future go on, if anybody does."""
    if future is not None and not future.done():
        future.set_result(None)
