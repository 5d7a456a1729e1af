"""The admin listener: /metrics, /healthz, /readyz. Never on the public port."""

import json
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from oncegate.settings.addresses import Address

CANCEL_S = 0.05  # for a scrape that is under way at the end

Metrics = Callable[[], Awaitable[bytes]]
Problems = Callable[[], Awaitable[list[str]]]


def admin_app(metrics: Metrics, problems: Problems, notices: Problems) -> web.Application:
    """Return the admin application. `problems` tells why the proxy is not ready, nothing where it is.

    `notices`: what an operator should look at although it is.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=await metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def readyz(_: web.Request) -> web.Response:
        found = await problems()
        said = {"ready": not found, "reasons": [*found, *await notices()]}
        return web.json_response(said, status=503 if found else 200, dumps=json.dumps)

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


async def serve_admin(address: Address, metrics: Metrics, problems: Problems, notices: Problems) -> web.AppRunner:
    """Listen for the operator; the caller cleans up. Raises OSError where the port is taken."""
    runner = web.AppRunner(admin_app(metrics, problems, notices), access_log=None, shutdown_timeout=CANCEL_S)
    await runner.setup()
    await web.TCPSite(runner, address.host, address.port).start()
    return runner
