"""Several workers on one port: they share the load and the store, and are replaced without a lost connection."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from oncegate.server.signals import StopEvents
from oncegate.server.supervisor import Supervisor
from oncegate.server.systemd import Systemd
from oncegate.settings.cores import usable
from oncegate.settings.settings import Settings
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Proxy,
    RawClient,
    Tap,
    answering,
    ask,
    chunk,
    open_files,
    read_answer,
    request,
    signals_of,
    until,
)
from tests.zygote import Forked


def workers(proxy: Proxy) -> list[int]:
    """Return the pids of the serving workers, newest last."""
    known = [line["pid"] for line in proxy.events("worker started")]
    return [pid for pid in known if alive(pid)]


def sockets(pid: int) -> int:
    """Return how many sockets a process has open."""
    return sum(name.startswith("socket:") for name in open_files(pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ready(proxy: Proxy) -> bool:
    return proxy.admin("/readyz")[0] == 200


async def finished(proxy: Proxy) -> int:
    await until(lambda: proxy.process.poll() is not None, 40)
    return proxy.process.returncode


class Load:
    """Clients that keep their connections and send one request after the other; `broken` counts what failed."""

    def __init__(self, port: int, clients: int) -> None:
        self._port, self.answered, self.broken = port, 0, Counter[str]()
        self._over = False
        self._tasks = [asyncio.ensure_future(self._run(number)) for number in range(clients)]

    async def _run(self, number: int) -> None:
        sent = 0
        while not self._over:
            try:
                client = await RawClient.open(self._port)
            except OSError as error:
                self.broken[f"connect: {error!r}"] += 1
                continue
            with suppress(asyncio.CancelledError):
                while not self._over:
                    sent += 1
                    try:
                        client.writer.write(request(key=f"{number}-{sent}"))
                        answer = await read_answer(client.reader)
                    except OSError as error:
                        self.broken[f"ask: {error!r}"] += 1
                        break
                    if answer is None or answer.status != 200 or not answer.complete:
                        self.broken[f"answer: {answer}"] += 1
                        break
                    self.answered += 1
                    if answer.header("connection") == b"close":
                        break
            client.close()

    async def end(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)


async def test_workers_share_the_port_the_store_and_the_counters(proxies, upstream, valkey):
    """Workers share the connections; a key is executed once for all of them, and /metrics is the sum."""
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    assert len(workers(proxy)) == 2
    idle = {pid: sockets(pid) for pid in workers(proxy)}
    clients = [await RawClient.open(proxy.port) for _ in range(200)]
    answers = await asyncio.gather(*(client.ask(request(key=f"k{n % 100}")) for n, client in enumerate(clients)))
    statuses = Counter(answer.status for answer in answers)
    assert statuses[200] >= 100
    assert statuses[200] + statuses[409] == 200
    assert len(upstream.received) == 100
    spread = [sockets(pid) - before for pid, before in idle.items()]
    assert sum(spread) >= 200
    assert min(spread) > 60, "five standard deviations of a fair coin thrown 200 times are 35"
    executed = proxy.metric('requests_total{outcome="executed"}')
    assert executed == 100
    by_rule = f'{{outcome="executed",rule="(default)",upstream="{upstream.url.removeprefix("http://")}"}}'
    assert proxy.metric(f"rule_requests_total{by_rule}") == 100
    assert proxy.metric("client_open_connections") == proxy.metric('client_connections_total{event="opened"}') == 200
    assert proxy.metric('store_seconds_count{verb="claim"}') >= 200
    assert proxy.metric("workers") == 2
    assert ready(proxy)
    for client in clients:
        client.close()
    assert proxy.stop() == 0


async def test_a_worker_that_dies_is_restarted_and_its_counters_stay(proxies, upstream, valkey):
    """Without one worker it is not ready, but no connection is refused, and no counter goes back."""
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    for n in range(20):
        assert (await ask(proxy.port, request(key=f"k{n}"))).status == 200
    before = proxy.metric('requests_total{outcome="executed"}')
    started = proxy.metric("start_time_seconds")
    victim = workers(proxy)[0]
    os.kill(victim, signal.SIGKILL)
    answers = [await ask(proxy.port, request(key=f"k{n}")) for n in range(20)]  # some wait in the dead one's queue
    assert {answer.header("idempotent-replayed") for answer in answers} == {b"true"}
    await until(lambda: len(workers(proxy)) == 2 and ready(proxy))
    assert before == 20 == proxy.metric('requests_total{outcome="executed"}')
    assert proxy.metric("worker_restarts_total") == 1
    # A service that is young has counters that began with it, which these did not.
    assert proxy.metric("start_time_seconds") == started
    (died,) = proxy.events("worker died")
    assert (died["pid"], died["exit_status"]) == (victim, -signal.SIGKILL)
    assert proxy.stop() == 1, "nobody knows what the killed one had in flight"


async def test_workers_are_replaced_under_load_without_a_refused_or_reset_connection(proxies, upstream, valkey):
    """SIGUSR2: every request is answered, a stream ends complete, an idle connection takes one more request."""
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    first = workers(proxy)
    tap = Tap()
    upstream.script = tap.script
    streaming = asyncio.ensure_future(ask(proxy.port, request(key="stream"), 60))
    await until(lambda: upstream.received)
    upstream.script = answering(OK)
    tap.send(CHUNKED, chunk(b"before"))
    idle = [await RawClient.open(proxy.port) for _ in range(8)]
    for n, client in enumerate(idle):
        assert (await client.ask(request(key=f"idle{n}"))).status == 200
    load = Load(proxy.port, 16)
    await until(lambda: load.answered > 50)
    for _ in range(2):
        proxy.signal(signal.SIGUSR2)
        rounds = len(proxy.events("workers replaced"))
        await until(lambda rounds=rounds: len(proxy.events("workers replaced")) > rounds, 30)
    answered = load.answered
    await until(lambda: load.answered > answered + 50)
    await load.end()
    assert load.broken == {}
    for n, client in enumerate(idle):
        answer = await client.ask(request(key=f"idle{n}"))
        assert answer is not None
        assert answer.header("idempotent-replayed") == b"true"
        assert answer.header("connection") == b"close"
        client.close()
    await until(lambda: len(workers(proxy)) == 3)  # the one that streams is left of the first two
    assert len(set(first) & set(workers(proxy))) == 1
    tap.end(chunk(b"after"), LAST_CHUNK)
    answer = await streaming
    assert (answer.body, answer.complete) == (b"beforeafter", True)
    await until(lambda: not set(first) & set(workers(proxy)))
    assert len(workers(proxy)) == 2
    assert proxy.metric('requests_total{outcome="executed"}') == len(upstream.received)
    assert proxy.stop() == 0


async def successor_of(proxy: Proxy, known: int) -> int:
    """Return the pid of the next worker that is started after `known` ones."""
    await until(lambda: len(proxy.events("worker started")) > known, 30)
    return proxy.events("worker started")[known]["pid"]


async def test_a_worker_that_dies_while_it_is_replaced_leaves_no_third_one(proxies, upstream, valkey):
    """SIGUSR2, and SIGKILL of a worker whose successor starts: the successor takes the slot, and nobody else does."""
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    first = workers(proxy)
    proxy.signal(signal.SIGUSR2)
    successor = await successor_of(proxy, 2)
    os.kill(first[0], signal.SIGKILL)
    await until(lambda: proxy.events("workers replaced"), 30)
    await until(lambda: not set(first) & set(workers(proxy)))
    assert successor in workers(proxy)
    started = [line["worker"] for line in proxy.events("worker started")]
    assert started == [1, 2, 1, 2]
    assert ready(proxy)
    assert proxy.stop() == 1, "nobody knows what the killed one had in flight"


async def test_a_successor_that_dies_leaves_its_predecessor(proxies, upstream, valkey):
    """SIGKILL of a successor that starts: the roll stops and says so, its predecessor serves on, a line is left."""
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    first = workers(proxy)
    proxy.signal(signal.SIGUSR2)
    successor = await successor_of(proxy, 2)
    os.kill(successor, signal.SIGKILL)
    await until(lambda: proxy.events("workers not replaced"), 30)
    assert proxy.events("workers not replaced")[0]["reason"] == "the successor of worker 1 did not start"
    assert [(line["pid"], line["exit_status"]) for line in proxy.events("worker died")] == [(successor, -9)]
    assert workers(proxy) == first
    assert ready(proxy)
    assert proxy.stop() == 0


async def test_a_roll_stops_at_the_first_successor_that_is_not_ready(proxies, upstream, valkey, tmp_path):
    """SIGUSR2 with another secret in .env: the first successor takes no connection, and the old workers serve on."""
    (tmp_path / ".env").write_text("ONCEGATE_SECRET='the secret of before'\n")
    proxy = proxies(upstream, valkey.url, WORKERS=2, IDENTITY_CHANGE="refuse")
    first = workers(proxy)
    (tmp_path / ".env").write_text("ONCEGATE_SECRET='the secret of after'\n")
    proxy.signal(signal.SIGUSR2)
    await successor_of(proxy, 2)
    load = Load(proxy.port, 4)
    await until(lambda: proxy.events("workers not replaced"), 30)
    await load.end()
    assert load.broken == {}
    assert load.answered
    (line,) = proxy.events("workers not replaced")
    assert line["reason"].startswith("the successor of worker 1 is not ready: this proxy names keys in another way")
    assert line["replaced"] == []
    await until(lambda: workers(proxy) == first)
    assert ready(proxy)
    assert not proxy.events("worker died")
    assert proxy.stop() == 0


async def test_a_hangup_reaches_a_worker_that_starts(proxies, upstream, own_valkey, tmp_path):
    """SIGHUP after a successor has read the rules file and before it serves: it reads the file again."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "a"\n')
    proxy = proxies(upstream, own_valkey.url, WORKERS=2, RULES_FILE=rules)
    own_valkey.pause()
    proxy.signal(signal.SIGUSR2)
    successor = await successor_of(proxy, 2)
    # It waits for the store once it has read the file.
    await until(lambda: signal.SIGHUP in signals_of(successor, "SigCgt"), 30)
    rules.write_text('[[rule]]\nname = "b"\n')
    proxy.signal(signal.SIGHUP)
    await until(lambda: len(proxy.events("reloaded")) == 2)
    own_valkey.resume()
    await until(lambda: proxy.events("workers replaced"), 30)
    await until(lambda: len(proxy.events("reloaded")) >= 3)
    assert proxy.events("reloaded")[2]["worker"] == 1
    assert proxy.stop() == 0


