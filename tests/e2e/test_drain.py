"""`oncegate drain`: clients move on, and requests are served until SIGTERM, in both directions of a sidecar."""

import asyncio
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from oncegate.commands import drain
from oncegate.settings.settings import Settings
from tests.e2e.test_workers import workers
from tests.parts import OK, ROOT, RawClient, answering, ask, request, until
from tests.wire_client import keyed, read


@pytest.fixture
def run_dir() -> Path:
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def settings(run_dir: Path | None, store_url: str = "redis://redis") -> Settings:
    return Settings(upstream="http://127.0.0.1:9", store_url=store_url, run_dir=run_dir)


@pytest.mark.parametrize("count", [1, 2])
async def test_clients_move_on_and_requests_are_served(proxies, upstream, valkey, run_dir, capsys, count):
    """Not ready; each connection ends with its next answer; new ones are served, until SIGTERM. Twice is as once."""
    proxy = proxies(upstream, valkey.url, WORKERS=count, RUN_DIR=run_dir)
    assert stat.S_IMODE((run_dir / "control.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    kept = [await RawClient.open(proxy.port) for _ in range(6)]
    for number, client in enumerate(kept):
        assert (await client.ask(request(key=f"a{number}"))).header("connection") is None
    for _ in range(2):
        assert await asyncio.to_thread(drain.run, settings(run_dir), 0) == 0
        assert capsys.readouterr().out == "draining: 0 requests in flight, 6 connections open\n"
    status, text = proxy.admin("/readyz")
    assert (status, "the proxy is draining" in text) == (503, True)
    assert proxy.admin("/healthz")[0] == 200
    if count > 1:
        os.kill(workers(proxy)[0], signal.SIGKILL)
        await until(lambda: len(proxy.events("worker started")) == 3, 30)
        await until(lambda: "does not" not in proxy.admin("/readyz")[1], 30)
        proxy.signal(signal.SIGUSR2)
        await until(lambda: proxy.events("workers not replaced"))
    for number in range(20):
        answer = await ask(proxy.port, request(key=f"b{number}"))
        assert (answer.status, answer.header("connection")) == (200, b"close")
    if count == 1:
        # The others ended with the worker that was killed, or go on as these.
        for number, client in enumerate(kept):
            answer = await client.ask(request(key=f"c{number}"))
            assert (answer.status, answer.header("connection")) == (200, b"close")
    for client in kept:
        client.close()
    assert len(proxy.events("draining")) == 1
    # A worker was killed.
    assert await asyncio.to_thread(proxy.stop) == (count > 1)
    assert not (run_dir / "control.sock").exists()


async def test_the_wait_ends_with_the_proxy(proxies, upstream, valkey, run_dir, capsys):
    """`--wait` returns when the proxy ends, long before its time."""
    proxy = proxies(upstream, valkey.url, RUN_DIR=run_dir)
    waiting = asyncio.create_task(asyncio.to_thread(drain.run, settings(run_dir), 600))
    await until(lambda: proxy.events("draining"))
    assert not waiting.done()
    assert await asyncio.to_thread(proxy.stop) == 0
    assert await asyncio.wait_for(waiting, 10) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["the proxy has ended"]


async def test_a_folder_has_one_proxy(proxies, upstream, valkey, run_dir, capsys):
    """A second proxy with the same folder cannot start. What a killed one left behind is replaced."""
    first = proxies(upstream, valkey.url, RUN_DIR=run_dir)
    with pytest.raises(AssertionError, match="did not start"):
        proxies(upstream, valkey.url, RUN_DIR=run_dir)
    assert "each needs a folder of its own" in capsys.readouterr().out + last_log(first.folder)
    first.kill()
    assert await asyncio.to_thread(drain.run, settings(run_dir), 0) == 1
    assert "no proxy answers at" in capsys.readouterr().err
    second = proxies(upstream, valkey.url, RUN_DIR=run_dir)
    assert await asyncio.to_thread(drain.run, settings(run_dir), 0) == 0
    assert await asyncio.to_thread(second.stop) == 0


def last_log(folder: Path) -> str:
    return max(folder.glob("proxy-*.log"), key=lambda path: path.stat().st_mtime).read_text()


async def test_the_embedded_stores_folder_has_the_socket(proxies, upstream):
    """With the embedded store no setting is needed; a strange command is refused."""
    proxy = proxies(upstream)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(proxy.folder / "data" / "control.sock"))
        connection.sendall(b"stop\n")
        assert connection.recv(100) == b'{"error": "the command is unknown"}\n'
    assert proxy.admin("/readyz")[0] == 200
    assert await asyncio.to_thread(proxy.stop) == 0


def test_without_a_folder_the_command_says_what_to_set(capsys):
    assert drain.run(settings(None), 0) == 1
    assert capsys.readouterr().err.startswith("ONCEGATE_RUN_DIR: is not set")


# A sidecar ...


class Clients:
    """Clients of a service with this pod behind it: they keep connections, and open no new one once it has left."""

    def __init__(self, port: int, count: int) -> None:
        self.port, self.has_left, self.answers = port, False, Counter[str]()
        self.sent: list[str] = []
        self._tasks = [asyncio.ensure_future(self._run(number)) for number in range(count)]

    async def _run(self, number: int) -> None:
        while not self.has_left:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            fields: dict[str, str] = {}
            # A balancer that has seen the endpoint go sends nothing more on connections that it kept.
            while fields.get("connection") != "close" and not self.has_left:
                self.sent.append(name := f"c{number}-{len(self.sent)}")
                writer.write(keyed("/in", name))
                status, fields, _ = await read(reader)
                self.answers[f"{status} {fields.get('oncegate-status')}"] += 1
                await asyncio.sleep(random.uniform(0, 0.02))
            writer.close()

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)


