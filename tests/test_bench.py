"""The benchmark: its arithmetic, and one small run of it against real peers."""

import asyncio
import csv
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import asyncpg
import pytest

from loadtest.bench import chunks, contenders, followers, joining, keys, postgres, redis_rows, tools, wrk
from loadtest.bench.__main__ import parser
from loadtest.bench.against import package_of
from loadtest.bench.chunks import Cost
from loadtest.bench.goals import GOALS, goals
from loadtest.bench.machine import ROOT, Process, family, share, two_cores
from loadtest.bench.page import Circumstances, write_page
from loadtest.bench.plot import write_plot
from loadtest.bench.redis import command
from loadtest.bench.scenarios import SCENARIOS, Run
from loadtest.bench.table import Figure, Table, write_csv
from loadtest.ports import free_port
from oncegate.server.embedded import find_server
from tests.parts import answering, ask, request
from tests.postgres_server import Server, shared_url


def run(
    contender: str, rate: float, cpu_us: float, number: int = 0, scenario: str = "execution", many: int = 32
) -> Run:
    return Run(number, scenario, many, contender, rate, cpu_us, 1.0, 2.0, 0.5, 0.1, True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


RUNS = [
    *(run("oncegate", rate, 50.0, at) for at, rate in enumerate((9000.0, 8000.0, 1000.0))),
    run("obvious", 2000.0, 300.0),
    run("nginx+lua", 20_000.0, 25.0),
]


def test_what_keys_cost_is_measured_of_keys_that_are_found():
    """Each source names the request, by its own rule; what is slower than a header is told as slower."""
    found = keys.measure(2000)
    assert set(found) == set(keys.SOURCES)
    assert 0 < found["header"] < found["body"]


def test_the_rest_of_connections_is_a_row_of_its_own(monkeypatch):
    """An execution is measured with a rest, without one and with spare connections, which differ in that alone."""
    asked = []
    monkeypatch.setattr(contenders, "oncegate", lambda site, **settings: asked.append(settings))
    for name in ("no-rest", "spare"):
        assert name in SCENARIOS["execution"].contenders
        assert name in SCENARIOS["pass-through"].contenders
        contenders.CONTENDERS[name](None)
    assert asked == [{"UPSTREAM_REST_S": 0}, {"UPSTREAM_SPARE_CONNECTIONS": 1000}]


def test_tracing_is_measured_as_nothing_else(monkeypatch):
    """Beside the contender that its goals compare it with, it differs in what is traced alone."""
    asked = []
    monkeypatch.setattr(contenders, "oncegate", lambda site, **settings: asked.append(settings))
    for name in ("traced-0", "traced-1", "traced-10"):
        contenders.CONTENDERS[name](None)
    assert [settings.pop("TRACE_RATIO") for settings in asked] == [0, 0.01, 0.1]
    assert asked == [{"UPSTREAM_REST_S": 0, "TRACE_RATE_PER_S": 1_000_000}] * 3


def test_medians_and_ratios():
    """One round that was disturbed moves no median; a ratio is ours divided by theirs."""
    table = Table(RUNS)
    cell = table.cells["execution", 32, "oncegate"]
    assert cell.median("rate") == 8000
    assert cell.spread("rate") == (1000, 9000)
    assert table.ratio("execution", 32, "obvious", "rate") == 4
    assert table.ratio("execution", 32, "nginx+lua", "cpu_us") == 2
    assert table.ratio("replay", 32, "obvious", "rate") is None
    assert "  oncegate      8000     1000-9000    50.0" in "\n".join(table.lines())


def test_goals():
    """A goal is met or missed by the same figures that the table shows, in its direction; a wish is told, too."""
    runs = [*RUNS, run("no-rest", 9000.0, 36.0), run("earlier", 9000.0, 40.0)]
    found = {figure.name: figure for figure in goals(Table(runs))}
    assert found["execution: requests a second, oncegate of obvious"].met
    assert found["execution: CPU a request, no-rest of earlier"].line().endswith("0.90 x" + " " * 23 + "36 and 40 us")
    missed = found["execution: CPU a request, no-rest of nginx+lua"]
    assert missed.value == 1.44
    assert missed.line().endswith("1.44 x         <= 1.5 met    wish <= 1.4 missed; 36 and 25 us")
    assert "MISSED" in missed._replace(value=1.6).line()
    assert "wish <= 1.4 met" in missed._replace(value=1.4).line()


def test_goals_are_of_what_is_measured():
    """Each goal compares two contenders of its scenario, at a number of connections that the scenario has."""
    for goal in GOALS:
        scenario = SCENARIOS[goal.scenario]
        assert {goal.ours, goal.other} <= {*scenario.contenders}, goal
        assert 32 in scenario.connections


def test_an_earlier_commit_takes_part(monkeypatch):
    """The contender is the package of that commit, with the settings of the contender that it is compared with."""
    asked = []
    monkeypatch.setattr(contenders, "oncegate", lambda site, **settings: asked.append(settings))
    site = contenders.Site(*(None,) * 4, against=Path("there"))
    contenders.no_rest(site)
    contenders.earlier(site)
    assert asked == [{"UPSTREAM_REST_S": 0}, {"UPSTREAM_REST_S": 0, "package": Path("there")}]


def test_a_build_is_measured_once_it_packs_records(monkeypatch):
    """The log says it. One that never does is no contender, unless it is an earlier commit, which may not know."""
    logs = [b"", b"", b'{"layout": "packed", "event": "record layout"}']
    process = SimpleNamespace(log=lambda: logs.pop(0), said=lambda: "what it said")
    contenders.await_layout(contenders.Running(process, 1, 2))
    assert logs == []
    process.log = lambda: b""
    monkeypatch.setattr(contenders, "LAYOUT_S", 0)
    monkeypatch.setattr(contenders, "EARLIER_LAYOUT_S", 0)
    contenders.await_layout(contenders.Running(process, 1, 2, is_earlier=True))
    with pytest.raises(RuntimeError, match="what it said"):
        contenders.await_layout(contenders.Running(process, 1, 2))


def test_a_commit_that_is_not_there():
    """A commit that git does not know ends the bench before anything is measured."""
    with pytest.raises(SystemExit, match="no such commit: 0123abc"):
        package_of("0123abc")


@pytest.mark.parametrize("given", ["--only=replay,redis", "--contenders=oncegate,apache"])
def test_what_is_not_measured_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([given])
    assert f"there is no {given.rpartition(',')[2]}" in capsys.readouterr().err


def test_goals_of_durable_stores():
    """Each callers' figure compares what was measured with as many, and says both values and how slow the disk was."""
    runs = [
        *(
            run(name, rate, 100.0, many=many)
            for many in (32, 256)
            for name, rate in (("oncegate", 4000.0), ("recipe", 1e3))
        ),
        run("redis-sync", 6000.0, 50.0),
    ]
    faster, slower, of_redis, *_ = postgres.RATIOS
    found = postgres.compared(Table(runs), 32, faster, 2.5)
    assert (found.value, found.met) == (4, True)
    assert "4000 and 1000 a second; heads repeat, fdatasync 2.5 ms" in found.line()
    assert postgres.compared(Table(runs), 32, of_redis, 2.5).met
    assert postgres.compared(Table([*runs, run("oncegate", 100.0, 1.0, many=256)] * 3), 256, slower, 1.0).met


def test_goals_of_streams():
    """One round that was disturbed moves no median. The goals are those beside nginx with Lua; the rest is reported."""
    ours, theirs = (
        [Cost(30.0, 900.0, 800.0), Cost(32.0, 850.0, 700.0), Cost(99.0, 990.0, 900.0)],
        [Cost(20.0, 500.0, 400.0)],
    )
    found = chunks.compared("nginx+lua", ours, theirs)
    assert [(one.value, one.limit, one.wish) for one in found] == [(1.6, 2.0, 1.7), (1.8, 1.8, 1.5), (2.0, None, None)]
    assert all(one.limit is one.wish is None for one in chunks.compared("earlier", ours, theirs))


def test_goals_of_followers():
    """A follower costs what its worker takes more for it; the goals are those of one follower. Medians count."""
    costs = {
        "alone": [followers.Cost(60.0, 0.0), followers.Cost(50.0, 0.0), followers.Cost(60.0, 9.0)],
        "here-1": [followers.Cost(90.0, 0.0)],
        "here-10": [followers.Cost(120.0, 0.0)],
        "there-1": [followers.Cost(63.0, 120.0)],
        "there-10": [followers.Cost(61.0, 60.0)],
    }
    assert costs.keys() == followers.KINDS.keys()
    found = followers.compared(costs)
    assert [(round(one.value, 2), one.limit) for one in found] == [(0.5, 0.6), (0.1, 0.6), (2.0, 1.5), (0.1, None)]
    assert [one.met for one in found] == [True, True, False, True]
    assert found[2].note == "120.0 and 60.0 us; the stream's own worker +3.0 us"


def test_goals_of_events_at_followers():
    """With wake-ups they come sooner. Events count that were sent once the first join was settled."""
    found = {"event_p99": 0.2, "event_p50": 0.01, "owner_p99": 0.005, "events": 10}
    assert [followers.delayed(store, 1, found).met for store in (followers.WAKES, followers.POLLS)] == [False, True]
    early = SimpleNamespace(asked_s=10.0, sent_s=[9.9, 10.1, 10.2, 10.5], delays_s=[0.9, 0.8, 0.1, 0.2])
    late = SimpleNamespace(asked_s=10.4, sent_s=[9.9, 10.1, 10.2, 10.5], delays_s=[1.3, 1.1, 0.3, 0.4])
    assert joining.settled([early, late]) == [0.1, 0.2, 0.4]
    assert joining.settled([]) == []


def test_commands_where_nobody_joins():
    """Not one more than the earlier commit's; without one, how many they are."""
    assert followers.counted("an execution", {"no-rest": 8.0, "earlier": 8.0}).met
    assert not followers.counted("an execution", {"no-rest": 9.0, "earlier": 8.0}).met
    assert followers.counted("an execution", {"no-rest": 9.0})[1:4] == (9.0, "", None)


def test_commands_are_counted():
    """Those of scripts, too; or those of some kinds alone."""
    store = contenders.open_redis(two_cores(), find_server())
    try:
        before = [followers.commands_of(store, which) for which in ((), ("hset", "eval"))]
        script = "redis.call('HSET', KEYS[1], 'a', 1) return redis.call('HGET', KEYS[1], 'a')"
        assert command(store.port, "EVAL", script, "1", "h") == "1"
        assert followers.commands_of(store, ("hset", "eval")) - before[1] == 2
        assert followers.commands_of(store) - before[0] >= 3
    finally:
        store.process.stop()


async def test_what_reads_a_followed_stream():
    """It says what is missing or out of order, who joined, and when the first event came."""
    head = b"HTTP/1.1 200 OK\r\nOncegate-Status: joined\r\nTransfer-Encoding: chunked\r\n\r\n"
    first, third = (b"%x\r\n%b\r\n" % (len(event), event) for event in (b"data: 0 1 x\n\n", b"data: 2 2 x\n\n"))
    sent: list[bytes] = []
    reader = joining.Reader(b"POST", joining.Live())
    reader.connection_made(SimpleNamespace(write=sent.append, close=lambda: sent.append(b"closed")))
    reader.data_received(head)
    assert (reader.joined, reader.begun.done()) == (True, False)
    reader.data_received(first)
    reader.data_received(third + b"0\r\n\r\n")
    assert sent == [b"POST", b"closed"]
    assert (await reader.begun > 0, len(reader.delays_s), reader.sent_s, reader.disorder) == (True, 2, [1e-9, 2e-9], 1)


def test_goals_of_the_store():
    """Redis may take four fifths of what it took for the earlier commit."""
    found = redis_rows.compared("Redis 7", "earlier", [26.0, 27.0, 90.0], [36.0, 30.0, 37.0])
    assert (found.value, found.met, found.wish) == (0.75, True, 0.65)
    assert redis_rows.compared("Redis 7", "nginx+lua", [26.0], [13.0]).limit is None


@pytest.mark.skipif(bool(tools.missing()), reason=f"not installed: {' '.join(tools.missing())}")
async def test_heads_that_vary():
    """No request comes twice, nor does what a head has beside its key; each kind is sent; each is one whole request."""
    requests: list[tuple[bytes, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = await reader.readexactly(int(re.search(rb"\r\nContent-Length: (\d+)", head)[1]))
                requests.append((head, body))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    words = {"mode": "mixed", "seconds": 1, "connections": 2, "cores": two_cores().other}
    load = await asyncio.to_thread(wrk.run, port, "", "key", **words)
    server.close()
    assert load.requests > 0
    assert load.refused == load.broken == 0
    keys = [re.search(rb"\r\nIdempotency-Key: (\S+)", head)[1] for head, _ in requests]
    paths = {re.match(rb"POST (/api/\w+)", head)[1] for head, _ in requests}
    assert len({*keys}) == len(requests)
    assert paths == {b"/api/payments", b"/api/chat", b"/api/orders", b"/api/accounts", b"/api/invoices"}
    assert len({head.replace(key, b"") for (head, _), key in zip(requests, keys, strict=True)}) == len(requests)


async def test_the_recipe_claims_and_replays(upstream):
    """The peer on PostgreSQL does the job that it is measured at: the second request is answered from the table."""
    upstream.script = answering(b"HTTP/1.1 201 Made\r\nContent-Length: 2\r\nX-Id: 7\r\n\r\nok")
    port, schema = free_port(), f"recipe_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(shared_url())
    await connection.execute(f"CREATE SCHEMA {schema}")
    peer = Process(
        two_cores().proxy,
        *(sys.executable, "-m", "loadtest.peers.obvious_postgres"),
        *(port, upstream.url, f"{shared_url()}?search_path={schema}"),
    )
    try:
        peer.await_port(port)
        for replayed in (None, b"true"):
            answer = await ask(port, request())
            assert (answer.status, answer.body, answer.header("x-id")) == (201, b"ok", b"7")
            assert answer.header("idempotent-replayed") == replayed
    finally:
        peer.stop()
        await connection.execute(f"DROP SCHEMA {schema} CASCADE")
        await connection.close()
    assert len(upstream.received) == 1


@pytest.mark.full
async def test_what_a_store_in_postgres_writes():
    """The goals for WAL and for HOT updates, on a server that nobody else uses."""
    server = Server.started(postgres.OPTIONS)
    try:
        rows = await postgres.measure_rows(server.url)
    finally:
        server.close()
    assert [figure.name for figure in postgres.of_rows(rows) if not figure.met] == []


def test_files(tmp_path):
    """The CSV has every run and figure, and the plot is an SVG with every contender's bar."""
    write_csv(tmp_path, RUNS, [Figure("one", 1.5, "x", 2.0, note="a, b")])
    write_plot(tmp_path / "bench.svg", Table(RUNS))
    assert [row["rate"] for row in rows_of(tmp_path / "runs.csv")][:2] == ["9000", "8000"]
    assert [row["note"] for row in rows_of(tmp_path / "figures.csv")] == ["a, b"]
    drawn = ElementTree.parse(tmp_path / "bench.svg")
    bars = drawn.findall(".//{http://www.w3.org/2000/svg}rect[@y]")
    assert len(bars) == 3 * 2


def test_the_page(tmp_path):
    """The page says how the run was made, has a column for each contender, and says of each goal whether it is met."""
    figures = [Figure("one", 1.55, "x", 1.7, note="5 us", wish=1.5), Figure("two", 4.0, "", 5.0, least=True)]
    run_of = Circumstances("1234567", "89abcde", 3, 2, 2)
    write_page(tmp_path / "page.md", run_of, Table([*RUNS, run("no-rest", 9000.0, 36.0)]), figures)
    text = (tmp_path / "page.md").read_text()
    assert "at 1234567 beside 89abcde (`earlier`): rounds of 2 s in turns, 3 of them" in text
    assert "|  | no-rest | oncegate | nginx+lua | obvious |\n| --- | ---: | ---: | ---: | ---: |" in text
    assert "| execution | 9,000, 36 us | 8,000, 50 us | 20,000, 25 us | 2,000, 300 us |" in text
    assert "| one | 1.55 x | <= 1.7: met | <= 1.5: missed | 5 us |" in text
    assert "| two | 4.00 | >= 5: **missed** |  |  |" in text
    write_page(tmp_path / "page.md", run_of, Table([]), figures)
    assert "requests a second and the proxy's CPU time for one.\n\n|  | figure |" in (tmp_path / "page.md").read_text()


def test_the_cpu_time_of_children_counts():
    """What a child of a server burns is its own cost."""
    burn = "import time\nwhile time.process_time() < 0.3: pass\ntime.sleep(60)"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    process = Process(two_cores().proxy, sys.executable, "-c", parent)
    try:
        deadline = time.monotonic() + 20
        while process.cpu_s() < 0.3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for pid in family(process.pid)[1:]:
            os.kill(pid, signal.SIGKILL)
        process.stop()


def test_a_share_is_a_fifth_of_a_core():
    """A process that would take all of a core gets a fifth, where there are control groups to write to; else that is
    said, and it goes on."""
    cores = two_cores()
    process = Process(cores.proxy, sys.executable, "-c", "while True: pass")
    try:
        with share(process.pid, cores.other):
            assert os.sched_getaffinity(process.pid) == cores.other
            before = process.cpu_s()
            began = time.monotonic()
            time.sleep(1)
            assert process.cpu_s() - before < 0.5 * (time.monotonic() - began)
    except OSError as why:
        if "cgroup" not in str(why):
            raise
    finally:
        process.stop()


@pytest.mark.skipif(bool(tools.missing()), reason=f"not installed: {' '.join(tools.missing())}")
def test_a_small_run(tmp_path):
    """Every contender that is asked gives the right answers, and the files tell what was measured."""
    command = ["--only", "replay,409", "--contenders", "oncegate,nginx+lua", "--connections", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.bench", *command, "--seconds", "1", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "runs.csv")
    measured = {(row["scenario"], row["contender"]): row for row in rows}
    assert measured.keys() == {(what, who) for what in ("replay", "409") for who in ("oncegate", "nginx+lua")}
    assert all(row["sound"] == "True" and float(row["cpu_us"]) > 0 for row in rows)
    assert "CPU a request, of nginx+lua's" not in done.stdout, "only 32 connections are compared with the goals"
