"""Debian's PostgreSQL, which is older than the one of the other tests, and PgBouncer in front of it."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from loadtest.ports import free_port
from loadtest.postgres_server import Server
from oncegate.server.embedded_postgres import SUPERUSER
from tests.parts import RawUpstream, ask, request, until
from tests.postgres_database import migrated
from tests.real.parts import INSTALLED
from tests.test_store_tls import Side

pytestmark = INSTALLED
ROOT = Path(__file__).parents[2]
PGBOUNCER = Path("/usr/sbin/pgbouncer")
# What depends on the version: the functions, the plans, HOT updates, what the server says of itself and its standbys.
SUITE = (
    *("test_store", "test_postgres_store", "test_postgres_plans", "test_postgres_primary", "test_postgres_sessions"),
    "test_migrations",
)
CONFIG = """
[databases]
* = host=127.0.0.1 port={server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = {mode}
default_pool_size = 20
"""


def debian_s() -> Path:
    """Return the programs of Debian's PostgreSQL."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server.started(programs=debian_s())
    asyncio.run(migrated(server.url, "oncegate"))
    yield server
    server.close()


@pytest.fixture
def pooled(server: Server, mode: str) -> Iterator[str]:
    """The URL of a PgBouncer in front of the server. It refuses to run as root, too."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "users").write_text('"postgres" ""\n')
        config = Path(folder) / "pgbouncer.ini"
        config.write_text(CONFIG.format(server=server.port, port=port, folder=folder, mode=mode))
        account = {"user": "nobody", "group": "nogroup", "extra_groups": ()} if os.geteuid() == 0 else {}
        process = subprocess.Popen([PGBOUNCER, "-q", config], **account)
        yield server.url.replace(f":{server.port}/", f":{port}/")
        process.kill()
        process.wait()


@pytest.mark.timeout(900)
def test_the_store_on_debian_s() -> None:
    """Each verb in each state, batches, plans, HOT updates, standbys and migrations are as on the newest version."""
    files = [f"tests/{name}.py" for name in SUITE]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TEST_POSTGRES": str(debian_s())}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-k", "postgres or migrations", *files]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-10_000:]
    print(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["transaction"])
async def test_a_pool_of_transactions_is_refused(server: Server, pooled: str, fork, upstream: RawUpstream) -> None:
    """The proxy is not ready, says why, and executes nothing."""
    proxy = await fork(upstream, pooled)
    await until(lambda: proxy.events("not ready"), 30)
    assert "pooler" in proxy.events("not ready")[-1]["reasons"][0]
    assert (await ask(proxy.port, request())).status == 503
    assert upstream.received == []


@pytest.mark.parametrize("mode", ["session"])
async def test_a_pool_of_sessions_works(server: Server, pooled: str, fork, upstream: RawUpstream) -> None:
    """The proxy executes and replays. Its sessions have their own settings, which the pool does not mix up."""
    proxy = await fork(upstream, pooled)
    await until(lambda: proxy.admin("/readyz")[0] == 200, 30)
    answers = [await ask(proxy.port, request()) for _ in range(2)]
    assert [answer.header("oncegate-status") for answer in answers] == [b"executed", b"replayed"]
    assert len(upstream.received) == 1


@pytest.fixture
def with_tls(tmp_path: Path) -> Iterator[tuple[Server, Side, Side]]:
    """A server that lets a role in by its certificate, and both sides of TLS. The server of the wheel has no TLS."""
    ours, theirs = Side(tmp_path, "client"), Side(tmp_path, "server")
    server = Server(programs=debian_s())
    server.create()
    for path in (theirs.cert, theirs.key, ours.ca):
        shutil.copy(path, server.data)
        # It refuses a key that others can read, and one of somebody else.
        (server.data / path.name).chmod(0o600)
        shutil.chown(server.data / path.name, (server.data / "pg_hba.conf").owner())
    (server.data / "pg_hba.conf").write_text(
        f"local all all trust\nhost all {SUPERUSER} 127.0.0.1/32 trust\nhostssl all client 127.0.0.1/32 cert\n"
    )
    files = f"ssl = on\nssl_cert_file = '{theirs.cert.name}'\nssl_key_file = '{theirs.key.name}'\n"
    with (server.data / "postgresql.conf").open("a") as config:
        config.write(f"{files}ssl_ca_file = '{ours.ca.name}'\n")
    server.start()
    yield server, ours, theirs
    server.close()


async def test_a_role_logs_in_with_its_certificate(with_tls: tuple[Server, Side, Side], fork, upstream) -> None:
    """The settings name the files, and the name in the certificate is the role. A renewed certificate: SIGHUP."""
    server, ours, theirs = with_tls
    server.sql("CREATE ROLE client LOGIN SUPERUSER")
    await migrated(server.url, "oncegate")
    url = f"postgresql://client@127.0.0.1:{server.port}/postgres"
    files = {"STORE_CA_FILE": theirs.ca, "STORE_CERT_FILE": ours.cert, "STORE_KEY_FILE": ours.key}
    proxy = await fork(upstream, url, **files)
    await until(lambda: proxy.admin("/readyz")[0] == 200, 30)
    assert (await ask(proxy.port, request(key="k1"))).header("oncegate-status") == b"executed"
    encrypted = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'client'"
    assert server.sql(encrypted) == "t"

    ours.renew()
    proxy.signal(signal.SIGHUP)
    await until(lambda: proxy.events("reload refused, nothing changed"), 30)
    assert "the store refuses its new credentials" in proxy.events("reload refused, nothing changed")[0]["reasons"][0]
    (server.data / ours.ca.name).write_bytes(ours.ca.read_bytes())
    server.sql("SELECT pg_reload_conf()")
    async with asyncio.timeout(30):
        # The server reads its files again when it likes.
        while not proxy.events("store credentials replaced"):
            proxy.signal(signal.SIGHUP)
            await asyncio.sleep(0.5)
    assert (await ask(proxy.port, request(key="k2"))).header("oncegate-status") == b"executed"


async def test_the_version_is_another(server: Server) -> None:
    """It is not the one of the wheel."""
    connection = await asyncpg.connect(server.url)
    version = await connection.fetchval("SHOW server_version_num")
    await connection.close()
    assert 150000 <= int(version) < 180000
