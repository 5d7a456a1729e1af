"""Pass-through: a request that no key guards, streamed both ways, untouched but for hop and forwarding fields."""

import time
from dataclasses import dataclass

from aiohttp import StreamReader

from oncegate.downstream.body import Body, arrived, stream
from oncegate.downstream.response import ResponseWriter
from oncegate.messages.head_cache import BufferedBody
from oncegate.messages.problems import problem, refusal
from oncegate.messages.response_head import ResponseHead
from oncegate.observe.outcome import BY_LABEL, Outcome
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.pool import REUSE_IDLE_S, Pool


@dataclass(frozen=True, slots=True)
class Relayed:
    """How it went, and the time spent on the upstream."""

    outcome: Outcome
    status: int = 0  # the upstream's, 0 where none came
    upstream_s: float = 0.0


async def relay(
    client: ResponseWriter,
    pool: Pool,
    head: bytes,
    method: str,
    content: StreamReader | BufferedBody | Body,
    length: int | None,
    silence_s: float,
    mark: bytes = b"",
) -> Relayed:
    """Forward one request and its answer. `length`: of the request's body, None where it is chunked.

    `mark`: a field that the answer gets.
    """
    try:
        connection = await pool.acquire(REUSE_IDLE_S)
    except NotSent as why:
        client.answer(problem("upstream-unreachable", str(why)), mark)
        return Relayed(Outcome.UPSTREAM_UNREACHABLE)
    began = time.perf_counter()
    try:
        # In one write: an upstream that answers at the head could not keep the connection otherwise.
        body = b"" if length == 0 else arrived(content) if length is not None else None
        if body is not None:
            connection.send(head, body, head_only=method == "HEAD")
        else:
            blocks = content.stream() if isinstance(content, Body) else stream(content, client.pace)
            connection.send_stream(head, blocks, chunked=length is None, head_only=method == "HEAD")
        outcome = await pass_on(client, connection, await connection.wait_for_head(silence_s), silence_s, mark)
    except UpstreamLost as lost:
        outcome = fail(client, lost, mark)
    finally:
        pool.release(connection)
    return Relayed(
        outcome, connection.response.head.status if connection.response.head else 0, time.perf_counter() - began
    )


async def pass_on(
    client: ResponseWriter, connection: Connection, head: ResponseHead, silence_s: float, mark: bytes = b""
) -> Outcome:
    """Hand an answer on as it comes and return how it went. Raises UpstreamLost."""
    block = head.forwarded_block + mark
    if connection.response.is_complete:
        client.send(
            head.status,
            head.reason,
            block,
            connection.take_body(),
            stated_length=head.length is not None,
            bodiless=head.bodiless,
            close_delimited=head.close_delimited,
        )
        return Outcome.PASSTHROUGH
    client.begin(head.status, head.reason, block, length=head.length, stated=True, eof=head.close_delimited)
    while data := await connection.next_chunk(silence_s):
        client.write(data)
        if client.backlog:
            connection.pause_reading()  # a slow client holds one piece, not two
            while not await client.taken():
                pass
        if client.gone:
            return Outcome.PASSTHROUGH  # nobody takes the rest, and nobody stores it
    client.end()
    return Outcome.PASSTHROUGH


def fail(client: ResponseWriter, lost: UpstreamLost, mark: bytes = b"") -> Outcome:
    """Tell the client that the exchange was lost, and return the outcome."""
    if client.started:
        client.abort()
        return Outcome.TRUNCATED
    if lost.body:
        status, detail = (408, "paused for too long") if lost.timeout else (400, "is not well-formed")
        client.answer(refusal(status, f"the body {detail}"), close=True)
        return Outcome.CLIENT_GONE if client.gone else Outcome.REQUEST_REFUSED
    slug = "upstream-timeout" if lost.timeout else "upstream-lost"
    told = problem(slug, "no whole answer came; the request may have been executed")
    client.answer(told, mark)
    return BY_LABEL[told.code]
