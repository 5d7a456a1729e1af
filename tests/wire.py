"""A listener without sockets: its transports are the tests', which say where the segments are cut."""

import asyncio
import re
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from oncegate.downstream.listener import Listener
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.request import Request
from oncegate.known_heads.requests import HeadCache
from oncegate.messages.admission import Admission, Refused
from oncegate.messages.framing import COUNTED
from oncegate.messages.problems import refusal

DATE = re.compile(rb"Date: [^\r]*")
TURNS = 12  # of the loop, in which a request is answered

# The number of a connection and what comes on it; a third member means that the next one comes at once.
Segment = tuple[int, bytes] | tuple[int, bytes, str]


class Wire(asyncio.Transport):
    """A transport whose peer is the test: what is written stays here, and segments are as the test cuts them."""

    def __init__(self, place: socket.socket | None = None) -> None:
        super().__init__({"socket": place, "peername": ("192.0.2.1", 1)} if place else {"peername": ("192.0.2.1", 1)})
        self.written, self.closed, self.paused = b"", False, False

    def write(self, data: bytes) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Side:
    """A listener behind the checks of admission, and what its handler saw."""

    def __init__(self, remembers: bool, window_s: float = 5) -> None:
        self.found = 0
        self.admission = Admission((), b"idempotency-key", [b"authorization"])
        cache = HeadCache(enabled=remembers)
        cache.reset(b"idempotency-key")
        self.saw: list[object] = []
        self.captured: list[tuple[object, ...]] = []
        self.listener = Listener(
            self.answer,
            max_connections=100,
            minimum_rate=MinimumRate(window_s, 1),
            # `asked` is another object each time.
            observe=lambda report: self.saw.append(replace(report, asked=None)),
            head_cache=cache,
        )

    async def answer(self, request: Request) -> None:
        client, message = request.response, request.message
        if request.known is not None:
            self.found += 1
            self.capture(request)
            head = request.checked_head()
        else:
            target = (message.path or "").encode("utf-8", "surrogateescape")
            admitted = self.admission.admit(message.method, target, message.version, message.raw_headers)
            if isinstance(admitted, Refused):
                self.saw.append(admitted)
                client.send_problem(refusal(admitted.status, admitted.detail), close=True)
                return
            request.head = head = admitted
            request.known = request.connection.remember_head(message, head)
            self.capture(request)
        self.saw.append((*head[:4], [*map(tuple, head.pairs)], head.fields, await self.read(request.content)))
        client.send(200, b"OK", b"", b"%d" % len(self.saw), COUNTED)

    def capture(self, request: Request) -> None:
        """Note what a request says of itself before its head was made of what is known."""
        fields = [request.field(name) for name in (b"trace", b"traceparent", b"user-agent")]
        self.captured.append((*fields, request.trace_id, request.path))

    async def read(self, content: Any) -> bytes | str:
        """Return the body, as far as it comes within a few turns, and whether that was all."""
        body = b""
        try:
            for _ in range(TURNS // 2):
                body += content.read_nowait()
                if content.at_eof():
                    return body
                await asyncio.sleep(0)
        except Exception as error:
            return type(error).__name__
        return f"{body!r} ..."

    async def take(self, segments: Sequence[Segment]) -> list[tuple[bytes, bool]]:
        """Feed segments to connections by their number; return what each was told, and whether it was closed."""
        made: dict[int, tuple[Any, Wire]] = {}
        for number, data, *at_once in segments:
            if number not in made:
                made[number] = (self.listener(), Wire())
                made[number][0].connection_made(made[number][1])
            connection, wire = made[number]
            if not wire.closed:
                connection.data_received(data)
            for _ in range(0 if at_once else TURNS):
                await asyncio.sleep(0)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        for connection, _ in made.values():
            connection.connection_lost(None)
        await asyncio.sleep(0)
        return [(DATE.sub(b"", wire.written), wire.closed) for _, wire in made.values()]
