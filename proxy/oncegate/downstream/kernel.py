"""What the kernel has of a connection: the bytes that the peer does not have yet, and how it closes."""

import asyncio
import fcntl
import socket
import struct
import termios

# SO_LINGER values. They decide how the kernel closes the socket, also that of a process that died.
RESET, FIN = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


def set_linger(transport: asyncio.Transport | None, option: bytes) -> None:
    """Let a connection end with a RESET or a FIN."""
    if transport is not None and (raw := transport.get_extra_info("socket")) is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Return how many written bytes the peer does not have yet.

    The kernel's part counts, too: it reports room only in steps of a third of its buffer, for which a slow peer takes
    minutes.
    """
    unsent = transport.get_write_buffer_size()
    raw = transport.get_extra_info("socket")
    if raw is not None and (unsent or not transport.is_closing()):
        unsent += struct.unpack("i", fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return unsent