async def test_a_stop_while_replaced_workers_end_cuts_nothing_off(proxies, upstream, valkey):
    """SIGTERM right after a replacement meets the old workers at any point of their end: the exit code stays 0."""
    for delay_s in (0, 0.05):
        proxy = proxies(upstream, valkey.url, WORKERS=2)
        proxy.signal(signal.SIGUSR2)
        await until(lambda proxy=proxy: proxy.events("workers replaced"), 30)
        await asyncio.sleep(delay_s)
        assert proxy.stop() == 0


async def test_a_stop_while_a_successor_starts_is_no_failed_replacement(proxies, upstream, own_valkey):
    """SIGTERM while a successor starts, or waits for the store: both it and its predecessor end in order: exit 0."""
    proxy = proxies(upstream, own_valkey.url, WORKERS=2)
    own_valkey.pause()
    proxy.signal(signal.SIGUSR2)
    successor = await successor_of(proxy, 2)
    await until(lambda: signal.SIGHUP in signals_of(successor, "SigCgt"), 30)
    proxy.signal(signal.SIGTERM)
    assert await finished(proxy) == 0
    assert not alive(successor)
    assert not proxy.events("workers not replaced")
    assert not proxy.events("worker died")


async def test_what_is_in_flight_in_any_worker_is_finished(proxies, upstream, valkey):
    """SIGTERM: new connections are refused, each worker finishes its requests, and then all exit: exit 0."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    running = [asyncio.ensure_future(ask(proxy.port, request(key=f"k{n}"))) for n in range(8)]
    await until(lambda: len(upstream.received) == 8)
    assert proxy.metric("in_flight") == 8
    proxy.signal(signal.SIGTERM)
    await until(lambda: _refuses(proxy.port))
    assert proxy.admin("/readyz")[0] == 503
    for _ in running:
        tap.end(OK)
    assert {(await one).body for one in running} == {b"ok"}
    assert await finished(proxy) == 0
    assert valkey.states() == [b"complete"] * 8


def _refuses(port: int) -> bool:
    with socket.socket() as newcomer:
        return newcomer.connect_ex(("127.0.0.1", port)) != 0


async def test_the_exit_code_is_true_of_all_workers(proxies, upstream, valkey):
    """If one worker had to cut something off, the exit code is 1, even if the other had nothing."""
    upstream.script = Tap().script
    proxy = proxies(upstream, valkey.url, WORKERS=2, DRAIN_S=0.3)
    cut = asyncio.ensure_future(ask(proxy.port, request(key="k")))
    await until(lambda: upstream.received)
    proxy.signal(signal.SIGTERM)
    assert (await cut).slug == "upstream-lost"
    assert await finished(proxy) == 1
    assert proxy.events("stopped")[-1]["cut_off"] == 1
    assert valkey.states() == [b"unknown"]


async def test_a_second_signal_cuts_the_grace_of_all_short(proxies, upstream, valkey):
    """A second Ctrl-C ends every worker at once; each worker gets each signal of the terminal once."""
    upstream.script = Tap().script
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    cut = [asyncio.ensure_future(ask(proxy.port, request(key=f"k{n}"))) for n in range(8)]
    await until(lambda: len(upstream.received) == 8)
    pids = workers(proxy)
    assert {os.getpgid(pid) for pid in pids}.isdisjoint({os.getpgid(proxy.process.pid)})
    proxy.signal(signal.SIGINT)
    await until(lambda: _refuses(proxy.port))
    assert all(map(alive, pids)), "the grace is 25 s"
    proxy.signal(signal.SIGINT)
    assert {(await one).slug for one in cut} == {"upstream-lost"}
    assert await finished(proxy) == 1


async def test_a_hangup_reaches_every_worker(proxies, upstream, valkey, tmp_path):
    """SIGHUP: each worker reads the rules file again, and none exits."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "a"\n')
    proxy = proxies(upstream, valkey.url, WORKERS=2, RULES_FILE=rules)
    first = workers(proxy)
    rules.write_text('[[rule]]\nname = "b"\n')
    proxy.signal(signal.SIGHUP)
    await until(lambda: len(proxy.events("reloaded")) == 2)
    told = {line["worker"]: line["rules"] for line in proxy.events("reloaded")}
    assert told == {1: ["b"], 2: ["b"]}
    assert workers(proxy) == first
    assert proxy.stop() == 0


