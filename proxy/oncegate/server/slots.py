"""A worker process as its supervisor sees it, and the listening sockets that successive workers share.

A `Slot` outlives its workers: connections wait in the queues of its sockets while a worker is replaced.
`oncegate.server.worker` describes the link between a worker and its supervisor.
"""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from oncegate.server import early_signals
from oncegate.server.processes import wait_for_exit
from oncegate.server.signals import stops_blocked
from oncegate.settings.addresses import Address

REPORT_TIMEOUT_S = 1.0
# The delay before a restart doubles from the minimum to the maximum. A life of STABLE_S resets it.
MIN_RESTART_DELAY_S, MAX_RESTART_DELAY_S = 0.05, 10.0
STABLE_S = 30.0
# The workers of a supervisor that was killed release the port within this time.
PORT_RELEASE_S = 2.0
BACKLOG = 1024

# The program of a worker: this installation of oncegate, whatever lies in the working folder.
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; "
    "from oncegate.server.worker import Assignment, main; sys.exit(main(Assignment(*{arguments!r})))"
)


class Worker:
    """One worker process. Start it on the main thread: the kernel ties its life to the thread that forked it.

    `report` is the last one received. `exited` is a task that returns the exit status, or minus the number of the
    signal that killed the process. `refusal`: why a successor that is not ready ended instead of serving.
    """

    def __init__(self, slot: "Slot", store_url: str, is_successor: bool = False) -> None:
        self.slot = slot
        self.is_serving = False
        # What it has to be told once it serves.
        self._postponed: list[Callable[[], Any]] = []
        self.refusal: list[str] = []
        self.report: dict[str, Any] = {"counts": {}, "gauges": {}, "not_ready_reasons": [], "cut_off": 0}
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[bool] = self._loop.create_future()
        self._report_requests: dict[int, asyncio.Future[bool]] = {}
        self._last_request = 0
        ours, theirs = socket.socketpair()
        descriptors = [listener.fileno() for listener in slot.sockets]
        arguments = (slot.number, os.getpid(), theirs.fileno(), descriptors, store_url, is_successor)
        # It takes a stop signal once it can: until then the signal would kill it.
        with theirs, stops_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=sys.path, arguments=arguments)],
                pass_fds=(theirs.fileno(), *descriptors),
                # In its own session a worker gets a terminal's Ctrl-C once, through the supervisor.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.started_at = time.monotonic()
        self.exited = self._loop.create_task(self._run(ours))

    async def _run(self, link: socket.socket) -> int:
        """Receive reports until the process exits; return its exit status."""
        # A line is a whole report: some kilobytes, and more with long sentences in `not_ready_reasons`.
        reader, self._writer = await asyncio.open_unix_connection(sock=link, limit=1 << 20)
        with contextlib.suppress(OSError, ValueError):
            async for line in reader:
                self._receive(json.loads(line))
        self._writer.close()
        status = await wait_for_exit(self._process)
        for waiting in (self._started, *self._report_requests.values()):
            _complete(waiting, False)
        return status

    def _receive(self, message: dict[str, Any]) -> None:
        if "serving" in message:
            self.is_serving = True
            _complete(self._started, True)
            for tell in self._postponed:
                tell()
            return
        if "refusal" in message:
            self.refusal = message["refusal"]
            return
        self.report = message
        if (request := self._report_requests.pop(message["request"], None)) is not None:
            _complete(request, True)

    async def wait_until_serving(self) -> bool:
        """Return True once the worker serves, False if it exits before."""
        return await asyncio.shield(self._started)

    async def refresh(self) -> bool:
        """Request a new report. Return False if none arrives within REPORT_TIMEOUT_S; `report` stays the last one."""
        self._last_request += 1
        number = self._last_request
        if not self._send(b"report %d\n" % number):
            return False
        request = self._report_requests[number] = self._loop.create_future()
        try:
            return await asyncio.wait_for(request, REPORT_TIMEOUT_S)
        except TimeoutError:
            return False
        finally:
            self._report_requests.pop(number, None)

    def reload(self) -> None:
        """Let the worker read its files again: once it serves, because it may have read them already."""
        self._once_serving(lambda: self.signal(signal.SIGHUP))

    def begin_drain(self) -> None:
        """Let the worker's clients move on; it serves until a stop signal."""
        self._once_serving(lambda: self._send(b"drain\n"))

    def _once_serving(self, tell: Callable[[], Any]) -> None:
        if self.is_serving:
            tell()
        else:
            self._postponed.append(tell)

    def retire(self) -> None:
        """Let the worker finish its open connections and requests, and accept no new connection."""
        self._send(b"retire\n")

    def _send(self, line: bytes) -> bool:
        if not self.is_serving or self.exited.done() or self._writer.is_closing():
            return False
        self._writer.write(line)
        return True

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has exited."""
        if not self.exited.done():
            self._process.send_signal(number)


class Slot:
    """A place for one worker: listening sockets that outlive it, and the worker that uses them now.

    `restart_delay_s` is the pause before the last restart; 0 before the first. `changing` is held by whoever puts
    another worker into the slot, from the start of the other one on.
    """

    def __init__(self, number: int, sockets: list[socket.socket]) -> None:
        self.number, self.sockets = number, sockets
        self.worker: Worker | None = None
        self.restart_delay_s = 0.0
        self.changing = asyncio.Lock()

    def delay_restart(self, lived_s: float) -> None:
        """Choose the pause before the next restart, after a worker that lived for `lived_s` seconds."""
        if lived_s > STABLE_S or not self.restart_delay_s:
            self.restart_delay_s = MIN_RESTART_DELAY_S
        else:
            self.restart_delay_s = min(2 * self.restart_delay_s, MAX_RESTART_DELAY_S)

    @property
    def reported_reasons(self) -> list[str]:
        """The same as `not_ready_reasons`, as the worker's last report has it."""
        worker = self.worker
        if worker is None or not worker.is_serving or worker.exited.done():
            return [f"worker {self.number} does not serve"]
        return [str(reason) for reason in worker.report["not_ready_reasons"]]

    async def not_ready_reasons(self) -> list[str]:
        """Return why the worker in this slot should get no traffic now."""
        worker = self.worker
        if worker is not None and worker.is_serving and not await worker.refresh():
            return [f"worker {self.number} does not answer"]
        return self.reported_reasons

    def close(self) -> None:
        """Close the supervisor's copies of the sockets; workers keep theirs."""
        for listener in self.sockets:
            listener.close()


