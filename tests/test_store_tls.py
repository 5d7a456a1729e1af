"""The store over TLS with an authority of its own and a client certificate: each kind of store, real handshakes."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme

from oncegate.server.embedded_postgres import SUPERUSER
from oncegate.settings.loading import load_settings
from oncegate.store.store import LoginRefused, StoreLogin
from tests.own_postgres import OwnPostgres
from tests.parts import ask, request, until
from tests.resp import relaying
from tests.stores import claim, claimed, connected, key, store_at, told
from tests.test_sentinel import Saying, saying
from tests.topologies import Clustered


class Side:
    """One side of TLS: its authority, and its certificate in files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.ca, self.cert, self.key = (folder / f"{name}-{part}.pem" for part in ("ca", "cert", "key"))
        self.renew()

    def renew(self) -> None:
        """Make another authority and another certificate, in the same files."""
        self.authority = trustme.CA()
        made = self.authority.issue_cert("localhost", "127.0.0.1", common_name=self.name)
        self.authority.cert_pem.write_to_path(self.ca)
        made.private_key_pem.write_to_path(self.key)
        self.key.chmod(0o600)
        self.cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))


def listening(server: Side, client: Side) -> ssl.SSLContext:
    """Return the TLS side of a server that asks for a certificate of the client's authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(client.ca))
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.fixture
def server(tmp_path) -> Side:
    return Side(tmp_path, "server")


@pytest.fixture
def client(tmp_path) -> Side:
    return Side(tmp_path, "client")


async def works(url: str, server: Side, client: Side) -> None:
    """The store is used with both files, and is not without either."""
    login = StoreLogin(url, str(server.ca), str(client.cert), str(client.key))
    async with connected(url, login=login) as store:
        await claimed(store)
        assert told(await claim(store)) == "in_flight"
        with pytest.raises(LoginRefused):
            await store.prepare_login(StoreLogin(url, str(server.ca)))
        with pytest.raises(LoginRefused, match=r"(?i)certificate verify failed"):
            await store.prepare_login(login._replace(ca_file=str(client.ca)))
        (await store.prepare_login(login))()
        for link in store.nodes[0].links:
            link.renew("a test")
        assert told(await claim(store, key(2))) == "claimed"
    without = store_at(url, timeout_ms=500, login=StoreLogin(url, str(server.ca)))
    without.start()
    assert not await without.wait_up(0.5)
    await without.close()


async def test_one_server(valkey, server, client):
    async with relaying(valkey.socket, listening(server, client)) as relay:
        await works(f"rediss://localhost:{relay.port}", server, client)


async def test_sentinels(valkey, server, client):
    """The sentinels get the same certificate."""
    tls = listening(server, client)
    async with relaying(valkey.socket, tls) as relay, saying(Saying("localhost", relay.port), tls=tls) as url:
        await works(url.replace("redis+", "rediss+"), server, client)


async def test_a_cluster(server, client):
    """Servers that the cluster names get it, too."""
    announced = ("--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname")
    cluster = Clustered("--unixsocket", "s", *announced, masters=1, replicas=0)
    try:
        (one,) = cluster.servers
        async with relaying(str(one.dir / "s"), listening(server, client)) as relay:
            one.ask("CONFIG", "SET", "cluster-announce-port", relay.port)
            await until(lambda: str(relay.port).encode() in one.ask("CLUSTER", "NODES"))
            await works(f"rediss+cluster://localhost:{relay.port}", server, client)
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("postgresql://a@h/db", "postgresql://a@h/db?sslrootcert={ca}&sslmode=verify-full"),
        ("postgresql://a@h/db?sslmode=verify-ca", "postgresql://a@h/db?sslmode=verify-ca&sslrootcert={ca}"),
        (
            "postgresql://a@h/db?sslrootcert={ca}&sslmode=verify-full",
            "postgresql://a@h/db?sslrootcert={ca}&sslmode=verify-full",
        ),
    ],
)
def test_a_url_of_postgres_gets_the_authority(server, url, whole, monkeypatch, tmp_path):
    """Also that of the owner, by which `oncegate migrate` connects."""
    monkeypatch.chdir(tmp_path)
    given = url.format(ca=server.ca)
    for name, value in {
        "UPSTREAM": "http://h",
        "STORE_URL": given,
        "MIGRATE_URL": given,
        "STORE_CA_FILE": server.ca,
    }.items():
        monkeypatch.setenv(f"ONCEGATE_{name}", str(value))
    settings = load_settings()
    assert (
        settings.store_url.get_secret_value() == settings.migrate_url.get_secret_value() == whole.format(ca=server.ca)
    )


@asynccontextmanager
async def postgres_over_tls(port: int, tls: ssl.SSLContext) -> AsyncIterator[int]:
    """Answer the packet that asks for TLS, and pass what is in it on to a server that has none."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        await reader.readexactly(8)
        writer.write(b"S")
        with suppress(OSError):
            await writer.start_tls(tls)
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
            writers.add(server_writer)
            await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer))
        writer.transport.abort()

    writers: set[asyncio.StreamWriter] = set()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0.1)


