"""The soak: a proxy of its own, a Valkey, an upstream, and clients of every manner; and the figures it must keep."""

import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import Valkey
from tests.parts import OK, Proxy, RawClient, RawUpstream, ask, chunk, lazy, request

MIB = 1 << 20
CLIENTS = 24
RETENTION_S = 2  # so that the store's keys come and go within the run
LEASE_MS = 1000
# Slow readers: each holds a piece of its answer in the process, on top of what is there anyway.
READERS, ANSWER_BYTES = 1000, 64 * MIB
PIECE_BYTES = 262_144
MAX_BUFFERED_BYTES = 64 * MIB


@dataclass
class Sample:
    """What a proxy holds at one moment."""

    rss: int
    files: int
    spools: int
    tasks: int  # requests under way, as far as the metrics count them
    keys: int

    @classmethod
    def of(cls, proxy: Proxy, valkey: Valkey, spool: Path) -> "Sample":
        folder = f"/proc/{proxy.process.pid}"
        links = []
        for name in os.listdir(f"{folder}/fd"):
            with suppress(OSError):
                links.append(os.readlink(f"{folder}/fd/{name}"))
        fields = Path(f"{folder}/status").read_text().split()
        held = sum(map(proxy.metric, ("in_flight", "reading_bodies", "waiting", "buffered_bytes")))
        with valkey.client() as store:
            keys = sum(1 for _ in store.scan_iter("once:{*", count=10_000))
        return cls(
            int(fields[fields.index("VmRSS:") + 1]) * 1024,
            len(links),
            sum(link.startswith(f"{spool}/") for link in links) + len(list(spool.iterdir())),
            int(held),
            keys,
        )


@dataclass
class Report:
    """What was measured. `failures` is empty where everything came back."""

    seconds: float
    stall_s: float
    before: Sample
    after: Sample
    memory: list[int] = field(default_factory=list)  # bytes resident, once a second
    outcomes: Counter[str] = field(default_factory=Counter)
    readers: int = 0
    readers_bytes: int = 0  # resident at most with the slow readers, over what it was without
    budget_bytes: int = 0
    readers_left: int = 0  # descriptors that were still open after their limit

    def growth(self) -> float:
        """How much more memory the last third of the run needed than the middle one."""
        third = len(self.memory) // 3
        middle, last = self.memory[third : 2 * third], self.memory[2 * third :]
        return max(last) / max(middle) - 1 if middle else 0.0

    def failures(self) -> list[str]:
        after, before = self.after, self.before
        checks = {
            f"memory grew by {self.growth():.1%} in the last third": self.growth()
            <= (0.05 if self.seconds > 60 else 0.2),
            f"{after.files} descriptors, {before.files} before": after.files <= before.files + 2,
            f"{after.spools} spool files": after.spools == 0,
            f"{after.tasks} requests or bytes held": after.tasks == 0,
            f"{after.keys} keys in the store": after.keys == 0,
            f"slow readers held {self.readers_bytes:,} bytes": self.readers_bytes <= self.budget_bytes,
            f"{self.readers_left} slow readers not cut off": self.readers_left <= 2,
        }
        return [text for text, fine in checks.items() if not fine]

    def lines(self) -> list[str]:
        outcomes = ", ".join(f"{count:,} {word}" for word, count in self.outcomes.most_common())
        return [
            f"{self.seconds:.0f} s, {sum(self.outcomes.values()):,} exchanges: {outcomes}",
            f"memory: {self.before.rss / 1e6:.1f} MB before, {max(self.memory) / 1e6:.1f} MB at most, "
            f"{self.after.rss / 1e6:.1f} MB after; last third {self.growth():+.1%} over the middle one",
            f"descriptors: {self.before.files} before, {self.after.files} after; spool files left: "
            f"{self.after.spools}; keys left: {self.after.keys}; held: {self.after.tasks}",
            f"{self.readers:,} slow readers of {ANSWER_BYTES >> 20} MiB: {self.readers_bytes / 1e6:.1f} MB, "
            f"budget {self.budget_bytes / 1e6:.1f} MB; left over: {self.readers_left}",
            *(f"FAILED: {text}" for text in self.failures() or []),
        ]


