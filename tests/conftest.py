"""The real parts that tests are made of: a Valkey, the proxy as a process, a scripted upstream, raw clients."""

import asyncio
import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import hypothesis  # early: in Python 3.11 the parsing that its import does can fail late in a long run
import pytest
import uvloop
from redis import Redis

from loadtest.postgres_server import Server
from oncegate.server.embedded import find_server
from oncegate.store.redis.membership import KEPT_OUT, OLDER
from tests.own_postgres import OwnPostgres, stopped_template
from tests.parts import Proxy, RawUpstream, standing_upstream
from tests.postgres_database import Database
from tests.postgres_probe import PostgresProbe
from tests.probes import Probe, RedisProbe, fields_of
from tests.resp import Relay, relaying
from tests.shared_stores import SharedPostgres, SharedStore
from tests.stores import TEST_LAYOUT
from tests.zygote import Forked, Zygote, standing_proxy, written_layout

IN_PROCESS = (
    *(
        "test_body.py",
        "test_response.py",
        "test_cluster.py",
        "test_durable.py",
        "test_known_keys.py",
        "test_store_user.py",
        "test_leases.py",
        "test_lost_replies.py",
        "test_records.py",
        "test_open_keys.py",
        "test_open_index.py",
        "test_indexed_cluster.py",
        "test_link.py",
        "test_sentinel.py",
        "test_wakes.py",
    ),
    *(
        "test_postgres_store.py",
        "test_redis_store.py",
        "test_store_credentials.py",
        "test_store.py",
        "test_upstream.py",
        "test_health_monitor.py",
    ),
)


def searched(examples: int) -> hypothesis.settings:
    """Settings of a search: all of its examples in `make faults`, a third of them here."""
    most = examples if os.environ.get("TEST_SEARCHES") == "long" else examples // 3
    slow = [hypothesis.HealthCheck.too_slow]
    return hypothesis.settings(max_examples=most, deadline=None, database=None, suppress_health_check=slow)


# What takes longest starts first, so that nobody waits for it at the end.
LONG = (
    "test_run.py", "keeps_its_key_in_flight", "test_soak.py", "test_no_tenant_gets_a_byte", "test_fault_sweep.py",
    "test_a_small_run", "outlives_its_retention", "while_its_store_is_not", "test_sentinel.py", "test_slow.py",
    "test_rolling.py", "test_the_commands_of_a_page",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(part in item.nodeid for part in LONG))


gc.disable()  # until all tests are collected: what that makes stays, and looking through it is a third of the time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, object]:
    """Run what tests a part inside this process on the loop that the service runs on."""
    on_uvloop = item.path.name in IN_PROCESS
    return {"uvloop": uvloop.new_event_loop} if on_uvloop else {"asyncio": asyncio.new_event_loop}


class Valkey:
    """A real server of its own, on a unix socket and a TCP port of loopback, without persistence."""

    survives_a_kill = False

    def __init__(self, *options: str, binary: Path | None = None) -> None:
        self.dir = tempfile.mkdtemp(prefix="vk")
        self.socket = f"{self.dir}/s"
        self._command = [
            str(binary or find_server()), "--port", "0", "--unixsocket", self.socket, "--save", "",
            "--appendonly", "no", "--dir", self.dir, "--maxmemory-policy", "noeviction",
            "--enable-debug-command", "yes", *options,
        ]  # fmt: skip
        self.start()

    @property
    def url(self) -> str:
        return f"redis+unix://{self.socket}?db=0"

    def start(self, *options: str) -> None:
        """Start it, with what is on disk; `options` beat those it has."""
        self.process = subprocess.Popen(
            [*self._command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    client.ping()
                return
            except Exception:
                time.sleep(0.01)
        raise AssertionError("the server did not start")

    def client(self) -> Redis:
        return Redis(unix_socket_path=self.socket)

    def records(self) -> dict[bytes, dict[bytes, bytes]]:
        """Return every record with its fields."""
        with self.client() as client:
            names = [name for name in client.scan_iter("once:{*") if not name.endswith(b":readers")]
            return {name: {part.encode(): value for part, value in fields_of(client, name).items()} for name in names}

    def states(self) -> list[bytes]:
        """Return the state of every record, as it is written."""
        return sorted(fields.get(b"state", b"complete") for fields in self.records().values())

    def relaying(self) -> AbstractAsyncContextManager[Relay]:
        """Put a relay in front of it."""
        return relaying(self.socket)

    def has_body(self) -> bool:
        """Return whether a part of a response's body is there."""
        return any(b"b0" in fields for fields in self.records().values())

    def forget(self) -> None:
        """Lose every record."""
        with self.client() as client:
            client.flushall()

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.resume()
            self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    server = Valkey()
    yield server
    server.close()


@pytest.fixture
def valkey(shared_valkey: Valkey) -> Valkey:
    """A real Valkey, empty."""
    with shared_valkey.client() as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        if os.environ.get(TEST_LAYOUT) == "packed":
            # Older versions are kept out already, so that proxies pack records from the start.
            client.set(OLDER, KEPT_OUT)
    return shared_valkey


def redis_server() -> Path | None:
    """Return the redis-server on PATH, if there is one that is new enough."""
    found = shutil.which("redis-server")
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"v=(\d+)\.", said)
    return Path(found) if version and int(version[1]) >= 7 else None


REDIS = redis_server()
REDIS_KINDS = ["valkey", "redis"] if REDIS else ["valkey"]


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[Valkey]:
    """The Redis of this system, if it has one."""
    server = Valkey(binary=REDIS)
    yield server
    server.close()


@pytest.fixture(params=["valkey", "valkey, packed", "postgres"])
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Probe]:
    """An empty store of Redis and of PostgreSQL, for tests that run proxies; that of Redis in both layouts."""
    if request.param == "postgres":
        yield PostgresProbe(request.getfixturevalue("database"))
        return
    packed = request.param == "valkey, packed"
    if packed:
        monkeypatch.setenv(TEST_LAYOUT, "packed")
    valkey: Valkey = request.getfixturevalue("valkey")
    with valkey.client() as client:
        yield RedisProbe(client, valkey.url, packed=packed)


