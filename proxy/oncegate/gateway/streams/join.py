"""A duplicate that joins its running original: it gets the head, every byte so far, and the rest as it comes.

Until there is a head, a join is a wait. What cannot be sent while it comes, such as a body that has to be decoded for
this client, is a wait for the end.
"""

from enum import Enum

from oncegate.adaptation.content_codings import coding_to_decode, may_be_coded
from oncegate.downstream.request import Request
from oncegate.gateway.answers import Refuse, no_body_to_join, store_silent
from oncegate.gateway.keyed_request import KeyedRequest
from oncegate.gateway.streams.serving import counted_as_reader, head_block, serve
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.observe.usage import Tokens, usage_reader
from oncegate.store.kept import original_id, unpack_kept
from oncegate.store.record import Record
from oncegate.store.stream_head import StreamHead
from oncegate.streams.feed import Feed, FeedEnd

MARK = b"Oncegate-Status: joined\r\n"


class NotJoined(Enum):
    """Why a duplicate has not joined its original, to which nothing was sent."""

    # The original has no head yet.
    NO_HEAD = "no_head"
    # The record says something else by now.
    CHANGED = "changed"
    # This one has to wait for the end.
    CANNOT = "cannot"


def may_join(keyed: KeyedRequest, running: Record) -> bool:
    """Return whether a duplicate joins the original whose record it found running, but for one that it tried before."""
    return keyed.join_fields is not None and running.token != keyed.not_joined


async def join(request: Request, keyed: KeyedRequest, record: Record) -> RequestReport | Refuse | NotJoined:
    """Send a running original's response as it comes, or return what else is to be done."""
    deps, claim = keyed.route.deps, keyed.claim_request
    tenant = claim.scope.tenant
    if keyed.caller is not None or not deps.followers.has_room(tenant):
        return NotJoined.CANNOT
    if claim.key in deps.leases and claim.key not in deps.feeds.running:
        return NotJoined.NO_HEAD
    with deps.followers.following(tenant), deps.feeds.reading(claim.key, record.token) as feed:
        await feed.beyond(-1)
        if feed.is_lost or feed.head is None:
            return _not_joined(feed)
        if _must_be_decoded(request, feed.head):
            return NotJoined.CANNOT
        with counted_as_reader(request, keyed):
            return await _follow(request, keyed, record, feed, feed.head)


def _not_joined(feed: Feed) -> Refuse | NotJoined:
    if feed.ended is None:
        return NotJoined.NO_HEAD
    if feed.ended is FeedEnd.DROPPED:
        return no_body_to_join(feed.head.status if feed.head is not None else 0)
    if feed.ended is FeedEnd.UNREACHABLE:
        return store_silent()
    return NotJoined.CANNOT if feed.ended is FeedEnd.DRAINING else NotJoined.CHANGED


def _must_be_decoded(request: Request, head: StreamHead) -> bool:
    """Return whether this client gets the body in another coding than it comes in."""
    if not may_be_coded(head.block):
        return False
    return coding_to_decode(head.status, head.block, request.checked_head().fields.get(b"accept-encoding")) != b""


async def _follow(request: Request, keyed: KeyedRequest, record: Record, feed: Feed, head: StreamHead) -> RequestReport:
    # What has sent a byte never claims the key.
    keyed.body.close()
    if keyed.trace is not None:
        keyed.trace.met(unpack_kept(record.kept).trace)
    own = keyed.own_fields(request, record.token, record.created_ms)
    fields = MARK + (keyed.join_fields or b"") + keyed.fields + own
    ended = await serve(request.response, feed, head, head_block(request, head, fields, original_id(record.kept)))
    if ended not in (None, FeedEnd.COMPLETE):
        return keyed.report(request, Outcome.TRUNCATED, head.status, f"joined, and broken off: {ended.label}")
    report = keyed.report(request, Outcome.JOINED, head.status)
    if ended is FeedEnd.COMPLETE:
        now_ms = keyed.route.deps.store.now_ms(feed.key)
        report.saved_s = max(0, now_ms - record.created_ms) / 1000
        report.tokens = _tokens(feed, head) if keyed.route.policy.counts_tokens else None
    return report


def _tokens(feed: Feed, head: StreamHead) -> Tokens | None:
    """Return the tokens that a response says it used, where all of it is in memory."""
    body = feed.whole()
    usage = usage_reader(head.status, head.block, len(body)) if body is not None else None
    if usage is None or body is None:
        return None
    usage.add(body)
    return usage.tokens()
