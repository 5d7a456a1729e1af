"""The processes of a run: replicas of the proxy, a Redis, the upstream and the clients."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from redis import Redis
from redis.exceptions import RedisError

from loadtest.chaos.link import Link
from loadtest.chaos.plan import ASKED_RULE, EVENT_RULES, STOPPABLE_RULE
from loadtest.ports import free_port
from oncegate.server.embedded import find_server

ROOT = Path(__file__).parents[2]
START_S = 90.0


class Part:
    """One process that may be killed, suspended and restarted."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self.process: subprocess.Popen[bytes] | None = None
        self.incarnation = 0

    def _spawn(self, command: list[str], env: dict[str, str] | None = None, **pipes: Any) -> subprocess.Popen[bytes]:
        self.incarnation += 1
        self.log_path = self._folder / f"{self.name}-{self.incarnation}.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=ROOT, stderr=log, **{"stdin": subprocess.DEVNULL, "stdout": log, **pipes}
            )
        return self.process

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.alive:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.alive:
            self.process.kill()
            self.process.wait()

    async def ended(self, seconds: float) -> int | None:
        """Return its exit code, None while it runs."""
        until = time.monotonic() + seconds
        while self.alive and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return self.process.poll() if self.process is not None else None


class Replica(Part):
    """One proxy with a link on each of its sides, and one to each server of the store.

    `store_url`: the store's, with a place for the hosts. `primary`: to which of its servers `store_link` leads.
    """

    primary = 0

    def __init__(
        self, number: int, folder: Path, seed: int, upstream_port: int, store_url: str, store_ports: Sequence[int]
    ) -> None:
        super().__init__(f"proxy-{number}", folder)
        self.number = number
        self.port, self.admin_port = free_port(), free_port()
        self.client_link = Link(("127.0.0.1", self.port), seed * 100 + number)
        self.upstream_link = Link(("127.0.0.1", upstream_port), seed * 100 + 10 + number)
        self.store_links = [
            Link(("127.0.0.1", port), seed * 100 + 20 + 40 * place + number) for place, port in enumerate(store_ports)
        ]
        self._store_url = store_url

    @property
    def store_link(self) -> Link:
        return self.store_links[self.primary]

    @property
    def links(self) -> tuple[Link, ...]:
        return self.client_link, self.upstream_link, *self.store_links

    async def open(self) -> None:
        for link in self.links:
            await link.start()

    def start(self, settings: dict[str, object]) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
        env |= {
            "ONCEGATE_UPSTREAM": f"http://127.0.0.1:{self.upstream_link.port}",
            "ONCEGATE_STORE_URL": self._store_url.format(",".join(f"127.0.0.1:{one.port}" for one in self.store_links)),
            "ONCEGATE_LISTEN": f"127.0.0.1:{self.port}",
            "ONCEGATE_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            # The API itself answers.
            "ONCEGATE_RELEASE_STATUSES": "default,503+retry-after",
            "ONCEGATE_RULES_FILE": str(self._rules()),
            # For the addresses at which requests can be stopped.
            "ONCEGATE_SECRET": "the same on every replica of a run",
            **{f"ONCEGATE_{name}": str(value) for name, value in settings.items()},
        }
        self._settings = settings
        self._spawn([sys.executable, "-m", "oncegate", "serve"], env)

    def _rules(self) -> Path:
        """Write the rules for events, for what may be stopped and for what the API is asked; return their file."""
        path = self._folder / "rules.toml"
        path.write_text(EVENT_RULES + STOPPABLE_RULE + ASKED_RULE)
        return path

    def start_again(self) -> None:
        self.start(self._settings)

    async def serving(self) -> None:
        """Wait until it listens."""
        await until_open(self, self.port)

    async def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.kill()
        for link in self.links:
            await link.close()


class Store(Part):
    """A server that keeps every acknowledged write: each is on disk before its reply."""

    def __init__(self, name: str, folder: Path, options: tuple[str, ...] = ()) -> None:
        super().__init__(name, folder)
        self.port = free_port()
        self._dir = folder / name
        self._dir.mkdir()
        self._options = options

    def start(self, *more: str) -> None:
        options = {
            "--port": str(self.port), "--bind": "127.0.0.1", "--dir": str(self._dir), "--save": "",
            "--appendonly": "yes", "--appendfsync": "always", "--maxmemory-policy": "noeviction",
        }  # fmt: skip
        words = [word for pair in options.items() for word in pair]
        self._spawn([str(find_server()), *words, *self._options, *more])

    def client(self) -> Redis:
        return Redis(port=self.port, socket_timeout=1, socket_connect_timeout=1)

    async def serving(self) -> None:
        """Wait until it has loaded its data."""
        await until_open(self, self.port)
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            try:
                with self.client() as client:
                    client.ping()
                return
            except (RedisError, OSError):
                await asyncio.sleep(0.02)
        raise RuntimeError(f"{self.name} did not load")

    def forget(self) -> None:
        """Remove its data while it is down."""
        shutil.rmtree(self._dir)
        self._dir.mkdir()

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.kill()


class Upstream(Part):
    """The API. It has one port for each replica, so that its log can tell them apart."""

    def __init__(self, folder: Path, seed: int, replicas: int) -> None:
        super().__init__("upstream", folder)
        self.log = folder / "upstream.log"
        self._seed = seed
        self.ports = [free_port() for _ in range(replicas)]

    def start(self) -> None:
        words = [str(self.log), f"u{self.incarnation}", str(self._seed), *map(str, self.ports)]
        self._spawn([sys.executable, "-m", "loadtest.chaos.upstream", *words])

    async def serving(self) -> None:
        for port in self.ports:
            await until_open(self, port)


class ClientProcess(Part):
    """Clients in a process of their own."""

    attempts = operations = unfinished = 0

    def start(self, told: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "loadtest.chaos.client", json.dumps(told)]
        process = self._spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        out = process.stdout
        assert out is not None
        os.set_blocking(out.fileno(), False)
        asyncio.get_running_loop().add_reader(out, self._hear, out)

    def _hear(self, out: IO[bytes]) -> None:
        data = out.read()
        if not data:
            asyncio.get_running_loop().remove_reader(out)
            return
        words = data.splitlines()[-1].split()
        if len(words) == 3:
            self.attempts, self.operations, self.unfinished = map(int, words)

    def close(self) -> None:
        self.kill()
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    asyncio.get_running_loop().remove_reader(pipe)
                    pipe.close()

    def calm(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.write(b"calm\n")
            self.process.stdin.flush()


async def until_open(part: Part, port: int) -> None:
    """Wait until a process listens."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if not part.alive:
            raise RuntimeError(f"{part.name} ended: {part.log_path.read_text()[-2000:]}")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        return
    raise RuntimeError(f"{part.name} did not start")
