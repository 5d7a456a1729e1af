"""An application with a proxy beside it: each request into it makes a call out of it, through the proxy.

Usage: `python -m tests.sidecar_app PORT OUT_PORT`. After SIGTERM it finishes what it has, makes one more call for each
request that it served, and exits: 0, or 1 if a call failed.
"""

import asyncio
import signal
import sys

from tests.wire_client import call

WORK_S = 0.02


class Application:
    def __init__(self, out_port: int) -> None:
        self.out_port, self.open, self.failed = out_port, 0, 0
        self.served: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection with the body that the call out got."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.open += 1
                fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:-2])
                await reader.readexactly(int(fields["content-length"]))
                await asyncio.sleep(WORK_S)
                answer = await self.call_out(name := fields["idempotency-key"])
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))
                await writer.drain()
                self.served.append(name)
                self.open -= 1
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    async def call_out(self, name: str, suffix: str = "out") -> bytes:
        status, body = await call(self.out_port, "/out", f"{name}-{suffix}")
        self.failed += status != 200
        return body

    async def run(self, port: int) -> int:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        server = await asyncio.start_server(self.serve, "127.0.0.1", port)
        print("serving", flush=True)
        await stop.wait()
        server.close()
        while self.open:
            await asyncio.sleep(0.005)
        # What an application writes at its end, such as a last batch.
        for name in self.served:
            await self.call_out(name, "end")
        return int(self.failed > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(Application(int(sys.argv[2])).run(int(sys.argv[1]))))
