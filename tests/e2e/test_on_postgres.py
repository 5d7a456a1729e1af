"""A store in PostgreSQL that is set up as the page says, and one that cannot be used: then the proxy says why.

Each reason is on /readyz and in the log.
"""

import asyncio
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from unittest.mock import ANY

import pytest
import trustme

from loadtest.ports import free_port
from oncegate.server.embedded_postgres import EmbeddedPostgresError
from oncegate.store.postgres.migrations.grants import grants
from tests.parts import Proxy, RawUpstream, ask, request, until
from tests.postgres_database import Connection, migrated
from tests.postgres_server import Server

# Every role but the superuser has a password; over TLS as well.
HBA = """
host all postgres 127.0.0.1/32 trust
host replication postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""
ROLES = """
CREATE ROLE proxy LOGIN PASSWORD 'right';
CREATE ROLE stranger LOGIN PASSWORD 'right';
CREATE ROLE reader LOGIN PASSWORD 'right' IN ROLE proxy;
CREATE ROLE watcher LOGIN PASSWORD 'right' IN ROLE proxy, pg_read_all_stats;
ALTER ROLE reader SET default_transaction_read_only = on;
"""


class Bad(NamedTuple):
    """A case. `url`: of the store, with `{at}` for the server's host and port, `{ca}` for its authority's file."""

    url: str
    reason: str
    settings: Mapping[str, str] = MappingProxyType({})


REPLICATED = {"DURABILITY": "replicated"}
BAD = {
    "nobody listens": Bad("postgresql://proxy@127.0.0.1:{free}/postgres", "the connection is refused"),
    "password": Bad("postgresql://proxy:wrong@{at}/postgres", 'password authentication failed for user "proxy"'),
    "no such role": Bad("postgresql://nobody:right@{at}/postgres", 'password authentication failed for user "nobody"'),
    "no such database": Bad("postgresql://proxy:right@{at}/nowhere", 'database "nowhere" does not exist'),
    "TLS name": Bad(
        "postgresql://proxy:right@127.0.0.1:{tls}/postgres?sslmode=verify-full&sslrootcert={ca}",
        "certificate is refused: IP address mismatch",
    ),
    "no TLS": Bad("postgresql://proxy:right@{at}/postgres?sslmode=require", "it has no TLS"),
    "rights": Bad("postgresql://stranger:right@{at}/postgres", "GRANT USAGE ON SCHEMA oncegate TO stranger"),
    "read-only": Bad("postgresql://reader:right@{at}/postgres", "read-only"),
    "no tables": Bad("postgresql://proxy:right@{at}/postgres", "oncegate migrate", {"STORE_SCHEMA": "elsewhere"}),
    "standbys hidden": Bad("postgresql://proxy:right@{at}/postgres", "GRANT pg_read_all_stats", REPLICATED),
    "no standby": Bad("postgresql://watcher:right@{at}/postgres", "has no synchronous_standby_names", REPLICATED),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with roles, and with the tables that `proxy` may use."""
    server = Server()
    try:
        server.create()
        (server.data / "pg_hba.conf").write_text(HBA)
        server.start()
        connection = Connection(server.url, "oncegate")
        connection.execute(ROLES)
        connection.run(migrated(server.url, "oncegate"))
        for row in connection.fetch(grants("proxy")):
            connection.execute(row[0])
        connection.close()
        yield server
    finally:
        server.close()


@pytest.fixture
async def tls_port(server: Server, tmp_path: Path) -> AsyncIterator[int]:
    """The port of a server with a certificate for `localhost`. The one of the tests has no TLS: this stands before it.

    `ca.pem` is the file of its authority.
    """
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)

    tasks: set[asyncio.Task[None] | None] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        there = await asyncio.open_connection("127.0.0.1", server.port)
        # OSError: what a client that does not like the certificate leaves behind.
        with suppress(OSError, asyncio.CancelledError):
            await reader.readexactly(8)  # SSLRequest
            writer.write(b"S")
            await writer.start_tls(context)
            await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))
        writer.transport.abort()
        there[1].transport.abort()

    front = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield front.sockets[0].getsockname()[1]
    front.close()
    for task in tasks:
        if task is not None:
            task.cancel()
    await asyncio.sleep(0.05)


