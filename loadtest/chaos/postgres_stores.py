"""The store of a run on PostgreSQL: a server with fsync on, and a standby, synchronous at `replicated`."""

import asyncio
import contextlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loadtest.chaos.faults import Kind, World
from loadtest.chaos.link import Link
from loadtest.chaos.parts import START_S, Part, Replica
from loadtest.postgres_server import REPLICATION, Server
from oncegate.server.embedded_postgres import SUPERUSER, EmbeddedPostgresError
from oncegate.store.postgres.migrations.partitions import missing_partitions
from oncegate.store.postgres.migrations.run import Run, Target, connect

SYNCHRONOUS = "FIRST 1 (s0, s1)"
OTHERS = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
Result = TypeVar("Result")


class PostgresStores:
    """The servers: the primary, and a standby that replicates it over a link if the run has failovers."""

    def __init__(self, folder: Path, seed: int, failover: bool, durability: str, options: tuple[str, ...]) -> None:
        self.durability = durability or ("replicated" if failover else "fsync")
        given = dict(option.split("=", 1) for option in options)
        self.servers = [Server(REPLICATION | given, name=f"s{number}") for number in range(1 + failover)]
        self.ports = [server.port for server in self.servers]
        self.url = f"postgresql://{SUPERUSER}@{{}}/postgres"
        self.primary = self.servers[0]
        self.link = Link(("127.0.0.1", self.primary.port), seed * 100 + 30)
        self._folder = folder

    @property
    def parts(self) -> list[Part]:
        return []  # each connection has a process of its own

    @property
    def standby(self) -> Server:
        (standby,) = (server for server in self.servers if server is not self.primary)
        return standby

    @property
    def _is_replicated(self) -> bool:
        return self.durability == "replicated"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        kinds = (
            Kind("store-kill", 6, "store", False, self.kill),
            Kind("store-restart", 4, "store", False, self.restart),
            Kind("store-pause", 5, "store", False, self.pause),
            Kind("store-terminate", 4, "store-backends", False, self.terminate),
            Kind("store-cancel", 5, "store-backends", False, self.cancel),
        )
        if len(self.servers) == 1:
            return kinds
        loses = "answers to unknown" if self._is_replicated else "claims"
        failover = Kind("store-failover", 10, "store", False, self.fail_over, loses)
        return (*kinds, Kind("standby-pause", 4, "store", False, self.pause_standby), failover)

    async def start(self) -> None:
        await _aside(self.primary.create)
        await _aside(self.primary.start)
        await self._migrate()
        if len(self.servers) > 1:
            await self.link.start()
            await self._follow()

    async def _migrate(self) -> None:
        target = Target(self.primary.url)
        connection = await connect(target)
        run = Run(connection, target)
        await run.start()
        await run.migrate()
        await run.execute_each(missing_partitions(1))
        await connection.close()

    async def _follow(self) -> None:
        """Make the other server the standby, with nothing left of what it had, and wait until it counts."""
        standby = self.standby
        shutil.rmtree(standby.data, ignore_errors=True)
        source = f"host=127.0.0.1 port={self.link.port} user={SUPERUSER}"
        await _aside(
            lambda: standby.run(
                "pg_basebackup", "--dbname", source, "--checkpoint", "fast", "--no-sync", "--write-recovery-conf"
            )
        )
        await _aside(standby.start)
        if self._is_replicated:
            await self._set_names(SYNCHRONOUS)
        wanted = "sync" if self._is_replicated else "async"
        await self._until(f"SELECT count(*) FROM pg_stat_replication WHERE sync_state = '{wanted}'", "1")

    async def _until(self, query: str, value: str) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            with contextlib.suppress(EmbeddedPostgresError):
                if await self._sql(query) == value:
                    return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"not {value}: {query}")

    async def _sql(self, statement: str) -> str:
        return await _aside(lambda: self.primary.sql(statement))

    async def _set_names(self, names: str) -> None:
        await self._sql(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        await self._sql("SELECT pg_reload_conf()")

    async def close(self) -> None:
        for server in self.servers:
            (self._folder / f"{server.name}.log").write_text(server.log())
            server.close()
        await self.link.close()

    # Faults ...

    async def kill(self, world: World, _: Replica, rng: random.Random) -> str:
        await _aside(self.primary.kill)
        away_s = rng.choice((0.0, 0.5, 1.5 * world.lease_s))
        await asyncio.sleep(away_s)
        await _aside(self.primary.start)
        return f"same files, after {away_s:.1f} s"

    async def restart(self, _: World, __: Replica, rng: random.Random) -> str:
        mode = rng.choice((signal.SIGINT, signal.SIGQUIT))
        await _aside(lambda: self.primary.stop(mode))
        await _aside(self.primary.start)
        return "fast" if mode == signal.SIGINT else "immediate"

    async def pause(self, world: World, _: Replica, rng: random.Random) -> str:
        return await self._paused(self.primary, rng.choice((0.3, 0.9, 2 * world.lease_s)))

    async def pause_standby(self, _: World, __: Replica, rng: random.Random) -> str:
        return await self._paused(self.standby, rng.choice((0.3, 0.9, 3.0)))

    async def _paused(self, server: Server, seconds: float) -> str:
        server.pause()
        try:
            await asyncio.sleep(seconds)
        finally:
            server.resume()
        return f"suspended for {seconds:.1f} s"

    async def terminate(self, _: World, __: Replica, rng: random.Random) -> str:
        """End connections at the server, several times."""
        return await self._signal_backends("pg_terminate_backend", rng)

    async def cancel(self, _: World, __: Replica, rng: random.Random) -> str:
        """Cancel what runs: whoever waits for the standby is told of a success that only this server has."""
        return await self._signal_backends("pg_cancel_backend", rng)

    async def _signal_backends(self, function: str, rng: random.Random) -> str:
        met, times = 0, rng.randint(2, 6)
        for _ in range(times):
            # Another fault has the server.
            with contextlib.suppress(EmbeddedPostgresError):
                met += int(await self._sql(f"SELECT count({function}(pid)) {OTHERS}"))
            await asyncio.sleep(0.2)
        return f"{met} processes"

    async def fail_over(self, world: World, _: Replica, rng: random.Random) -> str:
        """The standby is cut off and promoted; the old primary is dead, or lives on for a while."""
        old, new = self.primary, self.standby
        behind_s, is_alive, is_emptied = rng.choice((0.1, 0.5, 1.2)), rng.random() < 0.5, rng.random() < 0.3
        self.link.hole()
        if is_emptied:  # whoever waits for the standby is told of a plain success
            await self._set_names("")
        await asyncio.sleep(behind_s)
        if not is_alive:
            await _aside(old.kill)
        self.link.cut()
        await _aside(lambda: _promote(new, SYNCHRONOUS if self._is_replicated and rng.random() < 0.5 else ""))
        self.primary = new
        for replica in world.replicas:
            replica.primary = self.servers.index(new)
        if is_alive:
            await asyncio.sleep(rng.choice((0.3, 1.5)))
            await _aside(old.kill)
        self.link.target = ("127.0.0.1", new.port)
        self.link.cut()
        self.link.heal()
        await self._follow()
        how = "alive" if is_alive else "dead"
        return f"the standby was {behind_s:.1f} s behind, the old primary {how}{', names emptied' * is_emptied}"


def _promote(server: Server, names: str) -> None:
    # A standby inherits the setting with the files.
    with (server.data / "postgresql.auto.conf").open("a") as file:
        file.write(f"synchronous_standby_names = '{names}'\n")
    server.sql("SELECT pg_reload_conf()")
    server.sql("SELECT pg_promote(true, 30)")


async def _aside(work: Callable[[], Result]) -> Result:
    """Run what blocks in a thread, as the links of the run live in this one."""
    return await asyncio.to_thread(work)
