"""Stores that are far away: how often a new connection waits for them, and that they are used."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest

from loadtest.ports import free_ports
from oncegate.store.membership import Membership
from oncegate.store.record import PREFIX_BYTES, Claim
from oncegate.store.redis.link import PREPARE_STEPS
from oncegate.store.results import SettleResult, SettleStatus, StoreEvent
from tests.parts import until
from tests.stores import claimed, connected, store_small
from tests.topologies import Clustered, Sentineled, Server, replicated, wait_for

ROUND_TRIP_S = 0.25
PASSWORD = "s3cret"


class Far:
    """A network in which each byte takes half of ROUND_TRIP_S. `trips` has what each connection waited for, by port."""

    def __init__(self, open_connection: Callable[..., Any]) -> None:
        self._open = open_connection
        self._relays: dict[int, asyncio.Server] = {}
        self.trips: dict[int, list[int]] = {}
        self._starting = asyncio.Lock()
        self._serving: set[asyncio.Task[None]] = set()

    async def open_connection(self, host: str, port: int, **options: Any) -> Any:
        async with self._starting:
            if port not in self._relays:
                serve = partial(self._serve, host, port)
                self._relays[port] = await asyncio.start_server(serve, "127.0.0.1", 0)
        await asyncio.sleep(ROUND_TRIP_S)
        return await self._open(host=host, port=self._relays[port].sockets[0].getsockname()[1], **options)

    async def _serve(self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        ends = [writer]
        try:
            from_server, to_server = await self._open(host=host, port=port)
            ends.append(to_server)
            trips = self.trips.setdefault(port, [])
            trips.append(0)
            number, server_spoke = len(trips) - 1, True

            def asked() -> None:
                nonlocal server_spoke
                trips[number] += server_spoke
                server_spoke = False

            def answered() -> None:
                nonlocal server_spoke
                server_spoke = True

            await asyncio.gather(_pass(reader, to_server, asked), _pass(from_server, writer, answered))
        except asyncio.CancelledError:
            pass  # by `close`; the callback of start_server would report it
        finally:
            for end in ends:
                end.transport.abort()

    async def close(self) -> None:
        for relay in self._relays.values():
            relay.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await asyncio.sleep(ROUND_TRIP_S / 2)  # what is under way meets closed connections


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    try:
        while data := await reader.read(1 << 16):
            note()
            loop.call_later(ROUND_TRIP_S / 2, writer.write, data)
    except ConnectionError:
        pass
    await asyncio.sleep(ROUND_TRIP_S / 2)
    writer.close()


@pytest.fixture
async def far(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Far]:
    network = Far(asyncio.open_connection)
    monkeypatch.setattr("asyncio.open_connection", network.open_connection)
    yield network
    await network.close()


def member(quarantine_ms: int = 0) -> Membership:
    def ignore(_event: StoreEvent, _text: str) -> None: ...

    return Membership(bytes(PREFIX_BYTES), "one", "namespace=a", False, 60_000, quarantine_ms, 60.0, False, ignore)


@contextmanager
def single() -> Iterator[tuple[str, list[Server]]]:
    (port,) = free_ports(1)
    server = Server(port, "--save", "", "--requirepass", PASSWORD)
    with closing(server):
        server.credentials = {"password": PASSWORD}
        wait_for(lambda: server.ask("PING"))
        yield f"redis://:{PASSWORD}@127.0.0.1:{port}/1", [server]


@contextmanager
def sentineled() -> Iterator[tuple[str, list[Server]]]:
    with closing(Sentineled(replicas=1)) as group:
        yield group.url, group.servers


@contextmanager
def clustered() -> Iterator[tuple[str, list[Server]]]:
    with closing(Clustered(masters=2, replicas=0)) as group:
        yield group.url, group.servers


@pytest.mark.parametrize(
    ("kind", "durability"), [(single, "memory"), (sentineled, "replicated"), (clustered, "memory")]
)
async def test_a_store_that_is_far_away(far, kind, durability):
    """At 250 ms a round trip the store is ready with the default timeout: it is waited for four times at most."""
    with kind() as (url, servers):
        if durability == "replicated":
            wait_for(lambda: replicated(servers[0], 1))
        async with connected(url, timeout_ms=1000, member=member(), durability=durability) as store:
            waited = [trips for server in servers for trips in far.trips.get(server.port, [])]
            assert len(waited) >= 2
            assert max(waited) <= PREPARE_STEPS == 4
            assert store.not_ready_reason() is None
            owner = await claimed(store)
            assert isinstance(owner, Claim)
            assert await store_small(store, owner) == SettleResult(SettleStatus.STORED)


async def test_a_loss_that_is_far_away(far):
    """What a new connection finds out about a loss, and the begin of a quarantine, take no more than four waits."""
    with single() as (url, servers):
        async with connected(url, timeout_ms=1000, member=member(60_000)) as store:
            assert "no epoch" in (store.not_ready_reason() or "")
            assert max(far.trips[servers[0].port]) <= 4
            servers[0].ask("CLIENT", "KILL", "TYPE", "normal")
            await until(lambda: not store.nodes[0].up)
            await until(lambda: store.nodes[0].up)
            assert max(far.trips[servers[0].port]) <= 4
