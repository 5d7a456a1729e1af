"""Decisions about keys: first a review of what would happen, then the decision about exactly what was shown."""

import asyncio
import binascii
from base64 import b64decode
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiohttp import web

from oncegate.admin.pages.frame import HOST, field, show
from oncegate.admin.pages.rows import read_filter, row_of
from oncegate.admin.pages.signing import Answer, Draft, Signer
from oncegate.admin.pages.signing import read_seen as read_seen_text
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.watching.overview import Overview
from oncegate.observe.logs import AUDIT
from oncegate.observe.reconciling import By
from oncegate.operating.decisions import (
    DONE,
    RELEASE,
    RESOLVE,
    Decision,
    Desk,
    Operator,
    operator_response,
    warning,
)
from oncegate.operating.errors import OperatorError, usage_error
from oncegate.operating.opened_store import opened_store
from oncegate.operating.pasted import header_lines
from oncegate.operating.worklist import Seen, decide_seen, read_seen, worklist
from oncegate.reconcile.answers import GivenResponse
from oncegate.settings.errors import SettingsError
from oncegate.store.record_name import record_id
from oncegate.store.record_view import UNDECIDED, RecordView

# Keys of one decision, and how many are read at once.
MOST, AT_ONCE = 500, 50
# How long a review may read them.
READ_S = 10.0
# What stands behind an action for all keys that match.
ALL = "-all"
# Characters of a body in a review.
SHOWN = 4096
UNKNOWN_ACTION = "This form is not of a page of oncegate"


class Told(NamedTuple):
    """What is said of one key."""

    id: str
    text: str


@dataclass(slots=True)
class Decided:
    """What became of the keys of one decision. `untried`: how many were left when the store failed, and `error` why."""

    done: list[Told]
    changed: list[Told]
    error: str = ""
    untried: int = 0


def deciding_routes(parts: AdminParts, overview: Overview) -> list[Route]:
    """Return the routes of a review and of the decision behind it."""
    deciding = DecisionPages(parts, overview)
    return [
        Route("POST", "/review", Role.OPERATE, deciding.review),
        Route("POST", "/decide", Role.OPERATE, deciding.decide),
    ]


