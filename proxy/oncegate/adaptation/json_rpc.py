"""JSON-RPC 2.0 over HTTP: who asked, what a response says about its request, and how another request gets it. Pure.

A client takes a response by the id of its own request, which is new in each try. So a stored response carries the id of
the request at hand when it is replayed. Nothing else of it changes.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from oncegate.adaptation.event_streams import MAX_EVENT_BYTES, EventCutter, event_data, with_data
from oncegate.keys.digests import length_prefixed
from oncegate.keys.documents import (
    Missing,
    PlacedMember,
    follow_pointer,
    is_encoded,
    parse_document,
    placed_members,
)
from oncegate.keys.syntax import BadKey
from oncegate.messages.fields import Fields
from oncegate.messages.problems import Problem, Rendering

# Of an id and of a progress token, as they are written.
MAX_ID_BYTES = 256
# Of an error that oncegate itself makes. JSON-RPC leaves -32000 to -32099 to servers; MCP, -32000 to -32019.
OWN_ERROR = -32010
# What JSON-RPC itself says of a request that was not executed: it could not be parsed, was no request, or named no
# method (section 5.1). Not -32602 (invalid params), which servers also answer after a tool ran: MCP's SDK for
# TypeScript up to 1.20 does so where the tool's result does not fit its output schema.
NOTHING_RAN = frozenset((b"-32700", b"-32600", b"-32601"))
PROGRESS = "notifications/progress"
# By which a client of MCP takes back a call (protocols before 2026-07-28): the session of both, and the call's id.
CANCELLED, SESSION = "notifications/cancelled", b"mcp-session-id"
NAME_BYTES = 24
# Of a stored response: about the bytes that are adapted, or about the session of the request that was executed.
_NOT_ADAPTED = frozenset(
    (b"content-length", b"content-md5", b"content-digest", b"repr-digest", b"digest", b"etag", b"mcp-session-id")
)


class Caller(NamedTuple):
    """Who sent a JSON-RPC request: its id and its progress token, as they are written; no token is None."""

    id: bytes
    progress: bytes | None = None

    def render(self, problem: Problem, docs_url: str) -> Rendering:
        """Return a problem as a JSON-RPC error, with the problem itself as `data`.

        The status is 200, as it is for errors of any other JSON-RPC server: some SDKs take another one for a broken
        session, and some show nothing of its body (docs/how-to/agents.md).
        """
        title, detail = problem.kind.title, problem.detail
        # Some details say no more than the title.
        message = json.dumps(title if detail.lower() == title.lower() else f"{title}: {detail}").encode()
        body = b'{"jsonrpc": "2.0", "id": %b, "error": {"code": %d, "message": %b, "data": %b}}'
        data = problem.body(docs_url)
        return Rendering(200, problem.head_fields(b"application/json"), body % (self.id, OWN_ERROR, message, data))


def read_caller(body: bytes) -> Caller | Missing | BadKey:
    """Return who sent a JSON-RPC request, or why its body is none that can be answered."""
    members = placed_members(text) if (text := _text(body)) is not None else None
    if members is None:
        document = parse_document(body)
        if isinstance(document, tuple) and isinstance(document[0], list):
            return BadKey("the body is a JSON-RPC batch, whose parts cannot be told apart")
        return document if isinstance(document, BadKey) else BadKey("the body is no JSON-RPC request")
    ids = [member for member in members if member.name == "id"]
    if not isinstance(follow_pointer(_pairs(members), ("method",)), str) or len(ids) > 1:
        return BadKey("the body is no JSON-RPC request")
    if not ids:
        return Missing("the body is a JSON-RPC notification: it has no id, and gets no response")
    if not isinstance(ids[0].value, str | bytes):
        return BadKey("the id of the JSON-RPC request is no string and no number")
    token = _token(text or "", ids[0])
    if token is None:
        return BadKey(f"the id of the JSON-RPC request is over {MAX_ID_BYTES} bytes")
    return Caller(token, _progress_token(text or "", members))


def _progress_token(text: str, members: Sequence[PlacedMember]) -> bytes | None:
    """Return the progress token of a request, None where it has none that can be used."""
    found = _only(members, "params")
    meta = _only(placed_members(text, found.start) or (), "_meta") if found else None
    token = _only(placed_members(text, meta.start) or (), "progressToken") if meta else None
    return _token(text, token) if token and isinstance(token.value, str | bytes) else None


def _pairs(members: Sequence[PlacedMember]) -> tuple[tuple[str, Any], ...]:
    return tuple((member.name, member.value) for member in members)


def _only(members: Sequence[PlacedMember], name: str) -> PlacedMember | None:
    found = [member for member in members if member.name == name]
    return found[0] if len(found) == 1 else None


def _token(text: str, member: PlacedMember) -> bytes | None:
    token = text[member.start : member.end].encode("utf-8", "surrogatepass")
    return token if len(token) <= MAX_ID_BYTES else None


def _text(body: bytes) -> str | None:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def same_id(one: bytes, other: bytes) -> bool:
    """Return whether two ids as they are written are the same value: the text "1" is not the number 1."""
    if one == other:
        return True
    try:
        # As floating point, like JavaScript; a server may write the number anew.
        first, second = (json.loads(token, parse_int=float) for token in (one, other))
    except (ValueError, RecursionError):
        return False
    return type(first) is type(second) and bool(first == second) and first != float("inf")


def call_name(tenant: bytes, fields: Fields, request_id: bytes) -> bytes:
    """Return what names a call for `notifications/cancelled`; nothing where it has no session.

    Without one, the ids of all clients are the same few numbers, and a server could not find the call either. `tenant`:
    whose call it is, because who knows a session need not be its user (MCP authenticates nobody by it).
    """
    session = fields.get(SESSION, ())
    if len(session) != 1 or not session[0]:
        return b""
    return blake2b(length_prefixed((tenant, session[0], _rewritten(request_id))), digest_size=NAME_BYTES).digest()


def cancelled_call(tenant: bytes, fields: Fields, message: Any) -> bytes:
    """Return the name of the call that a tenant's message takes back, nothing for any other message."""
    if follow_pointer(message, ("method",)) != CANCELLED:
        return b""
    token = _written(follow_pointer(message, ("params", "requestId")))
    return call_name(tenant, fields, token) if token else b""


