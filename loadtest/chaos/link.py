"""A TCP link that fails on demand: it relays bytes between two programs until a fault is set.

Each direction has its own faults: latency, slices, a black hole, a cut after so many bytes (with a reset or a clean
end), and a dropped reply. A reset on one side becomes a reset on the other, a clean end a clean end.
"""

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Coroutine
from typing import Any, cast

READ_AHEAD_BYTES = 262144  # kept of what came while a direction is in trouble
_RESET = struct.pack("ii", 1, 0)

Address = tuple[str, int]


def reset(transport: asyncio.Transport) -> None:
    """End a connection with a RST."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


class Way:
    """One direction of a link, and the faults of its bytes. Times are in seconds."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._open = asyncio.Event()
        self._open.set()
        self.latency_s = self.jitter_s = 0.0
        self.slice_bytes = 0
        self._cut: tuple[int, bool] | None = None  # bytes still to pass, and whether with a reset
        self._drop: int | None = None  # which of the pieces to come is lost, with its connection
        self.troubled = False

    def hole(self) -> None:
        """Let nothing pass, and keep the bytes."""
        self._open.clear()
        self._judge()

    def slow(self, latency_s: float, jitter_s: float = 0.0, slice_bytes: int = 0) -> None:
        """Pass everything on later, in slices of at most so many bytes (0: unsliced)."""
        self.latency_s, self.jitter_s, self.slice_bytes = latency_s, jitter_s, slice_bytes
        self._judge()

    def cut_after(self, count: int, with_reset: bool = True) -> None:
        """Pass so many bytes more, then end the connection that brought the last of them."""
        self._cut = count, with_reset
        self._judge()

    def drop(self, number: int) -> None:
        """Lose the `number`th piece (one reply, if replies come one by one), and reset its connection."""
        self._drop = number
        self._judge()

    def heal(self) -> None:
        """Pass everything on unchanged from now on."""
        self._cut = self._drop = None
        self._open.set()
        self.slow(0.0)

    @property
    def holds(self) -> bool:
        """Whether it is a black hole."""
        return not self._open.is_set()

    def _judge(self) -> None:
        slowed = self.latency_s or self.jitter_s or self.slice_bytes
        self.troubled = bool(slowed or self.holds or self._cut is not None or self._drop is not None)

    async def opened(self) -> None:
        """Wait while it is a black hole."""
        await self._open.wait()

    async def wait(self) -> None:
        """Wait for the latency of one piece."""
        await self._open.wait()
        if self.latency_s or self.jitter_s:
            await asyncio.sleep(self.latency_s + self._rng.uniform(0, self.jitter_s))

    def slices(self, data: bytes) -> list[bytes]:
        """Return the slices in which a piece is passed on."""
        pieces = []
        while data and self.slice_bytes:
            size = self._rng.randint(1, self.slice_bytes)
            pieces.append(data[:size])
            data = data[size:]
        return [*pieces, data] if data else pieces

    def loses(self) -> bool:
        """Return whether this piece is the one to drop."""
        if self._drop is None:
            return False
        self._drop -= 1
        if self._drop > 0:
            return False
        self._drop = None
        self._judge()
        return True

    def cuts(self, size: int) -> tuple[int, bool] | None:
        """Return how much of a piece passes before the cut, and whether it is a reset; None: all of it passes."""
        if self._cut is None:
            return None
        left, with_reset = self._cut
        if size < left:
            self._cut = left - size, with_reset
            return None
        self._cut = None
        self._judge()
        return left, with_reset


