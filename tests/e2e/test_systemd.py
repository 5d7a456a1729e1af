"""Notices to systemd and sockets from it, with a real datagram socket and real inherited sockets."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from oncegate.server import systemd
from tests.e2e.test_workers import Load, workers
from tests.parts import OK, Proxy, answering, ask, request, until


class Manager:
    """The side of systemd: what it was told, in order."""

    def __init__(self, folder: str) -> None:
        self.address = f"{folder}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(self.address)
        self._notices: list[list[str]] = []

    @property
    def notices(self) -> list[list[str]]:
        while True:
            try:
                self._notices.append(self._socket.recv(4096).decode().splitlines())
            except BlockingIOError:
                return self._notices

    def first_words(self) -> list[str]:
        return [lines[0] for lines in self.notices if lines[0] != "WATCHDOG=1"]

    def pings(self) -> int:
        return self.notices.count(["WATCHDOG=1"])

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(monkeypatch) -> Iterator[Manager]:
    with tempfile.TemporaryDirectory() as folder:
        manager = Manager(folder)
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        yield manager
        manager.close()


@pytest.mark.parametrize("count", [1, 2])
async def test_systemd_is_told(proxies, upstream, valkey, manager, monkeypatch, count):
    """READY once it serves, RELOADING and READY around a reload, STOPPING; pings while the event loop runs."""
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    proxy = proxies(upstream, valkey.url, WORKERS=count)
    await until(manager.first_words)
    assert manager.notices[0] == ["READY=1", "STATUS=serving"]
    before = time.monotonic_ns() // 1000
    proxy.signal(signal.SIGHUP)
    await until(lambda: len(manager.first_words()) == 3)
    assert manager.first_words() == ["READY=1", "RELOADING=1", "READY=1"]
    (reloading,) = [lines for lines in manager.notices if lines[0] == "RELOADING=1"]
    assert before <= int(reloading[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000

    seen = manager.pings()
    await until(lambda: manager.pings() > seen + 2)
    proxy.signal(signal.SIGSTOP)
    await asyncio.sleep(0.3)
    seen = manager.pings()
    await asyncio.sleep(0.5)
    assert manager.pings() == seen, "nothing pings for a process that hangs"
    proxy.signal(signal.SIGCONT)
    for pid in workers(proxy):
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert await asyncio.to_thread(proxy.stop) == 0
    assert manager.first_words()[3:] == ["STOPPING=1"]


async def test_a_manager_that_is_gone_stops_nothing(proxies, upstream, valkey, manager):
    """Nobody reads the socket any more: the log says so, and the proxy serves."""
    manager.close()
    os.unlink(manager.address)
    proxy = proxies(upstream, valkey.url)
    assert (await ask(proxy.port, request())).status == 200
    assert {line["notice"] for line in proxy.events("systemd not told")} == {"READY=1"}
    assert await asyncio.to_thread(proxy.stop) == 0


# Sockets ...

# What systemd does between fork and exec: the sockets from descriptor 3 on, and whom they are for.
ACTIVATE = """
import fcntl, os, sys
given = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 100) for one in sys.argv[1].split(",")]
for number, one in enumerate(given):
    os.dup2(one, 3 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(given)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.executable, [sys.executable, "-m", "oncegate", "serve"])
"""


class Activated(Proxy):
    """A proxy that gets its listening sockets."""

    def __init__(self, upstream: str, store_url: str, folder: Path, sockets: dict[str, socket.socket], **more) -> None:
        super().__init__(upstream, store_url, folder, more)
        self._sockets = sockets

    def _spawn(self) -> None:
        numbers = [one.fileno() for one in self._sockets.values()]
        command = [sys.executable, "-c", ACTIVATE, ",".join(map(str, numbers)), ":".join(self._sockets)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self._env, stderr=log, stdout=log, cwd=self.folder, pass_fds=numbers
            )


@pytest.fixture
def listeners() -> Iterator[dict[str, socket.socket]]:
    sockets = {name: socket.create_server(("127.0.0.1", 0), backlog=512) for name in ("public", "admin")}
    yield sockets
    for one in sockets.values():
        one.close()


@pytest.fixture
def activated(valkey, tmp_path, upstream) -> Iterator[Callable[..., Awaitable[Activated]]]:
    """Start proxies with sockets: `await activated(sockets, WORKERS=2)`; all end with the test."""
    started: list[Activated] = []

    async def start(sockets: dict[str, socket.socket], **more: object) -> Activated:
        started.append(proxy := Activated(upstream.url, valkey.url, tmp_path, sockets, **more))
        await asyncio.to_thread(proxy.start)
        return proxy

    yield start
    for proxy in started:
        proxy.close()


@pytest.mark.parametrize("count", [1, 2])
async def test_no_connection_is_refused_across_a_restart(upstream, activated, listeners, count):
    """The sockets outlive the process: who connects before it starts, or while it restarts, is served later."""
    upstream.script = answering(OK, 0.002)
    port, admin_port = (one.getsockname()[1] for one in listeners.values())
    load = Load(port, 3)
    try:
        proxy = await activated(listeners, WORKERS=count, ACCESS_LOG="off")
        assert (proxy.port, proxy.admin_port) == (port, admin_port)
        assert proxy.admin("/healthz")[0] == 200
        await until(lambda: load.answered > 20, 30)
        assert await asyncio.to_thread(proxy.stop) == 0
        await activated(listeners, WORKERS=count)
    finally:
        await asyncio.wait_for(load.end(), 20)
    assert load.broken == {}


def test_a_socket_of_another_kind_is_refused(monkeypatch, tmp_path):
    """Clients are told apart by their addresses, which a Unix socket does not have; and it has to listen."""
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as silent, socket.socket(type=socket.SOCK_DGRAM) as udp:
        unix.bind(tempfile.mktemp(dir=tempfile.gettempdir()))
        unix.listen()
        for one in (unix, silent, udp):
            monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", os.dup(one.fileno()))
            environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
            with pytest.raises(OSError, match="does not listen on TCP"):
                systemd.Systemd(environment, None)
        os.unlink(unix.getsockname())


@pytest.mark.parametrize(
    ("names", "count", "roles"),
    [
        (["public", "admin"], 2, ["public", "admin"]),
        (["admin", "public", "public"], 3, ["admin", "public", "public"]),
        (["oncegate.socket"], 1, ["public"]),
        (["unknown"], 1, ["public"]),
        ([""], 1, ["public"]),
        (["admin"], 1, ["admin"]),
        (["admin", "admin"], 2, None),
        (["oncegate.socket", "admin"], 2, None),
        (["public"], 2, None),
        ([""], 2, None),
    ],
)
def test_the_names_of_sockets(names, count, roles):
    if roles is None:
        with pytest.raises(OSError, match="FileDescriptorName"):
            systemd._roles(names, count)
    else:
        assert systemd._roles(names, count) == roles


def test_sockets_of_another_process_are_not_taken():
    """The variables are taken out of the environment all the same."""
    environment = {
        "LISTEN_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "x",
        "WATCHDOG_USEC": "5",
        "WATCHDOG_PID": "1",
    }
    given = systemd.Systemd(environment, None)
    assert (given.public, given.admin, given._ping_s, environment) == ([], None, 0.0, {})
