"""The supervisor of several workers on one port: it starts, restarts, replaces and stops them.

The supervisor serves no request itself. It keeps the listening sockets open, so that connections in their queues
survive a worker. It also has the admin listener, which reports on all workers, and runs the embedded store.
"""

import asyncio
import signal
import time
from collections.abc import Coroutine
from typing import Any

from oncegate import __version__
from oncegate.admin.parts import AdminParts
from oncegate.admin.serving import serve_admin
from oncegate.downstream.certificate import listener_tls
from oncegate.observe.gauges import MERGED
from oncegate.observe.metrics import Metrics
from oncegate.rules.loading import load_rules
from oncegate.server.control import DrainProgress, controlled, drain_progress
from oncegate.server.owners import Owners
from oncegate.server.signals import ExitCode, StopEvents, stop_events
from oncegate.server.slots import Slot, Worker
from oncegate.server.systemd import Systemd
from oncegate.service.readiness import ReadinessLog
from oncegate.service.reload import Reload, TakeOver
from oncegate.settings.settings import Settings

# A successor that does not serve within this time is killed, and its predecessor stays.
START_TIMEOUT_S = 30.0
# A worker that exceeds its drain by this time is killed.
OVERTIME_S = 5.0
FILES_DIFFER = "the workers have read different versions of a file; SIGHUP makes them read it again"