async def test_the_embedded_store_is_shared(proxies, upstream):
    """All workers share one embedded store, which outlives each of them and ends with the last."""
    proxy = proxies(upstream, WORKERS=2)
    assert (await ask(proxy.port, request(key="k"))).status == 200
    for pid in workers(proxy):
        os.kill(pid, signal.SIGKILL)
    for _ in range(8):
        assert (await ask(proxy.port, request(key="k"))).header("idempotent-replayed") == b"true"
    assert len(upstream.received) == 1
    await until(lambda: ready(proxy))
    proxy.stop()
    proxy.start()
    assert (await ask(proxy.port, request(key="k"))).header("idempotent-replayed") == b"true"


async def test_workers_do_not_outlive_their_supervisor_but_finish_what_they_have(proxies, upstream, valkey):
    """If the supervisor is killed, workers accept nothing new, settle their requests, and exit."""
    tap = Tap()
    upstream.script = tap.script
    proxy = proxies(upstream, valkey.url, WORKERS=2)
    pids = workers(proxy)
    running = asyncio.ensure_future(ask(proxy.port, request(key="k")))
    await until(lambda: upstream.received)
    proxy.kill()
    await until(lambda: _refuses(proxy.port))
    tap.end(OK)
    assert (await running).body == b"ok"
    await until(lambda: not any(map(alive, pids)))
    assert valkey.states() == [b"complete"]


