"""The keys that a person may have to decide, the oldest first."""

from urllib.parse import urlencode

from aiohttp import web

from oncegate.admin.pages.frame import show
from oncegate.admin.pages.rows import read_filter, row_of, rule_names, rules_of
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.watching.overview import Overview
from oncegate.operating.errors import OperatorError
from oncegate.operating.record_facts import Progresses, progress_of
from oncegate.operating.worklist import Filter, worklist
from oncegate.store.open_keys.places import OpenPage

SHOWN = 50


def unknown_routes(parts: AdminParts, overview: Overview) -> list[Route]:
    """Return the route of the page."""

    async def unknown(request: web.Request, visitor: Visitor) -> web.Response:
        wanted, after = read_filter(request.query), request.query.get("after", "")
        found, progresses, error = OpenPage([]), Progresses(), ""
        await overview.look()
        try:
            async with overview.store.opened() as store:
                found = await worklist(store, wanted, SHOWN, after)
                progresses = await progress_of(store, rules_of(parts), found.records)
        except OperatorError as failed:
            error = f"{failed}. Load the page again when the store answers"
        except ValueError:
            error = "This place is not in the list; begin with its first page"
        return show(
            overview,
            visitor,
            "unknown",
            wanted=wanted,
            rules=rule_names(parts),
            records=[row_of(record, progresses.get(record.key)) for record in found.records],
            has_probes=bool(progresses),
            next=_next(wanted, found.after),
            error=error,
        )

    return [Route("GET", "/unknown", Role.VIEW, unknown)]


def _next(wanted: Filter, after: str) -> str:
    query = {"text": wanted.text, "rule": wanted.rule, "status": wanted.status, "after": after}
    return f"/unknown?{urlencode({name: value for name, value in query.items() if value})}" if after else ""
