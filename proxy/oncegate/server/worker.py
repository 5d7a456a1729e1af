"""One worker of several: a process that serves on its supervisor's sockets and reports to the supervisor.

The link between both is a stream of lines. The worker sends JSON: `{"serving": true}` once it serves, then one report
a second and one for each request. A worker that is to succeed another serves only if it is ready; otherwise it sends
`{"refusal": [sentence, ...]}` and exits. The supervisor sends `report NUMBER`, `drain` and `retire`. The end of the
stream means that the supervisor is dead: the worker then drains and exits.

A report has `counts` and `gauges` (of `Metrics.snapshot`), `not_ready_reasons` and `notices` (lists of sentences),
`cut_off` (how many requests a drain cut off), `files` (the digests of those that were taken over last) and `request`
(the NUMBER that it answers, 0 for none).
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Awaitable
from typing import Any, NamedTuple

import uvloop

from oncegate.observe import logs
from oncegate.server.owners import Owners
from oncegate.server.processes import die_with_parent
from oncegate.server.signals import ExitCode, block_signals, stop_events, unblock_stops
from oncegate.server.tuning import freeze_garbage_collection, grow_descriptor_table
from oncegate.service.drain import unless
from oncegate.service.service import Service, Unsupported
from oncegate.settings.errors import SettingsError
from oncegate.settings.loading import load_settings
from oncegate.settings.settings import Settings

# A worker that is killed loses what it counted in this time.
REPORT_INTERVAL_S = 1.0
# The kernel sends this signal when the supervisor dies.
SUPERVISOR_DIED = signal.SIGUSR1
FLUSH_TIMEOUT_S = 1.0
# How long a successor tries to become ready.
READY_TIMEOUT_S = 10.0


class Assignment(NamedTuple):
    """What a supervisor tells a worker that it starts."""

    number: int
    supervisor_pid: int
    # File descriptors.
    link: int
    listeners: list[int]
    # The embedded store's, empty where the settings name a store.
    store_url: str
    # Another worker serves in the same slot, and leaves once this one serves.
    is_successor: bool


def main(assignment: Assignment) -> ExitCode:
    """Serve until a stop signal, a retirement or the supervisor's death; return the process's exit code."""
    # Until the worker serves, the default action of this signal ends the process. If the supervisor is dead already,
    # the end of the link shows it.
    with contextlib.suppress(OSError):
        die_with_parent(assignment.supervisor_pid, SUPERVISOR_DIED)()
    # By default SIGHUP would end the process: the supervisor forwards it to all workers for a reload.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        settings = load_settings()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return ExitCode.CANNOT_START
    logger = logs.configure(settings.log_level, settings.log_format).bind(worker=assignment.number)
    try:
        return uvloop.run(_serve(settings, assignment, logger))
    except (Unsupported, SettingsError, OSError) as error:
        logger.error("cannot start", reason=str(error))
        return ExitCode.CANNOT_START


async def _serve(settings: Settings, assignment: Assignment, logger: Any) -> ExitCode:
    stop, retire = stop_events(), asyncio.Event()
    unblock_stops()
    store_url = assignment.store_url or settings.store_url.get_secret_value()
    service = Service(settings, store_url, logger, is_first=assignment.number == 1)
    owners = Owners(assignment.store_url, logger.warning) if assignment.store_url else None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(SUPERVISOR_DIED, stop.requested.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=assignment.link))
    reporter = Reporter(service, writer)
    following = _follow_supervisor(reader, reporter, stop.requested, retire)
    tasks = [asyncio.ensure_future(work) for work in (reporter.run(), following)]
    try:
        grow_descriptor_table(settings)
        freeze_garbage_collection()
        if assignment.is_successor and (refusal := await _refusal(service, stop.requested)):
            writer.write(json.dumps({"refusal": refusal}).encode() + b"\n")
            return ExitCode.CANNOT_START
        if owners:
            owners.register(service.store.token_prefix)
        await service.start([socket.socket(fileno=one) for one in assignment.listeners], is_one_of_several=True)
        writer.write(b'{"serving": true}\n')
        await _wait_for_first(stop.requested.wait(), retire.wait())
        # Retired, it serves open connections to their end, however long that takes; a stop signal ends this.
        if retire.is_set():
            await _wait_for_first(stop.requested.wait(), service.retire())
        drained = await service.drain(stop.immediate)
        logger.debug("worker stopped", cut_off=service.cut_off)
        if owners and drained:
            owners.unregister()
        return ExitCode.OK if drained else ExitCode.CUT_OFF
    finally:
        await service.close()
        for task in tasks:
            task.cancel()
        # The last report carries the final counters, and what the drain cut off.
        reporter.send()
        await _flush(writer)
        block_signals(SUPERVISOR_DIED)


async def _refusal(service: Service, stop: asyncio.Event) -> list[str]:
    """Return why a successor must not serve. Its predecessor goes on then; both would share the connections."""
    reasons = await unless(stop, service.connect(READY_TIMEOUT_S))
    return ["it was asked to stop"] if reasons is None else list(reasons)


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
            elif command == b"drain":
                reporter.begin_drain()
    stop.set()


class Reporter:
    """Reports this worker's counters and readiness to the supervisor."""

    def __init__(self, service: Service, writer: asyncio.StreamWriter) -> None:
        self._service, self._writer = service, writer

    def begin_drain(self) -> None:
        """Let the worker's clients move on; it serves until a stop signal."""
        self._service.begin_drain()

    def send(self, request: int = 0) -> None:
        """Send a report; `request` is the number of the supervisor's request that it answers."""
        service = self._service
        report = service.metrics.snapshot() | {
            "request": request,
            "not_ready_reasons": service.not_ready_reasons(),
            "notices": service.notices(),
            "cut_off": service.cut_off,
            "files": service.reload.files,
        }
        if not self._writer.is_closing():
            self._writer.write(json.dumps(report).encode() + b"\n")

    async def run(self) -> None:
        """Send a report every REPORT_INTERVAL_S, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self.send()
