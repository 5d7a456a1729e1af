"""TLS towards the upstream, on uvloop's own protocol, and what is still unread when a connection breaks."""

import asyncio
import contextlib
import os
import ssl
from typing import Any

from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]

_READ_BYTES = 262144


def unread_bytes(descriptor: int) -> bytes:
    """Return what the kernel still holds for a socket whose connection broke: a reset does not discard it."""
    pieces: list[bytes] = []
    # BlockingIOError where nothing is left, or the reset itself.
    with contextlib.suppress(OSError):
        while data := os.read(descriptor, _READ_BYTES):
            pieces.append(data)
    return b"".join(pieces)


class _TlsProtocol(SSLProtocol):  # type: ignore[misc]
    """uvloop's TLS, which keeps what came before a failed write: the connection reads it from its `ssl_object`."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._descriptor = transport.get_extra_info("socket").fileno()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        # The connection hears of the end in the next turn of the loop, when the socket is closed already.
        rest = memoryview(unread_bytes(self._descriptor) if exc is not None else b"")
        super().connection_lost(exc)
        while rest:
            # Without a connection these bytes are only kept, not decrypted.
            buffer = self.get_buffer(len(rest))
            size = min(len(buffer), len(rest))
            buffer[:size], rest = rest[:size], rest[size:]
            self.buffer_updated(size)


async def connect_tls(
    loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, context: ssl.SSLContext, name: str, **where: Any
) -> None:
    """Connect `protocol` by TLS to a server of this name. `where`: an address, or a connected socket."""
    shaken_hands: asyncio.Future[None] = loop.create_future()
    transport, _ = await loop.create_connection(
        lambda: _TlsProtocol(loop, protocol, context, shaken_hands, False, name), **where
    )
    try:
        await shaken_hands
    except BaseException:
        transport.abort()
        raise