async def test_postgres(postgres_template, proxies, upstream, server, client):
    """The settings alone name the files; a new authority counts for new sessions after SIGHUP."""
    own = OwnPostgres(postgres_template)
    tls = listening(server, client)
    try:
        async with postgres_over_tls(own.port, tls) as port:
            files = {"STORE_CA_FILE": server.ca, "STORE_CERT_FILE": client.cert, "STORE_KEY_FILE": client.key}
            proxy = proxies(upstream, f"postgresql://{SUPERUSER}@127.0.0.1:{port}/postgres", **files)
            await until(lambda: proxy.admin("/readyz")[0] == 200, 30)
            assert (await ask(proxy.port, request(key="k1"))).header("oncegate-status") == b"executed"
            server.renew()
            proxy.signal(signal.SIGHUP)
            await until(lambda: proxy.events("reload refused, nothing changed"))
            tls.load_cert_chain(server.cert, server.key)
            proxy.signal(signal.SIGHUP)
            await until(lambda: proxy.events("store credentials replaced"))
            sessions = f"FROM pg_stat_activity WHERE usename = '{SUPERUSER}' AND pid <> pg_backend_pid()"
            assert int(
                own.sql(f"SELECT count(pg_terminate_backend(pid)) {sessions} AND backend_type = 'client backend'")
            )
            await until(lambda: proxy.admin("/readyz")[0] == 200, 30)
            assert (await ask(proxy.port, request(key="k2"))).header("oncegate-status") == b"executed"
            assert await asyncio.to_thread(proxy.stop) == 0
    finally:
        own.close()


async def test_a_renewed_authority(proxies, upstream, valkey, server, client):
    """The server gets a certificate of another authority: new connections trust it after SIGHUP."""
    tls = listening(server, client)
    async with relaying(valkey.socket, tls) as relay:
        files = {"STORE_CA_FILE": server.ca, "STORE_CERT_FILE": client.cert, "STORE_KEY_FILE": client.key}
        proxy = proxies(upstream, f"rediss://localhost:{relay.port}", **files)
        assert (await ask(proxy.port, request(key="k1"))).status == 200
        good = server.ca.read_bytes()
        server.ca.write_bytes(client.ca.read_bytes())
        proxy.signal(signal.SIGHUP)
        await until(lambda: proxy.events("reload refused, nothing changed"))
        assert "certificate verify failed" in str(proxy.events("reload refused, nothing changed")[0]["reasons"]).lower()
        relay.cut()
        await until(lambda: proxy.admin("/readyz")[0] == 200, 30)
        assert (await ask(proxy.port, request(key="k2"))).status == 200, "the authority of before counts"

        server.ca.write_bytes(good)
        server.renew()
        tls.load_cert_chain(server.cert, server.key)
        proxy.signal(signal.SIGHUP)
        await until(lambda: proxy.events("store credentials replaced"))
        relay.cut()
        await until(lambda: proxy.admin("/readyz")[0] == 200, 30)
        assert (await ask(proxy.port, request(key="k3"))).status == 200
        assert await asyncio.to_thread(proxy.stop) == 0
