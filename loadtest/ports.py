"""Ports of loopback that stay free until somebody listens on them."""

import random
import socket
from contextlib import ExitStack

FIRST, END = 10_000, 32_000  # below what systems give to clients, which would take such a port (Linux: 32768 and above)
_ANY = random.SystemRandom()  # processes that were seeded alike must not choose alike


def free_ports(count: int) -> list[int]:
    """Return so many different ports that nobody listens on now."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = _ANY.randrange(FIRST, END)
            try:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            ports.append(port)
    return ports


def free_port() -> int:
    return free_ports(1)[0]
