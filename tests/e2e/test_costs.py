"""What a request costs, in counts: calls to the store, writes, connections, system calls. No timings."""

import asyncio
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import Valkey
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Answer,
    Proxy,
    RawClient,
    RawUpstream,
    Tap,
    answering,
    ask,
    chunk,
    request,
    until,
)
from tests.zygote import Zygote, standing_proxy

REQUESTS = 40
TRIES = 3
# Longer than it takes until an operator may know of a request.
LONG_S = 1.5
SEGMENTS_IN = 152  # offset of tcpi_data_segs_in in struct tcp_info, linux/tcp.h (since 4.6)
DECLINED = OK.replace(b"200 OK", b"429 Too Many Requests")
AMBIGUOUS = OK.replace(b"200 OK", b"502 Bad Gateway")


class Costs(NamedTuple):
    """Counts at the edges of the proxy: in the store, on the client's connection, in the upstream."""

    store_calls: int  # scripts by their sha, which is all that a request may ask for
    store_trips: int  # reads of its sockets by the store
    client_writes: int
    upstream_requests: int
    upstream_writes: int
    upstream_connections: int


EXECUTION = Costs(2, 2, 1, 1, 1, 0)
FROM_THE_STORE = Costs(1, 1, 1, 0, 0, 0)
PASSED_ON = Costs(0, 0, 1, 1, 1, 0)
REFUSED = Costs(0, 0, 1, 0, 0, 0)

# What is asked (a "*" in the key: another one each time), what the upstream says, what comes, what each one costs.
TABLE: dict[str, tuple[dict[str, Any], bytes, int, Costs]] = {
    "execution": ({"key": "new-*"}, OK, 200, EXECUTION),
    "replay": ({"key": "known"}, OK, 200, FROM_THE_STORE),
    "mismatch": ({"key": "known", "body": b"another"}, OK, 422, FROM_THE_STORE),
    "in flight": ({"key": "running"}, OK, 409, FROM_THE_STORE),
    "unknown": ({"key": "lost"}, OK, 409, FROM_THE_STORE),
    "released": ({"key": "declined-*"}, DECLINED, 429, EXECUTION),
    "becoming unknown": ({"key": "ambiguous-*"}, AMBIGUOUS, 502, EXECUTION),
    "invalid": ({"key": ","}, OK, 400, REFUSED),
    "pass-through": ({"key": None}, OK, 200, PASSED_ON),
    "pass-through without a body": ({"key": None, "body": b"", "method": "GET"}, OK, 200, PASSED_ON),
}


