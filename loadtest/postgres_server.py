"""Real PostgreSQL servers that may be paused, killed, copied and promoted."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from loadtest.ports import free_port
from oncegate.server.embedded_postgres import SUPERUSER, EmbeddedPostgres, EmbeddedPostgresError

DEADLINE_S = 40
# The programs of another PostgreSQL than the one of the wheel: TEST_POSTGRES=/usr/lib/postgresql/15/bin
PROGRAMS = Path(os.environ["TEST_POSTGRES"]) if "TEST_POSTGRES" in os.environ else None
# A server of tests has many small schemas, and tests of many processes.
OPTIONS = {
    "fsync": "on",
    "max_connections": "200",
    "max_locks_per_transaction": "512",
    "shared_buffers": "64MB",
    "jit": "off",
    "log_line_prefix": "%m [%p] %u@%d/%a ",
}
REPLICATION = {"wal_keep_size": "256MB", "wal_retrieve_retry_interval": "100ms", "wal_receiver_status_interval": "1s"}


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until something holds. A server that does not answer yet counts as that it does not."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with suppress(EmbeddedPostgresError):
            if condition():
                return
        assert time.monotonic() < deadline, f"{what} did not come about in time"
        time.sleep(0.01)


class Server(EmbeddedPostgres):
    """A server that a test may pause, kill and copy."""

    def __init__(
        self, options: Mapping[str, str] | None = None, *, name: str = "", programs: Path | None = None
    ) -> None:
        super().__init__(free_port(), OPTIONS | {"cluster_name": name} | dict(options or {}), programs or PROGRAMS)
        self.name = name

    @classmethod
    def started(cls, options: Mapping[str, str] | None = None, *, programs: Path | None = None) -> "Server":
        """Return a new server that runs."""
        server = cls(options, programs=programs)
        server.create()
        server.start()
        return server

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Return the rows of a statement: one a line, with | between the columns. Raises EmbeddedPostgresError."""
        place = ("--host=127.0.0.1", f"--port={self.port}", f"--username={SUPERUSER}", f"--dbname={database}")
        command = [str(self.programs / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", *place, "-c", statement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        if done.returncode:
            raise EmbeddedPostgresError(done.stderr)
        return str(done.stdout).rstrip("\n")

    def copy(self, other: "Server", *arguments: str) -> None:
        """Make its files a copy of those of a running server (pg_basebackup)."""
        source = f"host=127.0.0.1 port={other.port} user={SUPERUSER}"
        shutil.rmtree(self.data, ignore_errors=True)
        self.run("pg_basebackup", "--dbname", source, "--checkpoint", "fast", "--no-sync", *arguments)

    @property
    def is_primary(self) -> bool:
        return self.sql("SELECT pg_is_in_recovery()") == "f"

    # What happens to servers ...

    def pause(self) -> None:
        """Stop all its processes in their tracks, until `resume`, `kill` or `close`."""
        assert self.process is not None
        # The first process is stopped first, so that it starts no others meanwhile.
        os.kill(self.process.pid, signal.SIGSTOP)
        self._signal_children(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self._signal_children(signal.SIGCONT)
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill all its processes, and wait until they are gone: a new server refuses to start beside one of them."""
        if self.process is None or self.process.poll() is not None:
            return
        os.kill(self.process.pid, signal.SIGSTOP)
        children = self._signal_children(signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not any(map(_is_alive, children)), "the end of the server's processes")

    def close(self) -> None:
        self.kill()
        super().close()

    def _signal_children(self, number: signal.Signals) -> list[int]:
        assert self.process is not None
        pid = self.process.pid
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, number)
        return children


def _is_alive(pid: int) -> bool:
    try:
        # A process whose parent waits for nobody stays as a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Cluster:
    """A primary with standbys that it waits for. `names`: synchronous_standby_names, empty for none.

    The servers are called s0, s1, …; the first is the primary until `promote`.
    """

    def __init__(
        self, standbys: int = 1, names: str | None = None, options: Mapping[str, str] | None = None, *,
        programs: Path | None = None,
    ) -> None:  # fmt: skip
        everybody = [f"s{number}" for number in range(standbys + 1)]
        self.servers = [Server(REPLICATION | dict(options or {}), name=one, programs=programs) for one in everybody]
        try:
            self._start(f"FIRST 1 ({', '.join(everybody)})" if names is None else names)
        except BaseException:
            self.close()
            raise

    def _start(self, names: str) -> None:
        self.primary = self.servers[0]
        self.primary.create()
        self.primary.start()
        for standby in self.servers[1:]:
            self._follow(standby)
        wait_for(lambda: self._streaming() == len(self.servers) - 1, "replication")
        self.wait_for_standbys(names)

    @property
    def url(self) -> str:
        """The URL of all servers, the first one first, whichever is the primary."""
        return f"postgresql://{SUPERUSER}@{','.join(f'127.0.0.1:{server.port}' for server in self.servers)}/postgres"

    @property
    def standbys(self) -> list[Server]:
        return [server for server in self.servers if server is not self.primary]

    def wait_for_standbys(self, names: str) -> None:
        """Set synchronous_standby_names on the primary, and wait until it counts."""
        self.primary.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        self.primary.sql("SELECT pg_reload_conf()")
        states = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"
        wait_for(lambda: (self.primary.sql(states) != "0") == bool(names), "the synchronous standby")

    def promote(self, standby: Server | None = None, *, names: str = "") -> Server:
        """Make a standby the primary, whatever the old one does; return it. It waits for the standbys of `names`."""
        promoted = standby or self.standbys[0]
        # A standby inherits the setting with the files: without this it would wait for standbys that never come.
        with (promoted.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"synchronous_standby_names = '{names}'\n")
        promoted.sql("SELECT pg_reload_conf()")
        promoted.sql(f"SELECT pg_promote(true, {DEADLINE_S})")
        wait_for(lambda: promoted.is_primary, "the promotion")
        self.primary = promoted
        return promoted

    def rejoin(self, server: Server) -> None:
        """Make a server a standby of today's primary, with nothing left of what it had."""
        server.kill()
        before = self._streaming()
        self._follow(server)
        wait_for(lambda: self._streaming() > before, "replication")

    def _follow(self, standby: Server) -> None:
        standby.copy(self.primary, "--write-recovery-conf")
        standby.start()

    def _streaming(self) -> int:
        return int(self.primary.sql("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"))

    def close(self) -> None:
        for server in self.servers:
            server.close()