class _End(asyncio.Protocol):
    """One end of a relayed connection: bytes that it receives go to `peer` by way of `way`."""

    def __init__(self, link: "Link", way: Way) -> None:
        self._link, self._way = link, way
        self.peer: _End | None = None
        self.transport: asyncio.Transport | None = None
        self._queue: deque[bytes | None] = deque()  # None is the end
        self._queued = 0
        self._pumping = False
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._link.ends.add(self)
        if self.peer is None:
            self._link.spawn(self._link.connect(self))

    def data_received(self, data: bytes) -> None:
        if self._way.troubled or self._pumping or self.peer is None:
            self._later(data)
        else:
            self._write(data)

    def eof_received(self) -> bool:
        self._later(None)
        return True  # its other direction may go on

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.ends.discard(self)
        self.transport = None
        peer = self.peer
        if peer is None or peer.transport is None:
            return
        if exc is not None:
            reset(peer.transport)
        elif not self._pumping:
            peer.transport.close()

    def pause_writing(self) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.resume_reading()

    def _later(self, data: bytes | None) -> None:
        self._queue.append(data)
        self._queued += len(data or b"")
        if self._queued > READ_AHEAD_BYTES and self.transport is not None:
            self.transport.pause_reading()
        self.go_on()

    def go_on(self) -> None:
        """Pass on the bytes that wait, once the other end exists."""
        if self._queue and self.peer is not None and not self._pumping:
            self._pumping = True
            self._link.spawn(self._pump())

    async def _pump(self) -> None:
        try:
            while self._queue:
                data = self._queue.popleft()
                await (self._way.wait() if data else self._way.opened())
                self._queued -= len(data or b"")
                if not await self._pass(data):
                    return
        finally:
            self._pumping = False
        if self.transport is not None and not self._ended:
            self.transport.resume_reading()
        elif self.transport is None and self.peer is not None and self.peer.transport is not None:
            self.peer.transport.close()

    async def _pass(self, data: bytes | None) -> bool:
        """Pass one piece on, or the part that its fault leaves. Return False if the connection is over."""
        if data is None:
            return self._end()
        if self._way.loses():
            self.cut(True)
            return False
        for number, piece in enumerate(self._way.slices(data)):
            if number:
                await asyncio.sleep(0)
            if (cut := self._way.cuts(len(piece))) is not None:
                self._write(piece[: cut[0]])
                self.cut(cut[1])
                return False
            self._write(piece)
        return True

    def _end(self) -> bool:
        self._ended = True
        peer = self.peer
        if peer is None or peer.transport is None:
            return False
        if peer._ended:
            self.cut(False)
            return False
        if peer.transport.can_write_eof() and not peer.transport.is_closing():
            peer.transport.write_eof()
        return True

    def _write(self, data: bytes) -> None:
        if self.peer is not None and self.peer.transport is not None and not self.peer.transport.is_closing():
            self.peer.transport.write(data)

    def cut(self, with_reset: bool) -> None:
        """End both sides, with a reset or cleanly."""
        for end in (self.peer, self):
            if end is not None and end.transport is not None:
                reset(end.transport) if with_reset else end.transport.close()


class Link:
    """Listens on `port` and relays to `target`, which may change. `up` leads to the target, `down` back."""

    def __init__(self, target: Address, seed: int = 0, host: str = "127.0.0.1") -> None:
        rng = random.Random(seed)
        self.target, self._host, self.port = target, host, 0
        self.up, self.down = Way(rng), Way(rng)
        self.ends: set[_End] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, on the same port as before after a `refuse`."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                lambda: _End(self, self.up), self._host, self.port, reuse_address=True, backlog=1024
            )
            self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Stop listening until `start`: new connections are refused, open ones stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def connect(self, near: _End) -> None:
        """Connect the other side of an accepted connection."""
        await self.up.wait()
        far = _End(self, self.down)
        far.peer = near
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, *self.target)
        except OSError:
            if near.transport is not None:
                reset(near.transport)
            return
        near.peer = far
        if near.transport is None:  # it left meanwhile
            far.cut(True)
        else:
            near.go_on()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cut(self, with_reset: bool = True) -> int:
        """End every connection on it, and return the number of ends."""
        ends = list(self.ends)
        for end in ends:
            end.cut(with_reset)
        return len(ends)

    def hole(self) -> None:
        """Let nothing pass in either direction."""
        self.up.hole()
        self.down.hole()

    def heal(self) -> None:
        self.up.heal()
        self.down.heal()

    async def close(self) -> None:
        self.refuse()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
