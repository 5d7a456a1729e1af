"""How each contender is started, and the two servers they share: the upstream and Redis."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.machine import PYTHON, Cores, Process, free_port
from loadtest.peers import nginx


@dataclass(frozen=True)
class Running:
    """A contender that listens."""

    process: Process
    port: int


@dataclass(frozen=True)
class Site:
    """What stands around the contenders: started once, for all of them."""

    cores: Cores
    upstream_port: int
    redis_port: int
    upstream: Process
    redis: Process

    @property
    def upstream_url(self) -> str:
        return f"http://127.0.0.1:{self.upstream_port}"

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}/0"


def open_site(cores: Cores) -> Site:
    """Start the upstream and a Redis that writes nothing to disk."""
    upstream_port, redis_port = free_port(), free_port()
    upstream = _nginx(cores.other, upstream_port, nginx.UPSTREAM)
    server = shutil.which("redis-server") or shutil.which("valkey-server") or "redis-server"
    command = (server, "--port", redis_port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    redis = Process(command, cores.other)
    redis.await_port(redis_port)
    return Site(cores, upstream_port, redis_port, upstream, redis)


def close_site(site: Site) -> None:
    site.upstream.stop()
    site.redis.stop()


def _nginx(cores: frozenset[int], port: int, server: str, upstream_port: int = 0, redis_port: int = 0) -> Process:
    folder = Path(_folder())
    text = nginx.config(folder, port, server, upstream_port)
    (folder / "nginx.conf").write_text(text)
    env = {"STORE_HOST": "127.0.0.1", "STORE_PORT": str(redis_port)}
    process = Process(("nginx", "-e", "stderr", "-c", folder / "nginx.conf"), cores, env)
    process.await_port(port)
    return process


def _folder() -> str:
    import tempfile

    return tempfile.mkdtemp(prefix="oncegate-bench-nginx-")


def oncegate(site: Site) -> Running:
    """oncegate as it comes, on the shared Redis: default settings."""
    return _oncegate(site, site.redis_url)


def oncegate_embedded(site: Site) -> Running:
    """oncegate as it comes, with the store that it brings along, which shares its core."""
    return _oncegate(site, "embedded")


def _oncegate(site: Site, store_url: str) -> Running:
    port, admin = free_port(), free_port()
    env = {
        "ONCEGATE_UPSTREAM": site.upstream_url,
        "ONCEGATE_LISTEN": f"127.0.0.1:{port}",
        "ONCEGATE_ADMIN_LISTEN": f"127.0.0.1:{admin}",
        "ONCEGATE_STORE_URL": store_url,
        "ONCEGATE_DATA_DIR": _folder(),
    }
    process = Process((PYTHON, "-m", "proxy", "serve"), site.cores.proxy, env)
    process.await_port(port)
    return Running(process, port)


def obvious(site: Site) -> Running:
    """aiohttp, its client and redis-py."""
    port = free_port()
    command = (PYTHON, "-m", "loadtest.peers.obvious", port, site.upstream_url, site.redis_url)
    process = Process(command, site.cores.proxy)
    process.await_port(port)
    return Running(process, port)


def nginx_lua(site: Site) -> Running:
    """A hundred lines of Lua in nginx."""
    port = free_port()
    process = _nginx(site.cores.proxy, port, nginx.PASS % nginx.ONCE, site.upstream_port, site.redis_port)
    return Running(process, port)


def nginx_pass(site: Site) -> Running:
    """nginx proxy_pass."""
    port = free_port()
    return Running(_nginx(site.cores.proxy, port, nginx.PASS % "", site.upstream_port), port)


def aiohttp_pass(site: Site) -> Running:
    """aiohttp as a plain proxy."""
    port = free_port()
    process = Process((PYTHON, "-m", "loadtest.peers.passing", port, site.upstream_url), site.cores.proxy)
    process.await_port(port)
    return Running(process, port)


KEYED: dict[str, Callable[[Site], Running]] = {
    "oncegate": oncegate,
    "obvious": obvious,
    "nginx+lua": nginx_lua,
    "embedded": oncegate_embedded,
}
PASSING: dict[str, Callable[[Site], Running]] = {"nginx": nginx_pass, "aiohttp": aiohttp_pass}
ALL = KEYED | PASSING
