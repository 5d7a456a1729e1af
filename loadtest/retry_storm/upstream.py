"""The API: `python -m loadtest.retry_storm.upstream LOG PORT SEED SECONDS RATE PATIENCE_S`. It knows no keys.

Each call that reaches it is a line in the log: time (CLOCK_MONOTONIC, s), number of the operation, fate.
"""

import asyncio
import os
import sys
import time
from collections import Counter
from pathlib import Path

import uvloop

from loadtest.chaos.link import reset
from loadtest.retry_storm.plan import Operation, Plan, fate, operations

BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class Api:
    """Serves the calls of the plan, and logs them."""

    def __init__(self, plan: Plan, log: Path) -> None:
        self._plan = plan
        self._operations = {operation.path: operation for operation in operations(plan)}
        self._calls: Counter[int] = Counter()
        self._executed: set[int] = set()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _write(self, operation: Operation, how: str) -> None:
        os.write(self._log, f"{time.monotonic():.6f}\t{operation.number}\t{how}\n".encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, until it ends."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.lower().split(b"\r\n")
                length = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
                await reader.readexactly(sum(length))
                operation = self._operations[head.split(b" ", 2)[1].decode()]
                if head.startswith(b"GET "):
                    self._tell(operation, writer)
                else:
                    await self._answer(operation, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # whoever asked is gone
        finally:
            writer.close()

    def _tell(self, operation: Operation, writer: asyncio.StreamWriter) -> None:
        """Say whether an operation was executed."""
        done = operation.number in self._executed
        writer.write(response(200, done_body(operation)) if done else response(404, b""))

    async def _answer(self, operation: Operation, writer: asyncio.StreamWriter) -> None:
        self._calls[operation.number] += 1
        how, takes_s = fate(self._plan, operation, self._calls[operation.number])
        if how != "busy":
            self._executed.add(operation.number)
        self._write(operation, how)  # the work is done now, whoever is still there to hear of it
        await asyncio.sleep(takes_s)
        if how == "cut":
            reset(writer.transport)  # type: ignore[arg-type]
        elif how == "busy":
            writer.write(BUSY)
        else:
            writer.write(response(200, done_body(operation)))


def done_body(operation: Operation) -> bytes:
    return b'{"done": %d}' % operation.number


def response(status: int, body: bytes) -> bytes:
    head = b"HTTP/1.1 %d Told\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


async def main(log: Path, plan: Plan, port: int) -> None:
    server = await asyncio.start_server(Api(plan, log).serve, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    plan = Plan(int(sys.argv[3]), *map(float, sys.argv[4:]))
    uvloop.run(main(Path(sys.argv[1]), plan, int(sys.argv[2])))
