"""Sends a response to a reader while it comes: the head, the bytes from an offset on, and an end if it has one.

The end is clean only where the store has the whole response. Anything else that ends the feed breaks the reader off.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

from oncegate.adaptation.blocks import read_block
from oncegate.adaptation.heartbeats import DIGESTS, Heartbeats, are_plain_events
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.keyed_request import KeyedRequest
from oncegate.messages.fields import by_name
from oncegate.messages.framing import COUNTED, STATED
from oncegate.messages.trailers import without
from oncegate.store.stream_head import StreamHead
from oncegate.streams.feed import Feed, FeedEnd


def counted_as_reader(request: Request, keyed: KeyedRequest) -> AbstractContextManager[None]:
    """Let the original go on for this reader, under a rule that ends it without any."""
    grace_s = keyed.route.policy.cancel_grace_s
    if grace_s is None:
        return nullcontext()
    readers = keyed.route.deps.cancellations.readers
    return readers.waiting(keyed.claim_request.key, grace_s, request.response.reader_has_left)


def head_block(request: Request, head: StreamHead, fields: bytes, original_id: bytes = b"", age_ms: int = 0) -> bytes:
    """Return the header fields of a response that may still come, as this reader gets them.

    `fields`: further ones, each line ended. `original_id`: of the request whose response it is. `age_ms`: since it was
    complete; 0 where it is not.
    """
    age = b"Age: %d\r\n" % head.age_s if head.age_s else b""
    ids = request.connection.request_ids.of_replay(request.id, original_id, head.block)
    block = b"".join((head.block, age, fields, ids))
    return request.requester.replayed(block, age_ms) if request.adaptation.adapts_replay(block) else block


async def serve(
    response: ResponseWriter, feed: Feed, head: StreamHead, block: bytes, heartbeats: Heartbeats | None
) -> FeedEnd | None:
    """Send a response from its beginning as it comes; return how it ended, None if the client left first."""
    response.begin(head.status, head.reason, block, head.length, STATED if head.stated_length else COUNTED)
    fields = by_name(read_block(head.block)) if heartbeats is not None and head.length is None else {}
    if heartbeats is not None and are_plain_events(head.status, fields):
        response.comment_every(heartbeats.period_s)
        return await pass_on(response, feed, 0, DIGESTS)
    return await pass_on(response, feed, 0)


async def pass_on(response: ResponseWriter, feed: Feed, offset: int, unfit: Collection[bytes] = ()) -> FeedEnd | None:
    """Send the bytes from `offset` on behind a head that has left; return as `serve` does.

    `unfit`: the lower-case names of trailers that do not fit what this reader gets.
    """
    feed.on_broken.add(response.abort)
    try:
        ended = await _Copy(response, feed, offset).run()
    finally:
        feed.on_broken.discard(response.abort)
    if ended is FeedEnd.COMPLETE:
        response.trailers = without(feed.trailers, unfit)
        response.end()
    elif ended is not None:
        response.abort()
    return ended


class _Copy:
    """Copies a feed to a response, from `offset` on."""

    def __init__(self, response: ResponseWriter, feed: Feed, offset: int) -> None:
        self._response, self._feed, self._offset = response, feed, offset

    async def run(self) -> FeedEnd | None:
        """Write the body; return how it ended, None if the client left first."""
        response, feed = self._response, self._feed
        while not (feed.is_lost or response.client_gone):
            if self._offset < feed.size:
                data = feed.at_hand(self._offset) or await feed.read(self._offset)
                if not data:
                    return feed.why_lost
                if not feed.is_lost and not self._take(data):
                    await response.wait_room()
            elif feed.ended is None:
                # One future for both: it has ended, or the client leaves. What comes is written meanwhile.
                await feed.wait(response.client_leaves(), self._take)
            else:
                break
        # A client that was broken off has not left by itself.
        return None if response.client_gone and not feed.is_lost else feed.ended

    def _take(self, data: bytes) -> bool:
        """Write the next bytes; return whether more may come at once."""
        self._response.write(data)
        self._offset += len(data)
        return not self._response.has_backlog
