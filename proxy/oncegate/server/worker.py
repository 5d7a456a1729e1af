"""One worker of several: a process that serves on its supervisor's sockets and reports to the supervisor.

The link between both is a stream of lines. The worker sends JSON: `{"serving": true}` once it serves, then one report
a second and one for each request. The supervisor sends `report NUMBER` and `retire`. The end of the stream means that
the supervisor is dead: the worker then drains and exits.

A report has `counts` and `gauges` (of `Metrics.snapshot`), `not_ready_reasons` and `notices` (lists of sentences),
`cut_off` (how many requests a drain cut off) and `request` (the NUMBER that it answers, 0 for none).
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import uvloop

from oncegate.observe import logs
from oncegate.server.processes import die_with_parent
from oncegate.server.signals import ExitCode, stop_events
from oncegate.server.tuning import freeze_garbage_collection, grow_descriptor_table
from oncegate.service.service import Service, Unsupported
from oncegate.settings.loading import load_settings
from oncegate.settings.settings import Settings, SettingsError

# A worker that is killed loses what it counted in this time.
REPORT_INTERVAL_S = 1.0
# The kernel sends this signal when the supervisor dies.
SUPERVISOR_DIED = signal.SIGUSR1
FLUSH_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Sockets:
    """What a worker inherits: its end of the link to the supervisor, and the listening sockets."""

    link: socket.socket
    listeners: list[socket.socket]


def main(number: int, supervisor_pid: int, link: int, listeners: list[int], store_url: str) -> ExitCode:
    """Serve until a stop signal, a retirement or the supervisor's death; return the process's exit code.

    `link` and `listeners` are file descriptors. `store_url` is the embedded store's, empty where the settings name
    a store.
    """
    # Until the worker serves, the default action of this signal ends the process. If the supervisor is dead already,
    # the end of the link shows it.
    with contextlib.suppress(OSError):
        die_with_parent(supervisor_pid, SUPERVISOR_DIED)()
    # By default SIGHUP would end the process: the supervisor forwards it to all workers for a reload.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        settings = load_settings()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return ExitCode.CANNOT_START
    logger = logs.configure(settings.log_level, settings.log_format).bind(worker=number)
    sockets = Sockets(socket.socket(fileno=link), [socket.socket(fileno=listener) for listener in listeners])
    try:
        return uvloop.run(_serve(settings, store_url or settings.store_url.get_secret_value(), sockets, logger))
    except (Unsupported, SettingsError, OSError) as error:
        logger.error("cannot start", reason=str(error))
        return ExitCode.CANNOT_START


async def _serve(settings: Settings, store_url: str, sockets: Sockets, logger: Any) -> ExitCode:
    stop, retire = stop_events(), asyncio.Event()
    service = Service(settings, store_url, logger)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(SUPERVISOR_DIED, stop.requested.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    reader, writer = await asyncio.open_unix_connection(sock=sockets.link)
    reporter = Reporter(service, writer)
    following = _follow_supervisor(reader, reporter, stop.requested, retire)
    tasks = [asyncio.ensure_future(work) for work in (reporter.run(), following)]
    try:
        grow_descriptor_table(settings)
        freeze_garbage_collection()
        await service.start(sockets.listeners)
        writer.write(b'{"serving": true}\n')
        await _wait_for_first(stop.requested.wait(), retire.wait())
        # Retired, it serves open connections to their end, however long that takes; a stop signal ends this.
        if retire.is_set():
            await _wait_for_first(stop.requested.wait(), service.retire())
        drained = await service.drain(stop.immediate)
        logger.debug("worker stopped", cut_off=service.cut_off)
        return ExitCode.OK if drained else ExitCode.CUT_OFF
    finally:
        await service.close()
        for task in tasks:
            task.cancel()
        # The last report carries the final counters, and what the drain cut off.
        reporter.send()
        await _flush(writer)
        # A closed loop has no signal handlers. A stop signal between here and the exit would kill the process, as if
        # requests had been cut off.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, SUPERVISOR_DIED))


async def _wait_for_first(*works: Awaitable[Any]) -> None:
    """Return when one of them is done and cancel the others; raise what the first one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


async def _flush(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), FLUSH_TIMEOUT_S)


async def _follow_supervisor(
    reader: asyncio.StreamReader, reporter: "Reporter", stop: asyncio.Event, retire: asyncio.Event
) -> None:
    """Carry out the supervisor's commands; set `stop` when the link ends."""
    with contextlib.suppress(OSError):
        async for line in reader:
            command, _, number = line.strip().partition(b" ")
            if command == b"report":
                reporter.send(int(number))
            elif command == b"retire":
                retire.set()
    stop.set()


class Reporter:
    """Reports this worker's counters and readiness to the supervisor."""

    def __init__(self, service: Service, writer: asyncio.StreamWriter) -> None:
        self._service, self._writer = service, writer

    def send(self, request: int = 0) -> None:
        """Send a report; `request` is the number of the supervisor's request that it answers."""
        service = self._service
        report = service.metrics.snapshot() | {
            "request": request,
            "not_ready_reasons": service.not_ready_reasons(),
            "notices": service.notices(),
            "cut_off": service.cut_off,
        }
        if not self._writer.is_closing():
            self._writer.write(json.dumps(report).encode() + b"\n")

    async def run(self) -> None:
        """Send a report every REPORT_INTERVAL_S, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self.send()
