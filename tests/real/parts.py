"""What stands around the proxy: servers as processes of their own on loopback, and a way to them that is slow."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.parts import RawUpstream, Received, answering, ask

# What `make test-real` installs first, and the tests that need it.
INSTALLED = pytest.mark.packages  # of Debian and npm, and the SDKs of Python that are clients
# Beside what the tests themselves run with, which is in .venv.
CLIENTS, CLIENTS_MCP1 = (Path(sys.prefix) / name / "bin/python" for name in ("clients", "clients-mcp1"))
NODE_MODULES = Path(sys.prefix) / "node/node_modules"
# Each gets its listening socket as a descriptor, so that it can be reached before it has started.
LOCALSTRIPE = """
import socket, sys
from aiohttp import web
from localstripe import resources
from localstripe.server import app
resources.Store.dump_to_disk = lambda self: None  # it would write to one file in /tmp, whoever else does
web.run_app(app, sock=socket.socket(fileno=int(sys.argv[1])), print=None)
"""
ACCOUNT = "sk_test_oncegate"
CUSTOMERS, CHARGES = b"POST /v1/customers", b"POST /v1/charges"
MOTO = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
app = DomainDispatcherApplication(create_backend_app)
make_server("127.0.0.1", 0, app, threaded=True, fd=int(sys.argv[1])).serve_forever()
"""


@contextmanager
def program(code: str, log: Path) -> Iterator[str]:
    """Run a server as a process of its own and yield its URL. What it warns of is not for us to mend."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock, log.open("wb") as output:
        fd = sock.fileno()
        command = [sys.executable, "-W", "ignore", "-c", code, str(fd)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_"))}
        process = subprocess.Popen(command, stdout=output, stderr=output, pass_fds=[fd], env=environment)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield url
    finally:
        process.kill()
        process.wait()


def asked(url: str, json_body: object = None, method: str | None = None, **headers: str) -> Any:
    """Return what an HTTP server answers, which must be a success, with its JSON read."""
    data = None if json_body is None else json.dumps(json_body).encode()
    one = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    with urllib.request.urlopen(one, timeout=20) as answer:
        return json.loads(answer.read() or b"null")


async def listed(api: str, what: str) -> list[dict[str, Any]]:
    """Return what a localstripe has, asked directly."""
    answer = await asyncio.to_thread(asked, f"{api}/v1/{what}", Authorization=f"Bearer {ACCOUNT}")
    return answer["data"]  # type: ignore[no-any-return]


class Slow:
    """An upstream's script: passes requests on to a server and holds back the answers that it is told to hold."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self.held: dict[bytes, Callable[[], Any]] = {}  # by request line: the first answer waits for this
        self.lost: set[bytes] = set()  # by request line: the connection breaks instead of the first answer

    async def script(
        self, upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, got: Received
    ) -> None:
        answer = await ask(self._port, got.head + b"\r\n" + got.body)
        target = b" ".join(got.line.split()[:2])
        if target in self.lost:
            self.lost.remove(target)
            raise ConnectionError
        if condition := self.held.pop(target, None):
            while not condition():
                await asyncio.sleep(0.01)
        kept = [one for one in answer.headers if one[0].lower() not in (b"connection", b"content-length")]
        lines = b"".join(b"%s: %s\r\n" % one for one in kept)
        head = b"HTTP/1.1 %d %s\r\n%sContent-Length: %d\r\n\r\n" % (
            answer.status, answer.reason, lines, len(answer.body)
        )  # fmt: skip
        await answering(head + answer.body)(upstream, reader, writer, got)
