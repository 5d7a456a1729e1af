"""Answers readers that speak the Durable Streams protocol: those with an `offset` in the query."""

import asyncio
import time
from dataclasses import dataclass

from oncegate.adaptation.blocks import read_block, values
from oncegate.gateway.answers import REFUSED, Refuse
from oncegate.gateway.streams.address import gone
from oncegate.gateway.streams.own import SAFE
from oncegate.gateway.streams.reader import Reader, not_yet, refuse_for_now
from oncegate.messages.framing import COUNTED, STATED
from oncegate.messages.problems import refusal
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.streams.durable_streams import (
    CLOSED,
    CURSOR,
    LONG_POLL,
    NEXT_OFFSET,
    SSE,
    UP_TO_DATE,
    Frames,
    StreamRead,
    is_text,
    next_cursor,
    offset_at,
)
from oncegate.streams.feed import FeedEnd
from oncegate.streams.ranges import is_same

# The protocol leaves the first to the server, and wants about a minute for the second (section 5.8).
LONG_POLL_S, SSE_S = 15.0, 60.0
# How long a reader waits to hear what the store has by now.
LOOK_S = 0.5
# At most so many bytes are in one event.
EVENT_BYTES = 65536


@dataclass(slots=True)
class StreamReading:
    """What a reader wants of a stream."""

    reader: Reader
    wish: StreamRead

    async def answer(self) -> RequestReport:
        """Answer it."""
        reader, wish = self.reader, self.wish
        if values(read_block(reader.head.block), b"content-encoding"):
            detail = "a coded response is read from its beginning alone"
            return reader.asked.refuse(reader.request, gone("coded", detail))
        await self._look()
        start = reader.tail if wish.start is None else wish.start
        if start > reader.tail and reader.size is None:
            # A reader may know more of it than the store, for a moment.
            await reader.wait(start - 1, LONG_POLL_S)
        elif wish.live == LONG_POLL and start == reader.tail and reader.size is None:
            await reader.wait(start, LONG_POLL_S)
        if reader.response.client_gone:
            return reader.asked.report(Outcome.CLIENT_GONE, 0)
        if reader.feed.is_lost:
            return await reader.refuse_lost()
        if start > reader.tail:
            return await self._refuse_beyond()
        return await (self._send_events(start) if wish.live == SSE else self._send_bytes(start))

    async def _look(self) -> None:
        """Wait until the feed has what the store has by now, for a moment at most."""
        feed, response = self.reader.feed, self.reader.response
        try:
            async with asyncio.timeout(LOOK_S):
                while not (feed.is_current or feed.response or feed.ended or response.client_gone):
                    await feed.wait(response.client_leaves())
        except TimeoutError:
            pass

    async def _refuse_beyond(self) -> RequestReport:
        request, asked = self.reader.request, self.reader.asked
        if self.reader.size is None:
            return await refuse_for_now(request, asked, not_yet())
        return asked.refuse(request, Refuse(refusal(400, "the offset is behind the end"), REFUSED + SAFE))

    # One answer with what there is ...

    async def _send_bytes(self, start: int) -> RequestReport:
        """Send what there is from `start` on."""
        reader, response = self.reader, self.reader.response
        end = reader.tail
        if self.wish.live and start == end:
            response.send(204, b"No Content", self._block(end), b"", STATED)
            return reader.asked.report(Outcome.RESUMED, 204)
        fields, tag = b"", self._tag(start, end)
        if self.wish.start is not None:
            fields = b"ETag: %s\r\n" % tag
            if is_same(reader.asked.head.fields, b"if-none-match", tag):
                response.send(304, b"Not Modified", self._block(end, fields), b"", STATED)
                return reader.asked.report(Outcome.RESUMED, 304)
        response.begin(200, b"OK", self._block(end, fields), end - start, COUNTED)
        return await reader.send_whole(200, start, end)

    def _tag(self, start: int, end: int) -> bytes:
        """Return the entity tag of an answer: what it has, and whether that is all."""
        closed = b"" if self.reader.size is None else b":c"
        return b'"%s:%d:%d%s"' % (self.reader.feed.token.hex().encode(), start, end, closed)

    def _block(self, end: int, fields: bytes = b"") -> bytes:
        """Return the header fields of an answer with what there is up to `end`."""
        reader, is_closed = self.reader, self.reader.size is not None
        lines = [(b"Content-Type", self._type), (NEXT_OFFSET, offset_at(end, reader.feed.token).encode())]
        if is_closed or reader.feed.is_current:
            lines.append((UP_TO_DATE, b"true"))
        if is_closed:
            lines.append((CLOSED, b"true"))
        if self.wish.live:
            lines.append((CURSOR, self._cursor().encode()))
        return reader.shown(b"".join(b"%s: %s\r\n" % line for line in lines) + fields)

    @property
    def _type(self) -> bytes:
        """The type of the stream. Readers would take one of events for the events of the protocol."""
        found = b", ".join(values(read_block(self.reader.head.block), b"content-type"))
        is_events = found.lower().startswith(b"text/event-stream")
        return b"text/plain; charset=utf-8" if is_events else found or b"application/octet-stream"

    def _cursor(self) -> str:
        return next_cursor(time.time(), self.wish.cursor)

    # Events as they come ...

    async def _send_events(self, start: int) -> RequestReport:
        """Send what comes as events, for a minute at most."""
        reader, response, as_text = self.reader, self.reader.response, is_text(self._type)
        fields = b"Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
        if not as_text:
            fields += b"Stream-SSE-Data-Encoding: base64\r\n"
        response.begin(200, b"OK", reader.shown(fields), None, COUNTED)
        is_whole = await self._pass_events(Frames(start, reader.feed.token, is_text=as_text))
        if is_whole or response.client_gone:
            response.end()
            return reader.asked.report(Outcome.RESUMED, 200)
        response.abort()
        return reader.asked.report(Outcome.BROKEN_OFF, 200, reader.why_lost)

    async def _pass_events(self, frames: Frames) -> bool:
        """Write events; return whether they may end here: all was sent, or it was a minute."""
        reader, feed, clock = self.reader, self.reader.feed, self.reader.asked.route.deps.clock
        until_s, position, is_told = clock() + SSE_S, frames.position, False
        while not (feed.is_lost or reader.response.client_gone):
            if is_told and not feed.has_beyond(position):
                if (left_s := until_s - clock()) <= 0:
                    return True
                await reader.wait(position, left_s)
                continue
            data = b""
            if position < feed.size:
                data = (feed.at_hand(position) or await feed.read(position) or b"")[:EVENT_BYTES]
                if not data:
                    return False
            position, is_told = position + len(data), True
            is_end = feed.ended is FeedEnd.COMPLETE and position >= feed.size
            event = frames.data(data, is_last=is_end)
            is_current = feed.is_current and position >= feed.size
            reader.response.write(event + frames.control(self._cursor(), up_to_date=is_current, closed=is_end))
            if is_end:
                return True
            await reader.response.wait_room()
        return False
