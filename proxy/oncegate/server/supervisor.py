"""Several workers on one port: started, restarted when they die, replaced one after the other, stopped together.

The supervisor serves no request. It keeps the listening sockets, so that what waits in their queues survives a worker;
it has the admin listener, which answers for all of them; and it runs the embedded store that they share.
"""

import asyncio
import signal
import time
from typing import Any

from oncegate import __version__
from oncegate.observe.admin import serve_admin
from oncegate.observe.metrics import MERGED, Metrics
from oncegate.server.signals import CANNOT, NOT_ALL, OK, told_to_stop
from oncegate.server.slots import Slot, Worker
from oncegate.settings.settings import Settings

FIRST_RESTART_S, LONGEST_RESTART_S = 0.05, 10.0
STEADY_S = 30.0  # a worker that lived so long is restarted as quickly as the first time
START_S = 30.0  # for a successor to serve, else its predecessor stays
OVERTIME_S = 5.0  # beyond its own grace, after which a worker that does not end is killed


class Supervisor:
    """The workers of one service."""

    def __init__(self, settings: Settings, slots: list[Slot], store_url: str, logger: Any) -> None:
        self._settings, self._slots, self._store_url, self._log = settings, slots, store_url, logger
        self._workers: set[Worker] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self._serving = self._rolling = False
        self._whole = True  # nothing that any worker had in flight was cut off
        self._cut_off = 0
        self._gone = Metrics(__version__, {})  # what workers counted that are no more

    async def run(self) -> int:
        """Serve until told to stop; return the exit code, which is true of all workers that there were."""
        stop, hurry = told_to_stop()
        admin = await serve_admin(self._settings.admin_listen, self._metrics, self._problems, self._notices)
        try:
            self._follow_signals()
            self._serving = await self._start(stop)
            if not self._serving and not stop.is_set():
                return CANNOT
            if self._serving:
                await self._say_where(*admin.addresses[0][:2])
                await stop.wait()
            await self._stop(hurry)
            return OK if self._whole else NOT_ALL
        finally:
            for worker in list(self._workers):
                worker.signal(signal.SIGKILL)
            await asyncio.gather(*self._watchers)
            await admin.cleanup()

    # Starting ...

    async def _start(self, stop: asyncio.Event) -> bool:
        """Start all; False where one cannot, or where it is told to stop meanwhile."""
        first = [self._spawn(slot) for slot in self._slots]
        told = asyncio.ensure_future(stop.wait())
        for worker in first:
            up = asyncio.ensure_future(worker.comes_up())
            await asyncio.wait([up, told], return_when=asyncio.FIRST_COMPLETED)
            if not up.done() or not up.result():
                up.cancel()
                break
        told.cancel()
        return not stop.is_set() and all(worker.is_up and not worker.ended.done() for worker in first)

    async def _say_where(self, admin_host: str, admin_port: int) -> None:
        host, port = self._slots[0].sockets[0].getsockname()[:2]
        listens = {"public": f"{host}:{port}", "admin": f"{admin_host}:{admin_port}"}
        ready = not await self._problems()
        facts = {"upstream": str(self._settings.upstream), "workers": len(self._slots)}
        self._log.info("serving", ready=ready, **facts, **listens)

    def _spawn(self, slot: Slot) -> Worker:
        worker = Worker(slot, self._store_url)
        slot.worker = slot.worker or worker
        self._workers.add(worker)
        watcher = asyncio.ensure_future(self._watch(worker))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        self._log.info("worker started", worker=slot.number, pid=worker.pid)
        return worker

    async def _watch(self, worker: Worker) -> None:
        """See a worker to its end, and put another in its place where that came too soon."""
        status = await worker.ended
        self._workers.discard(worker)
        self._remember(worker, status)
        slot = worker.slot
        if not self._serving or slot.worker is not worker:
            return
        slot.delay_s = _next_delay(slot.delay_s, time.monotonic() - worker.started_at)
        facts = {"pid": worker.pid, "exit_status": status, "restart_delay_s": slot.delay_s}
        self._log.error("worker died", worker=slot.number, **facts)
        await asyncio.sleep(slot.delay_s)
        if self._serving and slot.worker is worker:
            slot.worker = None
            self._gone.restarted()
            self._spawn(slot)

    def _remember(self, worker: Worker, status: int) -> None:
        """Keep what it counted, and whether it cut anything off; one that never served had nothing."""
        self._gone.merge(worker.report["counts"])
        self._cut_off += worker.report["cut_off"]
        if worker.is_up and status != OK:
            self._whole = False

    # Signals ...

    def _follow_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._pass_on, signal.SIGHUP)
        loop.add_signal_handler(signal.SIGUSR2, self._roll)

    def _pass_on(self, number: int) -> None:
        for worker in self._workers:
            if worker.is_up:
                worker.signal(number)

    def _roll(self) -> None:
        if self._rolling or not self._serving:
            self._log.warning("workers are not replaced", reason="they are just being started, replaced or stopped")
            return
        self._rolling = True
        task = asyncio.ensure_future(self._replace_all())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _replace_all(self) -> None:
        """Put a new worker in each place, one after the other; an old one goes once its successor serves."""
        try:
            for slot in self._slots:
                if not self._serving:
                    return
                if not await self._replace(slot):
                    self._log.error("workers are not replaced", reason=f"the successor of {slot.number} does not serve")
                    return
            self._log.info("workers replaced")
        finally:
            self._rolling = False

    async def _replace(self, slot: Slot) -> bool:
        before, successor = slot.worker, self._spawn(slot)
        try:
            serves = await asyncio.wait_for(successor.comes_up(), START_S)
        except TimeoutError:
            serves = False
        if not serves:
            successor.signal(signal.SIGKILL)
            return False
        slot.worker = successor
        if before is not None:
            before.retire()
        return True

    # Stopping ...

    async def _stop(self, hurry: asyncio.Event) -> None:
        """Tell all workers to stop, and wait for them for as long as their grace lasts."""
        self._serving = False
        self._log.info("shutting down", grace_s=self._settings.drain_s)
        for slot in self._slots:
            slot.close()
        self._tell(signal.SIGTERM)
        grace_s = self._settings.drain_delay_s + self._settings.drain_s + OVERTIME_S
        hurried = asyncio.ensure_future(self._hurry(hurry))
        _, late = await asyncio.wait([worker.ended for worker in self._workers] or [hurried], timeout=grace_s)
        hurried.cancel()
        if self._workers and late:
            self._log.error("workers do not end", workers=[one.slot.number for one in self._workers])
            self._tell(signal.SIGKILL)
        await asyncio.gather(*self._watchers)
        self._log.info("stopped", cut_off=self._cut_off)

    async def _hurry(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        self._tell(signal.SIGTERM)

    def _tell(self, number: int) -> None:
        for worker in list(self._workers):
            worker.signal(number)

    # What the admin listener answers ...

    async def _metrics(self) -> bytes:
        """Return the sum over all workers, with what the dead ones counted."""
        await asyncio.gather(*(worker.refresh() for worker in self._workers))
        workers = list(self._workers)  # those that ended meanwhile are remembered already
        gauges = [worker.report["gauges"] for worker in workers if worker.is_up]
        names = dict.fromkeys(name for one in gauges for name in one)
        merged = {name: MERGED.get(name, sum)([one[name] for one in gauges if name in one]) for name in names}
        total = Metrics(__version__, {name: _constant(value) for name, value in merged.items()})
        for counts in (self._gone.snapshot()["counts"], *(worker.report["counts"] for worker in workers)):
            total.merge(counts)
        return total.text()

    async def _problems(self) -> list[str]:
        """Return why this service should get no traffic now: all workers have to be ready."""
        if not self._serving:
            return ["the proxy is starting or shutting down"]
        found = await asyncio.gather(*(self._problems_of(slot) for slot in self._slots))
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    async def _notices(self) -> list[str]:
        """Return what the workers want looked at, as of their last reports."""
        reports = [slot.worker.report for slot in self._slots if slot.worker is not None]
        return list(dict.fromkeys(str(notice) for report in reports for notice in report.get("notices", ())))

    @staticmethod
    async def _problems_of(slot: Slot) -> list[str]:
        worker = slot.worker
        if worker is None or not worker.is_up or worker.ended.done():
            return [f"worker {slot.number} does not serve"]
        if not await worker.refresh():
            return [f"worker {slot.number} does not answer"]
        return [str(problem) for problem in worker.report["problems"]]


def _next_delay(delay_s: float, lived_s: float) -> float:
    """Return the pause before a worker that lived so long is restarted."""
    if lived_s > STEADY_S or not delay_s:
        return FIRST_RESTART_S
    return min(2 * delay_s, LONGEST_RESTART_S)


def _constant(value: float) -> Any:
    return lambda: value
