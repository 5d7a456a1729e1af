"""One real PostgreSQL server for a whole test run. Servers that may be killed: `loadtest.postgres_server`.

`shared_url()` is the server of the run: the first process that asks starts it, all processes of the run find it, and it
ends when the last of them has ended, however it ended.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from loadtest.postgres_server import DEADLINE_S, Cluster, Server, wait_for
from oncegate.server.embedded_postgres import EmbeddedPostgresError

__all__ = ["DEADLINE_S", "ROOT", "Cluster", "Server", "shared_url", "wait_for"]

ROOT = Path(__file__).parent.parent


# The server of the test run ...


def shared_url() -> str:
    """Return the URL of the superuser on the run's server; start the server if it does not run yet."""
    global _shared
    if _shared is None:
        _shared = _Shared()
    return _shared.url


class _Shared:
    """This process's hold on the server of the run.

    Each process that uses the server holds a shared flock on one file. The server's keeper waits for the exclusive
    lock, which the kernel grants when the last holder has ended, and stops the server. A record lock on the same file
    (fcntl(2): the two kinds do not know each other) makes that only one process starts the keeper.
    """

    def __init__(self) -> None:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or os.getpid()
        path = Path(tempfile.gettempdir()) / f"oncegate-postgres-{run}.users"
        self._file = _locked(path, fcntl.LOCK_SH)
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        if not os.pread(self._file, 1, 0):
            keeper = [sys.executable, "-m", "tests.postgres_server", str(path)]
            # It outlives this process, and so holds none of its pipes.
            quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            self._keeper = subprocess.Popen(keeper, cwd=ROOT, start_new_session=True, **quiet)
            wait_for(lambda: os.pread(self._file, 1, 0) or self._keeper.poll() is not None, "the server")
        fcntl.lockf(self._file, fcntl.LOCK_UN)
        self.url = os.pread(self._file, 10_000, 0).decode()
        assert self.url.startswith("postgresql:"), f"the server of the run did not start: {self.url}"


_shared: _Shared | None = None


def _locked(path: Path, kind: int) -> int:
    """Return a descriptor of the file at `path` that holds the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, kind)
        # A keeper that ended meanwhile has removed this file; others will look for a new one.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)


def sweep(folder: Path) -> None:
    """Remove the folders of servers whose process was killed: the kernel stops a server then, but removes no files."""
    for left in folder.glob("oncegate-postgres-*-*"):
        if not Path(f"/proc/{left.name.split('-')[2]}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _keep(path: Path) -> None:
    """Start a server, write its URL into the file, and stop the server when nobody holds the file's lock."""
    sweep(path.parent)
    server = Server()
    try:
        server.create()
        server.start()
        path.write_text(server.url)
    except EmbeddedPostgresError as error:
        path.write_text(str(error))
    try:
        _locked(path, fcntl.LOCK_EX)
        path.unlink()
    finally:
        server.close()


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
