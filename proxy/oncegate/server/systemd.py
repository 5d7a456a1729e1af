"""What systemd gives a service, and what it wants to hear: open sockets (sd_listen_fds(3)) and notices (sd_notify(3)).

Each is used only where systemd has set its variable. They are taken out of the environment: child processes must not
take the sockets for theirs, nor speak for the service.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping, Sequence
from typing import Any

# SD_LISTEN_FDS_START.
FIRST_DESCRIPTOR = 3
ROLES = ("public", "admin")
SERVING = "STATUS=serving"


class Systemd:
    """The notices to systemd, and the sockets from it. `public` and `admin`: listeners that are open already.

    Raises OSError for sockets that cannot be used. Main process only.
    """

    def __init__(self, environment: MutableMapping[str, str], log: Any) -> None:
        self._log = log
        self._address = environment.pop("NOTIFY_SOCKET", "")
        interval_us, pid = (environment.pop(name, "") for name in ("WATCHDOG_USEC", "WATCHDOG_PID"))
        # Half of the interval, as sd_watchdog_enabled(3) recommends.
        self._ping_s = int(interval_us) / 2e6 if interval_us.isdecimal() and pid in ("", str(os.getpid())) else 0.0
        sockets = _inherited(environment)
        self.public = [one for role, one in sockets if role == "public"]
        self.admin = next((one for role, one in sockets if role == "admin"), None)

    @contextlib.asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        """Say that the service serves in this context, and stops at its end. The watchdog sees the event loop run."""
        self._tell("READY=1", SERVING)
        watching = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            self._tell("STOPPING=1", "STATUS=shutting down")

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Say that the service reloads in this context, and serves as before at its end."""
        # As systemd 253 and later want it, CLOCK_MONOTONIC in microseconds.
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self._tell("READY=1", SERVING)

    def status(self, text: str) -> None:
        """Say in words what the service does."""
        self._tell(f"STATUS={text}")

    async def _watch(self) -> None:
        while self._ping_s:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._ping_s)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        # An @ at the beginning is an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            self._log.warning("systemd not told", notice=lines[0], reason=error.strerror or str(error))


def _inherited(environment: MutableMapping[str, str]) -> list[tuple[str, socket.socket]]:
    """Return the sockets that are meant for this process, each with its role. Raises OSError."""
    pid, count, names = (environment.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    with contextlib.ExitStack() as undo:
        sockets = [undo.enter_context(socket.socket(fileno=FIRST_DESCRIPTOR + number)) for number in range(int(count))]
        for one in sockets:
            one.set_inheritable(False)
            _require_listening(one)
        roles = _roles(names.split(":"), len(sockets))
        undo.pop_all()
    return list(zip(roles, sockets, strict=True))


def _require_listening(inherited: socket.socket) -> None:
    is_tcp = inherited.family in (socket.AF_INET, socket.AF_INET6) and inherited.type == socket.SOCK_STREAM
    if not is_tcp or not inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise OSError("systemd gave a socket that does not listen on TCP: use ListenStream=PORT and Accept=no")


def _roles(names: Sequence[str], count: int) -> list[str]:
    """Return which listener each socket is. One alone is the public one, whatever its name."""
    if count == 1 and names[0] != "admin":
        return ["public"]
    if len(names) != count or not set(names) <= set(ROLES) or names.count("admin") > 1:
        given = ", ".join(names)
        raise OSError(f"systemd gave sockets named {given}: set FileDescriptorName= to public, and to admin for one")
    return list(names)
