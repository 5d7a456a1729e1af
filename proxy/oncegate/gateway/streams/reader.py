"""One reader of one response at its address: what it is told about it, and how bytes get there."""

import asyncio
from dataclasses import dataclass, replace

from oncegate.adaptation.blocks import read_block, without, write_block
from oncegate.adaptation.cookies import REPLAYED_MS
from oncegate.adaptation.cors import EXPOSE_HEADERS
from oncegate.adaptation.heartbeats import DIGESTS
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.answers import REFUSED, RUNNING, Refuse, key_field, overloaded, record_corrupt
from oncegate.gateway.streams.address import Asked, gone
from oncegate.gateway.streams.own import SAFE
from oncegate.keys.digests import key_id
from oncegate.messages.fields import Fields, tokens
from oncegate.messages.framing import COUNTED
from oncegate.messages.problems import problem
from oncegate.observe.outcome import Outcome, RequestReport, outcome_of
from oncegate.store.stream_head import StreamHead
from oncegate.streams.durable_streams import CLOSED, CURSOR, NEXT_OFFSET, UP_TO_DATE
from oncegate.streams.feed import Feed, FeedEnd

PRIVATE = b"Cache-Control: private, no-store\r\n" + SAFE
# Of the response's own fields, those that would say something else about it than is true here.
_NOT_OURS = frozenset((b"accept-ranges", b"age", b"cache-control", b"content-length", b"etag", b"expires", b"pragma"))
# Of a whole response, which a part is not.
_OF_WHOLE = _NOT_OURS | frozenset(DIGESTS)
# What a script may read beside what it may elsewhere.
_EXPOSED = b", ".join((b"Accept-Ranges", b"Content-Range", b"ETag", NEXT_OFFSET, UP_TO_DATE, CLOSED, CURSOR))
# In how many seconds an EventSource that cannot be answered now comes again, where nothing else is known.
_AGAIN_S = 1


@dataclass(slots=True)
class Reader:
    """A request for a response, with its feed. `head`: the response's own."""

    request: Request
    asked: Asked
    feed: Feed
    head: StreamHead

    @property
    def response(self) -> ResponseWriter:
        """The answer to the request."""
        return self.request.response

    @property
    def size(self) -> int | None:
        """How many bytes the response has, None while it comes."""
        feed = self.feed
        if feed.response is not None:
            return feed.response.size
        return feed.size if feed.ended is FeedEnd.COMPLETE else None

    @property
    def tail(self) -> int:
        """How many bytes the response has, as far as it is known."""
        size = self.size
        return self.feed.size if size is None else size

    @property
    def etag(self) -> bytes:
        """The entity tag of the response, which is one for ever."""
        return b'"%s"' % self.feed.token.hex().encode()

    @property
    def why_lost(self) -> str:
        """Why the rest cannot be read, in words."""
        return self.feed.why_lost.label

    def block(self, fields: bytes = b"", *, is_part: bool = False) -> bytes:
        """Return the header fields of an answer with the response, or with a part of it; `fields` are further ones."""
        block = write_block(without(read_block(self.head.block), _OF_WHOLE if is_part else _NOT_OURS))
        tag = b"ETag: %s\r\nAccept-Ranges: bytes\r\n" % self.etag
        return self.shown(b"".join((block, tag, fields)))

    def tail_block(self) -> bytes:
        """Return the header fields of an answer that begins in the middle of the response, and is not tagged."""
        return self.shown(write_block(without(read_block(self.head.block), _OF_WHOLE)))

    def shown(self, block: bytes) -> bytes:
        """Return header fields as a reader at an address gets them: without cookies, and for no cache."""
        request, named = self.request, key_field(key_id(self.feed.key).encode())
        own = b"".join((block, PRIVATE, b"Oncegate-Status: resumed\r\n", named, request.id_line))
        shown = request.requester.replayed(own, REPLAYED_MS + 1)
        return shown if request.adaptation.cors is None else b"%s%s: %s\r\n" % (shown, EXPOSE_HEADERS, _EXPOSED)

    # How bytes get there ...

    async def copy(self, first: int, end: int) -> bool:
        """Write the bytes from `first` up to `end`; return whether they could be read, or nobody wants them."""
        feed, response = self.feed, self.response
        while first < end and not response.client_gone:
            if first >= feed.size:
                if feed.ended is not None:
                    return False
                await feed.wait(response.client_leaves())
                continue
            data = feed.at_hand(first) or await feed.read(first)
            if not data:
                return False
            response.write(data[: end - first])
            first += len(data)
            if response.has_backlog:
                await response.wait_room()
        return True

    async def send_whole(self, status: int, first: int, end: int) -> RequestReport:
        """Send the bytes from `first` up to `end` behind a head that has left, and end.

        The last byte says that all of it is what was stored, where it is the last of the response.
        """
        is_sent = await self.copy(first, end)
        if is_sent and end == self.size and not self.response.client_gone:
            while self.feed.ended is None:
                await self.feed.wait(self.response.client_leaves())
            is_sent = not self.feed.is_lost
        if self.response.client_gone:
            return self.asked.report(Outcome.RESUMED, status)
        if is_sent:
            self.response.end()
            return self.asked.report(Outcome.RESUMED, status)
        self.response.abort()
        return self.asked.report(Outcome.BROKEN_OFF, status, self.why_lost)

    async def wait(self, offset: int, seconds: float) -> None:
        """Wait for a byte behind `offset`, the end, or that the client leaves; `seconds` at most."""
        try:
            async with asyncio.timeout(seconds):
                while not (self.feed.has_beyond(offset) or self.response.client_gone):
                    await self.feed.wait(self.response.client_leaves())
        except TimeoutError:
            pass

    # What it cannot be ...

    async def refuse_lost(self) -> RequestReport:
        """Answer a reader for whom there is nothing more."""
        return await refuse_lost(self.request, self.asked, self.feed)


