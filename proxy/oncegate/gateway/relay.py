"""Pass-through: a request that no key guards, streamed both ways.

Nothing of it changes but hop-by-hop and forwarding fields.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from oncegate.adaptation.heartbeats import takes_comments
from oncegate.adaptation.preflight import MAX_AGE_S, Preflight
from oncegate.downstream.body import Body, BrokenOff, buffered_bytes, stated_length, stream
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.answers import UNGUARDED, UNGUARDED_KEY, Refuse, body_refusal, not_sent, upstream_lost
from oncegate.gateway.routes import ForwardedPieces, Route
from oncegate.keys.key_names import has_key_name
from oncegate.messages.framing import STATED
from oncegate.messages.request_head import RequestHead
from oncegate.messages.response_head import ResponseHead
from oncegate.observe.labels import Unguarded, UnguardedKey
from oncegate.observe.outcome import Outcome, outcome_of
from oncegate.observe.tracing import Trace
from oncegate.settings.names import GUARDABLE
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.pool import REUSE_IDLE_S
from oncegate.values import Value

# Bound once for the request path, as in `decision`.
_PASSTHROUGH: Final = Outcome.PASSTHROUGH
_UNGUARDED: Final = Outcome.UNGUARDED
# The outcomes in which the upstream said nothing.
_NO_ANSWER = (Outcome.UPSTREAM_UNREACHABLE, Outcome.UPSTREAM_LOST, Outcome.UPSTREAM_TIMEOUT)


class Relay(Value):
    """Pass the request through. `body` is its body if it was read already.

    `unguarded`: why it does not get the protection that it wanted, which its response says. `key_field`: names the key
    of such a request, if it has one; its line is ended. `trace`: of such a request that is traced. `unguarded_key`: it
    seems to carry a key, which guards nothing for this reason. `takes_back`: the name of a call that it cancels.
    `ready`: of each request under a known head, that head as it goes to the upstream.
    """

    route: Route
    head: RequestHead
    body: Body | None = None
    unguarded: Unguarded | None = None
    unguarded_key: UnguardedKey | None = None
    key_field: bytes = b""
    # What is granted where the request is a preflight that may be granted.
    preflight: Preflight | None = None
    takes_back: bytes = b""
    ready: ForwardedPieces | None = None
    trace: Trace | None = None

    def fields(self) -> bytes:
        """Return what oncegate adds to the response's fields."""
        if self.unguarded is not None:
            return UNGUARDED + self.key_field
        return b"" if self.unguarded_key is None else UNGUARDED_KEY[self.unguarded_key]


def pass_through(route: Route, head: RequestHead, body: Body | None = None) -> Relay:
    """Return the relay of a request in which no key was found. One that seems to carry a key is told so."""
    methods = route.policy.methods
    # A rule with `guard = "off"` leaves keys to the API. Reads change nothing, whatever they carry.
    if not methods or head.method not in GUARDABLE or not has_key_name(head.fields):
        return Relay(route, head, body)
    reason = UnguardedKey.NAME if head.method in methods else UnguardedKey.METHOD
    return Relay(route, head, body, unguarded_key=reason)


class Relayed(Value):
    """How it ended. `status` is the upstream's, 0 for none; `refuse` is to be sent if the upstream gave no response."""

    outcome: Outcome
    status: int = 0
    upstream_s: float = 0.0
    refuse: Refuse | None = None


# Hands a response on, as `forward_response` does.
Forward = Callable[[Request, Connection, ResponseHead, Relay], Awaitable[Outcome]]