async def end_of_pod(proxy, app, run_dir: Path, clients: Clients) -> None:
    """End a pod as the kubelet does: both preStop hooks at once, SIGTERM for the application, and last for the sidecar.

    The endpoint leaves the service at any moment before the application gets its SIGTERM.
    """
    hook = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "oncegate", "drain", "--wait", "0.3", env=proxy._env, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    await until(lambda: proxy.events("draining"), 30)
    await asyncio.sleep(random.uniform(0, 0.3))
    clients.has_left = True
    await clients.end()
    assert await hook.wait() == 0
    app.send_signal(signal.SIGTERM)
    assert await app.wait() == 0, "a call out of it failed"
    assert await asyncio.to_thread(proxy.stop) == 0


async def one_pod(proxies, upstream, valkey, folder: Path, workers: int) -> None:
    """Run a pod under load in both directions, end it, and count."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        app_port = free.getsockname()[1]
    run_dir = Path(tempfile.mkdtemp())
    rules = folder / "rules.toml"
    rules.write_text(f'[[rule]]\nname = "out"\npath = "/out"\nupstream = "{upstream.url}"\n')
    proxy = proxies(f"http://127.0.0.1:{app_port}", valkey.url, WORKERS=workers, RUN_DIR=run_dir, RULES_FILE=rules)
    app = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.sidecar_app", str(app_port), str(proxy.port)), cwd=ROOT, stdout=subprocess.PIPE
    )
    assert await app.stdout.readline() == b"serving\n"
    upstream.received.clear()
    valkey.forget()
    clients = Clients(proxy.port, 4)
    await asyncio.sleep(random.uniform(0.05, 0.3))
    await end_of_pod(proxy, app, run_dir, clients)
    assert set(clients.answers) == {"200 executed"}
    keys = Counter(one.header("Idempotency-Key")[0].decode() for one in upstream.received)
    assert keys == Counter(f"{name}-{suffix}" for name in clients.sent for suffix in ("out", "end"))
    assert set(valkey.states()) == {b"complete"}
    app._transport.close()


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_sidecar_loses_nothing(proxies, upstream, valkey, tmp_path, workers):
    """Every call into the application and out of it is executed once and answered; none becomes unknown."""
    upstream.script = answering(OK, 0.01)
    await one_pod(proxies, upstream, valkey, tmp_path, workers)


@pytest.mark.full
@pytest.mark.timeout(1200)
async def test_fifty_sidecars_lose_nothing(proxies, upstream, valkey, tmp_path):
    """The same fifty times, with one worker and with two in turn."""
    upstream.script = answering(OK, 0.01)
    for number in range(50):
        await one_pod(proxies, upstream, valkey, tmp_path, 1 + number % 2)
