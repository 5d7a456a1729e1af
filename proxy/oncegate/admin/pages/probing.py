"""Asks the API about an unknown key, where its rule says how: the key's next step, at once."""

import asyncio
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from oncegate.admin.pages.frame import HOST, show
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.watching.overview import Overview
from oncegate.observe.logs import AUDIT
from oncegate.observe.reconciling_log import ACTION
from oncegate.operating.decisions import Desk, Operator
from oncegate.operating.errors import OperatorError
from oncegate.operating.opened_store import opened_store
from oncegate.operating.probing import Probed, probe
from oncegate.settings.errors import SettingsError
from oncegate.store.record_name import parse_record_id, record_id


def probing_routes(parts: AdminParts, overview: Overview) -> list[Route]:
    """Return the route of the button on a key's page."""

    async def ask(request: web.Request, visitor: Visitor) -> web.Response:
        digest = parse_record_id(request.match_info["id"])
        if digest is None:
            raise web.HTTPNotFound
        values: dict[str, Any] = {"id": record_id(digest), "error": "", "text": "", "facts": []}
        try:
            probed = await _probe(parts, digest, Operator(visitor.name, HOST))
            values |= {"text": probed.text, "facts": list(_shown(probed.facts))}
        except (OperatorError, SettingsError) as failed:
            values["error"] = f"{failed}. Nothing was changed"
        # The count of keys to decide may be another one.
        overview.forget()
        await overview.look()
        return show(overview, visitor, "key", "probed.html", **values)

    return [Route("POST", "/key/{id}/probe", Role.OPERATE, ask)]


async def _probe(parts: AdminParts, digest: bytes, operator: Operator) -> Probed:
    """Take the key's next step, and write who did. Raises OperatorError, SettingsError."""
    facts: dict[str, Any] = {"outcome": "unconfirmed", "key_id": record_id(digest)}
    # A store of its own: the audit trail in PostgreSQL names who opened it.
    async with opened_store(parts.settings, str(operator)) as store:
        record = await store.records.read(digest)
        if record is None:
            raise OperatorError("there is no record of this key")
        try:
            probed = await probe(Desk(parts.settings, parts.rules(), store, operator), record)
        except asyncio.CancelledError:
            # The listener ends. The store may carry it out all the same.
            parts.log.warning(AUDIT, action=ACTION, **facts, user=operator.user, host=operator.host)
            raise
    if probed.report is not None:
        parts.reconciling.count(probed.report)
        parts.log.warning(AUDIT, action=ACTION, **probed.facts, user=operator.user, host=operator.host)
    return probed


def _shown(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what an answer said, as people read it."""
    for name in ("verdict", "status", "reason", "body_digest"):
        if name in facts:
            yield name.replace("_", " "), facts[name]
    yield from facts.get("values", {}).items()
