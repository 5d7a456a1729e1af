"""One worker of several: a process that serves on sockets of its supervisor's, and reports to it.

The link to the supervisor is a stream of lines. This side sends JSON: `{"up": true}` once it serves, then a report a
second and on demand. The other side sends `report` and `retire`; its end means that the supervisor is gone.
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from typing import Any

import uvloop

from oncegate.observe import logs
from oncegate.server.processes import dies_with
from oncegate.server.signals import CANNOT, NOT_ALL, OK, told_to_stop
from oncegate.server.steady import settle_down
from oncegate.service.service import Service, Unsupported
from oncegate.settings.loading import load
from oncegate.settings.settings import Settings, SettingsError

REPORT_S = 1.0  # what a worker that is killed has counted since is lost
ORPHANED = signal.SIGUSR1  # comes when the supervisor dies


def main(number: int, supervisor_pid: int, link: int, listeners: list[int], store_url: str) -> int:
    """Serve until told to stop, told to retire or left alone; return the exit code, as for a single process.

    `link` and `listeners` are descriptors; `store_url` is the embedded store's, empty where the settings name one.
    """
    # Until it serves, that signal ends it. A supervisor that is gone already is met as the end of the link.
    with contextlib.suppress(OSError):
        dies_with(supervisor_pid, ORPHANED)()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        settings = load()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return CANNOT
    logger = logs.configure(settings.log_level, settings.log_format).bind(worker=number)
    sockets = [socket.socket(fileno=one) for one in listeners]
    try:
        url = store_url or settings.store_url.get_secret_value()
        return uvloop.run(_work(settings, url, socket.socket(fileno=link), sockets, logger))
    except (Unsupported, SettingsError, OSError) as error:
        logger.error("cannot start", reason=str(error))
        return CANNOT


async def _work(
    settings: Settings, store_url: str, link: socket.socket, sockets: list[socket.socket], logger: Any
) -> int:
    stop, hurry = told_to_stop()
    service, retire = Service(settings, store_url, logger), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(ORPHANED, stop.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    reader, writer = await asyncio.open_unix_connection(sock=link)
    reporter = Reporter(service, writer)
    tasks = [asyncio.ensure_future(reporter.run()), asyncio.ensure_future(_listen(reader, reporter, stop, retire))]
    try:
        settle_down(settings)
        await service.start(sockets)
        writer.write(b'{"up": true}\n')
        await _first(stop, retire)
        if retire.is_set():
            await _first(stop, asyncio.ensure_future(service.retire()))
        whole = await service.drain(hurry)
        logger.debug("worker stopped", cut_off=service.cut_off)
        return OK if whole else NOT_ALL
    finally:
        await service.close()
        for task in tasks:
            task.cancel()
        reporter.send()
        await _flush(writer)


async def _first(*waited: "asyncio.Event | asyncio.Future[None]") -> None:
    """Return when one of them is set or done; raise what a future raised."""
    tasks = [asyncio.ensure_future(one.wait()) if isinstance(one, asyncio.Event) else one for one in waited]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


async def _flush(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), 1.0)


async def _listen(
    reader: asyncio.StreamReader, reporter: "Reporter", stop: asyncio.Event, retire: asyncio.Event
) -> None:
    """Do what the supervisor says, and stop when it is gone."""
    with contextlib.suppress(OSError):
        async for line in reader:
            word, _, number = line.partition(b" ")
            if word == b"report":
                reporter.send(int(number))
            elif line == b"retire\n":
                retire.set()
    stop.set()


class Reporter:
    """Tells the supervisor what this worker has counted and whether it is ready."""

    def __init__(self, service: Service, writer: asyncio.StreamWriter) -> None:
        self._service, self._writer = service, writer

    def send(self, asked: int = 0) -> None:
        """Send a report; `asked` is the number of the question that it answers."""
        report = self._service.metrics.snapshot()
        service = self._service
        report |= {"asked": asked, "problems": service.problems(), "notices": service.notices()}
        report["cut_off"] = service.cut_off
        if not self._writer.is_closing():
            self._writer.write(json.dumps(report).encode() + b"\n")

    async def run(self) -> None:
        """Report regularly, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_S)
            self.send()
