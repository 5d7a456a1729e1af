"""A relay in front of a PostgreSQL that loses what it is told to lose: see `tests.resp.Relay`."""

import asyncio
import re
from collections import deque
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.resp import Relay

VERBS = re.compile(rb"\b(claim|take|renew|append|settle|read|follow|resolve)_\d+\(|\bmark (AS m|SET)\b")
TLS_ASKED = 80877103


class PostgresFraming:
    """The messages of one connection (PostgreSQL's documentation, chapter 54), as far as a relay has to know them."""

    def __init__(self) -> None:
        self._sent, self._came = bytearray(), bytearray()
        self._is_begun = self._awaits_tls = False
        self._statements: dict[bytes, bytes] = {}
        self._is_verb = False
        self._asked: deque[bool] = deque()

    def note_requests(self, data: bytes) -> None:
        self._sent += data
        while not self._is_begun and len(self._sent) >= 8:
            size = int.from_bytes(self._sent[:4], "big")
            self._awaits_tls = int.from_bytes(self._sent[4:8], "big") == TLS_ASKED
            self._is_begun = not self._awaits_tls
            del self._sent[:size]
            if self._is_begun:
                self._asked.append(False)  # the server is ready for the first time
        for kind, text in _messages(self._sent) if self._is_begun else ():
            self._note(kind, text)

    def _note(self, kind: bytes, text: bytes) -> None:
        first, _, rest = text.partition(b"\0")
        match kind:
            case b"P":
                self._statements[first] = rest.partition(b"\0")[0]
            case b"B":
                statement = self._statements.get(rest.partition(b"\0")[0], b"")
                self._is_verb = VERBS.search(statement) is not None
            case b"S" | b"Q":
                self._asked.append(self._is_verb)
                self._is_verb = False

    def replies_in(self, data: bytes) -> int:
        """Return how many replies to verbs on records end in this data."""
        if self._awaits_tls and data[:1] == b"N":
            self._awaits_tls, data = False, data[1:]
        self._came += data
        return sum(self._asked.popleft() for kind, _ in _messages(self._came) if kind == b"Z")


def _messages(buffer: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Yield the whole messages at the beginning of a buffer, and remove them."""
    while len(buffer) >= 5 and len(buffer) > (size := int.from_bytes(buffer[1:5], "big")):
        kind, text = bytes(buffer[:1]), bytes(buffer[5 : 1 + size])
        del buffer[: 1 + size]
        yield kind, text


class PostgresRelay(Relay):
    framing = PostgresFraming

    def __init__(self, server_url: str) -> None:
        super().__init__("")
        self._server_url = urlsplit(server_url)

    @property
    def url(self) -> str:
        there = f"{self._server_url.hostname}:{self._server_url.port}"
        return self._server_url.geturl().replace(there, f"127.0.0.1:{self.port}")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._server_url.hostname, self._server_url.port)
