"""Connections to real PostgreSQL servers: their settings, which of them can be used, and what they confirm."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
import trustme

from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.connections.session import Lost, Refused, Session
from oncegate.store.postgres.servers import MOST_LEFT, Servers
from tests.postgres_parts import DEADLINE_S, migrate, new_name, new_schema, opened, until
from tests.postgres_server import Cluster, Server, shared_url

HOSTILE = {
    "default_transaction_isolation": "repeatable read",
    "client_min_messages": "error",
    "statement_timeout": "1s",
    "idle_session_timeout": "1s",
    "lock_timeout": "0",
    "jit": "on",
    "synchronous_commit": "off",
    "search_path": "pg_catalog",
}


@pytest.fixture(scope="module")
def schema() -> str:
    """A schema of the run's server, for tests that do not change it."""
    return new_schema(shared_url())


async def run(sql: str, url: str = "") -> Any:
    """Run statements as the superuser, and return the value that the last one gives."""
    connection = await asyncpg.connect(url or shared_url())
    try:
        return await connection.fetchval(sql) if sql.startswith("SELECT") else await connection.execute(sql)
    finally:
        await connection.close()


async def role_with(schema: str, options: str = "") -> str:
    """Return the name of a role that may use a schema."""
    role = new_name("role")
    await run(f"CREATE ROLE {role} LOGIN {options}")
    await migrate(shared_url(), schema, role)
    return role


def as_role(role: str, url: str = "", database: str = "postgres") -> str:
    """Return the URL of a role on the run's server."""
    return f"postgresql://{role}@{(url or shared_url()).rpartition('@')[2].rpartition('/')[0]}/{database}"


async def taken(servers: Servers, level: Level = Level.CLAIM) -> Session:
    session = await servers.free_session(level, asyncio.get_running_loop().time() + DEADLINE_S)
    assert session is not None
    return session


@pytest.fixture(autouse=True)
def ask_often(monkeypatch):
    monkeypatch.setattr("oncegate.store.postgres.connections.scout.ASK_S", 0.05)


# Settings ...


@pytest.mark.parametrize(
    ("durability", "commits"),
    [("memory", ["off", "off", "off"]), ("fsync", ["local", "local", "off"]), ("replicated", ["on", "local", "off"])],
)
async def test_settings_of_sessions(schema, durability, commits):
    """A role's defaults do not reach the sessions. Each level has its own commit."""
    role = await role_with(schema)
    await run("; ".join(f"ALTER ROLE {role} SET {name} = '{value}'" for name, value in HOSTILE.items()))
    async with opened(as_role(role), schema, durability) as servers:
        for level, commit in zip(Level, commits, strict=True):
            session = await taken(servers, level)
            assert {name: session.facts.settings[name] for name in HOSTILE} == {
                "default_transaction_isolation": "read committed",
                "client_min_messages": "warning",
                "statement_timeout": "0",
                "idle_session_timeout": "0",
                "lock_timeout": "20s",
                "jit": "off",
                "synchronous_commit": commit,
                "search_path": f'"{schema}"',
            }
            rows = (await session.run("SELECT current_setting('transaction_isolation') AS is")).rows
            assert rows[0]["is"] == "read committed"


# What cannot be used ...


async def reason(url: str, schema: str, part: str, **options: Any) -> str:
    """Return why servers are not ready, once the reason contains `part`."""
    async with opened(url, schema, is_up=False, **options) as servers:
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                while part not in (servers.not_ready_reason() or ""):
                    await asyncio.sleep(0.005)
        return servers.not_ready_reason() or ""