# What a response says ...


class FinalMessage(NamedTuple):
    """The message that ends a call. `document`: in a tuple of one. `is_only`: no other response came before it."""

    document: tuple[Any]
    is_only: bool

    @property
    def is_error(self) -> bool:
        return not isinstance(follow_pointer(self.document[0], ("error",)), Missing)

    @property
    def proves_nothing_ran(self) -> bool:
        """Whether JSON-RPC itself says so."""
        code = follow_pointer(self.document[0], ("error", "code"))
        return self.is_only and isinstance(code, bytes) and code in NOTHING_RAN


class ResponseReader:
    """Reads the messages of one response while it passes: a JSON document, or a stream of events.

    `id`: that of the request, as it is written. What is coded, too long or of another type cannot be read.
    """

    def __init__(self, fields: Fields, request_id: bytes) -> None:
        self._id = request_id
        kind = media_type(fields.get(b"content-type", ()))
        self._events = EventCutter() if kind == b"text/event-stream" else None
        self._is_readable = (self._events is not None or is_json(kind)) and not is_encoded(fields)
        self._document = bytearray()
        self._count = 0
        self._last: tuple[Any] | None = None

    def add(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        if not self._is_readable:
            return
        if self._events is not None:
            for event in self._events.feed(data):
                self._read(event_data(event))
            self._is_readable = not self._events.has_long
        elif len(self._document) + len(data) > MAX_EVENT_BYTES:
            self._is_readable = False
            self._document.clear()
        else:
            self._document += data

    @property
    def kept_bytes(self) -> int:
        """How many bytes of the body are kept until a message is whole."""
        return len(self._document) if self._events is None else self._events.kept_bytes

    def final(self) -> FinalMessage | None:
        """Return the message that ends the call; None where none came, or where it cannot be read."""
        if not self._is_readable:
            return None
        self._read(event_data(self._events.rest()) if self._events is not None else bytes(self._document))
        return FinalMessage(self._last, self._count == 1) if self._last is not None else None

    def _read(self, message: bytes) -> None:
        """Count a message if it is a response to the request, or an error about a request that nobody could read."""
        document = parse_document(message) if message else BadKey("")
        if not isinstance(document, tuple):
            return
        result, error, answered = (follow_pointer(document[0], (name,)) for name in ("result", "error", "id"))
        if isinstance(result, Missing) and isinstance(error, Missing):
            return
        is_unnamed = answered is None and not isinstance(error, Missing)
        if is_unnamed or same_id(_written(answered), self._id):
            self._count, self._last = self._count + 1, document


def _rewritten(token: bytes) -> bytes:
    """Return an id as this module writes it: the same text may be escaped in more than one way."""
    return json.dumps(json.loads(token)).encode() if token.startswith(b'"') else token


def _written(value: Any) -> bytes:
    """Return an id as JSON has it."""
    return value if isinstance(value, bytes) else json.dumps(value).encode() if isinstance(value, str) else b""


def media_type(lines: Sequence[bytes]) -> bytes:
    """Return the media type in the lines of Content-Type, in lower case and without parameters."""
    return lines[-1].partition(b";")[0].strip().lower() if lines else b""


def is_json(kind: bytes) -> bool:
    """Return whether a media type is that of JSON (RFC 6839, section 3.1)."""
    return kind == b"application/json" or kind.endswith(b"+json")


# What another request gets ...


class Replayed:
    """A stored response as the request at hand gets it: `feed` all of its body, then `rest`.

    `stored_id`: of the request that was executed, as it is written; empty where that is not known, as it is for a
    response that an operator wrote.
    """

    def __init__(self, block: bytes, stored_id: bytes, caller: Caller) -> None:
        self._stored_id, self._caller = stored_id, caller
        self.block = b"".join(line for line in block.splitlines(keepends=True) if _name(line) not in _NOT_ADAPTED)
        kinds = [line.partition(b":")[2].strip() for line in block.splitlines() if _name(line) == b"content-type"]
        self._events = EventCutter() if media_type(kinds) == b"text/event-stream" else None
        self._document = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Return the bytes of the body that are certain now."""
        if self._events is None:
            self._document += data
            return b""
        return b"".join(map(self._event, self._events.feed(data)))

    def rest(self) -> bytes:
        """Return the rest of the body."""
        if self._events is not None:
            return self._event(self._events.rest())
        body = bytes(self._document)
        return body if (adapted := self._message(body)) is None else adapted

    def _event(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data:
            return event
        adapted = self._message(data)
        return b"" if adapted is None else event if adapted is data else with_data(event, adapted)

    def _message(self, message: bytes) -> bytes | None:
        """Return a message for the request at hand; the same object if nothing changes, None to leave it out."""
        text = _text(message)
        members = placed_members(text) if text is not None else None
        if text is None or members is None:
            return message
        if any(member.name in ("result", "error") for member in members):
            return _spliced(message, text, [one for one in members if one.name == "id"], self._answers, self._caller.id)
        method, params = _only(members, "method"), _only(members, "params")
        if method is None or method.value != PROGRESS or params is None:
            return message
        # Both SDKs make the token of the request's id, so that it names a request that this client never sent.
        if self._caller.progress is None:
            return None
        tokens = [one for one in placed_members(text, params.start) or () if one.name == "progressToken"]
        return _spliced(message, text, tokens, lambda _: True, self._caller.progress)

    def _answers(self, token: bytes) -> bool:
        return not self._stored_id or same_id(token, self._stored_id)


def _spliced(
    message: bytes, text: str, members: Sequence[PlacedMember], is_meant: Callable[[bytes], bool], token: bytes
) -> bytes:
    """Return a message with the token in the place of the values that are meant."""
    meant = [one for one in members if is_meant(text[one.start : one.end].encode("utf-8", "surrogatepass"))]
    if not meant:
        return message
    pieces: list[bytes] = []
    at = 0
    for one in meant:
        pieces += [text[at : one.start].encode(), token]
        at = one.end
    return b"".join((*pieces, text[at:].encode()))


def _name(line: bytes) -> bytes:
    return line.partition(b":")[0].strip().lower()
