"""The admin listener: /metrics, /healthz and /readyz, never on the public port."""

import json
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from oncegate.settings.addresses import Address

# How long a scrape that is under way at the end may still take.
SHUTDOWN_S = 0.05

MetricsText = Callable[[], Awaitable[bytes]]
Reasons = Callable[[], Awaitable[list[str]]]


def admin_app(metrics: MetricsText, not_ready_reasons: Reasons, notices: Reasons) -> web.Application:
    """Return the admin application.

    `metrics` returns the text of a scrape. `not_ready_reasons` returns why the proxy is not ready, an empty
    list if it is. `notices` returns what an operator should look at although it is ready.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=await metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        # The event loop runs. Nothing else counts here, because a restart does not repair a store that is down.
        return web.json_response({"alive": True})

    async def readyz(_: web.Request) -> web.Response:
        reasons = await not_ready_reasons()
        content = {"ready": not reasons, "reasons": [*reasons, *await notices()]}
        # A load balancer reads the status alone; the reasons are for people.
        return web.json_response(content, status=503 if reasons else 200, dumps=json.dumps)

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


async def serve_admin(
    address: Address, metrics: MetricsText, not_ready_reasons: Reasons, notices: Reasons
) -> web.AppRunner:
    """Open the admin listener; the caller cleans the runner up. Raises OSError where the port is taken."""
    runner = web.AppRunner(admin_app(metrics, not_ready_reasons, notices), access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    await web.TCPSite(runner, address.host, address.port).start()
    return runner