async def test_a_database_or_host_that_is_not_there(schema):
    at = shared_url().rpartition("/")[0]
    assert 'database "nowhere" does not exist' in await reason(f"{at}/nowhere", schema, "nowhere")
    assert "the connection is refused" in await reason("postgresql://127.0.0.1:1/postgres", schema, "refused")
    assert "Name or service not known" in await reason("postgresql://no.invalid/postgres", schema, "Name")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DELETE FROM {}.schema_version", "oncegate migrate"),
        ("INSERT INTO {}.schema_version VALUES (99)", "version 99"),
        ("DROP SCHEMA {} CASCADE", "oncegate migrate"),
    ],
)
async def test_another_schema_version(change, words):
    """A schema that this release does not know is said, also when it changes later, and no claim is tried."""
    schema = new_name("schema")
    await migrate(shared_url(), schema)
    async with opened(shared_url(), schema) as servers:
        assert servers.not_ready_reason() is None
        assert servers.refusal() is None
        await run(change.format(schema))
        await until(lambda: words in (servers.not_ready_reason() or ""), words)
        assert servers.refusal() is not None


async def test_rights_that_are_missing():
    """Each right that is missing is named in a GRANT, and that GRANT helps."""
    schema = new_name("schema")
    await migrate(shared_url(), schema)
    role = await role_with(schema)
    await run(
        f"REVOKE USAGE ON SCHEMA {schema} FROM {role}; REVOKE UPDATE ON {schema}.record FROM {role};"
        f"REVOKE INSERT ON {schema}.audit FROM {role}; REVOKE UPDATE ON SEQUENCE {schema}.fence FROM {role};"
        f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC"
    )
    helped = []
    async with opened(as_role(role), schema, is_up=False) as servers:
        while (text := servers.not_ready_reason()) is not None and len(helped) < 9:
            grant = text.rpartition(": ")[2]
            if grant.startswith("GRANT") and grant not in helped:
                helped.append(grant)
                await run(grant)
            servers.note_refusal(Refused)  # type: ignore[arg-type]  # asks again at once
            await asyncio.sleep(0.01)
    assert sorted(helped) == sorted(
        [
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
            f"GRANT UPDATE ON {schema}.record TO {role}",
            f"GRANT INSERT ON {schema}.audit TO {role}",
            f"GRANT UPDATE ON SEQUENCE {schema}.fence TO {role}",
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {role}",
        ]
    )


