"""Reads a response at its address: from the beginning, behind an event, or a part of it.

While the response comes, a reader gets it from the beginning: 206 (Partial Content) names a last position, and a
download manager takes a part that was cut for whole (RFC 9110, section 14.4).
"""

import asyncio

from oncegate.adaptation.heartbeats import takes_comments
from oncegate.downstream.request import Request
from oncegate.gateway.answers import REFUSED, Refuse, overloaded
from oncegate.gateway.streams.address import Asked, gone
from oncegate.gateway.streams.durable import StreamReading
from oncegate.gateway.streams.own import SAFE
from oncegate.gateway.streams.reader import Reader, not_yet, refuse_for_now, refuse_lost
from oncegate.gateway.streams.resume import NoPlace, offset_behind, response_head_of, unless_left
from oncegate.gateway.streams.serving import pass_on
from oncegate.messages.fields import only_value
from oncegate.messages.framing import COUNTED, STATED
from oncegate.messages.problems import refusal
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.streams.durable_streams import CLOSED, NEXT_OFFSET, BadQuery, offset_at, stream_read
from oncegate.streams.feed import Feed, FeedEnd
from oncegate.streams.ranges import Unsatisfiable, is_same, requested_range


async def read(request: Request, asked: Asked) -> RequestReport:
    """Answer a GET or HEAD for a response."""
    deps, capability = asked.route.deps, asked.capability
    if not deps.followers.has_room(capability.tenant):
        return await refuse_for_now(request, asked, overloaded())
    reading = deps.feeds.reading(capability.key, capability.token)
    with deps.followers.following(capability.tenant), reading as feed:
        if asked.route.policy.cancel_grace_s is not None and feed.ended is None:
            # Whoever has the address may come back whenever it likes.
            deps.background(deps.cancellations.note_fetched(capability.key, capability.token))
        await _wait_for_head(request, feed, asked.route.policy.wait_max_s)
        if request.response.client_gone:
            return asked.report(Outcome.CLIENT_GONE, 0)
        if feed.is_lost:
            return await refuse_lost(request, asked, feed)
        if feed.head is None:
            return await refuse_for_now(request, asked, not_yet())
        reader = Reader(request, asked, feed, feed.head)
        return await _answer(reader)


async def _wait_for_head(request: Request, feed: Feed, seconds: float) -> None:
    """Wait until the head is known, the feed has ended, the client has left, or the time is over."""
    try:
        async with asyncio.timeout(seconds):
            while feed.head is None and feed.ended is None and not request.response.client_gone:
                await feed.wait(request.response.client_leaves())
    except TimeoutError:
        pass


async def _answer(reader: Reader) -> RequestReport:
    head, asked, is_success = reader.head, reader.asked, 200 <= reader.head.status < 300
    if asked.head.method == "HEAD":
        return _send_head(reader)
    wish = stream_read(asked.query, reader.feed.token) if is_success else None
    if isinstance(wish, BadQuery):
        return asked.refuse(reader.request, Refuse(refusal(400, wish.detail), REFUSED + SAFE))
    if wish is not None:
        return await StreamReading(reader, wish).answer()
    if event_id := only_value(asked.head.fields, b"last-event-id"):
        return await _continue(reader, event_id)
    if head.status == 200 and (size := reader.size) is not None:
        return await _send_complete(reader, size)
    return await _stream(reader, 0)


async def _continue(reader: Reader, event_id: bytes) -> RequestReport:
    """Send the events behind the one with an id. At the end there is nothing, which ends an EventSource."""
    request, asked, feed = reader.request, reader.asked, reader.feed
    place = await unless_left(request, offset_behind(feed, event_id))
    if place is None:
        return asked.report(Outcome.CLIENT_GONE, 0)
    if feed.is_lost:
        return await reader.refuse_lost()
    if place is NoPlace.SILENT:
        return await refuse_for_now(request, asked, place.refusal())
    if isinstance(place, NoPlace):
        return asked.refuse(request, gone(place.label, place.detail))
    if place == reader.size:
        reader.response.send(204, b"No Content", reader.shown(b""), b"", STATED)
        return asked.report(Outcome.RESUMED, 204)
    return await _stream(reader, place)


def _send_head(reader: Reader) -> RequestReport:
    """Say how a GET would be answered, and how long the response is so far."""
    lines = [(NEXT_OFFSET, offset_at(reader.tail, reader.feed.token).encode())]
    if (size := reader.size) is not None:
        lines += [(b"Content-Length", b"%d" % size), (CLOSED, b"true")]
    block = reader.block(b"".join(b"%s: %s\r\n" % line for line in lines))
    reader.response.send(reader.head.status, reader.head.reason, block, b"", STATED)
    return reader.asked.report(Outcome.RESUMED, reader.head.status)


async def _send_complete(reader: Reader, size: int) -> RequestReport:
    """Send a response of this size, or the part of it that is wanted."""
    request, asked, fields = reader.request, reader.asked, reader.asked.head.fields
    if is_same(fields, b"if-match", reader.etag) is False:
        return asked.refuse(request, Refuse(refusal(412, "If-Match names another response"), REFUSED + SAFE))
    if is_same(fields, b"if-none-match", reader.etag):
        reader.response.send(304, b"Not Modified", reader.block(), b"", STATED)
        return asked.report(Outcome.RESUMED, 304)
    part = requested_range(fields, size, reader.etag)
    if isinstance(part, Unsatisfiable):
        answer = Refuse(refusal(416, f"it has {size} bytes"), REFUSED + b"Content-Range: bytes */%d\r\n" % size + SAFE)
        return asked.refuse(request, answer)
    if part is None:
        return await _stream(reader, 0)
    block = reader.block(b"Content-Range: %s\r\n" % part.content_range(size), is_part=True)
    reader.response.begin(206, b"Partial Content", block, part.end - part.first, COUNTED)
    return await reader.send_whole(206, part.first, part.end)


async def _stream(reader: Reader, offset: int) -> RequestReport:
    """Send the response from an offset on, as it comes."""
    head, size = reader.head, reader.size
    length = head.length if size is None else size
    block = reader.tail_block() if offset else reader.block()
    reader.response.begin(head.status, head.reason, block, None if length is None else length - offset, COUNTED)
    heartbeats = reader.asked.route.policy.heartbeats
    # A comment is no part of a body whose size is said.
    if heartbeats is not None and length is None and (read := response_head_of(head)) and takes_comments(read):
        reader.response.comment_every(heartbeats.period_s)
    ended = await pass_on(reader.response, reader.feed, offset)
    if ended in (None, FeedEnd.COMPLETE):
        return reader.asked.report(Outcome.RESUMED, head.status)
    return reader.asked.report(Outcome.BROKEN_OFF, head.status, ended.label)
