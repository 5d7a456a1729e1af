"""A stream of events that goes on behind the event that its reader saw last, whoever asks and wherever it runs.

Such a request looks for the response that its key names, and never claims the key: what has seen an event of one
execution must not get those of another. It gets the stored events behind its own, those that still come, and the end.
"""

import asyncio
from collections.abc import Coroutine
from enum import Enum
from typing import Any, NamedTuple

from oncegate.adaptation.blocks import read_block, write_block
from oncegate.adaptation.event_ids import (
    EventSearch,
    execution_mark,
    is_coded,
    is_stream,
    marked_execution,
    without_byte_fields,
)
from oncegate.adaptation.heartbeats import DIGESTS, takes_comments
from oncegate.decision import Decision
from oncegate.downstream.request import Request
from oncegate.gateway.answers import (
    Refuse,
    decide_duplicate,
    duplicate_refusal,
    no_body_to_join,
    overloaded,
    store_silent,
)
from oncegate.gateway.keyed_request import KeyedRequest
from oncegate.gateway.streams.serving import counted_as_reader, head_block, pass_on
from oncegate.messages.framing import COUNTED
from oncegate.messages.problems import problem
from oncegate.messages.response_head import ResponseHead, read_response_head
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.store.kept import original_id, unpack_kept
from oncegate.store.record import Record
from oncegate.store.stream_head import StreamHead
from oncegate.streams.feed import Feed, FeedEnd

MARK = b"Oncegate-Status: resumed\r\n"
# What may become something else before the first byte is sent.
_MAY_CONTINUE = (Decision.REPLAY, Decision.IN_FLIGHT)


class Resume(NamedTuple):
    """Continue a stream behind the event `event_id`, which its client saw last."""

    keyed: KeyedRequest
    event_id: bytes


class NoPlace(Enum):
    """Why a stream cannot be continued behind an event: a word for programs, and what to tell people."""

    GONE = "gone", "there is no response under this key; without Last-Event-ID the request would be executed"
    REPLACED = "replaced", "the event may be another execution's; without Last-Event-ID the response is replayed whole"
    NO_EVENTS = "no-events", "the response is no stream of events"
    CODED = "coded", "the response has a content coding, in which no event can be found"
    UNKNOWN_ID = "unknown-id", "no event of the response has this id"
    REPEATED_ID = "repeated-id", "several events of the response have this id, with others between them"
    # Nothing is said about the stream: the store does not answer.
    SILENT = "silent", ""

    def __init__(self, label: str, detail: str) -> None:
        self.label, self.detail = label, detail

    def refusal(self) -> Refuse:
        """Return the answer to a reader whose stream cannot be continued."""
        if self is NoPlace.SILENT:
            return store_silent()
        return Refuse(problem("stream-gone", self.detail, reason=self.label))


async def resume(request: Request, step: Resume) -> RequestReport | Refuse:
    """Send the rest of a stream, or return why there is none."""
    keyed, event_id = step
    # What looks never claims.
    keyed.body.close()
    deps, claim, policy = keyed.route.deps, keyed.claim_request, keyed.route.policy
    tenant = claim.scope.tenant
    # Its client may have had the response to an equal request, or one of which the store knows nothing.
    if (claim.window_ms or policy.bypass) and marked_execution(event_id) is None:
        return NoPlace.REPLACED.refusal()
    if not deps.followers.has_room(tenant):
        return overloaded()
    with deps.followers.following(tenant):
        found = await deps.store.peek(claim.key, claim.scope, policy.lease_ms)
        if found is None:
            return NoPlace.GONE.refusal()
        decision = decide_duplicate(found, claim.fingerprint)
        if decision not in _MAY_CONTINUE or not isinstance(found, Record):
            return duplicate_refusal(decision, found, policy, deps.usual.seconds)
        if keyed.trace is not None:
            keyed.trace.met(unpack_kept(found.kept).trace)
        with deps.feeds.reading(claim.key, found.token) as feed, counted_as_reader(request, keyed):
            place = await unless_left(request, offset_behind(feed, event_id))
            if place is None:
                return keyed.report(request, Outcome.CLIENT_GONE, 0)
            if feed.is_lost:
                return await _lost(keyed, found, feed)
            return (
                place.refusal() if isinstance(place, NoPlace) else await _continue(request, keyed, found, feed, place)
            )


