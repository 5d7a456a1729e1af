"""What is on the disk of a real server when a claim counts, by its system calls (Debian's strace)."""

import asyncio
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.ports import free_ports
from loadtest.postgres_server import Server as PostgresServer
from oncegate.store.results import NotAttempted
from tests.postgres_database import migrated
from tests.real.parts import INSTALLED
from tests.stores import claim, claimed, connected, store_small
from tests.test_durable import key
from tests.topologies import Server, wait_for

pytestmark = INSTALLED

SLOW_S = 0.4


@contextmanager
def traced(server: Server | PostgresServer, log: Path, *more: str) -> Iterator[None]:
    """Note each of a server's syncs to the disk in `log` once it is over, and let it take SLOW_S longer.

    Of processes that it has, only those that start meanwhile are traced. `more`: other calls that are noted.
    """
    delay = f"inject=fdatasync,fsync:delay_enter={int(SLOW_S * 1_000_000)}"
    command = [
        "strace",
        "-f",
        "-o",
        str(log),
        "-e",
        f"trace={','.join(('fdatasync', 'fsync', *more))}",
        "-e",
        delay,
        "-p",
        str(server.process.pid),
    ]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert tracer.stderr
    assert b"attached" in tracer.stderr.readline()
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
        tracer.stderr.close()


def syncs(log: Path) -> int:
    """Return how many syncs are over."""
    return len(re.findall(r"sync.* = 0", log.read_text()))


def test_a_claim_counts_once_it_is_on_the_disk(tmp_path):
    """With `fsync` each claim waits for a slow disk, and has its own sync; a server that does not wait gets none."""
    (port,) = free_ports(1)
    server = Server(port, "--save", "", "--appendonly", "yes", "--appendfsync", "always")
    log = tmp_path / "syncs"

    async def claims() -> None:
        async with connected(f"redis://127.0.0.1:{port}", durability="fsync", timeout_ms=5000) as store:
            with traced(server, log):
                for number in range(3):
                    before, began = syncs(log), time.monotonic()
                    await claimed(store, key=key(number))
                    assert syncs(log) > before
                    assert time.monotonic() - began >= SLOW_S
            server.ask("CONFIG", "SET", "appendfsync", "everysec")
            await store.nodes[0].inspect()
            assert isinstance(await claim(store, key(9)), NotAttempted)
            assert len(server.records()) == 3

    try:
        wait_for(lambda: server.ask("PING"))
        asyncio.run(claims())
    finally:
        server.close()


def test_why_waitaof_is_not_believed(tmp_path):
    """With appendfsync everysec WAITAOF confirms a write that is not on the disk."""
    (port,) = free_ports(1)
    server = Server(port, "--save", "", "--appendonly", "yes", "--appendfsync", "everysec")
    log = tmp_path / "syncs"
    try:
        wait_for(lambda: server.ask("PING"))
        with traced(server, log), server.client() as client:
            confirmed_early = 0
            for number in range(20):
                pipeline = client.pipeline(transaction=False)
                pipeline.execute_command("SET", f"key-{number}", "x")
                pipeline.execute_command("WAITAOF", 1, 0, 1000)
                before = syncs(log)
                confirmed_early += pipeline.execute()[1][0] == 1 and syncs(log) == before
            assert confirmed_early > 0
    finally:
        server.close()


def test_a_claim_in_postgresql_counts_once_it_is_on_the_disk(tmp_path):
    """Claims and settles are replied to behind their sync; renewals, and all at `memory`, are not synced for."""
    server, log = PostgresServer.started(), tmp_path / "syncs"

    async def verbs() -> None:
        await migrated(server.url, "oncegate")
        with traced(server, log, "recvfrom", "sendto"):
            async with connected(server.url, durability="fsync", timeout_ms=20_000) as store:
                for number in range(3):
                    before = syncs(log)
                    owner = await claimed(store, key=key(number))
                    assert syncs(log) > before
                    await store.renew(owner)
                    await store_small(store, owner)
                    assert syncs(log) > before + 1
            before = syncs(log)
            async with connected(server.url, durability="memory", timeout_ms=20_000) as store:
                await store_small(store, await claimed(store, key=key(9)))
            assert syncs(log) == before

    try:
        asyncio.run(verbs())
        assert set(around_syncs(log)) == {("recvfrom", "sendto")}
    finally:
        server.close()


def around_syncs(log: Path) -> Iterator[tuple[str, str]]:
    """Yield for each sync of a connection's process what it did on its socket just before, and just after."""
    by_process: dict[str, list[str]] = {}
    for line in log.read_text().splitlines():
        process, _, call = line.partition(" ")
        name = re.match(r"\s*(?:<\.\.\. )?(\w+)[ (]", call)
        if name and (" = " in call) and "EAGAIN" not in call:
            by_process.setdefault(process, []).append(name[1])
    for calls in by_process.values():
        done = [call for call, before in zip(calls, ["", *calls], strict=False) if call != before]
        for before, call, after in zip(done, done[1:], done[2:], strict=False):
            if call == "fdatasync":
                yield before, after
