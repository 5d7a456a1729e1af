"""Signs of life to a client, while there is nothing else to send: 102 before the head, comments between events."""

import asyncio
from collections.abc import Callable
from typing import Protocol

# So many interim responses at most. Java's HttpURLConnection fails after six (measured).
MOST_INTERIM = 4
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
# The byte order mark counts only as the first bytes of a stream (HTML standard, section 9.2.5).
BOM = b"\xef\xbb\xbf"


class BeatenResponse(Protocol):
    """A response, as far as heartbeats deal with it."""

    interim_count: int

    @property
    def client_gone(self) -> bool: ...

    def send_interim(self, head: bytes) -> bool: ...

    def write_between(self, data: bytes) -> None: ...


class Heartbeat:
    """Sends a 102 after each period until the response begins, four at most.

    `is_read()`: the request came whole. `counts`: of heartbeats by kind.
    """

    def __init__(
        self, response: BeatenResponse, period_s: float, is_read: Callable[[], bool], counts: dict[str, float]
    ) -> None:
        self._response, self._period_s, self._is_read, self._counts = response, period_s, is_read, counts
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(period_s, self._beat)

    def stop(self) -> None:
        """Send nothing more."""
        self._timer.cancel()

    def _beat(self) -> None:
        # A client that is still sending may not look for a response yet.
        if self._is_read():
            if not self._response.send_interim(PROCESSING):
                return
            self._counts["interim"] += 1
        if self._response.interim_count < MOST_INTERIM:
            self._timer = self._loop.call_later(self._period_s, self._beat)


class EventComments:
    """Writes a comment into a stream of events after each period of silence, but never into an event."""

    def __init__(self, response: BeatenResponse, period_s: float) -> None:
        self._response, self._period_s = response, period_s
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        # The last bytes of the stream. An event ends with an empty line, and the stream begins like the next event.
        self._tail = b"\n\n"
        self._count, self._is_begun = 0, False
        self._timer = self._loop.call_later(period_s, self._beat)

    def stop(self) -> None:
        """Write nothing more."""
        self._timer.cancel()

    def note(self, data: bytes) -> bytes:
        """Return the next bytes of the stream as they are to be written."""
        if not self._is_begun and self._count:
            # It would be a part of the first field's name now.
            data = data.removeprefix(BOM)
        self._is_begun, self._last_s = True, self._loop.time()
        self._tail = (self._tail + data[-3:])[-3:]
        return data

    def _beat(self) -> None:
        # Whoever relays a response stops at that, without an end of it.
        if self._response.client_gone:
            return
        silent_s = self._loop.time() - self._last_s
        if silent_s < self._period_s:
            self._timer = self._loop.call_later(self._period_s - silent_s, self._beat)
            return
        # A carriage return alone ends lines, too, but may be half of an end: such streams get no comments.
        end = next((end for end in (b"\r\n", b"\n") if self._tail.endswith(b"\n" + end)), b"")
        if end:
            self._count += 1
            # Its empty line is for readers that split a stream at empty lines.
            self._response.write_between(b":" + end + end)
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(self._period_s, self._beat)
