"""How each contender starts, and what all of them share: the upstreams and a Redis."""

import contextlib
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.bench.machine import PYTHON, Cores, Process
from loadtest.peers import nginx
from loadtest.ports import free_port

LAYOUT_S, EARLIER_LAYOUT_S = 60.0, 7.0


@dataclass(frozen=True)
class Running:
    """A contender that listens."""

    process: Process
    port: int
    admin_port: int = 0
    is_earlier: bool = False


@dataclass(frozen=True)
class Site:
    """The servers around the contenders: started once, for all of them."""

    cores: Cores
    upstream: Running
    events: Running
    redis: Running
    against: Path | None = None  # the folder of an earlier commit's package

    def close(self) -> None:
        for one in (self.upstream, self.events, self.redis):
            one.process.stop()


def open_site(cores: Cores, against: Path | None = None) -> Site:
    """Start the upstreams and a Redis that writes nothing to disk, all on the other core."""
    upstream = _nginx(cores.other, nginx.UPSTREAM)
    events = _listening(lambda port: Process(cores.other, PYTHON, "-m", "loadtest.peers.events", port))
    return Site(cores, upstream, events, open_redis(cores), against)


def open_redis(cores: Cores, program: Path | None = None, *, durable: bool = False) -> Running:
    """Start a Redis as the contenders use it, in memory alone; a `durable` one syncs each write before it replies."""
    server = program or shutil.which("redis-server") or "valkey-server"
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes" if durable else "no"]
    options += ["--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"] if durable else []
    return _listening(lambda port: Process(cores.other, server, "--port", port, *options))


def _listening(start: Callable[[int], Process]) -> Running:
    """Start a process on a free port; try another port if a different process took it first."""
    for tries_left in (2, 1, 0):
        port = free_port()
        process = start(port)
        try:
            return Running(process.await_port(port), port)
        except RuntimeError as error:
            if "in use" not in str(error) or not tries_left:
                raise
    raise AssertionError("unreachable")


def _nginx(cores: frozenset[int], server: str, upstream_port: int = 0, redis_port: int = 0) -> Running:
    env = {"STORE_HOST": "127.0.0.1", "STORE_PORT": str(redis_port)}

    def start(port: int) -> Process:
        folder = nginx.prepare(port, server, upstream_port)
        return Process(cores, "nginx", "-e", "stderr", "-c", folder / "nginx.conf", env=env)

    return _listening(start)


def oncegate(
    site: Site, *, store_url: str = "", upstream_port: int = 0, package: Path | None = None, **settings: object
) -> Running:
    """oncegate on the shared Redis, with default settings except for those that are given.

    `package`: the folder of another build of it than this checkout.
    """
    admin_ports = []

    def start(port: int) -> Process:
        admin_ports.append(free_port())
        env = {
            "ONCEGATE_UPSTREAM": f"http://127.0.0.1:{upstream_port or site.upstream.port}",
            "ONCEGATE_LISTEN": f"127.0.0.1:{port}",
            "ONCEGATE_ADMIN_LISTEN": f"127.0.0.1:{admin_ports[-1]}",
            "ONCEGATE_STORE_URL": store_url or f"redis://127.0.0.1:{site.redis.port}/0",
            # It answers whatever it is asked, also a collector's requests.
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{site.upstream.port}",
            **{f"ONCEGATE_{name}": str(value) for name, value in settings.items()},
            **({"PYTHONPATH": str(package)} if package else {}),
        }
        return Process(site.cores.proxy, PYTHON, "-m", "oncegate", "serve", env=env)

    running = _listening(start)
    return Running(running.process, running.port, admin_ports[-1], package is not None)


def await_ready(running: Running) -> None:
    """Return when /readyz returns 200. Raises RuntimeError if it does not."""
    for _ in range(500):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{running.admin_port}/readyz", timeout=5).close()
            return
        time.sleep(0.02)
    raise RuntimeError(f"not ready: {running.process.said()}")


def embedded(site: Site) -> Running:
    """oncegate with its embedded store, which writes to disk and shares oncegate's core."""
    return oncegate(site, store_url="embedded")


@contextmanager
def serving(running: Running) -> Iterator[Running]:
    """Wait until a contender works as it will go on to, and stop it at the end."""
    try:
        if running.admin_port:
            await_ready(running)
            await_layout(running)
        yield running
    finally:
        running.process.stop()


