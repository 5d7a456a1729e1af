"""`Replaceable`: a listener's certificate is replaced under open connections, on the loop that the service runs on."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trustme
import uvloop

from oncegate.downstream.certificate import Replaceable

RSA, ECDSA = trustme.KeyType.RSA, trustme.KeyType.ECDSA


class Echo(asyncio.Protocol):
    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def context_of(authority: trustme.CA, kind: trustme.KeyType) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost", "127.0.0.1", key_type=kind).configure_cert(context)
    return context


@asynccontextmanager
async def listening(replaceable: Replaceable) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0, ssl=replaceable.first)
    yield server.sockets[0].getsockname()[1]
    server.close()


def client_context(authority: trustme.CA, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.maximum_version = version
    return context


def shake(
    port: int, context: ssl.SSLContext, name: str = "localhost", session: ssl.SSLSession | None = None
) -> tuple[bytes, ssl.SSLSession | None, bool]:
    """Return the certificate that a new connection gets, the session, and whether it was resumed."""
    with (
        socket.create_connection(("127.0.0.1", port), 5) as sock,
        context.wrap_socket(sock, server_hostname=name, session=session) as tls,
    ):
        tls.sendall(b"x")
        assert tls.recv(1) == b"x"
        return tls.getpeercert(binary_form=True) or b"", tls.session, bool(tls.session_reused)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(("before", "after"), [(RSA, ECDSA), (ECDSA, RSA), (RSA, RSA)])
def test_new_handshakes_get_the_new_certificate(before, after, version):
    """Whatever the keys, with and without a server name. Open connections go on, and sessions can be resumed."""
    authority = trustme.CA()
    trusting = client_context(authority, version)

    async def scenario() -> tuple[bytes, bytes, bytes, bool, bytes]:
        replaceable = Replaceable(context_of(authority, before))
        async with listening(replaceable) as port:
            old, session, _ = await asyncio.to_thread(shake, port, trusting)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="localhost")
            replaceable.replace(context_of(authority, after))
            new, _, _ = await asyncio.to_thread(shake, port, trusting)
            # A client sends no address as a server name (RFC 6066, section 3).
            nameless, _, _ = await asyncio.to_thread(shake, port, trusting, "127.0.0.1")
            _, _, is_resumed = await asyncio.to_thread(shake, port, trusting, "localhost", session)
            writer.write(b"still")
            echo = await reader.readexactly(5)
            writer.close()
            return old, new, nameless, is_resumed, echo

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        old, new, nameless, is_resumed, echo = runner.run(scenario())
    assert new != old
    assert nameless == new
    assert is_resumed
    assert echo == b"still"
