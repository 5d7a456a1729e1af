"""A client's request: as it was parsed, with the connection it came on and the response it gets."""

import asyncio
from copy import copy
from typing import Any, Protocol

from aiohttp import StreamReader

from oncegate.adaptation.adaptation import NOTHING, Adaptation, Requester
from oncegate.adaptation.cookies import names_a_person
from oncegate.buffers.write_batcher import WriteBatcher
from oncegate.downstream.body import BufferedBody
from oncegate.downstream.minimum_rate import MinimumRate
from oncegate.downstream.response import ResponseWriter, response_to
from oncegate.known_heads.memo import ConnectionMemo
from oncegate.known_heads.requests import KnownHead
from oncegate.messages.fields import only_value
from oncegate.messages.problems import Problem, Render
from oncegate.messages.request_head import ForwardedInfo, RequestHead
from oncegate.messages.request_ids import TRACEPARENT, RequestIds, trace_id
from oncegate.messages.response_head import ResponseHead
from oncegate.messages.target import logged_path
from oncegate.messages.trailers import announced
from oncegate.observe.outcome import ClientCounts
from oncegate.values import Opaque


class RequestConnection(Protocol):
    """A client's connection, as far as a request and its response deal with it."""

    write_batcher: WriteBatcher
    transport: asyncio.Transport | None
    minimum_rate: MinimumRate
    forwarded: ForwardedInfo
    request_ids: RequestIds
    counts: ClientCounts
    memo: ConnectionMemo
    room_waiter: "asyncio.Future[None] | None"
    leave_waiter: "asyncio.Future[None] | None"
    reader_waiter: "asyncio.Future[None] | None"
    # What is counted of the questions that came on it.
    questions: object

    @property
    def docs_url(self) -> str: ...

    @property
    def writing_paused(self) -> bool: ...

    def is_last_response(self) -> bool: ...

    @property
    def is_half_closed(self) -> bool: ...

    def remember_head(self, message: Any, head: RequestHead) -> KnownHead | None: ...

    def set_parser(self, parser: Any) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def force_close(self) -> None: ...


class Request(Opaque):
    """One request. `message` is its head as aiohttp parsed it, `content` its body.

    `head` is the head that passed all checks, None until then. Where the head came before, `known` is that head, and
    `values` are in its gaps, such as the key; `checked_head` then makes `head` on demand.
    `id` is as the client named it or as it was made, `id_line` says it to the API and to the client: both are empty
    where requests have none.
    `adaptation`: what its responses say otherwise for this client, known with the rule that matches.
    `render` writes a response of oncegate itself for this client; None for the usual problem in JSON.
    `shown_path`: what logs and traces have in the place of its path, empty for the path itself.
    """

    message: Any
    content: StreamReader | BufferedBody
    connection: RequestConnection
    response: ResponseWriter
    id: bytes
    id_line: bytes
    known: KnownHead | None = None
    values: tuple[bytes, ...] = ()
    head: RequestHead | None = None
    adaptation: Adaptation = NOTHING
    render: Render | None = None
    shown_path: str = ""

    def twin(self) -> "Request":
        """Return this request once more, with the same response."""
        return copy(self)

    def answer_anew(self) -> None:
        """Begin another response: the one so far, of which the client has nothing, goes to nobody from now on."""
        left, self.response = self.response, copy(self.response)
        self.response.trailers = b""
        left.move_to(Nobody(self.connection))

    def checked_head(self) -> RequestHead:
        """Return the head, of a request that passed all checks."""
        if self.head is None:
            assert self.known is not None
            self.head = self.known.with_values(self.values)
        return self.head

    def field(self, name: bytes) -> bytes:
        """Return the value of a field (lower-case name) that comes once; nothing where it comes never or again.

        Of a request under a known head, nothing is parsed for it.
        """
        if self.head is None and self.known is not None:
            return self.known.value(name, self.values)
        return _sent(self.message, name) if self.head is None else only_value(self.head.fields, name)

    # What its report says of it ...

    @property
    def path(self) -> str:
        """The path of its target, without the query."""
        if self.shown_path:
            return self.shown_path
        if self.known is not None and self.head is None:
            return self.known.path(self.values)
        return logged_path(self.message.path or "" if self.head is None else self.head.target)

    @property
    def request_id(self) -> str:
        """Its id; empty where requests have none."""
        return self.id.decode()

    @property
    def client(self) -> str:
        """The address of its client; behind trusted proxies, the one that they saw."""
        forwarded = self.connection.forwarded
        # What any other client says of itself does not count.
        if not forwarded.trusted or (self.head is None and self.known is None):
            return forwarded.address
        return forwarded.client_behind(self.checked_head().fields.get(b"x-forwarded-for", ()))

    @property
    def scheme(self) -> str:
        """The scheme of its connection, `http` or `https`."""
        return self.connection.forwarded.scheme.decode()

    @property
    def host(self) -> str:
        """The host that it is for, and the port where it names one."""
        return self.checked_head().host.decode("latin-1")

    @property
    def trace_id(self) -> str:
        """The id of the trace that it belongs to, as its client says; empty for none."""
        value = self.field(TRACEPARENT)
        return trace_id(value) if value else ""

    @property
    def problem(self) -> Problem | None:
        """What oncegate answered of its own, None for nothing."""
        return self.response.problem

    @property
    def requester(self) -> Requester:
        """Who is answered, as far as the response depends on it; of a request that passed all checks."""
        return self.adaptation.for_request(self.checked_head(), self.connection.forwarded)

    def kept_head(self, head: ResponseHead) -> ResponseHead:
        """Return a response's head as it is stored under a policy that replays cookies: with them for who gets them."""
        return head.with_cookies() if names_a_person(self.checked_head().fields) else head

    def adapted_block(self, head: ResponseHead, block: bytes) -> bytes:
        """Return the fields of a response that comes from the upstream now, as this client gets them.

        `block`: those of `head`, with what oncegate adds.
        """
        if self.connection.request_ids.name not in head.names:
            block += self.id_line
        if self.response.takes_trailers:
            block += announced(head)
        is_adapted = head.names_address or self.adaptation.adapts_all
        return self.requester.forwarded(block) if is_adapted else block


