"""The way between a client and the proxy, which breaks once."""

import asyncio
from contextlib import suppress

from tests.parts import abort


class Way:
    """A relay of bytes to the port of a proxy, which waits while nothing listens there, as a balancer would.

    `lost`: the first answer to a POST is lost on it. `cut`: that answer breaks off in its middle, a stream after an
    event.
    """

    def __init__(self, port: int, *, lost: bool = False, cut: bool = False) -> None:
        self._proxy_port, self._lost, self._cut = port, lost, cut
        self.broken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._posting: set[asyncio.StreamReader] = set()  # the proxy's side of connections on which a POST came

    async def __aenter__(self) -> "Way":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            there, back = await self._connected()
            try:
                await self._relay(reader, writer, there, back)
            finally:
                back.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there: asyncio.StreamReader,
        back: asyncio.StreamWriter,
    ) -> None:
        out = asyncio.create_task(self._requests(reader, back, there))
        try:
            await self._answers(there, writer)
        finally:
            out.cancel()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _ in range(200):
            with suppress(ConnectionRefusedError):
                return await asyncio.open_connection("127.0.0.1", self._proxy_port)
            await asyncio.sleep(0.05)
        raise ConnectionRefusedError

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: asyncio.StreamReader
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if data.startswith(b"POST "):
                    self._posting.add(answers)
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = b""
        while data := await reader.read(65536):
            if (self._lost or self._cut) and not self.broken and reader in self._posting:
                answer += data
                if self._cut and not _is_begun(answer):
                    continue
                self.broken = True
                await self._break(writer, answer)
                return
            writer.write(data)
            await writer.drain()

    async def _break(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        if self._cut:
            # The client reads this before the connection is reset.
            writer.write(answer[:-1])
            await writer.drain()
            await asyncio.sleep(0.3)
        abort(writer)


def _is_begun(answer: bytes) -> bool:
    """Return whether an answer has a part of its body: of a stream, two events."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return body.count(b"data: ") >= 2 if b"text/event-stream" in head else len(body) > 1
