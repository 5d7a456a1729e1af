"""The admin listener: /metrics, /healthz and /readyz, never on the public port."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from prometheus_client import CONTENT_TYPE_LATEST

from oncegate.settings.addresses import Address

# The most that a connection takes, from its beginning to the end of its one response. The least is half of it.
CONNECTION_S = 30.0
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

    async def close_after(_: web.Request, response: web.StreamResponse) -> None:
        response.force_close()
        # aiohttp has written its own field by now.
        response.headers["Connection"] = "close"

    app = web.Application()
    app.on_response_prepare.append(close_after)
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


def both_families(address: Address) -> socket.socket:
    """Return a socket that listens on every address of this machine, of IPv6 and of IPv4. Raises OSError."""
    place = (address.host, address.port)
    return socket.create_server(place, family=socket.AF_INET6, dualstack_ipv6=socket.has_dualstack_ipv6())


async def serve_admin(
    address: Address, metrics: MetricsText, not_ready_reasons: Reasons, notices: Reasons
) -> web.AppRunner:
    """Open the admin listener; the caller cleans the runner up. Raises OSError where the port is taken."""
    app = admin_app(metrics, not_ready_reasons, notices)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)

    async def limit_connections(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(_end_slow_connections(runner))
        yield
        task.cancel()

    app.cleanup_ctx.append(limit_connections)
    await runner.setup()
    if address.host == "::":
        await web.SockSite(runner, both_families(address)).start()
    else:
        await web.TCPSite(runner, address.host, address.port).start()
    return runner


async def _end_slow_connections(runner: web.AppRunner) -> None:
    """Cut off the connections that were open at the last look and still are, until cancelled.

    aiohttp itself waits without an end for a client that takes nothing of its response.
    """
    seen: set[RequestHandler] = set()
    while True:
        await asyncio.sleep(CONNECTION_S / 2)
        open_now = runner.server.connections if runner.server else []
        for late in seen.intersection(open_now):
            if late.transport is not None:
                late.transport.abort()
        seen = set(open_now)
