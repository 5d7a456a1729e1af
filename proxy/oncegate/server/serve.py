"""Process life: load, start, serve, drain, stop; alone or as several workers; and the embedded store beside it."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from oncegate.server.embedded import EmbeddedStore, EmbeddedStoreError
from oncegate.server.signals import CANNOT, NOT_ALL, OK, told_to_stop
from oncegate.server.slots import Slot, open_slots
from oncegate.server.steady import occupy, open_up, settle_down
from oncegate.server.supervisor import Supervisor
from oncegate.service.service import Service, Unsupported
from oncegate.settings.settings import Settings


def serve(settings: Settings, logger: Any) -> int:
    """Run until told to stop; return the exit code: 0 when nothing in flight was cut off, 1 else, 2: no start."""
    occupy()
    open_up(settings, logger)
    embedded = None
    store_url = settings.store_url.get_secret_value()
    try:
        if store_url == "embedded":
            embedded = EmbeddedStore(settings.data_dir, settings.embedded_max_bytes, logger.warning)
            embedded.start()
            store_url = embedded.url
        if settings.workers > 1:
            return uvloop.run(_supervise(settings, open_slots(settings.listen, settings.workers), embedded, logger))
        return uvloop.run(_serve(settings, store_url, embedded, logger))
    except (EmbeddedStoreError, Unsupported, OSError) as error:
        logger.error("cannot start", reason=str(error))
        return CANNOT
    finally:
        if embedded is not None:
            embedded.stop()


async def _serve(settings: Settings, store_url: str, embedded: EmbeddedStore | None, logger: Any) -> int:
    stop, hurry = told_to_stop()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, logger.info, "nothing to reload")  # by default it would end the process
    loop.add_signal_handler(signal.SIGUSR2, logger.warning, "there are no workers to replace: ONCEGATE_WORKERS is 1")
    service = Service(settings, store_url, logger)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    async with _watched(embedded):
        try:
            settle_down(settings)
            await service.start()
            logger.info("serving", upstream=str(settings.upstream), ready=not service.problems(), **service.listens_on)
            await stop.wait()
            logger.info("shutting down", grace_s=settings.drain_s)
            whole = await service.drain(hurry)
            logger.info("stopped", cut_off=service.cut_off)
            return OK if whole else NOT_ALL
        finally:
            await service.close()


async def _supervise(settings: Settings, slots: list[Slot], embedded: EmbeddedStore | None, logger: Any) -> int:
    async with _watched(embedded):
        return await Supervisor(settings, slots, embedded.url if embedded else "", logger).run()


@contextlib.asynccontextmanager
async def _watched(embedded: EmbeddedStore | None) -> AsyncIterator[None]:
    """Restart the embedded store, where there is one, whenever it dies meanwhile."""
    watcher = asyncio.ensure_future(embedded.watch()) if embedded else None
    try:
        yield
    finally:
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
