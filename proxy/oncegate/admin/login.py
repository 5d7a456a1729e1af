"""To log in with a token, and out."""

import re
from typing import Any

from aiohttp import web

from oncegate.admin.access import Access
from oncegate.admin.gate import read_form
from oncegate.admin.origins import check_page, check_target, is_secure, peer
from oncegate.admin.roles import NOBODY, Refused, Role, Route, Visitor
from oncegate.admin.templates import page

# A form with a token and a path.
MOST_BYTES = 4096
# Where a login may lead: to a page of ours, never to another host.
_OUR_PAGE = re.compile(r"(?:/[A-Za-z0-9_.~-]+)+")
_NO_TOKENS = "Nobody can log in: set ONCEGATE_ADMIN_TOKENS_FILE."


def login_routes(access: Access, log: Any) -> list[Route]:
    """Return the routes of the login form and of the logout."""

    async def show(request: web.Request, _visitor: Visitor) -> web.Response:
        check_target(request)
        check_page(request)
        if not access.tokens:
            raise Refused(403, _NO_TOKENS)
        return _form(request.query.get("next", "/"))

    async def log_in(request: web.Request, _visitor: Visitor) -> web.Response:
        check_target(request)
        check_page(request)
        if not access.tokens:
            raise Refused(403, _NO_TOKENS)
        form = await read_form(request.clone(client_max_size=MOST_BYTES))
        following = str(form.get("next", "/"))
        try:
            token = await access.token(request, str(form.get("token", "")).strip())
        except Refused as refused:
            return _form(following, refused.reason)
        response = _see(following)
        access.sessions.begin(response, token, secure=is_secure(request))
        log.info("admin login", user=token.name, role=token.role.name.lower(), client=str(peer(request)))
        return response

    async def log_out(request: web.Request, visitor: Visitor) -> web.Response:
        response = _see("/login" if access.tokens else "/")
        if session := access.sessions.find(request, access.tokens):
            access.sessions.end(session, response)
            log.info("admin logout", user=visitor.name, client=str(peer(request)))
        return response

    return [
        Route("GET", "/login", Role.OPEN, show),
        Route("POST", "/login", Role.OPEN, log_in),
        Route("POST", "/logout", Role.VIEW, log_out),
    ]


def _form(following: str, problem: str = "") -> web.Response:
    return page(NOBODY, "login.html", 401 if problem else 200, following=_ours(following), problem=problem)


def _see(path: str) -> web.Response:
    return web.Response(status=303, headers={"Location": _ours(path)})


def _ours(path: str) -> str:
    return path if _OUR_PAGE.fullmatch(path) and path != "/logout" else "/"
