"""The PostgreSQL servers of the demo and of the tests: they start, crash, fail over, and leave nothing behind."""

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from oncegate.server.embedded_postgres import EmbeddedPostgresError, executable_in
from tests.postgres_server import ROOT, Cluster, Server, sweep, wait_for

SHARES = "from tests.postgres_server import shared_url; print(shared_url(), flush=True); input()"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server.started()
    yield server
    server.close()


@pytest.fixture
def users(folder: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """Three processes of one test run that use its server until their input ends."""
    env = os.environ | {"PYTEST_XDIST_TESTRUNUID": "run", "TMPDIR": str(folder)}
    command = [sys.executable, "-c", SHARES]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    users = [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for _ in range(3)]
    yield users
    for one in users:
        one.kill()
        one.communicate(timeout=20)


def answers(url: str) -> bool:
    """Return whether the server says something to a request for TLS, which it does before it asks who we are."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
            connection.sendall(struct.pack("!II", 8, 80877103))
            return connection.recv(1) != b""
    except OSError:
        return False


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that others may enter; those of pytest are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_run_has_one_server(users: list["subprocess.Popen[str]"], folder: Path) -> None:
    """Processes of a run that ask at once get one server. It ends with the last of them, also when that is killed."""
    (url,) = {one.stdout.readline().strip() for one in users if one.stdout}
    users[0].communicate("\n", timeout=20)
    users[1].kill()
    users[1].communicate(timeout=20)
    assert answers(url)
    users[2].kill()
    users[2].communicate(timeout=20)
    wait_for(lambda: not any(folder.iterdir()), "the end of the server")
    assert not answers(url)


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    """The next run removes it, and nothing of processes that live."""
    process = subprocess.Popen(["true"])
    process.wait()
    left, live = (folder / f"oncegate-postgres-{pid}-x" for pid in (process.pid, os.getpid()))
    left.mkdir()
    live.mkdir()
    sweep(folder)
    assert list(folder.iterdir()) == [live]


def test_crashes(server: Server) -> None:
    """What was committed survives a kill and an immediate stop; a paused server answers nothing, and then goes on."""
    server.sql("CREATE TABLE kept (number int); INSERT INTO kept VALUES (7)")
    server.kill()
    assert not answers(server.url)
    server.start()
    server.stop(signal.SIGQUIT)
    server.start()
    server.pause()
    assert not answers(server.url)
    server.resume()
    assert server.sql("SELECT number FROM kept; SHOW fsync") == "7\non"


def test_options(server: Server) -> None:
    """A start has options of its own. A server that cannot start says why."""
    server.stop()
    server.start(work_mem="5MB")
    assert server.sql("SHOW work_mem") == "5MB"
    server.stop()
    with pytest.raises(EmbeddedPostgresError, match='unrecognized configuration parameter "no_such"'):
        server.start(no_such="1")
    server.close()
    assert not server.folder.exists()


def test_failover() -> None:
    """A standby has what its primary confirmed. Promoted, it writes on a new timeline, and the old one rejoins."""
    cluster = Cluster()
    try:
        old = cluster.primary
        old.sql("CREATE TABLE kept (number int); INSERT INTO kept VALUES (7)")
        old.pause()
        new = cluster.promote()
        new.sql("INSERT INTO kept VALUES (8)")
        assert new.sql("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)") == "00000002"
        cluster.rejoin(old)
        cluster.wait_for_standbys("FIRST 1 (s0, s1)")
        new.sql("INSERT INTO kept VALUES (9)")
        wait_for(lambda: old.sql("SELECT sum(number) FROM kept") == "24", "the last row on the standby")
        assert not old.is_primary
    finally:
        cluster.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="runs the programs as another account")
def test_programs_out_of_reach(folder: Path) -> None:
    """Programs in a folder that their account may not enter are copied."""
    closed = folder / "closed"
    programs = closed / "bin"
    programs.mkdir(parents=True)
    (programs / "postgres").symlink_to("/bin/true")
    assert executable_in(programs, folder / "copy") == programs
    closed.chmod(0o700)
    assert executable_in(programs, folder / "copy") == folder / "copy/programs/bin"
    assert (folder / "copy/programs/bin/postgres").exists()
