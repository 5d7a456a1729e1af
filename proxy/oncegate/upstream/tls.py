"""TLS towards the upstream, on uvloop's own protocol; and what came before a connection broke."""

import asyncio
import contextlib
import os
import ssl
from typing import Any, NamedTuple

from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]

from oncegate.hostnames.failures import failure_words

_READ_BYTES = 262144
# Alerts (RFC 8446, section 6.2) by which a server refuses a handshake or the client's certificate in it.
_REFUSALS = frozenset(
    (
        "bad_certificate",
        "certificate_expired",
        "certificate_required",
        "certificate_revoked",
        "certificate_unknown",
        "handshake_failure",
        "unknown_ca",
        "unsupported_certificate",
    )
)
# OpenSSL's codes for a certificate of another host or address. Its message would show clients the upstream's name.
_OTHER_NAME_CODES = (62, 64)


class Remainder(NamedTuple):
    """What came on a connection before it broke and was not read. `ended`: TLS says that nothing is missing.

    `error`: why nothing more can be read, or what broke the connection.
    """

    data: bytes = b""
    ended: bool = False
    error: Exception | None = None


def read_remainder(transport: asyncio.Transport, error: Exception | None) -> Remainder:
    """Return what came before a connection broke by `error`, None for a close of our own or a clean one.

    A write that fails ends the transport at once, and so does the end of a TLS session that is paused. To be called
    within `connection_lost`.
    """
    tls = transport.get_extra_info("ssl_object")
    if tls is None:
        # After a reset the kernel says "end of file", too. It is never the end of a response.
        return Remainder(_unread_bytes(transport) if error is not None else b"", error=error)
    if isinstance(error, ssl.SSLError):
        # After an alert OpenSSL says "end of data", too.
        return Remainder(error=error)
    pieces: list[bytes] = []
    try:
        while data := tls.read(_READ_BYTES):
            pieces.append(data)
    except (ssl.SSLWantReadError, ssl.SSLEOFError):
        # There was no close_notify.
        return Remainder(b"".join(pieces), error=error)
    except ssl.SSLError as alert:
        return Remainder(b"".join(pieces), error=alert.with_traceback(None))
    return Remainder(b"".join(pieces), True, error)


def alert_of(error: BaseException | None) -> str:
    """Return the name of the fatal alert that the other side sent, as RFC 8446 has it; empty for any other error."""
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return (reason or "").partition("_ALERT_")[2].lower()


def connect_failure(error: Exception) -> str:
    """Return why a connection did not come about, for a client: nothing in it names the upstream."""
    if isinstance(error, ssl.SSLCertVerificationError):
        is_other_name = error.verify_code in _OTHER_NAME_CODES
        return f"certificate not accepted: {'it has another name' if is_other_name else error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return alert_of(error) or (error.reason or "TLS failed").lower()
    return failure_words(error)


def is_handshake_refused(transport: asyncio.Transport, alert: str) -> bool:
    """Return whether an alert on a connection that nothing else ever came on says that no request was read.

    In TLS 1.3 the client's side of the handshake ends before the server has checked it, so that the request is on its
    way already. The server can read it only after the check: no early data is sent, and no later check is offered. A
    server of TLS 1.2 may have read the request before it asks for a certificate.
    """
    return alert in _REFUSALS and transport.get_extra_info("cipher")[1] == "TLSv1.3"


def _unread_bytes(transport: asyncio.Transport) -> bytes:
    """Return what the kernel still holds for a socket whose connection broke: a reset does not discard it."""
    descriptor = transport.get_extra_info("socket").fileno()
    pieces: list[bytes] = []
    # BlockingIOError where nothing is left, or the reset itself.
    with contextlib.suppress(OSError):
        while data := os.read(descriptor, _READ_BYTES):
            pieces.append(data)
    return b"".join(pieces)


class _TlsProtocol(SSLProtocol):  # type: ignore[misc]
    """uvloop's TLS, which keeps what came before a failed write: the connection reads it from its `ssl_object`."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._plain: asyncio.Transport | None = transport
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        # The connection hears of the end in the next turn of the loop, when the socket is closed already.
        plain, self._plain = self._plain, None
        rest = memoryview(_unread_bytes(plain) if exc is not None and plain is not None else b"")
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
