"""Heads that came before: equal bytes are parsed equally, so they are not parsed again.

Both sides say the same over and over on connections that are kept, a client all but its key. HTTP/2 sends an index for
that (RFC 7541); HTTP/1.1 sends it whole, and a look at a table stands in for the parser and for every check that has
been passed: a fifth of an execution's instructions (measured).
"""

import re
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from oncegate.messages.request_head import RequestHead

MOST = 256  # heads
MOST_BYTES = 4096  # of one
IN_VAIN = 64  # heads in a row that had not come before, from which on one in so many is kept
# A key that is a whole field value as it stands, and within the limit; another one goes through the parser.
_PLAIN = re.compile(rb'[!#-+\--\[\]-~]{1,255}|"[!#-\[\]-~]{1,253}"')

Parsed = TypeVar("Parsed")


class RecentHeads(Generic[Parsed]):
    """What was made of heads, by their bytes. Bounded; where hardly any comes again, few are kept."""

    __slots__ = ("_by_head", "_in_vain", "clear", "find")

    def __init__(self) -> None:
        self._by_head: dict[Hashable, Parsed] = {}
        self._in_vain = 0
        self.find, self.clear = self._by_head.get, self._by_head.clear

    def wants(self) -> bool:
        """Return whether to keep a head that was not found: where hardly any comes again, one in so many."""
        self._in_vain += 1
        return self._in_vain <= IN_VAIN or not self._in_vain % IN_VAIN

    def keep(self, head: Hashable, size: int, parsed: Parsed) -> None:
        """Remember what was made of a head of `size` bytes."""
        if size <= MOST_BYTES:
            if len(self._by_head) >= MOST:
                self.clear()
            self._by_head[head] = parsed

    def paid(self) -> None:
        """Note that one was found."""
        self._in_vain = 0


class BufferedBody:
    """A request's body that came whole with its head. What becomes of its client does not matter to it."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def is_eof(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return None

    def set_exception(self, exc: BaseException) -> None:
        pass

    def read_nowait(self) -> bytes:
        data, self.data = self.data, b""
        return data

    def at_eof(self) -> bool:
        return not self.data

    async def readany(self) -> bytes:
        return self.read_nowait()


class KnownHead:
    """A request's head that passed all checks, and may have another key in its place.

    `prepared` is for the handler: what it made of the head beside, as far as it does not depend on the key.
    """

    __slots__ = ("_place", "head", "length", "message", "name", "prepared")

    def __init__(self, message: Any, head: RequestHead, length: int, place: int, name: bytes) -> None:
        self.message, self.head = message, head  # as aiohttp parsed it, without its fields
        self.length = length  # of the body
        self._place, self.name = place, name  # of the key among the fields, negative for none; of its field
        self.prepared: Any = None

    def again(self, key: bytes) -> RequestHead:
        """Return the head with this value as its key."""
        if self._place < 0:
            return self.head
        method, target, http10, host, pairs, fields = self.head
        now = [*pairs]
        now[self._place] = (pairs[self._place][0], key)
        return RequestHead(method, target, http10, host, now, {**fields, self.name: [key]})


KnownRequest = tuple[KnownHead, bytes, bytes]  # a request whose head came before: that, the value of its key, its body


class HeadCache:
    """The heads of requests that came before, whatever the value of the field `name` (lower case) was."""

    __slots__ = ("_seen", "clear", "name", "wants")

    def __init__(self, name: bytes) -> None:
        self.name, self._seen = name, RecentHeads[KnownHead]()
        self.clear, self.wants = self._seen.clear, self._seen.wants

    def find(self, data: bytes, label: bytes) -> KnownRequest | None:
        """Return the request that `data` is, no more and no less, if its head is known.

        `label`: how the key's line begins on this connection, empty where that is not known.
        """
        end, key = data.find(b"\r\n\r\n") + 4, b""
        if not label or (at := data.find(label, 0, end)) < 0:
            seen = self._seen.find((data[:end], b""))
        else:
            start = at + len(label)
            stop = data.find(b"\r\n", start)
            key = data[start:stop]
            seen = self._seen.find((data[:start], data[stop:end])) if _PLAIN.fullmatch(key) else None
        if seen is None or seen.length != len(data) - end:
            return None
        self._seen.paid()
        return seen, key, data[end:]

    def keep(self, data: bytes, message: Any, head: RequestHead) -> bytes:
        """Remember the head of a whole request that passed all checks; return how its key's line begins.

        Empty where it has none, or has its key in an unusual form: then it is not remembered.
        """
        end = data.find(b"\r\n\r\n") + 4
        message = message._replace(headers=None, raw_headers=(), url=None)  # of all the others, too
        if (values := head.fields.get(self.name)) is None:
            self._seen.keep((data[:end], b""), end, KnownHead(message, head, len(data) - end, -1, self.name))
            return b""
        place = [name.lower() for name, _ in head.pairs].index(self.name)
        label = b"\r\n%s: " % head.pairs[place][0]
        start = data.find(label, 0, end) + len(label)
        stop = data.find(b"\r\n", start)
        if start < len(label) or values != [data[start:stop]] or not _PLAIN.fullmatch(values[0]):
            return b""
        seen = KnownHead(message, head, len(data) - end, place, self.name)
        self._seen.keep((data[:start], data[stop:end]), end, seen)
        return label


def is_whole(data: bytes, message: Any, head: RequestHead) -> bool:
    """Return whether `data` is a request, no more and no less, behind which another may come."""
    if message.should_close or message.upgrade or message.chunked or head.http10:
        return False
    if not data.startswith(head.method.encode()):  # the parser skips empty lines; the first would be taken for the end
        return False
    stated = head.fields.get(b"content-length")
    return data.find(b"\r\n\r\n") + 4 + (int(stated[0]) if stated else 0) == len(data)