async def offset_behind(feed: Feed, event_id: bytes) -> int | NoPlace:
    """Return at which offset a stream goes on behind the event with an id, or why it cannot.

    It waits for an event that has not come as long as the stream may still have it. Where `feed.is_lost`, that is why.
    """
    while feed.head is None and feed.ended is None:
        await feed.wait(asyncio.get_running_loop().create_future())
    mark = marked_execution(event_id)
    if (reason := await _reason_against(feed, mark)) is not None:
        return reason
    search, offset = EventSearch(event_id), 0
    while True:
        while offset < feed.size:
            data = await feed.read(offset)
            if not data:
                return NoPlace.SILENT
            search.feed(data)
            offset += len(data)
            # Nobody gives one of these twice.
            if mark is not None and search.offset is not None:
                return search.offset
        if feed.ended is not None:
            search.end()
        if search.offset is not None:
            return NoPlace.REPEATED_ID if search.is_repeated else search.offset
        if feed.ended is not None:
            return NoPlace.UNKNOWN_ID
        await feed.beyond(offset)


async def _reason_against(feed: Feed, mark: bytes | None) -> NoPlace | None:
    """Return why no event of a feed can be the one that is meant. `mark`: of the execution that its id names."""
    head = response_head_of(feed.head)
    if head is None or not is_stream(head):
        return NoPlace.NO_EVENTS
    if is_coded(head):
        return NoPlace.CODED
    if mark is not None:
        return None if mark == execution_mark(feed.token) else NoPlace.REPLACED
    replaces = await feed.replaces_another()
    return NoPlace.SILENT if replaces is None else NoPlace.REPLACED if replaces else None


async def unless_left(request: Request, looking: Coroutine[Any, Any, int | NoPlace]) -> int | NoPlace | None:
    """Return what was found, None if the client has left before."""
    task = asyncio.get_running_loop().create_task(looking)
    try:
        await asyncio.wait((task, request.response.client_leaves()), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()


async def _lost(keyed: KeyedRequest, found: Record, feed: Feed) -> Refuse:
    """Return the answer to a reader that has got nothing of a stream which can no longer be read."""
    if feed.ended is FeedEnd.DRAINING:
        return overloaded()
    if feed.ended is FeedEnd.UNREACHABLE:
        return store_silent()
    if feed.ended is FeedEnd.DROPPED:
        return no_body_to_join(feed.head.status if feed.head is not None else 0)
    if feed.ended is FeedEnd.GONE:
        return NoPlace.GONE.refusal()
    deps, claim, policy = keyed.route.deps, keyed.claim_request, keyed.route.policy
    if found.response is not None:
        return duplicate_refusal(Outcome.RECORD_CORRUPT, found, policy, deps.usual.seconds)
    # The original ended without a whole response: as its record says it by now.
    now = await deps.store.peek(claim.key, claim.scope, policy.lease_ms)
    return duplicate_refusal(decide_duplicate(now, claim.fingerprint), now, policy, deps.usual.seconds)


async def _continue(request: Request, keyed: KeyedRequest, record: Record, feed: Feed, place: int) -> RequestReport:
    """Send the events from `place` on."""
    response, heartbeats, stored = request.response, keyed.route.policy.heartbeats, record.response
    age_ms = max(0, record.now_ms - stored.completed_ms) if stored is not None else 0
    assert feed.head is not None
    head = _tail_head(feed.head, age_ms)
    fields = MARK + keyed.own_fields(request, record.token, record.created_ms)
    block = head_block(request, head, fields, original_id(record.kept), age_ms)
    response.begin(head.status, head.reason, block, None, COUNTED)
    if heartbeats is not None and (read := response_head_of(head)) is not None and takes_comments(read):
        response.comment_every(heartbeats.period_s)
    ended = await pass_on(response, feed, place, DIGESTS)
    if ended not in (None, FeedEnd.COMPLETE):
        return keyed.report(request, Outcome.BROKEN_OFF, head.status, ended.label)
    return keyed.report(request, Outcome.RESUMED, head.status)


def _tail_head(head: StreamHead, age_ms: int) -> StreamHead:
    """Return the head of a response that is so old by now, and whose beginning is left out."""
    lines = without_byte_fields(read_block(head.block))
    return head._replace(block=write_block(lines), age_s=head.age_s + age_ms // 1000)


def response_head_of(head: StreamHead | None) -> ResponseHead | None:
    """Return a head as it was read from the upstream, None where it says nothing of use."""
    if head is None:
        return None
    read = read_response_head(head.status, head.reason, read_block(head.block), head_only=False)
    return read if isinstance(read, ResponseHead) else None
