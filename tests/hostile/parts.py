"""What hostile tests are written with: requests below any library, and what the upstream may see of them."""

import asyncio
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

CANARY = b"c4n4ry"  # stands in every hostile request, and nowhere else
HOST = b"Host: api.test"
KEY = b"Idempotency-Key: " + CANARY
CHUNKED = b"Transfer-Encoding: chunked"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"
HIDDEN = b"GET /" + CANARY + b" HTTP/1.1\r\nHost: api.test\r\n\r\n"


def message(line: bytes, *fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([line, *fields, b"X-Note: " + CANARY, b"", body])


def post(*fields: bytes, body: bytes = b"") -> bytes:
    """Return a keyed POST with these fields and whatever stands for its body."""
    return message(b"POST /x HTTP/1.1", HOST, KEY, *fields, body=body)


def put(*fields: bytes, body: bytes = b"") -> bytes:
    """Return the same without a key: it is streamed."""
    return message(b"PUT /x HTTP/1.1", HOST, *fields, body=body)


def get(target: bytes = b"/x", *fields: bytes, host: bytes = HOST, version: bytes = b"HTTP/1.1") -> bytes:
    return message(b"GET %s %s" % (target, version), *([host] if host else []), *fields)


@dataclass(frozen=True)
class Forwarded:
    """The one request that the upstream gets."""

    line: bytes
    body: bytes = b""


POSTED, PUT, GOT = (Forwarded(b"%s /x HTTP/1.1" % method) for method in (b"POST", b"PUT", b"GET"))
POSTED_HELLO, PUT_HELLO = (Forwarded(b"%s /x HTTP/1.1" % method, b"hello") for method in (b"POST", b"PUT"))

Row = tuple[str, bytes, "int | Forwarded"]  # name, what the client sends, what it gets or the upstream sees


HOP_BY_HOP = ("connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "http2-settings", "expect")
LINE = re.compile(rb"[A-Z][A-Z0-9_-]* /[!-~\x80-\xff]* HTTP/1\.1")
FIELD = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+: [^\x00-\x08\x0a-\x1f\x7f]*")


def assert_canonical(head: bytes, body: bytes, authority: bytes, whole: bool = True) -> None:
    """The request is one that every parser reads in the same way, and its framing is the proxy's own."""
    line, *fields = head.removesuffix(b"\r\n").split(b"\r\n")
    assert LINE.fullmatch(line), line
    assert [field for field in fields if not FIELD.fullmatch(field)] == []
    values: dict[str, list[bytes]] = {}
    for field in fields:
        name, _, value = field.partition(b": ")
        values.setdefault(name.decode().lower(), []).append(value)
    framing = values.get("content-length", []) + values.get("transfer-encoding", [])
    assert framing in ([], [b"%d" % len(body)], [b"chunked"]) or (not whole and len(framing) == 1)
    assert framing or not body
    assert values["host"] == [authority]
    assert values["x-forwarded-for"] == [b"127.0.0.1"]
    assert [name for name in HOP_BY_HOP if name in values] == []


# Many requests at little cost ...

_FIELD = {
    name: re.compile(rb"\r\n%s: ?([^\r]*)" % name, re.IGNORECASE) for name in (b"authorization", b"idempotency-key")
}
_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]+)", re.IGNORECASE)


class Echo(asyncio.Protocol):
    """An upstream that answers each request with its credential, key and body; `executed` counts them."""

    def __init__(self, executed: Counter[bytes], open_: set[asyncio.BaseTransport]) -> None:
        self._executed, self._open, self._came = executed, open_, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._open.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._came += data
        head, end, body = self._came.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or len(body) < int(length[1] if length else 0):
            return
        self._came = b""
        said = b"|".join(found[1] if (found := form.search(head)) else b"" for form in _FIELD.values()) + b"|" + body
        self._executed[said] += 1
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))


@asynccontextmanager
async def echoing(sock: socket.socket | None = None) -> AsyncIterator[tuple[str, Counter[bytes]]]:
    """Run an Echo; yield its URL and what it executed."""
    executed: Counter[bytes] = Counter()
    open_: set[asyncio.BaseTransport] = set()
    place = {"sock": sock} if sock else {"host": "127.0.0.1", "port": 0}
    server = await asyncio.get_running_loop().create_server(lambda: Echo(executed, open_), **place)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", executed
    finally:
        server.close()
        for transport in list(open_):
            transport.abort()
        await asyncio.sleep(0)


async def pipelined(port: int, requests: Sequence[bytes], leave_after: int | None = None) -> list[tuple[int, bytes]]:
    """Send requests in one write; return status and body of the answers in their order. Every answer has a length.

    `leave_after`: reset the connection when so many have come.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    writer.write(b"".join(requests))
    answers: list[tuple[int, bytes]] = []
    try:
        while len(answers) < (len(requests) if leave_after is None else leave_after):
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            assert length, head
            answers.append((int(head[9:12]), await reader.readexactly(int(length[1]))))
    finally:
        if leave_after is not None:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
        writer.close()
    return answers
