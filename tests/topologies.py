"""Stores of several real servers: a master with replicas watched by sentinels, and a cluster.

They start in a moment because their configuration is written as if they had known each other for long.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import RedisError
from redis.retry import Retry

from loadtest.ports import free_ports
from oncegate.server.embedded import find_server
from tests.probes import fields_of

SERVICE = "orders"
DOWN_AFTER_MS = 1000  # for a sentinel to call a server down
NODE_TIMEOUT_MS = 1000  # for the servers of a cluster
START_S = 20  # for a cluster to be in sync; it takes less than a second on an idle machine
OPTIONS = ("--save", "", "--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0")
FAST_REPLICAS = ("--repl-timeout", "5", "--repl-ping-replica-period", "1")


SETTINGS = Path(__file__).parent.parent / "docs/reference/settings.md"
# The user that this page shows: what it may do is enough.
ACL = re.search(r"^user oncegate on >PASSWORD .*$", SETTINGS.read_text(), re.MULTILINE)[0]  # type: ignore[index]


def wait_for(condition: Callable[[], Any], seconds: float = 40, what: str = "it") -> None:
    """Wait until something holds; servers that do not answer yet count as that it does not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (RedisError, OSError):
            pass
        assert time.monotonic() < deadline, f"{what} did not come about in time"
        time.sleep(0.02)


class Server:
    """One real server on a port of loopback, with these arguments and lines of its configuration file."""

    def __init__(self, port: int, *arguments: str, config: str = "", nodes: str = "") -> None:
        self.port = port
        self.dir = Path(tempfile.mkdtemp(prefix="vk"))
        (self.dir / "server.conf").write_text(config)
        if nodes:
            (self.dir / "nodes.conf").write_text(nodes)
        self.credentials: dict[str, Any] = {}
        self._command = [str(find_server()), "server.conf", "--port", str(port), *arguments]
        self.start()

    def start(self) -> None:
        with (self.dir / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=self.dir, stdout=log, stderr=log)

    def client(self) -> Redis:
        return Redis(port=self.port, socket_timeout=2, retry=Retry(NoBackoff(), 0), **self.credentials)

    def ask(self, *words: Any) -> Any:
        with self.client() as client:
            return client.execute_command(*words)

    def info(self, section: str = "replication") -> dict[str, Any]:
        with self.client() as client:
            return client.info(section)  # type: ignore[no-any-return]

    def log(self) -> str:
        return (self.dir / "log").read_text(errors="replace")

    def records(self) -> dict[bytes, dict[bytes, bytes]]:
        with self.client() as client:
            names = [name for name in client.scan_iter("once:{*") if not name.endswith(b":readers")]
            return {name: {part.encode(): value for part, value in fields_of(client, name).items()} for name in names}

    def forget_replicas(self) -> None:
        """Cut the links to replicas, whose kernels would else deliver what they have not read yet."""
        self.ask("CLIENT", "KILL", "TYPE", "replica")

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        if self.runs:
            self.resume()
            self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)


def replicated(master: Server, replicas: int) -> bool:
    """Return whether so many replicas have everything that a master has."""
    with master.client() as client:
        client.execute_command("PUBLISH", "mark", "")  # WAIT is about the last write of its own connection
        return client.wait(replicas, 1000) >= replicas  # type: ignore[no-any-return]


class NotInSync(Exception):
    """The servers of a topology did not find each other: one may have lost its port to another program."""


def start_anew(start: Callable[[], None], servers: Callable[[], Iterable[Server]]) -> None:
    """Start a topology, and if its servers do not find each other, once more on other ports."""
    for left in (2, 1, 0):
        try:
            start()
        except BaseException as error:
            logs = [f"port {server.port}, runs: {server.runs}\n{server.log()[-2000:]}" for server in servers()]
            for server in servers():
                server.close()
            if not (left and isinstance(error, AssertionError)):
                raise NotInSync("\n".join(logs)) from error
        else:
            return


