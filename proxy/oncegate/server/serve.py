"""`oncegate serve`: one process or several workers, with the embedded store beside them."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from oncegate.server import early_signals
from oncegate.server.control import DrainProgress, controlled, drain_progress
from oncegate.server.embedded import EmbeddedStore, EmbeddedStoreError
from oncegate.server.owners import Owners
from oncegate.server.signals import ExitCode, block_signals, stop_events
from oncegate.server.slots import Slot, open_slots
from oncegate.server.supervisor import Supervisor
from oncegate.server.systemd import Systemd
from oncegate.server.tuning import (
    freeze_garbage_collection,
    grow_descriptor_table,
    open_standard_files,
    raise_open_file_limit,
)
from oncegate.service.service import Service, Unsupported
from oncegate.settings.errors import SettingsError
from oncegate.settings.settings import Settings


def serve(settings: Settings, logger: Any) -> ExitCode:
    """Serve until SIGTERM or SIGINT; return the process's exit code. Blocks; main thread only."""
    early_signals.catch_signals()
    open_standard_files()
    raise_open_file_limit(settings, logger)
    embedded = None
    store_url = settings.store_url.get_secret_value()
    try:
        early_signals.raise_if_stopped()
        systemd = Systemd(os.environ, logger)
        if store_url == "embedded":
            embedded = EmbeddedStore(settings.data_dir, settings.embedded_max_bytes, logger.warning)
            embedded.start()
            logger.info("embedded store started", **embedded.facts)
            store_url = embedded.url
        elif not settings.secret.get_secret_value():
            # The embedded store is private to this user. Another one has readers of its own.
            logger.info("store without a secret", consequence="whoever reads the store can test guesses of keys")
        if settings.workers > 1:
            slots = open_slots(settings.listen, settings.workers, systemd.public)
            return uvloop.run(_supervise(settings, slots, embedded, systemd, logger))
        return uvloop.run(_serve(settings, store_url, embedded, systemd, logger))
    except early_signals.StoppedEarly:
        logger.info("stopped", cut_off=0)
        return ExitCode.OK
    except (EmbeddedStoreError, Unsupported, SettingsError, OSError) as error:
        logger.error("cannot start", reason=str(error))
        return ExitCode.CANNOT_START
    finally:
        # After the drain: until then requests in flight still settle in the store.
        if embedded is not None:
            embedded.stop()


async def _serve(
    settings: Settings, store_url: str, embedded: EmbeddedStore | None, systemd: Systemd, logger: Any
) -> ExitCode:
    """Serve in this process alone."""
    stop = stop_events()
    loop = asyncio.get_running_loop()
    # By default SIGHUP would end the process; there is no service yet that could reload.
    loop.add_signal_handler(signal.SIGHUP, logger.info, "nothing to reload")
    loop.add_signal_handler(signal.SIGUSR2, logger.warning, "no workers to replace: ONCEGATE_WORKERS is 1")
    service = Service(settings, store_url, logger)
    service.reload.announced = systemd.reloading
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    owners = Owners(embedded.url, logger.warning) if embedded else None

    async def drain() -> DrainProgress:
        if not service.drains:
            logger.info("draining")
            systemd.status("draining")
            service.begin_drain()
        return drain_progress(service.metrics.snapshot()["gauges"])

    async with _restarted_when_dead(embedded):
        try:
            if owners:
                await owners.mark_orphans()
                owners.register(service.store.token_prefix)
            grow_descriptor_table(settings)
            freeze_garbage_collection()
            async with controlled(settings, drain, logger):
                await service.start(systemd.public, systemd.admin)
                ready = not service.not_ready_reasons()
                logger.info("serving", upstream=str(settings.upstream), ready=ready, **service.listens_on)
                async with systemd.told():
                    await stop.requested.wait()
            logger.info("shutting down", grace_s=settings.drain_s)
            drained = await service.drain(stop.immediate)
            logger.info("stopped", cut_off=service.cut_off)
            if owners and drained:
                owners.unregister()
            return ExitCode.OK if drained else ExitCode.CUT_OFF
        finally:
            await service.close()
            block_signals()


async def _supervise(
    settings: Settings, slots: list[Slot], embedded: EmbeddedStore | None, systemd: Systemd, logger: Any
) -> ExitCode:
    """Serve with one worker process for each slot."""
    owners = Owners(embedded.url, logger.warning) if embedded else None
    async with _restarted_when_dead(embedded):
        try:
            if owners:
                await owners.mark_orphans()
            return await Supervisor(settings, slots, owners, systemd, logger).run()
        finally:
            block_signals()


@contextlib.asynccontextmanager
async def _restarted_when_dead(embedded: EmbeddedStore | None) -> AsyncIterator[None]:
    """Watch the embedded store, where there is one, and restart it whenever it dies inside this context."""
    watcher = asyncio.ensure_future(embedded.watch()) if embedded else None
    try:
        yield
    finally:
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
