"""The use cases of config/: each one's rules and settings are in effect as they stand there, and its own client,
run as a process with a fault in the middle, is executed once."""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import signal
import sqlite3
import sys
import time
import tomllib
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest

from config.clients.jobs import Job, Jobs, work
from config.clients.sending import Answer, Outcome, Patience, Result, judge, send
from oncegate.adaptation.json_rpc import Caller
from oncegate.commands.cli import main
from oncegate.commands.init import CASES
from oncegate.messages.problems import PROBLEM_KINDS, problem
from oncegate.rules.loading import load_rules
from oncegate.rules.presets import PRESETS
from oncegate.settings.settings import Settings
from tests.parts import CHUNKED, LAST_CHUNK, OK, RawUpstream, Tap, abort, answering, ask, chunk, holding, request, until
from tests.postgres_server import shared_url

ROOT = Path(__file__).parent.parent


def environment(case: str) -> dict[str, str]:
    """Return what a case's oncegate.env sets."""
    lines = (ROOT / "config" / case / "oncegate.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


# The files ...


@pytest.mark.parametrize("case", CASES)
def test_check_accepts_it(monkeypatch, capsys, case):
    """From the case's folder, as the page says; every rule is in the table, with a preset that exists."""
    monkeypatch.chdir(ROOT / "config" / case)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONCEGATE_{name.upper()}", raising=False)
    for name, value in environment(case).items():
        monkeypatch.setenv(name, value)
    assert main(["check"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1]
    rules = tomllib.loads(Path(environment(case)["ONCEGATE_RULES_FILE"]).read_text())["rule"]
    assert [f"{rule['name']} ({rule['preset']})" in table for rule in rules] == [True] * len(rules)
    assert {rule["preset"] for rule in rules} <= PRESETS.keys()


@pytest.mark.parametrize("case", CASES)
def test_what_is_commented_out_can_be_switched_on(monkeypatch, capsys, case):
    """The settings that a case's file only mentions are settings, too, with values that are taken."""
    monkeypatch.chdir(ROOT / "config" / case)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONCEGATE_{name.upper()}", raising=False)
    text = (ROOT / "config" / case / "oncegate.env").read_text()
    for name, value in re.findall(r"^(?:# )?(ONCEGATE_\w+)=(.*)$", text, re.MULTILINE):
        monkeypatch.setenv(name, value)
    assert main(["check"]) == 0
    capsys.readouterr()


def test_the_question_that_is_only_mentioned_can_be_asked(tmp_path):
    """The table in a comment of the payments' rules is one that oncegate takes."""
    text = (ROOT / "config/payments/rules.toml").read_text()
    file = tmp_path / "rules.toml"
    file.write_text(re.sub(r"^# (?=\[rule\.reconcile]|\w+ = )", "", text, flags=re.MULTILINE))
    [rule] = load_rules(Settings(upstream="http://api.test", rules_file=file)).rules
    assert rule.policy.reconcile is not None
    assert rule.policy.reconcile.names == {"/reference"}


PAGE_NAMES = {"double-click": "forms", "payments-postgres": "exactly-once"}
GUIDES = {case: f"docs/how-to/{PAGE_NAMES.get(case, case)}.md" for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_page_shows_the_files(case):
    """The how-to page has the rules as they stand in the file and every part; the case's page links to it, names the
    files that are there, and is linked from the index."""
    folder = ROOT / "config" / case
    page, guide = (folder / "README.md").read_text(), (ROOT / GUIDES[case]).read_text()
    assert (folder / "rules.toml").read_text().strip() in guide
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (folder / link).exists(), link
    assert f"(../../{GUIDES[case]})" in page
    for part in ("## The rule", "## The client", "## Retention", "## What can still go wrong"):
        assert part in guide.replace("## The receiver", "## The client")
    assert f"({case}/README.md)" in (ROOT / "config/README.md").read_text()


def test_the_index_names_the_tests():
    """The table of use cases names for each a test that exists."""
    index, own = (ROOT / "config/README.md").read_text(), Path(__file__).read_text()
    rows = re.findall(r"^\|.*/README\.md\).*\| `(\w+)` \|$", index, re.MULTILINE)
    assert len(rows) == len(CASES)
    assert [name for name in rows if f"def {name}(" not in own] == []


# What the clients make of an answer ...


def told(status: int, word: str | None = None, body: bytes = b"", **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, fields | ({"oncegate-status": word} if word else {}), body)


JUDGED = [
    (told(201, "executed"), Outcome.ANSWERED),
    (told(500, "executed"), Outcome.ANSWERED),
    (told(201, "replayed"), Outcome.ANSWERED),
    (told(402, "replayed"), Outcome.ANSWERED),
    (told(429, "joined"), Outcome.ANSWERED),
    (told(502, "resumed"), Outcome.ANSWERED),
    (told(200, "unguarded"), Outcome.ANSWERED),
    (told(200, "unguarded; reason=name"), Outcome.ANSWERED),
    (told(401, "released"), Outcome.REFUSED),
    (told(400, "released"), Outcome.REFUSED),
    (told(425, "released"), None),
    (told(429, "released"), None),
    (told(500, "released"), None),
    (told(503, "released"), None),
    (told(502, "unknown"), Outcome.UNKNOWN),
    (told(504, "unknown"), Outcome.UNKNOWN),
    (told(103), None),
    (told(502), None),
    (told(503), None),
    (told(200), Outcome.ANSWERED),
    (told(404), Outcome.ANSWERED),
]
# What each of oncegate's own answers settles, under the word it comes with.
OF_SLUGS = {
    "key-missing": ("refused", Outcome.REFUSED),
    "key-invalid": ("refused", Outcome.REFUSED),
    "scope-unstable": ("refused", Outcome.REFUSED),
    "key-reused": ("refused", Outcome.REFUSED),
    "in-flight": ("refused", None),
    "outcome-unknown": ("unknown", Outcome.UNKNOWN),
    "response-not-kept": ("refused", Outcome.ANSWERED),
    "key-expired": ("refused", Outcome.ANSWERED),
    "stream-gone": ("refused", Outcome.REFUSED),
    "key-absent": ("refused", Outcome.REFUSED),
    "key-released": ("released", None),
    "ask-refused": ("refused", Outcome.REFUSED),
    "body-too-large": ("refused", Outcome.REFUSED),
    "store-unavailable": ("refused", None),
    "overloaded": ("refused", None),
    "upstream-unreachable": ("refused", None),
    "upstream-lost": ("unknown", Outcome.UNKNOWN),
    "upstream-timeout": ("unknown", Outcome.UNKNOWN),
    "record-corrupt": ("refused", Outcome.UNKNOWN),
    "answer-not-stored": ("unknown", None),
}


@pytest.mark.parametrize(("answer", "outcome"), JUDGED)
def test_what_an_answer_settles(answer, outcome):
    """Only what cannot have been executed, or can be asked again under its key, goes out again."""
    assert judge(answer) is outcome


# None comes at the Location of a 202, as none gets one.
@pytest.mark.parametrize("slug", sorted(PROBLEM_KINDS.keys() - {"key-released"}))
def test_what_a_json_rpc_error_settles(slug):
    """The same answer to a JSON-RPC request has the same meaning."""
    word, outcome = OF_SLUGS[slug]
    rendering = Caller(b"1").render(problem(slug, "why"), "")
    fields = [line.split(b": ", 1) for line in rendering.fields.split(b"\r\n") if line]
    headers = {name.decode().lower(): value.decode() for name, value in fields} | {"oncegate-status": word}
    assert judge(Answer(rendering.status, headers, rendering.body)) is outcome


@pytest.mark.parametrize("slug", PROBLEM_KINDS)
def test_what_a_problem_settles(slug):
    """Each of oncegate's own answers has one meaning for the clients, too; in the mode retry, lost is no end."""
    word, outcome = OF_SLUGS[slug]
    for may_retry in (False, True):
        made = problem(slug, "why").for_mode(b"retry" if may_retry else b"hold")
        fields = [line.split(b": ", 1) for line in made.head_fields().split(b"\r\n") if line]
        headers = {name.decode().lower(): value.decode() for name, value in fields} | {"oncegate-status": word}
        assert judge(Answer(made.status, headers, made.body())) is (None if may_retry else outcome)


def test_a_date_in_retry_after():
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < told(503, retry_after=later).retry_after_s <= 30
    assert [told(503, retry_after=value).retry_after_s for value in ("7", "soon", "")] == [7, 0, 0]
    assert told(503).retry_after_s == 0


async def test_tries_are_bounded_and_pauses_kept(upstream):
    """A try that gets no whole answer is repeated with the same bytes, Retry-After is kept, and there is an end."""
    busy = b"HTTP/1.1 503 Busy\r\nOncegate-Status: released\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
    scripts = [answering(busy), answering(OK[:-1]), answering(b"HTTP/1.1 200 OK\r\n\r\n"[:9])]

    async def script(server, reader, writer, got) -> None:
        await scripts[(len(server.received) - 1) % 3](server, reader, writer, got)
        writer.close()

    upstream.script = script
    patience = Patience(tries=3, timeout_s=2, first_pause_s=0.01)
    began = time.monotonic()
    result = await asyncio.to_thread(send, f"{upstream.url}/x?y=1", b"body", {"Idempotency-Key": "k"}, patience)
    assert (result.outcome, result.tries) == (Outcome.OPEN, 3)
    assert time.monotonic() - began >= 1
    assert len({(got.line, got.body, *got.header("idempotency-key")) for got in upstream.received}) == 1
    assert upstream.received[0].line == b"POST /x?y=1 HTTP/1.1"
    hour = Patience(tries=3, longest_retry_after_s=0.5)
    result = await asyncio.to_thread(send, upstream.url, b"", {}, hour)
    assert (result.outcome, result.tries) == (Outcome.OPEN, 1)  # nobody waits for so long: later, with the same key


def test_a_job_that_is_too_old_is_not_sent(tmp_path, capsys):
    """Its key may be forgotten, and would execute again: nobody knows, says the client, and sends nothing."""
    jobs = Jobs(str(tmp_path / "jobs.db"))
    key = jobs.add(b"{}")
    sent: list[Job] = []
    jobs.add(b"{}")

    def never(job: Job) -> Result:
        sent.append(job)
        return Result(Outcome.OPEN, None, 1)

    with sqlite3.connect(tmp_path / "jobs.db") as rows:
        rows.execute("UPDATE jobs SET made = made - 100 WHERE key = ?", (key,))
    assert work(jobs, 90, never) == 1
    assert [job.key for job in sent] == [job.key for job in jobs.open()] != [key]
    assert f"{key} unknown -" in capsys.readouterr().out


# The clients at work ...


@pytest.fixture
def front(fork, upstream, valkey, tmp_path: Path):
    """Start oncegate with a case's files as they are; only addresses are the test's."""

    async def start(case: str, url: str | None = None, store_url: str | None = None):
        settings = {name.removeprefix("ONCEGATE_"): value for name, value in environment(case).items()}
        rules = (ROOT / "config" / case / settings["RULES_FILE"]).read_text()
        (tmp_path / "rules.toml").write_text(rules.replace("https://api.anthropic.com", upstream.url))
        settings |= {"RULES_FILE": str(tmp_path / "rules.toml")}
        settings.pop("UPSTREAM")
        return await fork(url or upstream.url, store_url or valkey.url, **settings)

    return start


class Program:
    """A program of a case, as a process in the project's folder; `out` and `err` are what it has written."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process, self.out, self.err = process, "", ""
        self._hearing = [asyncio.ensure_future(self._hear("out")), asyncio.ensure_future(self._hear("err"))]

    async def _hear(self, name: str) -> None:
        stream = self.process.stdout if name == "out" else self.process.stderr
        assert stream is not None
        while piece := await stream.read(4096):
            setattr(self, name, getattr(self, name) + piece.decode())

    async def ends(self, seconds: float = 30) -> int:
        """Return its exit code."""
        code = await asyncio.wait_for(self.process.wait(), seconds)
        await asyncio.gather(*self._hearing)
        return code

    async def dies(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
        await self.ends()


Run = Callable[..., "asyncio.Future[Program]"]


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    """Start a program: `await run("payments.client", "jobs.db", "add", "2000")`."""
    programs: list[Program] = []

    async def start(module: str, *words: object, **env: str) -> Program:
        program = ("-c", module) if "\n" in module else ("-m", f"config.{module}")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *program, *map(str, words)),
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        programs.append(Program(process))
        return programs[-1]

    yield start  # type: ignore[misc]
    for program in programs:
        await program.dies()


CHARGE = b'HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"id":"ch_1"}'


async def test_payments(front, upstream, run, tmp_path):
    """The first try times out, the program is killed during the next and starts again with its key: one charge."""
    proxy, jobs = await front("payments"), tmp_path / "jobs.db"
    added = await run("payments.client", jobs, "add", 2000)
    assert await added.ends() == 0
    key = added.out.strip()
    charged = asyncio.Event()
    upstream.script = holding(charged, CHARGE)
    first = await run("payments.client", jobs, "run", f"http://127.0.0.1:{proxy.port}", "--timeout", 0.4)
    await until(lambda: proxy.metric("waiting"))
    await first.dies()
    charged.set()
    again = await run("payments.client", jobs, "run", f"http://127.0.0.1:{proxy.port}")
    assert (await again.ends(), again.out) == (0, f"{key} answered 201\n")
    (got,) = upstream.received
    assert (got.header("idempotency-key"), json.loads(got.body)["amount"]) == ([key.encode()], 2000)
    idle = await run("payments.client", jobs, "run", f"http://127.0.0.1:{proxy.port}")
    assert (await idle.ends(), idle.out) == (0, "")


REPORTS = """
[[rule]]
name = "reports"
path = "/v1/**"
ask_keys = true
respond_async = true
"""


async def test_a_client_that_does_not_wait(fork, upstream, valkey, run, tmp_path):
    """It is killed while its report is made, asks what became of it, and comes for the one that was made."""
    (tmp_path / "rules.toml").write_text(REPORTS)
    proxy = await fork(upstream.url, valkey.url, RULES_FILE="rules.toml", SECRET="0123456789abcdef")
    made, url = asyncio.Event(), f"http://127.0.0.1:{proxy.port}/v1/reports"
    upstream.script = holding(made, CHARGE)
    first = await run("clients.later", url, "report-7", '{"month": 11}')
    await until(lambda: "accepted: /.oncegate/streams" in first.out, 30)
    assert first.out.startswith("before: absent\n")
    await first.dies()
    again = await run("clients.later", url, "report-7", '{"month": 11}')
    await until(lambda: "accepted: " in again.out, 30)
    assert again.out.startswith("before: in_flight\n")
    made.set()
    assert await again.ends() == 0
    assert again.out.endswith('201 resumed {"id":"ch_1"}\n')
    last = await run("clients.later", url, "report-7", '{"month": 11}')
    assert (await last.ends(), last.out) == (0, 'before: complete\n201 replayed {"id":"ch_1"}\n')
    assert len(upstream.received) == 1


async def test_a_payment_that_nobody_knows_of(front, upstream, run, tmp_path):
    """An API that dies in the middle leaves the outcome unknown: the client says so, and never sends it again."""
    proxy, jobs = await front("payments"), tmp_path / "jobs.db"
    await (await run("payments.client", jobs, "add", 2000)).ends()

    async def die(_, __, writer, ___) -> None:
        abort(writer)

    upstream.script = die
    lost = await run("payments.client", jobs, "run", f"http://127.0.0.1:{proxy.port}")
    assert (await lost.ends(), lost.out.split()[1:]) == (0, ["unknown", "502"])
    refused = await ask(proxy.port, b"POST /v1/charges HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
    assert refused.slug == "key-missing"
    assert len(upstream.received) == 1


# The API of payments-postgres, killed between its commit and its answer.
DYING = """
import asyncio, importlib, os, signal, sys
api = importlib.import_module("config.payments-postgres.api")
execute_once = api.execute_once
async def die(*arguments):
    await execute_once(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
api.execute_once = die
asyncio.run(api.serve(os.environ["DATABASE_URL"], int(sys.argv[1])))
"""


class Shop:
    """The API of payments-postgres and its database, which has one account with 10,000."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._database = f"{shared_url()}?search_path={name}&application_name={name}"

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["Shop"]:
        async with self.user() as self.connection:
            await self.connection.execute(f"CREATE SCHEMA {self._name}")
            yield self
            await self.connection.execute(f"DROP SCHEMA {self._name} CASCADE")

    @asynccontextmanager
    async def user(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self._database)
        yield connection
        await connection.close()

    async def start(self, port: int = 0, program: str = "payments-postgres.api") -> tuple[Program, int]:
        api = await self._run(program, port, DATABASE_URL=self._database)
        await until(lambda: "listening" in api.out)
        await self.connection.execute("INSERT INTO account VALUES ('acct_1', 10000) ON CONFLICT DO NOTHING")
        return api, int(api.out.split()[2])

    async def state(self) -> tuple[int, int]:
        """Return the balance, and how many executions are recorded."""
        row = await self.connection.fetchrow("SELECT (SELECT balance FROM account), count(*) FROM execution")
        return tuple(row)

    async def waiting(self) -> int:
        """Return how many transactions wait for another one."""
        users = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"
        return await self.connection.fetchval(users, self._name)


@pytest.fixture
async def shop(run) -> AsyncIterator[Shop]:
    async with Shop(run, f"shop_{uuid.uuid4().hex}").opened() as shop:
        yield shop


async def test_payments_postgres(front, run, shop, tmp_path):
    """The API is killed between its commit and its answer, and the client tries until it has the answer: one charge."""
    dying, port = await shop.start(program=DYING)
    proxy, jobs = await front("payments-postgres", f"http://127.0.0.1:{port}"), tmp_path / "jobs.db"
    added = await run("payments-postgres.client", jobs, "add", "acct_1", 2000)
    assert await added.ends() == 0
    client = await run("payments-postgres.client", jobs, "run", f"http://127.0.0.1:{proxy.port}")
    assert await dying.ends() == -signal.SIGKILL
    assert await shop.state() == (8000, 1)
    await shop.start(port)
    assert (await client.ends(), client.out) == (0, f"{added.out.strip()} answered 201\n")
    assert await shop.state() == (8000, 1)


class Losing(NamedTuple):
    """A store that can lose its records."""

    url: str
    forget: Callable[[], object]


@pytest.fixture(params=["valkey", "postgres"])
def losing(request, valkey) -> Losing:
    if request.param == "postgres":
        database = request.getfixturevalue("database")
        return Losing(database.url, lambda: database.connection.execute("DELETE FROM record"))

    def forget() -> None:
        with valkey.client() as client:
            client.flushall()

    return Losing(valkey.url, forget)


def charge(amount: int, key: str = "order-1") -> bytes:
    return request(key=key, body=b'{"account": "acct_1", "amount": %d}' % amount)


async def test_a_claim_that_the_store_loses(front, shop, losing):
    """The key executes again, with a higher fence: the work is there once, and the answer is that of the row."""
    _, port = await shop.start()
    proxy = await front("payments-postgres", f"http://127.0.0.1:{port}", losing.url)
    first = await ask(proxy.port, charge(2000))
    fence = await shop.connection.fetchval("SELECT fence FROM execution")
    losing.forget()
    again = await ask(proxy.port, charge(2000))
    assert (again.status, again.body) == (first.status, first.body) == (201, first.body)
    assert first.header("oncegate-status") == again.header("oncegate-status") == b"executed"
    assert json.loads(first.body)["balance"] == 8000
    losing.forget()
    other = await ask(proxy.port, charge(1))
    assert (other.status, other.header("oncegate-status")) == (422, b"executed")
    assert await shop.connection.fetchval("SELECT fence FROM execution") == fence
    await shop.connection.execute("ALTER TABLE account RENAME TO away")
    failed = await ask(proxy.port, charge(9000, "order-2"))
    assert (failed.status, failed.header("oncegate-status")) == (503, b"released")
    await shop.connection.execute("ALTER TABLE away RENAME TO account")
    refused = await ask(proxy.port, charge(9000, "order-2"))
    assert (refused.status, refused.header("oncegate-status")) == (402, b"executed")
    assert await shop.state() == (8000, 2)
    assert (await ask(port, charge(1))).status == 400


async def test_two_executions_of_one_key_at_once(front, shop, losing):
    """The store loses a claim while its request runs: the second execution waits for the first one's transaction."""
    _, port = await shop.start()
    proxy = await front("payments-postgres", f"http://127.0.0.1:{port}", losing.url)
    asked = []
    async with shop.user() as other, other.transaction():
        await other.execute("SELECT FROM account FOR UPDATE")
        for number in (1, 2):
            asked.append(asyncio.ensure_future(ask(proxy.port, charge(2000))))
            while await shop.waiting() < number:
                await asyncio.sleep(0.01)
            losing.forget()
    first, second = await asyncio.gather(*asked)
    assert (first.status, first.body) == (second.status, second.body)
    assert (first.status, json.loads(first.body)["balance"]) == (201, 8000)
    assert await shop.state() == (8000, 1)


SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()


def delivery(event: str, body: bytes, secret: str = SECRET) -> bytes:
    """Return a delivery of a Standard Webhooks sender, signed now."""
    stamp = str(int(time.time()))
    content = f"{event}.{stamp}.".encode() + body
    mac = base64.b64encode(hmac.digest(base64.b64decode(secret[6:]), content, hashlib.sha256)).decode()
    lines = [f"webhook-id: {event}", f"webhook-timestamp: {stamp}", f"webhook-signature: v1,{mac}"]
    head = ["POST /webhooks/standard HTTP/1.1", "Host: hooks.test", f"Content-Length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


@asynccontextmanager
async def receiving(run, database: Path, port: int = 0) -> AsyncIterator[tuple[Program, int]]:
    """Run the receiver, and say on which port."""
    receiver = await run("webhooks.receiver", database, port, SECRET=SECRET)
    await until(lambda: "listening" in receiver.out)
    yield receiver, int(receiver.out.split()[2])
    await receiver.dies()


async def test_webhooks(front, run, tmp_path):
    """A sender that gives up too early, and a receiver killed in the middle of its work: each event is handled once,
    each delivery after that is acknowledged without it; a forged one is refused and uses nothing up."""
    database = tmp_path / "events.db"
    async with receiving(run, database) as (receiver, port):
        proxy = await front("webhooks", f"http://127.0.0.1:{port}")
        slow = delivery("evt_1", b'{"takes_s": 0.8}')
        with pytest.raises(TimeoutError):
            await ask(proxy.port, slow, 0.3)
        again = await ask(proxy.port, delivery("evt_1", b'{ "takes_s": 0.8 }'))
        assert (again.status, again.header("oncegate-status")) == (204, b"replayed")
        forged = await ask(proxy.port, delivery("evt_2", b"{}", "whsec_" + base64.b64encode(b"x" * 24).decode()))
        assert (forged.status, forged.header("oncegate-status")) == (401, b"released")
        dying = asyncio.ensure_future(ask(proxy.port, delivery("evt_2", b'{"takes_s": 60}')))
        await until(lambda: receiver.out.count("evt_2 came") == 2)
        await asyncio.sleep(0.1)
        await receiver.dies()
        assert (await dying).slug == "upstream-lost"
    async with receiving(run, database, port) as (receiver, _):
        for word in (b"executed", b"replayed"):
            answer = await ask(proxy.port, delivery("evt_2", b'{"takes_s": 0}'))
            assert (answer.status, answer.header("oncegate-status")) == (204, word)
        assert receiver.out.count(" came") == 1
    with sqlite3.connect(database) as rows:
        assert [row[0] for row in rows.execute("SELECT id FROM events ORDER BY handled")] == ["evt_1", "evt_2"]


@pytest.mark.parametrize("named", ["by place", "by id"])
async def test_consumers(front, upstream, run, tmp_path, named):
    """A consumer killed before it acknowledges, then one that reads the log from its beginning again: each message is
    executed once, in order."""
    proxy, log = await front("consumers"), tmp_path / "orders.log"
    log.write_text("".join(f'{{"id": "m{number}"}}\n' for number in range(4)))
    place = f"http://127.0.0.1:{proxy.port}/{'messages' if named == 'by id' else 'kafka'}/orders"
    words = [*(["--by-id"] if named == "by id" else []), place, log, tmp_path / "orders.offset"]
    handled = asyncio.Event()

    async def script(server: RawUpstream, reader, writer, got) -> None:
        await (answering(OK) if b"m2" not in got.body else holding(handled))(server, reader, writer, got)

    upstream.script = script
    first = await run("consumers.client", *words)
    await until(lambda: len(upstream.received) == 3)
    await first.dies()
    handled.set()
    again = await run("consumers.client", *words)
    assert (await again.ends(), again.out) == (0, "2 acknowledge\n3 acknowledge\n")
    (tmp_path / "orders.offset").unlink()
    replayed = await run("consumers.client", *words)
    assert (await replayed.ends(), replayed.out.count("acknowledge")) == (0, 4)
    assert [got.body for got in upstream.received] == log.read_bytes().splitlines()


async def test_a_message_that_is_refused(front, upstream, run, tmp_path):
    """What will be refused each time is set aside; what may yet succeed stops the partition, and keeps its place."""
    proxy, log = await front("consumers"), tmp_path / "orders.log"
    log.write_text('{"id": "bad"}\n{"id": "busy"}\n')

    async def script(server: RawUpstream, reader, writer, got) -> None:
        status = b"422 No" if b"bad" in got.body else b"503 Busy\r\nRetry-After: 3600"
        await answering(OK.replace(b"200 OK", status))(server, reader, writer, got)

    upstream.script = script
    client = await run("consumers.client", f"http://127.0.0.1:{proxy.port}/kafka/x", log, tmp_path / "at")
    assert (await client.ends(), client.out) == (1, "0 set aside\n1 requeue\n")
    assert ((tmp_path / "at").read_text(), (tmp_path / "orders.dead").read_text()) == ("1", '{"id": "bad"}\n')


def said(word: str) -> bytes:
    return chunk(b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % word.encode())


STREAM = CHUNKED.replace(b"text/plain", b"text/event-stream")
DONE = chunk(b"data: [DONE]\n\n") + LAST_CHUNK


async def test_llm(front, upstream, run, tmp_path):
    """The program is killed in the middle of the stream and starts again with its key: the whole text, paid once."""
    proxy, jobs, tap = await front("llm"), tmp_path / "jobs.db", Tap()
    await (await run("llm.client", jobs, "ask", "Why?")).ends()
    upstream.script = tap.script
    first = await run("llm.client", jobs, "run", f"http://127.0.0.1:{proxy.port}")
    tap.send(STREAM, said("Because"))
    await until(lambda: "Because" in first.err)
    await first.dies()
    tap.end(said(" it is."), DONE)
    again = await run("llm.client", jobs, "run", f"http://127.0.0.1:{proxy.port}")
    assert await again.ends() == 0
    assert again.out.splitlines()[0] == "Because it is."
    assert again.out.splitlines()[1].endswith(" answered 200")
    assert len(upstream.received) == 1


@pytest.mark.parametrize("end", ["broken off", "ended too early"])
async def test_a_stream_that_was_cut(front, upstream, run, tmp_path, end):
    """It is never taken for a whole one: what broke off is asked again and paid again; what the API itself ended
    cleanly before its end is what the key stands for, and stays open."""
    proxy, jobs = await front("llm"), tmp_path / "jobs.db"
    await (await run("llm.client", jobs, "ask", "Why?")).ends()

    async def script(server: RawUpstream, _, writer, __) -> None:
        writer.write(STREAM + said("Because"))
        await writer.drain()
        if end == "ended too early":
            writer.write(LAST_CHUNK)
        elif len(server.received) == 1:
            await asyncio.sleep(0.2)
            abort(writer)
        else:
            writer.write(said(" it is.") + DONE)

    upstream.script = script
    client = await run("llm.client", jobs, "run", f"http://127.0.0.1:{proxy.port}", "--tries", 2)
    if end == "broken off":
        assert (await client.ends(), client.out.splitlines()[0]) == (0, "Because it is.")
        assert len(upstream.received) == 2
    else:
        assert (await client.ends(), client.out.split()[1:]) == (1, ["open", "-"])
        assert len(upstream.received) == 1


async def test_prompts_of_anthropic(front, upstream):
    """They have a rule, and an upstream, of their own; what an SDK marks as its second try is not paid again."""
    proxy = await front("llm", "http://127.0.0.1:1")
    for count, word in enumerate((b"executed", b"replayed")):
        prompt = request("POST", "/v1/messages", None, b"{}", f"x-stainless-retry-count: {count}")
        assert (await ask(proxy.port, prompt)).header("oncegate-status") == word
    assert len(upstream.received) == 1


async def test_agents(front, upstream, run, tmp_path):
    """The program is killed while the tool runs and starts again with its key and another id: one call, one result."""
    proxy, jobs, tap = await front("agents"), tmp_path / "jobs.db", Tap()
    await (await run("agents.client", jobs, "add", "charge", '{"amount": 2000}')).ends()
    upstream.script = tap.script
    first = await run("agents.client", jobs, "run", f"http://127.0.0.1:{proxy.port}/mcp")
    await until(lambda: upstream.received)
    await first.dies()
    sent = json.loads(upstream.received[0].body)
    result = json.dumps({"id": sent["id"], "result": {"content": [{"type": "text", "text": "charged 2000"}]}})
    tap.end(STREAM, chunk(b": ping\n\n"), chunk(f"data: {result}\n\n".encode()), LAST_CHUNK)
    again = await run("agents.client", jobs, "run", f"http://127.0.0.1:{proxy.port}/mcp")
    assert (await again.ends(), again.out.splitlines()[0]) == (0, "charged 2000")
    assert len(upstream.received) == 1
    message = {"jsonrpc": "2.0", "method": "message/send", "params": {"message": {"messageId": "m1"}}}
    upstream.script = answering(OK)
    for own_id in (1, 2):
        await ask(proxy.port, request("POST", "/a2a", None, json.dumps({**message, "id": own_id}).encode()))
    assert len(upstream.received) == 2


async def test_double_click(front, upstream, run):
    """Two clicks at once on a form without a key, or with a token, each of which times out and is sent again: one
    order for each form."""
    proxy = await front("double-click")
    upstream.script = answering(CHARGE, 2.5)
    forms = {"/orders": "item=7", "/checkout": "item=7&token=t1"}
    started = [
        await run("double-click.client", f"http://127.0.0.1:{proxy.port}{path}", form) for path, form in forms.items()
    ]
    for clicks in started:
        assert (await clicks.ends(), clicks.out) == (0, 'answered 201 {"id":"ch_1"}\n' * 2)
    assert {got.line.split()[1].decode(): got.body.decode() for got in upstream.received} == forms
    assert len(upstream.received) == 2
