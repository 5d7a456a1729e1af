"""New credentials of an open store, at real servers: tried first, used for new connections, and by open ones."""

import re
from collections.abc import Callable

import pytest

from oncegate.settings.store_url import password_in, servers_in, with_password
from oncegate.store.postgres.servers import SIZES
from oncegate.store.results import SettleResult, SettleStatus
from oncegate.store.store import LoginRefused, Store, StoreLogin
from tests.own_postgres import OwnPostgres
from tests.parts import until
from tests.stores import claim, claimed, connected, key, store_small, told
from tests.test_redis_store import ACL as RIGHTS
from tests.topologies import SERVICE, Clustered, Sentineled

RIGHT = SettleResult(SettleStatus.STORED)


class Rotation:
    """The credentials at some servers of Redis: `run` is called with the words of a command for each of them."""

    def __init__(self, run: Callable[..., list[object]]) -> None:
        self.run = run

    def add(self, user: str, password: str) -> None:
        self.run("ACL", "SETUSER", user, "on", f">{password}", *RIGHTS, "+cluster|info", "+cluster|slots")

    def remove(self, user: str) -> None:
        """Remove a user, which ends its connections, or a password, which does not."""
        self.run("ACL", "DELUSER", user)

    def users(self) -> set[str]:
        """Return which of the two users are connected."""
        lines = b"".join(bytes(one) for one in self.run("CLIENT", "LIST"))
        return set(re.findall(r" user=(before|after) ", lines.decode()))


async def refusal(store: Store, url: str) -> str:
    """Return why the store refuses a login; empty if it takes it."""
    try:
        await store.prepare_login(StoreLogin(url))
    except LoginRefused as error:
        return str(error)
    return ""


async def rotates(rotation: Rotation, url: Callable[[str], str]) -> None:
    """Go from one user to another with a claim in flight: nothing is lost, not even a connection."""
    rotation.add("before", "one")
    async with connected(url("before:one@")) as store:
        owner = await claimed(store)
        assert "invalid username-password" in await refusal(store, url("after:two@"))
        rotation.run("ACL", "SETUSER", "after", "on", ">two", "-@all")
        assert "no permissions" in await refusal(store, url("after:two@"))
        rotation.add("after", "two")
        assert await refusal(store, url("after:two@")) == ""
        links = [link for node in store._servers.nodes for link in node.links]
        transports = [link._transport for link in links]
        (await store.prepare_login(StoreLogin(url("after:two@"))))()
        await until(lambda: rotation.users() == {"after"})
        rotation.remove("before")
        assert await store_small(store, owner) == RIGHT
        assert [link._transport for link in links] == transports, "no connection was lost"
        for link in links:
            link.renew("a test")
        assert told(await claim(store, key(2))) == "claimed"
        assert told(await claim(store)) == "replay"
    rotation.remove("after")


async def test_one_server(valkey):
    with valkey.client() as client:
        rotation = Rotation(lambda *words: [client.execute_command(*words)])
        await rotates(rotation, lambda login: f"redis+unix://{login}{valkey.socket}")


async def test_a_master_behind_sentinels():
    """The sentinels' own password is another one, and is followed as well."""
    group = Sentineled(replicas=1, sentinel_password="watch")
    try:
        rotation = Rotation(lambda *words: [server.ask(*words) for server in group.servers])
        where = f"{group.places}/{SERVICE}"

        def url(login: str, watch: str = "watch") -> str:
            return f"redis+sentinel://{login}{where}?sentinel_password={watch}"

        await rotates(rotation, url)
        async with connected(url("")) as store:
            for sentinel in group.sentinels:
                sentinel.ask("ACL", "SETUSER", "default", ">guard")
            assert "a sentinel: " in await refusal(store, url("", "wrong"))
            assert await refusal(store, url("", "guard")) == ""
            (await store.prepare_login(StoreLogin(url("", "guard"))))()
            for sentinel in group.sentinels:
                sentinel.credentials = {"password": "guard"}
                sentinel.ask("ACL", "SETUSER", "default", "<watch")
                sentinel.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            for link in store.nodes[0].links:
                link.renew("a test")
            assert told(await claim(store, key(3))) == "claimed"
    finally:
        group.close()


async def test_a_cluster():
    """Every master is asked, and gets the new login."""
    cluster = Clustered(masters=3, replicas=0)
    try:
        rotation = Rotation(lambda *words: [server.ask(*words) for server in cluster.servers])
        places = ",".join(f"127.0.0.1:{server.port}" for server in cluster.servers)
        await rotates(rotation, lambda login: f"redis+cluster://{login}{places}")
        rotation.add("before", "one")
        async with connected(f"redis+cluster://before:one@{places}") as store:
            cluster.servers[0].ask("ACL", "SETUSER", "late", "on", ">x", *RIGHTS, "+cluster|info", "+cluster|slots")
            refused = await refusal(store, f"redis+cluster://late:x@{places}")
            assert refused.count("invalid username-password") == 2, "the others do not know it yet"
    finally:
        cluster.close()