def await_layout(running: Running) -> None:
    """Return once oncegate has logged in which layout it writes records. Raises RuntimeError if it does not.

    On a new store it writes another one for the first seconds, until it knows that it is alone with its version. An
    earlier commit may know of no layouts, and gets as long as it takes.
    """
    until = time.monotonic() + (EARLIER_LAYOUT_S if running.is_earlier else LAYOUT_S)
    while b"record layout" not in running.process.log():
        if time.monotonic() > until:
            if running.is_earlier:
                return
            raise RuntimeError(f"no layout of records: {running.process.said()}")
        time.sleep(0.05)


def no_rest(site: Site) -> Running:
    """oncegate whose upstream connections do not rest before they are used again."""
    return oncegate(site, UPSTREAM_REST_S=0)


def traced(ratio: float) -> "Start":
    """The same, tracing this share of the requests."""
    return lambda site: oncegate(site, UPSTREAM_REST_S=0, TRACE_RATE_PER_S=1_000_000, TRACE_RATIO=ratio)


def earlier(site: Site) -> Running:
    """The same of an earlier commit."""
    return oncegate(site, package=site.against, UPSTREAM_REST_S=0)


def spare(site: Site) -> Running:
    """oncegate that opens more upstream connections than requests run at once, so that each can rest."""
    return oncegate(site, UPSTREAM_SPARE_CONNECTIONS=1000)


def obvious(site: Site) -> Running:
    """aiohttp, its client and redis-py."""
    return _python_peer(site, "obvious", f"redis://127.0.0.1:{site.redis.port}/0")


def aiohttp_pass(site: Site) -> Running:
    """aiohttp as a plain proxy."""
    return _python_peer(site, "passing")


def _python_peer(site: Site, name: str, *arguments: str) -> Running:
    upstream = f"http://127.0.0.1:{site.upstream.port}"
    module = f"loadtest.peers.{name}"
    return _listening(lambda port: Process(site.cores.proxy, PYTHON, "-m", module, port, upstream, *arguments))


def obvious_postgres(site: Site, database: str) -> Running:
    """aiohttp, its client and asyncpg, with the recipe of most articles."""
    return _python_peer(site, "obvious_postgres", database)


def nginx_lua(site: Site) -> Running:
    """A hundred lines of Lua in nginx."""
    return _nginx(site.cores.proxy, nginx.PASS % nginx.ONCE, site.upstream.port, site.redis.port)


def nginx_pass(site: Site) -> Running:
    """nginx proxy_pass."""
    return _nginx(site.cores.proxy, nginx.PASS % nginx.AT_ONCE, site.upstream.port)


def nginx_bulk(site: Site) -> Running:
    """nginx proxy_pass as it is fastest with large answers."""
    return _nginx(site.cores.proxy, nginx.PASS % nginx.IN_BULK, site.upstream.port)


def direct(site: Site) -> Running:
    """The upstream itself, on the core of the load."""
    return site.upstream


Start = Callable[[Site], Running]
KEYED: dict[str, Start] = {"oncegate": oncegate, "obvious": obvious, "nginx+lua": nginx_lua, "embedded": embedded}
RESTS: dict[str, Start] = {"no-rest": no_rest, "spare": spare}
TRACED: dict[str, Start] = {"traced-0": traced(0), "traced-1": traced(0.01), "traced-10": traced(0.1)}
AGAINST: dict[str, Start] = {"earlier": earlier}
PASSING: dict[str, Start] = {"nginx": nginx_pass, "aiohttp": aiohttp_pass, "direct": direct}
CONTENDERS = KEYED | RESTS | TRACED | AGAINST | PASSING


def start(site: Site, name: str, *, upstream: Running | None = None, store: Running | None = None) -> Running:
    """Start a contender, also on another upstream or store than those that all share."""
    return CONTENDERS[name](replace(site, upstream=upstream or site.upstream, redis=store or site.redis))


def paired(site: Site) -> list[str]:
    """Return the contenders that goals compare: this build, and beside it those that are there."""
    return ["no-rest", "nginx+lua", *(AGAINST if site.against else [])]


@contextmanager
def side_by_side(
    site: Site, names: Sequence[str], upstream: Running | None = None, program: Path | None = None
) -> Iterator[dict[str, tuple[Running, Running]]]:
    """Start contenders and give each a Redis of its own, of that program. While one is measured, the others idle."""
    with ExitStack() as until_the_end:
        pairs = {}
        for name in names:
            store = open_redis(site.cores, program)
            until_the_end.callback(store.process.stop)
            pairs[name] = start(site, name, upstream=upstream, store=store), store
        for name, (running, _) in pairs.items():
            until_the_end.enter_context(nullcontext() if name == "direct" else serving(running))
        yield pairs


def in_turns(names: Sequence[str], number: int) -> list[str]:
    """Return the order of one round: each begins with another one."""
    first = number % len(names)
    return [*names[first:], *names[:first]]