def _complete(future: "asyncio.Future[bool]", result: bool) -> None:
    if not future.done():
        future.set_result(result)


def open_slots(address: Address, count: int, inherited: Sequence[socket.socket] = ()) -> list[Slot]:
    """Return `count` slots, each with its own listening sockets on the same address. Raises OSError.

    The kernel spreads new connections over the sockets (SO_REUSEPORT, socket(7)). All slots share `inherited` sockets,
    where there are some.
    """
    if inherited:
        return [Slot(number, [one.dup() for one in inherited]) for number in range(1, count + 1)]
    resolved = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # getaddrinfo may return the same address twice.
    unique = dict.fromkeys((family, sockaddr) for family, *_, sockaddr in resolved)
    addresses = [_wait_until_free(family, sockaddr) for family, sockaddr in unique]
    slots: list[Slot] = []
    with contextlib.ExitStack() as undo:
        for number in range(1, count + 1):
            slots.append(Slot(number, []))
            undo.callback(slots[-1].close)
            for family, sockaddr in addresses:
                slots[-1].sockets.append(_bind(family, sockaddr, socket.SO_REUSEPORT))
                slots[-1].sockets[-1].listen(BACKLOG)
        undo.pop_all()
    return slots


def _wait_until_free(family: int, sockaddr: Any) -> tuple[int, Any]:
    """Return the family and the address with its port, once nobody listens on it. Raises OSError after a while."""
    deadline = time.monotonic() + PORT_RELEASE_S
    while True:
        early_signals.raise_if_stopped()
        try:
            # Bound without SO_REUSEPORT, which would hide another service on the same port.
            with _bind(family, sockaddr) as probe:
                return family, probe.getsockname()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise OSError(error.errno, f"cannot listen on {sockaddr[0]}:{sockaddr[1]}: {error.strerror}") from None
        time.sleep(0.02)


def _bind(family: int, sockaddr: Any, *options: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, *options):
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        # `::` serves clients of both families.
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, sockaddr[0] != "::")
        bound.bind(sockaddr)
    except OSError:
        bound.close()
        raise
    return bound
