"""A duplicate that joins its running original: it gets the head, every byte so far, and the rest as it comes.

Until there is a head, a join is a wait. What cannot be sent while it comes, such as a body that has to be decoded for
this client, is a wait for the end.
"""

from typing import NamedTuple

from oncegate.adaptation.content_codings import coding_to_decode, may_be_coded
from oncegate.decision import Meanwhile, State, effective_state, meanwhile
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


class Changed(NamedTuple):
    """The record says something else by now: ask for the key once more."""


def may_join(keyed: KeyedRequest, found: Record) -> bool:
    """Return whether a duplicate joins the original whose record it found: while that runs, and no second time."""
    if keyed.join_fields is None or found.token == keyed.not_joined:
        return False
    return effective_state(found.state, found.lease_left_ms) is State.IN_FLIGHT


async def join(request: Request, keyed: KeyedRequest, record: Record) -> RequestReport | Refuse | Changed | Meanwhile:
    """Send a running original's response as it comes, or return what else is to be done. Nothing was sent then."""
    deps, claim = keyed.route.deps, keyed.claim_request
    tenant, waits = claim.scope.tenant, keyed.wait_s > 0
    if keyed.caller is not None or not deps.followers.has_room(tenant):
        return meanwhile(joins=True, waits=waits, has_head=False, fits=False)
    if claim.key in deps.leases and claim.key not in deps.feeds.running:
        return meanwhile(joins=True, waits=waits, has_head=False, fits=True)
    with deps.followers.following(tenant), deps.feeds.reading(claim.key, record.token) as feed:
        await feed.beyond(-1)
        if feed.is_lost:
            return _lost(feed) or meanwhile(joins=True, waits=waits, has_head=False, fits=False)
        fits = feed.head is None or not _must_be_decoded(request, feed.head)
        instead = meanwhile(joins=True, waits=waits, has_head=feed.head is not None, fits=fits)
        if feed.head is None or instead is not Meanwhile.JOIN:
            return instead
        with counted_as_reader(request, keyed):
            return await _follow(request, keyed, record, feed, feed.head)


def _lost(feed: Feed) -> Refuse | Changed | None:
    """Return what becomes of a duplicate whose original's response cannot be followed; None: it waits for the end."""
    match feed.ended:
        case FeedEnd.DROPPED:
            return no_body_to_join(feed.head.status if feed.head is not None else 0)
        case FeedEnd.UNREACHABLE:
            return store_silent()
        case FeedEnd.DRAINING:
            return None
        case _:
            return Changed()


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
    block = head_block(request, head, fields, original_id(record.kept))
    ended = await serve(request.response, feed, head, block, keyed.route.policy.heartbeats)
    if ended not in (None, FeedEnd.COMPLETE):
        return keyed.report(request, Outcome.BROKEN_OFF, head.status, ended.label)
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
