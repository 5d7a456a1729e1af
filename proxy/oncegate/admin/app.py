"""The admin application: /metrics, /healthz and /readyz for everybody, the pages for those who may see them."""

import json

from aiohttp import HttpVersion11, web

from oncegate.admin.access import Access
from oncegate.admin.gate import guarded
from oncegate.admin.login import login_routes
from oncegate.admin.pages.routes import Pages
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.templates import asset

MOST_BODY_BYTES = 1 << 20
# Of every response. A page loads its own files alone, runs in no frame, and leaves nothing behind.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Not no-referrer: a browser would send forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Server": "oncegate",
}


def admin_app(parts: AdminParts, access: Access) -> web.Application:
    """Return the admin application."""
    app = web.Application(client_max_size=MOST_BODY_BYTES)
    app.on_response_prepare.append(_finish)
    pages = Pages(parts)
    app.cleanup_ctx.append(pages.life)
    app.on_shutdown.append(pages.end_streams)
    for route in (*_open_routes(parts), *login_routes(access, parts.log), *pages.routes):
        handler = guarded(route, access)
        for method in (route.method, "HEAD") if route.method == "GET" else (route.method,):
            app.router.add_route(method, route.path, handler, expect_handler=_answer_expectation)
    return app


def _open_routes(parts: AdminParts) -> list[Route]:
    async def show_metrics(request: web.Request, _visitor: Visitor) -> web.Response:
        text, content_type = (await parts.metrics()).text(request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type})

    async def healthz(_: web.Request, _visitor: Visitor) -> web.Response:
        # The event loop runs. Nothing else counts here, because a restart does not repair a store that is down.
        return web.json_response({"alive": True})

    async def readyz(_: web.Request, _visitor: Visitor) -> web.Response:
        reasons = await parts.not_ready_reasons()
        content = {"ready": not reasons, "reasons": [*reasons, *await parts.notices()]}
        # A load balancer reads the status alone; the reasons are for people.
        return web.json_response(content, status=503 if reasons else 200, dumps=json.dumps)

    return [
        Route("GET", "/metrics", Role.OPEN, show_metrics),
        Route("GET", "/healthz", Role.OPEN, healthz),
        Route("GET", "/readyz", Role.OPEN, readyz),
        Route("GET", "/static/{name}", Role.OPEN, asset),
    ]


async def _answer_expectation(request: web.Request) -> None:
    """Let a client send its body. aiohttp itself fails for other expectations in bytes that are no text."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        raise web.HTTPExpectationFailed
    # RFC 9110, section 10.1.1: not to a client of HTTP/1.0.
    if request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Not a part of the response, which has its own head.
        request.writer.output_size = 0


async def _finish(_: web.Request, response: web.StreamResponse) -> None:
    response.force_close()
    # aiohttp has written its own fields by now.
    response.headers.update(HEADERS)
    response.headers["Connection"] = "close"
