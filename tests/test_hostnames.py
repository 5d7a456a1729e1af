"""Host names: one look-up at a time, kept for a moment, and a silent name server that holds up nobody else."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from oncegate.hostnames import system
from oncegate.hostnames.resolver import FAILURE_KEPT_S, PATIENCE_S, STALE_S, Resolver
from oncegate.hostnames.system import AddressInfo, system_look_up
from tests.name_server import NameServer
from tests.parts import ROOT, until

TTL_S = 0.3
SILENCE = socket.gaierror(socket.EAI_AGAIN, "no name server answered")
NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "no such name")


@pytest.fixture
def server():
    """A name server, whose look-ups are all over at the end."""
    before = threading.active_count()
    one = NameServer("192.0.2.1")
    yield one
    one.open.set()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def resolver(
    server: Callable[[str], list[AddressInfo]], ttl_s: float = TTL_S, log: list[str] | None = None
) -> Resolver:
    def report(event: str, **fields: object) -> None:
        if log is not None:
            log.append(f"{event}: {fields}")

    return Resolver(ttl_s, server, report)


async def test_all_who_ask_at_once_share_a_look_up(server):
    """300 connections at once take one look-up and one thread, and the port is each caller's own."""
    server.delay_s = 0.05
    name = resolver(server).name("api.test")
    answers = await asyncio.gather(*[name.addresses(port) for port in range(300)])
    assert [one[0][4] for one in answers] == [("192.0.2.1", port) for port in range(300)]
    assert server.asked == ["api.test"]


async def test_an_answer_is_kept_for_its_time(server):
    """Within the time nobody is asked again, after it the new addresses are found."""
    name = resolver(server).name("api.test")
    await name.addresses(80)
    server.addresses = ("192.0.2.2",)
    assert (await name.addresses(80))[0][4] == ("192.0.2.1", 80)
    await asyncio.sleep(TTL_S)
    assert (await name.addresses(80))[0][4] == ("192.0.2.2", 80)
    assert len(server.asked) == 2


async def test_each_look_up_is_counted_by_its_end(server):
    """Other addresses, no address and no answer are told apart; the first answer changes nothing."""
    counted: list[str] = []
    name = Resolver(TTL_S, server, count=counted.append).name("api.test")
    changes: list[tuple[tuple[str, ...], OSError | None]] = [
        (("192.0.2.1",), None),
        (("192.0.2.1",), None),
        (("192.0.2.2",), None),
        ((), SILENCE),
        (("192.0.2.2",), None),
        ((), NO_SUCH_NAME),
    ]
    for server.addresses, server.error in changes:
        await name.look_up()
    assert counted == ["unchanged", "unchanged", "changed", "failed", "unchanged", "no_address"]


async def test_a_silent_name_server_holds_up_no_other_name(server):
    """However many names nobody answers for, one that is answered for is found at once."""
    quick = NameServer("192.0.2.9")
    names = Resolver(TTL_S, lambda host: quick(host) if host == "quick.test" else server(host))
    server.open.clear()
    waiting = [asyncio.ensure_future(names.name(f"silent-{number}.test").addresses(80)) for number in range(40)]
    await until(lambda: server.running == 40)
    async with asyncio.timeout(2):
        assert (await names.name("quick.test").addresses(80))[0][4][0] == "192.0.2.9"
    server.open.set()
    await asyncio.gather(*waiting)


async def test_a_look_up_outlives_those_who_wait_for_it(server):
    """Who stops waiting ends no look-up and begins no other: a silent name server never has two for one name."""
    server.open.clear()
    name = resolver(server).name("api.test")
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(name.addresses(80), 0.02)
    server.open.set()
    assert (await name.addresses(80))[0][4][0] == "192.0.2.1"
    assert (server.asked, server.most_running) == (["api.test"], 1)


async def test_an_older_answer_bridges_the_silence(server):
    """While the name server is silent the older answer is used after a moment, then at once, and a new one as soon as
    it is there."""
    log: list[str] = []
    name = resolver(server, 0.1, log).name("api.test")
    await name.addresses(80)
    await asyncio.sleep(0.1)
    server.addresses = ("192.0.2.2",)
    server.open.clear()
    began = time.monotonic()
    assert (await name.addresses(80))[0][4][0] == "192.0.2.1"
    assert time.monotonic() - began >= PATIENCE_S * 0.9
    began = time.monotonic()
    assert (await name.addresses(80))[0][4][0] == "192.0.2.1"
    assert time.monotonic() - began < PATIENCE_S / 2
    assert log == ["host name not looked up: {'host': 'api.test', 'reason': 'no name server answers'}"]
    server.open.set()
    await name.look_up()
    assert (await name.addresses(80))[0][4][0] == "192.0.2.2"
    assert log[1:] == ["host name looked up again: {'host': 'api.test'}"]


async def test_an_older_answer_bridges_failures(server):
    """So it is while the name server says that it cannot tell; that there is no such name is an answer."""
    name = resolver(server, 0.1).name("api.test")
    await name.addresses(80)
    await asyncio.sleep(0.1)
    server.error = SILENCE
    assert (await name.addresses(80))[0][4][0] == "192.0.2.1"
    await asyncio.sleep(FAILURE_KEPT_S)
    server.error = NO_SUCH_NAME
    await name.look_up()
    with pytest.raises(socket.gaierror, match="no such name"):
        await name.addresses(80)
    assert name.hosts == frozenset()


async def test_an_older_answer_is_not_used_for_ever(server, monkeypatch):
    """After STALE_S nobody is sent where the name led then."""
    name = resolver(server, 0.1).name("api.test")
    await name.addresses(80)
    monkeypatch.setattr(name, "_answered_at", name._answered_at - STALE_S)
    server.error = SILENCE
    with pytest.raises(socket.gaierror, match="no name server"):
        await name.addresses(80)


async def test_a_failure_is_kept_for_a_moment(server):
    """Those who ask right after a failure get it; the next attempt to connect asks again."""
    server.error = SILENCE
    name = resolver(server).name("api.test")
    for _ in range(3):
        with pytest.raises(socket.gaierror):
            await name.addresses(80)
    assert len(server.asked) == 1
    await asyncio.sleep(FAILURE_KEPT_S)
    server.error = None
    assert await name.addresses(80)


async def test_no_thread_left_is_a_failed_look_up(server, monkeypatch):
    """At the limit of threads a look-up fails as any other does."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(system.threading.Thread, "start", start)
    with pytest.raises(OSError, match="can't start new thread"):
        await resolver(server).name("api.test").addresses(80)


def test_a_process_ends_while_a_name_server_is_silent():
    """The end of a process waits for no look-up."""
    program = """
import asyncio, time, uvloop
from oncegate.hostnames.resolver import Resolver
async def main():
    name = Resolver(1.0, lambda host: time.sleep(60)).name("silent.test")
    try:
        await asyncio.wait_for(name.addresses(80), 0.1)
    except TimeoutError:
        print("gave up")
uvloop.run(main())
"""
    env = {"PYTHONPATH": str(ROOT / "proxy")}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=20, check=True)
    assert done.stdout == b"gave up\n"


def test_the_system_knows_its_own_name():
    """Each address of a name comes once, and `localhost.` is this machine (RFC 6761)."""
    found = system_look_up("localhost")
    assert {"127.0.0.1", "::1"} >= {one[4][0] for one in found}
    assert len({one[4][0] for one in found}) == len(found)
    assert system_look_up("localhost.") == found