def request_of(message: Any, content: StreamReader, connection: RequestConnection) -> Request:
    """Return a request whose head is not known."""
    ids = connection.request_ids
    request_id, id_line = ids.of(_sent(message, ids.name))
    return Request(message, content, connection, response_to(message, connection), request_id, id_line)


def known_request(body: BufferedBody, connection: RequestConnection) -> Request:
    """Return a request under a known head."""
    known, ids = body.known, connection.request_ids
    message, values = known.message, body.values
    request_id, id_line = ids.of(known.value(ids.name, values))
    # Such a request is HTTP/1.1.
    response = ResponseWriter(connection, message.method == "HEAD", message.should_close)
    return Request(message, body, connection, response, request_id, id_line, known, values)


class Nobody:
    """The connection of a response that nobody receives."""

    transport: asyncio.Transport | None = None
    room_waiter: "asyncio.Future[None] | None" = None
    leave_waiter: "asyncio.Future[None] | None" = None
    reader_waiter: "asyncio.Future[None] | None" = None
    docs_url = ""
    writing_paused = is_half_closed = False

    def __init__(self, left: RequestConnection) -> None:
        """`left`: the connection that the response had."""
        self.write_batcher, self.minimum_rate, self.counts = left.write_batcher, left.minimum_rate, left.counts

    def is_last_response(self) -> bool:
        """Return False: nothing ends with it."""
        return False

    def force_close(self) -> None:
        """Close nothing."""


def _sent(message: Any, name: bytes) -> bytes:
    """Return the value of a field that comes once in a head as it was parsed; nothing where it comes never or again."""
    values = [value for sent, value in message.raw_headers if sent.lower() == name]
    return values[0] if len(values) == 1 else b""


class Unread:
    """What came in the place of a request, as far as its report says something of it."""

    path = trace_id = host = ""

    def __init__(self, connection: RequestConnection, problem: Problem) -> None:
        self.id, self.id_line = connection.request_ids.of(b"")
        self.problem = problem
        client = connection.forwarded
        self.request_id, self.client, self.scheme = self.id.decode(), client.address, client.scheme.decode()
