"""HTTP as the clients and the upstream of a run speak it: plain bytes, without repairs or retries."""

import asyncio
import random
import re
from hashlib import blake2b
from typing import NamedTuple, cast

from loadtest.chaos.link import reset

# What the proxy adds by contract, and what only frames the body. The rest is one truth.
NOT_COMPARED = frozenset(
    (
        *(b"oncegate-status", b"idempotent-replayed", b"age", b"preference-applied"),
        *(b"oncegate-key-id", b"oncegate-request-id", b"x-request-id", b"link"),
        *(b"connection", b"keep-alive", b"transfer-encoding", b"content-length"),
    )
)


def answer_digest(lines: list[bytes], body: bytes | bytearray) -> str:
    """Return the digest of a response: status line, end-to-end fields as received, body."""
    digest = blake2b(digest_size=8)
    for line in lines:
        if line.partition(b":")[0].lower() not in NOT_COMPARED:
            digest.update(line + b"\n")
    digest.update(body)
    return digest.hexdigest()


class Got(NamedTuple):
    """What a client received.

    `how`: whole, cut (its end is missing), none, timeout, refused, left (the client left).
    """

    how: str
    status: int = 0
    word: str = ""  # Oncegate-Status
    replayed: bool = False
    slug: str = ""
    digest: str = ""
    execution: str = ""
    echo: str = ""
    stop: str = ""  # where the execution can be stopped
    said: str = ""  # a JSON object that is no problem


class Answer:
    """A response as far as it arrived. `lines` is its head, once that is complete."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.body = bytearray()
        self.lines: list[bytes] = []
        self.fields: dict[bytes, bytes] = {}
        self._left: int | None = 0  # bytes of the body still to come; None: until the end
        self._chunked = False
        self.whole = False

    def feed(self, data: bytes) -> bool:
        """Add bytes and return whether the response is complete. Raises ValueError if it is not HTTP."""
        self._data += data
        if not self.lines and not self._head():
            return False
        if self._chunked:
            self._chunks()
        elif self._left is None:
            self.body += self._data
            self._data.clear()
        else:
            take = self._left - len(self.body)
            self.body += self._data[:take]
            del self._data[:take]
            self.whole = len(self.body) == self._left
        return self.whole

    def end(self) -> None:
        """Note that the connection ended cleanly."""
        self.whole = self.whole or (bool(self.lines) and self._left is None and not self._chunked)

    def _head(self) -> bool:
        while (at := self._data.find(b"\r\n\r\n")) >= 0:
            lines = bytes(self._data[:at]).split(b"\r\n")
            del self._data[: at + 4]
            if not lines[0].startswith(b"HTTP/1.1 1"):
                self._frame(lines)
                return True
        return False

    def _frame(self, lines: list[bytes]) -> None:
        self.lines = lines
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            self.fields[name.lower()] = value.strip()
        status = lines[0].split(b" ")[1]
        self._chunked = b"transfer-encoding" in self.fields
        length = self.fields.get(b"content-length")
        self._left = 0 if status in (b"204", b"304") else None if length is None else int(length)

    def _chunks(self) -> None:
        data, at = self._data, 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line_end], 16)
            after = line_end + 2 + size + 2
            if len(data) < after:
                break
            self.body += data[line_end + 2 : after - 2]
            at = after
            if size == 0:
                self.whole = True
                break
        del data[:at]

    def got(self, how: str) -> Got:
        """Return the part that arrived."""
        if not self.lines:
            return Got(how)
        fields = self.fields
        return Got(
            how,
            int(self.lines[0].split(b" ")[1]),
            fields.get(b"oncegate-status", b"").decode(),
            b"idempotent-replayed" in fields,
            self._slug(),
            answer_digest(self.lines, self.body) if how == "whole" else "",
            (fields.get(b"x-execution") or self._shown()).decode(),
            fields.get(b"x-echo", b"").decode(),
            self._stop(),
            bytes(self.body).decode() if fields.get(b"content-type") == b"application/json" else "",
        )

    def _slug(self) -> str:
        """Return what kind of problem came, empty for none; `cancelled` for an unknown outcome with this reason."""
        if self.fields.get(b"content-type") != b"application/problem+json":
            return ""
        if re.search(rb'"reason": ?"cancelled"', self.body):
            return "cancelled"
        return bytes(self.body).partition(b'"urn:oncegate:')[2].partition(b'"')[0].decode() or "none"

    def _shown(self) -> bytes:
        """Return the execution that the API showed when it was asked about the key, empty for any other response."""
        found = re.search(rb'"execution": "([^"]+)"', self.body)
        return found[1] if found and self.fields.get(b"oncegate-status") == b"reconciled" else b""

    def _stop(self) -> str:
        links = b"\n".join(line for line in self.lines if line[:5].lower() == b"link:")
        found = re.search(rb'<([^>]+)>; rel="cancel"', links)
        return found[1].decode() if found else ""


class Connection(asyncio.Protocol):
    """One connection of a client, for one request at a time."""

    def __init__(self) -> None:
        self._answer = Answer()
        self._done: asyncio.Future[str] | None = None
        self.transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, port: int) -> "Connection":
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(cls, "127.0.0.1", port))[1]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            self.close()  # nothing was asked
            return
        try:
            if self._answer.feed(data):
                self._done.set_result("whole")
        except (ValueError, IndexError):
            self._done.set_result("garbage")

    def eof_received(self) -> None:
        self._answer.end()
        self._over()

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        self._over()

    def _over(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result("whole" if self._answer.whole else "cut" if self._answer.lines else "none")

    async def ask(self, raw: bytes, timeout_s: float, leave: float | None = None) -> Got:
        """Send a request and return the response. `leave`: disconnect after so many seconds in any case."""
        if self.transport is None:
            return Got("refused")
        self._answer = Answer()
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        patience = loop.call_later(timeout_s if leave is None else leave, self._give_up, leave is not None)
        self.transport.write(raw)
        how = await self._done
        patience.cancel()
        if how != "whole" or b"connection" in self._answer.fields:
            self.close()
        return self._answer.got(how)

    def _give_up(self, leaves: bool) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result("left" if leaves else "timeout")

    async def break_off(self, raw: bytes, rng: random.Random) -> Got:
        """Send a part of a request, then disconnect."""
        if self.transport is not None:
            self.transport.write(raw[: rng.randrange(len(raw))])
            await asyncio.sleep(rng.uniform(0, 0.01))
            self.close(rng.random() < 0.5)
        return Got("left")

    def close(self, with_reset: bool = True) -> None:
        if self.transport is not None:
            reset(self.transport) if with_reset else self.transport.close()
            self.transport = None

    @property
    def idle(self) -> bool:
        """Whether it can take another request."""
        return self.transport is not None and not self.transport.is_closing()
