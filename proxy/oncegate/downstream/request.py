"""A client's request as it was parsed."""

import asyncio
import ssl
from typing import Any, Protocol

from aiohttp import StreamReader

from oncegate.buffers.write_batcher import WriteBatcher
from oncegate.messages.head_cache import BufferedBody, HeadCache, KnownHead
from oncegate.messages.request_head import ForwardedInfo, RequestHead
from oncegate.rules.identity import ScopeMemo


class ConnectionView(Protocol):
    """A client's connection, as far as a request and its response deal with it."""

    write_batcher: WriteBatcher
    transport: asyncio.Transport | None
    hop: ForwardedInfo | None
    familiar: ScopeMemo | None
    prepared: object
    around_key: tuple[bytes, bytes]
    room: "asyncio.Future[None] | None"
    gone: "asyncio.Future[None] | None"

    @property
    def docs_url(self) -> str: ...

    @property
    def ssl_context(self) -> ssl.SSLContext | None: ...

    @property
    def peername(self) -> Any: ...

    @property
    def writing_paused(self) -> bool: ...

    @property
    def over(self) -> bool: ...

    @property
    def asks_no_more(self) -> bool: ...

    def remember(self, heads: HeadCache, message: Any, head: RequestHead) -> None: ...

    def set_parser(self, parser: Any) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def force_close(self) -> None: ...


class Request:
    """One request as aiohttp's parser gives it; `content` is its body.

    Where its head came before, `seen` is that and `key` the plain value of its key's field, which may differ.
    """

    __slots__ = ("_head", "content", "key", "message", "protocol", "seen")

    def __init__(
        self,
        message: Any,
        content: StreamReader | BufferedBody,
        protocol: ConnectionView,
        seen: KnownHead | None = None,
        key: bytes = b"",
    ) -> None:
        self.message, self.content, self.protocol = message, content, protocol
        self.seen, self.key = seen, key
        self._head: RequestHead | None = None

    @property
    def head(self) -> RequestHead | None:
        """What passed all checks, None where they are still to be made."""
        if self._head is None and self.seen is not None:
            self._head = self.seen.again(self.key)
        return self._head

    @head.setter
    def head(self, head: RequestHead) -> None:
        self._head = head

    @property
    def remote(self) -> str:
        """The peer's address, without its port."""
        peer = self.protocol.peername
        return str(peer[0]) if isinstance(peer, tuple) else "unknown"

    def _cancel(self, exc: BaseException) -> None:
        """Hear from aiohttp that the connection is gone: nobody waits for more of the body."""
        self.content.set_exception(exc)
