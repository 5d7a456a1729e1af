"""The admin listener: where it listens, and how long a connection lasts."""

import asyncio
import socket
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from oncegate.admin.app import admin_app
from oncegate.admin.parts import AdminParts
from oncegate.settings.addresses import Address

# The most that a connection takes, from its beginning to the end of its one response. The least is half of it.
CONNECTION_S = 30.0
# How long a scrape that is under way at the end may still take.
SHUTDOWN_S = 0.05


def both_families(address: Address) -> socket.socket:
    """Return a socket that listens on every address of this machine, of IPv6 and of IPv4. Raises OSError."""
    place = (address.host, address.port)
    return socket.create_server(place, family=socket.AF_INET6, dualstack_ipv6=socket.has_dualstack_ipv6())


async def serve_admin(parts: AdminParts) -> web.AppRunner:
    """Open the admin listener; the caller cleans the runner up. Raises OSError where the port is taken."""
    address = parts.settings.admin_listen
    app = admin_app(parts)
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