async def reasons_of(proxy: Proxy) -> tuple[list[str], list[str]]:
    """Return why a proxy is not ready: as /readyz says, and as its log does."""
    await until(lambda: proxy.events("not ready"), 60)
    status, body = await asyncio.to_thread(proxy.admin, "/readyz")
    assert status == 503
    return json.loads(body)["reasons"], proxy.events("not ready")[-1]["reasons"]


async def command(url: str, folder: Path, *words: str, **settings: str) -> tuple[int | None, bytes]:
    """Return the exit code of a command on this store, and what it writes to standard error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
    env |= {"ONCEGATE_STORE_URL": url, "ONCEGATE_UPSTREAM": "http://api.test", **settings}
    words = (sys.executable, "-m", "oncegate", *words)
    process = await asyncio.create_subprocess_exec(*words, env=env, cwd=folder, stderr=asyncio.subprocess.PIPE)
    errors = (await process.communicate())[1]
    return process.returncode, errors


async def test_the_reason_is_said(server: Server, tls_port: int, fork, upstream: RawUpstream, tmp_path: Path) -> None:
    """Each mistake is named. The proxy serves and executes nothing. No password is said, nor by `oncegate keys`."""
    place = {"at": f"127.0.0.1:{server.port}", "free": free_port(), "tls": tls_port, "ca": tmp_path / "ca.pem"}
    urls = [bad.url.format(**place) for bad in BAD.values()]
    proxies = await asyncio.gather(
        *(fork(upstream, url, **bad.settings) for url, bad in zip(urls, BAD.values(), strict=True))
    )
    listed = asyncio.ensure_future(command(urls[list(BAD).index("password")], tmp_path, "keys", "list"))
    said = dict(zip(BAD, await asyncio.gather(*map(reasons_of, proxies)), strict=True))
    print(json.dumps(said, indent=1))
    wrong = {name: said[name] for name, bad in BAD.items() if not all(bad.reason in "".join(one) for one in said[name])}
    assert wrong == {}
    answers = await asyncio.gather(*(ask(proxy.port, request()) for proxy in proxies))
    assert [answer.status for answer in answers] == [503] * len(BAD)
    assert upstream.received == []
    assert [proxy for proxy in proxies if "right" in proxy.log() or "wrong" in proxy.log()] == []
    code, errors = await listed
    assert (code, b"password authentication failed" in errors, b"wrong" in errors) == (1, True, False)


async def test_with_the_right_name(server: Server, tls_port: int, fork, upstream: RawUpstream, tmp_path: Path) -> None:
    """The role that `oncegate migrate` gave its rights executes and replays, over TLS."""
    url = (
        f"postgresql://proxy:right@localhost:{tls_port}/postgres?sslmode=verify-full&sslrootcert={tmp_path / 'ca.pem'}"
    )
    proxy = await fork(upstream, url)
    await until(lambda: proxy.admin("/readyz")[0] == 200, 60)
    answers = [await ask(proxy.port, request()) for _ in range(2)]
    assert [answer.header("oncegate-status") for answer in answers] == [b"executed", b"replayed"]


async def test_what_the_page_says_works(server: Server, fork, upstream: RawUpstream, tmp_path: Path) -> None:
    """Its roles and its database, then `oncegate migrate`: the proxies' role serves, and cannot touch the trail."""
    page = (Path(__file__).parents[2] / "docs/how-to/postgresql.md").read_text()
    for statement in page.partition("```sql\n")[2].partition("```")[0].split(";")[:-1]:
        server.sql(statement)
    place = f"127.0.0.1:{server.port}/oncegate"
    url = f"postgresql://oncegate:PROXY@{place}"
    owner = {"ONCEGATE_MIGRATE_URL": f"postgresql://once_owner:OWNER@{place}"}
    assert await command(url, tmp_path, "migrate", **owner) == (0, ANY)
    proxy = await fork(upstream, url)
    await until(lambda: proxy.admin("/readyz")[0] == 200, 60)
    assert (await ask(proxy.port, request())).status == 200
    assert server.sql("SELECT count(*) FROM pg_stat_activity WHERE usename = 'oncegate'") == "10"
    trail = "SET ROLE oncegate; SET search_path TO oncegate; DELETE FROM audit"
    with pytest.raises(EmbeddedPostgresError, match="permission denied for table audit"):
        server.sql(trail, "oncegate")