class Sentineled:
    """A master, replicas of it, and three sentinels that agree by two. `config` is for every server, `password`
    what the sentinels and replicas need to know of it."""

    def __init__(
        self, *arguments: str, replicas: int = 2, config: str = "", password: str = "", sentinel_password: str = ""
    ) -> None:
        self._arguments, self._config, self._password = arguments, config, password
        self.servers: list[Server] = []
        self.sentinels: list[Server] = []
        start_anew(lambda: self._start(1 + replicas, sentinel_password), lambda: (*self.sentinels, *self.servers))

    def _start(self, size: int, sentinel_password: str) -> None:
        self.servers, self.sentinels = [], []
        ports = free_ports(size + 3)
        ports, self.sentinel_ports = ports[:size], ports[size:]
        for port in ports:
            replicaof = ("--replicaof", f"127.0.0.1 {ports[0]}") if self.servers else ()
            options = (*OPTIONS, *FAST_REPLICAS, *replicaof, *self._arguments)
            self.servers.append(Server(port, *options, config=self._config))
            self.servers[-1].credentials = {"password": self._password} if self._password else {}
        ids = {port: secrets.token_hex(20) for port in self.sentinel_ports}
        for port in self.sentinel_ports:
            config = self._sentinel_config(port, ports, ids)
            if sentinel_password:
                config += f"requirepass {sentinel_password}\n"
            self.sentinels.append(Server(port, "--sentinel", config=config))
            self.sentinels[-1].credentials = {"password": sentinel_password} if sentinel_password else {}
        self.wait_in_sync()

    def _sentinel_config(self, port: int, ports: Sequence[int], ids: dict[int, str]) -> str:
        lines = [
            f"sentinel myid {ids[port]}",
            f"sentinel monitor {SERVICE} 127.0.0.1 {ports[0]} 2",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {SERVICE} 1000",
            *([f"sentinel auth-pass {SERVICE} {self._password}"] if self._password else []),
            *(f"sentinel known-replica {SERVICE} 127.0.0.1 {replica}" for replica in ports[1:]),
            *(f"sentinel known-sentinel {SERVICE} 127.0.0.1 {other} {ids[other]}" for other in ids if other != port),
        ]
        return "\n".join(lines) + "\n"

    @property
    def places(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)

    @property
    def url(self) -> str:
        return f"redis+sentinel://{self.places}/{SERVICE}"

    @property
    def master(self) -> Server:
        """The server that says it is the master; of two, the one that the most sentinels name."""
        named = [sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1] for sentinel in self.sentinels]
        port = int(max(named, key=named.count))
        return next(server for server in self.servers if server.port == port)

    @property
    def replicas(self) -> list[Server]:
        master = self.master
        return [server for server in self.servers if server is not master]

    def wait_in_sync(self) -> None:
        """Wait until every server that runs follows the master, and each sentinel is ready for a failover."""
        wait_for(lambda: self._in_sync(self.master), what="a master with its replicas in sync")
        wait_for(lambda: all(sentinel.ask("SENTINEL", "CKQUORUM", SERVICE) for sentinel in self.sentinels))

    def _in_sync(self, master: Server) -> bool:
        info = master.info()
        online = [info[name]["state"] == "online" for name in info if name.startswith("slave") and name[5:].isdigit()]
        return info["role"] == "master" and len(online) == len(self.servers) - 1 and all(online)

    def wait_replicated(self) -> None:
        """Wait until the replicas have everything."""
        wait_for(lambda: replicated(self.master, len(self.servers) - 1), what="what was written on every replica")

    def wait_failed_over(self, before: Server) -> Server:
        """Wait until another server is the master, and return it."""
        wait_for(lambda: self.master is not before and self.master.info()["role"] == "master", what="a failover")
        return self.master

    def close(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.close()


class Clustered:
    """Masters with a part of the slots each, and as many replicas of each. `options(port)` are more for each."""

    def __init__(
        self, *arguments: str, masters: int = 3, replicas: int = 1, config: str = "", password: str = ""
    ) -> None:
        self.ids = [secrets.token_hex(20) for _ in range(masters * (1 + replicas))]
        self.servers: list[Server] = []
        start_anew(lambda: self._start(arguments, masters, config, password), lambda: self.servers)

    def _start(self, arguments: Iterable[str], masters: int, config: str, password: str) -> None:
        self.servers = []
        ports = free_ports(2 * len(self.ids))
        ports, buses = ports[: len(self.ids)], ports[len(self.ids) :]
        for number, port in enumerate(ports):
            nodes = [self._line(other, number, masters, ports, buses) for other in range(len(ports))]
            nodes.append(f"vars currentEpoch {masters} lastVoteEpoch 0\n")
            options = (
                *("--cluster-enabled", "yes", "--cluster-port", str(buses[number])),
                *("--cluster-config-file", "nodes.conf", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
                *("--cluster-replica-validity-factor", "0"),  # a failover soon after the start is fine
            )
            every = (*options, *OPTIONS, *FAST_REPLICAS, *arguments)
            self.servers.append(Server(port, *every, config=config, nodes="\n".join(nodes)))
            self.servers[-1].credentials = {"password": password} if password else {}
        wait_for(self.in_sync, START_S, what="a cluster in sync")

    def _line(self, other: int, number: int, masters: int, ports: list[int], buses: list[int]) -> str:
        """Return what a server's nodes.conf says of another, or of itself."""
        first, end = (part * 16384 // masters for part in (other, other + 1))
        myself = "myself," if other == number else ""
        role, slots = (
            ("master -", f" {first}-{end - 1}") if other < masters else (f"slave {self.ids[other % masters]}", "")
        )
        # As servers of today write it: each is told its shard.
        shard = f"{other % masters:040x}"
        place, epoch = f"127.0.0.1:{ports[other]}@{buses[other]},,shard-id={shard}", other % masters + 1
        return f"{self.ids[other]} {place} {myself}{role} 0 0 {epoch} connected{slots}"

    def in_sync(self) -> bool:
        """Return whether every server serves, and every replica follows."""
        for server in self.servers:
            info = server.info()
            if b"cluster_state:ok" not in server.ask("CLUSTER", "INFO"):
                return False
            if info["role"] == "slave" and info["master_link_status"] != "up":
                return False
        return True

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:2])

    def master_of(self, name: bytes) -> Server:
        """Return the server that has the slot of a name now, as the servers that run agree."""
        return self.owner_of_slot(key_slot(name))

    def owner_of_slot(self, slot: int) -> Server:
        for asked in (server for server in self.servers if server.runs):
            try:
                slots = asked.ask("CLUSTER", "SLOTS")
            except (RedisError, OSError):
                continue
            for first, last, owner, *_ in slots:
                if first <= slot <= last:
                    return next(server for server in self.servers if server.port == owner[1])
        raise AssertionError(f"nobody has slot {slot}")

    def replica_of(self, master: Server) -> Server:
        for server in self.servers:
            if server.runs and server is not master:
                info = server.info()
                if info["role"] == "slave" and info["master_port"] == master.port:
                    return server
        raise AssertionError("no replica")

    def id_of(self, server: Server) -> str:
        return self.ids[self.servers.index(server)]

    def move(self, slot: int, target: Server) -> None:
        """Move one slot with its keys, as an operator's tool does."""
        source = self.owner_of_slot(slot)
        if source is target:
            return
        self.begin_move(slot, source, target)
        self.carry(slot, source, target)
        self.end_move(slot, source, target)

    def begin_move(self, slot: int, source: Server, target: Server) -> None:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))

    def carry(self, slot: int, source: Server, target: Server) -> None:
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)

    def end_move(self, slot: int, source: Server, target: Server) -> None:
        for server in (target, source):
            server.ask("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def close(self) -> None:
        for server in self.servers:
            server.close()