async def relay(
    request: Request, step: Relay, forward: Forward | None = None, reuse_idle_s: float = REUSE_IDLE_S
) -> Relayed:
    """Forward a request, and its response as it comes, or as `forward` hands it on.

    A GET or HEAD is sent once more if the upstream closed a connection that was used before without a byte of a
    response: it was idle for too long there (RFC 9112, section 9.3.1). The second time, the connection is a new one.
    """
    deps = step.route.deps
    try:
        connection = deps.pool.ready(reuse_idle_s) or await deps.pool.acquire(reuse_idle_s)
    except NotSent as reason:
        return Relayed(Outcome.UPSTREAM_UNREACHABLE, refuse=not_sent(str(reason), step.fields()))
    began, met_idle_close = time.perf_counter(), False
    refuse: Refuse | None = None
    leaving = None
    if step.route.policy.ends_with_client:
        if request.response.reader_has_left():
            deps.pool.release(connection)
            return Relayed(Outcome.CANCELLED)
        leaving = _end_with_client(request.response, connection)
    try:
        (_send if step.ready is None else _send_ready)(connection, request, step)
        await connection.next_arrival(deps.silence_s)
        head = connection.response.head
        if head is None or connection.response.interims:
            head = await _final_head(connection, request.response, step)
        if forward is None and connection.response.is_complete:
            outcome = _send_whole(request, connection, head, _passed_block(request, head, step), step)
        else:
            outcome = await (forward or forward_response)(request, connection, head, step)
    except NotSent as reason:
        outcome, refuse = Outcome.UPSTREAM_UNREACHABLE, not_sent(str(reason), step.fields())
    except UpstreamLost as lost:
        met_idle_close = lost.closed and _may_repeat(request, step, connection)
        outcome, refuse = lost_outcome(request.response, lost, step.fields())
        if leaving is not None and leaving.done():
            outcome, refuse = Outcome.CANCELLED, None
    finally:
        if leaving is not None:
            leaving.cancel()
        deps.pool.release(connection)
    if met_idle_close:
        return await relay(request, step, forward, 0.0)
    final = connection.response.head
    if step.trace is not None:
        is_error = outcome not in (Outcome.UNGUARDED, Outcome.UPSTREAM_UNREACHABLE)
        step.trace.end_attempt(final.status if final else 0, outcome.label if is_error else "")
    return Relayed(outcome, final.status if final else 0, time.perf_counter() - began, refuse)


def _may_repeat(request: Request, step: Relay, connection: Connection) -> bool:
    """Return whether the close of its connection may have crossed a request that changes nothing, and has no body.

    Not one that wanted a key's protection: its method is what a rule guards.
    """
    head, is_idle_close = step.head, connection.is_reused and connection.is_unanswered
    is_bodiless = step.body is None and stated_length(head.fields) == 0
    is_safe = head.method in ("GET", "HEAD") and is_bodiless and step.unguarded is None
    return is_idle_close and is_safe and not request.response.client_gone


def _end_with_client(response: ResponseWriter, connection: Connection) -> "asyncio.Future[None]":
    """Close the upstream connection as soon as the client leaves, until the future is cancelled.

    Nothing of the response is stored and no duplicate can wait for it, so there is no grace.
    """
    leaving = response.reader_leaves()

    def close(leaving: "asyncio.Future[None]") -> None:
        if not leaving.cancelled():
            connection.fail(UpstreamLost("the client left"))

    leaving.add_done_callback(close)
    return leaving


def _send_ready(connection: Connection, request: Request, step: Relay) -> None:
    """Send a request under a known head. All of its body is here."""
    head, info, body, ready = step.head, request.connection.forwarded, request.content.read_nowait(), step.ready
    length = len(body) if b"content-length" in head.fields else -1
    forwarded = info.client.join(step.route.forwarded_pieces(head, info, length, {} if ready is None else ready))
    connection.send(b"".join((forwarded, step.route.id_line(request), b"\r\n")), body, head.method == "HEAD", False)


def _send(connection: Connection, request: Request, step: Relay) -> None:
    head, content = step.head, step.body or request.content
    size = step.body.size if step.body is not None else stated_length(head.fields)
    is_stated = step.body is not None or b"content-length" in head.fields
    request.response.send_continue()
    length = size if is_stated else -1 if size == 0 else None
    forwarded = step.route.forwarded_head(head, request.connection.forwarded, length)
    forwarded = b"".join((forwarded, step.route.id_line(request), b"\r\n"))
    if step.trace is not None:
        forwarded = step.trace.begin_attempt(forwarded.removesuffix(b"\r\n")) + b"\r\n"
    # In one write where possible: an upstream that answers at the head could not keep the connection otherwise.
    body = b"" if size == 0 else buffered_bytes(content) if size is not None else None
    head_only = head.method == "HEAD"
    if body is not None:
        connection.send(forwarded, body, head_only=head_only, may_bind=request.known is None)
    else:
        blocks = content.stream() if isinstance(content, Body) else stream(content, request.connection.minimum_rate)
        connection.send_stream(forwarded, blocks, chunked=size is None, head_only=head_only)


async def _final_head(connection: Connection, response: ResponseWriter, step: Relay) -> ResponseHead:
    silence_s = step.route.deps.silence_s
    if not step.route.policy.pass_interim:
        return await connection.wait_for_head(silence_s)
    head = await connection.wait_for_head(silence_s, lambda: pass_interims(connection, response))
    pass_interims(connection, response)
    return head


def pass_interims(connection: Connection, response: ResponseWriter) -> None:
    """Pass on the interim responses that have come since the last time."""
    for interim in connection.response.take_interims():
        if forwarded := interim.forwarded():
            response.send_interim(forwarded)