async def test_a_read_only_server(schema):
    role = await role_with(schema)
    await run(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    assert "read-only" in await reason(as_role(role), schema, "read-only")


async def test_the_limit_of_connections(schema):
    """A server without a place says so, and takes us once it has some."""
    role = await role_with(schema, "CONNECTION LIMIT 4")
    async with opened(as_role(role), schema, is_up=False) as servers:
        await until(lambda: "too many connections" in (servers.not_ready_reason() or ""), "the limit")
        await run(f"ALTER ROLE {role} CONNECTION LIMIT 40")
        assert await servers.wait_up(asyncio.get_running_loop().time() + DEADLINE_S)
        assert servers.not_ready_reason() is None


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server with few places, and a role that needs a password."""
    server = Server({"max_connections": "20", "superuser_reserved_connections": "2"})
    server.create()
    rules = server.data / "pg_hba.conf"
    rules.write_text("host all secret 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    try:
        server.start()
        new_schema(server.url, "store")
        server.sql("CREATE ROLE secret LOGIN SUPERUSER PASSWORD 'right'; CREATE TABLE store.done (number bigint)")
        yield server
    finally:
        server.close()


async def test_a_wrong_password(own):
    at = f"127.0.0.1:{own.port}/postgres"
    async with opened(f"postgresql://secret:right@{at}", "store"):
        pass
    text = await reason(f"postgresql://secret:wrong@{at}", "store", "password")
    assert text == f'the store is not reachable: 127.0.0.1:{own.port}: password authentication failed for user "secret"'


async def test_a_certificate_for_another_name(tmp_path):
    """What answers to the packet that asks for TLS has a certificate, and it is for another name."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("database.example").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "root.crt")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readexactly(8)
            writer.write(b"S")
            await writer.start_tls(context)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        place = f"localhost:{server.sockets[0].getsockname()[1]}"
        url = f"postgresql://postgres@{place}/postgres?sslmode=verify-full&sslrootcert={tmp_path}/root.crt"
        text = await reason(url, "store", "certificate")
    assert text.startswith(f"the store is not reachable: {place}: its certificate is refused: Hostname mismatch"), text


async def test_a_server_without_tls(own):
    text = await reason(f"{own.url}?sslmode=require", "store", "TLS")
    assert text == f"the store is not reachable: 127.0.0.1:{own.port}: it has no TLS, which sslmode asks for"


async def test_a_server_that_loses_what_it_confirmed(own):
    """What such a server confirms may be lost in a crash. Only the durability memory takes it."""
    own.sql("ALTER SYSTEM SET full_page_writes = off")
    own.sql("SELECT pg_reload_conf()")
    try:
        async with opened(own.url, "store") as servers:
            await until(lambda: servers.not_ready_reason() is not None, "the setting")
            assert servers.not_ready_reason() == "the store has full_page_writes=off, and may lose what it confirmed"
            assert servers.refusal() is not None
        async with opened(own.url, "store", "memory") as servers:
            assert servers.refusal() is None
    finally:
        own.sql("ALTER SYSTEM RESET full_page_writes")
        own.sql("SELECT pg_reload_conf()")


async def test_replicated_without_a_standby(own):
    async with opened(own.url, "store", "replicated") as servers:
        text = "the store has no synchronous_standby_names, which the durability replicated needs"
        assert servers.not_ready_reason() == text
        assert servers.refusal().reason == text


async def test_a_role_that_may_not_see_standbys(schema):
    role = await role_with(schema)
    text = await reason(as_role(role), schema, "GRANT", durability="replicated")
    grant = f"GRANT pg_read_all_stats TO {role}"
    assert text == f"the store does not show its standbys to its user: {grant}"
    await run(grant)
    assert "synchronous_standby_names" in await reason(as_role(role), schema, "names", durability="replicated")


async def test_the_breaker(own):
    """Once claims were not confirmed one after the other, a probe finds out when they are again."""
    async with opened(own.url, "store") as servers:
        for began in range(3):
            servers.breaker.failed(asyncio.get_running_loop().time() + began)
        assert servers.refusal().reason == "the store does not confirm claims"
        assert servers.not_ready_reason() == "the store does not confirm claims"
        probe = asyncio.ensure_future(servers.probe())
        await until(lambda: servers.refusal() is None, "the end of the refusal")
        assert servers.not_ready_reason() is None
        probe.cancel()


# Statements ...


async def test_the_end_of_a_statement(own):
    """An answer, a refusal by the server, and a connection that was lost while it was at work."""
    async with opened(own.url, "store") as servers:
        session = await taken(servers)
        assert [row["one"] for row in (await session.run("SELECT 1 AS one")).rows] == [1]
        with pytest.raises(Refused) as refused:
            await session.run("SELECT 1 / 0")
        assert refused.value.sqlstate == "22012"
        with pytest.raises(Lost) as lost:
            await session.run("SELECT pg_terminate_backend(pg_backend_pid())")
        assert lost.value.maybe_executed
        assert lost.value.backend == session.facts.backend
        assert await servers.is_gone(session.facts.backend)
        with pytest.raises(Lost) as lost:
            await session.run("SELECT 1")
        assert not lost.value.maybe_executed
        # Others take its place.
        assert await (await taken(servers)).run("SELECT 1")


async def test_a_caller_that_is_cancelled(own):
    """The statement goes on, and nobody else gets its connection until its reply has come."""
    async with opened(own.url, "store") as servers:
        session = await taken(servers)
        work = "INSERT INTO done SELECT 5 FROM pg_sleep(0.2) RETURNING number"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await session.run(work)
        assert not session.is_idle
        with pytest.raises(Lost):
            await session.run("SELECT 1")
        await until(lambda: session.is_idle, "the reply")
        assert [row["number"] for row in session.last_answer.rows] == [5]
    assert own.sql("SELECT count(*) FROM store.done WHERE number = 5") == "1"


@asynccontextmanager
async def commits_wait(server: Server) -> AsyncIterator[None]:
    """Let commits wait for a standby that never comes."""
    server.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    server.sql("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        server.sql("ALTER SYSTEM RESET synchronous_standby_names")
        server.sql("SELECT pg_reload_conf()")


async def insert_that_waits(servers: Servers, number: int) -> tuple[Session, "asyncio.Task[Any]"]:
    """Return a session whose commit waits, and its call. The setting takes a moment to count."""
    while True:
        session = await taken(servers)
        call = asyncio.ensure_future(session.run("INSERT INTO done VALUES ($1)", number))
        done, _ = await asyncio.wait([call], timeout=0.1)
        if not done:
            return session, call


@pytest.mark.parametrize("hides", [False, True])
async def test_a_wait_for_a_standby_that_is_cancelled(own, hides):
    """The server says success, with a warning: the claim is below its level. A role's defaults do not hide it."""
    own.sql(f"ALTER ROLE postgres {'SET client_min_messages = error' if hides else 'RESET ALL'}")
    async with opened(own.url, "store", "replicated") as servers, commits_wait(own):
        session, call = await insert_that_waits(servers, 6)
        own.sql(f"SELECT pg_cancel_backend({session.facts.backend.pid})")
        assert (await call).is_below
    own.sql("ALTER ROLE postgres RESET ALL")


async def test_a_look_that_is_refused(own, monkeypatch):
    """What was committed before it stays: it is below its level, and not undone."""
    monkeypatch.setattr("oncegate.store.postgres.connections.session.LOOK", "SELECT 1 / 0, $1::pg_lsn")
    async with opened(own.url, "store", "replicated") as servers:
        assert (await (await taken(servers)).run("INSERT INTO done VALUES (9)")).is_below
    assert own.sql("SELECT count(*) FROM store.done WHERE number = 9") == "1"


async def test_a_wait_for_a_standby_whose_backend_is_ended(own):
    """The caller knows nothing. Once the backend is gone, nothing more happens, and the row is there."""
    async with opened(own.url, "store", "replicated") as servers, commits_wait(own):
        session, call = await insert_that_waits(servers, 7)
        while not await servers.is_gone(session.facts.backend):
            await asyncio.sleep(0.01)
        with pytest.raises(Lost) as lost:
            await call
        assert lost.value.maybe_executed
    assert own.sql("SELECT count(*) FROM store.done WHERE number = 7") != "0"


async def test_claims_that_nobody_waits_for(own):
    """Of 20 places, two at most are held by commits that wait in vain. Claims are not tried then, and reads go on."""
    async with opened(own.url, "store", "replicated", timeout_s=0.3) as servers, commits_wait(own):
        calls = [(await insert_that_waits(servers, 8))[1]]

        async def claim() -> None:
            if (one := await servers.free_session(Level.CLAIM, asyncio.get_running_loop().time() + 0.3)) is not None:
                calls.append(asyncio.ensure_future(one.run("INSERT INTO done VALUES (8)")))
                await asyncio.wait([calls[-1]], timeout=0.3)

        await asyncio.gather(*(claim() for _ in range(18)))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        await until(lambda: own.sql(waiting) == str(MOST_LEFT), "two connections are left waiting")
        assert servers.session(Level.CLAIM) is None
        assert (await (await taken(servers, Level.OFF)).run("SELECT 1 AS one")).rows
        assert servers.not_ready_reason()
        own.sql("ALTER SYSTEM RESET synchronous_standby_names")
        own.sql("SELECT pg_reload_conf()")
        results = await asyncio.gather(*calls, return_exceptions=True)
        # None of them was on a second server.
        assert all(isinstance(one, Lost) or one.is_below for one in results)
        assert sum(not isinstance(one, Lost) for one in results) >= MOST_LEFT
        await until(lambda: servers.session(Level.CLAIM) is not None, "claims are tried again")


# Restarts and failovers ...


@pytest.mark.parametrize(
    "how",
    ["kill", pytest.param("fast", marks=pytest.mark.full), pytest.param("immediate", marks=pytest.mark.full)],
)
async def test_a_restart(own, how):
    async with opened(own.url, "store") as servers:
        if how == "kill":
            own.kill()
        else:
            own.stop(signal.SIGINT if how == "fast" else signal.SIGQUIT)
        await until(lambda: servers.not_ready_reason() is not None, "the server is gone")
        assert servers.not_ready_reason().startswith("the store is not reachable: ")
        own.start()
        assert await servers.wait_up(asyncio.get_running_loop().time() + DEADLINE_S)
        assert (await (await taken(servers)).run("SELECT 1 AS one")).rows
        assert servers.not_ready_reason() is None


@pytest.mark.full
async def test_a_server_that_is_paused(own):
    """Nobody waits longer than they want to. Replies come when it goes on, and no connection is made anew."""
    async with opened(own.url, "store", timeout_s=0.5) as servers:
        loop, session = asyncio.get_running_loop(), await taken(servers)
        own.pause()
        try:
            call = asyncio.ensure_future(session.run("SELECT 1 AS one"))
            began = loop.time()
            others = [servers.free_session(Level.CLAIM, began + 0.5) for _ in range(8)]
            got = await asyncio.gather(*others)
            assert loop.time() - began < 2.5
            for one in got:
                if one is not None:
                    one.free()
            await until(lambda: "does not answer" in (servers.not_ready_reason() or ""), "the silence")
            assert not servers.readable
            await asyncio.sleep(5)
        finally:
            own.resume()
        assert (await call).rows
        await until(lambda: servers.not_ready_reason() is None, "it answers again")


@pytest.mark.full
async def test_standby_names_that_are_emptied_under_load_and_a_promotion():
    """No claim that counts is missing after the failover, though the server said success to others as well.

    The standby is named first in the URL, and the old primary goes on taking writes.
    """
    cluster = Cluster()
    try:
        await migrate(cluster.primary.url, "store")
        cluster.primary.sql("CREATE TABLE store.done (number bigint)")
        standby, old = cluster.servers[1], cluster.servers[0]
        url = f"postgresql://postgres@127.0.0.1:{standby.port},127.0.0.1:{old.port}/postgres"
        async with opened(url, "store", "replicated", timeout_s=1.0) as servers:
            assert servers.refusal() is None
            counted, below = [], []

            async def claim(number: int) -> None:
                with suppress(Lost):
                    answer = await (await taken(servers)).run("INSERT INTO done VALUES ($1)", number)
                    (below if answer.is_below else counted).append(number)

            await asyncio.gather(*(claim(number) for number in range(40)))
            assert counted
            assert not below
            standby.pause()
            late = [asyncio.ensure_future(claim(number)) for number in range(40, 42)]
            await asyncio.sleep(0.1)
            old.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
            old.sql("SELECT pg_reload_conf()")
            await asyncio.wait(late)
            assert sorted(below) == [40, 41]
            # The old primary has them; what is promoted has not.
            standby.kill()
            standby.start(primary_conninfo="")
            cluster.promote(standby)
            await until(lambda: servers.primary_timeline == 2, "the new primary")
            await servers.wait_up(asyncio.get_running_loop().time() + DEADLINE_S)
            rows = (await (await taken(servers, Level.OFF)).run("SELECT number FROM done")).rows
            assert {row["number"] for row in rows} >= set(counted)
            assert int(old.sql("SELECT count(*) FROM store.done WHERE number >= 40")) == 2
    finally:
        cluster.close()
