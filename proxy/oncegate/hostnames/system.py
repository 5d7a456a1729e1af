"""One look-up by the system's resolver, in a thread that nothing else waits for.

It is getaddrinfo, because /etc/hosts, nsswitch.conf with its modules and search domains hold there as for any other
program of the machine. It blocks while a name server is silent (10 s and more by default), and nothing ends it.
Threads of a shared pool would be held for so long, and with them every other name.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# As getaddrinfo gives it: family, type, protocol, canonical name and socket address.
AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]
LookUp = Callable[[str], list[AddressInfo]]
Found = list[AddressInfo] | OSError

# What getaddrinfo says of a name that is known to have no address; every other error leaves that open.
_NO_ADDRESS = frozenset((socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY))


def system_look_up(host: str) -> list[AddressInfo]:
    """Return the addresses of a host name, in the system's order of preference (RFC 6724). Blocks. Raises OSError."""
    # The C library finds `localhost.` in no file, and would ask a name server for it (RFC 6761, section 6.3).
    name = "localhost" if host == "localhost." else host
    # For a port, which the caller fills in, each address comes once for each kind of socket: one is enough.
    return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)  # type: ignore[return-value]


def look_up_in_thread(
    look_up: LookUp, host: str, loop: asyncio.AbstractEventLoop, done: Callable[[Found], None]
) -> None:
    """Look a name up in a new thread; `done` is called in the loop with the addresses, or with what went wrong.

    The process does not wait for the thread when it ends.
    """

    def run() -> None:
        try:
            found: Found = look_up(host)
        except OSError as error:
            found = error.with_traceback(None)
        except Exception as error:
            # A name that cannot be encoded.
            found = OSError(str(error))
        # The loop may be closed by now.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(done, found)

    try:
        threading.Thread(target=run, name=f"look-up of {host}", daemon=True).start()
    except RuntimeError as error:
        # The limit of threads is reached.
        loop.call_soon(done, OSError(str(error)))


def look_up_failure(error: socket.gaierror) -> str:
    """Return why a look-up failed, without the name."""
    return "the host name has no address" if says_no_address(error) else "no name server could look the host name up"


def says_no_address(error: OSError) -> bool:
    """Return whether a look-up failed because the name has no address, and not because nobody could tell."""
    return isinstance(error, socket.gaierror) and error.errno in _NO_ADDRESS
