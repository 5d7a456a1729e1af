"""Process life: load, start, serve, drain, stop; and the embedded store beside it."""

import asyncio
import contextlib
import signal
from typing import Any

import uvloop

from proxy.app import Service, Unsupported
from proxy.server.embedded import EmbeddedStore, EmbeddedStoreError
from proxy.settings import Settings

OK, NOT_ALL, CANNOT = 0, 1, 2  # exit codes


def serve(settings: Settings, logger: Any) -> int:
    """Run until told to stop; return the exit code: 0 when nothing in flight was cut off, 1 else, 2: no start."""
    embedded = None
    store_url = settings.store_url.get_secret_value()
    try:
        if store_url == "embedded":
            embedded = EmbeddedStore(settings.data_dir, settings.embedded_max_bytes, logger.warning)
            embedded.start()
            store_url = embedded.url
        return uvloop.run(_serve(settings, store_url, embedded, logger))
    except (EmbeddedStoreError, Unsupported, OSError) as error:
        logger.error("cannot start", reason=str(error))
        return CANNOT
    finally:
        if embedded is not None:
            embedded.stop()


async def _serve(settings: Settings, store_url: str, embedded: EmbeddedStore | None, logger: Any) -> int:
    stop, hurry = _signals(logger)
    service = Service(settings, store_url, logger)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.reload)
    watcher = asyncio.ensure_future(embedded.watch()) if embedded else None
    try:
        await service.start()
        logger.info("serving", upstream=str(settings.upstream), ready=not service.problems(), **service.listens_on)
        await stop.wait()
        logger.info("shutting down", grace_s=settings.drain_s)
        whole = await service.drain(hurry)
        logger.info("stopped", cut_off=service.cut_off)
        return OK if whole else NOT_ALL
    finally:
        await service.close()
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher


def _signals(logger: Any) -> tuple[asyncio.Event, asyncio.Event]:
    """Return what the first SIGTERM or SIGINT sets, and what the second sets."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    loop.add_signal_handler(signal.SIGHUP, logger.info, "nothing to reload")  # by default it would end the process
    return stop, hurry
