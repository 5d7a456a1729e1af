"""A real Varnish and a real lighttpd between the proxy and its API: their made-up answers prove nothing."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loadtest.ports import free_port
from tests.parts import OK, RawUpstream, Received, Script, answering, ask, request
from tests.real.parts import INSTALLED

pytestmark = INSTALLED
START_S = 20
# A connection of its own for each request: on a used one, Varnish sends a POST a second time by itself.
VCL = """
vcl 4.1;
backend default {{ .host = "127.0.0.1"; .port = "{port}"; .first_byte_timeout = 1s; }}
sub vcl_backend_fetch {{ set bereq.http.Connection = "close"; }}
"""
LIGHTTPD = """
server.document-root = "{folder}"
server.bind = "127.0.0.1"
server.port = {listen}
server.modules = ("mod_proxy")
server.errorlog = "{folder}/error.log"
proxy.server = ("/" => (("host" => "127.0.0.1", "port" => {port}, "read-timeout" => 1)))
"""


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[str]:
    """Run a server in a session of its own, and yield its URL once it listens."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=folder)
    try:
        deadline = time.monotonic() + START_S
        while not _listens(port):
            assert process.poll() is None, (folder / "output").read_text(errors="replace")
            assert time.monotonic() < deadline, "it did not listen in time"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def varnish(upstream: RawUpstream, tmp_path: Path) -> Iterator[str]:
    (folder := tmp_path / "varnish").mkdir()
    port = free_port()
    (folder / "default.vcl").write_text(VCL.format(port=upstream.url.rpartition(":")[2]))
    options = ["-n", str(folder / "work"), "-a", f"127.0.0.1:{port}", "-f", str(folder / "default.vcl")]
    # No user of its own: it could not read this folder.
    with running(["varnishd", "-j", "none", "-F", *options, "-s", "malloc,16m"], port, folder) as url:
        yield url


@pytest.fixture
def lighttpd(upstream: RawUpstream, tmp_path: Path) -> Iterator[str]:
    (folder := tmp_path / "lighttpd").mkdir()
    port, api = free_port(), upstream.url.rpartition(":")[2]
    (folder / "lighttpd.conf").write_text(LIGHTTPD.format(folder=folder, listen=port, port=api))
    with running(["lighttpd", "-D", "-f", str(folder / "lighttpd.conf")], port, folder) as url:
        yield url


async def cut(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, ___: Received) -> None:
    """The API has executed the request, and is gone before it answers."""
    writer.transport.abort()


async def half(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, ___: Received) -> None:
    """The same in the middle of its answer's head."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    writer.close()


async def late(*_: object) -> None:
    """The API answers when nobody waits any more."""
    await asyncio.sleep(3)


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
LOST = {"cut": cut, "half": half, "late": late}


async def told(port: int, key: str) -> tuple[int, str, str]:
    """What a client gets for a key: the status, `Oncegate-Status`, and the slug of a problem."""
    answer = await ask(port, request(key=key))
    slug = answer.slug if answer.status == 409 else ""
    return answer.status, (answer.header("oncegate-status") or b"").decode(), slug


@pytest.mark.parametrize("released", ["default", "default,503+retry-after", "default,5xx"])
async def test_a_503_of_varnish_is_unknown(fork, upstream, varnish, valkey, released):
    """Varnish says 503 and `Retry-After: 5` though the API ran: one execution, whatever the operator releases."""
    gate = await fork(varnish, valkey.url, RELEASE_STATUSES=released)
    scripts: dict[str, Script] = LOST | {"interim": answering(EARLY_HINTS + OK)}
    for number, (key, script) in enumerate(scripts.items(), 1):
        upstream.script = script
        first = await ask(gate.port, request(key=key))
        assert (first.status, first.header("retry-after"), first.header("oncegate-status")) == (503, b"5", b"unknown")
        upstream.script = answering(OK)
        for _ in range(3):
            assert await told(gate.port, key) == (409, "unknown", "outcome-unknown")
        assert len(upstream.received) == number, key


async def test_what_varnish_passes_on_counts(fork, upstream, varnish, valkey):
    """A 429 of the API frees the key, its 500 and its result are stored; its own 503 cannot be told from Varnish's."""
    gate = await fork(varnish, valkey.url, RELEASE_STATUSES="default,503+retry-after")
    for answer, says in ((b"429 Busy", "released"), (b"500 No", "executed"), (b"200 OK", "executed")):
        upstream.script = answering(OK.replace(b"200 OK", answer))
        assert await told(gate.port, answer[:3].decode()) == (int(answer[:3]), says, "")
    upstream.script = answering(OK.replace(b"200 OK", b"503 Busy\r\nRetry-After: 1"))
    assert await told(gate.port, "busy") == (503, "unknown", "")


async def test_a_500_of_lighttpd_is_unknown(fork, upstream, lighttpd, valkey):
    """lighttpd says 500 where the API broke off and 504 where it is late: unknown, and one execution."""
    gate = await fork(lighttpd, valkey.url)
    for number, (key, script) in enumerate(LOST.items(), 1):
        upstream.script = script
        assert await told(gate.port, key) == (504 if key == "late" else 500, "unknown", "")
        upstream.script = answering(OK)
        assert await told(gate.port, key) == (409, "unknown", "outcome-unknown")
        assert len(upstream.received) == number, key


async def test_a_500_of_an_api_behind_lighttpd(fork, upstream, lighttpd, valkey):
    """An API that sends a `Server` of its own is told from lighttpd, and its 500 is stored."""
    gate = await fork(lighttpd, valkey.url)
    upstream.script = answering(OK.replace(b"200 OK", b"500 No\r\nServer: api"))
    assert [await told(gate.port, "named") for _ in range(2)] == [(500, "executed", ""), (500, "replayed", "")]
    upstream.script = answering(OK.replace(b"200 OK", b"500 No"))
    assert await told(gate.port, "nameless") == (500, "unknown", "")
