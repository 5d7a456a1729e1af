"""A WebSocket: once the upstream has switched to it, bytes both ways until either side ends."""

import asyncio
import contextlib
import time
from typing import NamedTuple

from oncegate.downstream.request import Request
from oncegate.gateway.answers import Refuse, not_sent, send
from oncegate.gateway.relay import Relay, Relayed, forward_response, lost_outcome
from oncegate.gateway.routes import Route
from oncegate.messages.request_head import SWITCHING, RequestHead
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import NotSent, UpstreamLost

# Bytes of a client that wait for the upstream, above which reading pauses.
HIGH_WATER = 65536
# How long the client's last bytes have to leave the process.
LAST_S = 1.0
CLOSES_NOW = UpstreamLost("the client ended it")


class _ToUpstream:
    """Takes what the client sends, in the place of aiohttp's parser, and passes it on to the upstream."""

    def __init__(self, request: Request) -> None:
        self._connection = request.connection
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
        """Pass on what comes. When the client ends, end the tunnel."""
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


class Tunnel(NamedTuple):
    """Let a WebSocket through. It has no end of its own: a drain does not wait for it, and closes it at its start."""

    route: Route
    head: RequestHead


async def tunnel(request: Request, step: Tunnel) -> Relayed:
    """Ask the upstream for a WebSocket and stay in between, as long as either side says something within its silence.

    An upstream that declines is passed on as it answers.
    """
    deps, response = step.route.deps, request.response
    try:
        # A connection of its own: it will not come back, and nobody was there before.
        connection = await deps.pool.acquire(0)
    except NotSent as reason:
        return Relayed(Outcome.UPSTREAM_UNREACHABLE, refuse=not_sent(str(reason), b""))
    began = time.perf_counter()
    refuse: Refuse | None = None
    try:
        # Without what is this hop's own.
        head = step.route.forwarded_head(step.head, request.connection.forwarded, -1)
        connection.send_upgrade(head + step.route.id_line(request) + SWITCHING + b"\r\n")
        answer = await connection.wait_for_head(deps.silence_s)
        outcome = Outcome.PASSTHROUGH
        if answer.status == 101:
            response.switch_protocols(request.adapted_block(answer, answer.forwarded_block) + SWITCHING)
            outcome = await _splice(request, connection, deps.silence_s)
        else:
            await forward_response(request, connection, answer, Relay(step.route, step.head))
    except NotSent as reason:
        outcome, refuse = Outcome.UPSTREAM_UNREACHABLE, not_sent(str(reason), b"")
    except UpstreamLost as lost:
        outcome, refuse = lost_outcome(response, lost, b"")
    finally:
        deps.pool.release(connection)
    final = connection.response.head
    return Relayed(outcome, final.status if final else 0, time.perf_counter() - began, refuse)


async def _splice(request: Request, connection: Connection, silence_s: float) -> Outcome:
    response = request.response
    to_upstream = _ToUpstream(request)
    sending = asyncio.get_running_loop().create_task(to_upstream.run(connection, silence_s))
    request.connection.set_parser(to_upstream)
    try:
        while data := await connection.next_chunk(silence_s):
            response.write(data)
            await response.wait_room()
            if response.client_gone:
                break
    except UpstreamLost as lost:
        if lost is not CLOSES_NOW:
            response.abort()
            return Outcome.TRUNCATED
    finally:
        sending.cancel()
    response.end()
    return Outcome.PASSTHROUGH


def pass_through_report(request: Request, step: Relay | Tunnel, relayed: Relayed) -> RequestReport:
    """Send what the client gets if the upstream gave no response, and return the report."""
    status = relayed.status
    if relayed.refuse is not None:
        send(request, relayed.refuse)
        status = relayed.refuse.problem.status
    why, key_reason = (step.unguarded, step.unguarded_key) if isinstance(step, Relay) else (None, None)
    # By position, as in `_replay`.
    return RequestReport(
        relayed.outcome, status, request.message.method, b"", relayed.upstream_s, 0.0, 0, False, "",
        step.route.policy.rule, None, (), False, key_reason, why, step.route.upstream,
    )  # fmt: skip
