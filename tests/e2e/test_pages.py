"""The commands of the pages run: each page in a fresh folder, with an API, against the proxy that it starts."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.test_docs import PAGES, RUN, RUN_REAL, blocks, name_of

# What the commands of a page print, beside that they succeed.
PRINTED = {
    "docs/start.md": (
        "Oncegate-Status: executed",
        "Idempotent-Replayed: true",
        "urn:oncegate:key-reused",
        "urn:oncegate:in-flight",
        "the client got no answer",
        "urn:oncegate:outcome-unknown",
        '"charges": 3',
        "resolved",
    ),
    "docs/install.md": ("Oncegate-Status: executed",),
    "docs/how-to/reconcile.md": ("Oncegate-Status: reconciled", '"id": "ch_1"', "GET http"),
    "docs/how-to/streams.md": ("HTTP/1.1 202 Accepted", '"id": "op_1"', '"on_repeat": "replay"'),
    "docs/reference/rules.md": ("orders (rules.toml:1)", "header:x-user + body:/cart/id"),
}


class Api(BaseHTTPRequestHandler):
    """The API behind the proxy of a page: it takes every POST."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(201, {"id": "op_1", "path": self.path})

    def do_GET(self) -> None:
        self._answer(200, {"path": self.path})

    def _answer(self, status: int, members: dict[str, str]) -> None:
        body = json.dumps(members).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def api(port: int) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", port), Api)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run_page(page: Path, marks: tuple[str, ...], folder: Path) -> str:
    """Run a page's blocks in order, in one bash, and return what they print.

    The API listens on port 9000, unless the page starts one there; the proxy on 8080 and 8081. They are replaced by
    free ones. What the page leaves running is ended.
    """
    script = "".join(block for mark, block in blocks(page) if mark in marks)
    given = dict(zip(("9000", "8080", "8081"), map(str, free_ports(3)), strict=True))
    script = re.sub(r"(?<![\w.])(9000|8080|8081)(?!\w)", lambda port: given[port[1]], script)
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
    env |= {
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        "ONCEGATE_LISTEN": f"127.0.0.1:{given['8080']}",
        "ONCEGATE_ADMIN_LISTEN": f"127.0.0.1:{given['8081']}",
        "HOME": str(folder),
    }
    with api(int(given["9000"])) if "--upstream-only" not in script else contextlib.nullcontext():
        process = subprocess.Popen(
            ["bash", "-eu"],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        # What runs on in the background would hold the pipe open.
        printed = folder / "printed"
        try:
            assert process.stdin is not None
            process.stdin.write(f"exec > {printed} 2>&1\n{script}")
            process.stdin.close()
            status = process.wait(timeout=100)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            assert process.stdout is not None
            process.stdout.close()
    text = printed.read_text(errors="replace")
    assert status == 0, f"{name_of(page)}: exit status {status}\n{text}"
    return text


def pages_with(mark: str) -> list[Path]:
    return [page for page in PAGES if any(one == mark for one, _ in blocks(page))]


@pytest.mark.parametrize("page", pages_with(RUN), ids=name_of)
def test_the_commands_of_a_page_run(page, tmp_path):
    """In order, in a fresh folder; they succeed, and print what the page says."""
    printed = run_page(page, (RUN,), tmp_path)
    assert [line for line in PRINTED.get(name_of(page), ()) if line not in printed] == [], printed


@pytest.mark.packages
@pytest.mark.parametrize("page", pages_with(RUN_REAL), ids=name_of)
def test_the_commands_of_a_page_run_with_real_parts(page, tmp_path):
    """Those, too, that need packages of Debian or npm."""
    run_page(page, (RUN, RUN_REAL), tmp_path)