class Supervisor:
    """The workers of one service, one for each slot. `owners`: of claims in the embedded store, where there is one."""

    def __init__(
        self, settings: Settings, slots: list[Slot], owners: Owners | None, systemd: Systemd, logger: Any
    ) -> None:
        self._settings, self._slots, self._owners, self._log = settings, slots, owners, logger
        self._systemd = systemd
        self._workers: set[Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_serving = self._is_replacing = self._is_draining = False
        # Whether no worker had to cut anything off so far.
        self._all_drained = True
        self._cut_off = 0
        # The counters of workers that exited: the service's counters never go back.
        self._ended = Metrics(__version__, {})
        self._started_at = time.time()
        # Those that the workers were last told to read.
        self._rules = load_rules(settings)
        self._reload = Reload(settings, (self._tell_workers,), logger)
        self._reload.announced = systemd.reloading

    async def run(self) -> ExitCode:
        """Serve until SIGTERM or SIGINT; return the exit code, which covers all workers that ever ran."""
        stop = stop_events()
        admin = await serve_admin(self._admin_parts(), self._systemd.admin)
        self._reload.add(admin.prepare)
        try:
            self._handle_signals()
            async with controlled(self._settings, self._begin_drain, self._log):
                self._is_serving = not stop.requested.is_set() and await self._start(stop)
                if not self._is_serving and not stop.requested.is_set():
                    return await self._explain_failed_start()
                if self._is_serving:
                    await self._log_serving(str(admin.address))
                    async with self._systemd.told(), ReadinessLog(self._reported_reasons, self._log).looking():
                        await stop.requested.wait()
            await self._stop(stop)
            return ExitCode.OK if self._all_drained else ExitCode.CUT_OFF
        finally:
            for worker in list(self._workers):
                worker.signal(signal.SIGKILL)
            await asyncio.gather(*self._tasks)
            await admin.close()

    def _run_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Starting ...

    async def _start(self, stop: StopEvents) -> bool:
        """Start all workers; return False if one cannot start, or if a stop is requested meanwhile."""
        workers = [self._spawn(slot) for slot in self._slots]
        stopped = asyncio.ensure_future(stop.requested.wait())
        for worker in workers:
            serving = asyncio.ensure_future(worker.wait_until_serving())
            await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not serving.done() or not serving.result():
                serving.cancel()
                break
        stopped.cancel()
        return not stop.requested.is_set() and all(worker.is_serving and not worker.exited.done() for worker in workers)

    async def _explain_failed_start(self) -> ExitCode:
        """Log which worker ended before all served, and return the exit code. A killed one may start another time."""
        exits = {slot.worker.exited: slot.number for slot in self._slots if slot.worker is not None}
        ended, _ = await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)
        statuses = {exits[exit_]: exit_.result() for exit_ in ended}
        for number, status in statuses.items():
            reason = f"worker {number} ended with status {status} before all workers served"
            self._log.error("cannot start", reason=reason)
        return ExitCode.CUT_OFF if max(statuses.values()) < 0 else ExitCode.CANNOT_START

    async def _log_serving(self, admin: str) -> None:
        """Log the addresses in use: the system may have chosen the ports."""
        host, port = self._slots[0].sockets[0].getsockname()[:2]
        listens_on = {"public": f"{host}:{port}", "admin": admin}
        ready = not await self._not_ready_reasons()
        facts = {"upstream": str(self._settings.upstream), "workers": len(self._slots)}
        self._log.info("serving", ready=ready, **facts, **listens_on)

    def _spawn(self, slot: Slot) -> Worker:
        worker = Worker(slot, self._owners.url if self._owners else "", is_successor=slot.worker is not None)
        # A successor takes the slot only once it serves.
        slot.worker = slot.worker or worker
        self._workers.add(worker)
        if self._is_draining:
            worker.begin_drain()
        self._run_task(self._watch(worker))
        self._log.info("worker started", worker=slot.number, pid=worker.pid)
        return worker

    async def _watch(self, worker: Worker) -> None:
        """Wait until a worker exits; start another if the slot is still its own."""
        status = await worker.exited
        self._workers.discard(worker)
        self._account(worker, status)
        # While everything stops, the next start finds what is left: a store that hangs must not delay the end.
        if self._owners and self._is_serving and status != ExitCode.OK:
            self._run_task(self._owners.mark_orphans())
        slot = worker.slot
        facts = {"worker": slot.number, "pid": worker.pid, "exit_status": status}
        if not self._is_serving or slot.worker is not worker:
            # A drain and a refusal end in other exit codes than 0, too.
            if status < 0 or not (worker.is_serving or worker.refusal or status == ExitCode.OK):
                self._log.error("worker died", **facts)
            return
        slot.delay_restart(time.monotonic() - worker.started_at)
        self._log.error("worker died", **facts, restart_delay_s=slot.restart_delay_s)
        await asyncio.sleep(slot.restart_delay_s)
        # A successor that is about to serve takes the slot: a third worker would be in no slot.
        async with slot.changing:
            if self._is_serving and slot.worker is worker:
                slot.worker = None
                self._ended.restarted()
                self._spawn(slot)

    def _account(self, worker: Worker, status: int) -> None:
        """Add what an exited worker counted, and note whether it cut anything off."""
        self._ended.merge(worker.report["counts"])
        self._cut_off += worker.report["cut_off"]
        # A worker that never served had nothing in flight.
        if worker.is_serving and status != ExitCode.OK:
            self._all_drained = False

    # Signals ...

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR2, self._start_replacing)

    def _tell_workers(self, settings: Settings) -> TakeOver:
        """Check what the workers are about to read: a mistake is logged once then, and no worker follows it."""
        rules = load_rules(settings)
        listener_tls(settings)

        def tell() -> None:
            self._rules = rules
            for worker in self._workers:
                worker.reload()

        return tell

    def _start_replacing(self) -> None:
        if self._is_replacing or self._is_draining or not self._is_serving:
            reason = "a start, a replacement, a drain or a shutdown is in progress"
            self._log.warning("workers not replaced", reason=reason)
            return
        self._is_replacing = True
        self._run_task(self._replace_all())

    async def _replace_all(self) -> None:
        """Replace the workers one after the other. The first successor that is not ready ends it."""
        replaced: list[int] = []
        try:
            for slot in self._slots:
                reason = await self._replace(slot)
                if not self._is_serving:
                    return
                if reason:
                    reason = f"the successor of worker {slot.number} {reason}"
                    self._log.error("workers not replaced", reason=reason, replaced=replaced)
                    return
                replaced.append(slot.number)
            self._log.info("workers replaced")
        finally:
            self._is_replacing = False

    async def _replace(self, slot: Slot) -> str:
        """Start a successor and retire the present worker once it serves; return what kept it from that, or nothing."""
        async with slot.changing:
            successor = self._spawn(slot)
            try:
                await asyncio.wait_for(successor.wait_until_serving(), START_TIMEOUT_S)
            except TimeoutError:
                successor.signal(signal.SIGKILL)
                return "did not start in time"
            if not successor.is_serving or successor.exited.done():
                return f"is not ready: {'; '.join(successor.refusal)}" if successor.refusal else "did not start"
            # The predecessor may have died meanwhile, and found its slot being changed.
            predecessor, slot.worker = slot.worker, successor
        if predecessor is not None:
            predecessor.retire()
        return ""

    # Stopping ...

    async def _begin_drain(self) -> DrainProgress:
        """Let the clients of all workers move on, and return how far that is. The workers serve until `_stop`."""
        if not self._is_draining:
            self._is_draining = True
            self._log.info("draining")
            self._systemd.status("draining")
            for worker in self._workers:
                worker.begin_drain()
        await asyncio.gather(*(worker.refresh() for worker in self._workers))
        return drain_progress(*(worker.report["gauges"] for worker in self._workers))

    async def _stop(self, stop: StopEvents) -> None:
        """Stop all workers; kill those that exceed their grace by OVERTIME_S."""
        self._is_serving = False
        self._reload.end()
        self._log.info("shutting down", grace_s=self._settings.drain_s)
        for slot in self._slots:
            slot.close()
        self._signal_all(signal.SIGTERM)
        grace_s = self._settings.drain_delay_s + self._settings.drain_s + OVERTIME_S
        forwarding = asyncio.ensure_future(self._forward_immediate(stop))
        late: set[asyncio.Task[int]] = set()
        # All of them may be dead, and wait for their restart.
        if exits := [worker.exited for worker in self._workers]:
            _, late = await asyncio.wait(exits, timeout=grace_s)
        forwarding.cancel()
        if late:
            self._log.error("workers did not end", workers=[worker.slot.number for worker in self._workers])
            self._signal_all(signal.SIGKILL)
        await asyncio.gather(*self._tasks)
        self._log.info("stopped", cut_off=self._cut_off)

    async def _forward_immediate(self, stop: StopEvents) -> None:
        """Send the workers their second SIGTERM once this process has its own."""
        await stop.immediate.wait()
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for worker in list(self._workers):
            worker.signal(number)

    # Responses of the admin listener ...

    def _admin_parts(self) -> AdminParts:
        return AdminParts(
            settings=self._settings,
            store_url=self._owners.url if self._owners else self._settings.store_url.get_secret_value(),
            log=self._log,
            metrics=self._metrics,
            not_ready_reasons=self._not_ready_reasons,
            notices=self._notices,
            rules=lambda: self._rules,
            reconciling=self._ended.reconciling,
        )

    async def _metrics(self) -> Metrics:
        """Return the metrics of all workers together, exited ones included."""
        await asyncio.gather(*(worker.refresh() for worker in self._workers))
        # Copied after the reports came: workers that exited meanwhile are in `_ended` already.
        workers = list(self._workers)
        gauges = [worker.report["gauges"] for worker in workers if worker.is_serving]
        # It may have refused what no worker was told to read.
        gauges.append({"config_last_reload_failure_timestamp_seconds": self._reload.failed_s})
        names = dict.fromkeys(name for values in gauges for name in values)
        merged = {name: MERGED.get(name, sum)([one[name] for one in gauges if name in one]) for name in names}
        # The counts began with this process, whichever workers are left.
        merged["start_time_seconds"] = self._started_at
        total = Metrics(__version__, {name: _constant(value) for name, value in merged.items()})
        for counts in (self._ended.snapshot()["counts"], *(worker.report["counts"] for worker in workers)):
            total.merge(counts)
        return total

    async def _not_ready_reasons(self) -> list[str]:
        """Return why this service should get no traffic now; empty only if every worker is ready."""
        if not self._is_serving:
            return ["the proxy is starting or shutting down"]
        of_workers = await asyncio.gather(*(slot.not_ready_reasons() for slot in self._slots))
        return list(dict.fromkeys(reason for reasons in of_workers for reason in reasons))

    def _reported_reasons(self) -> list[str] | None:
        """Return the same as the workers' last reports have it; None while no new clients are to come anyway."""
        return None if self._is_draining else [*{one: 0 for slot in self._slots for one in slot.reported_reasons}]

    async def _notices(self) -> list[str]:
        """Return what an operator should look at, from the workers' last reports."""
        reports = [slot.worker.report for slot in self._slots if slot.worker is not None]
        notices = dict.fromkeys(str(notice) for report in reports for notice in report.get("notices", ()))
        # A worker that is starting has sent no report yet.
        if len({str(report["files"]) for report in reports if "files" in report}) > 1:
            notices[FILES_DIFFER] = None
        return list(notices)


def _constant(value: float) -> Any:
    return lambda: value
