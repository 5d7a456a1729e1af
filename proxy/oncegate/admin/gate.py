"""Lets a request to a route of the admin listener, or not: each route names the role that it needs."""

import hmac
from collections.abc import Awaitable, Callable
from html import escape
from typing import Any
from urllib.parse import quote

from aiohttp import web

from oncegate.admin.access import Access
from oncegate.admin.origins import check_page, check_target, is_link
from oncegate.admin.roles import NOBODY, Refused, Role, Route, Visitor, Way

FORM_TOKEN = "form_token"
FORM_TYPE = "application/x-www-form-urlencoded"


class Again(Exception):
    """A browser may have a session that it did not send."""


def guarded(route: Route, access: Access) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return the handler of a route for those who may use it. Others get a refusal."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            visitor = NOBODY if route.role is Role.OPEN else await _admitted(request, route, access)
            return await route.handler(request, visitor)
        except Refused as refused:
            return _refusal(request, refused)
        except Again:
            return _again(request)
        except web.HTTPException:
            raise
        except Exception as error:
            access.log.error("admin request failed", route=route.path, exc_info=error)
            return web.Response(text="This is a defect of oncegate; the log has more.\n", status=500)

    return handle


async def _admitted(request: web.Request, route: Route, access: Access) -> Visitor:
    """Return who asks. Raises Refused."""
    check_target(request)
    check_page(request)
    if access.tokens and is_link(request) and not access.sessions.find(request, access.tokens):
        raise Again
    visitor = await access.visitor(request)
    if visitor.role < route.role:
        raise Refused(403, f"This needs the role {route.role.name.lower()}; you have {visitor.role.name.lower()}.")
    # No browser sends a bearer token by itself.
    if request.method not in ("GET", "HEAD") and visitor.way is not Way.BEARER:
        await _check_form(request, visitor)
    return visitor


async def _check_form(request: web.Request, visitor: Visitor) -> None:
    """Raise Refused unless a form of this visitor's own page sent the request."""
    given = (await read_form(request)).getall(FORM_TOKEN, [])
    if len(given) != 1 or not hmac.compare_digest(str(given[0]).encode(), visitor.form_token.encode()):
        raise Refused(403, "The form is too old, or not of this page; load the page again.")


async def read_form(request: web.BaseRequest) -> Any:
    """Return the fields of a form, as `request.post()` does. Raises Refused for what is none."""
    if request.content_type != FORM_TYPE:
        raise Refused(415, f"A form is sent as {FORM_TYPE}.")
    try:
        return await request.post()
    except (LookupError, ValueError):
        raise Refused(400, "The form is not written in the characters that it names.") from None


def _again(request: web.Request) -> web.Response:
    """Let a browser ask again, from a page of ours: it keeps the cookie of a session from links of other sites."""
    place = escape(request.path_qs)
    text = f'<!DOCTYPE html>\n<title>oncegate</title>\n<meta http-equiv="refresh" content="0; url={place}">\n'
    return web.Response(text=text, content_type="text/html")


def _refusal(request: web.Request, refused: Refused) -> web.Response:
    if refused.status == 401:
        if request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
            return web.Response(status=303, headers={"Location": f"/login?next={quote(request.path, safe='')}"})
        return web.Response(text=f"{refused.reason}\n", status=401, headers={"WWW-Authenticate": "Bearer"})
    return web.Response(text=f"{refused.reason}\n", status=refused.status)