@pytest.fixture(params=REDIS_KINDS)
def empty_server(request: pytest.FixtureRequest) -> Valkey:
    """An empty server: Valkey, and the Redis of this system."""
    return _emptied(request, request.param)


def _emptied(request: pytest.FixtureRequest, kind: str) -> Valkey:
    server: Valkey = request.getfixturevalue(f"shared_{kind}")
    with server.client() as client:
        client.flushall()
    return server


@pytest.fixture(params=[*REDIS_KINDS, *(f"{kind}, packed" for kind in REDIS_KINDS), "postgres"])
def probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Probe]:
    """An empty store of each kind, also of the Redis of this system, and in both layouts of a record."""
    if request.param == "postgres":
        yield PostgresProbe(request.getfixturevalue("database"))
        return
    kind, _, layout = request.param.partition(", ")
    monkeypatch.setenv(TEST_LAYOUT, layout or "hash")
    server = _emptied(request, kind)
    with server.client() as client:
        yield RedisProbe(client, server.url, packed=layout == "packed")


@pytest.fixture(scope="session")
def shared_database() -> Iterator[Database]:
    """The PostgreSQL database of this process, on the server of the test run."""
    database = Database(f"tests_{os.getpid()}")
    yield database
    database.close()


@pytest.fixture
def database(shared_database: Database) -> Database:
    """A migrated PostgreSQL database without records: `url`, `schema`, and `connection` to look into it."""
    shared_database.empty()
    return shared_database


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A real Valkey that the test may pause or kill."""
    server = Valkey()
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[Server]:
    server = stopped_template()
    yield server
    server.close()


@pytest.fixture(params=["redis", "postgres"])
def own_store(request: pytest.FixtureRequest) -> Iterator[Valkey | OwnPostgres]:
    """A store of each kind that the test may pause or kill."""
    template = request.param == "postgres" and request.getfixturevalue("postgres_template")
    server = OwnPostgres(template) if template else Valkey()
    yield server
    server.close()


@pytest.fixture(params=["redis", "postgres"])
def store(request: pytest.FixtureRequest) -> SharedStore:
    """The run's store of each kind, empty."""
    if request.param == "postgres":
        return SharedPostgres(request.getfixturevalue("database"))
    return request.getfixturevalue("valkey")  # type: ignore[no-any-return]


@pytest.fixture(params=["redis", pytest.param("postgres", marks=pytest.mark.full)])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of the run's store, empty: of that in PostgreSQL under `make faults`."""
    of: Valkey | Database = request.getfixturevalue("database" if request.param == "postgres" else "valkey")
    return of.url


@pytest.fixture
async def upstream() -> AsyncIterator[RawUpstream]:
    """A scripted upstream that records every request byte for byte."""
    server = RawUpstream()
    await server.start()
    yield server
    await server.close()


# A `pytestmark`: the head cache may change nothing but the time.
with_and_without_head_cache = pytest.mark.parametrize(
    "head_cache", ["head cache", "no head cache"], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def head_cache(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start proxies without the head cache where the parameter says so; else as TEST_HEAD_CACHE does."""
    with pytest.MonkeyPatch.context() as patch:
        if getattr(request, "param", "") == "no head cache":
            patch.setenv("TEST_HEAD_CACHE", "off")
        yield


@pytest.fixture
def proxies(head_cache: None, zygote: Zygote, tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """Start proxies as processes: `proxies(upstream, store_url, LEASE_MS=300)`; all end with the test."""
    started: list[Proxy] = []

    def start(upstream: RawUpstream | str, store_url: str = "embedded", **settings: object) -> Proxy:
        url = upstream if isinstance(upstream, str) else upstream.url
        proxy = Forked(zygote, url, store_url, tmp_path, written_layout() | settings)
        started.append(proxy)
        proxy.start()
        return proxy

    yield start
    for proxy in started:
        proxy.close()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process of which proxies are forked."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def fork(zygote: Zygote, tmp_path: Path) -> Iterator[Callable[..., Awaitable[Forked]]]:
    """The same where the test's own loop has a part in the start: `await fork(upstream, store_url, LEASE_MS=300)`."""
    started: list[Forked] = []

    async def start(upstream: RawUpstream | str, store_url: str, **settings: object) -> Forked:
        url = upstream if isinstance(upstream, str) else upstream.url
        started.append(proxy := Forked(zygote, url, store_url, tmp_path, written_layout() | settings))
        await proxy.begin()
        return proxy

    yield start
    for proxy in started:
        proxy.close()


@pytest.fixture(scope="module")
def standing(
    head_cache: None, zygote: Zygote, shared_valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """One proxy with default settings for all tests of a module, for tables of requests; its upstream is `behind`."""
    with standing_proxy(zygote, shared_valkey.url, tmp_path_factory.mktemp("standing")) as proxy:
        yield proxy


@pytest.fixture
async def behind(standing: Proxy, valkey: Valkey) -> AsyncIterator[RawUpstream]:
    """The upstream of `standing`, new for each test, with the store empty."""
    async with standing_upstream(standing) as server:
        yield server


@pytest.fixture
async def gate(upstream: RawUpstream, valkey: Valkey, proxies) -> Proxy:
    """One proxy with default settings in front of `upstream`."""
    return proxies(upstream, valkey.url)
