"""A WebSocket: once the upstream has switched to it, bytes both ways until either side ends."""

import asyncio
import contextlib
import time

from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.relay import Relayed, fail, pass_on
from oncegate.messages.problems import problem
from oncegate.messages.request_head import SWITCHING
from oncegate.observe.outcome import Outcome
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent, UpstreamLost
from oncegate.upstream.pool import REUSE_IDLE_S, Pool

HIGH_WATER = 65536  # bytes of a client that wait for the upstream, at which reading pauses
LAST_S = 1.0  # for the client's last bytes to leave
CLOSES_NOW = UpstreamLost("the client ended it")


class _Upstreamward:
    """What the client sends, as aiohttp hands it over in place of parsing it; and its way to the upstream."""

    def __init__(self, request: Request) -> None:
        self._connection = request.protocol
        self._waiting = bytearray()
        self._ended = False
        self._changed = asyncio.Event()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._waiting += data
        if len(self._waiting) > HIGH_WATER:
            self._connection.pause_reading()
        self._changed.set()
        return False, b""

    def feed_eof(self) -> None:
        self._ended = True
        self._changed.set()

    async def run(self, connection: Connection, silence_s: float) -> None:
        """Pass on what comes; at its end, end the tunnel."""
        while self._waiting or not self._ended:
            data = bytes(self._waiting)
            self._waiting.clear()
            self._connection.resume_reading()
            if data:
                await connection.write(data, silence_s)
            elif not self._ended:
                self._changed.clear()
                await self._changed.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_S):
                await connection.wait_until_written()
        connection.fail(CLOSES_NOW)


async def tunnel(request: Request, client: ResponseWriter, pool: Pool, head: bytes, silence_s: float) -> Relayed:
    """Ask the upstream for a WebSocket and stay in between, as long as either says something within `silence_s`.

    An upstream that declines is passed on as it answers. `head`: the request's, without what is this hop's own.
    """
    try:
        connection = await pool.acquire(REUSE_IDLE_S)
    except NotSent as why:
        client.answer(problem("upstream-unreachable", str(why)))
        return Relayed(Outcome.UPSTREAM_UNREACHABLE)
    began = time.perf_counter()
    try:
        connection.send_upgrade(head.removesuffix(b"\r\n") + SWITCHING + b"\r\n")
        answer = await connection.wait_for_head(silence_s)
        if answer.status == 101:
            client.switch(answer.forwarded_block + SWITCHING)
            outcome = await _splice(request, client, connection, silence_s)
        else:
            outcome = await pass_on(client, connection, answer, silence_s)
    except UpstreamLost as lost:
        outcome = fail(client, lost)
    finally:
        pool.release(connection)
    return Relayed(
        outcome, connection.response.head.status if connection.response.head else 0, time.perf_counter() - began
    )


async def _splice(request: Request, client: ResponseWriter, connection: Connection, silence_s: float) -> Outcome:
    upstreamward = _Upstreamward(request)
    sending = asyncio.get_running_loop().create_task(upstreamward.run(connection, silence_s))
    request.protocol.set_parser(upstreamward)  # all that is called is there
    try:
        while data := await connection.next_chunk(silence_s):
            client.write(data)
            while not await client.taken():
                pass
            if client.gone:
                break
    except UpstreamLost as lost:
        if lost is not CLOSES_NOW:
            client.abort()
            return Outcome.TRUNCATED
    finally:
        sending.cancel()
    client.end()
    return Outcome.PASSTHROUGH
