"""A worker as its supervisor sees it, and the sockets that it shares with its predecessor and its successor."""

import asyncio
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from oncegate.server.processes import ended
from oncegate.settings.addresses import Address

ANSWER_S = 1.0  # for a report that was asked for
LETTING_GO_S = 2.0  # in which the workers of a supervisor that was killed let go of the port
BACKLOG = 1024

# What runs in a worker: this very code, wherever it was imported from, whatever lies in the working folder.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from oncegate.server.worker import main; sys.exit(main(*{arguments!r}))"


class Worker:
    """One process of `slot`. Start it on the main thread: its end is tied to the thread that forked it."""

    def __init__(self, slot: "Slot", store_url: str) -> None:
        self.slot = slot
        self.is_up = False
        self.retiring = False
        self.report: dict[str, Any] = {"counts": {}, "gauges": {}, "problems": [], "cut_off": 0}
        self._loop = asyncio.get_running_loop()
        self._up: asyncio.Future[bool] = self._loop.create_future()
        self._asked: dict[int, asyncio.Future[bool]] = {}
        self._asks = 0
        ours, theirs = socket.socketpair()
        descriptors = [one.fileno() for one in slot.sockets]
        arguments = (slot.number, os.getpid(), theirs.fileno(), descriptors, store_url)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=sys.path, arguments=arguments)],
                pass_fds=(theirs.fileno(), *descriptors),
                start_new_session=True,  # a terminal's Ctrl-C comes through the supervisor, once
            )
        self.pid = self._process.pid
        self.started_at = time.monotonic()
        self.ended = self._loop.create_task(self._run(ours))

    async def _run(self, link: socket.socket) -> int:
        """Take its reports until it ends; return its exit status, or minus the signal that ended it."""
        reader, self._writer = await asyncio.open_unix_connection(sock=link, limit=1 << 20)
        with contextlib.suppress(OSError, ValueError):
            async for line in reader:
                self._take(json.loads(line))
        self._writer.close()
        status = await ended(self._process)
        for waiting in (self._up, *self._asked.values()):
            _settle(waiting, False)
        return status

    def _take(self, message: dict[str, Any]) -> None:
        if "up" in message:
            self.is_up = True
            _settle(self._up, True)
            return
        self.report = message
        if (asked := self._asked.pop(message["asked"], None)) is not None:
            _settle(asked, True)

    async def comes_up(self) -> bool:
        """Wait until it serves; False where it ended instead."""
        return await asyncio.shield(self._up)

    async def refresh(self) -> bool:
        """Ask for a new report; False where none comes in time, and the last one stays."""
        self._asks += 1
        number = self._asks
        if not self._say(b"report %d\n" % number):
            return False
        asked = self._asked[number] = self._loop.create_future()
        try:
            return await asyncio.wait_for(asked, ANSWER_S)
        except TimeoutError:
            return False
        finally:
            self._asked.pop(number, None)

    def retire(self) -> None:
        """Let it finish what it has, and take nothing new."""
        self.retiring = True
        self._say(b"retire\n")

    def _say(self, line: bytes) -> bool:
        if not self.is_up or self.ended.done() or self._writer.is_closing():
            return False
        self._writer.write(line)
        return True

    def signal(self, number: int) -> None:
        if not self.ended.done():
            self._process.send_signal(number)


class Slot:
    """A place for one worker: listening sockets that outlive it, and who holds the place now."""

    def __init__(self, number: int, sockets: list[socket.socket]) -> None:
        self.number, self.sockets = number, sockets
        self.worker: Worker | None = None
        self.delay_s = 0.0  # before the next restart

    def close(self) -> None:
        for one in self.sockets:
            one.close()


def _settle(future: "asyncio.Future[bool]", result: bool) -> None:
    if not future.done():
        future.set_result(result)


def open_slots(address: Address, count: int) -> list[Slot]:
    """Bind and listen once for each worker: the system spreads connections over the sockets. Raises OSError."""
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    places = [_free(family, place) for family, place in dict.fromkeys((family, place) for family, *_, place in found)]
    slots: list[Slot] = []
    with contextlib.ExitStack() as undo:
        for number in range(1, count + 1):
            slots.append(Slot(number, []))
            undo.callback(slots[-1].close)
            for place in places:
                slots[-1].sockets.append(_bound(*place, socket.SO_REUSEPORT))
                slots[-1].sockets[-1].listen(BACKLOG)
        undo.pop_all()
    return slots


def _free(family: int, place: Any) -> tuple[int, Any]:
    """Return the place with its port, once nobody listens there: sharing a port would hide that somebody does."""
    deadline = time.monotonic() + LETTING_GO_S
    while True:
        try:
            with _bound(family, place) as probe:
                return family, probe.getsockname()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise OSError(error.errno, f"cannot listen on {place[0]}:{place[1]}: {error.strerror}") from None
        time.sleep(0.02)


def _bound(family: int, place: Any, *options: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, *options):
            one.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(place)
    except OSError:
        one.close()
        raise
    return one