@pytest.fixture(scope="module")
def standing(zygote: Zygote, shared_valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy that uses its connections at once again, as it does everywhere with what has rested."""
    with standing_proxy(
        zygote, shared_valkey.url, tmp_path_factory.mktemp("standing"), {"UPSTREAM_REST_S": 0}
    ) as proxy:
        yield proxy


def segments_in(writer: asyncio.StreamWriter) -> int:
    """Return how many segments with data came on a TCP connection: as nobody delays them, the peer's writes."""
    raw = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return struct.unpack_from("=I", raw, SEGMENTS_IN)[0]  # type: ignore[no-any-return]


def counted(valkey: Valkey, client: RawClient, upstream: RawUpstream) -> Costs:
    with valkey.client() as asking:
        commands, stats = asking.info("commandstats"), asking.info("stats")
    return Costs(
        # Looks at its health come as eval; an eval of a request's follows an evalsha that failed.
        sum(
            commands.get("cmdstat_evalsha", {"calls": 0, "failed_calls": 0})[kind] for kind in ("calls", "failed_calls")
        ),
        stats["total_reads_processed"] - commands["cmdstat_info"]["calls"],  # all but looks at its health
        segments_in(client.writer),
        len(upstream.received),
        sum(map(segments_in, upstream.writers)),
        upstream.connections,
    )


def minus(one: Costs, other: Costs) -> list[int]:
    return [mine - theirs for mine, theirs in zip(one, other, strict=True)]


@pytest.mark.parametrize("what", TABLE)
async def test_round_trips_writes_and_connections(standing, behind, valkey, what):
    """An execution asks the store twice, all else once or never; each answer is one write; connections are kept."""
    options, script, status, costs = TABLE[what]
    # It has begun to answer: for a request without any response an idle connection would be closed.
    tap = Tap()
    behind.script = tap.script
    tap.send(CHUNKED)
    running = asyncio.ensure_future(ask(standing.port, request(key="running")))
    await until(lambda: behind.received)
    for key, answer in (("known", OK), ("lost", AMBIGUOUS)):
        behind.script = answering(answer)
        await ask(standing.port, request(key=key))
    behind.script = answering(script)
    with closing(await RawClient.open(standing.port)) as client:
        await send(client, "first", options)  # opens what is kept open

        ours = minus(counted(valkey, client, behind), counted(valkey, client, behind))  # what counting costs, negative
        before = counted(valkey, client, behind)
        answers = [await send(client, n, options) for n in range(REQUESTS)]
        spent = minus(counted(valkey, client, behind), before)
        each = [(cost + own) / REQUESTS for cost, own in zip(spent, ours, strict=True)]

        assert {answer.status for answer in answers} == {status}
        assert Costs(*map(round, each)) == costs, each
        assert each[:1] + each[2:] == [*costs[:1], *costs[2:]], "some cost more than others"
    tap.end(chunk(b"ok"), LAST_CHUNK)
    await running


async def send(client: RawClient, n: object, options: dict[str, Any]) -> Answer:
    key = options["key"]
    answer = await client.ask(request(**options | {"key": key and key.replace("*", str(n))}))
    assert answer is not None
    assert answer.complete
    return answer


async def test_what_takes_long_asks_the_store_no_more(standing, behind, valkey):
    """A request that an operator may stop, and a stream that nobody joins: claim, chunks, settlement. The mailbox is
    not looked at, as the store tells of notes."""
    with valkey.client() as asking, asking.monitor() as monitor:
        await until(lambda: asking.pubsub_channels("once:wake:{*"))
        (mail,) = asking.pubsub_channels("once:wake:{*")
        # It has heard of its mail, and looks.
        assert asking.publish(mail, b"") == 1
        await commands_until(monitor, "HGETALL once:mail")
        silent, stream, running = Tap(), Tap(), []
        for tap in (silent, stream):
            behind.script, received = tap.script, len(behind.received)
            running.append(asyncio.ensure_future(ask(standing.port, request(key=f"long-{len(running)}"))))
            await until(lambda received=received: len(behind.received) > received)
        stream.send(CHUNKED)
        for _ in range(10):
            stream.send(chunk(b"data: x\n\n"))
            await asyncio.sleep(LONG_S / 10)
        stream.end(LAST_CHUNK)
        silent.end(OK)
        assert {answer.status for answer in await asyncio.gather(*running)} == {200}
        asking.echo("over")
        spent = await commands_until(monitor, "ECHO over")
    # A claim and a settlement each, and a chunk for each second that has begun.
    assert len([command for command in spent if command.startswith("EVALSHA")]) <= 4 + 2
    # Once a minute a worker finds out whether it still hears of its mail.
    assert len([command for command in spent if re.match(r"PING|PUBLISH|.* once:mail:", command)]) <= 3, spent


async def commands_until(monitor: Any, last: str) -> list[str]:
    """Return the commands that came to a store up to one that begins so."""
    commands = []
    for entry in await asyncio.to_thread(lambda: list(takewhile(lambda one: not begins(one, last), monitor.listen()))):
        if entry["client_type"] != "lua":
            commands.append(entry["command"])
    return commands


def begins(entry: dict[str, str], text: str) -> bool:
    return entry["command"].upper().startswith(text.upper())


@pytest.mark.parametrize("rest_s", [0, 0.02])
async def test_an_upstream_connection_is_kept_for_many_executions(proxies, upstream, valkey, rest_s):
    """One client at a time needs one connection to the upstream, however many executions there are: without a rest, or
    if each comes after the rest."""
    proxy = proxies(upstream, valkey.url, UPSTREAM_REST_S=rest_s, UPSTREAM_REUSE_IDLE_S=60)
    with closing(await RawClient.open(proxy.port)) as client:
        for n in range(REQUESTS):
            assert (await send(client, n, {"key": "k-*"})).status == 200
            # An exchange that took longer rests longer.
            await asyncio.sleep(rest_s * 4)
    assert upstream.connections == (1 if rest_s == 0 else pytest.approx(1, abs=2))


async def test_one_client_at_a_time_has_one_connection_open(gate, upstream):
    """A request that finds a resting connection alone closes it: one after the other, no two stay open."""
    with closing(await RawClient.open(gate.port)) as client:
        for n in range(REQUESTS):
            assert (await send(client, n, {"key": "k-*"})).status == 200
            await until(lambda: len(upstream.writers) == 1)
    assert upstream.connections > 1


# Of the proxy alone, without its access log: what it is to write and to read, and how often it may go to sleep.
# An execution writes the claim, the request, the settlement and the answer, and reads as often.
CALLS = {
    "execution": ({"key": "traced-*"}, 0, {"write": 4, "read": 4, "sleep": 6, "all": 16}),
    # One of them is a getpid of asyncio, by which the wait for a connection can be cancelled.
    "execution that connects": ({"key": "traced-*"}, 10, {"write": 4, "read": 4, "sleep": 9, "all": 36}),
    "replay": ({"key": "traced"}, 0.1, {"write": 2, "read": 2, "sleep": 3, "all": 8}),
    "pass-through": ({"key": None}, 0, {"write": 2, "read": 2, "sleep": 3, "all": 9}),
}
CLASSES = {
    "write": r"write|writev|send|sendto|sendmsg",
    "read": r"read|readv|recv|recvfrom|recvmsg",
    "sleep": r"epoll_pwait2?",  # epoll_wait is the look at the idle connections
    "all": r"\w+",
}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("what", CALLS)
async def test_system_calls(proxies, upstream, valkey, tmp_path, what):
    """A request makes no more system calls of each class than it needs."""
    options, rest_s, limits = CALLS[what]
    proxy = proxies(upstream, valkey.url, ACCESS_LOG="off", UPSTREAM_REST_S=rest_s)
    with closing(await RawClient.open(proxy.port)) as client:
        for n in range(5):
            await send(client, f"before{n}", options)
        tries = [await spent(proxy, client, options, tmp_path / f"calls{turn}") for turn in range(TRIES)]
    # Half a call more for what goes on beside: sweeps, a look at the store. The least of some tries, as a turn that
    # something else was due in saves a sleep only where the store's reply is there already.
    least = {name: min(one[name] for one in tries) for name in limits}
    assert {name: n for name, n in least.items() if n > limits[name] + 0.5} == {}, f"{limits}, {tries}"


async def spent(proxy: Proxy, client: RawClient, options: dict[str, Any], out: Path) -> dict[str, float]:
    """Return how many calls of each class a request takes."""
    tracer = await traced(proxy, out)
    for n in range(5 * REQUESTS):
        assert (await send(client, f"{out.name}-{n}", options)).status == 200
    tracer.send_signal(signal.SIGINT)
    tracer.wait(10)
    found = calls(out)
    sums = {name: sum(n for call, n in found.items() if re.fullmatch(one, call)) for name, one in CLASSES.items()}
    return {name: n / (5 * REQUESTS) for name, n in sums.items()}


async def traced(proxy: Proxy, out: Path) -> "subprocess.Popen[bytes]":
    """Return the tracer of a proxy, once it counts. Skips where tracing is not allowed."""
    said = out.with_suffix(".said")
    with said.open("wb") as file:
        command = ["strace", "-f", "-c", "-o", out, "-p", str(proxy.process.pid)]
        tracer = subprocess.Popen(command, stderr=file, start_new_session=True)
    status = Path(f"/proc/{proxy.process.pid}/status")
    await until(lambda: tracer.poll() is not None or f"TracerPid:\t{tracer.pid}\n" in status.read_text())
    if tracer.poll() is not None:
        pytest.skip(f"no tracing here: {said.read_text().strip()}")
    return tracer


def calls(out: Path) -> dict[str, int]:
    """Read strace's table: share, seconds, time a call, calls, perhaps errors, name."""
    rows = [line.split() for line in out.read_text().splitlines()[2:] if not line.startswith("-")]
    return {row[-1]: int(row[3]) for row in rows if row[-1] != "total"}
