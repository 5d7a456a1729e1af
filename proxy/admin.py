"""The admin listener: /metrics, /healthz, /readyz. Never on the public port."""

import json
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

Problems = Callable[[], list[str]]


def admin_app(metrics: Callable[[], bytes], problems: Problems) -> web.Application:
    """Return the admin application. `problems` tells why the proxy is not ready, nothing where it is."""

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def readyz(_: web.Request) -> web.Response:
        found = problems()
        return web.json_response({"ready": not found, "reasons": found}, status=503 if found else 200, dumps=json.dumps)

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app