@pytest.mark.parametrize("share", [1, 2])
def test_a_port_that_is_in_use_is_refused(proxies, upstream, valkey, share):
    """A port of another service is an error, although the system would let both share it."""
    first = proxies(upstream, valkey.url, WORKERS=share)
    with pytest.raises(AssertionError, match="already in use"):
        proxies(upstream, valkey.url, WORKERS=2, LISTEN=f"127.0.0.1:{first.port}")
    assert ready(first)


def test_workers_that_cannot_start_end_it_all(tmp_path):
    """If a worker cannot start at all, nothing is restarted: exit 2."""
    done = subprocess.run(
        [sys.executable, "-m", "oncegate", "serve"],
        env={
            "PATH": os.environ["PATH"],
            "ONCEGATE_UPSTREAM": "http://127.0.0.1:9",
            "ONCEGATE_STORE_URL": "redis://127.0.0.1:9",
            "ONCEGATE_LISTEN": "127.0.0.1:0",
            "ONCEGATE_ADMIN_LISTEN": "127.0.0.1:0",
            "ONCEGATE_WORKERS": "2",
            "AIOHTTP_NO_EXTENSIONS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot start" in done.stderr
    assert done.stderr.count("worker started") == 2


@pytest.fixture
def starting(zygote, upstream, valkey, tmp_path):
    """A proxy with two workers that nobody waits for."""
    proxy = Forked(zygote, upstream.url, valkey.url, tmp_path, {"WORKERS": 2})
    proxy._begin()
    yield proxy
    proxy.close()


async def test_a_worker_that_dies_before_it_serves_leaves_a_line(starting):
    """SIGKILL of a worker in its first start: a line says which one and how, and the process ends: exit 1."""
    victim = await successor_of(starting, 0)
    os.kill(victim, signal.SIGKILL)
    assert await finished(starting) == 1, "an init system starts it again, as after no mistake in the settings"
    assert (victim, -9) in [(line["pid"], line["exit_status"]) for line in starting.events("worker died")]
    (line,) = starting.events("cannot start")
    assert line["reason"] == "worker 1 ended with status -9 before all workers served"


async def test_a_stop_while_every_worker_is_dead_waits_for_nobody():
    """A stop while all workers are dead and wait for their restart ends at once, not after the grace."""
    settings = Settings(upstream="http://127.0.0.1:9", drain_s=60)
    log = SimpleNamespace(info=lambda *_, **__: None)
    supervisor = Supervisor(settings, [], None, Systemd({}, log), log)
    await asyncio.wait_for(supervisor._stop(StopEvents()), 10)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "what\n"}, None),
    ],
)
def test_auto_is_a_worker_for_each_core_that_may_be_used(tmp_path, files, cores):
    """A container's quota counts, not the cores of its machine."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    own = len(os.sched_getaffinity(0))
    assert usable(tmp_path) == min(own, cores or own)
