"""A client process: many operations at a time, each retried with its key until its outcome is known.

It uses any replica, directly or over a link that may fail. It races itself, disconnects early, asks late, and sends
different requests under a used key. Every attempt becomes a line (tab separated; times of CLOCK_MONOTONIC in seconds):
  begun ended tenant key variant replica how status word replayed slug digest execution echo
Some executions are stopped at their address, and some keys are asked about; each such act is a line of another file:
  begun ended act tenant key replica status said       (act: stop, ask; said: the state of the key)
It obeys one command on standard input, `calm`: there are no more faults, so finish what is open, ask for a sample of
known keys again, and exit. Each second it prints a line: attempts, operations begun, operations open.
"""

import asyncio
import json
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import uvloop

from loadtest.chaos.plan import STOPPABLE, Operation, operation, question, request, shared_operation, stop
from loadtest.chaos.wire import Connection, Got

PATIENCE_S = 6.0  # of one attempt
SLOT_S = 0.1  # for so long every client does the same shared operation
REMEMBERED = 20_000
# Answers after which nothing else is to be expected for this request and key.
FINAL_SLUGS = frozenset(
    ("outcome-unknown", "cancelled", "response-not-kept", "key-reused", "record-corrupt", "key-invalid")
)
PREFERENCES = (b"", b"Prefer: wait=2\r\n", b"Prefer: join\r\n")


def is_final(got: Got) -> bool:
    """Return whether a client knows the outcome of its operation after this response."""
    if got.how != "whole":
        return False
    return got.slug in FINAL_SLUGS if got.slug else got.word in ("executed", "replayed", "joined", "reconciled")


class Doors:
    """Connections to the replicas, kept while they work. A door is a replica and the port that leads to it."""

    def __init__(self, ports: list[tuple[int, int]]) -> None:
        self._ports = ports
        self._idle: dict[int, list[Connection]] = {}
        self.replicas = len(ports)

    async def open(self, replica: int, by_link: bool) -> tuple[int, Connection | None]:
        port = self._ports[replica][by_link]
        idle = self._idle.setdefault(port, [])
        while idle:
            if (connection := idle.pop()).idle:
                return port, connection
        try:
            return port, await asyncio.wait_for(Connection.open(port), PATIENCE_S)
        except (OSError, TimeoutError):
            return port, None

    def give_back(self, port: int, connection: Connection) -> None:
        if connection.idle:
            self._idle[port].append(connection)


