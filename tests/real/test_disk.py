"""What is on the disk of a real server when a claim counts, by its system calls (Debian's strace)."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.ports import free_ports
from oncegate.store.results import NotAttempted
from tests.real.parts import INSTALLED
from tests.stores import claim, claimed, connected
from tests.test_durable import key
from tests.topologies import Server, wait_for

pytestmark = INSTALLED

SLOW_S = 0.4


@contextmanager
def traced(server: Server, log: Path) -> Iterator[None]:
    """Note each of a server's syncs to the disk in `log` once it is over, and let it take SLOW_S longer."""
    delay = f"inject=fdatasync,fsync:delay_enter={int(SLOW_S * 1_000_000)}"
    command = [
        "strace",
        "-f",
        "-o",
        str(log),
        "-e",
        "trace=fdatasync,fsync",
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
    return log.read_text().count("= 0")


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