async def test_a_server_that_is_down_refuses_nothing(own_valkey):
    """Whatever the credentials: there is nobody who could say that they are wrong."""
    async with connected(own_valkey.url) as store:
        own_valkey.kill()
        await until(store.not_ready_reason)
        assert await refusal(store, f"redis+unix://any:thing@{own_valkey.socket}") == ""


async def test_postgres(postgres_template):
    """New sessions use the new login, and take the places of open ones: no claim waits, and the old user can go."""
    server = OwnPostgres(postgres_template)
    try:
        for user in ("app", "later"):
            server.sql(f"CREATE ROLE {user} LOGIN SUPERUSER PASSWORD 'one'")
        rules = server.data / "pg_hba.conf"
        rules.write_text("host all app,later 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        server.sql("SELECT pg_reload_conf()")

        def url(password: str, user: str = "app") -> str:
            return f"postgresql://{user}:{password}@127.0.0.1:{server.port}/postgres"

        def sessions(user: str) -> int:
            return int(server.sql(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{user}'"))

        async with connected(url("one")) as store:
            owner = await claimed(store)
            server.sql("ALTER ROLE app PASSWORD 'two'")
            assert "password authentication failed" in await refusal(store, url("three"))
            assert await refusal(store, url("two")) == ""
            (await store.prepare_login(StoreLogin(url("two"))))()
            assert await store_small(store, owner) == RIGHT
            # Beside those of the pools, one asks the host what it is.
            number = sum(SIZES.values()) + 1
            await until(lambda: sessions("app") == number)
            (await store.prepare_login(StoreLogin(url("two"))))()
            (await store.prepare_login(StoreLogin(url("one", "later"))))()
            tried, reasons = 2, set[str | None]()
            while sessions("app"):
                assert told(await claim(store, key(tried))) == "claimed"
                reasons.add(store.not_ready_reason())
                tried += 1
            assert reasons == {None}
            await until(lambda: sessions("later") == number)
            server.sql("DROP ROLE app")
            assert told(await claim(store, key(tried))) == "claimed"
            assert told(await claim(store)) == "replay"
    finally:
        server.close()


# The settings ...


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis://h", "redis://:p%40%2F%3A@h"),
        ("redis://gate@h:1/2", "redis://gate:p%40%2F%3A@h:1/2"),
        ("rediss://gate:@h", "rediss://gate:p%40%2F%3A@h"),
        ("redis+unix:///run/s?db=1", "redis+unix://:p%40%2F%3A@/run/s?db=1"),
        ("redis+sentinel://u@a,b/s?sentinel_password=x", "redis+sentinel://u:p%40%2F%3A@a,b/s?sentinel_password=x"),
        ("postgresql://app@h1,h2/db?sslmode=require", "postgresql://app:p%40%2F%3A@h1,h2/db?sslmode=require"),
        ("redis://u:own@h", "redis://u:own@h"),
        ("embedded", "embedded"),
    ],
)
def test_the_password_of_a_url(url, whole):
    assert with_password(url, "p@/:") == whole
    assert password_in(whole) == ("" if url == "embedded" else "own" if "own" in url else "p@/:")


@pytest.mark.parametrize(
    ("url", "other", "same"),
    [
        ("redis://a:b@h/1", "redis://h/1", True),
        ("redis://:b@h/1", "redis://h/2", False),
        ("redis+sentinel://u:p@a,b/s?sentinel_password=x&db=1", "redis+sentinel://a,b/s?db=1", True),
        ("redis+sentinel://a/s?db=1&sentinel_user=u&sentinel_password=x", "redis+sentinel://v@a/s?db=1", True),
        ("redis+sentinel://a/s?sentinel_password=x", "redis+sentinel://a/s", True),
        ("postgresql://a:b@h/db?sslmode=require", "postgresql://c@h/db?sslmode=require", True),
        ("postgresql://a:b@h/db", "postgresql://a:b@h/db?sslmode=require", False),
        ("redis+unix://a:b@/run/s", "redis+unix:///run/s", True),
        ("redis+unix://a:b@/run/s", "redis+unix:///run/t", False),
    ],
)
def test_the_servers_of_a_url(url, other, same):
    """Two URLs that differ in their credentials alone are those of the same servers."""
    assert (servers_in(url) == servers_in(other)) is same