def _passed_block(request: Request, head: ResponseHead, step: Relay) -> bytes:
    """Return the fields of a response that passes through, as the client gets them."""
    fields = step.fields()
    if step.unguarded_key is not None and b"oncegate-status" in head.fields:
        fields = b""  # Another oncegate behind this one knows what became of the key.
    return request.adapted_block(head, head.passed_block(says_own=fields != b"") + fields)


def _send_whole(request: Request, connection: Connection, head: ResponseHead, block: bytes, step: Relay) -> Outcome:
    """Hand on a response that is here whole, with `block` as its fields."""
    response = request.response
    response.trailers = connection.response.trailers
    response.send(head.status, head.reason, block, connection.take_body(), head.framing)
    return _PASSTHROUGH if step.unguarded is None else _UNGUARDED


async def forward_response(
    request: Request, connection: Connection, head: ResponseHead, step: Relay, block: bytes | None = None
) -> Outcome:
    """Hand a response on as it comes, with `block` as its fields if that is given. Raises UpstreamLost."""
    response = request.response
    if block is None:
        block = _passed_block(request, head, step)
    if connection.response.is_complete:
        return _send_whole(request, connection, head, block, step)
    outcome = _PASSTHROUGH if step.unguarded is None else _UNGUARDED
    response.begin(head.status, head.reason, block, head.length, head.framing)
    heartbeats = step.route.policy.heartbeats
    if heartbeats is not None and takes_comments(head):
        response.comment_every(heartbeats.period_s)
    while data := await connection.next_chunk(step.route.deps.silence_s):
        response.write(data)
        if response.has_backlog:
            # A slow client holds one piece, not two.
            connection.pause_reading()
            await response.wait_room()
        if response.client_gone:
            # Nobody receives the rest, and nobody stores it.
            return outcome
    response.trailers = connection.response.trailers
    response.end()
    return outcome


def lost_outcome(response: ResponseWriter, lost: UpstreamLost, fields: bytes) -> tuple[Outcome, Refuse | None]:
    """Return the outcome of an exchange that was lost, and the answer to it; abort a response that has begun."""
    if response.started:
        response.abort()
        return Outcome.TRUNCATED, None
    if lost.body:
        refuse = replace(body_refusal(BrokenOff(stalled=lost.timeout)), fields=b"")
        return Outcome.CLIENT_GONE if response.client_gone else Outcome.REQUEST_REFUSED, refuse
    refuse = upstream_lost(timeout=lost.timeout, fields=fields, status=lost.status)
    return outcome_of(refuse.problem), refuse


async def answer_preflight(request: Request, step: Relay, preflight: Preflight) -> Relayed:
    """Answer a preflight of a listed origin."""
    if not preflight.asks_api:
        return _answer(request, preflight.granted(MAX_AGE_S))

    async def forward(request: Request, connection: Connection, head: ResponseHead, step: Relay) -> Outcome:
        if preflight.is_open(head.status, head.forwarded_block):
            # It is answered below, when this connection is free again.
            connection.discard_body()
            return Outcome.PREFLIGHT
        return await forward_response(request, connection, head, step, preflight.forwarded(head.forwarded_block))

    relayed = await relay(request, step, forward)
    if relayed.outcome is Outcome.PREFLIGHT:
        if await _grants_another(request, step, preflight):
            return _answer(request, preflight.refused())
        # Whoever fails has not decided.
        is_failure = relayed.status >= 500 and relayed.status != 501
        return _answer(request, preflight.granted(0 if is_failure else MAX_AGE_S))
    if relayed.outcome in _NO_ANSWER and relayed.refuse is not None and not preflight.is_decided_by_api:
        # The page then reads why its request fails, or gets a stored response. It asks again for the next one.
        return _answer(request, preflight.granted(0))
    return relayed


def _answer(request: Request, block: bytes) -> Relayed:
    request.response.send(204, b"No Content", block + request.id_line, b"", STATED)
    return Relayed(Outcome.PREFLIGHT, 204)


async def _grants_another(request: Request, step: Relay, preflight: Preflight) -> bool:
    """Return whether the API grants the same to another listed origin: then it has CORS code, which said nothing."""
    for origin, head in preflight.for_others(step.head):
        response = await _ask(request, step, head)
        if response is not None and preflight.is_grant(response.forwarded_block, origin):
            return True
    return False


async def _ask(request: Request, step: Relay, head: RequestHead) -> ResponseHead | None:
    """Return the head of the API's response to another preflight, None without one."""
    deps = step.route.deps
    try:
        connection = await deps.pool.acquire(REUSE_IDLE_S)
    except NotSent:
        return None
    try:
        connection.send(step.route.forwarded_head(head, request.connection.forwarded, -1) + b"\r\n", b"")
        return await connection.wait_for_head(deps.silence_s)
    except (NotSent, UpstreamLost):
        return None
    finally:
        deps.pool.release(connection)