class Client:
    """The work of one client process."""

    def __init__(self, name: int, seed: int, ports: list[tuple[int, int]], log: Path, retention_s: float) -> None:
        self._name, self._seed, self._retention_s = name, seed, retention_s
        self._doors = Doors(ports)
        self._rng = random.Random(f"{seed}-{name}")
        self._log, self._acts = log.open("w"), log.with_name(f"acts-{name}.tsv").open("w")
        self._count = 0
        self._slot = 0
        self._done: deque[tuple[float, Operation]] = deque(maxlen=REMEMBERED)
        self._open: list[tuple[Operation, int]] = []
        self.attempts = self.pursued = 0
        self.calm = False

    # Attempts ...

    async def attempt(self, op: Operation, variant: int) -> Got:
        """Send one request and log its response."""
        rng = self._rng
        replica, by_link = rng.randrange(self._doors.replicas), rng.random() < 0.5
        raw = request(op, variant, rng.choices(PREFERENCES, (70, 10, 20))[0])
        leaves = 0.2 if op.tenant == STOPPABLE else 0.03
        leave = rng.uniform(0, 0.05) if rng.random() < leaves and not self.calm else None
        began = time.monotonic()
        port, connection = await self._doors.open(replica, by_link)
        if connection is None:
            got = Got("refused")
        elif leave is not None and rng.random() < 0.3:
            got = await connection.break_off(raw, rng)
        else:
            got = await connection.ask(raw, PATIENCE_S, leave)
            self._doors.give_back(port, connection)
        self._write(began, op, variant, replica, got)
        if op.tenant == STOPPABLE and not self.calm and variant == 0:
            if got.stop and rng.random() < 0.1:
                await self._act("stop", op, stop(got.stop))
            if rng.random() < 0.1:
                await self._act("ask", op, question(op))
        return got

    async def _act(self, act: str, op: Operation, raw: bytes) -> None:
        """Stop an execution or ask about a key, at any replica, and log what came of it."""
        began, replica = time.monotonic(), self._rng.randrange(self._doors.replicas)
        port, connection = await self._doors.open(replica, by_link=False)
        got = Got("refused") if connection is None else await connection.ask(raw, PATIENCE_S)
        if connection is not None:
            self._doors.give_back(port, connection)
        said = json.loads(got.said).get("state", "") if got.how == "whole" and got.said else got.slug
        words = f"{began:.6f}", f"{time.monotonic():.6f}", act, op.tenant, op.key, replica, got.status, said
        self._acts.write("\t".join(map(str, words)) + "\n")

    def _write(self, began: float, op: Operation, variant: int, replica: int, got: Got) -> None:
        self.attempts += 1
        self._log.write(
            f"{began:.6f}\t{time.monotonic():.6f}\t{op.tenant}\t{op.key}\t{variant}\t{replica}\t{got.how}\t{got.status}"
            f"\t{got.word}\t{got.replayed:d}\t{got.slug}\t{got.digest}\t{got.execution}\t{got.echo}\n"
        )

    async def pursue(self, op: Operation, variant: int = 0, seconds: float = 8.0) -> bool:
        """Retry until the outcome is known, with exponential backoff and full jitter."""
        until = time.monotonic() + seconds
        tries = 0
        while True:
            got = await self.attempt(op, variant)
            if is_final(got):
                return True
            if time.monotonic() > until:
                return False
            most = 0.1 if got.slug == "in-flight" else min(0.05 * 2**tries, 1.0)
            await asyncio.sleep(self._rng.uniform(0, most))
            tries += 1

    # Operations ...

    async def perform(self, op: Operation) -> None:
        """Perform one operation: several racing clients at once, and a mutant among them or after them."""
        self.pursued += 1
        wanted = [(op, 0)] * op.racers + [(op, op.mutant)] * (op.mutant > 0 and not op.late)
        if len(wanted) == 1:
            known = [await self.pursue(op)]
        else:
            self._rng.shuffle(wanted)
            known = await asyncio.gather(*[self.pursue(*one) for one in wanted])
        if op.mutant and op.late:
            known.append(await self.pursue(op, op.mutant))
        if all(known):
            self._done.append((time.monotonic(), op))
        else:
            self._open.append((op, 0))

    def _next(self) -> list[Operation]:
        slot = int(time.monotonic() / SLOT_S)
        if slot != self._slot:
            self._slot = slot
            return [shared_operation(self._seed, slot)]
        self._count += 1
        return operation(self._seed, self._name, self._count)

    def _earlier(self) -> Operation | None:
        """Return an operation that was performed before and is well within the retention."""
        if not self._done or self._rng.random() > 0.05:
            return None
        at, op = self._done[self._rng.randrange(len(self._done))]
        return op if time.monotonic() - at < self._retention_s / 3 else None

    async def work(self) -> None:
        """Perform one operation after the other until the faults are over."""
        while not self.calm:
            if (op := self._earlier()) is not None:
                await self.pursue(op)
            ops = self._next()
            await (self.perform(ops[0]) if len(ops) == 1 else asyncio.gather(*[self.perform(op) for op in ops]))

    async def finish(self, sample: int) -> None:
        """Resolve the operations that are still open, then ask for a sample of the known keys again."""
        await self._together([(op, variant, 30.0) for op, variant in self._open])
        recent = [op for at, op in self._done if time.monotonic() - at < self._retention_s / 2]
        again = self._rng.sample(recent, min(sample, len(recent)))
        await self._together([(op, 0, 10.0) for op in again])

    async def _together(self, wanted: list[tuple[Operation, int, float]], at_once: int = 16) -> None:
        queue = iter(wanted)

        async def take() -> None:
            for one in queue:
                await self.pursue(*one)

        await asyncio.gather(*[take() for _ in range(at_once)])

    # The process ...

    async def run(self, workers: int, sample: int) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin, self._hear)
        telling = asyncio.ensure_future(self._tell())
        await asyncio.gather(*[self.work() for _ in range(workers)])
        await self.finish(sample)
        telling.cancel()
        self._log.close()
        self._acts.close()
        self._say()

    def _hear(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin)
        self.calm = True

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._log.flush()
            self._say()

    def _say(self) -> None:
        print(self.attempts, self.pursued, len(self._open), flush=True)


def main(told: dict[str, Any]) -> None:
    """Run the client that the command line describes."""
    client = Client(told["name"], told["seed"], told["ports"], Path(told["log"]), told["retention_s"])
    uvloop.run(client.run(told["workers"], told["sample"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