class DecisionPages:
    """Shows what a decision would do, and carries it out."""

    def __init__(self, parts: AdminParts, overview: Overview) -> None:
        self._parts, self._overview = parts, overview
        self._signer = Signer(parts.settings.secret.get_secret_value())

    # Review ...

    async def review(self, request: web.Request, visitor: Visitor) -> web.Response:
        """Show the keys that somebody chose, and what would become of them."""
        form = await request.post()
        try:
            draft, has_more = await self._draft(form, visitor)
            records, changed = await self._read(draft)
        except OperatorError as failed:
            return self._page(visitor, Draft("release", ()), status=400, error=str(failed))
        draft = draft.of(Seen.of(record) for record in records)
        values: dict[str, Any] = {"changed": changed, "has_more": has_more, "keys": [row_of(one) for one in records]}
        warnings = {text for record in records if (text := warning(draft.action, record))}
        if draft.action != RESOLVE:
            return self._page(visitor, draft, warnings=sorted(warnings), **values)
        if draft.answer is None:
            return self._page(visitor, draft, step="answer", given=Answer("200"), **values)
        try:
            shown = _shown(response_of(draft.answer))
        except OperatorError as failed:
            return self._page(visitor, draft, step="answer", given=draft.answer, error=str(failed), **values)
        return self._page(visitor, draft, given=shown, warnings=sorted(warnings), **values)

    def _page(self, visitor: Visitor, draft: Draft, **values: Any) -> web.Response:
        defaults = {"keys": [], "changed": [], "has_more": False, "error": "", "step": "", "warnings": [], "given": {}}
        signed = self._signer.sign(draft, visitor.name)
        chosen = {**defaults, "signed": signed, "action": draft.action, **values}
        return show(self._overview, visitor, "unknown", "review.html", **chosen)

    async def _draft(self, form: Any, visitor: Visitor) -> tuple[Draft, bool]:
        """Return what somebody is about to decide, and whether more keys match. Raises OperatorError."""
        if signed := field(form, "signed"):
            draft = self._signer.read(signed, visitor.name)
            return (draft.with_answer(_answer(form)) if "status" in form else draft), False
        action, is_all, _ = field(form, "action").partition(ALL)
        if action not in DONE:
            raise usage_error(UNKNOWN_ACTION)
        if not is_all:
            seen = tuple(read_seen_text(text) for text in form.getall("key", ()) if isinstance(text, str))
            if not seen:
                raise usage_error("No key was chosen")
            return Draft(action, seen[:MOST]), len(seen) > MOST
        async with self._overview.store.opened(READ_S) as store:
            found = await worklist(store, read_filter(form), MOST)
        return Draft(action, tuple(map(Seen.of, found.records))), bool(found.after)

    async def _read(self, draft: Draft) -> tuple[list[RecordView], list[Told]]:
        """Return the records that are still as somebody saw them, and what has changed. Raises OperatorError."""
        found: list[RecordView | str] = []
        async with self._overview.store.opened(READ_S) as store:
            for first in range(0, len(draft.seen), AT_ONCE):
                asked = draft.seen[first : first + AT_ONCE]
                found += await asyncio.gather(*(read_seen(store, draft.action, one) for one in asked))
        by_key = list(zip(draft.seen, found, strict=True))
        changed = [Told(record_id(seen.key), one) for seen, one in by_key if isinstance(one, str)]
        return [one for one in found if not isinstance(one, str)], changed

    # Decide ...

    async def decide(self, request: web.Request, visitor: Visitor) -> web.Response:
        """Carry out what a review has shown."""
        form = await request.post()
        try:
            draft = self._signer.read(field(form, "signed"), visitor.name)
            given = response_of(draft.answer) if draft.answer is not None else None
            if not draft.is_whole:
                raise usage_error(UNKNOWN_ACTION)
        except OperatorError as failed:
            return self._page(visitor, Draft(RELEASE, ()), status=400, error=str(failed))
        decided = await self.carry_out(draft, given, Operator(visitor.name, HOST))
        # The count of keys to decide is another one.
        self._overview.forget()
        await self._overview.look()
        return show(
            self._overview,
            visitor,
            "unknown",
            "decided.html",
            action=draft.action,
            was=DONE[draft.action],
            done=decided.done,
            changed=decided.changed,
            error=decided.error,
            untried=decided.untried,
        )

    async def carry_out(self, draft: Draft, given: GivenResponse | None, operator: Operator) -> Decided:
        """Decide about the keys of a draft, one after the other; what becomes of each is in the log."""
        decided, left = Decided([], []), list(draft.seen)
        try:
            # A store of its own: the audit trail in PostgreSQL names who opened it.
            async with opened_store(self._parts.settings, str(operator)) as store:
                desk = Desk(self._parts.settings, self._parts.rules(), store, operator)
                while left:
                    seen = left[0]
                    try:
                        result = await decide_seen(desk, draft.action, seen, given)
                    except asyncio.CancelledError:
                        # The listener ends. The store may carry it out all the same.
                        self._audit(operator, draft.action, seen, "unconfirmed")
                        raise
                    left.pop(0)
                    self._audit(operator, draft.action, seen, result)
                    is_done = isinstance(result, Decision) and result.is_done
                    self._count(result)
                    text = result.text if isinstance(result, Decision) else result
                    (decided.done if is_done else decided.changed).append(Told(record_id(seen.key), text))
        except (OperatorError, SettingsError) as failed:
            decided.error, decided.untried = f"{failed}.", len(left)
        return decided

    def _count(self, result: Decision | str) -> None:
        """Count an unknown key that a person has settled."""
        if isinstance(result, Decision) and result.is_done and result.record.open_kind in UNDECIDED:
            age_ms = max(0, result.record.now_ms - result.record.created_ms)
            self._parts.reconciling.settled(By.OPERATOR, age_ms / 1000)

    def _audit(self, operator: Operator, action: str, seen: Seen, result: Decision | str) -> None:
        """Write who did what, and what came of it."""
        outcome = result if result == "unconfirmed" else "changed"
        seen_facts = {"outcome": outcome, "key_id": record_id(seen.key), "owner_token": seen.token.hex()}
        facts = result.facts if isinstance(result, Decision) else {**seen_facts, "reason": result}
        self._parts.log.warning(AUDIT, action=action, **facts, user=operator.user, host=operator.host)


# The response that somebody writes ...


def _answer(form: Any) -> Answer:
    return Answer(field(form, "status"), field(form, "headers"), field(form, "body"), "base64" in form)


def response_of(answer: Answer) -> GivenResponse:
    """Return the response that somebody wrote. Raises OperatorError."""
    status = answer.status.strip()
    if not (len(status) == 3 and status.isascii() and status.isdigit()):
        raise usage_error("A status has three digits")
    # A browser ends each line of a form with CR LF.
    body = answer.body.replace("\r\n", "\n").encode("utf-8", "surrogateescape")
    if answer.base64:
        try:
            body = b64decode(b"".join(body.split()), validate=True)
        except binascii.Error:
            raise usage_error("The body is not written in base64") from None
    return operator_response(int(status), header_lines(answer.headers), body)


def _shown(given: GivenResponse) -> dict[str, Any]:
    """Return a response as a review shows it."""
    stored, body = given
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = "(bytes that are no text)"
    return {
        "status": stored.status,
        "reason": stored.reason.decode("latin-1"),
        "head": stored.block.decode("utf-8", "replace"),
        "shown_body": text if len(text) <= SHOWN else f"{text[:SHOWN]} …",
        "size": len(body),
    }
