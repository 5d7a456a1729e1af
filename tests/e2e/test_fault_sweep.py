"""A fault at each point of the path: {kill, exception, pause of two leases} by {small, streamed} by {hold, retry}."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from http.client import HTTPException
from itertools import product
from pathlib import Path

import pytest

from oncegate.keys.digests import Digests, Scope
from oncegate.keys.tenants import TenantFields
from oncegate.testing.faults import POINTS
from tests.parts import CHUNKED, LAST_CHUNK, Answer, RawClient, RawUpstream, Received, ask, chunk, request, until
from tests.probes import Probe
from tests.zygote import Forked, Zygote

KINDS, MODES, SHAPES = ("kill", "raise", "pause"), ("hold", "retry"), ("small", "streamed")
LEASE_MS = {"kill": 400, "raise": 10_000, "pause": 400}
PAUSE_S = 2 * LEASE_MS["pause"] / 1000
AT_ONCE = {"redis": 16, "postgresql": 5}  # a proxy has ten connections to the latter

# The original is hit. What a retry gets in mid-pause | what the client saw | the record then | what a retry gets
# afterwards | executions. The number behind a word is that of the execution whose answer it is. A process that dies
# right behind a write may have kept it for those of the same turn.
BEFORE_CLAIM = "head body named claim"
UNSENT = "claimed held connect"
SMALL, STREAMED = "sent waiting answered passing whole settle store", "sent waiting answered passing whole begin"
BEGUN = "begun chunk written kept append appended finish settle store"
STORED = "stored tell settled end"
NEVER = "begin begun chunk written kept append appended finish"  # of a small answer
SWEEP = """
kill  | hold  | both     | BEFORE_CLAIM        |                 | nothing     | absent    | executed 1      | 1
kill  | hold  | both     | UNSENT sending      |                 | nothing     | in_flight | outcome-unknown | 0
kill  | hold  | small    | SMALL               |                 | nothing     | in_flight | outcome-unknown | 1
kill  | hold  | streamed | STREAMED            |                 | nothing     | in_flight | outcome-unknown | 1
kill  | hold  | streamed | BEGUN               |                 | cut or nothing | in_flight | outcome-unknown | 1
kill  | retry | both     | BEFORE_CLAIM        |                 | nothing     | absent    | executed 1      | 1
kill  | retry | both     | UNSENT sending      |                 | nothing     | in_flight | executed 1      | 1
kill  | retry | small    | SMALL               |                 | nothing     | in_flight | executed 2      | 2
kill  | retry | streamed | STREAMED            |                 | nothing     | in_flight | executed 2      | 2
kill  | retry | streamed | BEGUN               |                 | cut or nothing | in_flight | executed 2      | 2
kill  | any   | small    | STORED              |                 | nothing     | complete  | replayed 1      | 1
kill  | any   | streamed | STORED              |                 | cut         | complete  | replayed 1      | 1
kill  | any   | small    | ended leave left    |                 | executed 1 or nothing | complete | replayed 1 | 1
kill  | any   | streamed | ended leave left    |                 | executed 1 or cut     | complete | replayed 1 | 1
raise | any   | both     | BEFORE_CLAIM        |                 | 500 refused | absent    | executed 1      | 1
raise | any   | both     | UNSENT sending      |                 | 500 refused | absent    | executed 1      | 1
raise | hold  | small    | SMALL               |                 | 500 unknown | unknown   | outcome-unknown | 1
raise | hold  | streamed | STREAMED            |                 | 500 unknown | unknown   | outcome-unknown | 1
raise | hold  | streamed | BEGUN               |                 | cut         | unknown   | outcome-unknown | 1
raise | retry | small    | SMALL               |                 | 500 unknown | unknown   | executed 2      | 2
raise | retry | streamed | STREAMED            |                 | 500 unknown | unknown   | executed 2      | 2
raise | retry | streamed | BEGUN               |                 | cut         | unknown   | executed 2      | 2
raise | any   | small    | STORED              |                 | 500 unknown | complete  | replayed 1      | 1
raise | any   | streamed | STORED              |                 | cut         | complete  | replayed 1      | 1
raise | any   | both     | ended leave left    |                 | executed 1  | complete  | replayed 1      | 1
pause | any   | both     | BEFORE_CLAIM        | executed 1      | replayed 1  | complete  | replayed 1      | 1
pause | hold  | both     | UNSENT sending      | outcome-unknown | executed 1  | complete  | replayed 1      | 1
pause | hold  | small    | SMALL               | outcome-unknown | executed 1  | complete  | replayed 1      | 1
pause | hold  | streamed | STREAMED BEGUN      | outcome-unknown | executed 1  | complete  | replayed 1      | 1
pause | retry | both     | UNSENT              | executed 1      | replayed 1  | complete  | replayed 1      | 1
pause | retry | small    | sending             | executed 1      | replayed 1  | complete  | replayed 1      | 2
pause | retry | streamed | sending             | executed 1      | cut         | complete  | replayed 1      | 2
pause | retry | small    | SMALL               | executed 2      | replayed 2  | complete  | replayed 2      | 2
pause | retry | streamed | STREAMED BEGUN      | executed 2      | cut         | complete  | replayed 2      | 2
pause | any   | both     | STORED              | replayed 1      | executed 1  | complete  | replayed 1      | 1
pause | any   | both     | ended leave left    | replayed 1      | executed 1  | complete  | replayed 1      | 1
"""

# A duplicate is hit, of an original that another proxy executes or has executed: the same columns.
DUPLICATES = """
kill  | any   | both     | replay              |                 | nothing     | complete  | replayed 1      | 1
kill  | any   | streamed | read                |                 | nothing     | complete  | replayed 1      | 1
kill  | any   | small    | replayed            |                 | replayed 1 or nothing | complete | replayed 1 | 1
kill  | any   | streamed | replayed            |                 | replayed 1 or cut     | complete | replayed 1 | 1
kill  | any   | both     | wait woken          |                 | nothing     | complete  | replayed 1      | 1
raise | any   | both     | replay              |                 | 500 refused | complete  | replayed 1      | 1
raise | any   | streamed | read                |                 | 500 refused | complete  | replayed 1      | 1
raise | any   | both     | replayed            |                 | replayed 1  | complete  | replayed 1      | 1
raise | any   | both     | wait woken          |                 | 500 refused | complete  | replayed 1      | 1
pause | any   | both     | replay replayed     | replayed 1      | replayed 1  | complete  | replayed 1      | 1
pause | any   | streamed | read                | replayed 1      | replayed 1  | complete  | replayed 1      | 1
pause | any   | both     | wait woken          | replayed 1      | replayed 1  | complete  | replayed 1      | 1
"""


def cases(table: str, kind: str) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """Return what a table says of one kind of fault: by point, shape and mode, without empty cells."""
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for row in table.strip().splitlines():
        what, mode, shape, points, *expected = map(str.strip, row.split("|"))
        named = " ".join(globals().get(word, word) for word in points.split()).split()
        for case in product(named, SHAPES if shape == "both" else [shape], MODES if mode == "any" else [mode]):
            if what == kind:
                assert case not in found, case
                found[case] = tuple(cell for cell in expected if cell)
    return found


PATH = [*POINTS][: [*POINTS].index("left") + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sweep_leaves_nothing_out(kind: str) -> None:
    """Each point of the path in each mode and shape that passes it, for each kind; and each point somewhere."""
    passed = [
        (point, shape) for point, shape in product(PATH, SHAPES) if shape == "streamed" or point not in NEVER.split()
    ]
    assert set(cases(SWEEP, kind)) == {(*one, mode) for one in passed for mode in MODES}
    hit = {point for table in (SWEEP, DUPLICATES) for point, _, _ in cases(table, kind)}
    # These have tests of their own: a renewal comes at any time, and a cancel if somebody asks for it.
    assert hit == set(POINTS) - {"renew", "cancel", "cancelled"}


# Around the verbs of a store: what differs between stores differs there.
VERBS = {"claim", "claimed", "append", "appended", "store", "stored", "read"}
SWEPT = [
    *(("valkey", kind, {*POINTS}) for kind in KINDS),
    ("postgres", "kill", VERBS),
    *(pytest.param("postgres", kind, {*POINTS}, marks=pytest.mark.full) for kind in KINDS),
]
swept = pytest.mark.parametrize(
    ("probe", "kind", "points"),
    SWEPT,
    indirect=["probe"],
    ids=lambda one: ("every point" if "head" in one else "verbs") if isinstance(one, set) else one,
)

Run = Callable[[str, str, str, str], Awaitable[tuple[str, ...]]]


class Sweep:
    """One upstream, one store, one undamaged proxy for each mode; a proxy of its own for each case."""

    def __init__(self, zygote: Zygote, upstream: RawUpstream, probe: Probe, folder: Path) -> None:
        self.zygote, self.upstream, self.probe, self.folder = zygote, upstream, probe, folder
        self.slots = asyncio.Semaphore(AT_ONCE[re.split("[+:]", probe.url)[0]])
        self.others: dict[tuple[str, str], Forked] = {}
        self.executed: dict[str, int] = {}
        self.go: dict[str, asyncio.Event] = {}
        self.started: list[Forked] = []
        upstream.script = self.answer

    async def start(self, mode: str, kind: str, **more: object) -> Forked:
        settings = {"ON_UNKNOWN": mode, "LEASE_MS": LEASE_MS[kind], "STORE_TIMEOUT_MS": 15_000, **more}
        proxy = Forked(self.zygote, self.upstream.url, self.probe.url, self.folder, settings)
        self.started.append(proxy)
        await proxy.begin()
        return proxy

    async def answer(self, _: RawUpstream, __: object, writer: asyncio.StreamWriter, received: Received) -> None:
        """Answer with the number of this execution of its key."""
        (key,) = received.header("idempotency-key")
        self.executed[key.decode()] = number = self.executed.get(key.decode(), 0) + 1
        text = b"execution %d" % number
        if go := self.go.get(key.decode()):
            await go.wait()
        if b"streamed" not in received.line:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            return
        writer.write(CHUNKED + chunk(text) + chunk(b"a" * 300_000))
        await writer.drain()
        await asyncio.sleep(0.1)  # beyond the window in which a small answer is held back
        writer.write(chunk(b"b" * 300_000) + LAST_CHUNK)

    def state(self, key: str) -> str:
        digests = Digests(b"")
        scope = digests.scope(b"default", {}, TenantFields(()))
        assert isinstance(scope, Scope)
        fields = self.probe.fields(digests.key(scope, key.encode()))
        return "complete" if "meta" in fields else fields.get("state", b"absent").decode()

    async def definite(self, proxy: Forked, raw: bytes) -> str:
        """Ask until the key is not in flight any more."""
        for _ in range(400):
            answer = await ask(proxy.port, raw, 60)
            if answer.status != 409 or answer.slug != "in-flight":
                return seen(answer)
            await asyncio.sleep(0.02)
        raise AssertionError("in flight for ever")

    async def compare(
        self, kind: str, expected: dict[tuple[str, str, str], tuple[str, ...]], points: set[str], run: Run
    ) -> None:
        """Run the cases of a kind at these points, and compare what came of them with the table."""
        expected = {case: cells for case, cells in expected.items() if case[0] in points}
        for mode in MODES:
            self.others[kind, mode] = await self.start(mode, kind)
        found = await asyncio.gather(*[run(kind, *case) for case in expected])
        wrong = {case: one for case, one in zip(expected, found, strict=True) if not is_one_of(one, expected[case])}
        assert not wrong

    async def original(self, kind: str, point: str, shape: str, mode: str) -> tuple[str, ...]:
        """Return what came of an original whose proxy is hit."""
        async with self.slots:
            proxy = await self.faulty(kind, point, mode)
            key = f"{kind}-{point}-{shape}-{mode}"
            return await self.watched(proxy, key, kind, mode, request("POST", f"/{shape}", key), None)

    async def duplicate(self, kind: str, point: str, shape: str, mode: str) -> tuple[str, ...]:
        """Return what came of a duplicate whose proxy is hit."""
        async with self.slots:
            proxy = await self.faulty(kind, point, mode)
            key = f"duplicate-{kind}-{point}-{shape}-{mode}"
            raw = request("POST", f"/{shape}", key, b"body", "Prefer: wait=20")
            go = self.go[key] = asyncio.Event()
            running = asyncio.ensure_future(ask(self.others[kind, mode].port, raw))
            if point in ("wait", "woken"):
                await until(lambda: key in self.executed)
                letting_go = asyncio.ensure_future(self.let_go(proxy, go))
            else:
                go.set()
                letting_go = running
                await running
            found = await self.watched(proxy, key, kind, mode, raw, running)
            await letting_go
            assert seen(await running) == "executed 1"
            return found

    async def let_go(self, proxy: Forked, go: asyncio.Event) -> None:
        """Let the original end once the duplicate waits for it, or its proxy is hit (and may not answer any more)."""
        with suppress(OSError, HTTPException):
            while not (struck(proxy) or await asyncio.to_thread(proxy.metric, "waiting")):
                await asyncio.sleep(0.02)
        go.set()

    async def faulty(self, kind: str, point: str, mode: str) -> Forked:
        return await self.start(mode, kind, FAULT=f"{kind}@{point}:1", TESTING=1)

    async def watched(
        self, proxy: Forked, key: str, kind: str, mode: str, raw: bytes, running: asyncio.Future[Answer] | None
    ) -> tuple[str, ...]:
        """Return what the client saw, the state then, what a retry gets (in mid-pause, too), and the executions."""
        other, found = self.others[kind, mode], []
        asked = asyncio.ensure_future(first(proxy.port, raw))
        if kind == "pause":
            await until(lambda: struck(proxy) or asked.done(), 30)
            paused = asyncio.ensure_future(asyncio.sleep(PAUSE_S))
            found.append(await self.definite(other, raw))
            await paused
            proxy.signal(signal.SIGCONT)
        found.append(await asked)
        if running is not None:
            await running
        if kind == "raise":
            await until(lambda: self.state(key) != "in_flight")
        found += [self.state(key), await self.definite(other, raw), str(self.executed.get(key, 0))]
        # The last points come after the client has its answer: on a busy machine, some time after.
        with suppress(AssertionError):
            await until(lambda: struck(proxy), 5)
        passed = struck(proxy)
        proxy.close()
        return tuple(found) if passed else ("not passed",)


def is_one_of(found: tuple[str, ...], expected: tuple[str, ...]) -> bool:
    return len(found) == len(expected) and all(
        one in cell.split(" or ") for one, cell in zip(found, expected, strict=True)
    )


def struck(proxy: Forked) -> bool:
    """Return whether its fault has struck."""
    return "fault injected" in proxy.log()


async def first(port: int, raw: bytes) -> str:
    client = await RawClient.open(port)
    try:
        async with asyncio.timeout(60):
            return seen(await client.ask(raw))
    except ConnectionError:
        return "nothing"
    finally:
        client.close()


def seen(answer: Answer | None) -> str:
    """Return what an answer is, in a word or two."""
    if answer is None:
        return "nothing"
    status = (answer.header("oncegate-status") or b"none").decode()
    if answer.status == 200:
        number = answer.body.partition(b"a")[0].decode().removeprefix("execution ")
        return f"{status} {number}" if answer.complete else "cut"
    name = answer.problem["type"].rpartition(":")[2]
    return f"{answer.status} {status}" if name == "blank" else name


@pytest.fixture
async def sweep(zygote: Zygote, upstream: RawUpstream, probe: Probe, tmp_path: Path) -> AsyncIterator[Sweep]:
    sweep = Sweep(zygote, upstream, probe, tmp_path)
    yield sweep
    for proxy in sweep.started:
        proxy.close()


@pytest.mark.fault(4, 19, 22, 29, 32, 33, 37, 39, 43, 51, 52, 62)
@pytest.mark.timeout(600)
@swept
async def test_a_fault_at_each_point_of_the_path(sweep: Sweep, kind: str, points: set[str]) -> None:
    """Whatever happens wherever: no key stays in flight, none executes twice unless its mode is retry, one truth."""
    await sweep.compare(kind, cases(SWEEP, kind), points, sweep.original)


@pytest.mark.fault(51, 54, 62)
@pytest.mark.timeout(600)
@swept
async def test_a_fault_at_each_point_of_a_duplicates_path(sweep: Sweep, kind: str, points: set[str]) -> None:
    """A duplicate that is hit changes nothing: its key stays complete, and the next one is replayed."""
    await sweep.compare(kind, cases(DUPLICATES, kind), points, sweep.duplicate)