async def refuse_lost(request: Request, asked: Asked, feed: Feed) -> RequestReport:
    """Answer a reader of a feed that has ended without a whole response."""
    match feed.ended:
        case FeedEnd.UNREACHABLE:
            detail = "the store cannot say now what became of this response"
            return await refuse_for_now(request, asked, Refuse(problem("store-unavailable", detail)))
        case FeedEnd.DRAINING:
            return await refuse_for_now(request, asked, overloaded())
        case FeedEnd.DROPPED:
            answer = gone("not-kept", "the response is not stored")
        case FeedEnd.STOPPED:
            answer = gone("stopped", "somebody stopped the request, and nobody knows the outcome")
        case FeedEnd.BROKEN | FeedEnd.ABANDONED | FeedEnd.UNSTORED:
            answer = gone("broken", "the response broke off, and nobody knows the outcome")
        case FeedEnd.CORRUPT:
            answer = replace(record_corrupt(), fields=REFUSED + SAFE)
        case _:
            answer = gone("gone", "the response is not stored any more")
    return asked.refuse(request, answer)


def not_yet() -> Refuse:
    """Return the answer to a reader who is there before the response."""
    return Refuse(problem("in-flight", RUNNING, _AGAIN_S).with_status(503))


async def refuse_for_now(request: Request, asked: Asked, answer: Refuse) -> RequestReport:
    """Refuse a request that may be repeated. An EventSource is told to come again, as one error would end it."""
    if not accepts_events(asked.head.fields) or asked.head.method == "HEAD":
        return asked.refuse(request, replace(answer, fields=answer.fields + SAFE))
    response, after_s = request.response, answer.problem.retry_after_s or _AGAIN_S
    fields = b"Content-Type: text/event-stream\r\n" + PRIVATE + request.id_line + request.requester.own_fields()
    response.begin(200, b"OK", fields, None, COUNTED)
    response.write(b"retry: %d\n\n" % (after_s * 1000))
    await response.wait_room()
    # Other readers of events take a clean end for that of the response.
    response.abort()
    return asked.report(outcome_of(answer.problem), 200, answer.problem.detail)


def accepts_events(fields: Fields) -> bool:
    """Return whether a client asks for events."""
    accepted = tokens(fields.get(b"accept", ()))
    return any(media_type.partition(b";")[0].strip() == b"text/event-stream" for media_type in accepted)
