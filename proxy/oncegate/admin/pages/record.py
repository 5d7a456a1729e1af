"""One key: found by whatever an operator has of it, with all that the store knows of it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlencode

from aiohttp import web

from oncegate.admin.pages.frame import HOST, field, show
from oncegate.admin.pages.rows import row_of, rule_names, rules_of
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.watching.overview import Overview
from oncegate.keys.notes import escaped
from oncegate.observe.logs import AUDIT
from oncegate.operating.errors import OperatorError
from oncegate.operating.find_record import Finder, RecordName
from oncegate.operating.pasted import Pasted, read_pasted
from oncegate.operating.record_facts import facts_of, progress_facts, progress_of
from oncegate.operating.request_identity import AskedRequest, Keyless, identify_request
from oncegate.operating.stored_body import read_body
from oncegate.operating.trail import trail_of
from oncegate.operating.worklist import Filter, worklist
from oncegate.reconcile.progress import Progress
from oncegate.settings.errors import SettingsError
from oncegate.store.record import ViewState
from oncegate.store.record_name import parse_record_id, record_id
from oncegate.store.record_view import OpenKind, RecordView
from oncegate.store.store import Store

NOT_FOUND = (
    "No key is found by this. The beginning of an id, and an order, find only keys that are open. For a finished key, "
    "give the whole id, or say whose key it is, or paste the whole request. "
    "The command oncegate keys list --state any has all keys"
)
# Bytes of a body that a page shows.
SHOWN = 16_384
# Header fields whose values let somebody act for another.
HIDDEN = (b"set-cookie", b"set-cookie2", b"authorization", b"authentication-info", b"www-authenticate")


class Event(NamedTuple):
    """One line of a timeline. `at_ms` is 0 where nobody knows when."""

    at_ms: int
    text: str
    kind: str = ""


class Body(NamedTuple):
    """A stored body as a page shows it."""

    text: str
    note: str


def record_routes(parts: AdminParts, overview: Overview) -> list[Route]:
    """Return the routes of the pages about one key."""
    pages = KeyPages(parts, overview)
    return [
        Route("GET", "/key", Role.VIEW, pages.form),
        # A request that somebody pastes may have a credential, so it is in no URL.
        Route("POST", "/key", Role.VIEW, pages.find),
        Route("GET", "/key/{id}", Role.VIEW, pages.show),
        Route("GET", "/key/{id}/body", Role.OPERATE, pages.body),
    ]


class KeyPages:
    """The pages about one key."""

    def __init__(self, parts: AdminParts, overview: Overview) -> None:
        self._parts, self._overview = parts, overview

    # Find ...

    async def form(self, _: web.Request, visitor: Visitor) -> web.Response:
        return self._form(visitor)

    def _form(self, visitor: Visitor, error: str = "", status: int = 200) -> web.Response:
        return show(self._overview, visitor, "key", status=status, error=error, rules=rule_names(self._parts))

    async def find(self, request: web.Request, visitor: Visitor) -> web.Response:
        """Go to the page of the key that somebody pasted."""
        form = await request.post()
        try:
            place = await self._find(form)
        except (OperatorError, SettingsError) as failed:
            return self._form(visitor, f"{failed}", 404)
        except ValueError:
            # Its text repeats what was pasted.
            return self._form(visitor, "This is no HTTP request", 404)
        raise web.HTTPSeeOther(place)

    async def _find(self, form: Any) -> str:
        text, rule = field(form, "pasted"), field(form, "rule")
        try:
            pasted = read_pasted(text)
        except OperatorError:
            # A rule may make its key of several values, one a line.
            if not rule:
                raise
            pasted = Pasted()
        async with self._overview.store.opened() as store:
            if pasted.request is not None:
                return _page_of(await self._by_request(store, pasted.request))
            # A key may look like an id.
            if pasted.is_id and (digest := parse_record_id(pasted.word)) and await store.records.read(digest):
                return _page_of(digest)
            if (digest := await self._by_values(store, text, form)) is not None:
                return _page_of(digest)
            # It may be the beginning of an id, or what a note says.
            wanted = Filter(pasted.word)
            found = (await worklist(store, wanted, 2, kinds=list(OpenKind))).records if pasted.word else []
        if not found:
            raise OperatorError(NOT_FOUND)
        # Order 104 is not order 1042, which may be the only one that is open.
        is_meant = len(found) == 1 and (found[0].kept.note == pasted.word or _begins(found[0], pasted))
        return _page_of(found[0].key) if is_meant else f"/unknown?{urlencode({'text': pasted.word})}"

    async def _by_request(self, store: Store, asked: AskedRequest) -> bytes:
        found = identify_request(self._parts.settings, self._parts.rules(), asked)
        if isinstance(found, Keyless):
            rule = f" under the rule {found.rule.name}" if found.rule and found.rule.name else ""
            raise OperatorError(f"This request has no key{rule}: {found.reason}")
        if await store.records.read(found.identity.key) is None:
            rule = found.rule.name or "of the settings"
            raise OperatorError(f"There is no record of the key of this request. It comes under the rule {rule}")
        return found.identity.key

    async def _by_values(self, store: Store, text: str, form: Any) -> bytes | None:
        """Return the digest of a key with a record that the values are: by the settings, or under any rule."""
        credential = [line for line in field(form, "credential").encode().splitlines() if line.strip()]
        name = RecordName(
            values=[line.strip().encode("utf-8", "surrogateescape") for line in text.splitlines() if line.strip()],
            path=field(form, "path").strip(),
            scope=field(form, "scope").strip(),
            credential=credential or None,
        )
        finder = Finder(self._parts.settings, store, self._parts.rules())
        chosen = field(form, "rule")
        for rule in [chosen] if chosen else ["", *rule_names(self._parts)]:
            try:
                digest = await finder.key(replace(name, rule=rule))
            except OperatorError:
                # These are no values of this rule. Whoever chose it gets to know.
                if chosen:
                    raise
                continue
            if await store.records.read(digest) is not None:
                return digest
        return None

    # Show ...

    async def show(self, request: web.Request, visitor: Visitor) -> web.Response:
        """Show what the store knows of a key."""
        key_id = request.match_info["id"]
        try:
            async with self._overview.store.opened() as store:
                if (record := await self._read(store, key_id)) is None:
                    return self._nothing(visitor, key_id, "There is no record of this key. It may have expired", 404)
                facts = await facts_of(store, record)
                reconciling = (await progress_of(store, rules_of(self._parts), [record])).get(record.key)
                audit = await trail_of(self._parts.settings, store, record.key)
                body = await self._shown_body(store, record) if visitor.may_operate else None
        except OperatorError as failed:
            return self._nothing(visitor, key_id, f"{failed}", 503)
        return show(
            self._overview,
            visitor,
            "key",
            "record.html",
            id=record_id(record.key),
            error="",
            record=row_of(record, reconciling),
            facts=list(_shown(facts | (progress_facts(*reconciling) if reconciling else {}))),
            timeline=[*timeline(record), *(probes(reconciling[0]) if reconciling else ())],
            head=head_of(record, visitor.may_operate),
            body=body,
            audit=audit,
        )

    def _nothing(self, visitor: Visitor, key_id: str, error: str, status: int) -> web.Response:
        values = {"id": key_id[:64], "error": error, "record": None}
        return show(self._overview, visitor, "key", "record.html", status=status, **values)

    async def _read(self, store: Store, key_id: str) -> RecordView | None:
        digest = parse_record_id(key_id)
        return await store.records.read(digest) if digest else None

    async def _shown_body(self, store: Store, record: RecordView) -> Body | None:
        response = record.response
        if response is None or not response.body_stored or record.state is not ViewState.COMPLETE:
            return None
        try:
            body = await read_body(store, record, SHOWN)
        except OperatorError as failed:
            return Body("", f"{failed}.")
        try:
            # A character may be cut in two.
            text = body[:SHOWN].decode(errors="strict" if len(body) <= SHOWN else "ignore")
        except UnicodeDecodeError:
            text = body[:SHOWN].hex(" ")
        shown = "" if len(body) <= SHOWN and len(body) == response.size else f"The first {SHOWN} of "
        return Body(text, f"{shown}{response.size} bytes.")

    async def body(self, request: web.Request, visitor: Visitor) -> web.Response:
        """Return the body of a stored response as a file."""
        try:
            async with self._overview.store.opened() as store:
                record = await self._read(store, request.match_info["id"])
                if record is None or record.state is not ViewState.COMPLETE:
                    raise web.HTTPNotFound
                body = await read_body(store, record, self._parts.settings.max_stored_bytes)
        except OperatorError as failed:
            return web.Response(text=f"{failed}\n", status=503)
        name = record_id(record.key)
        self._parts.log.warning(AUDIT, action="read_body", key_id=name, user=visitor.name, host=HOST)
        disposition = {"Content-Disposition": f'attachment; filename="{name}.bin"'}
        return web.Response(body=body, content_type="application/octet-stream", headers=disposition)


def _shown(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if name not in ("id", "state"):
            yield name.replace("_", " "), ("no", "yes")[value] if isinstance(value, bool) else value


def _begins(record: RecordView, pasted: Pasted) -> bool:
    return pasted.may_begin_id and record_id(record.key).startswith(pasted.word)


def _page_of(digest: bytes) -> str:
    return f"/key/{record_id(digest)}"


def head_of(record: RecordView, is_operator: bool) -> str | None:
    """Return the head of a stored response, None without one. Values that are secrets are for operators alone."""
    response = record.response
    if response is None or record.state is not ViewState.COMPLETE:
        return None
    lines = [b"HTTP/1.1 %d %s" % (response.status, response.reason)]
    for line in response.block.split(b"\r\n"):
        name, colon, _ = line.partition(b":")
        is_hidden = not is_operator and name.lower() in HIDDEN
        lines += [name + colon + b" (for the role operate)" if is_hidden else line]
    return b"\n".join(lines).rstrip().decode("utf-8", "replace")


def timeline(record: RecordView) -> Iterator[Event]:
    """Yield what the record says of its life, in its order."""
    if record.created_ms:
        yield Event(record.created_ms, "claimed: the request was about to be sent")
    response = record.response
    if record.state is ViewState.IN_FLIGHT:
        yield Event(record.now_ms, f"in flight: {record.progress}", "in-flight")
        yield Event(record.now_ms + record.lease_left_ms, "its lease ends, unless its owner renews it")
    elif record.state is ViewState.UNKNOWN:
        yield from _unknown_events(record)
    elif record.state is ViewState.RELEASED:
        yield Event(0, "released: the next request with the key executes")
    elif response is not None:
        yield Event(response.completed_ms, f"complete: {response.status} was stored", "complete")
    if record.state is ViewState.EXPIRED:
        yield Event(0, "its retention is over: the response is gone, and the key is refused", "waived")
    if record.left_ms > 0:
        yield Event(record.now_ms + record.left_ms, "the record will be removed; then a retry executes")


def probes(progress: Progress) -> Iterator[Event]:
    """Yield what the API was asked about an unknown key, and when it is asked next."""
    if progress.asked:
        times, why = "once" if progress.asked == 1 else f"{progress.asked} times", escaped(progress.why)
        yield Event(0, f"the API was asked {times}, and said last: {escaped(progress.verdict)}{why and f' ({why})'}")
    if progress.left:
        yield Event(0, f"left to a person: {escaped(progress.left)}", "unknown")
    else:
        yield Event(progress.due_ms, "the API is asked next")


def _unknown_events(record: RecordView) -> Iterator[Event]:
    if record.progress:
        yield Event(0, record.progress)
    if record.bytes_stored:
        yield Event(0, f"{record.bytes_stored} bytes of a response were stored")
    if record.status:
        yield Event(0, f"the API said {record.status}, which does not tell the outcome")
    at_ms = record.now_ms - record.lapsed_ms if record.lapsed_ms else 0
    yield Event(at_ms, f"unknown: {record.reason}", "unknown")
