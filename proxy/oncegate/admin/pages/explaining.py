"""The rules in effect, and what they do with one request: `oncegate check --explain` as a form."""

import re
from typing import Any

from aiohttp import web

from oncegate.admin.pages.frame import field, show
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.watching.overview import Overview
from oncegate.operating.errors import OperatorError
from oncegate.operating.explain import Explanation, rows
from oncegate.operating.pasted import header_lines
from oncegate.operating.request_identity import AskedRequest
from oncegate.settings.errors import SettingsError

# A query may have a credential.
_QUERY = re.compile(r"\?[^\s,]*")


def explaining_routes(parts: AdminParts, overview: Overview) -> list[Route]:
    """Return the routes of the page."""

    def rules_page(visitor: Visitor, status: int = 200, **values: Any) -> web.Response:
        chosen: dict[str, Any] = {"error": "", "explained": [], "asked": "", "table": []}
        try:
            chosen["table"] = rows(parts.rules())
        except SettingsError as failed:
            chosen["error"] = str(failed)
        return show(overview, visitor, "rules", status=status, **{**chosen, **values})

    async def rules(_: web.Request, visitor: Visitor) -> web.Response:
        return rules_page(visitor)

    async def explain(request: web.Request, visitor: Visitor) -> web.Response:
        form = await request.post()
        method, url = field(form, "method").strip(), field(form, "url").strip()
        body = field(form, "body").replace("\r\n", "\n").encode("utf-8", "surrogateescape")
        try:
            asked = AskedRequest(method, url, header_lines(field(form, "headers")), body)
            lines = Explanation(parts.settings, parts.rules()).explain(asked).splitlines()
        except (OperatorError, SettingsError) as failed:
            return rules_page(visitor, 400, error=str(failed))
        except ValueError:
            # Its text repeats what was written.
            return rules_page(visitor, 400, error="This is no HTTP request: write a path such as /v1/charges")
        pairs = [tuple(map(str.strip, _QUERY.sub("?…", line).partition(":")[::2])) for line in lines]
        return rules_page(visitor, explained=pairs, asked=f"{method.upper()} {_QUERY.sub('?…', url)}")

    return [Route("GET", "/rules", Role.VIEW, rules), Route("POST", "/rules", Role.VIEW, explain)]