# Traffic ...


async def answer_in_kind(
    _: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, received: object
) -> None:
    """Answer as the target says: small, large, streamed, slow, declined, failed, lost, endless."""
    line = received.line  # type: ignore[attr-defined]
    if b"/lost" in line:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nnot all of it")
        writer.close()
    elif b"/declined" in line:
        writer.write(b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n")
    elif b"/streamed" in line:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(8):
            writer.write(chunk(bytes(70_000)))
            await asyncio.sleep(0.005)
        writer.write(b"0\r\n\r\n")
    elif b"/large" in line:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % ANSWER_BYTES)
        for _ in range(ANSWER_BYTES // MIB):
            writer.write(bytes(MIB))
            await writer.drain()
    else:
        await asyncio.sleep(0.05 if b"/slow" in line else 0)
        writer.write(OK)


class Crowd:
    """Clients of every manner, until told to stop."""

    def __init__(self, port: int, seed: int, stall_s: float) -> None:
        self._port, self._dice, self._stall_s = port, random.Random(seed), stall_s
        self.outcomes: Counter[str] = Counter()
        self.over = False

    async def client(self, number: int) -> None:
        count = 0
        manners = (self._asks, self._asks, self._asks, self._uploads, self._leaves, self._breaks, self._stalls)
        while not self.over:
            count += 1
            key = f"{number}-{count}"
            with suppress(OSError, TimeoutError, AssertionError, asyncio.IncompleteReadError):
                self.outcomes[await self._dice.choice(manners)(key)] += 1

    async def _asks(self, key: str) -> str:
        """One request of some kind, then the same again."""
        target = self._dice.choice(("/small", "/small", "/streamed", "/slow", "/declined", "/lost"))
        raw = request(self._dice.choice(("POST", "PATCH", "PUT")), target, key, b'{"amount": 1}')
        for _ in range(2):
            answer = await ask(self._port, raw)
        return (answer.header("oncegate-status") or b"passed through").decode()

    async def _uploads(self, key: str) -> str:
        """A body that is spooled."""
        await ask(self._port, request("POST", "/small", key, bytes(self._dice.choice((10_000, MIB + 1, 3 * MIB)))))
        return "uploaded"

    async def _leaves(self, key: str) -> str:
        """A client that resets at some moment, of its upload or of the answer."""
        client = await RawClient.open(self._port)
        raw = request("POST", self._dice.choice(("/slow", "/streamed", "/large")), key, bytes(2 * MIB))
        client.writer.write(raw[: self._dice.choice((20, 300, MIB, len(raw)))])
        await asyncio.sleep(self._dice.uniform(0, 0.1))
        client.reset()
        return "left"

    async def _breaks(self, key: str) -> str:
        """Bytes that are no request."""
        client = await RawClient.open(self._port)
        client.writer.write(request("POST", "/small", key, b"", "Transfer-Encoding: chunked") + b"5\r\nhelloXX")
        with suppress(OSError):
            await client.reader.read(100)
        client.close()
        return "malformed"

    async def _stalls(self, key: str) -> str:
        """A head, a body or a reading that never goes on; now and then, for each takes seconds."""
        if self._dice.random() < 0.9:
            return await self._asks(key)
        client = await lazy(self._port) if self._dice.random() < 0.5 else await RawClient.open(self._port)
        client.writer.write(self._dice.choice((b"POST /x HT", request("POST", "/large", key), request(body=b"")[:-2])))
        await asyncio.sleep(3 * self._stall_s)
        client.reset()
        return "stalled"


# The run ...


async def soak(seconds: float, readers: int = READERS, stall_s: float = 2.0) -> Report:
    """Run the crowd for so long, then the slow readers."""
    valkey, upstream = Valkey(), RawUpstream()
    upstream.script = answer_in_kind
    await upstream.start()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as spool_folder:
        spool = Path(spool_folder)
        settings = {
            "RETENTION_S": RETENTION_S, "UNKNOWN_RETENTION_S": RETENTION_S,
            "LEASE_MS": LEASE_MS, "WAIT_MAX_S": 1, "CLIENT_STALL_S": stall_s,
            "SPOOL_DIR": spool, "ACCESS_LOG": "off", "UPSTREAM_TIMEOUT_S": 20, "MAX_STORED_BYTES": 4 * MIB,
            "MAX_BUFFERED_BYTES": MAX_BUFFERED_BYTES, "MAX_UPSTREAM_CONNECTIONS": READERS + 100,
            "UPSTREAM_REUSE_IDLE_S": 0.5,
        }  # fmt: skip
        proxy = Proxy(upstream.url, valkey.url, Path(folder), settings)
        proxy.start()
        try:
            report = await _crowded(proxy, valkey, spool, seconds, stall_s)
            await _read_slowly(proxy, valkey, spool, report, readers)
            return report
        finally:
            proxy.close()
            await upstream.close()
            valkey.close()


async def _crowded(proxy: Proxy, valkey: Valkey, spool: Path, seconds: float, stall_s: float) -> Report:
    warm = Crowd(proxy.port, 1, stall_s)
    await _run(warm, min(seconds / 5, 20.0))
    before = await _at_rest(proxy, valkey, spool)
    report = Report(seconds, stall_s, before, before)
    crowd = Crowd(proxy.port, 2, stall_s)
    await _run(crowd, seconds, lambda: report.memory.append(Sample.of(proxy, valkey, spool).rss))
    report.outcomes = crowd.outcomes
    report.after = await _at_rest(proxy, valkey, spool, before.files)
    return report


async def _run(crowd: Crowd, seconds: float, each_second: object = None) -> None:
    clients = [asyncio.ensure_future(crowd.client(number)) for number in range(CLIENTS)]
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await asyncio.sleep(min(1.0, seconds / 12))
        if callable(each_second):
            each_second()
    crowd.over = True
    await asyncio.gather(*clients)


async def _at_rest(proxy: Proxy, valkey: Valkey, spool: Path, files: int | None = None) -> Sample:
    """Wait until nothing is held and no more than so many descriptors, or their number stays; at most 30 s."""
    began = since = time.monotonic()
    last = -1
    while True:
        sample, now = Sample.of(proxy, valkey, spool), time.monotonic()
        since = since if sample.files == last else now
        settled = now - since > 2 if files is None else sample.files <= files + 2
        if now - began > 30 or (settled and not (sample.tasks or sample.keys or sample.spools)):
            return sample
        last = sample.files
        await asyncio.sleep(0.5)


async def _read_slowly(proxy: Proxy, valkey: Valkey, spool: Path, report: Report, count: int) -> None:
    before = Sample.of(proxy, valkey, spool)
    readers = [await lazy(proxy.port) for _ in range(count)]
    for number, reader in enumerate(readers):
        # What has a key is fetched to its end after its client was cut off: 64 MiB each.
        reader.writer.write(
            request("POST", "/large", None if number % 100 else f"reader-{number}", b"1", "Connection: close")
        )
    most = open_ = 0
    ends = time.monotonic() + 3 * report.stall_s + 45
    while time.monotonic() < ends:
        await asyncio.sleep(0.1)
        sample = Sample.of(proxy, valkey, spool)
        most, open_ = max(most, sample.rss), max(open_, sample.files)
        if open_ > before.files + count // 2 and sample.files <= before.files + 2:
            break
    for reader in readers:
        reader.reset()
    report.readers = count
    report.readers_bytes, report.readers_left = most - before.rss, max(0, sample.files - before.files)
    report.budget_bytes = MAX_BUFFERED_BYTES + count * PIECE_BYTES
